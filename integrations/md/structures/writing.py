"""Writing a structure that was read: what its format has room for stays as it was."""

from __future__ import annotations

from pathlib import Path

from ase import Atoms

from mlip_md.files import write_text
from mlip_md.integrations.md.structures.description import Structure
from mlip_md.integrations.md.structures.pdb import format_pdb

_PDB_SUFFIXES = (".pdb", ".ent", ".brk")


def write_structure(path: Path, structure: Structure, atoms: Atoms | None = None) -> None:
    """Write a structure; a PDB file keeps residues, chains, names, formal charges and bonds.

    Args:
        path: its ending says the format, as ASE knows them.
        structure: as read.
        atoms: what it has become, in the same order; None is ``structure.atoms``.

    Raises:
        OutputError: if the file cannot be written.
    """
    atoms = structure.atoms if atoms is None else atoms
    if path.suffix.lower() in _PDB_SUFFIXES:
        write_text(path, format_pdb(structure, atoms))
        return
    atoms.write(path)
