"""The graph of atoms that every network reads.

Conventions, stated once for the whole project:

* Units are Å and eV. Rows of a cell are its lattice vectors.
* An edge goes from a sender to a receiver; messages flow that way and are summed at receivers.
* ``vectors = positions[receivers] - positions[senders] + shifts @ cell``. A neighbor list in
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

from mlip_md.rows import sum_rows, take_rows

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
    senders, receivers = jnp.asarray(graph.senders), jnp.asarray(graph.receivers)
    edge_cell = take_rows(cell, jnp.asarray(graph.node_graph)[senders])
    shifts = jnp.asarray(graph.shifts).astype(cell.dtype)
    # GPUs multiply float32 with ten bits by default, which moves periodic images by 0.01 Å.
    offsets = jnp.einsum("ei,eij->ej", shifts, edge_cell, precision="highest")
    vectors = take_rows(positions, receivers) - take_rows(positions, senders) + offsets
    padding = jnp.array([[PADDING_EDGE_LENGTH, 0.0, 0.0]], vectors.dtype)
    return jnp.where(jnp.asarray(graph.edge_mask)[:, None], vectors, padding)


def sum_per_graph(values: jax.Array, graph: Graph) -> jax.Array:
    """Sum node values (n_nodes, ...) over the real nodes of each structure: (n_graphs, ...)."""
    mask = jnp.asarray(graph.node_mask).reshape((-1,) + (1,) * (values.ndim - 1))
    return sum_rows(jnp.where(mask, values, 0), jnp.asarray(graph.node_graph), graph.n_graphs)
