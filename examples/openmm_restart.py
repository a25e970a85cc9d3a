"""Stop and go on: the System from XML, the state from a checkpoint, the same trajectory.

Run:  python examples/openmm_restart.py [--steps 500]
"""

import argparse
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit
from openmmml import MLPotential

from mlip_md.integrations.md.structures import make_topology, read_structure


def simulate(topology: app.Topology, system: openmm.System) -> app.Simulation:
    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtoseconds
    )
    integrator.setRandomNumberSeed(1)
    platform = openmm.Platform.getPlatformByName("Reference")  # repeats itself to the last bit
    return app.Simulation(topology, system, integrator, platform)


def positions_of(simulation: app.Simulation) -> np.ndarray:
    return simulation.context.getState(positions=True).getPositions(asNumpy=True)._value


def main(model: str, steps: int) -> None:
    structure = read_structure("paracetamol")
    topology = make_topology(structure)
    system = MLPotential("mlip-md", modelPath=model).createSystem(topology)
    # The XML names the model file and its hash; embedModel=True would put the model itself in.
    Path("system.xml").write_text(openmm.XmlSerializer.serialize(system))

    first = simulate(topology, system)
    first.context.setPositions(structure.atoms.positions * unit.angstrom)
    first.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)
    first.reporters.append(app.CheckpointReporter("restart.chk", steps))
    first.step(steps)
    first.reporters.clear()
    first.step(steps)  # what an interrupted run would have missed

    again = simulate(
        topology, openmm.XmlSerializer.deserialize(Path("system.xml").read_text(encoding="utf-8"))
    )
    again.loadCheckpoint("restart.chk")
    print(f"going on at step {again.currentStep}")
    again.step(steps)
    difference = np.abs(positions_of(again) - positions_of(first)).max()
    print(f"largest difference to the run that was not stopped: {difference:g} nm")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="organics-gfn2")
    parser.add_argument("--steps", type=int, default=500)
    arguments = parser.parse_args()
    main(arguments.model, arguments.steps)
