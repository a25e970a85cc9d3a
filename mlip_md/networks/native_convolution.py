"""The convolution's primitives on processors: through the native kernel where there is one.

Importing this module registers the lowerings. Whether the kernel is used is decided when a function
is compiled; it computes the same sums in another order.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import mlir

from mlip_md import native
from mlip_md.networks import convolution, native_check, radial_tables
from mlip_md.networks.convolution import Factors, Names, Plan

MAX_DEGREE = 4
"""l up to which the kernel has couplings."""
_WRT = {"x": 1, "y": 2, "r": 4, "lengths": 4}


class Status(NamedTuple):
    """Whether the compiled convolution is used in this process.

    Attributes:
        available: it is there and agrees with its definition.
        instructions: set that was chosen for this processor; empty if not available.
        reason: one sentence, why it is not available; empty if it is.
    """

    available: bool
    instructions: str
    reason: str


@functools.cache
def find_native(library: Path = native.LIBRARY) -> Status:
    """Load the compiled convolution and compare it with its definition, once in a process.

    A library that cannot be loaded or computes something else is not used, and a warning says so.

    Args:
        library: file to load.

    Returns:
        What there is.
    """
    if not library.exists():
        return Status(False, "", "no compiled convolution was built with this installation")
    problem = native.register(library) or native_check.compare()
    if problem:
        reason = f"the compiled convolution is not used, because {problem}"
        warnings.warn(f"{reason}; results are the same, slower", RuntimeWarning, stacklevel=2)
        return Status(False, "", reason)
    return Status(True, native.instructions(library), "")


def _gradient(*operands: Any, **params: Any) -> list[jax.Array]:
    form, at, _ = convolution.split_operands(operands, **params)
    wrt: Names = params["wrt"]
    found = {}
    if "g" in wrt:
        found["g"] = _call("mlip_md_conv_forward", form, at, ("y", "r", "x"), ("g",))
    if varied := tuple(name for name in wrt if name != "g"):
        # the kernel wants every factor, and does not look at one that is alone in wrt
        full = {**{name: form.zeros(name, at) for name in varied if name not in at}, **at}
        flags = sum(_WRT[name] for name in varied)
        arrays = _call(
            "mlip_md_conv_backward", form, full, ("y", "r", "x", "g"), varied, wrt=np.int64(flags)
        )
        found |= form.by_factor(varied, arrays)
    return convolution.in_order(found, wrt)


def _tangent(*operands: Any, **params: Any) -> list[jax.Array]:
    form, at, along = convolution.split_operands(operands, **params)
    wrt: Names = params["wrt"]
    moved = {name: direction for name, direction in along.items() if name != "g"}
    if wrt == ("g",) or len(moved) < 2 or "g" not in at:
        return convolution.in_order(form.terms(at, along, wrt), wrt)
    full = {**{name: form.zeros(name, at) for name in convolution.FACTORS if name not in at}, **at}
    directions = {f"u{k}": moved.get(k) or form.zeros(k, at) for k in ("y", "r", "x")}
    arrays = _call(
        "mlip_md_conv_second",
        form,
        {**full, **directions},
        ("y", "r", "x", "g", "uy", "ur", "ux"),
        convolution.FACTORS,
    )
    found = form.by_factor(convolution.FACTORS, arrays)
    if "g" in along and (rest := tuple(name for name in wrt if name != "g")):
        more = form.gradient({**at, "g": along["g"]}, rest)
        found |= {
            name: [a + b for a, b in zip(found[name], more[name], strict=True)] for name in rest
        }
    return convolution.in_order(found, wrt)


def _call(
    target: str,
    form: convolution.Form,
    arrays: Factors,
    operands: Names,
    results: Names,
    **attributes: Any,
) -> Sequence[jax.Array]:
    """Call the kernel, which knows one number of nodes: rows that are not there are zero."""
    n_nodes = max(form.sizes)
    whole = form._replace(sizes=(n_nodes, n_nodes))
    values = [
        jnp.pad(a, [(0, n_nodes - len(a)), (0, 0), (0, 0)]) if a.ndim == 3 else a
        for a in convolution.in_order(arrays, operands)
    ]
    dtype = values[0].dtype
    shapes = [jax.ShapeDtypeStruct(s, dtype) for name in results for s in whole.shapes(name)]
    call = jax.ffi.ffi_call(target, shapes)
    found = call(*_indices(form.pairs), *values, **_attributes(form.plan), **attributes)
    wanted = [shape for name in results for shape in form.shapes(name)]
    return [a[: shape[0]] for a, shape in zip(found, wanted, strict=True)]


def _indices(pairs: convolution.Pairs) -> tuple[jax.Array, ...]:
    return pairs.senders.astype(jnp.int32), pairs.receivers.astype(jnp.int32), pairs.inside


def _attributes(plan: Plan) -> dict[str, Any]:
    sizes = len(plan.sources), len(plan.targets), len(plan.paths)
    numbers = [*sizes, *(number for path in plan.paths for number in path)]
    return {"plan": np.array(numbers, np.int64), "threads": np.int64(0)}


def _sums_by_table(*operands: Any, plan: Plan, cutoff: float, rows: int) -> list[jax.Array]:
    return _call_table(
        "mlip_md_conv_table_forward", operands, plan, cutoff, _sums(operands, plan, rows)
    )


def _pull_by_table(
    *operands: Any, plan: Plan, wrt: Names, cutoff: float, **_: Any
) -> list[jax.Array]:
    at = radial_tables.split_operands(plan, operands).at
    shapes = [a for name in wrt for a in at[name]]
    flags = sum(_WRT[name] for name in wrt)
    return _call_table(
        "mlip_md_conv_table_backward", operands, plan, cutoff, shapes, wrt=np.int64(flags)
    )


def _sums(operands: Sequence[Any], plan: Plan, rows: int) -> list[jax.ShapeDtypeStruct]:
    dtype = operands[-1].dtype
    return [
        jax.ShapeDtypeStruct((rows, 2 * block.degree + 1, block.channels), dtype)
        for block in plan.targets
    ]


def _call_table(
    target: str,
    operands: Sequence[Any],
    plan: Plan,
    cutoff: float,
    results: Sequence[Any],
    **attributes: Any,
) -> list[jax.Array]:
    (senders, receivers, _, index, table), at, more = radial_tables.split_operands(plan, operands)
    shapes = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in results]
    integers = [a.astype(jnp.int32) for a in (senders, receivers)]
    (lengths,), (y,) = at["lengths"], at["y"]
    call = jax.ffi.ffi_call(target, shapes)
    found = call(
        *integers,
        lengths,
        index.astype(jnp.int32),
        y,
        table,
        *at["x"],
        *more,
        cutoff=np.float64(cutoff),
        **_attributes(plan),
        **attributes,
    )
    return list(found)


def _is_supported(plan: Plan, dtype: Any) -> bool:
    degrees = [block.degree for block in (*plan.sources, *plan.targets)]
    degrees += [path.degree for path in plan.paths]
    known = max(degrees) <= MAX_DEGREE and dtype in (jnp.float32, jnp.float64)
    return known and find_native().available


def _lowering(native: Callable[..., Any], definition: Callable[..., Any]) -> Callable[..., Any]:
    by_kernel = mlir.lower_fun(native, multiple_results=True)
    by_definition = mlir.lower_fun(definition, multiple_results=True)

    def lower(context: Any, *operands: Any, **params: Any) -> Any:
        use = _is_supported(params["plan"], context.avals_in[-1].dtype)
        return (by_kernel if use else by_definition)(context, *operands, **params)

    return lower


for _primitive, _native, _definition in (
    (convolution.gradient_p, _gradient, convolution.define_gradient),
    (convolution.tangent_p, _tangent, convolution.define_tangent),
    (radial_tables.table_sums_p, _sums_by_table, radial_tables.define_sums),
    (radial_tables.table_pull_p, _pull_by_table, radial_tables.define_pull),
):
    mlir.register_lowering(_primitive, _lowering(_native, _definition), platform="cpu")
