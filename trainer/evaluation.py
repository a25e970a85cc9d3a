"""Errors of a potential on a data set, whole and by subset, and the numbers behind them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mlip_md.elements import symbol
from mlip_md.errors import DataError
from mlip_md.files import write_text
from mlip_md.graph import Array
from mlip_md.potential import Params, Potential
from mlip_md.trainer import metrics
from mlip_md.trainer.data import (
    Batch,
    BatchBudget,
    GraphStore,
    IsolatedAtoms,
    LabeledStructure,
    LabelKeys,
    is_prepared,
    iterate,
    iterate_batches,
    open_prepared,
    open_store,
    plan_epoch,
)
from mlip_md.trainer.step import EvalStep, make_eval_step


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Errors and predictions on a data set.

    Attributes:
        overall: errors as defined in ``mlip_md.trainer.metrics``, and ``structures``, their number.
        by_subset: the same by name of the subset.
        energies: (n_structures, 2) eV/atom, reference and predicted interaction energy.
        forces: (n_components, 2) eV/Å, reference and predicted.
    """

    overall: dict[str, float]
    by_subset: dict[str, dict[str, float]]
    energies: np.ndarray
    forces: np.ndarray


def evaluate_store(
    step: EvalStep,
    params: Params,
    store: GraphStore,
    budget: BatchBudget,
    *,
    on_oversize: str = "error",
) -> dict[str, float]:
    """Errors of weights on a store of graphs, as defined in ``mlip_md.trainer.metrics``.

    Args:
        step: the compiled evaluation of the network.
        params: its weights.
        store: graphs and labels.
        budget: shape of the batches.
        on_oversize: "error" or "drop" for structures larger than a batch.
    """
    total: dict[str, float] = {}
    for _, batch in _batches(store, budget, on_oversize):
        metrics.add_sums(total, step(params, batch)[1])
    return metrics.mean_errors(total)


def _batches(
    store: GraphStore, budget: BatchBudget, on_oversize: str
) -> Iterator[tuple[np.ndarray, Batch]]:
    """All structures of a store in its order."""
    plan = plan_epoch(store, budget, 0, 0, shuffle=False, on_oversize=on_oversize)
    return iterate_batches(store, plan, budget)


def evaluate_in_detail(
    step: EvalStep,
    params: Params,
    store: GraphStore,
    budget: BatchBudget,
    *,
    on_oversize: str = "error",
) -> Evaluation:
    """Errors whole and by subset, with every prediction; arguments as for ``evaluate_store``."""
    total: dict[str, float] = {}
    by_subset: dict[str, dict[str, float]] = {}
    energies, forces = [np.zeros((0, 2))], [np.zeros((0, 2))]
    for indices, batch in _batches(store, budget, on_oversize):
        prediction, _ = step(params, batch)
        energy = np.stack([batch.energy, prediction.energy], -1)[: len(indices)].astype(float)
        force = np.stack([batch.forces, prediction.forces], -1).astype(float)
        starts = np.concatenate([[0], np.cumsum(store.num_atoms[indices])])
        for k, index in enumerate(indices):
            part = force[starts[k] : starts[k + 1]]
            labeled = store.forces_mask is None or bool(store.forces_mask[index])
            error = float(np.diff(energy[k])[0])
            stress = _stress_error(store, int(index), prediction.stress[k])
            sums = metrics.structure_sums(error, np.diff(part)[..., 0], labeled, stress)
            metrics.add_sums(total, sums)
            metrics.add_sums(by_subset.setdefault(store.subsets[int(index)] or "unnamed", {}), sums)
            energies.append(energy[k : k + 1] / len(part))
            forces.append(part.reshape(-1, 2) if labeled else np.zeros((0, 2)))
    return Evaluation(
        _with_count(total),
        {name: _with_count(sums) for name, sums in sorted(by_subset.items())},
        np.concatenate(energies),
        np.concatenate(forces),
    )


def _stress_error(store: GraphStore, index: int, predicted: Array) -> np.ndarray | None:
    """Error of a stress (3, 3) eV/Å³, where there is a label."""
    if store.stress is None or store.stress_mask is None or not store.stress_mask[index]:
        return None
    return np.asarray(predicted, np.float64) - store.stress[index]


def _with_count(sums: dict[str, float]) -> dict[str, float]:
    return {"structures": sums.get("structures", 0.0), **metrics.mean_errors(sums)}


