"""Exact neighbour lists on the host, from vesin's cell list."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

import numpy as np
import vesin
from numpy.typing import ArrayLike, NDArray

from mlip_md.errors import CapacityError
from mlip_md.neighbors.geometry import (
    Bool,
    Float64,
    check_cell,
    check_cutoff,
    check_positions,
    plane_spacings,
)

MOST_EDGES = 2**31 - 1
"""Edges are counted and indexed in int32 on the device."""
BYTES_PER_EDGE = 60
"""Memory of a list on the host while it is sorted."""

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
    edges = host_edges(checked, checked_cell, periodic, check_cutoff(cutoff))
    return edges.senders, edges.receivers, edges.shifts


def host_edges(positions: Float64, cell: Float64, pbc: Bool, cutoff: float) -> HostEdges:
    """The same list, with lengths, for input that has been checked."""
    _check_density(len(positions), cell, pbc, cutoff)
    # A list object of its own in every call: vesin's keep their results and are not thread-safe.
    search = vesin.NeighborList(
        cutoff=cutoff, full_list=True, n_threads=1 if len(positions) < _SERIAL_BELOW else 0
    )
    # It never reads the vectors of open axes.
    pairs, shifts, lengths = search.compute(positions, cell, pbc, "PSd", copy=False)
    # A full list holds the reverse of every pair, so reading pairs backwards gives the same list.
    receivers = pairs[:, 0].astype(np.uint16 if len(positions) <= 2**16 else np.int32)
    order = np.argsort(receivers, kind="stable")  # a radix sort for 16 bits
    return HostEdges(
        pairs[:, 1].astype(np.int32)[order],
        receivers[order].astype(np.int32),
        -shifts[order],
        lengths[order],
    )


def _memory() -> int:
    """Bytes of memory that this machine has, or more where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return 2**62


def _check_density(n_atoms: int, cell: Float64, pbc: Bool, cutoff: float) -> None:
    """Refuse cells so dense (wrong units, mostly) that a list would exhaust the memory."""
    if not pbc.any() or n_atoms == 0:
        return
    spacings = plane_spacings(cell, pbc)
    images = float(np.prod(np.maximum(1.0, 2.0 * cutoff / spacings)))
    if images * n_atoms > MOST_EDGES:
        raise CapacityError(
            f"{n_atoms} atoms with lattice planes {np.round(spacings, 6).tolist()} Å apart have "
            f"about {images * n_atoms:.1e} images within the cutoff of {cutoff} Å of each; is the "
            "cell in Å?"
        )
    if pbc.all():
        volume = abs(float(np.linalg.det(cell)))
        expected = n_atoms * n_atoms * (4.0 / 3.0 * math.pi * cutoff**3) / volume
        most = min(MOST_EDGES, _memory() // BYTES_PER_EDGE)
        if expected > most:
            raise CapacityError(
                f"{n_atoms} atoms in {volume:.6g} Å³ have about {expected:.1e} pairs within "
                f"{cutoff} Å; at most {most:.1e} can be handled here. Is the cell in Å?"
            )
