"""PDBx/mmCIF files, and the words and loops of STAR files in general."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mlip_md.integrations.md.structures.description import AtomLabel, Content
from mlip_md.integrations.md.structures.records import Record, make_content
from mlip_md.integrations.md.structures.text import Source

_WORD = re.compile(r"""\s*(?:\#.*|'(.*?)'(?=\s|$)|"(.*?)"(?=\s|$)|(\S+))""")
_NONE = (".", "?")


class Word(NamedTuple):
    """A word of a STAR file: its line, its text, and whether it stood in quotes."""

    line: int
    text: str
    quoted: bool = False


class Table(NamedTuple):
    """Columns by name in lower case, of equal length, and the line of each row."""

    columns: dict[str, list[str]]
    lines: list[int]

    def get(self, *names: str, default: str = "") -> list[str]:
        """The first column there is; else the default for every row. No value is empty."""
        for name in names:
            if name in self.columns:
                return ["" if value in _NONE else value for value in self.columns[name]]
        return [default] * len(self.lines)


def words(source: Source) -> Iterator[Word]:
    """Words of a STAR file; text between lines that begin with a semicolon is one."""
    text: list[str] | None = None
    start = 0
    for line in source.lines():
        if line.text.startswith(";"):
            if text is None:
                text, start = [line.text[1:]], line.number
            else:
                yield Word(start, "\n".join(text), True)
                text = None
                yield from _split(line.number, line.text[1:])
        elif text is not None:
            text.append(line.text)
        else:
            yield from _split(line.number, line.text)
    if text is not None:
        raise source.refusal("begins a text that no semicolon ends; the file was cut off", start)


def _split(number: int, text: str) -> Iterator[Word]:
    for found in _WORD.finditer(text):
        single, double, plain = found.groups()
        if plain is not None:
            yield Word(number, plain)
        elif single is not None or double is not None:
            yield Word(number, single if single is not None else double, True)


def tables(source: Source, category: str) -> list[Table]:
    """What the file says under a category, such as "_atom_site.", once for each data block.

    Raises:
        StructureError: if a row of a loop lacks values.
    """
    found: list[Table] = []
    current: Table | None = None
    stream = list(words(source))
    at = 0
    while at < len(stream):
        word = stream[at]
        text = "" if word.quoted else word.text.lower()
        if text.startswith("data_"):
            current = None
        at += 1
        names: list[str] = []
        if text == "loop_":
            while at < len(stream) and not stream[at].quoted and stream[at].text.startswith("_"):
                names.append(stream[at].text.lower())
                at += 1
            values, at = _values(stream, at)
            if names and names[0].startswith(category):
                found.append(_loop(source, word, names, values, category))
        elif text.startswith(category) and at < len(stream):
            if current is None:
                current = Table({}, [word.line])
                found.append(current)
            current.columns[text.removeprefix(category)] = [stream[at].text]
            at += 1
    return found


def _values(stream: Sequence[Word], at: int) -> tuple[list[Word], int]:
    begin = at
    while at < len(stream) and (stream[at].quoted or not _is_keyword(stream[at].text)):
        at += 1
    return list(stream[begin:at]), at


def _is_keyword(text: str) -> bool:
    return text.startswith("_") or text.lower() == "loop_" or text.lower().startswith("data_")


def _loop(
    source: Source, begin: Word, names: Sequence[str], values: Sequence[Word], category: str
) -> Table:
    if len(values) % len(names):
        line = values[-1].line if values else begin.line
        raise source.refusal(
            f"ends a loop of {len(names)} columns in the middle of a row; the file was cut off or "
            "a value lacks its quotes",
            line,
        )
    width = len(names)
    columns = {
        name.removeprefix(category): [word.text for word in values[k::width]]
        for k, name in enumerate(names)
    }
    return Table(columns, [word.line for word in values[::width]])


def split(source: Source) -> list[list[Record]]:
    """Records of each model.

    Raises:
        StructureError: if there are no atoms, or a coordinate is no number.
    """
    sites = next(iter(tables(source, "_atom_site.")), None)
    if sites is None or not sites.lines:
        raise source.refusal("holds no atoms: there is no loop of _atom_site")
    models: dict[str, list[Record]] = {}
    for model, record in zip(sites.get("pdbx_pdb_model_num"), _records(source, sites), strict=True):
        models.setdefault(model, []).append(record)
    return list(models.values())


def _records(source: Source, sites: Table) -> Iterator[Record]:
    columns = zip(
        sites.lines,
        sites.get("id"),
        sites.get("auth_atom_id", "label_atom_id"),
        sites.get("auth_comp_id", "label_comp_id"),
        sites.get("auth_seq_id", "label_seq_id"),
        sites.get("pdbx_pdb_ins_code"),
        sites.get("auth_asym_id", "label_asym_id"),
        sites.get("label_asym_id", "auth_asym_id"),
        sites.get("label_alt_id"),
        sites.get("type_symbol"),
        sites.get("pdbx_formal_charge"),
        sites.get("occupancy"),
        zip(*(sites.get(f"cartn_{axis}") for axis in "xyz"), strict=True),
        strict=True,
    )
    segment, before = -1, None
    for line, serial, name, residue, number, code, chain, asym, alt, el, charge, occ, at in columns:
        if (chain, asym) != before:
            segment, before = segment + 1, (chain, asym)
        try:
            x, y, z = (float(value) for value in at)
            occupancy = float(occ) if occ else 1.0
            formal = int(charge) if charge else None
        except ValueError as error:
            raise source.refusal(
                f"gives atom {name} of {residue} {number} a coordinate, occupancy or charge that "
                "is no number; the file is damaged",
                line,
            ) from error
        label = AtomLabel(name, residue, number, code, chain, segment)
        yield Record(line, serial, label, alt, (x, y, z), occupancy, el, formal)


def parse(source: Source, frame: Sequence[Record]) -> Content:
    """One model.

    Raises:
        StructureError: as ``records.make_content``.
    """
    names = [f"length_{axis}" for axis in "abc"] + [
        f"angle_{angle}" for angle in ("alpha", "beta", "gamma")
    ]
    cell = None
    for table in tables(source, "_cell."):
        given = [table.get(name)[0] for name in names]
        try:
            cell = [float(value.partition("(")[0]) for value in given] if all(given) else None
        except ValueError as error:
            raise source.refusal(
                f"has a cell that is no number ({' '.join(given)}); is it damaged?", table.lines[0]
            ) from error
    group = ""
    for category in ("_symmetry.", "_space_group."):
        for table in tables(source, category):
            group = group or table.get("space_group_name_h-m", "name_h-m_alt")[0]
    return make_content(source, frame, cell, group, _connections(source))


def _connections(source: Source) -> list[tuple[str, str]]:
    """Pairs of atom ids that struct_conn calls covalent, disulfide or modified residues."""
    sites = tables(source, "_atom_site.")[0]
    keys = zip(
        sites.get("label_asym_id", "auth_asym_id"),
        sites.get("label_seq_id"),
        sites.get("label_atom_id", "auth_atom_id"),
        strict=True,
    )
    serial_of: dict[tuple, str] = {}
    for key, serial in zip(keys, sites.get("id"), strict=True):
        serial_of.setdefault(key, serial)
    pairs = []
    for table in tables(source, "_struct_conn."):
        ends = [
            zip(
                table.get(f"ptnr{k}_label_asym_id"),
                table.get(f"ptnr{k}_label_seq_id"),
                table.get(f"ptnr{k}_label_atom_id"),
                strict=True,
            )
            for k in (1, 2)
        ]
        for kind, first, second in zip(table.get("conn_type_id"), *ends, strict=True):
            if kind[:6].lower() in ("covale", "disulf", "modres"):
                pairs.append((serial_of.get(first, ""), serial_of.get(second, "")))
    return [pair for pair in pairs if all(pair)]
