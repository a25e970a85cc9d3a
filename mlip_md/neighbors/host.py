"""Exact neighbor lists on the host, from vesin's cell list."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import vesin
from numpy.typing import ArrayLike, NDArray

from mlip_md.errors import CapacityError, StructureError
from mlip_md.memory import total_memory
from mlip_md.neighbors.geometry import (
    Bool,
    Float64,
    check_cell,
    check_cutoff,
    check_positions,
    close_gaps,
    open_directions,
    plane_spacings,
    wrap,
)

MAX_EDGES = 2**31 - 1
"""Edges are counted and indexed in int32 on the device."""
BYTES_PER_EDGE = 60
"""Memory of a list on the host while it is sorted."""

MAX_IMAGES = 2e7
"""Periodic images of atoms that are tried as neighbors of one."""
MAX_BINS = 50_000
"""Bins of vesin's grid. From 100,000 on it divides by zero where the grid is thin."""

SMALL = 128
"""Atoms up to which all pairs of an open structure are tried, which takes less than a grid."""
_TRIED = 100_000  # pairs at a time; more would not stay in the processor's cache

_searches = threading.local()
_KEPT_UP_TO = 50_000  # atoms; some 200 MB
_SERIAL_BELOW = 5000  # atoms; threads that wait for each other cost more than they save


class HostEdges(NamedTuple):
    """Edges sorted by receiver: senders, receivers (n_edges,), shifts (n_edges, 3), lengths Å."""

    senders: NDArray[np.int32]
    receivers: NDArray[np.int32]
    shifts: NDArray[np.int32]
    lengths: Float64


