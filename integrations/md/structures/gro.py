"""GRO files (GROMACS), at any precision, with velocities and several frames.

The format has no elements: they follow from the names of atoms and residues, and what these leave
open is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from ase import units

from mlip_md.constants import ANGSTROM_PER_NM
from mlip_md.integrations.md.structures.description import AtomLabel, Content, make_atoms
from mlip_md.integrations.md.structures.text import Line, Source
from mlip_md.integrations.residue_names import named_element

_FIRST = 20
"""Characters before the coordinates: residue number, residue, atom, atom number, five each."""


def split(source: Source) -> list[list[Line]]:
    """Lines of each frame: title, number of atoms, atoms, cell.

    Raises:
        StructureError: where a frame does not have the atoms that it announces, or has no cell.
    """
    lines = source.lines()
    frames, at = [], 0
    while at < len(lines):
        if not any(line.text.strip() for line in lines[at:]):
            break
        try:
            count = int(lines[at + 1].text)
        except (IndexError, ValueError) as error:
            raise source.refusal(
                "is the title of a frame, after which its number of atoms must stand",
                lines[at].number,
            ) from error
        if count < 1:
            raise source.refusal("holds no atoms", lines[at + 1].number)
        end = at + 3 + count
        if end > len(lines):
            there = max(len(lines) - at - 2, 0)
            raise source.refusal(
                f"announces {count} atoms, after which the cell must stand, and {there} lines "
                "follow; the file was cut off",
                lines[at + 1].number,
            )
        _cell(source, lines[end - 1])
        frames.append(lines[at:end])
        at = end
    return frames


def parse(source: Source, frame: Sequence[Line]) -> Content:
    """One frame.

    Raises:
        StructureError: if a line is none of an atom, or the element of one is left open.
    """
    rows = frame[2:-1]
    width = _width(source, rows[0])
    numbers = np.array([_numbers(source, row, width) for row in rows])
    labels = [
        AtomLabel(row.text[10:15].strip(), row.text[5:10].strip(), row.text[:5].strip())
        for row in rows
    ]
    symbols = _symbols(source, rows, labels)
    cell = _cell(source, frame[-1])
    atoms = make_atoms(symbols, ANGSTROM_PER_NM * numbers[:, :3], cell=cell, pbc=cell is not None)
    if numbers.shape[1] == 6 and numbers[:, 3:].any():
        atoms.set_velocities(numbers[:, 3:] * units.nm / (1000 * units.fs))
    return Content(atoms, len(rows), labels=labels)


def _width(source: Source, row: Line) -> int:
    """Characters of a coordinate: the distance between two decimal points, as GROMACS has it."""
    points = [found.start() for found in re.finditer(r"\.", row.text[_FIRST:])]
    if len(points) < 3 or points[1] - points[0] != points[2] - points[1]:
        raise _no_atom(source, row)
    return points[1] - points[0]


def _numbers(source: Source, row: Line, width: int) -> list[float]:
    """Coordinates (nm) of an atom, and its velocities (nm/ps) if it has some."""
    text = row.text.rstrip()
    fields = [text[_FIRST + i * width : _FIRST + (i + 1) * width] for i in range(6)]
    fields = fields[:3] if not any(field.strip() for field in fields[3:]) else fields
    try:
        if "." not in text[_FIRST : _FIRST + width] or not text[:5].strip().lstrip("-").isdigit():
            raise ValueError
        return [float(field) for field in fields]
    except ValueError as error:
        raise _no_atom(source, row) from error


def _no_atom(source: Source, row: Line) -> Exception:
    return source.refusal(
        f"should be an atom and is {row.text.strip()[:50]!r}; the number of atoms is wrong or the "
        "file damaged",
        row.number,
    )


def _symbols(source: Source, rows: Sequence[Line], labels: Sequence[AtomLabel]) -> list[str]:
    symbols = []
    for index, (row, label) in enumerate(zip(rows, labels, strict=True)):
        around = [*labels[max(index - 1, 0) : index], *labels[index + 1 : index + 2]]
        alone = all(other.residue != label.residue for other in around)
        symbol = named_element(label.name, label.residue_name, alone=alone)
        if symbol is None:
            raise source.refusal(
                f"names an atom {label.name} in residue {label.residue_name}, which can be of "
                "more than one element, and GRO files state none; give a PDB file with elements, "
                "or write the name like the symbol (Ca, not CA)",
                row.number,
            )
        symbols.append(symbol)
    return symbols


def _cell(source: Source, line: Line) -> np.ndarray | None:
    """Cell vectors (3, 3) in Å; None without one."""
    words = line.text.split()
    try:
        values = ANGSTROM_PER_NM * np.array([float(word) for word in words])
    except ValueError:
        values = np.zeros(1)
    if len(values) not in (0, 3, 9):
        raise source.refusal(
            f"should be the cell (3 or 9 numbers) and is {line.text.strip()[:50]!r}; the number "
            "of atoms is wrong or the file damaged",
            line.number,
        )
    if not values.any():
        return None
    cell = np.diag(values[:3])
    if len(values) == 9:
        cell.flat[[1, 2, 3, 5, 6, 7]] = values[3:]
    return cell
