"""Structures to run: bundled molecules, files, and their topologies for OpenMM and mdtraj."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

import numpy as np
from ase import Atoms

from mlip_md.errors import StructureError
from mlip_md.integrations.md.structures.description import Structure

DEFAULT_MOLECULE = "paracetamol"

_OPENMM_SUFFIXES = {".pdb": "PDBFile", ".pdbx": "PDBxFile", ".mmcif": "PDBxFile"}

MAX_DENSITY = 30.0
"""g/cm³; the densest solids have 23, and a cell that gives more does not hold its atoms."""


def bundled_molecules() -> list[str]:
    """Names of the molecules that come with the package."""
    folder = resources.files("mlip_md.integrations.md") / "molecules"
    return sorted(f.name.removesuffix(".extxyz") for f in folder.iterdir() if f.name.endswith("z"))


def read_structure(source: str | os.PathLike[str] | None = None) -> Structure:
    """Read a structure.

    Args:
        source: path of any file that ASE or OpenMM reads (xyz, extxyz, pdb, cif, POSCAR, …; of a
            trajectory the last frame), or the name of a bundled molecule. None is paracetamol.

    Returns:
        The structure, without calculator and constraints.

    Raises:
        StructureError: if there is no such file, it cannot be read, or its cell is too small for
            its atoms.
    """
    text = DEFAULT_MOLECULE if source is None else os.fspath(source)
    path = Path(text)
    if not path.exists():
        if text not in bundled_molecules():
            raise StructureError(
                f"there is no file {text!r}, nor a bundled molecule of that name "
                f"({', '.join(bundled_molecules())})"
            )
        folder = resources.files("mlip_md.integrations.md") / "molecules"
        with resources.as_file(folder / f"{text}.extxyz") as bundled:
            return Structure(text, _read_ase(bundled))
    if path.suffix.lower() in _OPENMM_SUFFIXES or _is_mmcif(path):
        structure = _read_openmm(path)
    else:
        structure = Structure(path.stem, _read_ase(path))
    _check_cell(path, structure.atoms)
    return structure


def _check_cell(path: Path, atoms: Atoms) -> None:
    """Refuse the dummy cell that files of molecules may have (CRYST1 1 1 1 in PDB files)."""
    from ase.units import _amu

    if not atoms.pbc.any() or atoms.cell.rank < 3:
        return
    density = atoms.get_masses().sum() * _amu * 1e27 / abs(atoms.cell.volume)
    if density > MAX_DENSITY:
        lengths = " x ".join(f"{length:.4g}" for length in atoms.cell.lengths())
        raise StructureError(
            f"{path}: a cell of {lengths} Å is too small for {len(atoms)} atoms "
            f"({density:.3g} g/cm³); remove it (the CRYST1 line of a PDB file) or give the real one"
        )


def _is_mmcif(path: Path) -> bool:
    """Whether a .cif file is of the PDB's kind, which ASE does not read."""
    if path.suffix.lower() != ".cif":
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return any("_atom_site.Cartn_x" in line for line in file)


def _read_ase(path: Path) -> Atoms:
    from ase.io import read

    if path.is_dir():
        raise StructureError(f"{path} is a folder; name a file in it")
    try:
        atoms = read(path)
    except Exception as error:
        raise StructureError(
            f"ASE cannot read {path} ({type(error).__name__}: {error}); is it damaged, or its name "
            "wrong for its format? extxyz and PDB are safe choices"
        ) from error
    if not isinstance(atoms, Atoms) or not len(atoms):
        raise StructureError(f"{path} holds no atoms")
    atoms.calc = None
    atoms.set_constraint()
    return atoms


def _read_openmm(path: Path) -> Structure:
    """Read with OpenMM, which keeps residues, chains and bonds for the analysis afterwards."""
    import openmm.app
    from openmm import unit

    if path.suffix.lower() == ".pdb" and not _has_atom_records(path):
        raise StructureError(f"{path} has no atoms: it lacks lines that begin with ATOM or HETATM")
    try:
        reader = _OPENMM_SUFFIXES.get(path.suffix.lower(), "PDBxFile")
        file = getattr(openmm.app, reader)(str(path))
    except Exception as error:
        raise StructureError(
            f"{path} is damaged or not of the format that its name says; OpenMM cannot read it "
            f"({type(error).__name__}: {error})"
        ) from error
    elements = [atom.element for atom in file.topology.atoms()]
    if not elements or None in elements:
        raise StructureError(f"{path} has no atoms, or atoms without an element column")
    positions = file.getPositions(asNumpy=True).value_in_unit(unit.angstrom)
    box = file.topology.getPeriodicBoxVectors()
    cell = None if box is None else np.array(box.value_in_unit(unit.angstrom))
    numbers = [element.atomic_number for element in elements]
    atoms = Atoms(numbers, np.array(positions), cell=cell, pbc=cell is not None)
    return Structure(path.stem, atoms, file.topology)


def _has_atom_records(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return any(line.startswith(("ATOM  ", "HETATM")) for line in file)
