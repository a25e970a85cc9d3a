"""The convolution of both networks: one form, linear in each of four factors, and its derivatives.

    Φ(x, Y, R, g) = Σ_e Σ_p Σ_{a,b,m,c} K^p_{abm} x[s_e, a, c] Y[e, b] R[e, c] g[r_e, m, c]

with edges e from senders s to receivers r, paths p, features x, harmonics Y, radial weights R and
couplings K. What a layer computes, the sums of messages at their receivers, is ∂Φ/∂g. Every
derivative of every order is again a gradient of Φ with some factors replaced, so that two
primitives carry all of it, training (second order) and Hessians included:

- ``gradient``: ∂Φ/∂k for some factors k, in one pass over the edges;
- ``tangent``: how these change along directions u of some factors j, Σ_kj ∂²Φ/∂k∂j [u_j]. It is
  linear in u, and because second derivatives commute, its transpose is itself with k and j
  exchanged.

They are lowered by platform: to the native kernel where there is one, else to the definition in
JAX, against which everything is tested.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from mlip_md.compiler import jit
from mlip_md.networks import layers

FACTORS = ("x", "y", "r", "g")
"""Features, harmonics, radial weights and what multiplies the sums."""

Factors = Mapping[str, Sequence[Any]]
"""Arrays by factor: x and g have one per block, y and r one."""

Names = tuple[str, ...]


class Block(NamedTuple):
    """Features of one irrep: arrays (n_nodes, 2·degree+1, channels)."""

    degree: int
    channels: int


class Path(NamedTuple):
    """One coupling of a block of features and a harmonic to a block of sums.

    Attributes:
        source: index of the block of features.
        channel: its first channel that is read.
        degree: l of the harmonic.
        target: index of the block of sums.
        position: its first channel that is written; each one is written by one path.
        column: first of the radial weights that are read; paths share none.
        width: number of channels.
    """

    source: int
    channel: int
    degree: int
    target: int
    position: int
    column: int
    width: int


class Plan(NamedTuple):
    """What a convolution couples to what.

    Attributes:
        sources: blocks of the features.
        targets: blocks of the sums.
        paths: couplings.
        harmonics: components of Y, those of l from l² on.
        columns: radial weights of an edge.
    """

    sources: tuple[Block, ...]
    targets: tuple[Block, ...]
    paths: tuple[Path, ...]
    harmonics: int
    columns: int

    @property
    def message_size(self) -> int:
        """Number of values in one message."""
        return sum((2 * block.degree + 1) * block.channels for block in self.targets)


class Pairs(NamedTuple):
    """Who sends to whom.

    Attributes:
        senders: (n_edges,) int.
        receivers: (n_edges,) int, ascending.
        inside: (n_edges,) bool; the others carry nothing.
    """

    senders: jax.Array
    receivers: jax.Array
    inside: jax.Array


def convolve(
    plan: Plan, pairs: Pairs, x: Sequence[jax.Array], y: jax.Array, r: jax.Array, rows: int
) -> list[jax.Array]:
    """Messages summed at their receivers; can be differentiated to any order in x, y and r.

    Args:
        plan: what couples to what.
        pairs: the edges.
        x: features, one array (n_nodes, 2l+1, channels) per source.
        y: (n_edges, harmonics).
        r: (n_edges, columns) radial weights.
        rows: number of receivers.

    Returns:
        One array (rows, 2l+1, channels) per target.
    """
    form = Form(plan, pairs, (len(x[0]), rows))
    return form.gradient({"x": x, "y": [y], "r": [r]}, ("g",))["g"]


class Form(NamedTuple):
    """Φ over some edges.

    Attributes:
        plan: what couples to what.
        pairs: the edges.
        sizes: number of senders and of receivers.
    """

    plan: Plan
    pairs: Pairs
    sizes: tuple[int, int]

    def gradient(self, at: Factors, wrt: Names) -> dict[str, list[Any]]:
        """∂Φ/∂k for k in ``wrt``; a factor that is alone in it need not be given."""
        operands = in_order(at, _needed(wrt))
        return self.by_factor(
            wrt, gradient_p.bind(*self.pairs, *operands, plan=self.plan, wrt=wrt, sizes=self.sizes)
        )

    def tangent(self, at: Factors, along: Factors, wrt: Names) -> dict[str, list[Any]]:
        """Change of ∂Φ/∂k, k in ``wrt``, along directions of the factors in ``along``."""
        active = _names(along)
        operands = in_order(at, _needed(wrt, active)) + in_order(along, active)
        found = tangent_p.bind(
            *self.pairs, *operands, plan=self.plan, wrt=wrt, active=active, sizes=self.sizes
        )
        return self.by_factor(wrt, found)

    def terms(self, at: Factors, along: Factors, wrt: Names) -> dict[str, list[Any]]:
        """The same as a sum of gradients, one for each factor that changes."""
        total: dict[str, list[Any]] = {}
        for name, direction in along.items():
            if rest := tuple(k for k in wrt if k != name):
                _add(total, self.gradient({**at, name: direction}, rest))
        return {name: total.get(name) or self.zeros(name, along) for name in wrt}

    def zeros(self, name: str, like: Factors) -> list[jax.Array]:
        """Zeros in the shapes of a factor and the dtype of others."""
        dtype = next(iter(like.values()))[0].dtype
        return [jnp.zeros(shape, dtype) for shape in self.shapes(name)]

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """Shapes of a factor's arrays."""
        if name in ("y", "r"):
            width = self.plan.harmonics if name == "y" else self.plan.columns
            return [(self.pairs.senders.shape[0], width)]
        size, blocks = {
            "x": (self.sizes[0], self.plan.sources),
            "g": (self.sizes[1], self.plan.targets),
        }[name]
        return [(size, 2 * block.degree + 1, block.channels) for block in blocks]

    def by_factor(self, names: Names, arrays: Sequence[Any]) -> dict[str, list[Any]]:
        """Arrays that follow each other, by factor."""
        counts = {"x": len(self.plan.sources), "g": len(self.plan.targets)}
        left = iter(arrays)
        return {name: list(itertools.islice(left, counts.get(name, 1))) for name in names}


