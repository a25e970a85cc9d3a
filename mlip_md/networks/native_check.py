"""Compares the compiled convolution with its definition, in NumPy and float64, on a small graph.

Everything is a gradient of Φ(x, Y, R, g) = Σ_e Σ_p Σ K[a,b,m] x[s_e,a,c] Y[e,b] R[e,c] g[r_e,m,c],
sums over the edges e that count, the paths p and their channels c.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

import jax
import numpy as np

from mlip_md.compiler import jit
from mlip_md.networks.layers import coupling

Arrays = list[np.ndarray]

MAX_DEGREE = 4
TOLERANCES = {"float64": 1e-12, "float32": 5e-6}
"""Of the largest number of a result."""


class Path(NamedTuple):
    """One product of features and harmonics.

    Attributes:
        source: index of the features that it reads; their degree is that of the features.
        channel: first of their channels.
        degree: of the harmonic.
        target: index of the sums that it writes.
        position: first of their channels.
        column: first column of the radial weights.
        width: number of channels.
    """

    source: int
    channel: int
    degree: int
    target: int
    position: int
    column: int
    width: int


class Gradients(NamedTuple):
    """Gradients of Φ.

    Attributes:
        x: (n_nodes, 2l1+1, channels) of each source.
        y: (n_edges, harmonics).
        r: (n_edges, columns).
        g: (n_nodes, 2l3+1, channels) of each target: the convolution itself.
    """

    x: Arrays
    y: np.ndarray
    r: np.ndarray
    g: Arrays


@dataclasses.dataclass(frozen=True)
class Case:
    """A graph, what it carries and the paths.

    Attributes:
        paths: of the convolution.
        senders: (n_edges,) int32.
        receivers: (n_edges,) int32, ascending.
        inside: (n_edges,) bool, edges that count.
        x: features of each source.
        y: (n_edges, harmonics).
        r: (n_edges, columns) radial weights.
        g: what arrives at each target.
    """

    paths: tuple[Path, ...]
    senders: np.ndarray
    receivers: np.ndarray
    inside: np.ndarray
    x: Arrays
    y: np.ndarray
    r: np.ndarray
    g: Arrays

    @property
    def plan(self) -> np.ndarray:
        """Paths as the handlers read them."""
        numbers = [len(self.x), len(self.g), len(self.paths), *itertools.chain(*self.paths)]
        return np.array(numbers, np.int64)

    @property
    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First arguments of every handler."""
        return self.senders, self.receivers, self.inside

    def cast(self, dtype: str) -> Case:
        """The same in another precision."""
        x, g = ([a.astype(dtype) for a in arrays] for arrays in (self.x, self.g))
        y, r = self.y.astype(dtype), self.r.astype(dtype)
        return dataclasses.replace(self, x=x, y=y, r=r, g=g)


@dataclasses.dataclass(frozen=True)
class Table:
    """Radial weights as polynomials of the distance.

    Attributes:
        lengths: (n_edges,) distances.
        pairs: (n_edges,) int32, which of the tables.
        values: (n_pairs, blocks, cells, degree+1, 8).
        cutoff: beyond which edges do not count.
    """

    lengths: np.ndarray
    pairs: np.ndarray
    values: np.ndarray
    cutoff: float


def gradients(case: Case) -> Gradients:
    """Gradients of Φ by its definition, in float64."""
    case = case.cast("float64")
    out = Gradients(*jax.tree_util.tree_map(np.zeros_like, (case.x, case.y, case.r, case.g)))
    s, d = case.senders[case.inside], case.receivers[case.inside]
    for path in case.paths:
        k = coupling(
            case.x[path.source].shape[1] // 2, path.degree, case.g[path.target].shape[1] // 2
        )
        channels = slice(path.channel, path.channel + path.width)
        positions = slice(path.position, path.position + path.width)
        columns = slice(path.column, path.column + path.width)
        components = slice(path.degree**2, (path.degree + 1) ** 2)
        x = case.x[path.source][s, :, channels]
        g = case.g[path.target][d, :, positions]
        y = case.y[case.inside, components]
        r = case.r[case.inside, columns]
        t = np.einsum("abm,eb->eam", k, y)
        z = np.einsum("eam,emc->eac", t, g)
        np.add.at(out.g[path.target][..., positions], d, np.einsum("eam,eac,ec->emc", t, x, r))
        np.add.at(out.x[path.source][..., channels], s, z * r[:, None])
        out.r[case.inside, columns] += np.sum(x * z, axis=1)
        out.y[case.inside, components] += np.einsum("abm,eam->eb", k, (x * r[:, None]) @ swap(g))
    return out


