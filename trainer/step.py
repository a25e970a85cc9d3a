"""One training step and one validation step, as pure functions that are compiled once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlip_md.compiler import check_sums, jit
from mlip_md.devices import find_device, message_memory
from mlip_md.networks.layers import bounding_turns
from mlip_md.networks.native_convolution import find_native
from mlip_md.potential import Params, Prediction, predict
from mlip_md.trainer.data.batching import Batch
from mlip_md.trainer.loss import LossWeights, batch_loss
from mlip_md.trainer.metrics import Sums, error_sums
from mlip_md.trainer.optimizer import (
    debiased_ema,
    learning_factors,
    make_optimizer,
    schedule_free_average,
    update_ema,
)
from mlip_md.trainer.recipe import OptimizerConfig, Recipe


@struct.dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
        params: weights of the network.
        opt_state: of the optimizer, its learning-rate counter included.
        ema: running average of the weights, started at zero (see ``debiased_ema``).
        updates: () int32, weight updates made.
        micro_step: () int32, batches since the last update (gradient accumulation).
        bad_steps: () int32, steps refused for NaN or infinity, in all.
        bad_in_row: () int32, those since the last good step.
    """

    params: Params
    opt_state: optax.OptState
    ema: Params
    updates: jax.Array
    micro_step: jax.Array
    bad_steps: jax.Array
    bad_in_row: jax.Array


class StepLog(NamedTuple):
    """What a step tells the host: loss, norm of its gradient, bad steps in a row, structures.

    Of several processes also whether one asks all to stop, see ``Team.asking``.
    """

    loss: jax.Array
    gradient_norm: jax.Array
    bad_in_row: jax.Array
    structures: jax.Array
    asked: jax.Array | None = None


TURN_MEMORY = 512 * 2**20
"""Bytes that a turn of messages may take in training with the compiled convolution, which makes a
quarter of them: computing anew in the backward pass costs more than warm caches save."""

TrainStep = Any
"""``jax.jit`` of (TrainState, Batch, LossWeights) to (TrainState, StepLog); a fourth argument is a
factor on the learning rate, a fifth what processes ask."""
EvalStep = Callable[[Params, Batch], tuple[Prediction, Sums]]


def init_state(recipe: Recipe, params: Params) -> TrainState:
    """The state before the first step, on the device, in the precision of the recipe."""
    params = cast(params, recipe.train.precision)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        params=params,
        opt_state=make_optimizer(recipe.optimizer, recipe.network.decays).init(params),
        ema=jax.tree_util.tree_map(jnp.zeros_like, params),
        updates=zero,
        micro_step=zero + 0,
        bad_steps=zero + 0,
        bad_in_row=zero + 0,
    )


