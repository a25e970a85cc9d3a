"""What labels are judged by: nearest distances, bonds, and pairs of close frames, measured."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
from ase.data import covalent_radii

from mlip_md.constants import BOHR
from mlip_md.trainer.data.structures import LabeledStructure

MAX_PAIRS, MAX_CANDIDATES, MAX_ATOMS = 2000, 500, 200_000
"""Pairs of close frames that are looked at; frames, and their atoms, to find the closest among."""
CLOSE = 0.3
"""Å, root mean square distance of atoms between close frames: about thermal motion at 300 K."""
DISTANCES = (0.7, 1.4)
"""d outside of this is no chemistry: bonds, also of metals, agree within 15 %, ionic in 25 %."""
_NOBLE = [2, 10, 18, 36, 54, 86]

LENGTHS = {"bohr": 1 / BOHR, "nm": 0.1, "pm": 100.0, "Å read as bohr": BOHR}
"""Units of positions other than Å, and the factor on d."""

Groups = Sequence[Sequence[LabeledStructure]]
"""Frames with the same list of atoms together."""


def group_by_atoms(frames: Sequence[LabeledStructure]) -> Groups:
    """Frames with the same list of atoms and, if periodic, the same cell."""
    groups: dict[bytes, list[LabeledStructure]] = {}
    for frame in frames:
        cell = b"" if frame.cell is None else np.round(frame.cell, 2).tobytes()
        groups.setdefault(frame.atomic_numbers.tobytes() + cell, []).append(frame)
    return list(groups.values())


# Distances and bonds


@dataclasses.dataclass(frozen=True)
class Bonds:
    """Nearest distances and the stiffness of bonds to hydrogen.

    Attributes:
        distance: d, the median over atoms.
        length_unit: unit of the positions that d speaks for; "Å" if it is usual, "" if none fits.
        length_factor: what positions are multiplied with to be Å.
        stiffness: k, eV/Å² with positions in Å; NaN without enough bonds.
        correlation: of force along and length of bonds, -1 for springs.
    """

    distance: float
    length_unit: str
    length_factor: float
    stiffness: float
    correlation: float


def measure_bonds(frames: Sequence[LabeledStructure], seed: int = 0) -> Bonds:
    """Measure d and k on up to 300 frames."""
    chosen = np.random.default_rng(seed).permutation(len(frames))[:300]
    near = [nearest(frames[k]) for k in chosen.tolist()]
    ratios = np.concatenate([n.ratios[n.usual] for n in near])
    distance = float(np.median(ratios)) if len(ratios) else math.nan
    unit, factor = _length_unit(distance)
    kinds: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for n in near:
        _add_bonds(kinds, n, factor)
    stretch, pull = [], []
    for values in kinds.values():
        if len(values) < 10:
            continue
        length, force = np.array(values).T
        stretch.append(length - np.median(length))
        pull.append(force - np.median(force))
    if sum(map(len, stretch)) < 30:
        return Bonds(distance, unit, factor, math.nan, math.nan)
    x, y = np.concatenate(stretch), np.concatenate(pull)
    inside = np.abs(x) < 5 * max(np.median(np.abs(x)), 1e-6)
    x, y = x[inside], y[inside]
    norm = math.sqrt(float(x @ x) * float(y @ y))
    correlation = float(x @ y) / norm if norm else math.nan
    return Bonds(distance, unit, factor, -float(x @ y) / max(float(x @ x), 1e-30), correlation)


def _length_unit(distance: float) -> tuple[str, float]:
    if not distance < DISTANCES[0] and not distance > DISTANCES[1]:
        return "Å", 1.0
    unit, factor = min(LENGTHS.items(), key=lambda item: abs(math.log(distance / item[1])))
    inside = DISTANCES[0] < distance / factor < DISTANCES[1]
    return (unit, 1 / factor) if inside else ("", 1.0 / distance)


@dataclasses.dataclass(frozen=True)
class Near:
    """The nearest neighbor of some atoms of a frame.

    Attributes:
        ratios: (k,) distance over the sum of covalent radii.
        usual: (k,) bool, atoms that should have a neighbor at about 1: no noble gases.
        numbers: (k,) atomic numbers.
        partners: (k,) atomic numbers of the neighbors.
        lengths: (k,) distance, in the unit of the positions.
        pulls: (k,) eV/Å, force away from the neighbor.
        degrees: (k,) bonds of the neighbor; 0 if not all atoms were looked at.
    """

    ratios: np.ndarray
    usual: np.ndarray
    numbers: np.ndarray
    partners: np.ndarray
    lengths: np.ndarray
    pulls: np.ndarray
    degrees: np.ndarray


_IMAGES = np.array(list(np.ndindex(3, 3, 3)), float) - 1.0


def nearest(frame: LabeledStructure, most: int = 64) -> Near:
    """Nearest neighbors of up to so many atoms, images included."""
    rows = np.arange(len(frame))[:: max(1, len(frame) // most)][:most]
    vectors = frame.positions[None] - frame.positions[rows, None]
    if frame.cell is not None:
        inverse = np.linalg.pinv(frame.cell)
        fractional = np.einsum("rni,ij->rnj", vectors, inverse)
        vectors = vectors - (np.round(fractional) * frame.pbc) @ frame.cell
        if len(frame) < 30:  # small cells: images may be nearer than other atoms
            shifts = _IMAGES[(_IMAGES * ~frame.pbc == 0).all(axis=1)] @ frame.cell
            vectors = (vectors[:, :, None] + shifts).reshape(len(rows), -1, 3)
    columns = np.repeat(np.arange(len(frame)), vectors.shape[1] // len(frame))
    lengths = np.linalg.norm(vectors, axis=-1)
    lengths[lengths < 1e-9] = np.inf
    numbers = frame.atomic_numbers
    sums = covalent_radii[numbers[rows]][:, None] + covalent_radii[numbers[columns]]
    scaled = lengths / sums
    best = scaled.argmin(axis=1)
    here = np.arange(len(rows))
    directions = vectors[here, best] / lengths[here, best][:, None]
    ratios = scaled[here, best]
    bonded = (scaled < 1.25 * np.median(ratios)).sum(axis=1)
    return Near(
        ratios=ratios,
        usual=~np.isin(numbers[rows], _NOBLE) & np.isfinite(ratios),
        numbers=numbers[rows],
        partners=numbers[columns[best]],
        lengths=lengths[here, best],
        pulls=-(frame.forces[rows] * directions).sum(axis=1),
        degrees=np.zeros(len(rows), int) if len(rows) < len(frame) else bonded[columns[best]],
    )


def _add_bonds(
    kinds: dict[tuple[int, int], list[tuple[float, float]]], near: Near, factor: float
) -> None:
    """Sort lengths (Å) and forces along bonds of hydrogen by partner and its number of bonds."""
    hydrogens = (near.numbers == 1) & np.isfinite(near.lengths)
    hydrogens &= np.isin(near.partners, (1, 5, 6, 7, 8, 14, 15, 16))
    for k in np.flatnonzero(hydrogens).tolist():
        kind = int(near.partners[k]), int(near.degrees[k])
        kinds.setdefault(kind, []).append((near.lengths[k] * factor, near.pulls[k]))


# Pairs of close frames


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Closest frames: energy differences, work of the forces, atoms, distance (Å)."""

    energies: np.ndarray
    works: np.ndarray
    atoms: np.ndarray
    distances: np.ndarray

    @functools.cached_property
    def close(self) -> Pairs:
        """Those that are close enough for their forces to speak for the way between them."""
        near = self.distances < CLOSE
        return Pairs(self.energies[near], self.works[near], self.atoms[near], self.distances[near])

    def __len__(self) -> int:
        return len(self.energies)


