"""XYZ and extended XYZ files: ASE reads them, after a look at what it would misread or not say."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import numpy as np
from ase import Atoms

from mlip_md.elements import ATOMIC_NUMBERS
from mlip_md.integrations.charges import stated_in_info
from mlip_md.integrations.md.structures.description import Content, set_masses
from mlip_md.integrations.md.structures.labels import remove_labels
from mlip_md.integrations.md.structures.text import Line, Source
from mlip_md.integrations.residue_names import ISOTOPE_MASSES, VIRTUAL, stated_element

_PROPERTIES = re.compile(r"""\bProperties\s*=\s*(?:"([^"]*)"|'([^']*)'|(\S+))""")


def split(source: Source) -> list[list[Line]]:
    """Lines of each frame: number of atoms, comment, atoms, and cell vectors after them (VEC).

    Raises:
        StructureError: where a frame does not have the atoms that it announces.
    """
    lines = source.lines(strict=True)
    frames, at = [], 0
    while at < len(lines):
        if not lines[at].text.strip():
            at += 1
            continue
        count = _count(source, lines[at])
        end = at + 2 + count
        if end > len(lines):
            raise source.refusal(
                f"announces {count} atoms and {max(len(lines) - at - 2, 0)} follow; the file was "
                "cut off or the number is wrong",
                lines[at].number,
            )
        while end < len(lines) and lines[end].text.lstrip().startswith("VEC"):
            end += 1
        frames.append(lines[at:end])
        at = end
    return frames


def _count(source: Source, line: Line) -> int:
    try:
        count = int(line.text)
    except ValueError:
        count = -1
    if count < 0:
        raise source.refusal(
            f"should be the number of atoms of a frame and is {line.text.strip()[:40]!r}; a frame "
            "has that number, a comment line, and exactly so many lines of atoms",
            line.number,
        )
    if count == 0:
        raise source.refusal("holds no atoms: their number is 0", line.number)
    return count


def parse(source: Source, frame: Sequence[Line]) -> Content:
    """One frame.

    Raises:
        StructureError: if an element is unknown or the frame cannot be read.
    """
    from ase.io.extxyz import read_xyz

    count = int(frame[0].text)
    at = _species_column(frame[1].text)
    lines = [line.text for line in frame]
    masses: dict[int, float] = {}
    for index, line in enumerate(frame[2 : 2 + count]):
        if at is None:
            break
        words = line.text.split()
        symbol = stated_element(words[at]) if len(words) > at and _is_symbol(words[at]) else None
        if symbol is None:
            given = words[at] if len(words) > at else line.text
            raise source.refusal(
                f"names {given!r}, which is no chemical element; write its symbol", line.number
            )
        if symbol in ISOTOPE_MASSES:
            masses[index] = ISOTOPE_MASSES[symbol]
            symbol = "H"
        words[at] = symbol
        lines[index + 2] = " ".join(words)
    try:
        atoms = next(read_xyz(io.StringIO("\n".join(lines) + "\n"), index=0))
    except Exception as error:
        raise source.refusal(
            f"begins a frame that ASE cannot read ({type(error).__name__}: {error}); compare it "
            "with the extended XYZ format",
            frame[0].number,
        ) from error
    return _content(source, frame, atoms, count, masses)


def _is_symbol(word: str) -> bool:
    """Labels such as H1 are none: who writes them may number the atoms or mean a charge."""
    return stated_element(word) == VIRTUAL or word.capitalize() in {*ATOMIC_NUMBERS, "D", "T"}


def _content(
    source: Source, frame: Sequence[Line], atoms: Atoms, count: int, masses: dict[int, float]
) -> Content:
    if "mass" in atoms.arrays and "masses" not in atoms.arrays:
        atoms.set_masses(np.asarray(atoms.arrays["mass"], float))
    else:
        set_masses(atoms, {} if "masses" in atoms.arrays else masses)
    if "masses" in atoms.arrays and not (atoms.get_masses() > 0).all():
        first = int(np.argmin(atoms.get_masses() > 0))
        raise source.refusal(
            f"gives an atom the mass {atoms.get_masses()[first]:g}; masses must be positive",
            frame[2 + first].number,
        )
    stated = stated_in_info(atoms.info)
    left_out = remove_labels(atoms)
    return Content(atoms, count, stated=stated, left_out=left_out)


def _species_column(comment: str) -> int | None:
    """Number of the word in an atom's line that is its symbol; None if there are numbers only."""
    found = _PROPERTIES.search(comment)
    if found is None:
        return 0
    fields = next(group for group in found.groups() if group is not None).split(":")
    at = 0
    for name, width in zip(fields[::3], fields[2::3], strict=False):
        if name == "species":
            return at
        at += int(width) if width.isdigit() else 0
    return None
