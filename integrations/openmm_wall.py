"""Repulsion of atoms that overlap, for OpenMM, whose minimizers try such geometries.

A potential has no number for atoms closer than 0.05 Å, and a force that OpenMM calls cannot know
whether a simulation has failed or a minimizer looks where it will not go. So there is a number: the
potential's for the atoms drawn apart to that distance, plus a steep linear wall.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlip_md.engine import Result
from mlip_md.errors import CoincidenceError

STEEPNESS = 1000.0
"""eV/Å of the wall; steeper than potentials are where they were trained, and 50 eV high."""
_ROOM = 1.001
"""Atoms are drawn apart to this times the limit, so that rounding does not bring them below."""
_DEFAULT_DIRECTION = np.array([0.36, 0.48, 0.8])
"""From the first to the second atom where they are at one point; any direction would do."""

Float64 = NDArray[np.float64]
Vectors = dict[tuple[int, int], Float64]


class Walled(NamedTuple):
    """The wall's energy (eV), and the forces (n, 3) eV/Å of potential and wall together."""

    energy: float
    forces: Float64


def evaluate_walled(
    evaluate: Callable[..., Result],
    positions: Float64,
    numbers: NDArray[np.int32],
    cell: Float64 | None,
) -> tuple[Result, Walled]:
    """Evaluate a structure in which atoms may overlap.

    As two atoms come closer the energy rises by the wall alone; it depends on their centre as the
    potential does. The groups of three and more keep no shape, but the same wall.

    Args:
        evaluate: ``Engine.evaluate``.
        positions: (n, 3) Å.
        numbers: (n,) atomic numbers.
        cell: (3, 3) Å, or None.

    Returns:
        The potential's result, with overlapping atoms drawn apart, and the wall.

    Raises:
        The errors of ``Engine.evaluate``; CoincidenceError only for images of atoms that cannot
        be drawn apart.
    """
    overlaps: CoincidenceError | None = None
    links: Vectors = {}
    moves = np.zeros_like(positions)
    while True:
        try:
            result = evaluate(positions + moves, numbers, cell, cell is not None)
            break
        except CoincidenceError as error:
            found = {
                (i, j): np.array(vector) - moves[j] + moves[i]
                for (i, j), vector in zip(error.pairs, error.vectors, strict=True)
                if (i, j) not in links
            }
            if not found:
                raise
            overlaps = overlaps or error
            links |= found
            moves = _draw_apart(len(positions), links, overlaps.limit * _ROOM)
    if overlaps is None:
        return result, Walled(0.0, result.forces)
    walls = dict(zip(overlaps.pairs, map(np.array, overlaps.vectors), strict=True))
    return result, _wall(result.forces, links, walls, overlaps.limit)


def _wall(forces: Float64, links: Vectors, walls: Vectors, limit: float) -> Walled:
    """Let overlapping atoms share the potential's forces, and push them apart."""
    forces = forces.copy()
    for members in _groups(links):
        atoms = list(members)
        forces[atoms] = forces[atoms].mean(axis=0)
    energy = 0.0
    for (i, j), vector in walls.items():
        push = STEEPNESS * _direction(vector)
        forces[i] -= push
        forces[j] += push
        energy += STEEPNESS * (limit - float(np.linalg.norm(vector)))
    return Walled(energy, forces)


def _draw_apart(n_atoms: int, links: Vectors, distance: float) -> Float64:
    """How far (n, 3) Å linked atoms move so that all of a group are at least a distance apart."""
    moves = np.zeros((n_atoms, 3))
    for members in _groups(links):
        atoms = list(members)
        now = np.array([members[atom] for atom in atoms])
        if len(atoms) == 2:
            direction = _direction(now[1] - now[0]) * distance
            wanted = np.array([-0.5, 0.5])[:, None] * direction
        else:
            side = int(np.ceil(len(atoms) ** (1 / 3)))
            grid = np.stack(np.unravel_index(np.arange(len(atoms)), (side,) * 3), axis=1)
            wanted = (grid - grid.mean(axis=0)) * distance
        moves[atoms] = wanted - (now - now.mean(axis=0))
    return moves


def _direction(vector: Float64) -> Float64:
    length = float(np.linalg.norm(vector))
    return vector / length if length > 1e-12 else _DEFAULT_DIRECTION


def _groups(links: Vectors) -> list[dict[int, Float64]]:
    """Atoms that hang together, each with its place relative to the first of its group."""
    neighbors: dict[int, list[tuple[int, Float64]]] = {}
    for (i, j), vector in links.items():
        neighbors.setdefault(i, []).append((j, vector))
        neighbors.setdefault(j, []).append((i, -vector))
    groups: list[dict[int, Float64]] = []
    seen: set[int] = set()
    for first in sorted(neighbors):
        if first in seen:
            continue
        group, waiting = {first: np.zeros(3)}, [first]
        while waiting:
            atom = waiting.pop()
            for other, vector in neighbors[atom]:
                if other not in group:
                    group[other] = group[atom] + vector
                    waiting.append(other)
        seen |= group.keys()
        groups.append(dict(sorted(group.items())))
    return groups
