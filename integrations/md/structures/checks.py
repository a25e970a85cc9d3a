"""What a file may say and nobody can compute: refused here, in one sentence each."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from mlip_md.integrations.md.structures.description import Content
from mlip_md.integrations.md.structures.text import Source
from mlip_md.integrations.residue_names import (
    HYDROGENS,
    amino_acid,
    is_nucleotide,
    is_water,
)

MAX_DENSITY = 30.0
"""g/cm³; the densest solids have 23, and a cell that gives more does not hold its atoms."""

_MISSING = 2
"""Fewer hydrogens than this below the fewest are no state of an amino acid any more."""


def check_sites(source: Source, content: Content, drop: bool) -> None:
    """Refuse sites without nucleus, or leave them out.

    Raises:
        StructureError: if there are some that are not to be left out.
    """
    sites = np.flatnonzero(content.atoms.numbers == 0)
    if not len(sites):
        return
    if len(sites) == len(content.atoms):
        raise source.refusal("holds no atoms, only sites without nucleus")
    names = ", ".join(content.label(int(i)) for i in sites[:3])
    names += f" and {len(sites) - 3} more" if len(sites) > 3 else ""
    if not drop:
        raise source.refusal(
            f"has sites without nucleus (virtual sites, dummies or ghosts): {names}; a potential "
            "knows atoms only, leave them out: --drop-virtual-sites (in Python "
            "drop_virtual_sites=True)"
        )
    content.keep(content.atoms.numbers != 0)
    content.left_out.append(f"{len(sites)} sites without nucleus ({names})")


def check_numbers(source: Source, content: Content) -> None:
    """Refuse positions, cells, masses and velocities that are no numbers.

    Raises:
        StructureError: naming the first one.
    """
    atoms = content.atoms
    for values, what in (
        (atoms.positions, "position"),
        (atoms.get_masses(), "mass"),
        (atoms.get_momenta(), "velocity"),
    ):
        good = np.isfinite(values).reshape(len(atoms), -1).all(axis=1)
        if not good.all():
            first = int(np.argmin(good))
            raise source.refusal(
                f"gives {content.label(first)} a {what} that is not finite ({values[first]}); the "
                "file is damaged"
            )
    if not np.isfinite(atoms.cell.array).all():
        raise source.refusal("has a cell that is not finite; the file is damaged")


def check_hydrogens(source: Source, content: Content) -> None:
    """Refuse amino acids, nucleotides and waters whose hydrogens are not in the file.

    Raises:
        StructureError: naming the first such residue.
    """
    if content.labels is None:
        return
    labels, numbers = content.labels, content.atoms.numbers
    # Some programs write the hydrogens of all residues after the other atoms.
    residues: dict[tuple, list[int]] = {}
    for index, label in enumerate(labels):
        residues.setdefault(label.residue, []).append(index)
    for group in residues.values():
        name = labels[group[0]].residue_name
        amino = amino_acid(name)
        if amino is None and not is_water(name) and not _is_nucleotide(name, numbers[group]):
            continue
        hydrogens = int(np.sum(numbers[group] == 1))
        least = 1 if amino is None else HYDROGENS[amino] - _MISSING + 1
        if hydrogens < least:
            place = str(labels[group[0]]).partition(" of ")[2]
            raise source.refusal(
                f"lacks hydrogens: residue {place} has {hydrogens}; add them all first, with "
                "positions (PDBFixer, OpenMM's Modeller.addHydrogens, gmx pdb2gmx)"
            )


def _is_nucleotide(name: str, numbers: np.ndarray) -> bool:
    """Whether a residue is a nucleotide, not an ion or molecule that is called like one (U, CN)."""
    sugar = len(numbers) > 1 and 8 in numbers
    return is_nucleotide(name) and sugar


def check_cell_and_density(source: Source, atoms: Atoms) -> None:
    """Refuse a cell that is missing where the structure is periodic, or cannot hold the atoms.

    Raises:
        StructureError: on vectors that span nothing, and a density above that of any matter.
    """
    from ase.units import _amu

    if not atoms.pbc.any():
        return
    if np.linalg.matrix_rank(atoms.cell.array[atoms.pbc]) < atoms.pbc.sum():
        along = ", ".join(np.array(["a", "b", "c"])[atoms.pbc])
        raise source.refusal(
            f"is periodic along {along} and has no cell there; give one (Lattice), or say that it "
            "is not periodic (pbc)"
        )
    if atoms.cell.rank < 3:
        return
    density = atoms.get_masses().sum() * _amu * 1e27 / abs(atoms.cell.volume)
    if density > MAX_DENSITY:
        lengths = " x ".join(f"{length:.4g}" for length in atoms.cell.lengths())
        raise source.refusal(
            f"has a cell of {lengths} Å, too small for {len(atoms)} atoms "
            f"({density:.3g} g/cm³); remove it (the CRYST1 line of a PDB file) or give the real one"
        )