def make_train_step(
    apply: Callable[..., Any],
    recipe: Recipe,
    scaling_mean: float = 0.0,
    scaling_stdev: float = 1.0,
    mesh: Mesh | None = None,
) -> TrainStep:
    """The compiled step ``(state, batch, weights[, rate, asked]) -> (state, log)``.

    A step whose loss or gradient is not finite changes nothing but the counters of bad steps. The
    old state's memory is reused for the new one (donated); do not touch it afterwards. ``rate`` is
    a factor on the learning rate.

    Args:
        apply: ``network.apply``: (params, graph) to node energies (n_nodes,), eV.
        recipe: its loss, optimizer and averaging; the lengths of the schedule in steps.
        scaling_mean: added to every node energy, eV.
        scaling_stdev: factor of the network's node energies before that.
        mesh: devices that compute a part of each batch, which then has an axis of parts in front.

    Raises:
        CompilerError: if the installed compiler adds up wrongly.
    """
    check_sums(recipe.train.precision, device := find_device(None))
    memory = message_memory(device)
    if device.platform == "cpu" and find_native().available:
        memory = TURN_MEMORY
    optimizer = make_optimizer(recipe.optimizer, recipe.network.decays)
    every, decay = recipe.optimizer.num_gradient_accumulation_steps, recipe.train.ema_decay

    def loss_of(params: Params, batch: Batch, weights: LossWeights) -> jax.Array:
        with bounding_turns(memory):
            prediction = predict(
                apply, params, batch.graph, scaling_mean=scaling_mean, scaling_stdev=scaling_stdev
            )
        return batch_loss(recipe.loss, prediction, batch, weights)

    gradient_of = jax.value_and_grad(loss_of)
    if mesh is not None:
        gradient_of = _mean_over_parts(gradient_of, mesh)

    def good_step(state: TrainState, gradient: Params, rate: jax.Array | None) -> TrainState:
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        if rate is not None:
            updates = optax.tree.scale(rate, updates)
        params = optax.apply_updates(state.params, updates)
        complete = state.micro_step + 1 == every
        averaged = update_ema(state.ema, params, decay)
        return dataclasses.replace(
            state,
            params=params,
            opt_state=opt_state,
            ema=_select(complete, averaged, state.ema),
            updates=state.updates + complete,
            micro_step=jnp.where(complete, 0, state.micro_step + 1),
            bad_in_row=jnp.zeros_like(state.bad_in_row),
        )

    def step(
        state: TrainState,
        batch: Batch,
        weights: LossWeights,
        rate: jax.Array | None = None,
        asked: jax.Array | None = None,
    ) -> tuple[TrainState, StepLog]:
        loss, gradient = gradient_of(state.params, batch, weights)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        refused = dataclasses.replace(
            state, bad_steps=state.bad_steps + 1, bad_in_row=state.bad_in_row + 1
        )
        state = _select(finite, good_step(state, gradient, rate), refused)
        count = jnp.sum(batch.graph.graph_mask)
        stop = None if asked is None else jnp.max(asked)
        return state, StepLog(loss, norm, state.bad_in_row, count, stop)

    if mesh is None:
        return jit(step, donate_argnums=0)
    return jit(step, donate_argnums=0, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _mean_over_parts(gradient_of: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Loss and gradient of a divided batch: means over all its structures, not over devices.

    Args:
        gradient_of: (params, batch, weights) to the mean loss of a batch and its gradient.
        mesh: the devices, with one axis.
    """
    (axis,) = mesh.axis_names

    def part(params: Params, batch: Batch, weights: LossWeights) -> Any:
        batch = _only_part(batch)
        found = gradient_of(params, batch, weights)
        count = jnp.sum(batch.graph.graph_mask)
        share = count / jax.lax.psum(count, axis)
        return jax.lax.psum(optax.tree.scale(share.astype(found[0].dtype), found), axis)

    return _on_parts(part, mesh, PartitionSpec())


def _only_part(batch: Batch) -> Batch:
    """A device's part of a batch, without the axis of parts."""
    part: Batch = jax.tree_util.tree_map(lambda array: array[0], batch)
    return part


def _on_parts(function: Callable[..., Any], mesh: Mesh, results: Any) -> Callable[..., Any]:
    """A function of (params, batch, …) on every device, the batch's part there.

    Networks, their kernels among them, do not know that there are other devices, so JAX cannot
    follow which of their arrays differ; nothing inside their gradient is summed over devices.
    """
    whole, (axis,) = PartitionSpec(), mesh.axis_names

    def call(params: Params, batch: Batch, *others: Any) -> Any:
        specs = (whole, PartitionSpec(axis), *(whole for _ in others))
        return jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=results, check_vma=False
        )(params, batch, *others)

    return call


def make_eval_step(
    apply: Callable[..., Any],
    scaling_mean: float = 0.0,
    scaling_stdev: float = 1.0,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> EvalStep:
    """The compiled evaluation ``(params, batch) -> (prediction, sums of errors)``.

    Args:
        apply: ``network.apply``: (params, graph) to node energies (n_nodes,), eV.
        scaling_mean: added to every node energy, eV.
        scaling_stdev: factor of the network's node energies before that.
        dtype: precision in which it is to be called.
        mesh: as ``make_train_step`` takes it; the prediction has an axis of parts then, too.

    Raises:
        CompilerError: if the installed compiler adds up wrongly.
    """
    check_sums(dtype, device := find_device(None))
    memory = message_memory(device)

    def step(params: Params, batch: Batch) -> tuple[Prediction, Sums]:
        with bounding_turns(memory):
            prediction = predict(
                apply, params, batch.graph, scaling_mean=scaling_mean, scaling_stdev=scaling_stdev
            )
        return prediction, error_sums(prediction, batch)

    if mesh is None:
        return jit(step)
    (axis,) = mesh.axis_names

    def part(params: Params, batch: Batch) -> tuple[Prediction, Sums]:
        prediction, sums = step(params, _only_part(batch))
        added: Sums = jax.lax.psum(sums, axis)
        return jax.tree_util.tree_map(lambda array: array[None], prediction), added

    return jit(_on_parts(part, mesh, (PartitionSpec(axis), PartitionSpec())))


def averaged_params(
    state: TrainState, decay: float, optimizer: OptimizerConfig | None = None
) -> Params:
    """The averaged weights that are judged and saved; the weights themselves before any update.

    Args:
        state: of the training.
        decay: of the running average.
        optimizer: "schedule-free" has an average of its own; frozen weights are not averaged.
    """
    if int(state.updates) == 0:
        return state.params
    if optimizer is not None and optimizer.kind == "schedule-free":
        averaged = schedule_free_average(state.opt_state, state.params)
    else:
        averaged = debiased_ema(state.ema, state.updates, decay)
    if optimizer is None or not optimizer.factors:
        return averaged
    factors = learning_factors(state.params, optimizer.factors)
    return jax.tree_util.tree_map(
        lambda average, now, factor: average if factor else now, averaged, state.params, factors
    )


def cast(params: Params, dtype: str) -> Params:
    """Weights on the device in a precision; float64 needs ``devices.precision`` around it."""
    return jax.tree_util.tree_map(lambda leaf: jnp.array(leaf, dtype), params)


def _select(condition: jax.Array, chosen: Any, other: Any) -> Any:
    return jax.tree_util.tree_map(lambda a, b: jnp.where(condition, a, b), chosen, other)
