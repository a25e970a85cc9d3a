"""Geometries of one molecule that are distorted on purpose: bonds, angles, torsions, everything.

Positions are (N, 3) in Å.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mlip_md.trainer.generate.chemistry import Conformation, Molecule


def distort(
    molecule: Molecule,
    bases: list[np.ndarray],
    counts: Mapping[str, int],
    rng: np.random.Generator,
) -> list[Conformation]:
    """Distorted copies of given geometries.

    Args:
        molecule: with its bonds.
        bases: geometries to distort.
        counts: how many of each kind: "stretch", "angle", "twist", "rattle"; a molecule without
            an open angle or torsion is rattled in their place.
        rng: source of every choice.
    """
    makers = {"stretch": _stretch, "angle": _bend, "twist": _twist, "rattle": _rattle}
    return [
        Conformation(makers[kind](molecule, bases[rng.integers(len(bases))], rng), kind)
        for kind, count in counts.items()
        for _ in range(count)
    ]


def press(positions: np.ndarray, members: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Move whole molecules towards a point, turn each a little, and rattle their atoms.

    Args:
        positions: (N, 3).
        members: (N,) the molecule of each atom, from 0.
        rng: chooses the point (the middle, or one of the molecules with what is around it), how
            far (distances of molecules down to 0.55 of what they were) and the turns.

    Returns:
        (N, 3).
    """
    centers = np.stack([positions[members == one].mean(0) for one in range(members.max() + 1)])
    everywhere = rng.random() < 0.5
    focus = positions.mean(0) if everywhere else centers[rng.integers(len(centers))]
    away = centers - focus
    near = 1.0 if everywhere else np.exp(-((np.linalg.norm(away, axis=1, keepdims=True) / 4) ** 2))
    shifts = -(1.0 - rng.uniform(0.55, 0.95)) * near * away
    largest = rng.uniform(0.0, 1.0)  # radians
    pressed = (
        positions + shifts[members] + rng.uniform(0.0, 0.08) * rng.normal(size=(len(members), 3))
    )
    for one, center in enumerate(centers + shifts):
        turn = rotation_matrix(random_direction(rng), rng.uniform(0.0, largest))
        atoms = members == one
        pressed[atoms] = (pressed[atoms] - center) @ turn.T + center
    return pressed


def stretch_bond(
    molecule: Molecule, positions: np.ndarray, bond: tuple[int, int], factor: float
) -> np.ndarray:
    """Change one bond length; the smaller side moves rigidly, in a ring only the two atoms."""
    first, second = bond
    shift = (factor - 1.0) * (positions[second] - positions[first])
    moved = positions.copy()
    if bond in molecule.ring_bonds:
        moved[first] -= 0.5 * shift
        moved[second] += 0.5 * shift
        return moved
    side = atoms_beyond(molecule, first, second)
    if 2 * side.sum() <= len(positions):
        moved[side] += shift
    else:
        moved[atoms_beyond(molecule, second, first)] -= shift
    return moved


def rotate_beyond(
    molecule: Molecule,
    positions: np.ndarray,
    bond: tuple[int, int],
    axis: np.ndarray,
    angle: float,
) -> np.ndarray:
    """Rotate what lies beyond a bond about an axis (3,) through its first atom (radians)."""
    first, second = bond
    side = atoms_beyond(molecule, first, second)
    moved = positions.copy()
    center = positions[first]
    moved[side] = (positions[side] - center) @ rotation_matrix(axis, angle).T + center
    return moved


def atoms_beyond(molecule: Molecule, first: int, second: int) -> np.ndarray:
    """Mask (N,) of the atoms on the side of `second` of a bond that is in no ring."""
    bonded = molecule.bonded
    mask = np.zeros(len(bonded), dtype=bool)
    mask[second] = True
    stack = [second]
    while stack:
        for atom in bonded[stack.pop()]:
            if not mask[atom] and atom != first:
                mask[atom] = True
                stack.append(atom)
    return mask


def rotation_matrix(axis: np.ndarray, angle: float) -> np.ndarray:
    """(3, 3) rotation about an axis (3,) by an angle in radians (Rodrigues)."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """A uniformly random (3, 3) rotation, from a quaternion."""
    q = rng.normal(size=4)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def random_direction(rng: np.random.Generator) -> np.ndarray:
    """A uniformly random unit vector (3,)."""
    direction = rng.normal(size=3)
    return direction / np.linalg.norm(direction)


def _stretch(molecule: Molecule, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bond = molecule.bonds[rng.integers(len(molecule.bonds))]
    rng.random()  # a draw that recipe 1 has: without it every later geometry would be another
    if bond in molecule.ring_bonds:
        return stretch_bond(molecule, positions, bond, rng.uniform(0.82, 1.25))
    # as many compressed as stretched ones, a few of them towards dissociation
    factor = rng.uniform(0.68, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, 1.5)
    if rng.random() < 0.1:
        factor = rng.uniform(1.5, 2.2)
    return stretch_bond(molecule, positions, bond, factor)


def _bend(molecule: Molecule, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bonds = _open_bonds(molecule)
    if not bonds:
        return _rattle(molecule, positions, rng)
    first, second = bond = bonds[rng.integers(len(bonds))]
    axis = np.cross(positions[second] - positions[first], rng.normal(size=3))
    return rotate_beyond(molecule, positions, bond, axis, np.deg2rad(rng.uniform(8, 40)))


def _twist(molecule: Molecule, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    bonded = molecule.bonded
    bonds = [(a, b) for a, b in _open_bonds(molecule) if len(bonded[b]) > 1]
    if not bonds:
        return _rattle(molecule, positions, rng)
    first, second = bond = bonds[rng.integers(len(bonds))]
    axis = positions[second] - positions[first]
    return rotate_beyond(molecule, positions, bond, axis, rng.uniform(0.3, 2 * np.pi - 0.3))


def _rattle(_: Molecule, positions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.3:
        return positions * rng.uniform(0.90, 1.10) + 0.02 * rng.normal(size=positions.shape)
    return positions + rng.uniform(0.03, 0.14) * rng.normal(size=positions.shape)


def _open_bonds(molecule: Molecule) -> list[tuple[int, int]]:
    """Bonds outside rings in both directions, if their first atom has another partner."""
    single = [bond for bond in molecule.bonds if bond not in molecule.ring_bonds]
    bonded = molecule.bonded
    return [(a, b) for a, b in [*single, *((b, a) for a, b in single)] if len(bonded[a]) > 1]
