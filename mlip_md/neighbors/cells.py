"""Neighbor lists on the device from a sorted cell list, for any number of atoms.

Atoms are sorted by bin, so that the bins of a column (along the last axis) are one run of memory
and an atom's candidates in a column are one stretch of it. A periodic column repeats without end:
place p of it is atom ``p mod m`` of its m atoms in image ``floor(p / m)``. Together with
``floor_div`` of a column's index this finds every image by itself, in cells smaller than the
cutoff as in large ones; triclinic cells, slabs and wires need no case of their own.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlip_md.compiler import jit
from mlip_md.neighbors.geometry import Bool, Float64, open_directions, plane_spacings
from mlip_md.neighbors.search import (
    ROUNDING_SLACK,
    Pairs,
    Search,
    Three,
    axes_frame,
    combine,
    padded_pairs,
    project,
    true_entries,
)

BINS_PER_CUTOFF = (1, 1, 4)
"""Columns as wide as the cutoff; thin bins along them, so that stretches have little overhang."""
MAX_BINS_PER_ATOM = 16


def plan_grid(
    cutoff: float, positions: Float64, cell: Float64, pbc: Bool, shrink: float
) -> tuple[Three, Three]:
    """Bins per axis and the reach they need, also after shrinking the cell by a factor.

    Args:
        cutoff: Å.
        positions: (n, 3) Å, placed.
        cell: (3, 3) Å, checked.
        pbc: (3,).
        shrink: factor on the spacings of lattice planes for which the reach still suffices.

    Returns:
        Bins along the three axes, and bins to either side within which the cutoff lies.
    """
    heights = np.zeros(3)
    heights[pbc] = plane_spacings(cell, pbc)
    if not pbc.all():
        normals = open_directions(cell, pbc)
        heights[~pbc] = np.ptp(positions @ normals.T, axis=0)
    grid = np.maximum(1.0, shrink * heights / cutoff * BINS_PER_CUTOFF)
    while np.prod(grid) > max(4096, MAX_BINS_PER_ATOM * len(positions)):
        grid[np.argmax(grid)] *= 0.8
    grid = np.maximum(1, grid).astype(int)
    reach = np.array(BINS_PER_CUTOFF)  # along open axes bins are made wide enough
    reach[pbc] = np.ceil(cutoff * grid[pbc] / (shrink * heights[pbc]) + ROUNDING_SLACK)
    return tuple(grid.tolist()), tuple(reach.tolist())


class _Atoms(NamedTuple):
    """Atoms in their bins.

    Attributes:
        wrapped: (n_nodes, 3) Å, inside the cell along periodic axes.
        offsets: (n_nodes, 3) int32, cells by which each was moved to get there.
        bins: (n_nodes, 3) int32.
        order: (n_nodes,) int32, atoms sorted by bin.
        starts: (n_bins + 1,) int32, first place of every bin in ``order``.
        reach: (3,) int32, bins to either side within the cutoff.
    """

    wrapped: jax.Array
    offsets: jax.Array
    bins: jax.Array
    order: jax.Array
    starts: jax.Array
    reach: jax.Array


class _Stretches(NamedTuple):
    """Candidates of each atom in each column around it, all (n_nodes, columns).

    Attributes:
        shifts: (…, 2) int32, image of the column.
        first: place in ``order`` of the column's first atom.
        size: atoms of the column.
        begin: place in the endless column at which the stretch begins.
        length: candidates in it.
    """

    shifts: jax.Array
    first: jax.Array
    size: jax.Array
    begin: jax.Array
    length: jax.Array


def cell_pairs(
    positions: jax.Array,
    cell: jax.Array,
    n_atoms: jax.Array | int,
    search: Search,
    cutoff: float,
    capacity: int,
) -> Pairs:
    """All pairs, a ``search.Builder``; reads ``pbc``, ``grid``, ``reach``, ``slots``."""
    n_nodes = positions.shape[0]
    atoms = _sort(positions, cell, n_atoms, search, cutoff)
    runs = _stretches(atoms, jnp.arange(n_nodes) < n_atoms, search)
    near = _near(atoms, runs, cell, search, cutoff)
    chosen, valid, count = true_entries(near, capacity)
    row, slot = chosen // search.slots, chosen % search.slots
    receivers = row // runs.first.shape[1]
    place, image = _place([part.reshape(-1)[row] for part in runs[1:4]], slot)
    senders = atoms.order[place]
    found = jax.lax.optimization_barrier((row, receivers, senders, image.astype(jnp.int32)))
    row, receivers, senders, image = found  # else each column of the shifts repeats all that
    # S = offset(sender) - offset(receiver) - image, for positions[r] - positions[s] + S·cell.
    columns = jnp.pad(runs.shifts, ((0, 0), (0, 0), (0, 1))) + atoms.offsets[:, None]
    along = np.array([[0, 0, 1]], np.int32)
    shifts = atoms.offsets[senders] - columns.reshape(-1, 3)[row] - image[:, None] * along
    needs = atoms.reach, jnp.max(runs.length)
    return padded_pairs(senders, receivers, shifts, valid, count, n_nodes, *needs)


def required_slots(positions: Float64, cell: Float64, search: Search, cutoff: float) -> int:
    """Slots that a structure needs on the grid of a search; compiles for its number of atoms.

    Args:
        positions: (n, 3) Å, placed.
        cell: (3, 3) Å, checked.
        search: of which ``pbc``, ``grid`` and ``reach`` are read.
        cutoff: Å.

    Returns:
        Candidates of any atom in one column of bins, at the most.
    """
    if len(positions) == 0:
        return 0
    dtype = jax.dtypes.canonicalize_dtype(np.float64)
    arrays = positions.astype(dtype), cell.astype(dtype)
    return int(_required_slots(*arrays, search=search, cutoff=cutoff))


@functools.partial(jit, static_argnames=("search", "cutoff"))
def _required_slots(
    positions: jax.Array, cell: jax.Array, search: Search, cutoff: float
) -> jax.Array:
    atoms = _sort(positions, cell, len(positions), search, cutoff)
    return jnp.max(_stretches(atoms, jnp.ones(len(positions), bool), search).length)


def _sort(
    positions: jax.Array,
    cell: jax.Array,
    n_atoms: jax.Array | int,
    search: Search,
    cutoff: float,
) -> _Atoms:
    """Wrap atoms into the cell, and sort them by bin; padding comes last, in no bin."""
    real = jnp.arange(positions.shape[0]) < n_atoms
    periodic, grid = np.array([search.pbc]), np.array([search.grid], np.int32)
    rows = axes_frame(cell, search.pbc)
    offsets = jnp.where(periodic, jnp.floor(project(positions, rows)), 0)
    wrapped = positions - combine(offsets[:, search.axes], cell[search.axes])
    places = project(wrapped, rows)
    low = jnp.min(jnp.where(real[:, None], places, jnp.inf), axis=0, keepdims=True)
    high = jnp.max(jnp.where(real[:, None], places, -jnp.inf), axis=0, keepdims=True)
    extent, reach = high - low, np.maximum([search.reach], 1)
    width = jnp.where(periodic, 1.0 / grid, jnp.maximum(extent / grid, cutoff / reach))
    low = jnp.where(periodic, 0.0, low)
    bins = jnp.clip(jnp.floor((places - low) / width).astype(jnp.int32), 0, grid - 1)
    key = (bins[:, 0] * search.grid[1] + bins[:, 1]) * search.grid[2] + bins[:, 2]
    n_bins = math.prod(search.grid)
    key = jnp.where(real, key, n_bins)
    sizes = jnp.zeros(n_bins + 1, jnp.int32).at[key + 1].add(1, mode="drop")
    spacings = 1.0 / jnp.linalg.norm(rows, axis=1)[None]
    needed = jnp.ceil(cutoff / (spacings * width) + ROUNDING_SLACK).astype(jnp.int32)
    return _Atoms(
        wrapped,
        offsets.astype(jnp.int32),
        bins,
        jnp.argsort(key).astype(jnp.int32),
        jnp.cumsum(sizes, dtype=jnp.int32),
        jnp.where(periodic, needed, 0)[0],
    )


def _stretches(atoms: _Atoms, real: jax.Array, search: Search) -> _Stretches:
    """The stretches of columns that hold each atom's candidates; none for padding."""
    n_bins, periodic = search.grid[2], search.pbc[2]
    sides = (range(-reach, reach + 1) for reach in search.reach[:2])
    around = np.array(list(itertools.product(*sides)), np.int32)
    columns = atoms.bins[:, None, :2] + around[None]
    grid = np.array([[search.grid[:2]]], np.int32)
    shifts = jnp.floor_divide(columns, grid)
    columns = columns - shifts * grid
    exists = real[:, None] & jnp.all((shifts == 0) | np.array([[search.pbc[:2]]]), axis=-1)
    start = (columns[..., 0] * search.grid[1] + columns[..., 1]) * n_bins
    first = atoms.starts[start]
    size = atoms.starts[start + n_bins] - first

    def atoms_before(z: jax.Array) -> jax.Array:
        if not periodic:
            return atoms.starts[start + jnp.clip(z, 0, n_bins)[:, None]] - first
        image = jnp.floor_divide(z, n_bins)
        inside = atoms.starts[start + (z - image * n_bins)[:, None]] - first
        return image[:, None] * size + inside

    begin = atoms_before(atoms.bins[:, 2] - search.reach[2])
    end = atoms_before(atoms.bins[:, 2] + search.reach[2] + 1)
    return _Stretches(shifts, first, size, begin, jnp.where(exists, end - begin, 0))


