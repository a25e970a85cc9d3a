"""Relaxed scan of a torsion: the amide of paracetamol turns about its N-C(aryl) bond.

A restraint of OpenMM holds the angle; the energy printed is that of the ML potential alone.

Run:  python examples/openmm_torsion.py [--points 13]
"""

import argparse

import mdtraj
import numpy as np
import openmm
from openmm import app, unit
from openmmml import MLPotential

from mlip_md.integrations.md.structures import make_topology, read_structure
from mlip_md.integrations.openmm import minimize

TORSION = (1, 3, 4, 5)  # C(carbonyl), N, C(aryl), C(aryl)
ARYL = [4, 5, 6, 7, 8, 9, 10, 15, 16, 17, 18, 19]  # what turns


def main(model: str, points: int, iterations: int) -> None:
    structure = read_structure("paracetamol")
    topology = make_topology(structure)
    system = MLPotential("mlip-md", modelPath=model).createSystem(topology)
    restraint = openmm.CustomTorsionForce("2000 * (1 - cos(theta - target))")
    restraint.addGlobalParameter("target", 0.0)
    restraint.addTorsion(*TORSION)
    restraint.setForceGroup(1)
    system.addForce(restraint)

    simulation = app.Simulation(topology, system, openmm.VerletIntegrator(0.0005))
    atoms, energies, frames = structure.atoms, [], []
    for angle in np.linspace(0.0, 180.0, points):
        atoms.set_dihedral(*TORSION, angle, indices=ARYL)
        simulation.context.setPositions(atoms.positions * unit.angstrom)
        simulation.context.setParameter("target", np.radians(angle))
        minimize(simulation, maxIterations=iterations)
        state = simulation.context.getState(energy=True, positions=True, groups={0})
        energies.append(state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole))
        frames.append(state.getPositions(asNumpy=True).value_in_unit(unit.nanometer))
        atoms.positions = 10 * frames[-1]

    trajectory = mdtraj.Trajectory(np.array(frames), mdtraj.Topology.from_openmm(topology))
    trajectory.save_pdb("openmm_torsion.pdb")
    reached = np.degrees(mdtraj.compute_dihedrals(trajectory, [TORSION]))[:, 0]
    for angle, energy in zip(reached, np.array(energies) - min(energies), strict=True):
        print(f"{angle:7.1f}°  {energy:7.2f} kJ/mol")
    print(f"barrier: {max(energies) - min(energies):.2f} kJ/mol")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="organics-gfn2")
    parser.add_argument("--points", type=int, default=13)
    parser.add_argument("--iterations", type=int, default=200)
    arguments = parser.parse_args()
    main(arguments.model, arguments.points, arguments.iterations)
