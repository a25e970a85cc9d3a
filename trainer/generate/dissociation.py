"""Bonds that break: geometries on the way from a molecule to its atoms, and labels to trust there.

GFN2-xTB has no exchange term that tells spins apart, so its closed-shell energies dissociate into
the energies of the neutral fragments: one surface holds from molecules to atoms. Two faults are
kept out. Between different fragments a part of an electron stays transferred whatever their
distance, up to 0.4 e and 1 eV (C-F, P-F), and there the iterations often do not converge: fragments
that are apart must be neutral. And from where no potential of short range sees anything, a
structure is labeled as the sum of its parts.

Positions are (N, 3) in Å, unless bohr is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

import numpy as np

from mlip_md.constants import BOHR
from mlip_md.trainer.generate.chemistry import (
    Conformation,
    Molecule,
    Sample,
    build_molecule,
    count_unpaired,
    join_molecules,
)
from mlip_md.trainer.generate.distortions import random_direction, stretch_bond
from mlip_md.trainer.generate.dynamics import XTBSurface, quench
from mlip_md.trainer.generate.labels import Label, LabelError, Labels
from mlip_md.trainer.generate.placement import place_in_contact

APART = 2.8
"""Å; groups of atoms that are farther from each other than this must be neutral."""
SEPARATE = 5.0
"""Å; groups that are farther from each other than this are labeled one by one."""
MAX_TRANSFER = 0.15
"""e; charge of a group that passes as neutral. It falsifies the energy by about 0.15 eV."""


def label_fragments(
    label: Label, atomic_numbers: np.ndarray, positions: np.ndarray, charge: int
) -> Labels:
    """Labels of a neutral structure that may be falling apart.

    Args:
        label: the method.
        atomic_numbers: (N,).
        positions: (N, 3) in bohr.
        charge: must be 0, as every fragment is neutral.

    Raises:
        LabelError: not converged, or a fragment carries charge.
    """
    energy, gradient = 0.0, np.zeros(positions.shape)
    charges = np.zeros(len(atomic_numbers))
    for group in find_groups(positions, SEPARATE / BOHR):
        numbers = atomic_numbers[group]
        part = label(numbers, positions[group], charge, count_unpaired(numbers))
        energy += part.energy
        gradient[group] = part.gradient
        if part.charges is not None:
            charges[group] = part.charges
    for group in find_groups(positions, APART / BOHR):
        if abs(charges[group].sum()) > MAX_TRANSFER:
            raise LabelError("fragments far from each other are charged", "charge transfer")
    return Labels(energy, gradient, charges)


def find_groups(positions: np.ndarray, gap: float) -> Iterator[np.ndarray]:
    """Groups of atoms (indices) with more than `gap` between any two groups."""
    near = np.linalg.norm(positions[:, None] - positions[None], axis=-1) <= gap
    left = np.ones(len(positions), dtype=bool)
    while left.any():
        group = np.zeros(len(positions), dtype=bool)
        group[np.argmax(left)] = True
        while not np.array_equal(group, grown := near[group].any(0)):
            group = grown
        left &= ~group
        yield np.flatnonzero(group)


def sample_atoms(smiles: Sequence[str], rng: np.random.Generator) -> Sample:
    """One atom alone, or two atoms at distances from a third of a bond to 8 Å."""
    atoms = [build_molecule(one, 1, rng) for one in smiles]
    if len(atoms) == 1:
        return atoms[0], [Conformation(np.zeros((1, 3)), "separation")]
    bond = sum(float(atom.covalent_radii[0]) for atom in atoms)
    made = []
    spans = [(0.35 * bond, bond, 9), (bond, APART, 12), (APART, SEPARATE, 3), (5.1, 8.0, 1)]
    for low, high, count in spans:
        edges = np.geomspace(low, high, count + 1)
        for distance in rng.uniform(edges[:-1], edges[1:]):
            along = distance * random_direction(rng)
            made.append(Conformation(np.stack([0.0 * along, along]), "separation"))
    return join_molecules(atoms), made


def sample_dissociation(smiles: str, rng: np.random.Generator) -> Sample:
    """One molecule on its way apart: bonds, all atoms at once, steps of a minimizer, clashes."""
    molecule = build_molecule(smiles, 2, rng)
    surface = XTBSurface(molecule)
    bases = []
    for conformer in molecule.conformers:
        with suppress(LabelError):
            conformer = quench(surface, conformer, 15)
        bases.append(conformer)

    def rattled() -> np.ndarray:
        base = bases[rng.integers(len(bases))]
        return base + rng.uniform(0.0, 0.08) * rng.normal(size=base.shape)

    n, bonds = len(molecule.atomic_numbers), rng.permutation(len(molecule.bonds))
    made = [Conformation(bases[0], "quench")]
    for index in bonds[: 4 if n <= 8 else 3 if n <= 14 else 2]:
        made += _pull(molecule, rattled(), molecule.bonds[index], rng)
    made += _expand(rattled(), rng)
    made += [_clash(molecule, rattled(), rng) for _ in range(2)]
    made += [_step_far(surface, rattled(), rng) for _ in range(4)]
    return molecule, made


def sample_separation(smiles: Sequence[str], rng: np.random.Generator) -> Sample:
    """Two molecules from hard contact to where neither sees the other."""
    first, second = (build_molecule(part, 2, rng) for part in smiles)
    made = []
    for low, high in [(0.3, 0.5), (0.4, 0.7), (0.7, 1.2), (1.2, 2.0), (2.2, 3.5)]:
        pair = [
            one.conformers[rng.integers(len(one.conformers))]
            + 0.03 * rng.normal(size=one.conformers[0].shape)
            for one in (first, second)
        ]
        ratio = rng.uniform(low, high)
        placed = place_in_contact(first, pair[0], second, pair[1], ratio, rng)
        made.append(Conformation(placed, "separation"))
    return join_molecules([first, second]), made


def _pull(
    molecule: Molecule, positions: np.ndarray, bond: tuple[int, int], rng: np.random.Generator
) -> list[Conformation]:
    """One bond compressed, longer, and so long that its ends are fragments."""
    length = float(np.linalg.norm(positions[bond[1]] - positions[bond[0]]))
    wanted = [length * rng.uniform(0.5, 0.85)]
    if bond in molecule.ring_bonds:
        wanted.append(length * rng.uniform(1.0, 1.7))
    else:
        wanted += [length + rng.uniform(*span) for span in [(0.2, 0.9), (0.9, 1.6), (1.6, 3.6)]]
        wanted.append(length + rng.uniform(SEPARATE, SEPARATE + 3.0))
    return [
        Conformation(stretch_bond(molecule, positions, bond, new / length), "stretch")
        for new in wanted
    ]


def _expand(positions: np.ndarray, rng: np.random.Generator) -> list[Conformation]:
    """All distances smaller, larger, and so large that only atoms are left."""
    gaps = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
    factors = [rng.uniform(*span) for span in [(0.7, 0.95), (1.1, 1.5), (1.4, 2.5)]]
    factors.append(rng.uniform(SEPARATE + 0.1, SEPARATE + 2.0) / gaps[gaps > 0].min())
    return [Conformation(factor * positions, "expansion") for factor in factors]


def _clash(molecule: Molecule, positions: np.ndarray, rng: np.random.Generator) -> Conformation:
    """One atom out of its place and near another one."""
    mover, fixed = rng.choice(len(positions), size=2, replace=False)
    axis = positions[mover] - positions[fixed]
    bond = molecule.covalent_radii[mover] + molecule.covalent_radii[fixed]
    moved = positions.copy()
    moved[mover] = positions[fixed] + rng.uniform(0.45, 1.3) * bond * axis / np.linalg.norm(axis)
    return Conformation(moved, "clash")


def _step_far(surface: XTBSurface, positions: np.ndarray, rng: np.random.Generator) -> Conformation:
    """Where a minimizer without bounds looks first: along the forces, or anywhere, 0.2 to 8 Å."""
    direction = rng.normal(size=positions.shape)
    if rng.random() < 0.6:
        with suppress(LabelError):
            direction = surface(positions)[1]
    step = np.exp(rng.uniform(np.log(0.2), np.log(8.0)))
    largest = np.linalg.norm(direction, axis=-1).max()
    return Conformation(positions + step / largest * direction, "trial step")
