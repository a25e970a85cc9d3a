"""Errors of a potential on a data set, defined once for training, validation and evaluation.

With ΔE_g = E - E_ref of structure g (eV), N_g its atoms, ΔF_ic one force component (eV/Å):

* energy_mae, energy_rmse: mean |ΔE_g|, √mean ΔE_g² over structures, eV.
* energy_mae_per_atom, energy_rmse_per_atom: the same of ΔE_g / N_g, eV/atom.
* forces_mae, forces_rmse: over all components of all atoms of the data set, eV/Å; structures
  without force labels do not count.
* stress_mae, stress_rmse: over the nine components of the structures with a stress label, eV/Å³;
  only where there are such labels.

Of an element, forces_mae and forces_rmse are over the components of its atoms.

Roots are taken last, of sums over the whole data set; how it was batched cannot matter. (The logs
behind the published cards average such force errors per batch, weighted by its structures, so they
depend slightly on the batching; for one batch the numbers are the same.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mlip_md.graph import sum_per_graph
from mlip_md.potential import Prediction
from mlip_md.trainer.data.batching import Batch

Sums = dict[str, jax.Array]
Errors = dict[str, float]
"""Errors by the names above."""


def error_sums(prediction: Prediction, batch: Batch) -> Sums:
    """Sums of absolute and squared errors over the real structures and atoms of a batch."""
    graph = batch.graph
    graph_mask = jnp.asarray(graph.graph_mask)
    node_mask = jnp.asarray(graph.node_mask)
    if batch.forces_mask is not None:
        node_mask = node_mask & jnp.asarray(batch.forces_mask)[graph.node_graph]
    node_mask = node_mask[:, None]
    atoms = jnp.maximum(sum_per_graph(jnp.ones(graph.n_nodes), graph), 1.0)
    energy = jnp.where(graph_mask, prediction.energy - batch.energy, 0.0)
    forces = jnp.where(node_mask, prediction.forces - batch.forces, 0.0)

    stress = {} if batch.stress is None else _stress_sums(prediction, batch)
    return stress | {
        "structures": jnp.sum(graph_mask),
        "components": 3 * jnp.sum(node_mask),
        "energy_abs": jnp.sum(jnp.abs(energy)),
        "energy_sq": jnp.sum(energy**2),
        "energy_per_atom_abs": jnp.sum(jnp.abs(energy / atoms)),
        "energy_per_atom_sq": jnp.sum((energy / atoms) ** 2),
        "forces_abs": jnp.sum(jnp.abs(forces)),
        "forces_sq": jnp.sum(forces**2),
    }


def _stress_sums(prediction: Prediction, batch: Batch) -> Sums:
    mask = jnp.asarray(batch.graph.graph_mask) & jnp.asarray(batch.stress_mask)
    stress = jnp.where(mask[:, None, None], prediction.stress - jnp.asarray(batch.stress), 0.0)
    return {
        "stress_components": 9 * jnp.sum(mask),
        "stress_abs": jnp.sum(jnp.abs(stress)),
        "stress_sq": jnp.sum(stress**2),
    }


def structure_sums(
    energy_error: float,
    force_errors: np.ndarray,
    with_forces: bool = True,
    stress_error: np.ndarray | None = None,
) -> dict[str, float]:
    """The same sums for one structure.

    Args:
        energy_error: ΔE, eV.
        force_errors: ΔF (n, 3), eV/Å.
        with_forces: whether forces are labels.
        stress_error: ΔS (3, 3), eV/Å³, or None without a label.
    """
    n_atoms = len(force_errors)
    if not with_forces:
        force_errors = np.zeros((0, 3))
    stress: dict[str, float] = {}
    if stress_error is not None:
        stress = {
            "stress_components": 9,
            "stress_abs": float(np.abs(stress_error).sum()),
            "stress_sq": float(np.square(stress_error).sum()),
        }
    return stress | {
        "structures": 1,
        "components": 3 * len(force_errors),
        "energy_abs": abs(energy_error),
        "energy_sq": energy_error**2,
        "energy_per_atom_abs": abs(energy_error) / n_atoms,
        "energy_per_atom_sq": (energy_error / n_atoms) ** 2,
        "forces_abs": float(np.abs(force_errors).sum()),
        "forces_sq": float(np.square(force_errors).sum()),
    }


def element_errors(atomic_numbers: np.ndarray, force_errors: np.ndarray) -> dict[int, Errors]:
    """Force errors by element.

    Args:
        atomic_numbers: (n,) of atoms with force labels.
        force_errors: ΔF (n, 3), eV/Å.

    Returns:
        By atomic number: atoms (their number), forces_mae and forces_rmse, eV/Å.
    """
    errors = {}
    for z in np.unique(atomic_numbers).tolist():
        part = force_errors[atomic_numbers == z]
        errors[z] = {
            "atoms": float(len(part)),
            "forces_mae": float(np.abs(part).mean()),
            "forces_rmse": float(np.sqrt(np.square(part).mean())),
        }
    return errors


def add_sums(total: dict[str, float], sums: Mapping[str, object]) -> None:
    """Add a batch's sums to running totals, in double precision."""
    for name, value in sums.items():
        total[name] = total.get(name, 0.0) + float(value)  # type: ignore[arg-type] # 0-d arrays


def mean_errors(total: Mapping[str, float]) -> dict[str, float]:
    """The errors defined above from sums over a data set; NaN for an empty one."""
    structures = total.get("structures", 0.0) or math.nan
    components = total.get("components", 0.0) or math.nan
    labels = total.get("stress_components", 0.0)
    stress = {}
    if labels:
        stress = {
            "stress_mae": total["stress_abs"] / labels,
            "stress_rmse": math.sqrt(total["stress_sq"] / labels),
        }
    return {
        "energy_mae": total.get("energy_abs", 0.0) / structures,
        "energy_rmse": math.sqrt(total.get("energy_sq", 0.0) / structures),
        "energy_mae_per_atom": total.get("energy_per_atom_abs", 0.0) / structures,
        "energy_rmse_per_atom": math.sqrt(total.get("energy_per_atom_sq", 0.0) / structures),
        "forces_mae": total.get("forces_abs", 0.0) / components,
        "forces_rmse": math.sqrt(total.get("forces_sq", 0.0) / components),
    } | stress


def selection_score(
    values: Mapping[str, float],
    energy_weight: float = 10.0,
    with_forces: bool = True,
    stress_weight: float = 0.0,
) -> float:
    """The number by which the best model is chosen, eV/Å; it knows no loss weights.

    score = forces_rmse + energy_weight · energy_rmse_per_atom + stress_weight · stress_rmse, where
    there are labels of stress; energy_weight in 1/Å, stress_weight in Å². The default of 10/Å makes
    1 meV/atom as important as 10 meV/Å, about the ratio that good potentials reach.
    """
    forces = values["forces_rmse"] if with_forces else 0.0
    stress = stress_weight * values.get("stress_rmse", 0.0) if stress_weight else 0.0
    return forces + energy_weight * values["energy_rmse_per_atom"] + stress