def measure_pairs(groups: Groups, length_factor: float = 1.0, seed: int = 0) -> Pairs:
    """For a seeded sample of frames, the closest frame of the same atoms.

    Args:
        groups: of frames with the same atoms.
        length_factor: what positions are multiplied with to be Å.
        seed: of the sample.
    """
    random = np.random.default_rng(seed)
    rows: list[tuple[float, float, int, float]] = []
    groups = [group for group in groups if len(group) > 1]
    total = sum(map(len, groups)) or 1
    for group in groups:
        most = min(MAX_CANDIDATES, max(2, MAX_ATOMS // len(group[0])))
        chosen = random.permutation(len(group))[:most]
        members = [group[k] for k in chosen.tolist()]
        share = min(len(members), math.ceil(MAX_PAIRS * len(group) / total))
        closest = _closest_periodic if members[0].cell is not None else _closest_free
        rows += closest(members, share, length_factor)
    table = np.array(rows[:MAX_PAIRS], float).reshape(-1, 4)
    return Pairs(table[:, 0], table[:, 1], table[:, 2], table[:, 3])


Row = tuple[float, float, int, float]


def _row(
    one: LabeledStructure, other: LabeledStructure, moved: np.ndarray, turned: np.ndarray
) -> Row:
    """Energy difference and work on the way ``moved`` (n, 3) Å; forces of ``one`` turned alike."""
    work = -0.5 * float(((turned + other.forces) * moved).sum())
    distance = math.sqrt(float((moved * moved).sum()) / len(one))
    return other.energy - one.energy, work, len(one), distance


def _closest_free(members: Sequence[LabeledStructure], share: int, factor: float) -> list[Row]:
    """Pairs of molecules, by their distances between atoms, then laid upon each other."""
    positions = np.array([frame.positions for frame in members]) * factor
    n = positions.shape[1]
    if n < 60:
        i, j = np.triu_indices(n, 1)
    else:
        i, j = np.random.default_rng(n).integers(n, size=(2, 1500))
    distances = np.linalg.norm(positions[:, i] - positions[:, j], axis=2)
    distances -= distances.mean(axis=0)
    squares = (distances * distances).sum(axis=1)
    rows = []
    for k in range(share):
        gap = squares + squares[k] - 2 * distances @ distances[k]
        gap[k] = np.inf
        other = int(gap.argmin())
        one, two = (positions[m] - positions[m].mean(axis=0) for m in (k, other))
        turn = _rotation(one, two)
        rows.append(_row(members[k], members[other], two - one @ turn, members[k].forces @ turn))
    return rows


def _rotation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The rotation R (3, 3) that brings ``one @ R`` closest to ``other``.

    W. Kabsch, Acta Cryst. A32, 922 (1976).
    """
    left, _, right = np.linalg.svd(one.T @ other)
    sign = np.sign(np.linalg.det(left @ right))
    return np.asarray(left @ np.diag([1.0, 1.0, sign]) @ right)


def _closest_periodic(members: Sequence[LabeledStructure], share: int, factor: float) -> list[Row]:
    """Pairs in one cell, every atom at its nearest image."""
    assert members[0].cell is not None
    cell, pbc = members[0].cell, members[0].pbc
    inverse = np.linalg.pinv(cell)
    places = np.array([frame.positions for frame in members]) @ inverse
    share = min(share, max(10, 200_000_000 // places.size))
    rows = []
    for k in range(share):
        moved = places - places[k]
        moved -= np.round(moved) * pbc
        moved = moved @ cell * factor
        moved -= moved.mean(axis=1, keepdims=True)
        gap = (moved * moved).sum(axis=(1, 2))
        gap[k] = np.inf
        other = int(gap.argmin())
        rows.append(_row(members[k], members[other], moved[other], members[k].forces))
    return rows
