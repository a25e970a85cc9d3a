"""OpenMM topologies of structures."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms

from mlip_md.errors import StructureError
from mlip_md.integrations.md.structures.description import (
    AtomLabel,
    Structure,
    distinct_names,
    is_isotope,
)
from mlip_md.integrations.md.structures.molecules import bonds, molecules
from mlip_md.integrations.md.structures.orientation import reduce_lattice

_FARTHEST = 1.5
"""Times the sum of covalent radii; a bond of a table that is longer is none."""


def labels_of(atoms: Atoms) -> list[AtomLabel]:
    """Names for atoms that have none: one residue MOL per molecule, atoms counted by element.

    A topology lists the atoms residue by residue; where a molecule's atoms are not contiguous, all
    atoms share one residue, so that their order stays the file's.
    """
    labels = molecules(len(atoms), bonds(atoms))
    if np.any(np.diff(labels) < 0):
        labels = np.zeros(len(atoms), int)
    counts: dict[tuple[int, str], int] = {}
    found = []
    for symbol, label in zip(atoms.symbols, labels.tolist(), strict=True):
        number = counts[label, symbol] = counts.get((label, symbol), 0) + 1
        found.append(AtomLabel(f"{symbol}{number}", "MOL", str(label + 1), chain="A"))
    return found


def build_topology(
    atoms: Atoms,
    labels: Sequence[AtomLabel],
    pairs: np.ndarray,
    formal_charges: np.ndarray | None = None,
) -> Any:
    """A topology of labeled atoms, without a box.

    Args:
        atoms: elements; hydrogen with the mass of an isotope becomes that.
        labels: (n,) atoms of one residue follow one another; names that are repeated in one get
            numbers.
        pairs: (m, 2) bonds.
        formal_charges: (n,) or None.

    Returns:
        ``openmm.app.Topology``.
    """
    import openmm.app

    topology = openmm.app.Topology()
    chain = residue = before = None
    made = []
    names = distinct_names(labels)
    for index, (label, element) in enumerate(zip(names, _elements(atoms), strict=True)):
        if before is None or label.segment != before.segment:
            chain = topology.addChain(label.chain or None)
        if before is None or label.residue != before.residue:
            code = label.insertion_code
            residue = topology.addResidue(label.residue_name, chain, label.residue_id or None, code)
        charge = None if formal_charges is None else int(formal_charges[index])
        made.append(topology.addAtom(label.name, element, residue, formalCharge=charge))
        before = label
    for i, j in pairs.tolist():
        topology.addBond(made[i], made[j])
    return topology


def _elements(atoms: Atoms) -> list[Any]:
    from openmm.app import Element

    heavy = is_isotope(atoms, "D")  # OpenMM has no tritium
    return [
        Element.getBySymbol("D" if is_heavy else symbol)
        for symbol, is_heavy in zip(atoms.symbols, heavy, strict=True)
    ]


def implied_bonds(atoms: Atoms, labels: Sequence[AtomLabel], stated: np.ndarray) -> np.ndarray:
    """All bonds of labeled atoms.

    Args:
        atoms: elements and positions.
        labels: (n,) names and residues.
        stated: (m, 2) bonds that the file states.

    Returns:
        Bonds (k, 2), i < j: those that are stated, those that OpenMM knows of standard residues
        (where the atoms are near each other), and by distance those of atoms of which neither says
        anything. Atoms that are residues by themselves have stated bonds only.
    """
    pairs = {(int(i), int(j)) for i, j in stated}
    pairs |= _standard_bonds(atoms, labels)
    sizes = collections.Counter(label.residue for label in labels)
    silent = {k for k, label in enumerate(labels) if sizes[label.residue] > 1}
    silent -= {k for pair in pairs for k in pair}
    if silent:
        pairs |= {(int(i), int(j)) for i, j in bonds(atoms) if i in silent or j in silent}
    return np.array(sorted(pairs), int).reshape(-1, 2)


def _standard_bonds(atoms: Atoms, labels: Sequence[AtomLabel]) -> set[tuple[int, int]]:
    """Bonds that OpenMM knows of amino acids, nucleotides and water, and disulfides."""
    from openmm import unit
    from openmm.app import PDBFile

    PDBFile._loadNameReplacementTables()  # as OpenMM's own readers do
    renamed: list[AtomLabel] = []
    names_seen: set[str] = set()
    before: AtomLabel | None = None
    for label in labels:
        residue = PDBFile._residueNameReplacements.get(label.residue_name, label.residue_name)
        names = PDBFile._atomNameReplacements.get(residue, {})
        name = names.get(label.name, label.name)
        if before is None or label.residue != before.residue:
            names_seen = set()
        # Of two atoms with one name no table can say which is meant.
        name = f"?{len(renamed)}" if name in names_seen else name
        names_seen.add(name)
        before = label
        renamed.append(label._replace(name=name, residue_name=residue))
    shadow = build_topology(atoms, renamed, np.zeros((0, 2), int))
    shadow.createStandardBonds()
    shadow.createDisulfideBonds(atoms.positions * unit.angstrom)
    pairs = np.array([sorted((a.index, b.index)) for a, b in shadow.bonds()], int).reshape(-1, 2)
    return {(i, j) for i, j in pairs[_near(atoms, pairs)].tolist()}


def _near(atoms: Atoms, pairs: np.ndarray) -> np.ndarray:
    """Whether atoms (m, 2) can be bonded: tables may not mean what a file calls like theirs."""
    from ase.data import covalent_radii
    from ase.geometry import find_mic

    if not len(pairs):
        return np.zeros(0, bool)
    vectors = atoms.positions[pairs[:, 1]] - atoms.positions[pairs[:, 0]]
    lengths = find_mic(vectors, atoms.cell, atoms.pbc)[1]
    return lengths < _FARTHEST * covalent_radii[atoms.numbers[pairs]].sum(axis=1)


def make_topology(structure: Structure) -> Any:
    """OpenMM topology of a structure: its own, or one residue per molecule.

    Returns:
        ``openmm.app.Topology`` with the box of ``structure.atoms`` when they are periodic.

    Raises:
        StructureError: if OpenMM has no such box; ``reduce_structure`` turns it into one it has.
    """
    atoms = structure.atoms
    topology = structure.topology
    if topology is None:
        pairs = bonds(atoms) if structure.bonds is None else structure.bonds
        topology = build_topology(atoms, labels_of(atoms), pairs, structure.formal_charges)
    box = None
    if atoms.pbc.all() and atoms.cell.rank == 3:
        from openmm import Vec3, unit

        cell = atoms.cell.array
        if not np.allclose(np.triu(cell, 1), 0) or not (np.diag(cell) > 0).all():
            raise StructureError(
                "OpenMM wants a cell with its first vector along x and its second in the xy plane; "
                "turn cell and positions with reduce_structure"
            )
        box = [Vec3(*row) for row in reduce_lattice(cell)[0]] * unit.angstrom
    topology.setPeriodicBoxVectors(box)
    return topology
