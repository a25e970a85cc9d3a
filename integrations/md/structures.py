"""Structures to run: bundled molecules, files, and their topologies for OpenMM and mdtraj."""

from __future__ import annotations

import dataclasses
import os
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mlip_md.errors import StructureError

DEFAULT_MOLECULE = "paracetamol"

_OPENMM_SUFFIXES = {".pdb": "PDBFile", ".pdbx": "PDBxFile", ".mmcif": "PDBxFile"}
_BOND_MARGIN = 1.2
"""Atoms closer than this times the sum of their covalent radii count as bonded."""

_APART = 2.5
"""Factor on the length of its shortest bond within which an atom is not alone."""
MAX_DENSITY = 30.0
"""g/cm³; the densest solids have 23, and a cell that gives more does not hold its atoms."""


@dataclasses.dataclass(frozen=True)
class Structure:
    """A structure and where it comes from.

    Attributes:
        name: short name, used for the run's folder.
        atoms: positions (Å), elements, cell, periodicity.
        topology: OpenMM topology when the file had residues and chains (PDB), else None.
    """

    name: str
    atoms: Atoms
    topology: Any = None


def bundled_molecules() -> list[str]:
    """Names of the molecules that come with the package."""
    folder = resources.files("mlip_md.integrations.md") / "molecules"
    return sorted(f.name.removesuffix(".extxyz") for f in folder.iterdir() if f.name.endswith("z"))


def read_structure(source: str | os.PathLike[str] | None = None) -> Structure:
    """Read a structure.

    Args:
        source: path of any file that ASE or OpenMM reads (xyz, extxyz, pdb, cif, POSCAR, …; of a
            trajectory the last frame), or the name of a bundled molecule. None is paracetamol.

    Returns:
        The structure, without calculator and constraints.

    Raises:
        StructureError: if there is no such file, it cannot be read, or its cell is too small for
            its atoms.
    """
    text = DEFAULT_MOLECULE if source is None else os.fspath(source)
    path = Path(text)
    if not path.exists():
        if text not in bundled_molecules():
            raise StructureError(
                f"there is no file {text!r}, nor a bundled molecule of that name "
                f"({', '.join(bundled_molecules())})"
            )
        folder = resources.files("mlip_md.integrations.md") / "molecules"
        with resources.as_file(folder / f"{text}.extxyz") as bundled:
            return Structure(text, _read_ase(bundled))
    if path.suffix.lower() in _OPENMM_SUFFIXES or _is_mmcif(path):
        structure = _read_openmm(path)
    else:
        structure = Structure(path.stem, _read_ase(path))
    _check_cell(path, structure.atoms)
    return structure


def _check_cell(path: Path, atoms: Atoms) -> None:
    """Refuse the dummy cell that files of molecules may have (CRYST1 1 1 1 in PDB files)."""
    from ase.units import _amu

    if not atoms.pbc.any() or atoms.cell.rank < 3:
        return
    density = atoms.get_masses().sum() * _amu * 1e27 / abs(atoms.cell.volume)
    if density > MAX_DENSITY:
        lengths = " x ".join(f"{length:.4g}" for length in atoms.cell.lengths())
        raise StructureError(
            f"{path}: a cell of {lengths} Å is too small for {len(atoms)} atoms "
            f"({density:.3g} g/cm³); remove it (the CRYST1 line of a PDB file) or give the real one"
        )


def _is_mmcif(path: Path) -> bool:
    """Whether a .cif file is of the PDB's kind, which ASE does not read."""
    if path.suffix.lower() != ".cif":
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return any("_atom_site.Cartn_x" in line for line in file)


