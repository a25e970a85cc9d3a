"""A box of water at constant pressure: density and O-O radial distribution function.

Run:  python examples/openmm_water.py [--size 1.25] [--steps 20000]      (size in nm)
"""

import argparse
import sys

import mdtraj
import numpy as np
import openmm
from openmm import app, unit
from openmmml import MLPotential

from mlip_md.integrations.openmm import minimize


def water_box(size: float) -> app.Modeller:
    """Waters at about the density of the liquid in a cube; the force field only places them."""
    empty = app.Modeller(app.Topology(), [] * unit.nanometer)
    empty.addSolvent(app.ForceField("amber14/tip3p.xml"), boxSize=openmm.Vec3(size, size, size))
    return empty


def main(model: str, size: float, steps: int, interval: int) -> None:
    water = water_box(size)
    topology = water.topology
    print(f"{topology.getNumResidues()} waters")
    # moleculeBonds: the barostat shall move whole molecules, not atoms.
    system = MLPotential("mlip-md", modelPath=model).createSystem(topology, moleculeBonds=True)
    system.addForce(openmm.MonteCarloBarostat(1 * unit.bar, 300 * unit.kelvin))

    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtoseconds
    )
    simulation = app.Simulation(topology, system, integrator)
    simulation.context.setPositions(water.positions)
    minimize(simulation, maxIterations=20)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    simulation.reporters += [
        app.XTCReporter("openmm_water.xtc", interval),
        app.StateDataReporter("openmm_water.csv", interval, step=True, temperature=True,
                              potentialEnergy=True, density=True),
        app.StateDataReporter(sys.stdout, steps // 5, totalSteps=steps, progress=True,
                              remainingTime=True, speed=True, density=True),
    ]  # fmt: skip
    simulation.step(steps)

    trajectory = mdtraj.load("openmm_water.xtc", top=mdtraj.Topology.from_openmm(topology))
    half = trajectory[trajectory.n_frames // 2 :]
    mass = sum(atom.element.mass.value_in_unit(unit.dalton) for atom in topology.atoms())
    density = mass * 1.66054e-3 / half.unitcell_volumes  # dalton / nm³ to g/cm³
    print(f"density: {density.mean():.3f} ± {density.std():.3f} g/cm³")
    oxygens = trajectory.topology.select("element O")
    pairs = trajectory.topology.select_pairs(oxygens, oxygens)
    reach = 0.5 * float(half.unitcell_lengths.min())
    r, g = mdtraj.compute_rdf(half, pairs, r_range=(0.2, reach), bin_width=0.01)
    np.savetxt("openmm_water_rdf.csv", np.column_stack([r, g]), delimiter=",", header="r_nm,g_OO")
    print(f"first peak of g(r) of O-O: {g.max():.2f} at {10 * r[g.argmax()]:.2f} Å")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="organics-gfn2")
    parser.add_argument("--size", type=float, default=1.25)
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--interval", type=int, default=50)
    arguments = parser.parse_args()
    main(arguments.model, arguments.size, arguments.steps, arguments.interval)
