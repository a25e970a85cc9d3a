"""Errors of a potential on a data set, whole and in parts, and the numbers behind them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlip_md.elements import symbol
from mlip_md.errors import DataError
from mlip_md.files import write_text
from mlip_md.potential import Params, Potential, Prediction
from mlip_md.trainer import metrics
from mlip_md.trainer.data import (
    Batch,
    BatchBudget,
    GraphStore,
    IsolatedAtoms,
    LabeledStructure,
    LabelKeys,
    TrainingData,
    is_prepared,
    iterate,
    iterate_parts,
    open_prepared,
    open_store,
    plan_epoch,
    write_structures,
)
from mlip_md.trainer.data.store import ranges
from mlip_md.trainer.metrics import Errors
from mlip_md.trainer.parallel import Team
from mlip_md.trainer.step import EvalStep, make_eval_step

WORST = 5
"""Structures with the largest errors that are named unless one asks for more."""


class Predictions(NamedTuple):
    """What a potential says of the n structures of a store, N atoms in all.

    Attributes:
        indices: (n,) of the structures in their store; those that fit into no batch are missing.
        energy: (n,) eV, total energies.
        forces: n arrays (n_atoms, 3), eV/Å.
        stress: (n, 3, 3) eV/Å³, positive under tension; 0 without a volume.
    """

    indices: np.ndarray
    energy: np.ndarray
    forces: Sequence[np.ndarray]
    stress: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Evaluation:
    """Errors and predictions on a data set.

    Attributes:
        overall: errors as defined in ``mlip_md.trainer.metrics``, and ``structures``, their number.
        by_subset: the same by name of the subset.
        by_element: errors of forces by symbol, and ``atoms``, their number.
        by_structure: errors of each structure, in the order of ``predictions``.
        energies: (n_structures, 2) eV/atom, reference and predicted interaction energy.
        forces: (n_components, 2) eV/Å, reference and predicted.
        stresses: (n_components, 2) eV/Å³, reference and predicted.
        predictions: for every structure, also without labels of forces or stress.
        store: the structures.
    """

    overall: Errors
    by_subset: dict[str, Errors]
    by_element: dict[str, Errors]
    by_structure: Sequence[Errors]
    energies: np.ndarray
    forces: np.ndarray
    stresses: np.ndarray
    predictions: Predictions
    store: GraphStore

    def worst(self, count: int = WORST) -> list[dict[str, Any]]:
        """Name, subset and errors of the structures with the largest errors, the largest first.

        They are ordered as models are chosen, by forces_rmse + 10 · energy_rmse_per_atom (eV/Å),
        see ``metrics.selection_score``.

        Args:
            count: how many at most.
        """
        scores = [
            metrics.selection_score(errors, with_forces=not math.isnan(errors["forces_rmse"]))
            for errors in self.by_structure
        ]
        rows = []
        for k in np.argsort(np.negative(scores), kind="stable")[:count].tolist():
            index = int(self.predictions.indices[k])
            origin = {"name": self.store.names[index], "subset": self.store.subsets[index]}
            rows.append({**origin, **self.by_structure[k]})
        return rows


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
    return metrics.mean_errors(_sums(step, params, store, budget, on_oversize, Team()))


def evaluate_sets(
    step: EvalStep, params: Params, data: TrainingData, team: Team | None = None
) -> tuple[Errors, dict[str, Errors]]:
    """Errors of weights on the validation part: of all its structures, and by name of their set.

    Args:
        step: the compiled evaluation of the network.
        params: its weights.
        data: of the run.
        team: devices for which ``step`` is compiled; None is one.
    """
    total: dict[str, float] = {}
    errors = {}
    for name, store in data.sets().items():
        sums = _sums(step, params, store, data.budget, data.on_oversize, team or Team())
        metrics.add_sums(total, sums)
        errors[name] = metrics.mean_errors(sums)
    return metrics.mean_errors(total), {name: values for name, values in errors.items() if name}


def _sums(
    step: EvalStep,
    params: Params,
    store: GraphStore,
    budget: BatchBudget,
    on_oversize: str,
    team: Team,
) -> dict[str, float]:
    total: dict[str, float] = {}
    for _, batch in _batches(params, store, budget, on_oversize, team):
        metrics.add_sums(total, step(params, batch)[1])
    return total


def _batches(
    params: Params, store: GraphStore, budget: BatchBudget, on_oversize: str, team: Team
) -> Iterator[tuple[np.ndarray, Batch]]:
    """All structures of a store in its order, in the precision of the weights."""
    plan = plan_epoch(store, budget, 0, 0, shuffle=False, on_oversize=on_oversize)
    dtype = str(jax.tree_util.tree_leaves(params)[0].dtype)
    for indices, parts in iterate_parts(store, plan, budget, team.shares, dtype=dtype):
        yield indices, team.spread(parts)


def evaluate_in_detail(
    step: EvalStep,
    params: Params,
    store: GraphStore,
    budget: BatchBudget,
    *,
    on_oversize: str = "error",
) -> Evaluation:
    """All errors, with every prediction; arguments as for ``evaluate_store``."""
    params = jax.tree_util.tree_map(jnp.asarray, params)  # once, not for every batch
    collection = _Collection(store)
    for indices, batch in _batches(params, store, budget, on_oversize, Team()):
        collection.add(indices, batch, step(params, batch)[0])
    return collection.evaluation()


class _Collection:
    """Errors and predictions while batch after batch is computed."""

    def __init__(self, store: GraphStore) -> None:
        self.store = store
        self.total: dict[str, float] = {}
        self.by_subset: dict[str, dict[str, float]] = {}
        self.by_structure: list[Errors] = []
        self.indices: list[int] = []
        # for each structure: reference and prediction in the last axis
        self.energies: list[np.ndarray] = []
        self.forces: list[np.ndarray] = []
        self.stresses: list[np.ndarray] = []

    def add(self, indices: np.ndarray, batch: Batch, prediction: Prediction) -> None:
        """Take in the structures of a batch."""
        energy = np.stack([batch.energy, prediction.energy], -1)[: len(indices)].astype(float)
        force = np.stack([batch.forces, prediction.forces], -1).astype(float)
        reference = np.zeros_like(prediction.stress) if batch.stress is None else batch.stress
        stress = np.stack([reference, prediction.stress], -1).astype(float)
        starts = np.concatenate([[0], np.cumsum(self.store.num_atoms[indices])])
        for k, index in enumerate(indices.tolist()):
            self._add(index, energy[k], force[starts[k] : starts[k + 1]], stress[k])

    def _add(self, index: int, energy: np.ndarray, forces: np.ndarray, stress: np.ndarray) -> None:
        store = self.store
        sums = metrics.structure_sums(
            float(np.diff(energy)[0]),
            np.diff(forces)[..., 0],
            store.has_forces(index),
            np.diff(stress)[..., 0] if store.has_stress(index) else None,
        )
        metrics.add_sums(self.total, sums)
        subset = store.subsets[index] or "unnamed"
        metrics.add_sums(self.by_subset.setdefault(subset, {}), sums)
        self.by_structure.append(metrics.mean_errors(sums))
        self.indices.append(index)
        self.energies.append(energy)
        self.forces.append(forces)
        self.stresses.append(stress)

    def evaluation(self) -> Evaluation:
        """All that was taken in."""
        store, indices = self.store, np.array(self.indices, np.int64)
        energies = np.array(self.energies).reshape(-1, 2)
        stresses = np.array(self.stresses).reshape(-1, 3, 3, 2)
        labeled = [k for k, index in enumerate(self.indices) if store.has_forces(index)]
        forces = np.concatenate([np.zeros((0, 3, 2)), *(self.forces[k] for k in labeled)])
        rows = indices[labeled]
        numbers = store.atomic_numbers[ranges(store.first_atom[rows], store.num_atoms[rows])]
        elements = metrics.element_errors(numbers, np.diff(forces)[..., 0])
        isolated = 0.0 if store.atomic_energies is None else store.atomic_energies
        e0 = (store.compositions[indices] * isolated).sum(axis=1)
        with_stress = [k for k, index in enumerate(self.indices) if store.has_stress(index)]
        return Evaluation(
            overall=_with_count(self.total),
            by_subset={name: _with_count(sums) for name, sums in sorted(self.by_subset.items())},
            by_element={symbol(z): errors for z, errors in elements.items()},
            by_structure=self.by_structure,
            energies=energies / store.num_atoms[indices][:, None],
            forces=forces.reshape(-1, 2),
            stresses=stresses[with_stress].reshape(-1, 2),
            predictions=Predictions(
                indices, energies[:, 1] + e0, [f[..., 1] for f in self.forces], stresses[..., 1]
            ),
            store=store,
        )


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
        Errors whole, by subset, by element and by structure, and the predictions.

    Raises:
        DataError: if there is no structure, or an element that the potential does not know.
    """
    store = structures if isinstance(structures, GraphStore) else _graphs(structures, potential)
    if not len(store):
        raise DataError("there is no structure to evaluate on")
    budget = BatchBudget.from_card(batch_size, store=store)
    step = make_eval_step(potential.network.apply, potential.scaling_mean, potential.scaling_stdev)
    return evaluate_in_detail(step, potential.params, store, budget)


