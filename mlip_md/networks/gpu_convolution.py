"""The convolution's primitives on CUDA devices: by kernels in Pallas where these can be made.

Importing this module registers the lowerings; Pallas is imported when a function is compiled for
such a device. In float64, and where Pallas refuses, the definition is compiled.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import mlir

from mlip_md import rows
from mlip_md.networks import convolution, radial_tables
from mlip_md.networks.convolution import Names, Pairs, Plan
from mlip_md.networks.gpu_kernels import derivatives, sum_rows
from mlip_md.networks.gpu_programs import Task

CAPABILITY = 8
"""Compute capability from which on Triton makes programs for a card (Ampere)."""
CARD = "NVIDIA A100"
"""A card of that capability, for which programs are made where there is none."""


def gradient(*operands: Any, interpret: bool = False, **params: Any) -> list[jax.Array]:
    """``convolution.gradient_p`` by kernels; ``interpret`` runs them on any device, slowly."""
    form, at, _ = convolution.split_operands(operands, **params)
    task = Task(form.plan, interpret=interpret)
    found = derivatives(task, form.pairs, at, params["wrt"], form.sizes)
    return convolution.in_order(found, params["wrt"])


def tangent(*operands: Any, interpret: bool = False, **params: Any) -> list[jax.Array]:
    """``convolution.tangent_p`` by kernels: all terms in one pass."""
    form, at, along = convolution.split_operands(operands, **params)
    wrt: Names = params["wrt"]
    task = Task(form.plan, params["active"], interpret=interpret)
    factors = {**at, **{f"u{name}": arrays for name, arrays in along.items()}}
    found = derivatives(task, form.pairs, factors, wrt, form.sizes)
    return convolution.in_order({k: found.get(k) or form.zeros(k, along) for k in wrt}, wrt)


def table_sums(
    *operands: Any, plan: Plan, cutoff: float, rows: int, interpret: bool = False
) -> list[jax.Array]:
    """``radial_tables.table_sums_p`` by kernels."""
    return _by_table(operands, plan, cutoff, ("g",), rows, interpret)


def table_pull(
    *operands: Any, plan: Plan, cutoff: float, rows: int, wrt: Names, interpret: bool = False
) -> list[jax.Array]:
    """``radial_tables.table_pull_p`` by kernels."""
    return _by_table(operands, plan, cutoff, wrt, rows, interpret)


def _by_table(
    operands: Sequence[Any], plan: Plan, cutoff: float, wrt: Names, rows: int, interpret: bool
) -> list[jax.Array]:
    constants, at, g = radial_tables.split_operands(plan, operands)
    senders, receivers, _, index, table = constants
    task = Task(plan, cutoff=cutoff, table=table.shape, interpret=interpret)
    factors = {**at, "g": g, "index": [index.astype(jnp.int32)], "table": [table]}
    pairs = Pairs(senders, receivers, at["lengths"][0] < cutoff)
    found = derivatives(task, pairs, factors, wrt, (len(at["x"][0]), rows))
    return convolution.in_order(found, wrt)


def runs_kernels(device: jax.Device) -> bool:
    """Whether there are kernels for a device: NVIDIA's, from ``CAPABILITY`` on."""
    if device.platform != "gpu" or "rocm" in device.client.platform_version.lower():
        return False
    return float(device.compute_capability) >= CAPABILITY


def _cards() -> list[jax.Device]:
    """The GPUs of this process, if there are any."""
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:
        return []


def _refusing_card() -> str:
    """Why the cards of this process have no kernels; nothing if they have, or if there are none."""
    old = [card for card in _cards() if not runs_kernels(card)]
    return f"{old[0].device_kind} is older than compute capability {CAPABILITY}" if old else ""


def _for_a_card() -> contextlib.AbstractContextManager[Any]:
    """Where Pallas makes programs: from JAX 0.12 on it asks the default device for its kind.

    That may be a processor, in a process that computes on both, or where there is no card at all.
    """
    if cards := _cards():
        return jax.default_device(cards[0])
    kind = jax.sharding.AbstractDevice(CARD, None, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=kind))


@functools.cache
def _say_refused(reason: str) -> None:
    warnings.warn(
        f"the convolution's kernels are not used on this GPU, because {reason}; results are the "
        "same, slower",
        RuntimeWarning,
        stacklevel=2,
    )


def _lowering(
    kernels: Callable[..., Any], definition: Callable[..., Any], several: bool = True
) -> Callable[..., Any]:
    by_kernels = mlir.lower_fun(kernels, multiple_results=several)
    by_definition = mlir.lower_fun(definition, multiple_results=several)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        sizes = [math.prod(aval.shape) for aval in context.avals_in]
        if context.avals_out[0].dtype == jnp.float32 and min(sizes) > 0:
            reason = _refusing_card()
            try:
                if not reason:
                    with _for_a_card():
                        return by_kernels(context, *operands, **params)
            except Exception as error:  # whatever this version's Pallas raises
                reason = f"Pallas cannot make them ({type(error).__name__}: {error})"[:300]
            _say_refused(reason)
        return by_definition(context, *operands, **params)

    return lower


for _primitive, _kernels, _definition in (
    (convolution.gradient_p, gradient, convolution.define_gradient),
    (convolution.tangent_p, tangent, convolution.define_tangent),
    (radial_tables.table_sums_p, table_sums, radial_tables.define_sums),
    (radial_tables.table_pull_p, table_pull, radial_tables.define_pull),
):
    mlir.register_lowering(_primitive, _lowering(_kernels, _definition), platform="cuda")
mlir.register_lowering(
    rows.sum_rows_p, _lowering(sum_rows, rows.define_sum, several=False), platform="cuda"
)