def neighbor_list(
    positions: ArrayLike, cell: ArrayLike | None, pbc: ArrayLike, cutoff: float
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """All pairs of atoms closer than the cutoff, images of an atom itself included.

    ASE's convention: ``D = positions[j] - positions[i] + S @ cell`` for every pair, each pair in
    both directions. Any cell will do: triclinic, left-handed, smaller than the cutoff; vectors of
    open axes are never used and may be zero; atoms may be anywhere.

    Args:
        positions: (n, 3) Å.
        cell: (3, 3) Å, rows are lattice vectors, or None.
        pbc: one bool, or three.
        cutoff: Å; pairs at the cutoff itself are not listed.

    Returns:
        ``i`` and ``j`` (n_edges,) int32 and ``S`` (n_edges, 3) int32, sorted by ``j``: with
        senders i and receivers j they are a ``Graph``'s edges as they stand.

    Raises:
        StructureError: if positions, cell, pbc or cutoff are unusable.
        CapacityError: if the cell holds so many atoms that the list would not fit.
    """
    checked = check_positions(positions)
    checked_cell, periodic = check_cell(cell, pbc)
    wrapped, offsets = wrap(checked, checked_cell, periodic)
    edges = host_edges(wrapped, checked_cell, periodic, check_cutoff(cutoff))
    shifts = edges.shifts
    if offsets.any():
        check_offsets(offsets)
        shifts = (shifts + offsets[edges.senders] - offsets[edges.receivers]).astype(np.int32)
    return edges.senders, edges.receivers, shifts


def host_edges(
    positions: Float64, cell: Float64, pbc: Bool, cutoff: float, *, closed: bool = False
) -> HostEdges:
    """The same list, with lengths, for input that has been checked and wrapped.

    Args:
        positions: (n, 3) Å.
        cell: (3, 3) Å.
        pbc: (3,).
        cutoff: Å.
        closed: whether gaps in open directions have been closed before.

    Returns:
        Edges sorted by receiver, both directions of every pair.

    Raises:
        CapacityError: if the list would not fit.
    """
    if not closed:
        positions = close_gaps(positions, cell, pbc, 2.0 * cutoff)
    if not pbc.any() and 0 < len(positions) <= SMALL and _fits_grid(positions[None], cutoff):
        return next(_try_pairs(positions[None], cutoff))
    reach = _reach(positions, cell, pbc, cutoff)
    check_density(positions, cell, pbc, reach)
    # It never reads the vectors of open axes. What it returns lies in the search's own memory.
    search = _search(len(positions), reach)
    pairs, shifts, lengths = search.compute(positions, cell, pbc, "PSd", copy=False)
    if reach > cutoff:
        near = lengths < cutoff
        pairs, shifts, lengths = pairs[near], shifts[near], lengths[near]
    # A full list holds the reverse of every pair, so reading pairs backwards gives the same list.
    receivers = pairs[:, 0].astype(np.uint16 if len(positions) <= 2**16 else np.int32)
    order = np.argsort(receivers, kind="stable")  # a radix sort for 16 bits
    ordered = np.take(shifts, order, axis=0)
    return HostEdges(
        pairs[:, 1].astype(np.int32)[order],
        receivers[order].astype(np.int32),
        np.negative(ordered, out=ordered),
        lengths[order],
    )


def edges_of_many(positions: Float64, cutoff: float) -> Iterator[HostEdges]:
    """What ``host_edges`` gives for open structures of equal size, in less time.

    Args:
        positions: (k, n, 3) Å, finite, with n from 1 to ``SMALL``.
        cutoff: Å.

    Returns:
        Edges of each of the k structures, as slices of common arrays.
    """
    no_cell, open_axes = np.zeros((3, 3)), np.zeros(3, bool)
    step = max(1, _TRIED // positions.shape[1] ** 2)
    for start in range(0, len(positions), step):
        part = positions[start : start + step]
        wide = (np.diff(np.sort(part, axis=1), axis=1) > 2.0 * cutoff).any()
        if wide or not _fits_grid(part, cutoff):
            yield from (host_edges(one, no_cell, open_axes, cutoff) for one in part)
        else:
            yield from _try_pairs(part, cutoff)


def _fits_grid(positions: Float64, cutoff: float) -> bool:
    """Whether all of (k, n, 3) positions would be searched on a grid as it is meant to be."""
    bins = np.maximum(_widths(positions) / cutoff, 1.0)
    return bool((bins.prod(axis=(1, 2)) <= MAX_BINS).all())


def _widths(positions: Float64) -> Float64:
    """Widths (k, 1, 3) Å of the grids that vesin lays over (k, n, 3) positions."""
    return np.maximum(1.01 * np.ptp(positions, axis=1, keepdims=True), 1.0)


def _try_pairs(positions: Float64, cutoff: float) -> Iterator[HostEdges]:
    """Edges of k open structures (k, n, 3) from all pairs, in the order in which a grid has them.

    vesin goes through bins of at least the cutoff, x before y before z, and through the atoms of a
    bin in their order. Sums of messages, and with them runs that are continued, depend on it.
    """
    widths = _widths(positions)
    bins = np.maximum(np.floor(widths / cutoff), 1.0)
    place = np.floor((positions - positions.min(axis=1, keepdims=True)) / widths * bins)
    place = (place[..., 0] * bins[..., 1] + place[..., 1]) * bins[..., 2] + place[..., 2]
    order = np.argsort(place.astype(np.uint16), axis=1, kind="stable")
    others = np.take_along_axis(positions, order[..., None], axis=1)
    squares = np.zeros((*order.shape, order.shape[1]))
    for axis in range(3):
        gaps = others[:, None, :, axis] - positions[:, :, None, axis]
        squares += np.multiply(gaps, gaps, out=gaps)
    near = squares < cutoff * cutoff
    here, atoms = np.arange(len(order))[:, None], np.arange(order.shape[1], dtype=np.int32)
    near[here, order, atoms] = False  # itself
    senders = np.broadcast_to(order.astype(np.int32)[:, None], near.shape)[near]
    degrees = np.count_nonzero(near, axis=2)
    receivers = np.repeat(np.tile(atoms, len(order)), degrees.ravel())
    lengths, shifts = np.sqrt(squares[near]), np.zeros((len(senders), 3), np.int32)
    ends = np.cumsum(degrees.sum(axis=1)).tolist()
    for start, end in zip([0, *ends], ends, strict=False):
        part = slice(start, end)
        yield HostEdges(senders[part], receivers[part], shifts[part], lengths[part])


def _search(n_atoms: int, cutoff: float) -> vesin.NeighborList:
    """A search of vesin's: the thread's own, whose memory is at hand, if it is not large.

    Its results are overwritten by the next search, so that threads cannot share one.
    """
    key = cutoff, n_threads = cutoff, 1 if n_atoms < _SERIAL_BELOW else 0
    keep = n_atoms <= _KEPT_UP_TO
    if keep and getattr(_searches, "key", None) == key:
        return _searches.search
    search = vesin.NeighborList(cutoff=cutoff, full_list=True, n_threads=n_threads)
    if keep:
        _searches.key, _searches.search = key, search
    return search


def _reach(positions: Float64, cell: Float64, pbc: Bool, cutoff: float) -> float:
    """Å, the smallest cutoff from the given one on whose grid of bins vesin can work with."""
    if len(positions) == 0:
        return cutoff
    heights = np.empty(3)
    heights[pbc] = plane_spacings(cell, pbc)
    heights[~pbc] = 0.0
    if not pbc.all():
        heights[~pbc] = np.ptp(positions @ open_directions(cell, pbc).T, axis=0)
    reach = cutoff
    while np.prod(np.maximum(heights / reach, 1.0)) > MAX_BINS:
        reach *= 1.25
    if reach > cutoff and np.prod(2.0 * reach / heights[pbc] + 1.0) > 1000.0:
        raise CapacityError(
            f"{len(positions)} atoms are spread over {np.round(heights, 1).tolist()} Å; no grid of "
            f"{MAX_BINS} bins covers that within the cutoff of {cutoff} Å. Is the cell in Å?"
        )
    return reach


def check_offsets(offsets: NDArray[np.int64]) -> None:
    """Refuse atoms so many cells away that int32 could not count the shifts.

    Args:
        offsets: (n, 3) whole cells, at least one row.

    Raises:
        StructureError: on whole cells of 2³⁰ or more.
    """
    most = int(np.abs(offsets).max())
    if most >= 2**30:
        raise StructureError(
            f"an atom is {most:.1e} cells away from the origin; shifts are counted up to 2³⁰. Wrap "
            "the atoms into the cell first, and check that the cell is in Å"
        )


def check_density(positions: Float64, cell: Float64, pbc: Bool, cutoff: float) -> None:
    """Refuse structures so dense (wrong units, mostly) that a list would exhaust the memory.

    Args:
        positions: (n, 3) Å, wrapped.
        cell: (3, 3) Å, checked.
        pbc: (3,).
        cutoff: Å.

    Raises:
        CapacityError: if there are more pairs than can be handled.
    """
    n_atoms = len(positions)
    spacings = plane_spacings(cell, pbc)
    images = float(np.prod(2.0 * cutoff / spacings + 1.0))
    most = min(MAX_EDGES, total_memory() // BYTES_PER_EDGE)
    if images * n_atoms > MAX_IMAGES:
        raise CapacityError(
            f"{n_atoms} atoms with lattice planes {np.round(spacings, 6).tolist()} Å apart have "
            f"about {images * n_atoms:.1e} images within {cutoff:.6g} Å; at most {MAX_IMAGES:.0e} "
            "are tried. Is the cell in Å?"
        )
    if images * n_atoms**2 <= most:
        return
    # Pairs of atoms in the same cube, scaled from its volume to that of the sphere.
    edge = cutoff / math.sqrt(3.0)
    cubes = np.floor(positions / edge).astype(np.int64)
    cubes -= cubes.min(axis=0)
    _, counts = np.unique(np.ravel_multi_index(cubes.T, cubes.max(axis=0) + 1), return_counts=True)
    in_cubes = float(np.sum(counts * (counts - 1.0))) + n_atoms
    pairs = in_cubes * 4.0 / 3.0 * math.pi * 3.0**1.5 * np.prod(np.maximum(edge / spacings, 1.0))
    if pairs > most:
        raise CapacityError(
            f"{n_atoms} atoms have about {pairs:.1e} pairs within {cutoff} Å; at most {most:.1e} "
            "can be handled here. Are positions and cell in Å?"
        )
