"""Radial weights as piecewise polynomials of the distance, for inference in float32.

The radial network of a layer is a smooth function of one number. Between knots it is replaced by
the polynomial of seventh degree that has its value and its first three derivatives at both ends:
energies stay three times continuously differentiable, and forces are the derivatives of the energy
that is computed. Knots are added until float32 cannot tell the table from the function.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mlip_md.compiler import jit
from mlip_md.networks.convolution import (
    Names,
    Pairs,
    Plan,
    batch_in_turn,
    convolve,
    in_order,
    run_compiled,
)

DEGREE = 7
ORDERS = (DEGREE + 1) // 2
"""Derivatives that are matched at each end, the value among them."""
LANES = 8
"""Radial weights that lie side by side in a table."""
FEWEST, MOST, STEP = 128, 1024, 64
"""Numbers of cells."""
PIECE = 128
"""Distances that are evaluated together."""
NEAREST = 0.05
"""Å; below, structures are refused as coincident, and tables extrapolate."""
ERROR = 2.0**-24
"""Allowed error of a weight over the largest weight: half a unit of float32."""
SLOPE_ERROR = 2.0**-22
"""The same of derivatives, which are sums of terms that are each rounded."""

Radial = Callable[..., jax.Array]
"""Radial weights (n, columns) of distances (n,) in Å, and of what else they depend on."""
Jets = Callable[[np.ndarray], Sequence[jax.Array]]
"""Value and derivatives of the first orders, each (n, columns), of PIECE distances in Å."""


class Fit(NamedTuple):
    """A table and how good it is.

    Attributes:
        coefficients: (blocks, cells, degree+1, LANES), see ``convolve_by_table``.
        error: largest error of a weight over the largest weight.
        slope_error: largest error of a derivative over the largest derivative.
    """

    coefficients: np.ndarray
    error: float
    slope_error: float


def compile_jets(radial: Radial) -> Callable[..., list[jax.Array]]:
    """Compile a radial function's value and derivatives of the first orders, for ``fit_radial``.

    Args:
        radial: the function.

    Returns:
        The same of the function's arguments.
    """

    def jets(lengths: jax.Array, *more: Any) -> list[jax.Array]:
        return _derivatives(lambda r: radial(r, *more), lengths)

    return jit(jets)


def fit_radial(
    compiled: Jets, plan: Plan, cutoff: float, dtype: Any, at_least: int = 0
) -> Fit | None:
    """The smallest table that is as good as float32, or None if there is none (kinks).

    Args:
        compiled: ``compile_jets`` of the function; computes in float64.
        plan: of the convolution, by whose paths the columns are put into blocks.
        cutoff: Å, where the function ends.
        dtype: of the coefficients.
        at_least: number of cells.
    """

    def jets(lengths: np.ndarray) -> list[np.ndarray]:
        """In pieces of one size: one compilation."""
        filled = np.pad(lengths, (0, -len(lengths) % PIECE), constant_values=cutoff)
        found = [jax.device_get(compiled(piece)) for piece in filled.reshape(-1, PIECE)]
        return [np.concatenate(jet)[: len(lengths)] for jet in zip(*found, strict=True)]

    cells = max(FEWEST, at_least)
    while cells <= MOST:
        fit = _fit_cells(jets, plan, cutoff, dtype, cells)
        if fit.error <= ERROR and fit.slope_error <= SLOPE_ERROR:
            return fit
        # the error of slopes is of order DEGREE in the width of a cell
        ratio = max(fit.error / ERROR, fit.slope_error / SLOPE_ERROR) ** (1 / DEGREE)
        ratio = ratio if ratio < MOST else MOST  # neither does NaN
        cells = STEP * max(cells // STEP + 1, math.ceil(cells * ratio / STEP))
    return None


def _fit_cells(
    jets: Callable[[np.ndarray], list[np.ndarray]],
    plan: Plan,
    cutoff: float,
    dtype: Any,
    cells: int,
) -> Fit:
    """The table of so many cells, from derivatives (n, columns) of the first orders."""
    width = cutoff / cells
    knots = jets(np.linspace(0.0, cutoff, cells + 1)[1:])  # bases are not defined at 0
    between = [(u, jets((np.arange(cells) + u) * width)[:2]) for u in (0.15, 0.5, 0.85)]
    n_blocks = sum(-(-path.width // LANES) for path in plan.paths)
    coefficients, block = np.zeros((n_blocks, cells, DEGREE + 1, LANES), dtype), 0
    errors = np.zeros((2, 2))
    for path in plan.paths:  # one after the other, in the memory of one
        columns = slice(path.column, path.column + path.width)
        fitted = _fit([jet[:, columns] for jet in knots], width)
        exact = [(u, [jet[:, columns] for jet in found]) for u, found in between]
        errors = np.maximum(errors, _errors(exact, fitted, width))
        for first in range(0, path.width, LANES):
            piece = fitted[..., first : first + LANES]
            coefficients[block, ..., : piece.shape[-1]] = piece
            block += 1
    worst, largest = errors
    return Fit(coefficients, *(worst / np.maximum(largest, np.finfo(float).tiny)).tolist())


def _fit(jets: list[np.ndarray], width: float) -> np.ndarray:
    """Coefficients (cells, degree+1, columns) from derivatives at the ends of cells.

    The first cell, whose left end is 0, extrapolates the second.
    """
    ends = [jet * width**k for k, jet in enumerate(jets)]
    samples = [jet[side] for side in (slice(-1), slice(1, None)) for jet in ends]
    fitted = np.einsum("ds,snc->ndc", _interpolation(), np.stack(samples))
    return np.concatenate([np.einsum("ds,sc->dc", _shift(), fitted[0])[None], fitted])


def _derivatives(radial: Callable[[jax.Array], jax.Array], lengths: jax.Array) -> list[jax.Array]:
    """Value and derivatives of the first orders."""

    def lower(lengths: jax.Array) -> list[jax.Array]:
        return [radial(lengths)]

    for _ in range(ORDERS - 1):
        lower = functools.partial(_with_slope, lower)
    return lower(lengths)


def _with_slope(
    lower: Callable[[jax.Array], list[jax.Array]], lengths: jax.Array
) -> list[jax.Array]:
    """Derivatives of the lower orders and one more."""
    values, slopes = jax.jvp(lower, (lengths,), (jnp.ones_like(lengths),))
    return [*values, slopes[-1]]


def _powers(u: float, order: int) -> np.ndarray:
    """Derivative of u^0 … u^DEGREE."""
    return np.array(
        [math.perm(d, order) * u ** (d - order) if d >= order else 0.0 for d in range(DEGREE + 1)]
    )


@functools.cache
def _interpolation() -> np.ndarray:
    """From the derivatives at 0 and at 1 to coefficients of u^0 … u^DEGREE."""
    return np.linalg.inv([_powers(u, order) for u in (0.0, 1.0) for order in range(ORDERS)])


def _shift() -> np.ndarray:
    """Coefficients of p(u - 1) from those of p(u)."""
    orders = range(DEGREE + 1)
    return np.array([[math.comb(k, j) * (-1.0) ** abs(k - j) for k in orders] for j in orders])


def _errors(
    exact: list[tuple[float, list[np.ndarray]]], fitted: np.ndarray, width: float
) -> np.ndarray:
    """[[largest error of values, of slopes], [largest value, slope]] between the knots."""
    found = np.zeros((2, 2))
    for u, jets in exact:
        meant = (np.arange(len(fitted)) + u) * width > NEAREST
        for order in range(2):
            values = jets[order][meant]
            powers = _powers(u, order) / width**order
            wrong = np.einsum("d,ndc->nc", powers, fitted[meant]) - values
            found[:, order] = np.maximum(
                found[:, order], [np.abs(a).max() for a in (wrong, values)]
            )
    return found


def evaluate_table(
    table: jax.Array, plan: Plan, lengths: jax.Array, index: jax.Array, cutoff: float
) -> jax.Array:
    """Radial weights (n_edges, columns) of a table; see ``convolve_by_table``."""
    cells = table.shape[2]
    scaled = lengths * (cells / cutoff)
    cell = jnp.minimum(scaled.astype(jnp.int32), cells - 1)
    u = scaled - cell.astype(scaled.dtype)
    chosen = table[index, :, cell]  # (n_edges, blocks, degree+1, LANES)
    value = chosen[:, :, -1]
    for d in range(table.shape[3] - 2, -1, -1):
        value = value * u[:, None, None] + chosen[:, :, d]
    inside = (lengths < cutoff)[:, None]
    weights = jnp.where(inside, value.reshape(len(lengths), -1), 0)
    columns, start = jnp.zeros((len(lengths), plan.columns), weights.dtype), 0
    for path in plan.paths:
        part = weights[:, start : start + path.width]
        columns = columns.at[:, path.column : path.column + path.width].set(part)
        start += path.width + -path.width % LANES
    return columns


# The primitives: gradients of Φ(x, Y, R(lengths), g), and the change of the sums


def convolve_by_table(
    plan: Plan,
    pairs: Pairs,
    x: Sequence[jax.Array],
    y: jax.Array,
    lengths: jax.Array,
    table: jax.Array,
    index: jax.Array,
    *,
    cutoff: float,
    rows: int,
) -> list[jax.Array]:
    """``convolve`` with the radial weights of a table.

    Args:
        plan: what couples to what.
        pairs: the edges; those of the cutoff and beyond carry nothing.
        x: features, one array (n_nodes, 2l+1, channels) per source.
        y: (n_edges, harmonics).
        lengths: (n_edges,) Å.
        table: (n_tables, blocks, cells, degree+1, LANES): Σ_d table[…, d, …] u^d in the cell
            floor(s), u = s - cell, s = lengths · cells / cutoff.
        index: (n_edges,) int, which of the tables.
        cutoff: Å.
        rows: number of receivers.

    Returns:
        One array (rows, 2l+1, channels) per target. It can be differentiated to any order in x, y
        and lengths.
    """
    operands = *pairs, index, table, *x, y, lengths
    return table_sums_p.bind(*operands, plan=plan, cutoff=cutoff, rows=rows)


table_sums_p = Primitive("mlip_md_table_sums")
"""The sums."""
table_change_p = Primitive("mlip_md_table_change")
"""How they change along directions of x, y and lengths: linear in these."""
table_pull_p = Primitive("mlip_md_table_pull")
"""Gradients in x, y and lengths of the sums times g: its transpose."""

FACTORS = ("x", "y", "lengths")


class Call(NamedTuple):
    """Operands of a primitive, told apart.

    Attributes:
        constants: senders, receivers, inside, index and table.
        at: features, harmonics and lengths, by factor.
        more: what follows: directions or g.
    """

    constants: Sequence[Any]
    at: dict[str, list[Any]]
    more: Sequence[Any]


def split_operands(plan: Plan, operands: Sequence[Any]) -> Call:
    """What a primitive was bound to."""
    n = len(plan.sources)
    factors = operands[5 : n + 7]
    at = {"x": [*factors[:n]], "y": [factors[n]], "lengths": [factors[n + 1]]}
    return Call(operands[:5], at, operands[n + 7 :])


def _directions(plan: Plan, active: Names, arrays: Sequence[Any]) -> dict[str, list[Any]]:
    left = iter(arrays)
    return {
        name: [next(left) for _ in plan.sources[: None if name == "x" else 1]] for name in active
    }


def _shapes_of_sums(*operands: Any, plan: Plan, rows: int, **_: Any) -> list[Any]:
    dtype = operands[5].dtype
    shapes = [(rows, 2 * block.degree + 1, block.channels) for block in plan.targets]
    return [jax.core.ShapedArray(shape, dtype) for shape in shapes]


def _shapes_of_pull(*operands: Any, plan: Plan, wrt: Names, **_: Any) -> list[Any]:
    return [
        jax.core.ShapedArray(a.shape, a.dtype)
        for a in in_order(split_operands(plan, operands).at, wrt)
    ]


def _sums_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    given = {
        name: [ad.instantiate_zeros(t) for t in arrays]
        for name, arrays in split_operands(params["plan"], tangents).at.items()
        if not all(isinstance(t, ad.Zero) for t in arrays)
    }
    active = tuple(given)
    sums = table_sums_p.bind(*primals, **params)
    change = table_change_p.bind(*primals, *in_order(given, active), active=active, **params)
    return sums, change


def _change_transpose(cotangents: Sequence[Any], *operands: Any, **params: Any) -> list[Any]:
    active = params.pop("active")
    known = operands[: len(params["plan"].sources) + 7]
    g = [ad.instantiate_zeros(c) for c in cotangents]
    pulled = table_pull_p.bind(*known, *g, wrt=active, **params)
    return [None] * len(known) + pulled


def define_sums(*operands: Any, plan: Plan, cutoff: float, rows: int) -> list[jax.Array]:
    """What ``table_sums_p`` is."""
    (*pairs, index, table), at, _ = split_operands(plan, operands)
    (y,), (lengths,) = at["y"], at["lengths"]
    inside = lengths < cutoff
    weights = evaluate_table(table, plan, lengths, index, cutoff)
    return convolve(plan, Pairs(pairs[0], pairs[1], inside), at["x"], y, weights, rows)


def _vary(params: dict[str, Any], constants: Sequence[Any], at: dict[str, list[Any]]) -> Any:
    """The sums as a function of some factors."""

    def sums(factors: dict[str, list[Any]]) -> list[jax.Array]:
        return define_sums(*constants, *in_order({**at, **factors}, FACTORS), **params)

    return sums


def define_change(*operands: Any, active: Names, **params: Any) -> list[jax.Array]:
    """What ``table_change_p`` is."""
    constants, at, more = split_operands(plan := params["plan"], operands)
    along = _directions(plan, active, more)
    point = {name: at[name] for name in active}
    return jax.jvp(_vary(params, constants, at), (point,), (along,))[1]


def define_pull(*operands: Any, wrt: Names, **params: Any) -> list[jax.Array]:
    """What ``table_pull_p`` is."""
    constants, at, g = split_operands(params["plan"], operands)
    _, pull = jax.vjp(_vary(params, constants, at), {name: at[name] for name in wrt})
    return in_order(pull([*g])[0], wrt)


def _differentiate_definition(
    definition: Callable[..., list[jax.Array]],
    primals: Sequence[Any],
    tangents: Sequence[Any],
    **params: Any,
) -> tuple[list[Any], list[Any]]:
    """Higher orders are those of the definition, by the primitives of ``convolution``."""
    varied = [k for k, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

    def function(*arrays: Any) -> list[jax.Array]:
        operands = [*primals]
        for k, array in zip(varied, arrays, strict=True):
            operands[k] = array
        return definition(*operands, **params)

    return jax.jvp(function, [primals[k] for k in varied], [tangents[k] for k in varied])


for _primitive, _definition, _shapes in (
    (table_sums_p, define_sums, _shapes_of_sums),
    (table_change_p, define_change, _shapes_of_sums),
    (table_pull_p, define_pull, _shapes_of_pull),
):
    _primitive.multiple_results = True
    _primitive.def_abstract_eval(_shapes)
    _primitive.def_impl(functools.partial(run_compiled, _primitive))
    batching.primitive_batchers[_primitive] = functools.partial(batch_in_turn, _primitive)
    mlir.register_lowering(_primitive, mlir.lower_fun(_definition, multiple_results=True))
    ad.primitive_jvps[_primitive] = functools.partial(_differentiate_definition, _definition)
ad.primitive_jvps[table_sums_p] = _sums_jvp
ad.primitive_transposes[table_change_p] = _change_transpose
