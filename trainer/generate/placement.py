"""Several molecules side by side: contacts, hydrogen bonds, a solute among others.

Positions are (N, 3) in Å.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlip_md.trainer.generate.chemistry import Molecule, join_molecules
from mlip_md.trainer.generate.distortions import random_direction, random_rotation

DONORS = (7, 8, 9, 16, 17)
ACCEPTORS = (7, 8, 9, 16, 17, 35)


def place_in_contact(
    first: Molecule,
    first_positions: np.ndarray,
    second: Molecule,
    second_positions: np.ndarray,
    ratio: float,
    rng: np.random.Generator,
) -> np.ndarray:
    """Put a second molecule at a random side and orientation of a first one.

    Args:
        first: the molecule that stays.
        first_positions: (N, 3).
        second: the molecule that is placed.
        second_positions: (M, 3).
        ratio: smallest distance between the two over the sum of the van der Waals radii.
        rng: source of the orientation.

    Returns:
        (N + M, 3).
    """
    direction = random_direction(rng)
    fixed = first_positions - first_positions.mean(0)
    placed = (second_positions - second_positions.mean(0)) @ random_rotation(rng).T
    radii = first.radii[:, None] + second.radii[None, :]
    near, far = 0.0, 60.0
    for _ in range(40):
        middle = 0.5 * (near + far)
        gap = np.linalg.norm(fixed[:, None] - placed[None] - middle * direction, axis=-1) / radii
        near, far = (middle, far) if gap.min() < ratio else (near, middle)
    return np.concatenate([fixed, placed + far * direction])


def place_in_hydrogen_bond(
    first: Molecule,
    first_positions: np.ndarray,
    second: Molecule,
    second_positions: np.ndarray,
    length: float,
    rng: np.random.Generator,
) -> np.ndarray | None:
    """Place an acceptor of one molecule on the axis of a polar X-H bond of the other.

    Args:
        first: one molecule; it or the other gives the hydrogen.
        first_positions: (N, 3).
        second: the other molecule.
        second_positions: (M, 3).
        length: H...acceptor distance in Å.
        rng: source of the choices.

    Returns:
        (N + M, 3), or None when no donor and acceptor face each other.
    """
    options = [(True, h, a) for h in _donors(first) for a in _acceptors(second)]
    options += [(False, h, a) for h in _donors(second) for a in _acceptors(first)]
    if not options:
        return None
    forward, (heavy, hydrogen), acceptor = options[rng.integers(len(options))]
    donor, taker = (first_positions, second_positions)[:: 1 if forward else -1]
    radii = (first.radii, second.radii)[:: 1 if forward else -1]
    axis = donor[hydrogen] - donor[heavy]
    site = donor[hydrogen] + length * axis / np.linalg.norm(axis)
    best, best_gap = taker, -1.0
    for _ in range(24):
        trial = (taker - taker[acceptor]) @ random_rotation(rng).T + site
        gap = _distances(donor, trial) / (radii[0][:, None] + radii[1][None, :])
        gap[hydrogen, acceptor] = gap[heavy, acceptor] = 9.0
        if gap.min() > best_gap:
            best, best_gap = trial, gap.min()
    return np.concatenate([donor, best] if forward else [best, donor])


def surround(
    molecules: Sequence[Molecule], rng: np.random.Generator, ratio: float = 0.80
) -> tuple[Molecule, np.ndarray]:
    """Place molecules around the first one, each as near to the center as its contacts allow.

    Args:
        molecules: with one conformer each; the first is put in the center.
        rng: source of directions and orientations.
        ratio: smallest allowed distance over the sum of van der Waals radii (0.8: hydrogen bonds).

    Returns:
        The joined molecule and its positions (N, 3).
    """
    placed = molecules[0].conformers[0] - molecules[0].conformers[0].mean(0)
    radii = molecules[0].radii
    for molecule in molecules[1:]:
        own = molecule.conformers[0] - molecule.conformers[0].mean(0)
        sums = radii[:, None] + molecule.radii[None]
        best, best_radius = own, np.inf
        for _ in range(12):
            turned = own @ random_rotation(rng).T
            direction = random_direction(rng)
            for radius in np.arange(0.0, min(best_radius, 40.0), 0.3):
                trial = turned + radius * direction
                if (_distances(placed, trial) / sums).min() >= ratio:
                    best, best_radius = trial, radius
                    break
        placed = np.concatenate([placed, best])
        radii = np.concatenate([radii, molecule.radii])
    return join_molecules(list(molecules)), placed


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N, M) between (N, 3) and (M, 3)."""
    return np.linalg.norm(first[:, None] - second[None], axis=-1)


def _donors(molecule: Molecule) -> list[tuple[int, int]]:
    """(heavy atom, hydrogen) of every polar X-H bond."""
    numbers, bonded = molecule.atomic_numbers, molecule.bonded
    hydrogens = [i for i, z in enumerate(numbers) if z == 1 and bonded[i]]
    return [(bonded[h][0], h) for h in hydrogens if numbers[bonded[h][0]] in DONORS]


def _acceptors(molecule: Molecule) -> list[int]:
    return [i for i, z in enumerate(molecule.atomic_numbers) if z in ACCEPTORS]
