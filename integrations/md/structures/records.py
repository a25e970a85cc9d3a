"""What PDB and mmCIF files have in common: sites of residues, alternates, cells, symmetry."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from ase.cell import Cell

from mlip_md.integrations.charges import Stated
from mlip_md.integrations.md.structures.description import AtomLabel, Content, make_atoms
from mlip_md.integrations.md.structures.text import Source
from mlip_md.integrations.residue_names import named_element, stated_element
from mlip_md.integrations.statements import find_alternatives


@dataclasses.dataclass(frozen=True)
class Record:
    """A site of a PDB or mmCIF file.

    Attributes:
        line: its number in the file.
        serial: of the atom, as bonds name it.
        label: name, residue, chain.
        alternate: name of the alternate location, empty if there is one location.
        position: Å.
        occupancy: 1 if not stated.
        element: as stated; empty if not.
        charge: formal, None if not stated.
        columns: the four columns of a PDB file with the name, whose place tells elements of one
            letter from those of two; empty elsewhere.
    """

    line: int
    serial: str
    label: AtomLabel
    alternate: str
    position: tuple[float, float, float]
    occupancy: float = 1.0
    element: str = ""
    charge: int | None = None
    columns: str = ""


def choose_alternates(records: Sequence[Record]) -> tuple[list[Record], list[str]]:
    """Keep one location of every atom.

    In a residue with alternate locations the one of the highest mean occupancy is kept, the first
    of equal ones; an atom that is not there in it keeps its own most occupied location.

    Returns:
        The records that stay, and what was left out, for the report.
    """
    sites = defaultdict(list)
    for record in records:
        if record.alternate:
            label = record.label
            sites[label.segment, label.chain, label.residue_id, label.insertion_code].append(record)
    dropped: set[int] = set()
    for alternates in sites.values():
        best = _most_occupied(alternates)
        residue = next(r.label.residue_name for r in alternates if r.alternate == best)
        by_name = defaultdict(list)
        for record in alternates:
            by_name[record.label.residue_name, record.label.name].append(record)
        for (residue_name, _), same in by_name.items():
            there = {record.alternate for record in same}
            keep = best if best in there else _most_occupied(same)
            wanted = residue_name == residue
            dropped |= {id(r) for r in same if not wanted or r.alternate != keep}
    if not dropped:
        return list(records), []
    names = sorted({record.alternate for record in records if id(record) in dropped})
    why = f"{', '.join(names)}: less occupied, or not the first"
    said = f"{len(dropped)} alternate locations ({why})"
    return [record for record in records if id(record) not in dropped], [said]


def _most_occupied(records: Sequence[Record]) -> str:
    occupancies = defaultdict(list)
    for record in records:
        occupancies[record.alternate].append(record.occupancy)
    return max(occupancies, key=lambda name: float(np.mean(occupancies[name])))


def make_content(
    source: Source,
    records: Sequence[Record],
    cell: Sequence[float] | None,
    space_group: str,
    bonds: Sequence[tuple[str, str]] = (),
) -> Content:
    """One frame of a PDB or mmCIF file.

    Args:
        source: the file.
        records: sites of the frame.
        cell: lengths (Å) and angles (degrees), or None.
        space_group: as the file names it; empty if it does not.
        bonds: pairs of serials.

    Raises:
        StructureError: if elements are left open, sites are alternatives that nothing names, or
            the file holds the asymmetric unit of a crystal only.
    """
    kept, left_out = choose_alternates(records)
    notes: list[str] = []
    vectors = _cell(source, cell, space_group, left_out)
    symbols = _symbols(source, kept)
    positions = np.array([record.position for record in kept])
    atoms = make_atoms(symbols, positions, cell=vectors, pbc=vectors is not None)
    occupancies = np.array([record.occupancy for record in kept])
    _look_at_occupancies(source, kept, positions, occupancies, notes)
    charges = [record.charge for record in kept]
    stated = []
    if any(charge is not None for charge in charges):
        total = sum(charge or 0 for charge in charges)
        stated = [Stated(f"the sum of the formal charges in {source.path}", "charge", total)]
    times = Counter(record.serial for record in records)
    # Beyond 99999 atoms some programs begin to count again: such a number names no atom.
    index = {record.serial: i for i, record in enumerate(kept) if times[record.serial] == 1}
    pairs = {tuple(sorted((index[a], index[b]))) for a, b in bonds if a in index and b in index}
    return Content(
        atoms,
        len(records),
        labels=[record.label for record in kept],
        bonds=np.array(sorted(pair for pair in pairs if pair[0] != pair[1]), int).reshape(-1, 2),
        formal_charges=np.array([charge or 0 for charge in charges]) if stated else None,
        occupancies=occupancies if (occupancies != 1).any() else None,
        stated=stated,
        left_out=left_out,
        notes=notes,
    )


def _cell(
    source: Source, cell: Sequence[float] | None, space_group: str, left_out: list[str]
) -> np.ndarray | None:
    """Cell vectors (3, 3); None without a cell, or with one that only fills a place."""
    if cell is None or not any(cell[:3]):
        return None
    if not np.isfinite(cell).all() or not all(0 < angle < 180 for angle in cell[3:]):
        raise source.refusal(
            f"has a cell of angles {' '.join(f'{angle:g}' for angle in cell[3:])}; give the real "
            "one, or remove it (the CRYST1 line of a PDB file)"
        )
    if list(cell[:3]) == [1, 1, 1]:
        left_out.append("the cell of 1 x 1 x 1 Å (it only fills a place)")
        return None
    if space_group.replace(" ", "").upper() not in ("", "P1", "?", "."):
        raise source.refusal(
            f"holds the asymmetric unit of a crystal of space group {space_group.strip()}, not its "
            "whole cell; apply the symmetry and call the group P 1, or remove the cell (the CRYST1 "
            "line of a PDB file) to compute the molecules alone"
        )
    return np.array(Cell.fromcellpar(cell).array)


def _symbols(source: Source, records: Sequence[Record]) -> list[str]:
    sizes: dict[tuple, int] = defaultdict(int)
    for record in records:
        sizes[record.label.residue] += 1
    symbols = []
    for record in records:
        symbol = stated_element(record.element) if record.element else None
        label = record.label
        if symbol is None:
            alone = sizes[label.residue] == 1
            symbol = named_element(label.name, label.residue_name, alone=alone)
        if symbol is None and record.columns[:1] in (" ", *"0123456789"):
            symbol = stated_element(record.columns.lstrip(" 0123456789")[:1])
        if symbol is None:
            raise source.refusal(
                f"does not state the element of {label}, and its name can mean more than one; "
                "write the elements (columns 77-78 of a PDB file)",
                record.line,
            )
        symbols.append(symbol)
    return symbols


def _look_at_occupancies(
    source: Source,
    records: Sequence[Record],
    positions: np.ndarray,
    occupancies: np.ndarray,
    notes: list[str],
) -> None:
    """Partly occupied sites are noted, and refused where they stand in each other's place."""
    partly = np.flatnonzero((occupancies > 0) & (occupancies < 1))
    if not len(partly):
        return
    if pair := find_alternatives(positions, occupancies):
        first, second = (records[i] for i in pair)
        raise source.refusal(
            f"and line {second.line} hold alternatives, {first.label} and {second.label}, which "
            "are partly occupied and no alternate locations by name; keep one of them",
            first.line,
        )
    alone = sum(not records[i].alternate for i in partly.tolist())
    if alone:
        notes.append(f"{alone} partly occupied atoms without alternates are taken as whole ones")
