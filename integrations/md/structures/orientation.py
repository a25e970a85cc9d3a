"""One lattice, turned as OpenMM, and with it PDB, DCD and XTC files, want it."""

from __future__ import annotations

import dataclasses

import numpy as np
from ase import Atoms
from ase.cell import Cell

from mlip_md.integrations.md.structures.description import Structure


def reduce_lattice(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of the same lattice in OpenMM's reduced form, and the rotation into it.

    Args:
        cell: (3, 3), rows are lattice vectors of any handedness, volume not 0.

    Returns:
        The reduced cell (3, 3), lower triangular, and the rotation R (3, 3): ``x @ R.T`` are
        positions x in its frame.
    """
    right = Cell(cell)
    if right.handedness < 0:
        right = Cell(-cell)  # the same lattice, and no mirror image of the molecules
    standard, rotation = right.standard_form()
    reduced = standard.array.copy()
    for row, column in ((2, 1), (2, 0), (1, 0)):
        reduced[row] -= reduced[column] * np.round(reduced[row, column] / reduced[column, column])
    return reduced, rotation


def has_lattice(atoms: Atoms) -> bool:
    """Whether atoms are periodic in three directions."""
    return bool(atoms.pbc.all() and atoms.cell.rank == 3)


def reduce_structure(structure: Structure) -> Structure:
    """A structure in the frame of its reduced cell; as it is if it has no lattice."""
    if not has_lattice(structure.atoms):
        return structure
    atoms = structure.atoms.copy()
    reduced, rotation = reduce_lattice(atoms.cell.array)
    atoms.positions = atoms.positions @ rotation.T
    if "momenta" in atoms.arrays:
        atoms.arrays["momenta"] = atoms.arrays["momenta"] @ rotation.T
    atoms.cell = reduced
    return dataclasses.replace(structure, atoms=atoms)
