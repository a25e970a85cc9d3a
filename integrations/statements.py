"""What ``Atoms`` and topologies state of a structure that nobody can compute.

Files are refused for it where we read them ourselves (``md.structures``). Readers of others hand
on what they did not look at: shares of sites, names that are not those of the elements that they
guessed, residues without their hydrogens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from ase import Atoms

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
    names = atoms.arrays.get("residuenames")
    residues = () if names is None or (atoms.numbers == 1).any() else names.tolist()
    return (
        charge_or_spin(atoms.info)
        or _disorder(atoms.info.get("occupancy"))
        or _alternatives(atoms)
        or lacks_hydrogens(atoms.numbers, residues)
        or _misnamed(atoms)
    )


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


def _alternatives(atoms: Atoms) -> str | None:
    shares = atoms.arrays.get("occupancy")
    if shares is None or shares.dtype.kind not in "if":
        return None
    pair = find_alternatives(atoms.positions, shares)
    if pair is None:
        return None
    return (
        f"atoms {pair[0]} and {pair[1]} are alternatives to each other, partly occupied by "
        f"atoms.arrays['occupancy']; keep one location of every atom, as {_READER} does"
    )


def _misnamed(atoms: Atoms) -> str | None:
    """Elements that ASE guesses from the first letters of names, as it does for GRO files."""
    keys = ("atomtypes", "residuenames", "residuenumbers")
    # A PDB file, which has B factors, has a column of elements too.
    if "bfactor" in atoms.arrays or not all(key in atoms.arrays for key in keys):
        return None
    columns = (tuple(atoms.arrays[key].tolist()) for key in keys)
    return _contradiction(tuple(atoms.symbols), *columns)


@functools.lru_cache(maxsize=4)  # the same at every step of a run
def _contradiction(
    symbols: tuple[str, ...],
    names: tuple[str, ...],
    residues: tuple[str, ...],
    numbers: tuple[int, ...],
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
