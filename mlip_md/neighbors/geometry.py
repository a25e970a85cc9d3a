"""Checking, wrapping and measuring periodic structures on the host, in float64."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlip_md.errors import StructureError

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]

MIN_VOLUME_RATIO = 1e-7
"""Periodic vectors whose volume is below this part of their lengths' product span no lattice."""
MAX_COORDINATE = 1e12
"""Å; beyond it float64 resolves less than a thousandth of a bond."""

MAX_SKIN = 10.0
"""Å that a list may reach beyond the cutoff; longer ones only cost time."""

_ANY_PBC = np.zeros(3, bool), np.ones(3, bool)


def check_cutoff(cutoff: float) -> float:
    """A cutoff (Å) that is finite and positive.

    Raises:
        StructureError: if it is not.
    """
    if not (math.isfinite(cutoff) and cutoff > 0):
        raise StructureError(f"the cutoff is {cutoff} Å; it must be a positive number")
    return float(cutoff)


def check_positions(positions: ArrayLike) -> Float64:
    """Positions as (n, 3) float64.

    Args:
        positions: (n, 3) Å, or nothing at all for no atoms.

    Returns:
        The same in Å, not copied if it need not be.

    Raises:
        StructureError: on another shape, or naming the atoms whose positions are not finite.
    """
    array = np.asarray(positions, dtype=np.float64)
    if array.size == 0:
        array = array.reshape(0, 3)
    if array.ndim != 2 or array.shape[1] != 3:
        raise StructureError(f"positions have the shape {array.shape}; they must be (n_atoms, 3)")
    if not np.isfinite(array).all():
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        raise StructureError(
            f"positions of {len(bad)} of {len(array)} atoms are not finite, first atom {bad[0]} at "
            f"{array[bad[0]].tolist()}; an earlier step blew up or the file is damaged"
        )
    if array.size and np.abs(array).max() > MAX_COORDINATE:
        far = int(np.argmax(np.abs(array).max(axis=1)))
        raise StructureError(
            f"atom {far} is at {array[far].tolist()} Å, where float64 no longer resolves "
            "distances; an earlier step blew up, or the positions are not in Å"
        )
    return array


def check_cell(cell: ArrayLike | None, pbc: ArrayLike) -> tuple[Float64, Bool]:
    """A cell (3, 3) in Å and its periodicity (3,).

    Args:
        cell: (3, 3) rows are lattice vectors, or None for no cell; vectors of open axes may be
            anything, zero included.
        pbc: one bool, or three.

    Returns:
        The cell as float64 (zeros for None) and pbc as an array.

    Raises:
        StructureError: on other shapes, on NaN, and if the periodic vectors span no volume.
    """
    if isinstance(pbc, (bool, np.bool_)):
        periodic = _ANY_PBC[bool(pbc)]
    else:
        periodic = np.asarray(pbc)
        if periodic.shape != (3,):
            raise StructureError(f"pbc is {pbc!r}; it must be one bool or three")
        periodic = periodic.astype(bool)
    array = np.zeros((3, 3)) if cell is None else np.asarray(cell, dtype=np.float64)
    if array.shape != (3, 3):
        raise StructureError(f"the cell has the shape {array.shape}; it must be (3, 3), rows in Å")
    if not np.isfinite(array).all():
        raise StructureError(f"the cell {array.tolist()} is not finite")
    if np.abs(array).max() > MAX_COORDINATE:
        raise StructureError(f"the cell {array.tolist()} is too large; is it in Å?")
    if periodic.any():
        _check_span(array, periodic)
    return array, periodic


def _check_span(cell: Float64, pbc: Bool) -> None:
    vectors = cell[pbc]
    lengths = np.linalg.norm(vectors, axis=1)
    if not lengths.all() or _volume(vectors / lengths[:, None]) <= MIN_VOLUME_RATIO:
        axes = ", ".join("abc"[axis] for axis in np.flatnonzero(pbc))
        raise StructureError(
            f"the structure is periodic along {axes} but these cell vectors are zero or linearly "
            f"dependent: {vectors.tolist()}; give a cell, or set pbc to False there"
        )


def _volume(vectors: Float64) -> float:
    """Volume, area or length that one to three vectors span.

    Not from the determinant of their products, whose rounding would pass for a volume of 1e-8.
    """
    if len(vectors) == 3:
        return abs(float(np.linalg.det(vectors)))
    return float(np.linalg.norm(np.cross(*vectors) if len(vectors) == 2 else vectors))


def has_volume(cell: Float64) -> bool:
    """Whether three vectors (3, 3) in Å span a volume, so that a stress is defined."""
    lengths = math.sqrt(float(np.prod(np.einsum("ij,ij->i", cell, cell))))
    return abs(float(np.linalg.det(cell))) > MIN_VOLUME_RATIO * lengths > 0.0


