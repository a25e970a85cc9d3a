"""PDB files: read whole, whatever their atoms are called, and written as they were read.

Fixed columns are those of the Protein Data Bank's format, version 3.30.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.cell import Cell

from mlip_md.integrations.md.structures.description import (
    AtomLabel,
    Content,
    Structure,
    distinct_names,
    is_isotope,
)
from mlip_md.integrations.md.structures.records import Record, make_content
from mlip_md.integrations.md.structures.text import Line, Source

_ATOM = ("ATOM  ", "HETATM")
_LAST = 54
"""Column of the last digit of z; what ends before it was cut off in the middle of a number."""


def split(source: Source) -> list[list[Line]]:
    """Lines of each model, each with the cell before it; ENDMDL and END end one.

    Raises:
        StructureError: if there are no atoms.
    """
    frames: list[list[Line]] = []
    model: list[Line] = []
    cell: list[Line] = []
    for line in source.lines():
        if line.text.startswith("CRYST1"):
            cell = [line]
        elif line.text.startswith((*_ATOM, "TER")):
            model.append(line)
        elif line.text.startswith("END") and _has_atoms(model):
            frames.append(cell + model)
            model = []
    if _has_atoms(model):
        frames.append(cell + model)
    if not frames:
        raise source.refusal("has no atoms: it lacks lines that begin with ATOM or HETATM")
    return frames


def _has_atoms(lines: Sequence[Line]) -> bool:
    return any(line.text.startswith(_ATOM) for line in lines)


def parse(source: Source, frame: Sequence[Line]) -> Content:
    """One model.

    Raises:
        StructureError: as ``records.make_content``, or if a line is damaged.
    """
    records: list[Record] = []
    cell, group, segment, after = None, "", 0, ""
    for line in frame:
        if line.text.startswith("CRYST1"):
            cell, group = _cell(source, line), line.text[55:66]
        elif line.text.startswith("TER"):
            segment += 1
        else:
            chain = line.text[21:22].strip()
            if records and chain != after and records[-1].label.segment == segment:
                segment += 1
            after = chain
            records.append(_record(source, line, segment))
    return make_content(source, records, cell, group, _connections(source))


def _damaged(source: Source, line: Line, what: str) -> Exception:
    return source.refusal(
        f"is damaged or no PDB file: its {what} cannot be read in the columns of the format "
        f"({line.text.strip()[:60]!r})",
        line.number,
    )


def _record(source: Source, line: Line, segment: int) -> Record:
    text = line.text.ljust(80)
    try:
        if len(line.text.rstrip()) < _LAST:
            raise ValueError
        x, y, z = (float(text[k : k + 8]) for k in (30, 38, 46))
        occupancy = float(text[54:60]) if text[54:60].strip() else 1.0
    except ValueError as error:
        raise _damaged(source, line, "coordinates") from error
    name = text[12:16].strip()
    label = AtomLabel(
        name,
        text[17:21].strip(),
        text[22:26].strip(),
        text[26].strip(),
        text[21].strip(),
        segment,
    )
    element = text[76:78].strip()
    return Record(
        line.number,
        text[6:11].strip(),
        label,
        text[16].strip(),
        (x, y, z),
        occupancy,
        element if element.isalpha() else "",
        _charge(text[78:80]),
        text[12:16],
    )


def _charge(text: str) -> int | None:
    """Formal charge of columns 79-80: a digit and a sign, in either order."""
    found = re.fullmatch(r"(\d)([+-])|([+-])(\d)", text.strip())
    if found is None:
        return None
    digit, sign = (found.group(1) or found.group(4)), (found.group(2) or found.group(3))
    return int(sign + digit)


def _cell(source: Source, line: Line) -> list[float]:
    try:
        return [float(line.text[a:b]) for a, b in _CELL_COLUMNS]
    except ValueError as error:
        raise _damaged(source, line, "cell") from error


_CELL_COLUMNS = ((6, 15), (15, 24), (24, 33), (33, 40), (40, 47), (47, 54))


def _connections(source: Source) -> list[tuple[str, str]]:
    """Pairs of serials of the CONECT records, wherever they stand."""
    pairs = []
    for line in source.lines():
        if line.text.startswith("CONECT"):
            serials = [line.text[k : k + 5].strip() for k in range(6, 31, 5)]
            pairs += [(serials[0], other) for other in serials[1:] if other]
    return pairs


def format_pdb(structure: Structure, atoms: Atoms | None = None) -> str:
    """A structure as the text of a PDB file, with the residues, chains and names that it has.

    Args:
        structure: residues, names, formal charges and bonds.
        atoms: positions, elements and cell of now, in the same order; None is ``structure.atoms``.
            A cell that does not have its first vector along x, as the format wants it, is rotated
            together with the atoms.

    Returns:
        The text. A structure without residues gets one per molecule. Atoms of one residue get
        names that differ.
    """
    from mlip_md.integrations.md.structures.topology import labels_of

    atoms = structure.atoms if atoms is None else atoms
    labels = distinct_names(structure.labels or labels_of(atoms))
    lines, positions = [], atoms.get_positions()
    if atoms.pbc.any() and atoms.cell.rank == 3:
        a, b, c, alpha, beta, gamma = atoms.cell.cellpar()
        lines.append(
            f"CRYST1{a:9.3f}{b:9.3f}{c:9.3f}{alpha:7.2f}{beta:7.2f}{gamma:7.2f} P 1           1"
        )
        positions = positions @ _rotation(atoms).T
    serials = []
    serial = 0
    for index, label in enumerate(labels):
        if index and labels[index - 1].segment != label.segment:
            serial += 1
            lines.append(_terminus(labels[index - 1], serial))
        serial += 1
        serials.append(serial)
        lines.append(_atom_line(structure, atoms, index, label, serial, positions[index]))
    lines.append(_terminus(labels[-1], serial + 1))
    lines += _connect_lines(structure, labels, serials)
    return "\n".join([*lines, "END", ""])


def _rotation(atoms: Atoms) -> np.ndarray:
    """Rotation (3, 3) that puts the first cell vector along x and the second into the xy plane."""
    # A left-handed cell turned inside out is the same lattice; a mirror image would not be.
    cell = atoms.cell if atoms.cell.handedness > 0 else Cell(-atoms.cell.array)
    return np.asarray(cell.standard_form()[1])


def _terminus(label: AtomLabel, serial: int) -> str:
    place = f"{label.residue_name:<4.4s}{label.chain:1.1s}{label.residue_id[-4:]:>4s}"
    return f"TER   {_serial(serial):>5s}      {place}{label.insertion_code:1.1s}".rstrip()


def _serial(serial: int) -> str:
    """Five columns; beyond 99999 hexadecimal from A0000 on, as OpenMM and VMD read it."""
    return str(serial) if serial < 100000 else f"{serial - 100000 + 0xA0000:X}"[-5:]


def _atom_line(
    structure: Structure,
    atoms: Atoms,
    index: int,
    label: AtomLabel,
    serial: int,
    position: np.ndarray,
) -> str:
    from mlip_md.integrations.residue_names import is_standard

    symbol = _symbol(atoms, index)
    name = label.name[:4]
    name = f" {name:<3s}" if len(name) < 4 and len(symbol) == 1 else f"{name:<4s}"
    charge = 0 if structure.formal_charges is None else structure.formal_charges[index]
    sign = f"{abs(charge)}{'+' if charge > 0 else '-'}" if charge else ""
    kind = "ATOM  " if is_standard(label.residue_name) else "HETATM"
    x, y, z = (_coordinate(value) for value in position)
    return (
        f"{kind}{_serial(serial):>5s} {name} {label.residue_name:<4.4s}{label.chain:1.1s}"
        f"{label.residue_id[-4:]:>4s}{label.insertion_code:1.1s}   {x}{y}{z}{1.0:6.2f}"
        f"{0.0:6.2f}          {symbol.upper():>2s}{sign}"
    )


def _coordinate(value: float) -> str:
    """Eight columns: fewer decimals rather than too many columns."""
    text = f"{value:8.3f}"
    return text if len(text) == 8 else text[:8]


def _symbol(atoms: Atoms, index: int) -> str:
    for isotope in "DT":
        if is_isotope(atoms[[index]], isotope)[0]:
            return isotope
    return str(atoms.symbols[index])


def _connect_lines(
    structure: Structure, labels: Sequence[AtomLabel], serials: Sequence[int]
) -> list[str]:
    """CONECT records of bonds that residue names do not imply."""
    from mlip_md.integrations.residue_names import is_standard, is_water

    if structure.bonds is None:
        return []
    neighbors: dict[int, list[int]] = {}
    for i, j in structure.bonds.tolist():
        name = labels[i].residue_name
        implied = is_standard(name) or is_water(name)
        if implied and labels[i].residue == labels[j].residue:
            continue
        neighbors.setdefault(i, []).append(j)
        neighbors.setdefault(j, []).append(i)
    lines = []
    for i, others in sorted(neighbors.items()):
        for k in range(0, len(others), 4):
            group = [i, *others[k : k + 4]]
            lines.append("CONECT" + "".join(f"{_serial(serials[m]):>5s}" for m in group))
    return lines
