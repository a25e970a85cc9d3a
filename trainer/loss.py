"""Training losses: weighted energy, force and stress terms, each a mean per structure first.

L = 1/G Σ_g [ w_E ℓ_E(g) + w_F ℓ_F(g) + w_S ℓ_S(g) ] over the G real structures of a batch.

* MSE: ℓ_E = (ΔE / N_g)², ℓ_F = 1/N_g Σ_i mean_xyz ΔF², ℓ_S = mean of the nine ΔS².
* Huber (P. J. Huber, Ann. Math. Statist. 35, 73 (1964)): ½e² for |e| <= δ, δ(|e| - ½δ) beyond;
  on ΔE / N_g, on every ΔF component and on every ΔS component. For forces δ shrinks with the
  reference force ("adaptive" Huber of MACE): δ·{1, 0.7, 0.4, 0.1} for |F| below 100, in (100, 200),
  in (200, 300) and elsewhere, in eV/Å; exactly 100, 200 and 300 fall in the last class.
* L1: |e| in the places of the squares of MSE. L1-L2: the same, but for the forces ℓ_F = 1/N_g Σ_i
  |ΔF_i|, the length of the error of each atom's force (the "l2mae" loss of L. Chanussot et al., ACS
  Catal. 11, 6059 (2021), and of B. Wood et al., arXiv:2506.23971).

Labels that a structure lacks add 0; where structures have weights of their own, each multiplies its
term of that structure (and the mean is still over G).

The mean per structure comes first, so a small molecule weighs as much as a large one; it is the
definition with which the published MACE and NequIP organics models were trained.
The weights are traced values: changing them between epochs recompiles nothing.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax.losses import huber_loss

from mlip_md.graph import Array, sum_per_graph
from mlip_md.potential import Prediction
from mlip_md.trainer.data.batching import Batch
from mlip_md.trainer.recipe import LossConfig, WeightStep

FORCE_CLASSES = ((0.0, 100.0, 1.0), (100.0, 200.0, 0.7), (200.0, 300.0, 0.4))
"""Reference force norms (eV/Å) above and below which a Huber δ is multiplied by the last number."""
MAX_FORCE_FACTOR = 0.1


class LossWeights(NamedTuple):
    """Weights of the loss terms in one epoch: w_E, w_F (Å²), w_S (Å⁶) on squared errors in eV."""

    energy: np.float32
    forces: np.float32
    stress: np.float32


def weight_at(schedule: list[WeightStep], epoch: int) -> float:
    """The value of a weight in an epoch (counted from 1): that of the last step reached.

    Epoch 0 has the first value.
    """
    epoch = max(epoch, schedule[0].from_epoch)
    return [step.value for step in schedule if step.from_epoch <= epoch][-1]


def weights_at(loss: LossConfig, epoch: int) -> LossWeights:
    """All weights of an epoch, epochs counted from 1; epoch 0 is the evaluation before training."""
    terms = (loss.energy, loss.forces, loss.stress)
    return LossWeights(*(np.float32(weight_at(term.weight, epoch)) for term in terms))


def stage_at(loss: LossConfig, epoch: int) -> int:
    """Training stage (from 1) that an epoch belongs to: each change of weights begins a new one."""
    values = [tuple(float(w) for w in weights_at(loss, e)) for e in range(1, max(epoch, 1) + 1)]
    return 1 + sum(a != b for a, b in itertools.pairwise(values))


def force_deltas(reference: Array, delta: float) -> jax.Array:
    """Huber δ per atom (n_nodes, 1) from reference forces (n_nodes, 3) eV/Å."""
    norms = jnp.linalg.norm(reference, axis=-1, keepdims=True)
    factors = jnp.full_like(norms, MAX_FORCE_FACTOR)
    for low, high, factor in FORCE_CLASSES:
        inside = (norms < high) if low == 0.0 else (norms > low) & (norms < high)
        factors = jnp.where(inside, factor, factors)
    return delta * factors


def structure_losses(
    loss: LossConfig, prediction: Prediction, batch: Batch
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Unweighted ℓ_E, ℓ_F, ℓ_S of every structure, (n_graphs,) each; see the module's text."""
    graph = batch.graph
    atoms = jnp.maximum(sum_per_graph(jnp.ones(graph.n_nodes), graph), 1.0)
    energy_error = (prediction.energy - batch.energy) / atoms
    force_error = prediction.forces - batch.forces

    def penalty(error: jax.Array, delta: float | jax.Array) -> jax.Array:
        if loss.kind == "mse":
            return error**2
        return huber_loss(error, delta=delta) if loss.kind == "huber" else jnp.abs(error)

    energy_terms = penalty(energy_error, loss.delta)
    if loss.kind == "l1-l2":
        force_terms = _lengths(force_error)
    else:
        force_terms = jnp.mean(
            penalty(force_error, force_deltas(batch.forces, loss.delta)), axis=-1
        )
    force_loss = sum_per_graph(force_terms, graph) / atoms
    if batch.forces_mask is not None:
        force_loss = jnp.where(jnp.asarray(batch.forces_mask), force_loss, 0.0)
    if batch.stress is None:
        return energy_terms, force_loss, jnp.zeros_like(energy_terms)
    stress_terms = penalty(prediction.stress - batch.stress, loss.delta)
    stress_loss = jnp.mean(stress_terms, axis=(1, 2))
    return energy_terms, force_loss, jnp.where(jnp.asarray(batch.stress_mask), stress_loss, 0.0)


def _lengths(vectors: jax.Array) -> jax.Array:
    """Lengths (n,) of vectors (n, 3), with gradient 0 where one is 0."""
    squares = jnp.sum(vectors**2, axis=-1)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def batch_loss(
    loss: LossConfig,
    prediction: Prediction,
    batch: Batch,
    weights: LossWeights,
    structure_weights: jax.Array | None = None,
) -> jax.Array:
    """The loss of a batch, a scalar; padding does not count.

    Args:
        loss: kind and δ.
        prediction: of the network, for the batch's graph.
        batch: graph and reference values.
        weights: of the terms, in the present epoch.
        structure_weights: (n_graphs,) factors ω_g on the structures' losses; None is 1.
    """
    terms = structure_losses(loss, prediction, batch)
    if batch.weights is not None:
        own = jnp.asarray(batch.weights)
        terms = terms[0] * own[:, 0], terms[1] * own[:, 1], terms[2] * own[:, 2]
    total = weights.energy * terms[0] + weights.forces * terms[1] + weights.stress * terms[2]
    if structure_weights is not None:
        total = total * structure_weights
    mask = jnp.asarray(batch.graph.graph_mask)
    return jnp.sum(jnp.where(mask, total, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
