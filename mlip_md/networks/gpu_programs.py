"""What one program of a convolution kernel does: walk along the edges of a node, in Pallas.

A program has one block of channels, one for each thread. What it reads of an edge, it reads once;
Clebsch-Gordan sums are written out when the kernel is made.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlip_md.networks import layers
from mlip_md.networks.convolution import Names, Path, Plan

Rows = list[jax.Array]
Arrays = Mapping[str, Sequence[Any]]
"""Arrays, or references to them, by name."""


class Part(NamedTuple):
    """Channels of a path that are computed together.

    Attributes:
        path: the path.
        offset: first of its channels.
        width: number of channels.
    """

    path: Path
    offset: int
    width: int


class Task(NamedTuple):
    """What the kernels are made for: a sum of terms, each Φ with at most one factor replaced.

    Attributes:
        plan: of the convolution.
        terms: names of the factors that are replaced by directions, one in each term; "" for none.
        cutoff: Å, where radial weights come from a table.
        table: shape of the table (see ``radial_tables``); empty without one.
        interpret: run on any device, slowly.
    """

    plan: Plan
    terms: Names = ("",)
    cutoff: float = 0.0
    table: tuple[int, ...] = ()
    interpret: bool = False

    def versions(self, *factors: str, without: str) -> list[Names]:
        """Names under which each term reads some factors, in the derivative by another."""
        terms = [term for term in self.terms if term != without]
        return [tuple(f"u{k}" if k == term else k for k in factors) for term in terms]

    def degrees(self, path: Path) -> tuple[int, int, int]:
        """Degrees of the features, the harmonic and the sums of a path."""
        sources, targets = self.plan.sources, self.plan.targets
        return sources[path.source].degree, path.degree, targets[path.target].degree

    def first_column(self, path: Path) -> int:
        """Where the path's radial weights begin in a table, whose blocks are filled up."""
        lanes = self.table[-1]
        before = self.plan.paths[: self.plan.paths.index(path)]
        return sum(-(-p.width // lanes) * lanes for p in before)


@functools.lru_cache
def couplings(l1: int, l2: int, l3: int) -> tuple[tuple[int, int, int, float], ...]:
    """Non-zero couplings: components of features, harmonic and sums, and the number."""
    dense = layers.coupling(l1, l2, l3)
    where = np.argwhere(np.abs(dense) > 1e-12).tolist()
    return tuple((a, b, m, float(dense[a, b, m])) for a, b, m in where)


def remembered(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of an edge, computed once for each set of its arguments."""

    @functools.wraps(method)
    def found(self: Edge, *arguments: Any) -> Any:
        key = method.__name__, *arguments
        if key not in self.known:
            self.known[key] = method(self, *arguments)
        return self.known[key]

    return found


class Program:
    """A node, a block of channels and references.

    Args:
        task: what is computed.
        inputs: references by name; "order" and "starts" say which edges a node has, and "others"
            which node is at their other end.
        mine: "g" if the nodes are receivers, "x" if they are senders.
        channels: number of channels of a program.
        blocks: number of programs side by side.

    Attributes:
        number: of the program among those of its node.
    """

    def __init__(self, task: Task, inputs: Arrays, mine: str, channels: int, blocks: int) -> None:
        from jax.experimental import pallas as pl

        self.task, self.inputs = task, inputs
        self._node, self._block = pl.program_id(0), pl.program_id(2)
        self.number = pl.program_id(1) * blocks + self._block
        self._mine, self._other = mine, {"g": "x", "x": "g"}[mine]
        self._channels, self._width = channels, channels * blocks

    def walk(
        self, number: int, add: Callable[[Edge, Rows], Rows], shared: Sequence[Part] = ()
    ) -> Rows:
        """Add up over the edges of the node.

        Args:
            number: of sums, which start at zero.
            add: returns the sums with an edge added.
            shared: parts of which the node's rows are read before.

        Returns:
            The sums.
        """
        (order,), (starts,), (others,) = (self.inputs[k] for k in ("order", "starts", "others"))
        node = Edge(self, None, {self._mine: self._node}, {})
        for name in ("g", "ug"):
            for part in shared if name in self.inputs else ():
                node.rows(name, part)

        def step(place: jax.Array, sums: Rows) -> Rows:
            index = order[place]
            ends = {self._mine: self._node, self._other: others[index]}
            return add(Edge(self, index, ends, dict(node.known)), list(sums))

        zeros = [self.zeros()] * number
        found: Rows = jax.lax.fori_loop(starts[self._node], starts[self._node + 1], step, zeros)
        return found

    def visit_rest(self, nodes: int, programs: int, visit: Callable[[Any], None]) -> None:
        """Visit the edges that belong to no node, by so many programs that follow the nodes'."""
        (order,), (starts,) = self.inputs["order"], self.inputs["starts"]
        first = starts[nodes] + (self._node - nodes)
        turns = jax.lax.div(order.shape[0] - first + (programs - 1), np.int32(programs))

        def step(turn: jax.Array, none: jax.Array) -> jax.Array:
            visit(order[first + turn * programs])
            return none

        jax.lax.fori_loop(0, turns, step, jnp.int32(0))

    def zeros(self) -> jax.Array:
        """One for each channel."""
        return jnp.zeros(self._channels, jnp.float32)

    def numbers(self) -> jax.Array:
        """The program's channels, counted from the first of a part."""
        return self._block * self._channels + jnp.arange(self._channels, dtype=jnp.int32)

    def channels(self, first: int) -> Any:
        """The same as a slice that is counted from ``first``."""
        from jax.experimental import pallas as pl

        return pl.ds(first + self._block * self._channels, self._channels)

    def load(self, view: Any, width: int) -> jax.Array:
        """Values of channels, zero from ``width`` on."""
        from jax.experimental.pallas import triton

        if width == self._width:
            return triton.load(view)
        return triton.load(view, mask=self.numbers() < width, other=0.0)

    def store(self, view: Any, values: jax.Array, width: int) -> None:
        """Write channels, up to ``width``."""
        from jax.experimental.pallas import triton

        mask = None if width == self._width else self.numbers() < width
        triton.store(view, values, mask=mask)

    def store_rows(self, reference: Any, first: int, values: Rows, width: int) -> None:
        """Write components of the node, from a first channel on."""
        for row, value in enumerate(values):
            self.store(reference.at[self._node, np.int32(row), self.channels(first)], value, width)


class Edge:
    """What a program reads and computes of one edge.

    Attributes:
        index: of the edge.
        known: what has been read or computed.
    """

    def __init__(
        self, program: Program, index: Any, nodes: Mapping[str, Any], known: dict[Any, Any]
    ) -> None:
        self.program, self.index, self.known = program, index, known
        self._nodes, self._task, self._inputs = nodes, program.task, program.inputs

    def rows(self, name: str, part: Part) -> Rows:
        """Features, or what multiplies the sums, by component."""
        path = part.path
        if name[-1] == "x":
            return self._rows(name, path.source, path.channel + part.offset, part.width)
        return self._rows(name, path.target, path.position + part.offset, part.width)

    @remembered
    def _rows(self, name: str, block: int, first: int, width: int) -> Rows:
        reference, node = self._inputs[name][block], self._nodes[name[-1]]
        place = self.program.channels(first)
        views = (reference.at[node, np.int32(row), place] for row in range(reference.shape[1]))
        return [self.program.load(view, width) for view in views]

    @remembered
    def weights(self, name: str, part: Part) -> jax.Array:
        """Radial weights."""
        if self._task.table:
            return self._polynomials(part)[0]
        place = self.program.channels(part.path.column + part.offset)
        return self.program.load(self._inputs[name][0].at[self.index, place], part.width)

    def slopes(self, part: Part) -> jax.Array:
        """Derivatives of the radial weights by the length."""
        return self._polynomials(part)[1]

    @remembered
    def _polynomials(self, part: Part) -> tuple[jax.Array, jax.Array]:
        """A table's polynomials and their slopes, by Horner's rule."""
        _, _, cells, terms, lanes = self._task.table
        start, u = self._cell()
        columns = self.program.numbers() + (self._task.first_column(part.path) + part.offset)
        places = start + columns // lanes * (cells * terms * lanes) + columns % lanes
        (table,) = self._inputs["table"]
        value = slope = jnp.zeros(columns.shape, jnp.float32)
        for d in reversed(range(terms)):
            slope = slope * u + value
            value = value * u + self.program.load(table.at[places + d * lanes], part.width)
        return value, slope * (cells / self._task.cutoff)

    @remembered
    def _cell(self) -> tuple[jax.Array, jax.Array]:
        """Where the edge's cell begins in the table, and the place within it."""
        _, blocks, cells, terms, lanes = self._task.table
        scaled = self._inputs["lengths"][0][self.index] * (cells / self._task.cutoff)
        cell = jnp.minimum(scaled.astype(jnp.int32), cells - 1)
        start = cell * (terms * lanes)
        if "index" in self._inputs:
            start = start + self._inputs["index"][0][self.index] * (blocks * cells * terms * lanes)
        return start, scaled - cell.astype(jnp.float32)

    @remembered
    def _harmonic(self, name: str, b: int) -> jax.Array:
        return self._inputs[name][0][self.index, b]

    @remembered
    def _rotation(self, name: str, degrees: tuple[int, int, int]) -> dict[tuple[int, int], Any]:
        """Σ_b K[a, b, m] Y[b] by (a, m)."""
        found: dict[tuple[int, int], Any] = {}
        for a, b, m, k in couplings(*degrees):
            term = k * self._harmonic(name, degrees[1] ** 2 + b)
            found[a, m] = found[a, m] + term if (a, m) in found else term
        return found

    @remembered
    def _rotated_back(self, y: str, g: str, part: Part) -> dict[int, jax.Array]:
        """Σ_bm K[a, b, m] Y[b] g[m] by a."""
        rows = self.rows(g, part)
        found: dict[int, jax.Array] = {}
        for (a, m), t in self._rotation(y, self._task.degrees(part.path)).items():
            found[a] = found[a] + t * rows[m] if a in found else t * rows[m]
        return found

    def _weighted(self, names: Sequence[Names], part: Part) -> Rows:
        """Radial weights times features, summed over some versions (x, r) of them."""
        products = [[self.weights(r, part) * row for row in self.rows(x, part)] for x, r in names]
        return [functools.reduce(jnp.add, rows) for rows in zip(*products, strict=True)]

    def messages(self, part: Part) -> Iterator[tuple[int, jax.Array]]:
        """Terms of the messages, by component."""
        versions = self._task.versions("y", "x", "r", without="g")
        for y in dict.fromkeys(version[0] for version in versions):
            rows = self._weighted([(x, r) for k, x, r in versions if k == y], part)
            for (a, m), t in self._rotation(y, self._task.degrees(part.path)).items():
                yield m, t * rows[a]

    def pulled_features(self, part: Part) -> Iterator[tuple[int, jax.Array]]:
        """Terms of the derivative by the features, by component."""
        for y, r, g in self._task.versions("y", "r", "g", without="x"):
            for a, value in self._rotated_back(y, g, part).items():
                yield a, value * self.weights(r, part)

    @remembered
    def pulled_weights(self, part: Part) -> jax.Array:
        """Derivative by the radial weights."""
        return functools.reduce(
            jnp.add,
            (
                value * self.rows(x, part)[a]
                for x, y, g in self._task.versions("x", "y", "g", without="r")
                for a, value in self._rotated_back(y, g, part).items()
            ),
        )

    def pulled_harmonics(self, part: Part) -> Iterator[tuple[int, jax.Array]]:
        """Terms of the derivative by the harmonics, by component, not yet summed over channels."""
        versions = self._task.versions("g", "x", "r", without="y")
        degrees = self._task.degrees(part.path)
        for g in dict.fromkeys(version[0] for version in versions):
            rows = self._weighted([(x, r) for k, x, r in versions if k == g], part)
            for a, b, m, k in couplings(*degrees):
                yield degrees[1] ** 2 + b, k * (rows[a] * self.rows(g, part)[m])
