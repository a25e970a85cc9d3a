"""Coordinates that do not move: what a run can hold, and how many momenta are left."""

from __future__ import annotations

import dataclasses

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian

from mlip_md.errors import StructureError
from mlip_md.integrations.md.backends.interface import Backend
from mlip_md.integrations.md.settings import Ensemble
from mlip_md.integrations.md.structures import Structure


def hold(atoms: Atoms, fixed: np.ndarray) -> None:
    """Hold coordinates (n, 3) of atoms by Cartesian axis, and nothing else.

    Whole atoms become FixAtoms, the others FixCartesian: these two ASE's integrators hold exactly,
    and both are kept by extended XYZ files.
    """
    held: list[FixAtoms | FixCartesian] = []
    for mask in np.unique(fixed[fixed.any(axis=1)], axis=0)[::-1]:
        same = np.flatnonzero((fixed == mask).all(axis=1))
        held.append(FixAtoms(same) if mask.all() else FixCartesian(same, mask=tuple(mask.tolist())))
    atoms.set_constraint(held)


def check_held(engine: type[Backend], ensemble: Ensemble, structure: Structure) -> Structure:
    """The structure with its constraints as a run holds them, by Cartesian axis.

    Raises:
        StructureError: if the engine or the ensemble cannot hold them, or nothing could move.
    """
    fixed = structure.fixed
    partly = fixed.any(axis=1) & ~fixed.all(axis=1)
    if not fixed.any():
        return structure
    if ensemble == "npt":
        raise StructureError(
            f"npt scales the cell with all atoms in it, but {int(fixed.any(axis=1).sum())} atoms "
            "are held in place; use nvt, or remove the constraints"
        )
    if fixed.all():
        raise StructureError("the constraints hold all atoms in place: nothing would move")
    if not engine.holds_axes and partly.any():
        first = int(np.argmax(partly))
        axes = " and ".join(np.array(["x", "y", "z"])[fixed[first]])
        raise StructureError(
            f"{engine.title} can hold whole atoms only, but of atom {first + 1} only {axes} is "
            "held; use the ASE engine, or fix the atom in all directions"
        )
    atoms = structure.atoms.copy()
    hold(atoms, fixed)
    return dataclasses.replace(structure, atoms=atoms)