def swap(a: np.ndarray) -> np.ndarray:
    """Exchange the last two axes."""
    return np.swapaxes(a, -1, -2)


def second_gradients(case: Case, tangent: Case) -> Gradients:
    """Derivative of the gradients along the tangent's x, y and r, by the definition."""
    by_x, by_y, by_r = (
        gradients(dataclasses.replace(case, **{name: getattr(tangent, name)})) for name in "xyr"
    )
    return Gradients(
        [a + b for a, b in zip(by_y.x, by_r.x, strict=True)],
        by_x.y + by_r.y,
        by_x.r + by_y.r,
        [a + b + c for a, b, c in zip(by_x.g, by_y.g, by_r.g, strict=True)],
    )


def weights_of(case: Case, table: Table) -> tuple[np.ndarray, np.ndarray]:
    """Radial weights and their derivatives by a table, in float64: (n_edges, columns) each."""
    _, _, cells, terms, _ = table.values.shape
    place = table.lengths.astype(np.float64) * (cells / table.cutoff)
    cell = np.clip(np.floor(place), 0, cells - 1).astype(int)
    u = (place - cell)[:, None] ** np.arange(terms)
    du = np.arange(terms) * np.concatenate([np.zeros_like(u[:, :1]), u[:, :-1]], axis=1)
    rows = table.values.astype(np.float64)[table.pairs, :, cell]
    r, dr = (np.zeros(case.r.shape) for _ in range(2))
    block = 0
    for path in case.paths:
        columns, blocks = slice(path.column, path.column + path.width), -(-path.width // 8)
        for out, powers in ((r, u), (dr, du * (cells / table.cutoff))):
            value = np.einsum("ebdl,ed->ebl", rows[:, block : block + blocks], powers)
            out[:, columns] = value.reshape(len(value), -1)[:, : path.width]
        block += blocks
    return r, dr


def run(name: str, case: Case, arguments: Any, results: Any, **attributes: Any) -> Any:
    """Call a handler of the library.

    Args:
        name: of the handler, without what all have in front.
        case: whose plan it is given.
        arguments: pytree of arrays.
        results: pytree of arrays of the shapes that come back.
        attributes: of the call.

    Returns:
        Results in the order and shape of ``results``.
    """
    leaves, tree = jax.tree_util.tree_flatten(results)
    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    call = jax.ffi.ffi_call(f"mlip_md_conv_{name}", shapes)
    attributes = {"threads": np.int64(0), **attributes}
    found = jit(lambda *leaves: call(*leaves, plan=case.plan, **attributes))(
        *jax.tree_util.tree_leaves(arguments)
    )
    return jax.tree_util.tree_unflatten(tree, [np.asarray(a) for a in found])


def all_couplings(width: int, n_nodes: int, n_edges: int, seed: int) -> Case:
    """A random case with every coupling, whose columns, channels and sums are not all used."""
    draw = np.random.default_rng(seed)
    degrees = range(MAX_DEGREE + 1)
    paths: list[Path] = []
    used = [0] * len(degrees)
    for l1, l2, l3 in itertools.product(degrees, repeat=3):
        if abs(l1 - l2) <= l3 <= l1 + l2:
            paths.append(Path(l1, l1 % 2, l2, l3, used[l3], width * len(paths) + 1, width))
            used[l3] += width
    receivers = np.sort(draw.integers(0, n_nodes, n_edges)).astype(np.int32)

    def normal(*shape: int) -> np.ndarray:
        return draw.standard_normal(shape)

    return Case(
        tuple(paths),
        draw.integers(0, n_nodes, n_edges).astype(np.int32),
        receivers,
        draw.random(n_edges) < 0.8,
        [normal(n_nodes, 2 * l + 1, width + 2) for l in degrees],
        normal(n_edges, (MAX_DEGREE + 1) ** 2),
        normal(n_edges, width * len(paths) + 2),
        [normal(n_nodes, 2 * l + 1, used[l]) for l in degrees],
    )


def random_table(case: Case, cells: int, degree: int, seed: int) -> Table:
    """A table for a case with two pairs; some edges are longer than its cutoff."""
    draw = np.random.default_rng(seed)
    widths = [min(8, path.width - c) for path in case.paths for c in range(0, path.width, 8)]
    values = draw.standard_normal((2, len(widths), cells, degree + 1, 8))
    values *= np.arange(8) < np.array(widths)[:, None, None, None]
    lengths = draw.uniform(0.1, 6.0, len(case.senders))
    pairs = draw.integers(0, 2, len(lengths)).astype(np.int32)
    return Table(lengths, pairs, values, 5.0)


def differences(case: Case, tangent: Case, table: Table, dtype: str) -> dict[str, float]:
    """Largest error of each handler's results, relative to the largest number of each.

    Args:
        case: computed in float64 by the definition, and in ``dtype`` by the library.
        tangent: direction of the second order.
        table: in place of the case's radial weights and of the edges that count.
        dtype: "float32" or "float64".
    """
    case, tangent = case.cast(dtype), tangent.cast(dtype)
    lengths, values = table.lengths.astype(dtype), table.values.astype(dtype)
    table = dataclasses.replace(table, lengths=lengths, values=values)
    rest = case.y, case.r, case.x, case.g
    out = Gradients(case.x, case.y, case.r, case.g)
    first, everything = gradients(case), {"wrt": np.int64(7)}
    tangents = tangent.y, tangent.r, tangent.x
    found: dict[str, tuple[Any, Any]] = {
        "forward": (run("forward", case, (case.edges, *rest[:3]), case.g), first.g),
        "backward": (
            run("backward", case, (case.edges, *rest), out[:3], **everything),
            first[:3],
        ),
        "second": (
            run("second", case, (case.edges, *rest, tangents), tuple(out)),
            tuple(second_gradients(case, tangent)),
        ),
    }
    r, dr = weights_of(case, table)
    inside = lengths < dtype_of(dtype).type(table.cutoff)
    exact = gradients(dataclasses.replace(case, r=r, inside=inside))
    edges = case.senders, case.receivers, lengths, table.pairs, case.y, values, case.x
    cutoff = {"cutoff": np.float64(table.cutoff)}
    found["table_forward"] = run("table_forward", case, edges, case.g, **cutoff), exact.g
    found["table_backward"] = (
        run(
            "table_backward",
            case,
            (edges, case.g),
            (case.x, case.y, lengths),
            **everything,
            **cutoff,
        ),
        (exact.x, exact.y, np.sum(exact.r * dr, axis=1)),
    )
    return {name: largest_error(*pair) for name, pair in found.items()}


def dtype_of(name: str) -> np.dtype:
    """Precision by name."""
    return np.dtype(name)


def largest_error(found: Any, exact: Any) -> float:
    """Largest difference of two pytrees, relative to the largest number of each array."""
    leaves = zip(*(jax.tree_util.tree_leaves(tree) for tree in (found, exact)), strict=True)
    # Not max(): it would pass over NaN.
    return float(
        np.max([0.0, *(np.max(np.abs(a - b)) / np.max(np.abs(b)) for a, b in leaves if b.size)])
    )


def compare() -> str:
    """Compare every handler with its definition, in both precisions.

    Returns:
        What differs, or nothing.
    """
    case = all_couplings(width=5, n_nodes=4, n_edges=12, seed=0)
    tangent = all_couplings(width=5, n_nodes=4, n_edges=12, seed=1)
    table = random_table(case, cells=3, degree=3, seed=2)
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.default_device(cpu):
        for dtype, tolerance in TOLERANCES.items():
            for name, error in differences(case, tangent, table, dtype).items():
                if not error <= tolerance:
                    return f"its {name} differs by {error:.1e} from what it must be in {dtype}"
    return ""
