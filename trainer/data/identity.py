"""Which molecule a structure is, whatever the order of its atoms and the name of its group.

A molecule is its graph: elements and who is bonded to whom. Orders of bonds, stereochemistry and
atom-map numbers do not count, so aromatic and Kekulé forms are one molecule and so are enantiomers,
which have the same energies. Keys depend on nothing that is installed: the same data are split
alike everywhere.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence

import numpy as np
from ase.data import covalent_radii

from mlip_md.elements import ATOMIC_NUMBERS

BOND = 1.25
"""Atoms closer than this times the sum of their covalent radii are bonded."""

_TOKEN = re.compile(
    r"\[\d*(?P<element>[A-Z][a-z]?|[a-z][a-z]?)(?P<chiral>@*[A-Z0-9]*?)(?:H(?P<hydrogens>\d*))?"
    r"(?P<charge>[+-]*\d*)(?::\d+)?\]"
    r"|(?P<plain>Br|Cl|[BCNOPSFIbcnops])|(?P<ring>%\d\d|\d)|(?P<bond>[-=#$:/\\~])"
    r"|(?P<open>\()|(?P<close>\))|(?P<dot>\.)"
)

Bonds = list[tuple[int, int]]


@functools.lru_cache(maxsize=100_000)
def identify_smiles(smiles: str, num_atoms: int) -> str:
    """Key of the molecule that a SMILES string states; empty if it is none.

    Args:
        smiles: with or without hydrogens, atom-map numbers and stereochemistry.
        num_atoms: of the structure. If the string has as many, hydrogens count; else only the other
            atoms do, as hydrogens that are not written cannot be placed without orders of bonds.
    """
    parsed = parse_smiles(smiles)
    if parsed is None:
        return ""
    numbers, bonds = parsed
    if len(numbers) != num_atoms:
        heavy = [k for k, z in enumerate(numbers) if z != 1]
        place = {k: new for new, k in enumerate(heavy)}
        numbers = [numbers[k] for k in heavy]
        bonds = [(place[i], place[j]) for i, j in bonds if i in place and j in place]
    return identify_graph(numbers, bonds, f"{num_atoms}")


def parse_smiles(smiles: str) -> tuple[list[int], Bonds] | None:
    """Atomic numbers and bonds of a SMILES string, hydrogens in brackets included; None if odd."""
    drawing, position = _Drawing(), 0
    while position < len(smiles):
        token = _TOKEN.match(smiles, position)
        if token is None or not drawing.add(token):
            return None
        position = token.end()
    return drawing.finished()


class _Drawing:
    """A molecule while its SMILES string is read."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.bonds: Bonds = []
        self.last = -1
        self.branches: list[int] = []
        self.rings: dict[str, int] = {}

    def add(self, token: re.Match[str]) -> bool:
        """Draw what a token says; False if it makes no sense here."""
        if token["element"] or token["plain"]:
            return self._add_atom(token["element"] or token["plain"], token["hydrogens"])
        if token["ring"]:
            start = self.rings.pop(token["ring"], None)
            if start is None:
                self.rings[token["ring"]] = self.last
            else:
                self.bonds.append((start, self.last))
        elif token["open"]:
            self.branches.append(self.last)
        elif token["close"]:
            if not self.branches:
                return False
            self.last = self.branches.pop()
        elif token["dot"]:
            self.last = -1
        return True

    def _add_atom(self, name: str, hydrogens: str | None) -> bool:
        number = ATOMIC_NUMBERS.get(name.capitalize())
        if number is None:
            return False
        here = len(self.numbers)
        self.numbers.append(number)
        if self.last >= 0:
            self.bonds.append((self.last, here))
        for _ in range(0 if hydrogens is None else int(hydrogens or 1)):
            self.bonds.append((here, len(self.numbers)))
            self.numbers.append(1)
        self.last = here
        return True

    def finished(self) -> tuple[list[int], Bonds] | None:
        """The drawing, if nothing is left open."""
        whole = self.numbers and not self.rings and not self.branches
        return (self.numbers, self.bonds) if whole else None


def identify_geometry(atomic_numbers: np.ndarray, positions: np.ndarray) -> str:
    """Key of the molecule that positions (n, 3) Å of these atoms form; bonds by covalent radii."""
    vectors = positions[:, None] - positions[None]
    radii = BOND * covalent_radii[atomic_numbers]
    near = np.einsum("ijk,ijk->ij", vectors, vectors) < (radii[:, None] + radii) ** 2
    bonds = np.argwhere(np.triu(near, 1)).tolist()
    return identify_graph(atomic_numbers.tolist(), bonds, f"{len(atomic_numbers)}")


def identify_graph(numbers: Sequence[int], bonds: Sequence[Sequence[int]], kind: str = "") -> str:
    """A key that graphs have in common if one is the other in another order.

    Colors of atoms are refined by those of their neighbors until they do not part any more
    (B. Weisfeiler and A. Leman, 1968), which tells nearly all molecules from each other.

    Args:
        numbers: atomic numbers.
        bonds: pairs of indices.
        kind: told apart as well.
    """
    neighbors: list[list[int]] = [[] for _ in numbers]
    for i, j in bonds:
        neighbors[i].append(j)
        neighbors[j].append(i)
    colors, count = [str(z) for z in numbers], len(set(numbers))
    for _ in range(len(numbers)):
        colors = [
            _short(f"{color}({','.join(sorted(colors[j] for j in near))})")
            for color, near in zip(colors, neighbors, strict=True)
        ]
        if len(set(colors)) == count:
            break
        count = len(set(colors))
    return _short(f"{kind}:{','.join(sorted(colors))}")


def _short(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def merge_groups(molecules: Mapping[str, str]) -> dict[str, str]:
    """Names of groups by which each molecule has one.

    Args:
        molecules: key of its molecule by name of a group; empty where unknown.

    Returns:
        By name of a group the first, in alphabetical order, of the groups of the same molecule.
    """
    first: dict[str, str] = {}
    for group in sorted(molecules):
        first.setdefault(molecules[group] or group, group)
    return {group: first[molecule or group] for group, molecule in molecules.items()}
