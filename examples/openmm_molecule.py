"""The twin of ase_molecule.py: the same molecule and potential with OpenMM and mdtraj.

Run:  python examples/openmm_molecule.py [--model organics-gfn2] [--steps 1000]
"""

import argparse

import mdtraj
import numpy as np
import openmm
from openmm import app, unit
from openmmml import MLPotential

from mlip_md.integrations.md.structures import make_topology, read_structure
from mlip_md.integrations.openmm import minimize


def main(model: str, steps: int) -> None:
    structure = read_structure("paracetamol")  # or app.PDBFile("your-molecule.pdb")
    topology = make_topology(structure)
    potential = MLPotential("mlip-md", modelPath=model)
    system = potential.createSystem(topology, removeCMMotion=False)

    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 10 / unit.picosecond, 0.5 * unit.femtoseconds
    )
    simulation = app.Simulation(topology, system, integrator)
    simulation.context.setPositions(structure.atoms.positions * unit.angstrom)
    minimize(simulation, maxIterations=50)
    energy = simulation.context.getState(energy=True).getPotentialEnergy()
    print(f"relaxed: {energy.value_in_unit(unit.kilojoule_per_mole):.2f} kJ/mol of interaction")

    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    simulation.reporters.append(app.DCDReporter("openmm_molecule.dcd", 10))
    simulation.reporters.append(
        app.StateDataReporter(
            "openmm_molecule.csv", 10, step=True, potentialEnergy=True, temperature=True
        )
    )
    simulation.step(steps)

    trajectory = mdtraj.load("openmm_molecule.dcd", top=mdtraj.Topology.from_openmm(topology))
    bonds = 10 * mdtraj.compute_distances(trajectory, [[1, 2]])  # C=O of the amide, nm to Å
    print(f"{trajectory.n_frames} frames")
    print(f"C=O distance: {np.mean(bonds):.3f} ± {np.std(bonds):.3f} Å")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="organics-gfn2")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    main(arguments.model, arguments.steps)
