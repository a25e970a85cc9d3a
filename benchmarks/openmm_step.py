"""What an OpenMM step costs beside the potential: this package against OpenMM-ML's ASE route.

Both routes run the same potential on the same water, step by step in turn, so that a busy machine
slows both. First with the potential's answer held fixed: what is left is the callback. Then with
the potential computing. Milliseconds per step, medians.

Run:  python benchmarks/openmm_step.py [--atoms 102 999] [--platform CPU] [--rounds 200]
"""

import argparse
import time
from unittest import mock

import numpy as np
import openmm
from openmm import app, unit
from openmmml import MLPotential

from mlip_md.engine import Engine
from mlip_md.integrations.ase import MLIPCalculator


class Nothing:
    """A force that does nothing: what OpenMM itself takes to call Python."""

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        return 0.0, np.zeros_like(state.getPositions(asNumpy=True)._value)


def water(n_atoms: int, periodic: bool) -> tuple[app.Topology, np.ndarray]:
    """Topology and positions (nm) of a box of liquid water with about that many atoms."""
    size = (n_atoms / 3 / 33.0) ** (1 / 3) + 0.4
    box = app.Modeller(app.Topology(), [] * unit.nanometer)
    box.addSolvent(app.ForceField("amber14/tip3p.xml"), boxSize=openmm.Vec3(size, size, size))
    residues = list(box.topology.residues())
    box.delete(residues[n_atoms // 3 :])
    if not periodic:
        box.topology.setPeriodicBoxVectors(None)
    return box.topology, np.array(box.positions.value_in_unit(unit.nanometer))


def contexts(model: str, topology: app.Topology, positions: np.ndarray, platform: str) -> dict:
    """A Context per route, ready to step."""
    nothing = openmm.System()
    for atom in topology.atoms():
        nothing.addParticle(atom.element.mass)
    nothing.addForce(openmm.PythonForce(Nothing()))
    systems = {
        "nothing": nothing,
        "mlip-md": MLPotential("mlip-md", modelPath=model).createSystem(topology),
        "ase": MLPotential("ase").createSystem(topology, calculator=MLIPCalculator(model)),
    }
    made = {}
    for name, system in systems.items():
        integrator = openmm.VerletIntegrator(1e-5)  # hardly moves: every step is the same work
        made[name] = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform))
        made[name].setPositions(positions)
        made[name].setVelocitiesToTemperature(300 * unit.kelvin, 1)
        integrator.step(1)
    return made


def milliseconds(made: dict, rounds: int) -> dict[str, float]:
    """Median time of a step of each Context, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, context in made.items():
            begin = time.perf_counter()
            context.getIntegrator().step(1)
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: float(np.median(values)) for name, values in times.items()}


def main(model: str, sizes: list[int], platform: str, rounds: int) -> None:
    print(f"model {model}, OpenMM {openmm.version.short_version}, platform {platform}")
    print(f"{'atoms':>6} {'box':>4} {'potential':>10} {'nothing':>9} {'mlip-md':>9} {'ase':>9}")
    for n_atoms in sizes:
        for periodic in (False, True):
            topology, positions = water(n_atoms, periodic)
            made = contexts(model, topology, positions, platform)
            engine = Engine(MLIPCalculator(model).potential)
            numbers = [atom.element.atomic_number for atom in topology.atoms()]
            cell = None
            if periodic:
                cell = 10 * np.array(topology.getPeriodicBoxVectors().value_in_unit(unit.nanometer))
            answer = engine.evaluate(10 * positions, numbers, cell, periodic)
            with mock.patch.object(Engine, "evaluate", return_value=answer) as evaluate:
                fixed = milliseconds(made, rounds)
                if evaluate.call_count != 2 * rounds:
                    raise RuntimeError(f"{evaluate.call_count} calls in {2 * rounds} steps")
            computing = milliseconds(made, max(rounds // 10, 5))
            for label, times in (("fixed", fixed), ("computed", computing)):
                cells = " ".join(f"{times[name]:9.3f}" for name in ("nothing", "mlip-md", "ase"))
                print(f"{len(numbers):6d} {'yes' if periodic else 'no':>4} {label:>10} {cells}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="organics-gfn2")
    parser.add_argument("--atoms", type=int, nargs="+", default=[102, 999])
    parser.add_argument("--platform", default="CPU")
    parser.add_argument("--rounds", type=int, default=200)
    arguments = parser.parse_args()
    main(arguments.model, arguments.atoms, arguments.platform, arguments.rounds)
