"""Does a potential keep small molecules together? The closed-shell ones of ASE's G2 set.

    python benchmarks/bundled_molecules.py --output molecules.json [--model FILE] [--only H2O O3]

Each molecule of elements that the bundled potential knows is relaxed in three ways, by ASE's BFGS,
by ``mlip_md.integrations.openmm.minimize`` and by OpenMM's own ``minimizeEnergy``, compared with
its separated atoms, and moved for 1 ps at 300 K. A bond counts as broken beyond 1.5 times its
length in the set. Those that fail are tried with GFN2-xTB itself, where tblite is installed
(extra [data]): a potential that imitates it cannot be better. The exit status is 1 if more than
``--allowed`` molecules fail.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import openmm
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.collections import g2
from ase.data import covalent_radii
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import BFGS
from openmm import app, unit
from openmmml import MLPotential

from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.openmm import minimize
from mlip_md.trainer.generate.labels import METHODS

ELEMENTS = {1, 6, 7, 8, 9, 15, 16, 17, 35}
BROKEN = 1.5
"""Times the length in the set."""
FEMTOSECONDS, STEPS, KELVIN = 0.5, 2000, 300


def closed_shell() -> list[str]:
    """Names of the molecules of the set without unpaired electrons."""
    return sorted(
        name
        for name in g2.names
        if set(g2[name].numbers) <= ELEMENTS and not g2[name].get_initial_magnetic_moments().any()
    )


class Bonds:
    """Bonds of a molecule as the set has it, and how far they were stretched."""

    def __init__(self, atoms: Atoms):
        radii = covalent_radii[atoms.numbers]
        close = atoms.get_all_distances() < 1.3 * (radii[:, None] + radii)
        self.pairs = np.argwhere(np.triu(close, 1))
        self.lengths = self._measure(atoms.positions)

    def _measure(self, positions: np.ndarray) -> np.ndarray:
        return np.linalg.norm(np.subtract(*positions[self.pairs.T]), axis=1)

    def stretch(self, positions: np.ndarray) -> float:
        """Largest length (positions in Å) over that of the set; infinite if there is none."""
        stretch = np.max(self._measure(positions) / self.lengths)
        return float(stretch) if np.isfinite(stretch) else float("inf")


def make_simulation(atoms: Atoms, model: str) -> app.Simulation:
    """An OpenMM Simulation of a molecule, on the Reference platform, whose startup is short."""
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for i, symbol in enumerate(atoms.symbols):
        topology.addAtom(f"{symbol}{i}", app.Element.getBySymbol(symbol), residue)
    system = MLPotential("mlip-md", modelPath=model).createSystem(topology)
    integrator = openmm.LangevinMiddleIntegrator(
        KELVIN * unit.kelvin, 10 / unit.picosecond, FEMTOSECONDS * unit.femtosecond
    )
    integrator.setRandomNumberSeed(1)
    reference = openmm.Platform.getPlatformByName("Reference")
    simulation = app.Simulation(topology, system, integrator, reference)
    simulation.context.setPositions(atoms.positions / 10)
    return simulation


def positions_of(simulation: app.Simulation) -> np.ndarray:
    """Å."""
    state = simulation.context.getState(positions=True)
    return state.getPositions(asNumpy=True).value_in_unit(unit.angstrom)


def try_model(atoms: Atoms, model: str, calculator: MLIPCalculator) -> dict[str, float]:
    """Stretches of the bonds after each relaxation and in dynamics, and the energy of binding."""
    bonds, found = Bonds(atoms), {}
    relaxed = Atoms(atoms.numbers, atoms.positions, calculator=calculator)
    BFGS(relaxed, logfile=None).run(fmax=0.01, steps=500)
    found["bfgs"] = bonds.stretch(relaxed.positions)
    apart = Atoms(atoms.numbers, 50.0 * np.arange(3 * len(atoms)).reshape(-1, 3))
    apart.calc = calculator
    found["binding_eV"] = apart.get_potential_energy() - relaxed.get_potential_energy()
    simulation = make_simulation(atoms, model)
    simulation.minimizeEnergy()
    found["minimizeEnergy"] = bonds.stretch(positions_of(simulation))
    simulation.context.setPositions(atoms.positions / 10)
    minimize(simulation)
    found["minimize"] = bonds.stretch(positions_of(simulation))
    simulation.context.setVelocitiesToTemperature(KELVIN, 1)
    found["dynamics"] = 0.0
    for _ in range(STEPS // 10):
        simulation.step(10)
        found["dynamics"] = max(found["dynamics"], bonds.stretch(positions_of(simulation)))
        if found["dynamics"] > BROKEN:
            break
    return found


class GFN2(Calculator):
    """The method that the bundled potential imitates, as the data set has it."""

    implemented_properties = ("energy", "forces")

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        """Energy (eV) and forces (eV/Å) of a neutral molecule."""
        super().calculate(atoms, properties, system_changes)
        labels = METHODS["gfn2"].label(self.atoms.numbers, self.atoms.positions / units.Bohr, 0, 0)
        self.results = {
            "energy": labels.energy * units.Hartree,
            "forces": -labels.gradient * units.Hartree / units.Bohr,
        }


def try_gfn2(atoms: Atoms) -> dict[str, float | str]:
    """The same of GFN2-xTB: relaxed, and moved for as long."""
    bonds = Bonds(atoms)
    moving = Atoms(atoms.numbers, atoms.positions, calculator=GFN2())
    found: dict[str, float | str] = {}
    try:
        BFGS(moving, logfile=None).run(fmax=0.01, steps=500)
        found["bfgs"] = bonds.stretch(moving.positions)
        rng = np.random.default_rng(1)
        thermalize_momenta(moving, temperature_K=KELVIN, rng=rng)
        dynamics = Langevin(
            moving,
            FEMTOSECONDS * units.fs,
            temperature_K=KELVIN,
            friction=0.01 / units.fs,
            fixcm=False,
            rng=rng,
        )
        found["dynamics"] = 0.0
        for _ in range(STEPS // 10):
            dynamics.run(10)
            found["dynamics"] = max(found["dynamics"], bonds.stretch(moving.positions))
            if found["dynamics"] > BROKEN:
                break
    except Exception as error:  # what the method says is the result
        found["failed"] = str(error).splitlines()[0]
    return found


def holds(found: dict[str, float | str]) -> bool:
    """Whether a molecule stayed together in everything that was tried."""
    stretches = [found.get(k, 0.0) for k in ("bfgs", "minimizeEnergy", "minimize", "dynamics")]
    return "failed" not in found and max(stretches) <= BROKEN and found.get("binding_eV", 1.0) > 0


def main() -> None:
    """Try every molecule and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="organics-gfn2")
    parser.add_argument("--only", nargs="+", default=closed_shell())
    parser.add_argument("--allowed", type=int, default=5)
    options = parser.parse_args()
    calculator = MLIPCalculator(options.model)
    results, failed = {}, []
    for name in options.only:
        atoms = g2[name].copy()
        found: dict = {"model": try_model(atoms, options.model, calculator)}
        if not holds(found["model"]):
            failed.append(name)
            found["gfn2"] = try_gfn2(atoms)
        results[name] = found
        said = [
            f"{method}: "
            + ", ".join(
                f"{k} {v:.3g}" if v == v and not isinstance(v, str) else f"{k} {v}"
                for k, v in numbers.items()
            )
            for method, numbers in found.items()
        ]
        print(f"{name:20s} {'FAILED ' if name in failed else ''}{'; '.join(said)}", flush=True)
        options.output.write_text(json.dumps(results, indent=1))
    print(
        f"{len(results) - len(failed)} of {len(results)} molecules keep their bonds; not: {failed}"
    )
    raise SystemExit(len(failed) > options.allowed)


if __name__ == "__main__":
    main()
