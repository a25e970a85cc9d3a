"""Edges of the moment on the device, from a longer list that is kept while it is safe to.

With a skin, all pairs within cutoff + skin are kept and every call prunes them to the cutoff, so
that a network never sees an edge of the skin. Between two calls everything may have moved: atoms,
the cell, atoms and cell together, and atoms may have been put back into the cell.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlip_md.neighbors.cells import cell_pairs
from mlip_md.neighbors.dense import dense_pairs
from mlip_md.neighbors.nvalchemi import nvalchemi_pairs
from mlip_md.neighbors.search import (
    Builder,
    Pairs,
    Search,
    combine,
    dual,
    padded_pairs,
    project,
    true_entries,
)

BUILDERS: Mapping[str, Builder] = {
    "dense": dense_pairs,
    "cells": cell_pairs,
    "nvalchemi": nvalchemi_pairs,
}

SKIN_SLACK = 1e-3
"""Å of the skin that are left to rounding in float32."""


class Kept(NamedTuple):
    """Pairs within cutoff + skin, and the positions (n_nodes, 3) and cell (3, 3) they are of."""

    positions: jax.Array
    cell: jax.Array
    pairs: Pairs


class Needs(NamedTuple):
    """What a list needs of all fixed capacities, whether it got that or not.

    Attributes:
        edges: () int32, edges that exist.
        candidates: () int32, pairs within cutoff + skin; 0 without skin.
        reach: (3,) int32, reach that the search needs.
        slots: () int32, slots that it needs.
        shortest: () Å, length of the shortest edge; infinite without edges.
        finite: () bool, whether positions and cell are finite and span a lattice.
    """

    edges: jax.Array
    candidates: jax.Array
    reach: jax.Array
    slots: jax.Array
    shortest: jax.Array
    finite: jax.Array

    def fit(self, search: Search, capacity: int) -> jax.Array:
        """Whether nothing is missing from a list of that search and capacity in edges, () bool."""
        return (
            (self.edges <= capacity)
            & (self.candidates <= search.candidates)
            & (self.reach <= np.array(search.reach)).all()
            & (self.slots <= search.slots)
            & self.finite
        )


def nothing_kept(
    n_nodes: int, search: Search, dtype: np.dtype[Any], device: jax.Device
) -> Kept | None:
    """What a search with a skin starts from: a list of positions that are no numbers, never safe.

    Args:
        n_nodes: nodes, padding included.
        search: of which ``skin`` and ``candidates`` are used.
        dtype: of the positions.
        device: where the list is kept.

    Returns:
        The list, whose positions are NaN; None for a search without skin.
    """
    if not search.skin:
        return None
    room = search.candidates
    with jax.default_device(device):
        # An array for each field: a call takes them over for its results, and none twice.
        senders, receivers, shifts, count, reach, slots = (
            jnp.zeros(shape, jnp.int32) for shape in (room, room, (room, 3), (), 3, ())
        )
        pairs = Pairs(senders, receivers, shifts, jnp.zeros(room, bool), count, reach, slots)
        kept = Kept(jnp.full((n_nodes, 3), jnp.nan, dtype), jnp.zeros((3, 3), dtype), pairs)
    return jax.device_put(kept, device)


def find_edges(
    positions: jax.Array,
    cell: jax.Array,
    n_atoms: jax.Array | int,
    kept: Kept | None,
    search: Search,
    capacity: int,
) -> tuple[Pairs, Needs, Kept | None]:
    """Find all edges; pure, for use under ``jit`` with static ``search`` and ``capacity``.

    Args:
        positions: (n_nodes, 3) Å, rows from ``n_atoms`` on are padding and get no edge.
        cell: (3, 3) Å, rows are lattice vectors; those of open axes are not read.
        n_atoms: number of atoms.
        kept: of the call before, of the same atoms, or from ``nothing_kept``.
        search: what to find.
        capacity: edges to make room for.

    Returns:
        The edges within the cutoff, what they need (they are complete only if that does ``fit``),
        and what to keep for the next call.
    """

    def build(cutoff: float, room: int) -> Pairs:
        return BUILDERS[search.backend](positions, cell, n_atoms, search, cutoff, room)

    if kept is None:
        pairs = build(search.cutoff, capacity)
        candidates = jnp.zeros((), jnp.int32)
    else:
        homes, moved = movement(positions, cell, kept, search)
        stale = ~(moved < search.skin - SKIN_SLACK)  # also if it is not a number
        kept = jax.lax.cond(
            stale,
            lambda: Kept(positions, cell, build(search.cutoff + search.skin, search.candidates)),
            lambda: kept,
        )
        homes = jnp.where(stale, 0, homes)
        pairs = prune(positions, cell, homes, kept.pairs, search, capacity)
        candidates = kept.pairs.n_pairs
    squares = jnp.where(pairs.mask, _squares(positions, cell, pairs, search.axes), jnp.inf)
    lattice = jnp.isfinite(dual(cell[search.axes])).all()
    needs = Needs(
        edges=pairs.n_pairs,
        candidates=candidates,
        reach=pairs.reach,
        slots=pairs.slots,
        shortest=jnp.sqrt(jnp.min(squares, initial=jnp.inf)),
        finite=lattice & jnp.isfinite(positions).all(),
    )
    return pairs, needs, kept


def _squares(positions: jax.Array, cell: jax.Array, pairs: Pairs, axes: np.ndarray) -> jax.Array:
    """Squared distances (capacity,) of pairs."""
    images = combine(pairs.shifts[:, axes].astype(cell.dtype), cell[axes])
    return jnp.sum((positions[pairs.receivers] - positions[pairs.senders] + images) ** 2, axis=1)


def movement(
    positions: jax.Array, cell: jax.Array, kept: Kept, search: Search
) -> tuple[jax.Array, jax.Array]:
    """Whole cells that atoms have been moved by, and how much closer (Å) two of them may be.

    Let F map the kept cell on the present one, u be what positions moved beyond r -> r F, and n
    whole cells taken off u. A pair kept at D is now at D F + u_j - u_i, so its distance is at least
    σ|D| - |u_i| - |u_j| with σ the smallest singular value of F, no less than 1 - ‖sym(F) - 1‖.
    No pair beyond cutoff + skin can have come within the cutoff while
    (cutoff + skin) (1 - σ) + |u_i| + |u_j| < skin.

    Args:
        positions: (n_nodes, 3) Å.
        cell: (3, 3) Å.
        kept: of an earlier call with the same atoms.
        search: of which ``pbc``, ``cutoff`` and ``skin`` are read.

    Returns:
        n (n_nodes, 3) int32, zero along open axes, and the left side of that inequality, () Å; not
        a number where nothing has been kept.
    """
    axes = search.axes
    vectors, before = cell[axes], kept.cell[axes]
    # F - 1 = Σ_k dual_k ⊗ (a_k' - a_k): strains of the lattice, nothing along open directions.
    strain = jnp.sum(dual(before)[:, :, None] * (vectors - before)[:, None, :], axis=0)
    moved = positions - kept.positions - project(kept.positions, strain.T)
    homes = jnp.round(project(moved, dual(vectors)))
    distances = jnp.linalg.norm(moved - combine(homes, vectors), axis=1)
    farthest = jnp.argmax(distances)
    others = jnp.where(jnp.arange(len(distances)) == farthest, 0.0, distances)
    closer = jnp.linalg.norm(0.5 * (strain + strain.T))
    movement = distances[farthest] + jnp.max(others) + (search.cutoff + search.skin) * closer
    whole = jnp.zeros(positions.shape, jnp.int32).at[:, axes].set(homes.astype(jnp.int32))
    return whole, movement


def prune(
    positions: jax.Array,
    cell: jax.Array,
    homes: jax.Array,
    pairs: Pairs,
    search: Search,
    capacity: int,
) -> Pairs:
    """Those pairs that are within the cutoff, with shifts of the positions as given.

    Args:
        positions: (n_nodes, 3) Å.
        cell: (3, 3) Å.
        homes: (n_nodes, 3) int32, whole cells that atoms were moved by since the pairs were found.
        pairs: within cutoff + skin then, in the capacity of candidates.
        search: of which ``pbc`` and ``cutoff`` are read.
        capacity: edges to make room for.

    Returns:
        The edges; ``n_pairs`` counts all of them, ``reach`` and ``slots`` are those of the pairs.
    """
    axes = search.axes
    steady = positions - combine(homes[:, axes].astype(cell.dtype), cell[axes])
    near = pairs.mask & (_squares(steady, cell, pairs, axes) < search.cutoff**2)
    index, valid, count = true_entries(near, capacity)
    senders, receivers = pairs.senders[index], pairs.receivers[index]
    shifts = pairs.shifts[index] + homes[senders] - homes[receivers]
    return padded_pairs(
        senders, receivers, shifts, valid, count, len(positions), pairs.reach, pairs.slots
    )