def read_graphs(
    path: str | Path,
    potential: Potential,
    *,
    split: str | None = None,
    on_bad: str = "error",
    keys: LabelKeys | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
) -> tuple[GraphStore, int]:
    """Read a data set for the evaluation of a potential, structure by structure.

    Args:
        path: a data file, or a folder of prepared data.
        potential: to be judged.
        split: only structures that the file marks so, or this part of the folder.
        on_bad: "error", or "skip" for unusable structures and elements unknown to the potential.
        keys: extxyz: names of labels; None tries the usual ones.
        energy_key: extxyz: name of the energy alone, where no ``keys`` are given.
        forces_key: extxyz: name of the forces, likewise.

    Returns:
        The graphs, without isolated atoms (their energy is E0, nothing predicts it), and how many
        structures were left out for their elements.

    Raises:
        DataError: if a file, a label or an element is unusable, or a folder has another cutoff.
    """
    if is_prepared(path):
        return _prepared(Path(path), potential, split, on_bad)
    left_out: list[str] = []

    def known(structures: Iterable[LabeledStructure]) -> Iterator[LabeledStructure]:
        for structure in structures:
            unknown = sorted(set(structure.atomic_numbers.tolist()) - set(potential.elements))
            if not unknown:
                yield structure
                continue
            if on_bad != "skip":
                raise _unknown_elements(structure.name, unknown)
            left_out.append(structure.name)

    structures = iterate(
        path, split=split, on_bad=on_bad, keys=keys or LabelKeys(energy_key, forces_key)
    )
    atoms = IsolatedAtoms()
    frames = atoms.part_from(structures, potential.cutoff)
    return _graphs(known(frames), potential), len(left_out)


def _graphs(structures: Iterable[LabeledStructure], potential: Potential) -> GraphStore:
    return GraphStore.from_structures(
        structures,
        potential.cutoff,
        elements=potential.elements,
        atomic_energies=potential.atomic_energies,
    )


def _prepared(
    folder: Path, potential: Potential, split: str | None, on_bad: str
) -> tuple[GraphStore, int]:
    if split is None:
        store = open_store(folder / "graphs")
    else:
        parts = open_prepared(folder).parts
        if split not in parts:
            raise DataError(f"{folder} has no part {split}; it has {', '.join(parts)}")
        store = parts[split]
    if store.cutoff != potential.cutoff:
        raise DataError(
            f"{folder} was prepared with a cutoff of {store.cutoff} Å, the potential has "
            f"{potential.cutoff} Å; evaluate on the data files themselves"
        )
    unknown = [z not in potential.elements for z in store.elements]
    foreign = store.compositions[:, unknown].any(axis=1)
    if foreign.any() and on_bad != "skip":
        first = int(np.argmax(foreign))
        there = store.compositions[first].astype(bool) & unknown
        raise _unknown_elements(store.names[first], np.array(store.elements)[there].tolist())
    kept = store.subset(np.flatnonzero(~foreign)).with_elements(potential.elements)
    return kept.with_atomic_energies(potential.atomic_energies), int(foreign.sum())


def _unknown_elements(name: str, unknown: Sequence[int]) -> DataError:
    return DataError(
        f"{name}: the potential was not made for {', '.join(map(symbol, unknown))}; leave such "
        "structures out with --on-bad skip"
    )


def evaluate(
    potential: Potential, structures: Iterable[LabeledStructure] | GraphStore, batch_size: int = 16
) -> Evaluation:
    """Errors of a potential on labeled structures.

    Args:
        potential: to be judged.
        structures: with total energies at the level of theory that it was trained on; or graphs
            made by ``read_graphs``.
        batch_size: structures per batch.

    Returns:
        Errors whole and by subset, and the predictions.

    Raises:
        DataError: if there is no structure, or an element that the potential does not know.
    """
    store = structures if isinstance(structures, GraphStore) else _graphs(structures, potential)
    if not len(store):
        raise DataError("there is no structure to evaluate on")
    budget = BatchBudget.from_card(batch_size, store=store)
    step = make_eval_step(potential.network.apply, potential.scaling_mean, potential.scaling_stdev)
    return evaluate_in_detail(step, potential.params, store, budget)


def write_errors(evaluation: Evaluation, path: Path) -> None:
    """Write the errors (not the predictions) as JSON."""
    values = {"overall": evaluation.overall, "by_subset": evaluation.by_subset}
    write_text(path, json.dumps(values, indent=1) + "\n")