def write_errors(evaluation: Evaluation, path: Path, worst: int = WORST) -> None:
    """Write the errors (not the predictions) as JSON; what there are no labels for is null.

    Args:
        evaluation: errors whole, by subset and by element.
        path: of the file.
        worst: how many of the structures with the largest errors to name.

    Raises:
        OutputError: if the file cannot be written.
    """
    values = {
        "overall": evaluation.overall,
        "by_subset": evaluation.by_subset,
        "by_element": evaluation.by_element,
        "worst": evaluation.worst(worst),
    }
    write_text(path, json.dumps(_without_nan(values), indent=1) + "\n")


def _without_nan(value: Any) -> Any:
    """A tree with None for NaN, which JSON has not."""
    if isinstance(value, dict):
        return {name: _without_nan(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if value != value else value


def write_predictions(evaluation: Evaluation, path: Path) -> None:
    """Write the structures with labels and predictions as extended XYZ, in the order of the store.

    Labels are ``REF_energy``, ``REF_forces`` and ``REF_stress``, predictions ``mlip_md_energy``,
    ``mlip_md_forces`` and, of structures with a volume, ``mlip_md_stress``; eV, eV/Å, eV/Å³.

    Args:
        evaluation: with its structures.
        path: of the file.

    Raises:
        OutputError: if the file cannot be written.
    """
    indices, energy, forces, stress = evaluation.predictions
    cell, place = evaluation.store.cell, {index: k for k, index in enumerate(indices.tolist())}

    def predicted(index: int) -> dict[str, Any]:
        k = place[index]
        values = {"energy": float(energy[k]), "forces": forces[k]}
        has_volume = cell is not None and bool(np.linalg.det(cell[index]))
        return {**values, "stress": stress[k]} if has_volume else values

    write_structures(evaluation.store, np.sort(indices), path, predicted)