def dual_vectors(vectors: Float64) -> Float64:
    """Dual basis (p, 3) in 1/Å of p lattice vectors (p, 3) in Å.

    Fractions are ``positions @ dual.T``.
    """
    if len(vectors) == 0:
        return vectors
    inverse = np.linalg.inv(vectors) if len(vectors) == 3 else np.linalg.pinv(vectors)
    return np.asarray(inverse.T, np.float64)


def plane_spacings(cell: Float64, pbc: Bool) -> Float64:
    """Distances (p,) in Å between lattice planes along the p periodic axes.

    Args:
        cell: (3, 3) Å, checked.
        pbc: (3,), of which p are true.
    """
    dual = dual_vectors(cell[pbc])
    return 1.0 / np.sqrt(np.einsum("ij,ij->i", dual, dual))


def open_directions(cell: Float64, pbc: Bool) -> Float64:
    """Orthonormal rows (3 - p, 3), without unit, perpendicular to the p periodic vectors.

    Args:
        cell: (3, 3) Å, checked.
        pbc: (3,), of which p are true.
    """
    if not pbc.any():
        return np.eye(3)
    return np.asarray(np.linalg.svd(np.vstack([cell[pbc], np.zeros((1, 3))]))[2][pbc.sum() :])


def close_gaps(positions: Float64, cell: Float64, pbc: Bool, widest: float) -> Float64:
    """Bring groups of atoms together that are more than ``widest`` (Å) apart in an open direction.

    Each group is moved as a whole and stays ``widest`` away from the others, so that whoever looks
    no further sees no change; but coordinates stay as small as they can be, however far a fragment
    has flown: float32 keeps its digits, and a grid of bins its size.

    Args:
        positions: (n, 3) Å.
        cell: (3, 3) Å, checked.
        pbc: (3,).
        widest: Å, beyond all distances that matter.

    Returns:
        Positions (n, 3) Å; the same array if nothing was to be moved.
    """
    if pbc.all() or len(positions) < 2:
        return positions
    for direction in open_directions(cell, pbc):
        places = positions @ direction
        if np.ptp(places) <= widest:
            continue
        order = np.argsort(places)
        excess = np.maximum(np.diff(places[order]) - widest, 0.0)
        if excess.any():
            moves = np.empty_like(places)
            moves[order] = np.concatenate([[0.0], np.cumsum(excess)])
            positions = positions - moves[:, None] * direction
    return positions


def wrap(positions: Float64, cell: Float64, pbc: Bool) -> tuple[Float64, NDArray[np.int64]]:
    """Move atoms into the cell along its periodic axes; open axes are left alone.

    Args:
        positions: (n, 3) Å.
        cell: (3, 3) Å, checked.
        pbc: (3,).

    Returns:
        Wrapped positions (n, 3) and offsets (n, 3), whole numbers, zero along open axes, such that
        ``positions = wrapped + offsets @ cell``.
    """
    offsets = np.zeros(positions.shape, np.int64)
    if not pbc.any():
        return positions, offsets
    vectors = cell[pbc]
    counts = np.floor(positions @ dual_vectors(vectors).T)
    offsets[:, pbc] = counts
    return positions - counts @ vectors, offsets


def place(positions: Float64, cell: Float64, pbc: Bool, cutoff: float) -> Float64:
    """Wrap a structure into its cell, close its gaps and center it.

    Coordinates are then as small as they can be and lose least when cast to float32; where
    the structure lies in space cannot matter. The center is that of the cell along periodic
    axes, and of the atoms along open ones: neither jumps when an atom is wrapped.

    Args:
        positions: (n, 3) Å, at least one.
        cell: (3, 3) Å, checked.
        pbc: (3,).
        cutoff: Å; nobody looks farther than that and the largest skin.

    Returns:
        Positions (n, 3) Å.
    """
    wrapped, _ = wrap(positions, cell, pbc)
    closed = close_gaps(wrapped, cell, pbc, 2.0 * (cutoff + MAX_SKIN))
    middle, vectors = closed.mean(axis=0), cell[pbc]
    return np.asarray(closed - (middle + (0.5 - dual_vectors(vectors) @ middle) @ vectors))


def morton_order(positions: Float64, width: float) -> NDArray[np.int64]:
    """An order in which atoms that are close in space are close in memory.

    Bins of space in the order of their interleaved binary digits (Morton, IBM 1966).

    Args:
        positions: (n, 3) Å, n at least 1.
        width: of a bin, Å.

    Returns:
        (n,) indices of the atoms.
    """
    low, extent = positions.min(axis=0), float(np.ptp(positions, axis=0).max())
    bins = ((positions - low) / max(width, extent / 2.0**20)).astype(np.int64)
    code = np.zeros(len(bins), np.int64)
    for digit in range(int(bins.max()).bit_length()):
        for axis in range(3):
            code |= (bins[:, axis] >> digit & 1) << (3 * digit + axis)
    return np.argsort(code, kind="stable")
