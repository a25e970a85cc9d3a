"""Errors of a potential on a data set, whole and by subset, and the numbers behind them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.potential import Potential
from mlip_md.trainer import metrics
from mlip_md.trainer.checkpoint import write_atomically
from mlip_md.trainer.data import BatchBudget, GraphStore, Structure, plan_epoch
from mlip_md.trainer.dataset import batches
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
    params: Any,
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
    plan = plan_epoch(store, budget, 0, 0, shuffle=False, on_oversize=on_oversize)
    for _, batch in batches(store, plan, budget):
        metrics.add_sums(total, step(params, batch)[1])
    return metrics.errors(total)


def evaluate_in_detail(
    step: EvalStep,
    params: Any,
    store: GraphStore,
    budget: BatchBudget,
    subsets: Sequence[str],
    *,
    on_oversize: str = "error",
) -> Evaluation:
    """Errors whole and by subset, with every prediction.

    Args:
        step: the compiled evaluation of the network.
        params: its weights.
        store: graphs and labels.
        budget: shape of the batches.
        subsets: (n_structures,) name of each structure's subset.
        on_oversize: "error" or "drop" for structures larger than a batch.
    """
    total: dict[str, float] = {}
    by_subset: dict[str, dict[str, float]] = {}
    energies, forces = [np.zeros((0, 2))], [np.zeros((0, 2))]
    plan = plan_epoch(store, budget, 0, 0, shuffle=False, on_oversize=on_oversize)
    for indices, batch in batches(store, plan, budget):
        prediction, _ = step(params, batch)
        energy = np.stack([batch.energy, prediction.energy], -1)[: len(indices)].astype(float)
        force = np.stack([batch.forces, prediction.forces], -1).astype(float)
        starts = np.concatenate([[0], np.cumsum(store.num_atoms[indices])])
        for k, index in enumerate(indices):
            part = force[starts[k] : starts[k + 1]]
            sums = metrics.structure_sums(float(np.diff(energy[k])[0]), np.diff(part)[..., 0])
            metrics.add_sums(total, sums)
            metrics.add_sums(by_subset.setdefault(subsets[int(index)] or "unnamed", {}), sums)
            energies.append(energy[k : k + 1] / len(part))
            forces.append(part.reshape(-1, 2))
    return Evaluation(
        _with_count(total),
        {name: _with_count(sums) for name, sums in sorted(by_subset.items())},
        np.concatenate(energies),
        np.concatenate(forces),
    )


def _with_count(sums: dict[str, float]) -> dict[str, float]:
    return {"structures": sums.get("structures", 0.0), **metrics.errors(sums)}


def evaluate(
    potential: Potential, structures: Sequence[Structure], batch_size: int = 16
) -> Evaluation:
    """Errors of a potential on labelled structures.

    Args:
        potential: to be judged.
        structures: with total energies at the level of theory that it was trained on.
        batch_size: structures per batch.

    Returns:
        Errors whole and by subset, and the predictions.

    Raises:
        DataError: if there is no structure, or an element that the potential does not know.
    """
    store = GraphStore.from_structures(
        structures,
        potential.cutoff,
        elements=potential.elements,
        atomic_energies=potential.atomic_energies,
    )
    budget = BatchBudget.from_card(batch_size, store=store)
    step = make_eval_step(potential.network.apply, potential.scaling_mean, potential.scaling_stdev)
    return evaluate_in_detail(step, potential.params, store, budget, store.subsets)


def write_json(evaluation: Evaluation, path: Path) -> None:
    """Write the errors (not the predictions) as JSON."""
    values = {"overall": evaluation.overall, "by_subset": evaluation.by_subset}
    write_atomically(path, (json.dumps(values, indent=1) + "\n").encode())