def _names(factors: Factors) -> Names:
    return tuple(name for name in FACTORS if name in factors)


def in_order(factors: Factors, names: Names) -> list[Any]:
    """Arrays of some factors, one after the other."""
    return [array for name in names for array in factors[name]]


def _needed(wrt: Names, active: Names | None = None) -> Names:
    """Factors that a gradient depends on, or its change along the active ones."""
    if active is None:
        return tuple(name for name in FACTORS if any(name != k for k in wrt))
    pairs = [(k, j) for k, j in itertools.product(wrt, active) if k != j]
    return tuple(name for name in FACTORS if any(name not in pair for pair in pairs))


def _add(total: dict[str, list[Any]], more: Mapping[str, Sequence[Any]]) -> None:
    for name, arrays in more.items():
        before = total.get(name)
        total[name] = [a + b for a, b in zip(before, arrays, strict=True)] if before else [*arrays]


# The primitives and their rules

gradient_p = Primitive("mlip_md_convolution_gradient")
tangent_p = Primitive("mlip_md_convolution_tangent")


class Call(NamedTuple):
    """A primitive's operands, told apart.

    Attributes:
        form: Φ.
        at: factors at which it is differentiated.
        along: directions.
    """

    form: Form
    at: dict[str, list[Any]]
    along: dict[str, list[Any]]


def split_operands(
    operands: Sequence[Any],
    plan: Plan,
    wrt: Names,
    sizes: tuple[int, int],
    active: Names | None = None,
) -> Call:
    """What a primitive was bound to."""
    form = Form(plan, Pairs(*operands[:3]), sizes)
    at = form.by_factor(needed := _needed(wrt, active), operands[3:])
    return Call(form, at, form.by_factor(active or (), operands[3 + len(in_order(at, needed)) :]))


def _abstract(*operands: Any, **params: Any) -> list[Any]:
    call = split_operands(operands, **params)
    dtype = operands[-1].dtype
    shapes = [shape for name in params["wrt"] for shape in call.form.shapes(name)]
    return [jax.core.ShapedArray(shape, dtype) for shape in shapes]


def _nonzero(factors: Factors) -> dict[str, list[Any]]:
    """Tangents or cotangents of the factors in which there are any."""
    return {
        name: [ad.instantiate_zeros(array) for array in arrays]
        for name, arrays in factors.items()
        if not all(isinstance(array, ad.Zero) for array in arrays)
    }


def _gradient_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    form, at, _ = split_operands(primals, **params)
    wrt = params["wrt"]
    changes = _nonzero(split_operands(tangents, **params).at)
    found = form.gradient(at, wrt)
    return in_order(found, wrt), in_order(form.tangent(at, changes, wrt), wrt)


def _tangent_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], **params: Any
) -> tuple[list[Any], list[Any]]:
    form, at, along = split_operands(primals, **params)
    wrt = params["wrt"]
    _, at_changes, along_changes = split_operands(tangents, **params)
    changes = _nonzero(at_changes)
    total: dict[str, list[Any]] = {}
    if directions := _nonzero(along_changes):
        _add(total, form.tangent(at, directions, wrt))
    for name, direction in along.items():
        rest = tuple(k for k in wrt if k != name)
        others = {i: change for i, change in changes.items() if i != name}
        if rest and others:
            _add(total, form.tangent({**at, name: direction}, others, rest))
    total = {name: total.get(name) or form.zeros(name, along) for name in wrt}
    return in_order(form.tangent(at, along, wrt), wrt), in_order(total, wrt)


