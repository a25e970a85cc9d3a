"""Writing a structure that was read: what its format has room for stays as it was."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from ase import Atoms

from mlip_md.errors import ConfigError, OutputError
from mlip_md.files import write_bytes
from mlip_md.integrations.md.structures.description import Structure, is_isotope
from mlip_md.integrations.md.structures.pdb import format_pdb

_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
_PDB_SUFFIXES = (".pdb", ".ent", ".brk")


def write_structure(path: Path, structure: Structure, atoms: Atoms | None = None) -> None:
    """Write a structure, whole or not at all, as ``format_structure`` has it.

    Args:
        path: its ending says the format, as ASE knows them.
        structure: as read.
        atoms: what it has become, in the same order; None is ``structure.atoms``.

    Raises:
        ConfigError: if ASE has no writer for such a name.
        OutputError: if the file cannot be written; what was there before is untouched then.
    """
    write_bytes(path, format_structure(path.name, structure, atoms))


def format_structure(name: str, structure: Structure, atoms: Atoms | None = None) -> bytes:
    """Content of a structure's file; a PDB file keeps residues, names, formal charges and bonds.

    Args:
        name: of the file; its ending says the format, as ASE knows them.
        structure: as read.
        atoms: what it has become, in the same order; None is ``structure.atoms``.

    Raises:
        ConfigError: if ASE has no writer for such a name.
        OutputError: if there is no room for a temporary file.
    """
    atoms = structure.atoms if atoms is None else atoms
    pack = _PACKERS.get(Path(name).suffix.lower(), bytes)
    if is_pdb(name):
        return pack(format_pdb(structure, atoms).encode())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        try:
            atoms.write(path)
            return path.read_bytes()
        except OSError as error:
            raise OutputError(
                f"{name} could not be written ({error.strerror or error}); make room for it in "
                f"{folder} too"
            ) from error
        except Exception as error:
            raise ConfigError(
                f"ASE cannot write {name} ({type(error).__name__}: {error}); the ending says "
                "the format: .extxyz, .xyz, .pdb or .cif, for example"
            ) from error


def describe_unwritten(name: str, structure: Structure, atoms: Atoms) -> str:
    """What of a structure a file of that name has no room for, as a sentence; "" if nothing.

    Args:
        name: of the file; nothing is said of other formats than PDB.
        structure: as read.
        atoms: what it has become.
    """
    if not is_pdb(name):
        return ""
    isotopes = is_isotope(atoms, "D") | is_isotope(atoms, "T")  # which have symbols there
    masses = int((structure.own_masses & ~isotopes).sum())
    held = structure.as_dict()["constrained_atoms"]
    lost = [
        f"{what} {count} atom{'s' * (count > 1)}"
        for what, count in (("own masses of", masses), ("constraints on", held))
        if count
    ]
    if atoms.pbc.any() and not atoms.pbc.all():
        along = " and ".join(np.array(["a", "b", "c"])[atoms.pbc])
        then = "in all directions" if atoms.cell.rank == 3 else "in none"
        lost.append(f"periodicity along {along} only (read again, it is periodic {then})")
    return f"a PDB file cannot hold {', '.join(lost)}; extxyz can" if lost else ""


def is_pdb(name: str) -> bool:
    """Whether a file of that name is a PDB file, packed or not."""
    path = Path(name.lower())
    return (path.with_suffix("") if path.suffix in _PACKERS else path).suffix in _PDB_SUFFIXES
