"""Kernels of the convolution for GPUs, in Pallas: one pass over the edges, no messages in memory.

A program owns what it writes: rows of one node in one block of channels, or what belongs to the
edges that arrive at one node. It walks along these edges and keeps its sums in registers, so that
no two programs add to one number and results are the same in every run. Senders have an order of
the edges of their own.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlip_md.networks.convolution import Names, Pairs, Plan
from mlip_md.networks.gpu_programs import Arrays, Edge, Part, Program, Rows, Task

CHANNELS = (32, 128)
"""Least and most channels of a program, powers of two: its threads."""
MOST_ROWS = 40
"""Sums of a thread, which are to stay in registers."""
TILE = 2048
"""Entries that a program adds up at a time."""
CLEARING = 64
"""Programs that clear what belongs to edges that carry nothing."""


class Unit(NamedTuple):
    """What a program computes beside others for the same node.

    Attributes:
        block: index of the block of features or of sums.
        channel: first channel of it.
        width: most channels of a part.
        parts: what is computed.
    """

    block: int
    channel: int
    width: int
    parts: tuple[Part, ...]


class Edges(NamedTuple):
    """The edges of each node.

    Attributes:
        order: (n_edges,) int32, edges by node; those that carry nothing are at the end.
        starts: (n_nodes + 1,) int32, where each node's edges begin in it.
        others: (n_edges,) int32, node at the other end of each edge.
        mine: "g" if the nodes are receivers, "x" if they are senders.
    """

    order: jax.Array
    starts: jax.Array
    others: jax.Array
    mine: str


def derivatives(
    task: Task, pairs: Pairs, factors: Arrays, wrt: Names, sizes: tuple[int, int]
) -> dict[str, list[jax.Array]]:
    """Derivatives of a sum of terms by some factors.

    Args:
        task: the terms.
        pairs: the edges, at least one.
        factors: float32 arrays by factor: "x", "y", "g" and "r", or "lengths", "table" and "index"
            in its place; directions have a "u" before the name.
        wrt: factors.
        sizes: number of senders and of receivers, at least one.

    Returns:
        Arrays in the shapes of the factors, by name; a factor that no term depends on is left out.
    """
    weights = "lengths" if task.table else "r"
    wanted = {k for k in wrt if any(term != k for term in task.terms)}
    found: dict[str, list[jax.Array]] = {}
    if wanted - {"x"}:
        ends = pairs.receivers, pairs.senders
        arriving = _edges_of(*ends, pairs.inside, sizes[1], "g", task.interpret)
    if "g" in wanted:
        found["g"] = _sum_messages(task, arriving, factors)
    if varied := [k for k in ("y", weights) if k in wanted]:
        found |= _pull_to_edges(task, arriving, factors, varied)
    if "x" in wanted:
        ends = pairs.senders, pairs.receivers
        leaving = _edges_of(*ends, pairs.inside, sizes[0], "x", task.interpret)
        found["x"] = _pull_to_senders(task, leaving, factors)
    return found


def _edges_of(
    nodes: jax.Array, others: jax.Array, inside: jax.Array, number: int, mine: str, interpret: bool
) -> Edges:
    keys = jnp.where(inside, nodes, number)
    return Edges(*_sort(keys, number, interpret), others.astype(jnp.int32), mine)


def _sort(keys: jax.Array, number: int, interpret: bool) -> tuple[jax.Array, jax.Array]:
    """Order of keys, and where each number up to ``number`` begins in it."""
    keys = keys.astype(jnp.int32)
    ordered, order = jax.lax.sort((keys, jnp.arange(len(keys), dtype=jnp.int32)), num_keys=1)
    return order, _find_starts(ordered, number + 1, interpret)


def _find_starts(ordered: jax.Array, number: int, interpret: bool) -> jax.Array:
    """Places of the first keys that are not below 0 … number - 1, by halving, in one kernel."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    _, lanes = CHANNELS
    size = len(ordered)

    def mlip_md_find_starts(ordered: Any, starts: Any) -> None:
        place = pl.program_id(0) * lanes
        bounds = place + jnp.arange(lanes, dtype=jnp.int32)

        def halve(_: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = ends
            middle, wide = jnp.right_shift(low + high, 1), low < high
            below = wide & (triton.load(ordered.at[middle], mask=wide, other=0) < bounds)
            return jnp.where(below, middle + 1, low), jnp.where(wide & ~below, middle, high)

        ends = jnp.zeros(lanes, jnp.int32), jnp.full(lanes, size, jnp.int32)
        low, _ = jax.lax.fori_loop(0, size.bit_length(), halve, ends)
        triton.store(starts.at[pl.ds(place, lanes)], low, mask=bounds < number)

    grid, result = (-(-number // lanes),), jax.ShapeDtypeStruct((number,), jnp.int32)
    found: jax.Array = _pallas_call(mlip_md_find_starts, grid, result, lanes, interpret)(ordered)
    return found


def _sum_messages(task: Task, edges: Edges, factors: Arrays) -> list[jax.Array]:
    """∂/∂g: messages summed at their receivers."""
    plan, n_nodes = task.plan, len(edges.starts) - 1
    shapes = [(n_nodes, 2 * block.degree + 1, block.channels) for block in plan.targets]

    def body(program: Program, unit: Unit, outputs: Sequence[Any]) -> None:
        size = 2 * plan.targets[unit.block].degree + 1

        def add(edge: Edge, sums: Rows) -> Rows:
            for k, part in enumerate(unit.parts):
                for m, message in edge.messages(part):
                    sums[k * size + m] = sums[k * size + m] + message
            return sums

        sums = program.walk(len(unit.parts) * size, add)
        for k, part in enumerate(unit.parts):
            rows = sums[k * size : (k + 1) * size]
            program.store_rows(outputs[unit.block], part.path.position, rows, part.width)

    needed = _needed(task, "x", "y", "r", without="g")
    return _launch(task, body, units_of_sums(plan), edges, factors, needed, shapes)


def _pull_to_senders(task: Task, edges: Edges, factors: Arrays) -> list[jax.Array]:
    """∂/∂x."""
    plan, n_nodes = task.plan, len(edges.starts) - 1
    shapes = [(n_nodes, 2 * block.degree + 1, block.channels) for block in plan.sources]

    def body(program: Program, unit: Unit, outputs: Sequence[Any]) -> None:
        def add(edge: Edge, sums: Rows) -> Rows:
            for part in unit.parts:
                for a, value in edge.pulled_features(part):
                    sums[a] = sums[a] + value
            return sums

        sums = program.walk(2 * plan.sources[unit.block].degree + 1, add)
        program.store_rows(outputs[unit.block], unit.channel, sums, unit.width)

    needed = _needed(task, "y", "r", "g", without="x")
    return _launch(task, body, units_of_features(plan), edges, factors, needed, shapes)


def _pull_to_edges(
    task: Task, edges: Edges, factors: Arrays, wrt: Sequence[str]
) -> dict[str, list[jax.Array]]:
    """∂/∂y and by radial weights or lengths; what several programs find is added afterwards."""
    plan, n_edges, units = task.plan, len(edges.order), units_of_sums(task.plan)
    pieces = len(units) * _channel_blocks(units)[1], n_edges
    shape_of = {"y": (*pieces, plan.harmonics), "r": (n_edges, plan.columns), "lengths": pieces}

    def body(program: Program, unit: Unit, outputs: Sequence[Any]) -> None:
        by_name = dict(zip(wrt, outputs, strict=True))

        def pull(edge: Edge, _: Rows) -> Rows:
            _store_pull(program, edge.index, unit.parts, by_name, edge)
            return []

        program.walk(0, pull, shared=unit.parts)

    def clear(program: Program, unit: Unit, outputs: Sequence[Any]) -> None:
        by_name = dict(zip(wrt, outputs, strict=True))
        visit = functools.partial(_store_pull, program, parts=unit.parts, outputs=by_name)
        program.visit_rest(len(edges.starts) - 1, CLEARING, visit)

    needed = _needed(task, "x", "r", "g", without="y") if "y" in wrt else set()
    if "r" in wrt:
        needed |= _needed(task, "x", "y", "g", without="r")
    if "lengths" in wrt:
        needed |= {"x", "y", "g"}
    shapes = [shape_of[name] for name in wrt]
    found = dict(
        zip(wrt, _launch(task, body, units, edges, factors, needed, shapes, clear), strict=True)
    )
    return {
        name: [_fill_columns(plan, array) if name == "r" else jnp.sum(array, axis=0)]
        for name, array in found.items()
    }


def _store_pull(
    program: Program,
    index: Any,
    parts: Sequence[Part],
    outputs: dict[str, Any],
    edge: Edge | None = None,
) -> None:
    """Write what a program finds of one edge, summed over its channels; zeros without one."""
    sums: dict[int, jax.Array] = {}
    slopes = []
    for part in parts:
        if "r" in outputs:
            view = outputs["r"].at[index, program.channels(part.path.column)]
            program.store(view, edge.pulled_weights(part) if edge else program.zeros(), part.width)
        if "lengths" in outputs and edge:
            slopes.append(edge.pulled_weights(part) * edge.slopes(part))
        for b, value in edge.pulled_harmonics(part) if "y" in outputs and edge else ():
            sums[b] = sums[b] + value if b in sums else value
    if "y" in outputs:
        for b in range(outputs["y"].shape[-1]):
            outputs["y"][program.number, index, b] = jnp.sum(sums[b]) if b in sums else 0.0
    if "lengths" in outputs:
        slope = jnp.sum(functools.reduce(jnp.add, slopes)) if slopes else 0.0
        outputs["lengths"][program.number, index] = slope


def _fill_columns(plan: Plan, array: jax.Array) -> jax.Array:
    """Zeros in the columns that belong to no path, which no program wrote."""
    read = np.zeros(plan.columns, bool)
    for path in plan.paths:
        read[path.column : path.column + path.width] = True
    return array if read.all() else jnp.where(read[None], array, 0.0)


def _needed(task: Task, *factors: str, without: str) -> set[str]:
    return {name for names in task.versions(*factors, without=without) for name in names}


def units_of_sums(plan: Plan) -> list[Unit]:
    """Paths to the same sums, few enough for the registers of a thread."""
    units = []
    for index, block in enumerate(plan.targets):
        parts = [Part(path, 0, path.width) for path in plan.paths if path.target == index]
        most = max(1, MOST_ROWS // (2 * block.degree + 1))
        for piece in np.array_split(np.arange(len(parts)), -(-len(parts) // most)):
            chosen = tuple(parts[k] for k in piece)
            units.append(Unit(index, 0, max(part.width for part in chosen), chosen))
    return units


def units_of_features(plan: Plan) -> list[Unit]:
    """Ranges of channels of the features, each read by the same paths, or by none."""
    units = []
    for index, block in enumerate(plan.sources):
        paths = [path for path in plan.paths if path.source == index]
        ends = {end for path in paths for end in (path.channel, path.channel + path.width)}
        for start, stop in itertools.pairwise(sorted(ends | {0, block.channels})):
            parts = tuple(
                Part(path, start - path.channel, stop - start)
                for path in paths
                if path.channel <= start and stop <= path.channel + path.width
            )
            units.append(Unit(index, start, stop - start, parts))
    return units


def _channel_blocks(units: Sequence[Unit]) -> tuple[int, int]:
    """Channels of a program, and number of programs side by side."""
    widest = max(unit.width for unit in units)
    channels = int(np.clip(1 << (widest - 1).bit_length(), *CHANNELS))
    return channels, -(-widest // channels)


def _launch(
    task: Task,
    body: Callable[[Program, Unit, Sequence[Any]], None],
    units: Sequence[Unit],
    edges: Edges,
    factors: Arrays,
    needed: Iterable[str],
    shapes: Sequence[tuple[int, ...]],
    clear: Callable[[Program, Unit, Sequence[Any]], None] | None = None,
) -> list[jax.Array]:
    """Run a body for every node, unit and block of channels, and ``clear`` by others behind."""
    from jax.experimental import pallas as pl

    channels, blocks = _channel_blocks(units)
    n_nodes = len(edges.starts) - 1

    def kernel(inputs: Arrays, *outputs: Any) -> None:
        program = Program(task, inputs, edges.mine, channels, blocks)
        for index, unit in enumerate(units):
            here, of_node = pl.program_id(1) == index, pl.program_id(0) < n_nodes
            pl.when(here & of_node)(functools.partial(body, program, unit, outputs))
            if clear is not None:
                pl.when(here & ~of_node)(functools.partial(clear, program, unit, outputs))

    name = body.__qualname__.partition(".")[0].strip("_")
    kernel.__name__ = f"mlip_md_{name}"  # by which profiles and plans know it
    grid = n_nodes + (CLEARING if clear is not None else 0), len(units), blocks
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    call = _pallas_call(kernel, grid, results, channels, task.interpret)
    return list(call(_inputs(task, edges, factors, needed)))


def _pallas_call(
    kernel: Callable[..., None], grid: tuple[int, ...], results: Any, threads: int, interpret: bool
) -> Callable[..., Any]:
    """A kernel as a function of arrays."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    params = None if interpret else triton.CompilerParams(num_warps=threads // 32, num_stages=1)
    call: Callable[..., Any] = pl.pallas_call(
        kernel, out_shape=results, grid=grid, interpret=interpret, compiler_params=params
    )
    return call


def _inputs(
    task: Task, edges: Edges, factors: Arrays, needed: Iterable[str]
) -> dict[str, list[jax.Array]]:
    """What a kernel is given, by name."""
    names = set(needed)
    inputs = {"order": [edges.order], "starts": [edges.starts], "others": [edges.others]}
    if task.table:
        names = names - {"r"} | {"lengths"} | ({"index"} if task.table[0] > 1 else set())
        inputs["table"] = [factors["table"][0].reshape(-1)]
    return inputs | {name: list(factors[name]) for name in sorted(names)}


def sum_rows(
    values: jax.Array, index: jax.Array, number: int, *, interpret: bool = False
) -> jax.Array:
    """``rows.sum_rows`` in a fixed order; a program takes some lanes of one row of the result."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    shape, width = values.shape[1:], math.prod(values.shape[1:])
    if number == 1:
        return jnp.sum(values, axis=0, keepdims=True)
    lanes = min(128, 1 << (width - 1).bit_length())
    tile = TILE // lanes

    def mlip_md_sum_rows(values: Any, order: Any, starts: Any, sums: Any) -> None:
        row, first = pl.program_id(0), pl.program_id(1) * lanes
        start, stop = starts[row], starts[row + 1]
        lane = first + jnp.arange(lanes, dtype=jnp.int32)
        columns = jnp.broadcast_to(lane[None, :], (tile, lanes))

        def add(turn: jax.Array, total: jax.Array) -> jax.Array:
            places = start + turn * tile + jnp.arange(tile, dtype=jnp.int32)
            rows = triton.load(order.at[places], mask=places < stop, other=0)
            there = jnp.broadcast_to((places < stop)[:, None], columns.shape) & (columns < width)
            view = values.at[jnp.broadcast_to(rows[:, None], columns.shape), columns]
            return total + jnp.sum(triton.load(view, mask=there, other=0.0), axis=0)

        turns = jax.lax.div(stop - start + (tile - 1), np.int32(tile))
        total = jax.lax.fori_loop(0, turns, add, jnp.zeros(lanes, jnp.float32))
        triton.store(sums.at[row, pl.ds(first, lanes)], total, mask=lane < width)

    grid = number, -(-width // lanes)
    result = jax.ShapeDtypeStruct((number, width), jnp.float32)
    call = _pallas_call(mlip_md_sum_rows, grid, result, CHANNELS[1], interpret)
    found: jax.Array = call(values.reshape(-1, width), *_sort(index, number, interpret))
    return found.reshape(number, *shape)
