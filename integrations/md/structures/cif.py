"""CIF files of crystals: ASE reads them and applies the symmetry, after a look at the sites."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mlip_md.elements import ATOMIC_NUMBERS
from mlip_md.integrations.md.structures.description import Content
from mlip_md.integrations.md.structures.labels import remove_labels
from mlip_md.integrations.md.structures.text import Source
from mlip_md.integrations.residue_names import ISOTOPE_MASSES, named_element, stated_element

_SAME_PLACE = 1e-3
"""Fraction of a cell vector; ASE's tolerance for images of a site that are one atom."""

_FATAL = ("Wrong number", "equivalent", "Duplicated loop tags")
"""What ASE only warns of and what loses atoms."""


def split(source: Source) -> list[Any]:
    """Blocks of the file that hold a structure.

    Raises:
        StructureError: if the file cannot be read or holds none.
    """
    from ase.io.cif import parse_cif

    with _watched(source):
        try:
            blocks = list(parse_cif(io.StringIO(source.text())))
        except Exception as error:
            raise _unreadable(source, error) from error
    found = [block for block in blocks if _sites(block)]
    if not found:
        raise source.refusal(
            "holds no structure: no block of it has sites with coordinates and elements"
        )
    return found


def _sites(block: Mapping[str, Any]) -> list[str]:
    """Labels of the sites of a block, or their elements; empty if it has no coordinates."""
    if not any(f"_atom_site_{kind}_x" in block for kind in ("fract", "cartn")):
        return []
    for key in ("_atom_site_label", "_atom_site_type_symbol"):
        if key in block:
            return [str(value) for value in _column(block, key)]
    return []


def _column(block: Mapping[str, Any], key: str) -> list[Any]:
    value = block[key]
    return value if isinstance(value, list) else [value]


def parse(source: Source, block: Any) -> Content:
    """One block, with its symmetry applied.

    Raises:
        StructureError: if sites are disordered or dummies, elements are left open, symmetry puts
            atoms into each other, or the formula has other atoms than the cell.
    """
    from ase.io.cif import CIFBlock

    _refuse_disorder(source, block)
    tags = dict(block) | {"_atom_site_type_symbol": _symbols(source, block)}
    with _watched(source):
        try:
            atoms = CIFBlock(block.name, tags).get_atoms()
        except Exception as error:
            raise _unreadable(source, error) from error
    atoms.pbc = atoms.cell.rank == 3
    deuterium = np.flatnonzero((atoms.numbers == 1) & (atoms.get_masses() > 1.5))
    if len(deuterium):
        masses = atoms.get_masses()
        masses[deuterium] = ISOTOPE_MASSES["D"]
        atoms.set_masses(masses)
    for name in ("occupancy", "spacegroup", "unit_cell"):
        atoms.info.pop(name, None)
    remove_labels(atoms)
    _refuse_other_symmetry(source, block, len(atoms))
    _refuse_other_formula(source, block, atoms.get_chemical_symbols())
    return Content(atoms, len(atoms), notes=_symmetry_notes(block))


def _refuse_other_symmetry(source: Source, block: Any, count: int) -> None:
    """The operations that the file lists must give the atoms that ASE makes of its group."""
    from ase.spacegroup.spacegroup import parse_sitesym

    listed = block._get_sitesym()
    coordinates = block._raw_scaled_positions()
    if not listed or coordinates is None:
        return
    rotations, translations = parse_sitesym(listed)
    expected = 0
    for site in np.asarray(coordinates, float):
        images = rotations @ site + translations
        away = images[:, None] - images
        near = (np.abs(away - np.round(away)) < _SAME_PLACE).all(axis=2)
        expected += len(np.unique(near.argmax(axis=1)))
    if expected != count:
        raise source.refusal(
            f"lists {len(listed)} symmetry operations, which make {expected} atoms of its sites, "
            f"and calls its space group one that makes {count}; list all operations, or say P 1 "
            "if all atoms of the cell are there"
        )


