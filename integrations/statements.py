"""What ``Atoms`` and topologies state of a structure that nobody can compute.

Files are refused for it where we read them ourselves (``md.structures``). Readers of others hand
on what they did not look at: shares of sites, names that are not those of the elements that they
guessed, residues without their hydrogens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from mlip_md.integrations.charges import charge_or_spin
from mlip_md.integrations.residue_names import (
    ISOTOPE_MASSES,
    amino_acid,
    is_nucleotide,
    is_water,
    named_element,
)

_READER = "read_structure (from mlip_md.integrations.md import read_structure)"
"""Of files, and where it is to be had."""

_TOO_NEAR = 0.7
"""Å; sites that are partly occupied and nearer than this are alternatives to each other."""


def problem_of(atoms: Atoms) -> str | None:
    """What ``Atoms`` state and a potential would ignore, as a sentence; None if nothing.

    A charge or spin, disorder (CIF files), alternate locations (PDB), residues without any
    hydrogen, and names that contradict the elements (GRO), as ASE's readers hand them on.
    """
    return Watch().problem_of(atoms)


class Watch:
    """``problem_of`` for who asks at every step: reads only what is not as it was before.

    What was read is kept as a copy and compared, so that a change made in place is seen.
    """

    def __init__(self) -> None:
        self._names = _Last(_problem_of_names)
        self._places = _Last(_problem_of_places)

    def problem_of(self, atoms: Atoms) -> str | None:
        """``problem_of`` these atoms, which may be the same as before or others."""
        return (
            charge_or_spin(atoms.info)
            or _disorder(atoms.info.get("occupancy"))
            or self._places.of(_partly_occupied(atoms))
            or self._names.of({key: atoms.arrays[key] for key in _NAMES if key in atoms.arrays})
        )


_NAMES = ("numbers", "residuenames", "atomtypes", "residuenumbers", "bfactor")
"""Arrays that tell what the atoms are; of the last it counts whether it is there."""

_Arrays = Mapping[str, np.ndarray]


class _Last:
    """What a function says of arrays, kept for the next time that they are the same."""

    def __init__(self, say: Callable[[_Arrays], str | None]) -> None:
        self._say = say
        self._seen: tuple[_Arrays, str | None] | None = None

    def of(self, arrays: _Arrays) -> str | None:
        """What the function says of these arrays."""
        if self._seen is None or not _same_arrays(self._seen[0], arrays):
            copies = {key: array.copy() for key, array in arrays.items()}
            self._seen = copies, self._say(copies)
        return self._seen[1]


def _same_arrays(first: _Arrays, second: _Arrays) -> bool:
    return first.keys() == second.keys() and all(_same(first[key], second[key]) for key in first)


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two arrays hold the same; texts are compared as bytes, which is much faster."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    if first.dtype.hasobject:
        return np.array_equal(first, second)
    one, two = (np.ascontiguousarray(array).view(np.uint8) for array in (first, second))
    return np.array_equal(one, two)


def find_alternatives(positions: np.ndarray, occupancies: np.ndarray) -> tuple[int, int] | None:
    """Two partly occupied sites that stand in each other's place; None if there are none.

    Args:
        positions: (n, 3) Å.
        occupancies: (n,) shares.
    """
    partly = np.flatnonzero((occupancies > 0) & (occupancies < 1))
    if len(partly) < 2:
        return None
    from scipy.spatial import cKDTree

    pairs = cKDTree(positions[partly]).query_pairs(_TOO_NEAR)
    if not pairs:
        return None
    first, second = partly[list(min(pairs))].tolist()
    return first, second


def lacks_hydrogens(numbers: np.ndarray, residues: Iterable[str]) -> str | None:
    """What is wrong with residues that have hydrogens, in a structure without a single one.

    Args:
        numbers: (n,) atomic numbers.
        residues: names of the atoms' residues.

    Returns:
        A sentence, or None.
    """
    if len(numbers) < 2 or (np.asarray(numbers) == 1).any():
        return None
    for name in sorted(set(residues)):
        # Other names of nucleotides are also those of small molecules (C, U, CN).
        nucleotide = is_nucleotide(name) and len(name) > 1 and name[0] in "DR"
        if amino_acid(name) or is_water(name) or nucleotide:
            return (
                f"the structure has residues {name} and not one hydrogen; add them all first, with "
                "positions (PDBFixer, OpenMM's Modeller.addHydrogens, gmx pdb2gmx)"
            )
    return None


def _disorder(sites: Any) -> str | None:
    """Shares of elements on sites as ASE reads them of CIF files, of which it takes one each."""
    for shares in sites.values() if isinstance(sites, Mapping) else ():
        if isinstance(shares, Mapping) and any(share != 1 for share in shares.values()):
            told = " and ".join(f"{symbol} {share}" for symbol, share in shares.items())
            return (
                f"atoms.info['occupancy'] states disorder ({told} on one site); make an ordered "
                "structure, and remove the entry"
            )
    return None


def _partly_occupied(atoms: Atoms) -> _Arrays:
    """Shares and positions of atoms of which some are partly occupied; else nothing."""
    shares = atoms.arrays.get("occupancy")
    if shares is None or shares.dtype.kind not in "if" or not ((shares > 0) & (shares < 1)).any():
        return {}
    return {"positions": atoms.positions, "occupancies": shares}


def _problem_of_places(arrays: _Arrays) -> str | None:
    pair = find_alternatives(**arrays) if arrays else None
    if pair is None:
        return None
    return (
        f"atoms {pair[0]} and {pair[1]} are alternatives to each other, partly occupied by "
        f"atoms.arrays['occupancy']; keep one location of every atom, as {_READER} does"
    )


def _problem_of_names(arrays: _Arrays) -> str | None:
    residues = arrays["residuenames"].tolist() if "residuenames" in arrays else ()
    return lacks_hydrogens(arrays["numbers"], residues) or _misnamed(arrays)


def _misnamed(arrays: _Arrays) -> str | None:
    """Elements that ASE guesses from the first letters of names, as it does for GRO files."""
    # A PDB file, which has B factors, has a column of elements too.
    if tuple(arrays) != _NAMES[:-1]:
        return None
    elements, residues, names, numbers = (array.tolist() for array in arrays.values())
    return _contradiction([chemical_symbols[z] for z in elements], names, residues, numbers)


def _contradiction(
    symbols: Sequence[str], names: Sequence[str], residues: Sequence[str], numbers: Sequence[int]
) -> str | None:
    places = list(zip(residues, numbers, strict=True))
    for index, (symbol, name, place) in enumerate(zip(symbols, names, places, strict=True)):
        alone = place not in (*places[max(index - 1, 0) : index], *places[index + 1 : index + 2])
        named = named_element(name, place[0], alone=alone)
        if named is not None and symbol != ("H" if named in ISOTOPE_MASSES else named):
            meant = "a site without nucleus" if named == "X" else named
            return (
                f"atom {index}, {name} of residue {place[0]}, is {symbol} among the elements and "
                f"{meant} by its name: ASE's reader of GRO files guesses; set the elements right, "
                f"or read the file with {_READER}"
            )
    return None
