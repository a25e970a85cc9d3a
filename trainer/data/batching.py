"""Batches of static shape: budgets, the plan of an epoch, assembly, a thread that runs ahead.

The plan is a pure function of the seed and the epoch, so a run is resumed in the middle of an epoch
with nothing but (epoch, batch), and every process of a parallel run makes the same plan.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from flax import struct

from mlip_md.errors import DataError
from mlip_md.graph import Array, Graph
from mlip_md.trainer.data.store import GraphStore, ranges


@dataclasses.dataclass(frozen=True)
class BatchBudget:
    """Shape of every batch, padding included.

    Attributes:
        n_node: nodes; at least one is padding.
        n_edge: directed edges.
        n_graph: structures; at least one is padding.
    """

    n_node: int
    n_edge: int
    n_graph: int

    def __post_init__(self) -> None:
        if self.n_node < 2 or self.n_edge < 1 or self.n_graph < 2:
            raise DataError(f"{self} has no room for a structure and its padding")

    @classmethod
    def from_card(
        cls,
        batch_size: int,
        max_n_node: int | None = None,
        max_n_edge: int | None = None,
        store: GraphStore | None = None,
    ) -> BatchBudget:
        """Budget in the terms of the published cards.

        Args:
            batch_size: most structures in a batch, B.
            max_n_node: atoms per structure on average; a batch has B·max_n_node + 1 nodes. None:
                as B random structures of the store need but for one time in forty, enlarged until
                its largest one fits.
            max_n_edge: undirected edges per structure on average; a batch has 2·B·max_n_edge
                edges. None: the same of edges; with max_n_node given, as many as that many atoms
                have on average, enlarged likewise.
            store: graphs from which missing values are taken.

        Returns:
            The budget, B + 1 structures.

        Raises:
            DataError: if a value is below 1, or missing without a store.
        """
        given = {"batch_size": batch_size, "max_n_node": max_n_node, "max_n_edge": max_n_edge}
        for name, value in given.items():
            if value is not None and value < 1:
                raise DataError(f"{name} = {value} is not allowed; it must be at least 1")
        if max_n_edge is None:
            graphs = _needed(store, "max_n_edge")
            pairs, share = graphs.num_edges / 2, 1.0
            if max_n_node is not None:
                share = max_n_node / _usual(graphs.num_atoms, batch_size)
            largest = _ceil(pairs.max() / batch_size)
            max_n_edge = max(_ceil(share * _usual(pairs, batch_size)), largest, 1)
        if max_n_node is None:
            nodes = _needed(store, "max_n_node").num_atoms
            max_n_node = max(_ceil(_usual(nodes, batch_size)), _ceil(nodes.max() / batch_size))
        return cls(batch_size * max_n_node + 1, 2 * batch_size * max_n_edge, batch_size + 1)

    def fits(self, store: GraphStore) -> np.ndarray:
        """(n,) bool, which structures of a store fit into a batch at all."""
        return (store.num_atoms < self.n_node) & (store.num_edges <= self.n_edge)


def _ceil(value: Any) -> int:
    return int(np.ceil(value))


def _usual(sizes: np.ndarray, count: int) -> float:
    """Size per structure that so many random ones exceed one time in forty (two deviations)."""
    return float(np.mean(sizes) + 2.0 * np.std(sizes) / np.sqrt(count))


def _needed(store: GraphStore | None, name: str) -> GraphStore:
    if store is None:
        raise DataError(f"{name} is not given, and there is no data set to take it from")
    return store


def plan_epoch(
    store: GraphStore,
    budget: BatchBudget,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    on_oversize: str = "error",
) -> list[np.ndarray]:
    """Which structures form which batch in an epoch: a pure function of its arguments.

    Structures are taken in (shuffled) order; a batch is closed when the next one would exceed its
    budget, and never opened again.

    Args:
        store: the graphs; only their sizes matter.
        budget: shape of the batches.
        seed: of the whole run.
        epoch: number of the epoch; each has its own order.
        shuffle: False keeps the order of the store (validation).
        on_oversize: "error", or "drop" to leave out structures that fit into no batch (count them
            with ``budget.fits``).

    Returns:
        Indices of structures, one int64 array per batch.

    Raises:
        DataError: if a structure fits into no batch and "error" is asked for.
    """
    if on_oversize not in ("error", "drop"):
        raise DataError(f"on_oversize = {on_oversize!r} must be 'error' or 'drop'")
    fits = budget.fits(store)
    if not fits.all():
        if on_oversize == "error":
            raise DataError(_oversize_message(store, budget, fits))
        if not fits.any():
            raise DataError(_oversize_message(store, budget, fits) + "; nothing would be left")
    order = np.flatnonzero(fits)
    if shuffle:
        generator = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(epoch,)))
        order = generator.permutation(order)
    starts = pack_greedily(store.num_atoms[order], store.num_edges[order], budget)
    return np.split(order, starts[1:])


def pack_greedily(num_atoms: np.ndarray, num_edges: np.ndarray, budget: BatchBudget) -> list[int]:
    """First positions of the batches into which consecutive structures are packed greedily."""
    count = len(num_atoms)
    position = np.arange(count)
    stop = position + budget.n_graph - 1
    for sizes, room in ((num_atoms, budget.n_node - 1), (num_edges, budget.n_edge)):
        total = np.concatenate([[0], np.cumsum(sizes)])
        # the last boundary that a batch starting at each position may reach
        stop = np.minimum(stop, np.searchsorted(total, total[:-1] + room, side="right") - 1)
    following = stop.tolist()
    starts, current = [], 0
    while current < count:
        starts.append(current)
        current = following[current]
    return starts


def _oversize_message(store: GraphStore, budget: BatchBudget, fits: np.ndarray) -> str:
    bad = np.flatnonzero(~fits)
    first = int(bad[0])
    return (
        f"{len(bad)} structures fit into no batch, e.g. {store.names[first]} with "
        f"{store.num_atoms[first]} atoms and {store.num_edges[first]} edges; a batch takes "
        f"{budget.n_node - 1} atoms and {budget.n_edge} edges. Raise max_n_node or max_n_edge, or "
        "set on_oversize to drop"
    )


@struct.dataclass
class Batch:
    """Structures and labels in one padded graph; labels of padding are 0.

    Attributes:
        graph: the structures.
        energy: (n_graphs,) eV, interaction energies (total minus E0).
        forces: (n_nodes, 3) eV/Å.
        stress: (n_graphs, 3, 3) eV/Å³, 0 where there is no label; None if the store has none.
        stress_mask: (n_graphs,) bool, where there is a stress label; None if the store has none.
        forces_mask: (n_graphs,) bool, where forces are labels; None: everywhere.
        weights: (n_graphs, 3), of energy, forces and stress in the loss; None: all are 1.
    """

    graph: Graph
    energy: Array
    forces: Array
    stress: Array | None = None
    stress_mask: Array | None = None
    forces_mask: Array | None = None
    weights: Array | None = None


def _padded(values: np.ndarray, size: int, dtype: Any, fill: float = 0) -> np.ndarray:
    out = np.empty((size, *values.shape[1:]), dtype)
    out[: len(values)] = values
    out[len(values) :] = fill
    return out


def make_batch(
    store: GraphStore, indices: np.ndarray, budget: BatchBudget, dtype: str = "float32"
) -> Batch:
    """Assemble one batch.

    Args:
        store: graphs with energy labels.
        indices: (k,) structures, one entry of ``plan_epoch``.
        budget: shape of the batch.
        dtype: "float32" or "float64", of its real numbers.

    Returns:
        The batch as NumPy arrays, real and int32; padding as ``mlip_md.graph`` defines it.

    Raises:
        DataError: if the structures do not fit, or the store has no atomic energies yet.
    """
    indices = np.asarray(indices, np.int64)
    atoms, edges = store.num_atoms[indices], store.num_edges[indices]
    n_node, n_edge, n_graph = budget.n_node, budget.n_edge, budget.n_graph
    if len(indices) >= n_graph or atoms.sum() >= n_node or edges.sum() > n_edge:
        raise DataError(
            f"{len(indices)} structures with {atoms.sum()} atoms and {edges.sum()} edges do not "
            f"fit into {budget}"
        )
    node = ranges(store.first_atom[indices], atoms)
    edge = ranges(store.first_edge[indices], edges)
    first_node = np.repeat((np.cumsum(atoms) - atoms).astype(np.int32), edges)
    shifts = np.zeros((n_edge, 3), np.int32)
    if store.shifts is not None:
        shifts[: len(edge)] = store.shifts[edge]
    cell = np.zeros((n_graph, 3, 3), dtype)
    if store.cell is not None:
        cell[: len(indices)] = store.cell[indices]
    graph = Graph(
        positions=_padded(store.positions[node], n_node, dtype),
        species=_padded(store.species_of[store.atomic_numbers[node]], n_node, np.int32),
        cell=cell,
        senders=_padded(store.senders[edge] + first_node, n_edge, np.int32, n_node - 1),
        receivers=_padded(store.receivers[edge] + first_node, n_edge, np.int32, n_node - 1),
        shifts=shifts,
        node_graph=_padded(
            np.repeat(np.arange(len(indices)), atoms), n_node, np.int32, n_graph - 1
        ),
        node_mask=np.arange(n_node) < len(node),
        edge_mask=np.arange(n_edge) < len(edge),
        graph_mask=np.arange(n_graph) < len(indices),
    )
    stress = mask = None
    if store.stress is not None and store.stress_mask is not None:
        stress = _padded(store.stress[indices], n_graph, dtype)
        mask = _padded(store.stress_mask[indices], n_graph, bool)
    forces_mask = weights = None
    if store.forces_mask is not None:
        forces_mask = _padded(store.forces_mask[indices], n_graph, bool)
    if store.weights is not None:
        weights = _padded(store.weights[indices], n_graph, dtype)
    return Batch(
        graph=graph,
        energy=_padded(store.exact_interaction_energy[indices], n_graph, dtype),
        forces=_padded(store.forces[node], n_node, dtype),
        stress=stress,
        stress_mask=mask,
        forces_mask=forces_mask,
        weights=weights,
    )


def join_batches(
    first: Batch, second: Batch, weight: float, counts: tuple[int, int] | None = None
) -> Batch:
    """One batch whose loss is L(first) + weight · L(second), each the mean over its structures.

    Args:
        first: any batch of NumPy arrays.
        second: another one, of the same precision; its structures follow the padding of the first.
        weight: at least 0.
        counts: structures of the two, if these are only parts of larger batches.
    """
    one, two = first.graph, second.graph
    n_nodes, n_graphs = len(one.positions), len(one.graph_mask)
    counts = counts or (int(one.graph_mask.sum()), int(two.graph_mask.sum()))
    behind = {"senders": n_nodes, "receivers": n_nodes, "node_graph": n_graphs}
    graph = Graph(**{
        field.name: np.concatenate([getattr(one, field.name),
                                    getattr(two, field.name) + behind[field.name]
                                    if field.name in behind else getattr(two, field.name)])
        for field in dataclasses.fields(Graph)
    })  # fmt: skip
    parts: list[dict[str, Any]] = []
    for batch, share in ((first, 1.0 / counts[0]), (second, weight / counts[1])):
        size, dtype = len(batch.energy), batch.energy.dtype
        weights = np.ones((size, 3), dtype) if batch.weights is None else batch.weights
        parts.append({
            "energy": batch.energy,
            "forces": batch.forces,
            "stress": np.zeros((size, 3, 3), dtype) if batch.stress is None else batch.stress,
            "stress_mask": _or(batch.stress_mask, np.zeros(size, bool)),
            "forces_mask": _or(batch.forces_mask, np.ones(size, bool)),
            "weights": (sum(counts) * share * np.asarray(weights)).astype(dtype),
        })  # fmt: skip
    if first.stress is None and second.stress is None:
        parts = [p | {"stress": None, "stress_mask": None} for p in parts]
    joined: dict[str, Any] = {
        name: None if value is None else np.concatenate([value, parts[1][name]])
        for name, value in parts[0].items()
    }
    return Batch(graph=graph, **joined)


def _or(array: Array | None, usual: np.ndarray) -> Array:
    return usual if array is None else array


def iterate_batches(
    store: GraphStore,
    plan: Sequence[np.ndarray],
    budget: BatchBudget,
    ahead: int = 2,
    dtype: str = "float32",
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The batches of a plan with the indices of their structures, assembled in another thread.

    An error of ``make_batch`` is raised in its place. The thread ends when the plan does, and when
    this iterator is closed, left by an exception or garbage collected.

    Args:
        store: graphs with energy labels.
        plan: as ``plan_epoch`` gives it.
        budget: shape of the batches.
        ahead: batches that are assembled before they are asked for.
        dtype: as ``make_batch`` takes it.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as worker:
        waiting: deque[tuple[np.ndarray, Future[Batch]]] = deque()
        try:
            for indices in plan:
                waiting.append((indices, worker.submit(make_batch, store, indices, budget, dtype)))
                if len(waiting) > ahead:
                    first, batch = waiting.popleft()
                    yield first, batch.result()
            for first, batch in waiting:
                yield first, batch.result()
        finally:
            for _, batch in waiting:
                batch.cancel()