def _symmetry_notes(block: Any) -> list[str]:
    """What is assumed of the symmetry where the file does not list its operations."""
    from ase.spacegroup import Spacegroup

    if block._get_sitesym():
        return []
    group = block._get_spacegroup_number() or block._get_spacegroup_name()
    if group is None:
        return ["it states no symmetry; its sites are taken for the whole cell"]
    try:
        Spacegroup(int(group) if str(group).isdigit() else group, setting=2)
    except Exception:  # ASE has one setting of it
        return []
    return [f"space group {group} has two settings, of which the file's cell or the first is taken"]


@contextlib.contextmanager
def _watched(source: Source) -> Iterator[None]:
    """Turns ASE's warnings of lost atoms into errors, and hides the others."""
    with warnings.catch_warnings(record=True, action="always") as seen:
        yield
    for one in seen:
        if any(word in str(one.message) for word in _FATAL):
            raise source.refusal(
                f"would lose atoms when it is read ({one.message}); look at the loop of sites"
            )


def _unreadable(source: Source, error: Exception) -> Exception:
    return source.refusal(
        f"cannot be read as a CIF file ({type(error).__name__}: {error}); is it damaged?"
    )


def _refuse_disorder(source: Source, block: Mapping[str, Any]) -> None:
    sites = _sites(block)
    if "_atom_site_occupancy" in block:
        for site, share in zip(sites, _column(block, "_atom_site_occupancy"), strict=False):
            if isinstance(share, int | float) and abs(share - 1) > 1e-3:
                raise source.refusal(
                    f"has disorder: site {site} is occupied to {share:g}; keep one of the "
                    "alternatives, with occupancy 1, or make an ordered cell"
                )
    if "_atom_site_disorder_group" in block:
        groups = {str(g) for g in _column(block, "_atom_site_disorder_group")} - {".", "?"}
        if len(groups) > 1:
            raise source.refusal(
                f"has disorder: its sites are in the groups {', '.join(sorted(groups))}; keep one"
            )
    if "_atom_site_calc_flag" in block:
        for site, flag in zip(sites, _column(block, "_atom_site_calc_flag"), strict=False):
            if flag == "dum":
                raise source.refusal(f"has a dummy site, {site}; remove it")


def _symbols(source: Source, block: Mapping[str, Any]) -> list[str]:
    """Element of each site, so written that ASE understands it."""
    if "_atom_site_type_symbol" in block:
        given = [str(value) for value in _column(block, "_atom_site_type_symbol")]
        symbols = [stated_element(value) or _of_label(value) for value in given]
    else:
        given = _sites(block)
        symbols = [_of_label(value) for value in given]
    for value, symbol in zip(given, symbols, strict=True):
        if symbol is None or symbol not in {*ATOMIC_NUMBERS, "D"}:
            raise source.refusal(
                f"has a site {value} whose element is left open or none that can be computed; "
                "state it (_atom_site_type_symbol)"
            )
    return [str(symbol) for symbol in symbols]


def _of_label(label: str) -> str | None:
    """Element that begins a label of a site, such as C1, Cl2, Fe1A."""
    found = re.match(r"[A-Z][a-z](?![a-z])", label)
    if found and found.group() in ATOMIC_NUMBERS:
        return found.group()
    return named_element(label, "", alone=False)


def _refuse_other_formula(source: Source, block: Mapping[str, Any], symbols: list[str]) -> None:
    """The formula times the number of units in the cell counts the atoms, if both are stated."""
    units = block.get("_cell_formula_units_z")
    formula = block.get("_chemical_formula_sum")
    if not isinstance(units, int) or not isinstance(formula, str):
        return
    parts = re.findall(r"([A-Z][a-z]?)(\d+(?:\.\d+)?)?", formula)
    expected: dict[str, float] = {}
    for symbol, count in parts:
        symbol = "H" if symbol == "D" else symbol
        expected[symbol] = expected.get(symbol, 0) + units * float(count or 1)
    for symbol, count in expected.items():
        there = symbols.count(symbol)
        if there < count - 0.5:
            raise source.refusal(
                f"says {formula} x {units}, which is {count:g} {symbol} in the cell, and its sites "
                f"and symmetry give {there}; add the atoms that lack, or correct the formula"
            )
