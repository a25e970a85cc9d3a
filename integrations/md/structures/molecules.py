"""Bonds by distance, the molecules that they make, and whether these stay together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from ase import Atoms

_BOND_MARGIN = 1.2
"""Atoms closer than this times the sum of their covalent radii count as bonded."""

_BOND_LEFT = 1.3
"""Bonded atoms farther apart than this times the sum count as separated; between, no word."""

_APART = 2.5
"""Factor on the length of its shortest bond within which an atom is not alone."""

_CONTACT = 0.5
"""Times the sum of covalent radii, below which atoms have collapsed onto each other. The shortest
bonds known are at 0.6 (Cr2) and 0.77 (N2), hot ones at a few thousand kelvin a tenth below; at 0.5
(C-C 0.76 Å, O-H 0.49 Å, H-H 0.31 Å) the nuclei repel by tens of eV, unless a potential is wrong."""

_MAX_LIST = 6
"""Bonds of which a message tells one by one."""


class BondChanges(NamedTuple):
    """Bonds that one structure has and another has not; each (n, 2), i < j."""

    broken: np.ndarray
    formed: np.ndarray

    def describe(self, atoms: Atoms) -> str:
        """A part of a sentence, "broke O0-H1 and formed H1-H2"; empty if nothing has changed."""
        parts = [
            f"{verb} {_name_bonds(atoms, pairs)}"
            for verb, pairs in (("broke", self.broken), ("formed", self.formed))
            if len(pairs)
        ]
        return " and ".join(parts)


def _name_bonds(atoms: Atoms, pairs: np.ndarray) -> str:
    symbols = atoms.symbols
    names = [f"{symbols[i]}{i}-{symbols[j]}{j}" for i, j in pairs[:_MAX_LIST].tolist()]
    more = len(pairs) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def compare_bonds(before: Atoms, after: Atoms) -> BondChanges:
    """Bonds that broke and that formed between two structures of the same atoms, by distance."""

    def changed(one: Atoms, other: Atoms) -> np.ndarray:
        near = {tuple(pair) for pair in bonds(other, _BOND_LEFT).tolist()}
        gone = [pair for pair in bonds(one).tolist() if tuple(pair) not in near]
        return np.array(gone, int).reshape(-1, 2)

    return BondChanges(changed(before, after), changed(after, before))


def bonds(atoms: Atoms, margin: float = _BOND_MARGIN) -> np.ndarray:
    """Pairs of bonded atoms (n, 2), i < j, by covalent radii; across periodic boundaries too.

    Args:
        atoms: the structure.
        margin: times the sum of their covalent radii, within which atoms are bonded.
    """
    from ase.neighborlist import natural_cutoffs, neighbor_list

    i, j = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=margin))
    pairs = np.stack([i, j], axis=1)[i < j]
    return np.unique(pairs, axis=0) if len(pairs) else np.zeros((0, 2), int)


def describe_contact(atoms: Atoms) -> str:
    """Two atoms that are much closer than any bond, in words; empty if there are none.

    Args:
        atoms: the structure, anywhere in space; images across periodic boundaries count.
    """
    from ase.data import covalent_radii

    from mlip_md.neighbors import neighbor_list

    radii = covalent_radii[atoms.numbers]
    cell = atoms.cell.array
    cutoff = 2.0 * _CONTACT * float(radii.max())
    i, j, shifts = neighbor_list(atoms.positions, cell, atoms.pbc, cutoff)
    lengths = np.linalg.norm(atoms.positions[j] - atoms.positions[i] + shifts @ cell, axis=1)
    shares = lengths / (radii[i] + radii[j])
    if not len(shares) or shares.min() >= _CONTACT:
        return ""
    k = int(np.argmin(shares))
    a, b = sorted((int(i[k]), int(j[k])))
    return (
        f"atoms {a} ({atoms.symbols[a]}) and {b} ({atoms.symbols[b]}) are {lengths[k]:.2f} Å "
        "apart, far less than any bond"
    )


def molecules(n_atoms: int, pairs: np.ndarray) -> np.ndarray:
    """Label (n_atoms,) of the molecule to which each atom belongs, in order of first atoms."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ones = np.ones(len(pairs))
    matrix = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(n_atoms, n_atoms))
    labels = connected_components(matrix, directed=False)[1]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def whole_molecules(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Put molecules together that the periodic boundary cuts.

    Args:
        atoms: a periodic structure.

    Returns:
        Positions (n, 3) Å in which each molecule is in one piece, and labels (n,) of the molecules.
        In a network without end (a covalent crystal) every atom counts as one and stays in place.
    """
    from ase.neighborlist import natural_cutoffs, neighbor_list
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import breadth_first_order

    i, j, shifts = neighbor_list("ijS", atoms, natural_cutoffs(atoms, mult=_BOND_MARGIN))
    labels = molecules(len(atoms), np.stack([i, j], axis=1))
    graph = coo_matrix((np.ones(len(i)), (i, j)), shape=(len(atoms),) * 2).tocsr()
    shift_of = {(a, b): s for a, b, s in zip(i.tolist(), j.tolist(), shifts, strict=True)}
    cells = np.zeros((len(atoms), 3), int)
    for first in np.unique(labels, return_index=True)[1]:
        order, parents = breadth_first_order(graph, first, directed=False)
        for atom in order[1:].tolist():
            parent = int(parents[atom])
            cells[atom] = cells[parent] + shift_of[parent, atom]
    endless = np.unique(labels[i[(cells[j] - cells[i] != shifts).any(axis=1)]])
    alone = np.isin(labels, endless)
    cells[alone] = 0
    labels[alone] = labels.max() + 1 + np.arange(alone.sum())
    return atoms.positions + cells @ atoms.cell.array, labels


class BondWatch:
    """Notices when molecules fly apart into single atoms, as they do when a time step is too long.

    An atom is alone if it had bonds at the start and now has no neighbor within ``_APART`` times
    the shortest of them. That is not so in reactions, melts and clusters that evaporate molecule by
    molecule; molecules of two atoms, which may well dissociate, are not looked at.

    Args:
        atoms: the structure at the start.
    """

    def __init__(self, atoms: Atoms) -> None:
        from ase.neighborlist import natural_cutoffs, neighbor_list

        self._i, self._j, self._shifts, lengths = neighbor_list(
            "ijSd", atoms, natural_cutoffs(atoms, mult=_BOND_MARGIN)
        )
        shortest = np.full(len(atoms), np.inf)
        np.minimum.at(shortest, self._i, lengths)
        labels = molecules(len(atoms), np.stack([self._i, self._j], axis=1))
        watched = np.isfinite(shortest) & (np.bincount(labels)[labels] > 2)
        self._limits = np.where(watched, _APART * shortest, np.inf)
        self._allowed = max(1.0, 0.25 * float(watched.sum()))
        self._pbc, self._cell = atoms.pbc.copy(), atoms.cell.array.copy()

    def broken(self, positions: np.ndarray, cell: np.ndarray) -> int:
        """Number of atoms that are alone, or 0 while it is a quarter of all or less.

        Args:
            positions: (n, 3) Å, not wrapped since the start.
            cell: (3, 3) Å; zeros stand for that of the start.
        """
        from mlip_md.neighbors import neighbor_list

        cell = cell if cell.any() else self._cell
        # Whoever still has an old neighbor is not alone; that spares the search nearly always.
        alone = self._alone(positions[self._j] - positions[self._i] + self._shifts @ cell, self._i)
        if alone <= self._allowed:
            return 0
        cutoff = float(self._limits[np.isfinite(self._limits)].max())
        i, j, shifts = neighbor_list(positions, cell, self._pbc, cutoff)
        alone = self._alone(positions[j] - positions[i] + shifts @ cell, i)
        return alone if alone > self._allowed else 0

    def _alone(self, vectors: np.ndarray, i: np.ndarray) -> int:
        nearest = np.full(len(self._limits), np.inf)
        np.minimum.at(nearest, i, np.linalg.norm(vectors, axis=1))
        return int(np.sum(np.isfinite(self._limits) & (nearest > self._limits)))
