"""From force field to ML potential: replica exchange over λ, and the free energy between them.

The energy is linear in λ, so dF/dλ = <E(λ=1) - E(λ=0)>, integrated over the states (trapezoids).

Run:  python examples/openmm_lambda.py [--states 6] [--iterations 200]
"""

import argparse
from pathlib import Path

import numpy as np
import openmm
from openmm import app, unit
from openmmml import MLPotential

from mlip_md.integrations.openmm import minimize

PEPTIDE = Path(__file__).parent / "alanine_dipeptide.pdb"


def main(model: str, states: int, iterations: int, steps: int) -> None:
    pdb = app.PDBFile(str(PEPTIDE))
    mm_system = app.ForceField("amber14-all.xml").createSystem(pdb.topology)
    system = MLPotential("mlip-md", modelPath=model).createMixedSystem(
        pdb.topology, mm_system, range(pdb.topology.getNumAtoms()), interpolate=True
    )
    integrator = openmm.LangevinMiddleIntegrator(
        300 * unit.kelvin, 1 / unit.picosecond, 0.5 * unit.femtoseconds
    )
    simulation = app.Simulation(pdb.topology, system, integrator)
    simulation.context.setPositions(pdb.positions)
    minimize(simulation, maxIterations=50)
    simulation.context.setVelocitiesToTemperature(300 * unit.kelvin, 1)

    fractions = np.linspace(0.0, 1.0, states)
    sampler = app.ReplicaExchangeSampler(
        [{"lambda_interpolate": x} for x in fractions], simulation, stepsPerIteration=steps
    )
    differences = np.zeros((iterations, states))
    visited = []

    def record(sampler: app.ReplicaExchangeSampler) -> None:
        """E(λ=1) - E(λ=0) of every replica, filed under the state that it is in."""
        row = differences[sampler.currentIteration - 1]
        for state, energies in zip(
            sampler.replicaStateIndex, sampler.replicaStateEnergy, strict=True
        ):
            row[state] = (energies[-1] - energies[0]).value_in_unit(unit.kilojoule_per_mole)
        visited.append(list(sampler.replicaStateIndex))

    sampler.reporters.append(record)
    sampler.simulate(iterations)

    exchanges = np.count_nonzero(np.diff(visited, axis=0))
    print(f"{exchanges} changes of state in {iterations} iterations of {states} replicas")
    means = differences[iterations // 5 :].mean(axis=0)
    for fraction, mean in zip(fractions, means, strict=True):
        print(f"λ = {fraction:.2f}: dF/dλ = {mean:9.2f} kJ/mol")
    print(f"F(ML) - F(force field) = {np.trapezoid(means, fractions):.2f} kJ/mol")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="organics-gfn2")
    parser.add_argument("--states", type=int, default=6)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    main(arguments.model, arguments.states, arguments.iterations, arguments.steps)
