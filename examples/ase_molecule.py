"""A molecule in vacuum with ASE: relax it, run NVT dynamics, look at what came out.

Run:  python examples/ase_molecule.py [--model organics-gfn2] [--steps 1000]
"""

import argparse

import numpy as np
from ase import units
from ase.io import read
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import BFGS

from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.md.structures import read_structure


def main(model: str, steps: int) -> None:
    atoms = read_structure("paracetamol").atoms  # or ase.io.read("your-molecule.xyz")
    atoms.calc = MLIPCalculator(model)

    BFGS(atoms, logfile=None).run(fmax=0.05, steps=50)
    print(f"relaxed: {atoms.get_potential_energy():.4f} eV")

    rng = np.random.default_rng(0)
    thermalize_momenta(atoms, temperature_K=300, rng=rng)
    dynamics = Langevin(
        atoms,
        timestep=0.5 * units.fs,
        temperature_K=300,
        friction=0.01 / units.fs,
        fixcm=False,  # with fixcm=True the ensemble is not NVT
        rng=rng,
        trajectory="ase_molecule.traj",
        loginterval=10,
    )
    dynamics.run(steps)

    frames = read("ase_molecule.traj", ":")
    bonds = [frame.get_distance(1, 2) for frame in frames]  # C=O of the amide
    print(f"{len(frames)} frames, last at {frames[-1].get_temperature():.0f} K")
    print(f"C=O distance: {np.mean(bonds):.3f} ± {np.std(bonds):.3f} Å")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="organics-gfn2")
    parser.add_argument("--steps", type=int, default=1000)
    arguments = parser.parse_args()
    main(arguments.model, arguments.steps)
