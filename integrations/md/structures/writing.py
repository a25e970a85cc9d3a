"""Writing a structure that was read: what its format has room for stays as it was."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path

from ase import Atoms

from mlip_md.errors import OutputError
from mlip_md.files import write_bytes
from mlip_md.integrations.md.structures.description import Structure
from mlip_md.integrations.md.structures.pdb import format_pdb

_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
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
    pack = _PACKERS.get(path.suffix.lower())
    suffix = (path.with_suffix("") if pack else path).suffix.lower()
    if suffix in _PDB_SUFFIXES:
        content = format_pdb(structure, atoms).encode()
        write_bytes(path, pack(content) if pack else content)
        return
    try:
        atoms.write(path)
    except OSError as error:
        raise OutputError(
            f"{path} could not be written ({error.strerror or error}); make room, or name another "
            "place"
        ) from error
