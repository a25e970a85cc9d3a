"""The graph of atoms that every network reads.

Conventions, stated once for the whole project:

* Units are Å and eV. Rows of a cell are its lattice vectors.
* An edge goes from a sender to a receiver; messages flow that way and are summed at receivers.
* ``vectors = positions[receivers] - positions[senders] + shifts @ cell``. A neighbour list in
  ASE's convention (``D = r_j + S·cell - r_i``) is this graph with senders i, receivers j, shifts S.
* Lists are full: with every edge its reverse (and opposite shift) is there too. Edges are sorted
  by receiver.
* Padding comes last. At least one padding node exists whenever there are padding edges; padding
  edges run from the last node to itself, so that nothing they carry can reach a real atom.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array | np.ndarray

PADDING_EDGE_LENGTH = 1e3
"""Length (Å) given to padding edges: beyond every cutoff, and harmless to differentiate."""


@struct.dataclass
class Graph:
    """One or several structures as one padded graph.

    Attributes:
        positions: (n_nodes, 3) Å; their dtype is the working precision of the networks.
        species: (n_nodes,) int32, index of the atom's element in the potential's elements.
        cell: (n_graphs, 3, 3) Å, rows are lattice vectors; zeros for structures without one.
        senders: (n_edges,) int32.
        receivers: (n_edges,) int32, ascending.
        shifts: (n_edges, 3) int32, whole lattice vectors added to the receiver's position.
        node_graph: (n_nodes,) int32, the structure to which each node belongs.
        node_mask: (n_nodes,) bool, False on padding.
        edge_mask: (n_edges,) bool, False on padding.
        graph_mask: (n_graphs,) bool, False on padding.
    """

    positions: Array
    species: Array
    cell: Array
    senders: Array
    receivers: Array
    shifts: Array
    node_graph: Array
    node_mask: Array
    edge_mask: Array
    graph_mask: Array

    @property
    def n_nodes(self) -> int:
        """Number of nodes, padding included."""
        return self.positions.shape[0]

    @property
    def n_edges(self) -> int:
        """Number of edges, padding included."""
        return self.senders.shape[0]

    @property
    def n_graphs(self) -> int:
        """Number of structures, padding included."""
        return self.cell.shape[0]


def edge_vectors(graph: Graph) -> jax.Array:
    """Vectors from senders to receivers, Å, (n_edges, 3); differentiable in positions and cell.

    Padding edges get a constant vector of length ``PADDING_EDGE_LENGTH``, so that no derivative
    of a norm is ever taken at zero.
    """
    positions, cell = jnp.asarray(graph.positions), jnp.asarray(graph.cell)
    edge_cell = cell[jnp.asarray(graph.node_graph)[graph.senders]]
    shifts = jnp.asarray(graph.shifts).astype(cell.dtype)
    # GPUs multiply float32 with ten bits by default, which moves periodic images by 0.01 Å.
    offsets = jnp.einsum("ei,eij->ej", shifts, edge_cell, precision="highest")
    vectors = positions[graph.receivers] - positions[graph.senders] + offsets
    padding = jnp.array([PADDING_EDGE_LENGTH, 0.0, 0.0], vectors.dtype)
    return jnp.where(jnp.asarray(graph.edge_mask)[:, None], vectors, padding)


def sum_per_graph(values: jax.Array, graph: Graph) -> jax.Array:
    """Sum node values (n_nodes, ...) over the real nodes of each structure: (n_graphs, ...)."""
    mask = jnp.asarray(graph.node_mask).reshape((-1,) + (1,) * (values.ndim - 1))
    return jax.ops.segment_sum(
        jnp.where(mask, values, 0), graph.node_graph, num_segments=graph.n_graphs
    )


def pad_graphs(graphs: list[Graph], n_nodes: int, n_edges: int, n_graphs: int) -> Graph:
    """Join unpadded NumPy graphs into one padded graph of the given capacities.

    Args:
        graphs: graphs without padding, with NumPy arrays of one dtype.
        n_nodes: nodes to pad to; must exceed the sum of all nodes by at least 1.
        n_edges: edges to pad to; at least the sum of all edges.
        n_graphs: structures to pad to; must exceed ``len(graphs)`` by at least 1 unless the
            padding nodes may be booked on the last, masked-out structure.

    Returns:
        The padded graph (NumPy arrays); padding nodes belong to the last structure.

    Raises:
        ValueError: if a capacity is too small (the caller has to size or to split its batch).
    """
    sizes = np.array([g.n_nodes for g in graphs], dtype=np.int64)
    used_nodes, used_edges = int(sizes.sum()), sum(g.n_edges for g in graphs)
    used_graphs = sum(g.n_graphs for g in graphs)
    if used_nodes >= n_nodes or used_edges > n_edges or used_graphs >= n_graphs:
        raise ValueError(
            f"{used_nodes} nodes, {used_edges} edges and {used_graphs} structures do not fit into "
            f"{n_nodes} nodes, {n_edges} edges and {n_graphs} structures (one node and one "
            "structure are kept for padding)"
        )
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    graph_offsets = np.concatenate([[0], np.cumsum([g.n_graphs for g in graphs])])

    def joined(name: str, capacity: int, fill: float, add: np.ndarray | None = None) -> np.ndarray:
        parts = [np.asarray(getattr(g, name)) for g in graphs]
        if add is not None:
            parts = [p + a for p, a in zip(parts, add, strict=False)]
        out = np.full((capacity, *parts[0].shape[1:]), fill, dtype=getattr(graphs[0], name).dtype)
        stacked = np.concatenate(parts)
        out[: len(stacked)] = stacked
        return out

    return Graph(
        positions=joined("positions", n_nodes, 0.0),
        species=joined("species", n_nodes, 0),
        cell=joined("cell", n_graphs, 0.0),
        senders=joined("senders", n_edges, n_nodes - 1, offsets),
        receivers=joined("receivers", n_edges, n_nodes - 1, offsets),
        shifts=joined("shifts", n_edges, 0),
        node_graph=joined("node_graph", n_nodes, n_graphs - 1, graph_offsets),
        node_mask=joined("node_mask", n_nodes, False),
        edge_mask=joined("edge_mask", n_edges, False),
        graph_mask=joined("graph_mask", n_graphs, False),
    )