def _place(stretch: list[jax.Array], slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Place in the sorted atoms of a slot of a stretch, and its image along the column (a float).

    Dividing in float32 is exact enough: (p + 1/2) / m is 1/(2m) or more from a whole number, far
    above its rounding for columns of less than a million atoms; dividing integers is slow.
    """
    first, size, begin = stretch
    place = begin + slot
    image = jnp.floor((place.astype(jnp.float32) + 0.5) / jnp.maximum(size, 1))
    return first + place - image.astype(jnp.int32) * size, image


def _near(
    atoms: _Atoms, runs: _Stretches, cell: jax.Array, search: Search, cutoff: float
) -> jax.Array:
    """Which candidates are within the cutoff: (n_nodes, columns, slots)."""
    n_nodes = atoms.order.shape[0]
    slot = jnp.arange(search.slots, dtype=jnp.int32)[None, None]
    place, image = _place([part[..., None] for part in runs[1:4]], slot)
    used = slot < runs.length[..., None]
    place = jnp.where(used, place, 0)
    periodic = np.array(search.pbc)
    vectors = jnp.where(periodic[:, None], cell, 0)
    nearby = combine(runs.shifts.astype(cell.dtype), vectors[:2]) - atoms.wrapped[:, None]
    by_place = atoms.wrapped[atoms.order].T
    squares = sum(
        (by_place[k][place] + image.astype(cell.dtype) * vectors[2, k] + nearby[..., k, None]) ** 2
        for k in range(3)
    )
    rank = jnp.zeros_like(atoms.order).at[atoms.order].set(jnp.arange(n_nodes, dtype=jnp.int32))
    home = jnp.all(runs.shifts == 0, axis=-1)[..., None] & (image == 0)
    itself = home & (place == rank[:, None, None])
    return jnp.asarray(used & (squares < cutoff**2) & ~itself)
