"""Rows of an array, and sums at rows, each of which is the other's transpose.

They are primitives so that a platform may add in an order of its own: accelerators add scattered
rows by atomic operations, whose order, and with it the last digits, changes from run to run.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def take_rows(values: jax.Array, index: jax.Array) -> jax.Array:
    """``values[index]``.

    Args:
        values: (n_rows, …).
        index: (n,) int, from 0 to n_rows - 1.

    Returns:
        (n, …).
    """
    taken: jax.Array = take_rows_p.bind(values, index)
    return taken


def sum_rows(values: jax.Array, index: jax.Array, number: int) -> jax.Array:
    """Values added up at the rows that they belong to.

    Args:
        values: (n, …).
        index: (n,) int, from 0 to number - 1.
        number: of rows.

    Returns:
        (number, …).
    """
    sums: jax.Array = sum_rows_p.bind(values, index, number=number)
    return sums


def define_take(values: jax.Array, index: jax.Array) -> jax.Array:
    """What ``take_rows_p`` is."""
    return values[index]


def define_sum(values: jax.Array, index: jax.Array, *, number: int) -> jax.Array:
    """What ``sum_rows_p`` is."""
    return jax.ops.segment_sum(values, index, number)


take_rows_p = Primitive("mlip_md_take_rows")
sum_rows_p = Primitive("mlip_md_sum_rows")


def _jvp(
    primitive: Primitive, primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[Any, Any]:
    found = primitive.bind(*primals, **params)
    if isinstance(tangents[0], ad.Zero):
        return found, ad.Zero(jax.core.ShapedArray(found.shape, found.dtype))
    return found, primitive.bind(tangents[0], primals[1], **params)


def _take_transpose(cotangent: Any, values: Any, index: Any) -> list[Any]:
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(values.aval), None]
    return [sum_rows(cotangent, index, values.aval.shape[0]), None]


def _sum_transpose(cotangent: Any, values: Any, index: Any, *, number: int) -> list[Any]:
    del number
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(values.aval), None]
    return [take_rows(cotangent, index), None]


def _batch(definition: Any, operands: Sequence[Any], dims: Any, **params: Any) -> tuple[Any, int]:
    return jax.vmap(functools.partial(definition, **params), tuple(dims))(*operands), 0


for _primitive, _definition, _shape in (
    (take_rows_p, define_take, lambda values, index: (*index.shape, *values.shape[1:])),
    (sum_rows_p, define_sum, lambda values, _index, number: (number, *values.shape[1:])),
):
    _primitive.def_abstract_eval(
        lambda values, index, _shape=_shape, **params: jax.core.ShapedArray(
            _shape(values, index, **params), values.dtype
        )
    )
    _primitive.def_impl(_definition)
    mlir.register_lowering(_primitive, mlir.lower_fun(_definition, multiple_results=False))
    ad.primitive_jvps[_primitive] = functools.partial(_jvp, _primitive)
    batching.primitive_batchers[_primitive] = functools.partial(_batch, _definition)
ad.primitive_transposes[take_rows_p] = _take_transpose
ad.primitive_transposes[sum_rows_p] = _sum_transpose