def _read_ase(path: Path) -> Atoms:
    from ase.io import read

    if path.is_dir():
        raise StructureError(f"{path} is a folder; name a file in it")
    try:
        atoms = read(path)
    except Exception as error:
        raise StructureError(
            f"ASE cannot read {path} ({type(error).__name__}: {error}); is it damaged, or its name "
            "wrong for its format? extxyz and PDB are safe choices"
        ) from error
    if not isinstance(atoms, Atoms) or not len(atoms):
        raise StructureError(f"{path} holds no atoms")
    atoms.calc = None
    atoms.set_constraint()
    return atoms


def _read_openmm(path: Path) -> Structure:
    """Read with OpenMM, which keeps residues, chains and bonds for the analysis afterwards."""
    import openmm.app
    from openmm import unit

    if path.suffix.lower() == ".pdb" and not _has_atom_records(path):
        raise StructureError(f"{path} has no atoms: it lacks lines that begin with ATOM or HETATM")
    try:
        reader = _OPENMM_SUFFIXES.get(path.suffix.lower(), "PDBxFile")
        file = getattr(openmm.app, reader)(str(path))
    except Exception as error:
        raise StructureError(
            f"{path} is damaged or not of the format that its name says; OpenMM cannot read it "
            f"({type(error).__name__}: {error})"
        ) from error
    elements = [atom.element for atom in file.topology.atoms()]
    if not elements or None in elements:
        raise StructureError(f"{path} has no atoms, or atoms without an element column")
    positions = file.getPositions(asNumpy=True).value_in_unit(unit.angstrom)
    box = file.topology.getPeriodicBoxVectors()
    cell = None if box is None else np.array(box.value_in_unit(unit.angstrom))
    numbers = [element.atomic_number for element in elements]
    atoms = Atoms(numbers, np.array(positions), cell=cell, pbc=cell is not None)
    return Structure(path.stem, atoms, file.topology)


def _has_atom_records(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return any(line.startswith(("ATOM  ", "HETATM")) for line in file)


def bonds(atoms: Atoms) -> np.ndarray:
    """Pairs of bonded atoms (n, 2), i < j, by covalent radii; across periodic boundaries too."""
    from ase.neighborlist import natural_cutoffs, neighbor_list

    i, j = neighbor_list("ij", atoms, natural_cutoffs(atoms, mult=_BOND_MARGIN))
    pairs = np.stack([i, j], axis=1)[i < j]
    return np.unique(pairs, axis=0) if len(pairs) else np.zeros((0, 2), int)


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


def make_topology(structure: Structure) -> Any:
    """OpenMM topology of a structure: its own, or one residue per molecule.

    Returns:
        ``openmm.app.Topology`` with the box of ``structure.atoms`` when they are periodic.
    """
    import openmm.app

    atoms = structure.atoms
    topology = structure.topology
    if topology is None:
        topology = openmm.app.Topology()
        pairs = bonds(atoms)
        labels = molecules(len(atoms), pairs)
        chain = topology.addChain()
        residues: dict[int, Any] = {}
        counts: dict[tuple[int, str], int] = {}
        made: dict[int, Any] = {}
        # A topology lists the atoms residue by residue; where a molecule's atoms are not
        # contiguous, all atoms share one residue so that their order stays the file's.
        if np.any(np.diff(labels) < 0):
            labels = np.zeros(len(atoms), int)
        for index, (symbol, label) in enumerate(zip(atoms.symbols, labels, strict=True)):
            if label not in residues:
                residues[label] = topology.addResidue("MOL", chain)
            counts[label, symbol] = counts.get((label, symbol), 0) + 1
            element = openmm.app.Element.getBySymbol(symbol)
            name = f"{symbol}{counts[label, symbol]}"
            made[index] = topology.addAtom(name, element, residues[label])
        for i, j in pairs:
            topology.addBond(made[int(i)], made[int(j)])
    box = None
    if atoms.pbc.all() and atoms.cell.rank == 3:
        from openmm import Vec3, unit

        box = [Vec3(*row) for row in atoms.cell.array] * unit.angstrom
    topology.setPeriodicBoxVectors(box)
    return topology