def _tangent_transpose(cotangents: Sequence[Any], *operands: Any, **params: Any) -> list[Any]:
    form, at, _ = split_operands(operands, **params)
    active = params["active"]
    given = _nonzero(form.by_factor(params["wrt"], cotangents))
    if _names(given) == ("g",) and "g" not in active:
        found = form.gradient({**at, **given}, active)
    else:
        found = form.tangent(at, given, active)
    linear = in_order(found, active)
    return [None] * (len(operands) - len(linear)) + linear


def batch_in_turn(
    primitive: Primitive, operands: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[list[Any], list[int]]:
    """Batching rule: one after the other, in the memory of one."""
    mapped = [jnp.moveaxis(a, d, 0) for a, d in zip(operands, dims, strict=True) if d is not None]

    def one(members: list[Any]) -> list[Any]:
        left = iter(members)
        arrays = [a if d is None else next(left) for a, d in zip(operands, dims, strict=True)]
        return primitive.bind(*arrays, **params)

    found = jax.lax.map(one, mapped)
    return found, [0] * len(found)


def run_compiled(primitive: Primitive, *operands: Any, **params: Any) -> list[Any]:
    """A primitive outside of ``jit``."""
    return jit(functools.partial(primitive.bind, **params))(*operands)


for _primitive in (gradient_p, tangent_p):
    _primitive.multiple_results = True
    _primitive.def_abstract_eval(_abstract)
    _primitive.def_impl(functools.partial(run_compiled, _primitive))
    batching.primitive_batchers[_primitive] = functools.partial(batch_in_turn, _primitive)
ad.primitive_jvps[gradient_p] = _gradient_jvp
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose


# The definition in JAX


def define_gradient(*operands: Any, **params: Any) -> list[jax.Array]:
    """What ``gradient_p`` is."""
    form, at, _ = split_operands(operands, **params)
    wrt: Names = params["wrt"]
    varied = tuple(name for name in wrt if name != "g")
    if not varied:
        return _sum_messages(form, at)
    # a factor that is alone is not given: Φ is linear in it
    start = {name: at.get(name) or form.zeros(name, at) for name in varied}
    sums, pull = jax.vjp(lambda factors: _sum_messages(form, {**at, **factors}), start)
    found = {**pull(list(at["g"]))[0], "g": sums}
    return in_order(found, wrt)


def define_tangent(*operands: Any, **params: Any) -> list[jax.Array]:
    """What ``tangent_p`` is."""
    form, at, along = split_operands(operands, **params)
    wrt: Names = params["wrt"]
    return in_order(form.terms(at, along, wrt), wrt)


def _sum_messages(form: Form, at: Factors) -> list[jax.Array]:
    """∂Φ/∂g: paths from one block to messages of one degree are computed side by side."""
    plan, (senders, receivers, inside) = form.plan, form.pairs
    (y,), (r,) = at["y"], at["r"]
    y = jnp.where(inside[:, None], y, 0)
    gathered = [feature[senders] for feature in at["x"]]
    by_path = _split_columns(plan, r)
    pieces: dict[Path, jax.Array] = {}
    for bundle in _bundles(plan):
        first, degree = bundle[0], plan.targets[bundle[0].target].degree
        couplings = layers.couplings_side_by_side(
            plan.sources[first.source].degree, [p.degree for p in bundle], degree, plan.harmonics
        )
        rotations = jnp.einsum("ey,yma->ema", y, jnp.asarray(couplings, y.dtype))
        x = gathered[first.source][..., first.channel : first.channel + first.width]
        weights = jnp.stack([by_path[path] for path in bundle], axis=1)
        messages = layers.weighted(layers.contract(rotations, x), weights)
        sums = jax.ops.segment_sum(messages, receivers, form.sizes[1], indices_are_sorted=True)
        sums = sums.reshape(len(sums), 2 * degree + 1, len(bundle), first.width)
        pieces |= {path: sums[:, :, k] for k, path in enumerate(bundle)}
    by_target = [[p for p in plan.paths if p.target == t] for t in range(len(plan.targets))]
    return [
        jnp.concatenate([pieces[p] for p in sorted(paths, key=lambda p: p.position)], axis=-1)
        for paths in by_target
    ]


def _split_columns(plan: Plan, r: jax.Array) -> dict[Path, jax.Array]:
    """Radial weights (n_edges, width) of each path, by one split: its transpose is one copy."""
    paths = sorted(plan.paths, key=lambda path: path.column)
    ends = [end for path in paths for end in (path.column, path.column + path.width)]
    return dict(zip(paths, jnp.split(r, ends, axis=1)[1::2], strict=True))


def _bundles(plan: Plan) -> list[list[Path]]:
    """Paths grouped by source, channels and degree of the message, in order."""

    def key(path: Path) -> tuple[int, ...]:
        return path.source, path.channel, path.width, plan.targets[path.target].degree

    return [list(bundle) for _, bundle in itertools.groupby(sorted(plan.paths, key=key), key)]


mlir.register_lowering(gradient_p, mlir.lower_fun(define_gradient, multiple_results=True))
mlir.register_lowering(tangent_p, mlir.lower_fun(define_tangent, multiple_results=True))
