"""Elements, isotopes and virtual sites as the names in files of molecules mean them."""

from __future__ import annotations

import re

from mlip_md.elements import ATOMIC_NUMBERS

VIRTUAL = "X"
"""Symbol of a site without nucleus: a virtual site, dummy or ghost atom (ASE's, number 0)."""

ISOTOPE_MASSES = {"D": 2.01410177812, "T": 3.01604928199}
"""u; the isotopes of hydrogen that files write like elements (AME 2020)."""

HYDROGENS = {
    "GLY": 3, "ALA": 5, "VAL": 9, "LEU": 11, "ILE": 11, "SER": 5, "THR": 7, "CYS": 4, "MET": 9,
    "PRO": 7, "PHE": 9, "TYR": 8, "TRP": 10, "ASP": 4, "GLU": 6, "ASN": 6, "GLN": 8, "LYS": 12,
    "ARG": 12, "HIS": 7,
}  # fmt: skip
"""Fewest hydrogens of an amino acid inside a chain, at any pH that proteins meet."""

_PROTONATED = {
    "HID": "HIS", "HIE": "HIS", "HIP": "HIS", "HSD": "HIS", "HSE": "HIS", "HSP": "HIS",
    "HISA": "HIS", "HISB": "HIS", "HISD": "HIS", "HISE": "HIS", "HISH": "HIS", "ASH": "ASP",
    "ASPH": "ASP", "ASPP": "ASP", "GLH": "GLU", "GLUH": "GLU", "GLUP": "GLU", "LYN": "LYS",
    "LYSH": "LYS", "CYX": "CYS", "CYM": "CYS", "CYSH": "CYS", "CYS2": "CYS", "ARN": "ARG",
    "ARGN": "ARG", "TYM": "TYR",
}  # fmt: skip

_NUCLEIC = frozenset("A C G U I DA DC DG DT DI RA RC RG RU ADE CYT GUA THY URA".split())
_COFACTORS = frozenset("ATP ADP AMP GTP GDP GMP CTP UTP NAD NAP FAD FMN".split())
_WATER = frozenset(
    "HOH WAT WATER H2O DOD SOL TIP TIP2 TIP3 TIP4 TIP5 TIP3P TIP4P TIP5P TP3 TP4 TP5 T3P T4P T5P "
    "SPC SPCE OPC OPC3 OHH HHO".split()
)
_CAPS = frozenset("ACE NME NMA NH2 NHE FOR".split())
_IONS = {
    "SOD": "Na", "CLA": "Cl", "POT": "K", "CAL": "Ca", "CES": "Cs", "LIT": "Li", "RUB": "Rb",
    "BAR": "Ba", "CAD": "Cd", "IOD": "I",
}  # fmt: skip

_AMBIGUOUS_UP_TO = ATOMIC_NUMBERS["Bi"]
"""Heavier elements are no reading of two capital letters (PA, PU, NO, CM ... in molecules)."""

_GHOSTS = re.compile(r"(X|XX|BQ|GH|DU|LP|EP|VS|Q|TV|DA)\d*", re.IGNORECASE)


def amino_acid(residue: str) -> str | None:
    """Three-letter name of the amino acid that a residue's name stands for, or None."""
    name = residue.upper()
    if len(name) == 4 and name[0] in "NC" and amino_acid(name[1:]):
        return amino_acid(name[1:])  # at the ends of chains, as Amber's force fields call them
    name = _PROTONATED.get(name, name)
    return name if name in HYDROGENS else None


def is_water(residue: str) -> bool:
    """Whether a residue's name is one of water."""
    return residue.upper() in _WATER


def is_nucleotide(residue: str) -> bool:
    """Whether a residue's name is one of a nucleotide."""
    name = residue.upper()
    return name in _NUCLEIC or (name[-1:] in ("3", "5", "N") and name[:-1] in _NUCLEIC)


def is_standard(residue: str) -> bool:
    """Whether a residue's name is one of an amino acid or nucleotide."""
    return amino_acid(residue) is not None or is_nucleotide(residue)


def stated_element(text: str) -> str | None:
    """Element that a file's column for elements states.

    Args:
        text: such as "C", "CL", "D", "O2-", "Bq".

    Returns:
        Symbol of an element, "D" or "T", ``VIRTUAL`` for ghosts and dummies, None if it is neither.
    """
    bare = re.sub(r"[\d+\-]+$", "", text.strip())
    symbol = bare.capitalize()
    if symbol in ATOMIC_NUMBERS or symbol in ISOTOPE_MASSES:
        return symbol
    ghost = text.endswith(":") or text.startswith("@") or "(" in text
    return VIRTUAL if ghost or _GHOSTS.fullmatch(text.strip()) else None


def named_element(name: str, residue: str, *, alone: bool) -> str | None:
    """Element of an atom in a file that has no column for elements.

    Args:
        name: of the atom, as written.
        residue: name of its residue.
        alone: whether it is the only atom of its residue.

    Returns:
        As ``stated_element``; None if the names leave it open.
    """
    letters = re.match(r"\d*([A-Za-z]*)", name.strip())
    word = letters.group(1) if letters else ""
    bare = re.sub(r"[\d+\-]+$", "", residue.upper())
    if not word:
        return None
    if alone:
        return _ion(word, bare)
    if len(word) == 2 and word[1].islower() and word in ATOMIC_NUMBERS:
        return word
    word = word.upper()
    if _is_virtual(word, residue):
        return VIRTUAL
    if is_standard(residue) or is_water(residue) or residue.upper() in _CAPS | _COFACTORS:
        if is_water(residue) and re.fullmatch(r"D\d?", name.strip()):
            return "D"  # elsewhere D may also begin the name of a Drude particle
        return word[0] if word[0] in "HCNOSP" else None
    return _in_molecule(word)


def _ion(word: str, residue: str) -> str | None:
    """Element of an atom that is a residue by itself."""
    upper = word.upper()
    if _GHOSTS.fullmatch(word) or upper == residue == "W":
        return VIRTUAL if upper != "W" else None
    if is_water(residue):
        return "O" if upper[0] == "O" else None
    for known in (upper, residue):
        if known in _IONS:
            return _IONS[known]
    symbol = word.capitalize()
    plain = len(symbol) == 1 or residue in (upper, "ION", "IONS") or word[1].islower()
    if plain and (symbol in ATOMIC_NUMBERS or symbol in ISOTOPE_MASSES):
        return symbol
    return _in_molecule(upper)


def _is_virtual(word: str, residue: str) -> bool:
    """Names that force fields give to sites without mass in residues of several atoms."""
    if re.match(r"(LP|EP)", word) and word.capitalize() not in ATOMIC_NUMBERS:
        return True
    if is_water(residue) and word in ("M", "MW", "L", "LW", "LA", "LB"):
        return True
    return word in ("MW", "VS", "VIS") or (word[0] == "M" and is_standard(residue))


def _in_molecule(word: str) -> str | None:
    """Element of an atom in a molecule that no table knows, by the capital letters of its name."""
    if word[0] == "H":
        return "H"
    pair = word[:2].capitalize()
    two = pair if len(word) > 1 and pair in ATOMIC_NUMBERS else None
    one = word[0] if word[0] in ATOMIC_NUMBERS or word[0] in ISOTOPE_MASSES else None
    if two in ("Cl", "Br", "Si"):
        return two
    if two is None or one is None:
        return two or one
    return None if ATOMIC_NUMBERS[two] <= _AMBIGUOUS_UP_TO else one
