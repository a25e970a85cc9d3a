"""What a run changes of a structure before it starts: hydrogen made heavier, velocities kept."""

from __future__ import annotations

import dataclasses

import numpy as np

from mlip_md.errors import StructureError
from mlip_md.integrations.md.settings import MDSettings
from mlip_md.integrations.md.structures import Structure, bonds
from mlip_md.integrations.md.structures.description import is_isotope


def prepare_start(settings: MDSettings, structure: Structure) -> Structure:
    """The structure with the masses and velocities with which a run starts.

    Raises:
        StructureError: if there are no velocities in the file that should start the run, or a
            neighbor is too light to make its hydrogen heavier.
    """
    velocities = structure.velocities
    if settings.velocities == "file" and velocities is None:
        raise StructureError(
            f"{structure.report.file or structure.name} holds no velocities; leave --velocities "
            "file out (in Python velocities), and they are drawn"
        )
    if settings.hydrogen_mass is None:
        return structure
    atoms = structure.atoms.copy()
    atoms.set_masses(repartition_masses(structure, settings.hydrogen_mass))
    if velocities is not None:
        atoms.arrays["momenta"] = velocities * atoms.get_masses()[:, None]
    return dataclasses.replace(structure, atoms=atoms)


def repartition_masses(structure: Structure, hydrogen: float) -> np.ndarray:
    """Masses in which hydrogen weighs more and the heavy atom bonded to it less.

    The total stays; deuterium, tritium and hydrogen without heavy neighbor stay too.

    Args:
        structure: with its bonds, or those that distances imply.
        hydrogen: u.

    Returns:
        Masses (n,) u.

    Raises:
        StructureError: if a heavy atom would become lighter than its hydrogens.
    """
    atoms = structure.atoms
    masses, numbers = atoms.get_masses(), atoms.numbers
    pairs = bonds(atoms) if structure.bonds is None else structure.bonds
    light = (numbers == 1) & ~is_isotope(atoms, "D") & ~is_isotope(atoms, "T")
    done = set()
    for i, j in (*pairs.tolist(), *pairs[:, ::-1].tolist()):
        if light[i] and numbers[j] > 1 and i not in done:
            done.add(i)
            masses[j] -= hydrogen - masses[i]
            masses[i] = hydrogen
    bearers = np.unique(pairs[numbers[pairs] > 1])
    for index in bearers[masses[bearers] < hydrogen] if done else ():
        raise StructureError(
            f"hydrogen of {hydrogen:g} u would leave {masses[index]:.3g} u to atom {index + 1} "
            f"({atoms.symbols[index]}); give a smaller --hydrogen-mass"
        )
    return masses
