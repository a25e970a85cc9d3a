"""OpenMM topologies of structures."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlip_md.integrations.md.structures.description import Structure
from mlip_md.integrations.md.structures.molecules import bonds, molecules


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
