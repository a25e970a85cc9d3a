"""Reading a structure: once, whole and counted, from any file that holds one."""

from __future__ import annotations

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from mlip_md.errors import StructureError
from mlip_md.integrations.md.structures import cif, foreign, gro, mmcif, pdb, sdf, xyz
from mlip_md.integrations.md.structures.checks import (
    check_cell_and_density,
    check_hydrogens,
    check_numbers,
    check_sites,
)
from mlip_md.integrations.md.structures.description import Content, Report, Structure
from mlip_md.integrations.md.structures.text import Source, read_source
from mlip_md.integrations.md.structures.topology import build_topology, implied_bonds

DEFAULT_MOLECULE = "paracetamol"


class _Format(NamedTuple):
    """How a format is read: in frames, and then one of them."""

    name: str
    split: Callable[[Source], Sequence[Any]]
    parse: Callable[[Source, Any], Content]


_PDB = _Format("PDB", pdb.split, pdb.parse)
_MMCIF = _Format("mmCIF", mmcif.split, mmcif.parse)
_CIF = _Format("CIF", cif.split, cif.parse)
_GRO = _Format("GRO", gro.split, gro.parse)
_SDF = _Format("SDF", sdf.split, sdf.parse)
_XYZ = _Format("extended XYZ", xyz.split, xyz.parse)

_BY_SUFFIX: dict[str, _Format] = {
    ".pdb": _PDB,
    ".ent": _PDB,
    ".brk": _PDB,
    ".pdbx": _MMCIF,
    ".mmcif": _MMCIF,
    ".cif": _CIF,
    ".gro": _GRO,
    ".sdf": _SDF,
    ".sd": _SDF,
    ".mol": _SDF,
    ".mdl": _SDF,
    ".xyz": _XYZ,
    ".extxyz": _XYZ,
}

_MMCIF_SITES = re.compile(r"^\s*_atom_site\.(cartn_x|id)\b", re.MULTILINE | re.IGNORECASE)
_LIKE_PDB = (".pdbqt", ".pqr")


def bundled_molecules() -> list[str]:
    """Names of the molecules that come with the package."""
    folder = resources.files("mlip_md.integrations.md") / "molecules"
    return sorted(f.name.removesuffix(".extxyz") for f in folder.iterdir() if f.name.endswith("z"))


def read_structure(
    source: str | os.PathLike[str] | None = None,
    *,
    frame: int | None = None,
    drop_virtual_sites: bool = False,
) -> Structure:
    """Read a structure.

    Args:
        source: path of any file that we or ASE read (xyz, extxyz, pdb, mmcif, cif, gro, sdf,
            POSCAR, traj, ...; also packed with gzip, bzip2 or xz), or the name of a bundled
            molecule. None is paracetamol.
        frame: which of several models or frames, counted from 0, or from the end with -1. None is
            for files of one, or of several that are the same.
        drop_virtual_sites: leave out sites without nucleus (virtual sites, dummies, ghosts), which
            are refused otherwise.

    Returns:
        The structure, without calculator and without labels of the file.

    Raises:
        StructureError: if there is no such file, it cannot be read whole, it says something that
            cannot be computed, or its cell is too small for its atoms.
    """
    text = DEFAULT_MOLECULE if source is None else os.fspath(source)
    path = Path(text)
    if path.exists():
        return _read_file(path, frame, drop_virtual_sites)
    if text not in bundled_molecules():
        raise StructureError(
            f"there is no file {text!r}, nor a bundled molecule of that name "
            f"({', '.join(bundled_molecules())})"
        )
    folder = resources.files("mlip_md.integrations.md") / "molecules"
    with resources.as_file(folder / f"{text}.extxyz") as bundled:
        read = _read_file(bundled, None, False)
    return dataclasses.replace(read, report=dataclasses.replace(read.report, file=text))


def _read_file(path: Path, frame: int | None, drop: bool) -> Structure:
    source = read_source(path)
    form = _format(source)
    if form is None:
        name = foreign.guess(source)
        content, place = _choose(source, foreign.frames(source, name), foreign.parse, frame)
    else:
        name = form.name
        content, place = _choose(source, form.split(source), form.parse, frame)
    if not len(content.atoms):
        raise source.refusal("holds no atoms")
    check_sites(source, content, drop)
    check_numbers(source, content)
    check_hydrogens(source, content)
    check_cell_and_density(source, content.atoms)
    return _finish(source, content, name, place)


