"""MDL molfiles and SDF files, V2000 and V3000 (BIOVIA, CTfile Formats)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from mlip_md.integrations.charges import Stated
from mlip_md.integrations.md.structures.description import Content, make_atoms, set_masses
from mlip_md.integrations.md.structures.text import Line, Source
from mlip_md.integrations.residue_names import stated_element

_CHARGES = {1: 3, 2: 2, 3: 1, 5: -1, 6: -2, 7: -3}
"""Charge by its code in the atom block; 4 is a doublet radical."""

_MULTIPLICITY = {1: 1, 2: 2, 3: 3}
"""Multiplicity of a radical centre by its code: singlet, doublet, triplet."""


@dataclasses.dataclass
class _Table:
    """A connection table: atoms, bonds and what its properties say of them, by index."""

    symbols: list[str] = dataclasses.field(default_factory=list)
    positions: list[list[float]] = dataclasses.field(default_factory=list)
    bonds: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
    charges: dict[int, int] = dataclasses.field(default_factory=dict)
    radicals: dict[int, int] = dataclasses.field(default_factory=dict)
    masses: dict[int, float] = dataclasses.field(default_factory=dict)


def split(source: Source) -> list[list[Line]]:
    """Lines of each molecule, up to the $$$$ after it."""
    frames: list[list[Line]] = [[]]
    for line in source.lines():
        if line.text.startswith("$$$$"):
            frames.append([])
        else:
            frames[-1].append(line)
    return [frame for frame in frames if any(line.text.strip() for line in frame)]


def parse(source: Source, frame: Sequence[Line]) -> Content:
    """One molecule.

    Raises:
        StructureError: if it is damaged, a drawing in two dimensions, or lacks its hydrogens.
    """
    if len(frame) < 4:
        raise source.refusal("is no molfile: it has no counts line", frame[0].number)
    table = _read_v3000(source, frame) if "V3000" in frame[3].text else _read_v2000(source, frame)
    atoms = make_atoms(table.symbols, table.positions)
    set_masses(atoms, table.masses)
    notes = _refuse_drawing(source, frame, table)
    _refuse_implicit_hydrogens(source, frame, table)
    formal = np.array([table.charges.get(i, 0) for i in range(len(atoms))])
    stated = []
    if formal.any():
        stated.append(Stated(f"the charge in {source.path}", "charge", int(formal.sum())))
    unpaired = sum(_MULTIPLICITY.get(code, 1) - 1 for code in table.radicals.values())
    if unpaired:
        stated.append(Stated(f"the spin in {source.path}", "multiplicity", unpaired + 1))
    pairs = np.array([sorted(bond[:2]) for bond in table.bonds], int).reshape(-1, 2)
    return Content(
        atoms,
        len(atoms),
        bonds=np.unique(pairs, axis=0) if len(pairs) else pairs,
        formal_charges=formal if formal.any() else None,
        stated=stated,
        notes=notes,
    )


def _damaged(source: Source, line: Line, error: Exception | None = None) -> NoReturn:
    raise source.refusal(
        f"is {line.text.strip()[:50]!r}, which is not what a molfile has there; it is cut off or "
        "damaged",
        line.number,
    ) from error


def _symbol(source: Source, line: Line, text: str) -> str:
    symbol = stated_element(text)
    if symbol is None or text[-1:] in "+-0123456789":
        raise source.refusal(
            f"names {text!r}, which is no chemical element; write its symbol", line.number
        )
    return symbol


def _read_v2000(source: Source, frame: Sequence[Line]) -> _Table:
    counts = frame[3]
    try:
        n_atoms, n_bonds = int(counts.text[:3]), int(counts.text[3:6])
    except ValueError as error:
        _damaged(source, counts, error)
    if n_atoms < 1:
        raise source.refusal("announces no atoms", counts.number)
    if len(frame) < 4 + n_atoms + n_bonds:
        raise source.refusal(
            f"announces {n_atoms} atoms and {n_bonds} bonds, and {len(frame) - 4} lines follow; "
            "the file was cut off",
            counts.number,
        )
    table = _Table()
    for index, line in enumerate(frame[4 : 4 + n_atoms]):
        _v2000_atom(source, line, index, table)
    for line in frame[4 + n_atoms : 4 + n_atoms + n_bonds]:
        try:
            i, j, order = (int(line.text[k : k + 3]) for k in (0, 3, 6))
        except ValueError as error:
            _damaged(source, line, error)
        if not (1 <= i <= n_atoms and 1 <= j <= n_atoms):
            _damaged(source, line)
        table.bonds.append((i - 1, j - 1, order))
    _v2000_properties(source, frame[4 + n_atoms + n_bonds :], table)
    return table


def _v2000_atom(source: Source, line: Line, index: int, table: _Table) -> None:
    text = line.text.ljust(40)
    try:
        position = [float(text[k : k + 10]) for k in (0, 10, 20)]
        shift, code = (int(text[k : k + w].strip() or 0) for k, w in ((34, 2), (36, 3)))
    except ValueError as error:
        _damaged(source, line, error)
    symbol = _symbol(source, line, text[31:34].strip())
    table.symbols.append(symbol)
    table.positions.append(position)
    if shift:
        from ase.data import atomic_masses, atomic_numbers

        number = atomic_numbers["H" if symbol in "DT" else symbol]
        table.masses[index] = round(float(atomic_masses[number])) + shift
    if code in _CHARGES:
        table.charges[index] = _CHARGES[code]
    if code == 4:
        table.radicals[index] = 2


def _v2000_properties(source: Source, lines: Sequence[Line], table: _Table) -> None:
    """M  CHG, M  RAD and M  ISO lines; the first two replace what the atom block says of both."""
    found: dict[str, dict[int, int]] = {"CHG": {}, "RAD": {}, "ISO": {}}
    ended = False
    for line in lines:
        ended = ended or line.text.startswith("M  END")
        key = line.text[3:6]
        if ended or not line.text.startswith("M  ") or key not in found:
            continue
        try:
            words = [int(word) for word in line.text[6:].split()]
            pairs = dict(zip(words[1::2], words[2::2], strict=True))
        except (ValueError, IndexError) as error:
            _damaged(source, line, error)
        if not all(1 <= atom <= len(table.symbols) for atom in pairs):
            _damaged(source, line)
        found[key] |= {atom - 1: value for atom, value in pairs.items()}
    if found["CHG"] or found["RAD"]:
        table.charges, table.radicals = found["CHG"], found["RAD"]
    if found["ISO"]:
        table.masses = {i: float(mass) for i, mass in found["ISO"].items()}
    if not ended:
        number = lines[-1].number if lines else None
        raise source.refusal("ends without M  END; the file was cut off", number)


def _read_v3000(source: Source, frame: Sequence[Line]) -> _Table:
    table, numbers, announced, block = _Table(), {}, (0, 0), ""
    for line in _joined(frame[4:]):
        words = line.text.split()
        if words[:1] in (["BEGIN"], ["END"]):
            block = words[1] if words[0] == "BEGIN" else ""
            continue
        try:
            if words[0] == "COUNTS":
                announced = int(words[1]), int(words[2])
            elif block == "ATOM":
                numbers[int(words[0])] = len(table.symbols)
                table.symbols.append(_symbol(source, line, words[1]))
                table.positions.append([float(word) for word in words[2:5]])
                _v3000_options(words[6:], len(table.symbols) - 1, table)
            elif block == "BOND":
                i, j = numbers[int(words[2])], numbers[int(words[3])]
                table.bonds.append((i, j, int(words[1])))
        except (ValueError, IndexError, KeyError) as error:
            _damaged(source, line, error)
    if announced != (len(table.symbols), len(table.bonds)) or not table.symbols:
        raise source.refusal(
            f"announces {announced[0]} atoms and {announced[1]} bonds; the file has "
            f"{len(table.symbols)} and {len(table.bonds)}: it was cut off or is damaged",
            frame[3].number,
        )
    return table


def _joined(lines: Sequence[Line]) -> list[Line]:
    """What stands behind "M  V30", with lines that end in a hyphen continued."""
    joined: list[Line] = []
    going_on = False
    for line in lines:
        if not line.text.startswith("M  V30"):
            continue
        text = line.text[6:].strip()
        if going_on:
            joined[-1] = Line(joined[-1].number, joined[-1].text[:-1] + text)
        elif text:
            joined.append(Line(line.number, text))
        going_on = text.endswith("-")
    return joined


def _v3000_options(words: Sequence[str], index: int, table: _Table) -> None:
    for word in words:
        key, _, value = word.partition("=")
        if key == "CHG" and int(value):
            table.charges[index] = int(value)
        elif key == "RAD" and int(value):
            table.radicals[index] = int(value)
        elif key == "MASS":
            table.masses[index] = float(value)


def _refuse_drawing(source: Source, frame: Sequence[Line], table: _Table) -> list[str]:
    """Two-dimensional drawings are no structures; returns notes."""
    code = frame[1].text[20:22].upper()
    flat = not any(position[2] for position in table.positions)
    neighbors = np.bincount(
        np.array([bond[:2] for bond in table.bonds], int).ravel(), minlength=len(table.symbols)
    )
    if flat and len(table.symbols) > 1 and (code == "2D" or (code != "3D" and max(neighbors) > 3)):
        raise source.refusal(
            "holds a two-dimensional drawing, all of its z coordinates are 0; make coordinates in "
            "three dimensions first (RDKit, Open Babel: --gen3d)",
            frame[1].number,
        )
    return ["it calls itself 2D and has z coordinates, which are taken"] if code == "2D" else []


def _refuse_implicit_hydrogens(source: Source, frame: Sequence[Line], table: _Table) -> None:
    """A molecule without any hydrogen, with carbons that lack bonds, has them implied."""
    if any(symbol in ("H", "D", "T") for symbol in table.symbols):
        return
    orders = np.zeros(len(table.symbols))
    for i, j, order in table.bonds:
        orders[[i, j]] += {4: 1.5}.get(order, order)
    for index, symbol in enumerate(table.symbols):
        stated = index in table.charges or index in table.radicals
        if symbol == "C" and 0 < orders[index] < 4 and not stated:
            raise source.refusal(
                f"holds a molecule without hydrogens, atom {index + 1} (C) lacks some; add them "
                "with their positions (RDKit, Open Babel: -h)",
                frame[0].number,
            )
