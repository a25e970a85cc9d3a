"""One program in a race of steps: it is told by lines of JSON what to do, and answers by others.

Runs in the environment of the program that it stands for; ``steps.py`` starts it. Nothing of this
project is imported but by the contestant "mlip-md".
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

FOLDER = Path(__file__).with_name("systems")


def mlip_md(model: str, _atoms: Atoms) -> Calculator:
    """This package; ``model`` is what ``mlip_md.load`` opens."""
    import mlip_md as package
    from mlip_md.integrations.ase import MLIPCalculator

    if hasattr(package, "keep_memory"):  # older versions have none
        package.keep_memory()
    return MLIPCalculator(model)


def instadeep(model: str, atoms: Atoms) -> Calculator:
    """InstaDeep's mlip, generation 1, by its own calculator; ``model`` is a zip."""
    import jax
    import mlip.models_v1 as models
    from mlip.models.model_io import load_model_from_zip
    from mlip.simulation.ase.mlip_ase_calculator import MLIPForceFieldASECalculator

    # its loader asks for the shapes of weights only, by a slow call
    init = models.ForceFieldPredictorV1.init
    models.ForceFieldPredictorV1.init = lambda *a: jax.eval_shape(lambda: init(*a))
    network = models.Nequip if "nequip" in Path(model).name else models.Mace
    return MLIPForceFieldASECalculator(atoms, 1.25, load_model_from_zip(network, model))


def mace_torch(model: str, _atoms: Atoms) -> Calculator:
    """mace-torch; ``model`` is one of its files."""
    from mace.calculators import MACECalculator

    return MACECalculator(model_paths=model, device="cpu", default_dtype="float32")


def symmetrix(model: str, _atoms: Atoms) -> Calculator:
    """symmetrix-xl; ``model`` is what its symmetrix_extract_mace writes."""
    from symmetrix import Symmetrix

    return Symmetrix(model)


CONTESTANTS: dict[str, Callable[[str, Atoms], Calculator]] = {
    "mlip-md": mlip_md,
    "mlip": instadeep,
    "mace-torch": mace_torch,
    "symmetrix-xl": symmetrix,
}


class Race:
    """A structure whose atoms move a little at every step, the same in every program."""

    def __init__(self, program: str, model: str, system: str):
        atoms = ase.io.read(FOLDER / f"{system}.xyz")
        self.atoms = Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc)
        self.start = self.atoms.get_positions()
        before = time.process_time(), time.perf_counter()
        self.atoms.calc = CONTESTANTS[program](model, self.atoms)
        self.step(0)
        self.first = time.process_time() - before[0], time.perf_counter() - before[1]

    def step(self, index: int) -> tuple[float, float]:
        """CPU and wall time (s) of energy and forces at other positions."""
        rng = np.random.default_rng(index)
        self.atoms.positions = self.start + rng.normal(scale=0.005, size=self.start.shape)
        cpu, wall = time.process_time(), time.perf_counter()
        self.forces = self.atoms.get_forces()
        self.energy = self.atoms.get_potential_energy()
        return time.process_time() - cpu, time.perf_counter() - wall

    def told(self) -> dict:
        """First step (CPU and wall s), memory so far (GB) and results of the last step."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "first": self.first,
            "peak_gb": usage.ru_maxrss / 1e6,
            "energy": float(self.energy),
            "forces": np.asarray(self.forces, float).ravel().tolist(),
        }


def main() -> None:
    """Read orders from standard input until it ends."""
    program, model, system = sys.argv[1:]
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print
    race = Race(program, model, system)
    print(json.dumps(race.told()), file=out, flush=True)
    for line in sys.stdin:
        steps = [race.step(index) for index in json.loads(line)]
        print(json.dumps({"steps": steps, **race.told()}), file=out, flush=True)


if __name__ == "__main__":
    main()