def _format(source: Source) -> _Format | None:
    """Format of a file by its content where that is plain, else by its name; None for ASE's."""
    if source.suffix in _LIKE_PDB:
        raise source.refusal(
            "looks like a PDB file and has atom types, charges or radii in the columns of elements "
            "and occupancies; convert it to PDB"
        )
    given = _BY_SUFFIX.get(source.suffix)
    head = source.content[:65536].decode("latin-1")
    if given in (_CIF, _MMCIF):
        return _MMCIF if _MMCIF_SITES.search(source.text()) else _CIF
    if given is not None:
        return given
    if b"\0" in source.content[:4096]:
        return None
    if _MMCIF_SITES.search(head):
        return _MMCIF
    if re.search(r"^(ATOM  |HETATM).{24}[ \d-]{4}\.\d{3}", head, re.MULTILINE):
        return _PDB
    if re.match(r"(?:[^\n]*\n){3}.{33,}V[23]000", head):
        return _SDF
    return None


def _choose(
    source: Source,
    frames: Iterable[Any],
    parse: Callable[[Source, Any], Content],
    frame: int | None,
) -> tuple[Content, tuple[int, int] | None]:
    """The frame that is wanted, its index and the number of frames (None if there is one)."""
    if frame is not None:
        one, count = _pick(frames, frame)
        if one is None:
            raise source.refusal(
                f"has {count} frames, counted from 0; frame {frame} is none of them"
            )
        return parse(source, one), (frame % count, count)
    first: Content | None = None
    count = 0
    for one in frames:
        count += 1
        if first is None:
            first = parse(source, one)
        elif not _same(first.atoms, parse(source, one).atoms):
            number = len(frames) if isinstance(frames, Sequence) else "several"
            raise StructureError(
                f"{source.path} holds {number} models or frames, and number {count - 1} is not "
                "that of number 0; say which one to take: --frame, counted from 0, -1 is the last "
                "(in Python frame=...)"
            )
    if first is None:
        raise source.refusal("holds no atoms")
    return first, None if count == 1 else (0, count)


def _pick(frames: Iterable[Any], frame: int) -> tuple[Any, int]:
    """One of some frames, or None, and their number; no more than is needed is kept."""
    last: collections.deque[Any] = collections.deque(maxlen=max(-frame, 1))
    found, count = None, 0
    for count, one in enumerate(frames, start=1):
        last.append(one)
        found = one if count - 1 == frame else found
    if frame < 0 and count >= -frame:
        found = last[0]
    return found, count


def _same(first: Atoms, second: Atoms) -> bool:
    return (
        len(first) == len(second)
        and bool((first.numbers == second.numbers).all())
        and np.allclose(first.positions, second.positions, rtol=0, atol=1e-6)
        and np.allclose(first.cell.array, second.cell.array, rtol=0, atol=1e-6)
    )


def _finish(
    source: Source, content: Content, form: str, place: tuple[int, int] | None
) -> Structure:
    """The description, with topology and bonds, of what has been found good."""
    atoms, topology, pairs = content.atoms, None, content.bonds
    if content.labels is not None:
        stated = np.zeros((0, 2), int) if pairs is None else pairs
        pairs = implied_bonds(atoms, content.labels, stated)
        topology = build_topology(atoms, content.labels, pairs, content.formal_charges)
    structure = Structure(
        Path(source.name).stem,
        atoms,
        topology,
        labels=None if content.labels is None else tuple(content.labels),
        bonds=pairs,
        formal_charges=content.formal_charges,
        occupancies=content.occupancies,
        stated=tuple(content.stated),
        report=Report(
            str(source.path),
            form,
            place,
            content.count,
            tuple(content.left_out),
            tuple(content.notes),
        ),
    )
    return _say_charge(structure)


def _say_charge(structure: Structure) -> Structure:
    """Put a stated charge or spin where calculators look for it, or into the notes."""
    try:
        warnings = structure.check_charge()
    except StructureError:
        for one in structure.stated:
            structure.atoms.info.setdefault(one.key, one.value)
        return structure
    if not warnings:
        return structure
    # The calculator, which knows no residues, would refuse what is only a warning here.
    for one in structure.stated:
        structure.atoms.info.pop(one.key, None)
    report = structure.report
    report = dataclasses.replace(report, notes=(*report.notes, *warnings))
    return dataclasses.replace(structure, report=report)
