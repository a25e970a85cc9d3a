"""Part of a solvated system with the ML potential, the rest with a force field.

The part is a whole peptide ("ligand"), or its side chain only ("side-chain"): there a link atom, a
hydrogen that OpenMM places on the bond between the two parts, caps the ML part.

Run:  python examples/openmm_mixed.py [--part side-chain] [--steps 2000]
"""

import argparse
from pathlib import Path

import mdtraj
import numpy as np
import openmm
from openmm import app, unit
from openmmml import MLPotential

from mlip_md.integrations.openmm import minimize

PEPTIDE = Path(__file__).parent / "alanine_dipeptide.pdb"


def main(model: str, part: str, size: float, steps: int) -> None:
    pdb = app.PDBFile(str(PEPTIDE))
    field = app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    solvated = app.Modeller(pdb.topology, pdb.positions)
    solvated.addSolvent(field, boxSize=openmm.Vec3(size, size, size))
    mm_system = field.createSystem(
        solvated.topology,
        nonbondedMethod=app.PME,
        nonbondedCutoff=min(0.9, 0.45 * size) * unit.nanometer,
        constraints=app.HBonds,
    )
    side_chain = {"CB", "HB1", "HB2", "HB3"}
    atoms = [
        atom.index
        for atom in solvated.topology.atoms()
        if atom.residue.name in ("ACE", "ALA", "NME")
        and (part == "ligand" or atom.name in side_chain)
    ]
    # With link atoms the System has more particles than before: returnInfo tells which are which.
    mixed = MLPotential("mlip-md", modelPath=model).createMixedSystem(
        solvated.topology, mm_system, atoms, returnInfo=True, moleculeBonds=True
    )
    system, topology = mixed["system"], mixed["topology"]
    print(f"{len(atoms)} ML atoms, {system.getNumParticles()} particles")
    positions = np.zeros((system.getNumParticles(), 3))
    positions[mixed["oldToNew"]] = solvated.positions.value_in_unit(unit.nanometer)

    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtoseconds
    )
    simulation = app.Simulation(topology, system, integrator)
    simulation.context.setPositions(positions)
    simulation.context.computeVirtualSites()
    minimize(simulation, maxIterations=50)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    simulation.reporters.append(app.DCDReporter("openmm_mixed.dcd", 10))
    simulation.step(steps)

    trajectory = mdtraj.load("openmm_mixed.dcd", top=mdtraj.Topology.from_openmm(topology))
    bond = [list(trajectory.topology.select("name CA or name CB"))]
    lengths = 10 * mdtraj.compute_distances(trajectory, bond)
    print(f"CA-CB distance: {lengths.mean():.3f} ± {lengths.std():.3f} Å")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="organics-gfn2")
    parser.add_argument("--part", choices=["ligand", "side-chain"], default="ligand")
    parser.add_argument("--size", type=float, default=2.4)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    main(arguments.model, arguments.part, arguments.size, arguments.steps)
