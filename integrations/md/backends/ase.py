"""Molecular dynamics with ASE."""

from __future__ import annotations

from typing import Any

import ase
import numpy as np
from ase import units
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.verlet import VelocityVerlet
from ase.optimize import FIRE

from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.md.backends.interface import BAR, Backend, Frame
from mlip_md.integrations.md.settings import Ensemble, MDSettings
from mlip_md.integrations.md.structures import Structure
from mlip_md.integrations.md.velocities import (
    DEGREES,
    compute_temperature,
    count_for_run,
    start_velocities,
)
from mlip_md.integrations.models import DTYPE_OF_PRECISION


class ASEBackend(Backend):
    """Velocity Verlet, Langevin or isotropic MTK dynamics of ASE.

    Args:
        settings: ensemble, temperature, time step, precision, device.
        structure: what to run.

    Attributes:
        dynamics: the integrator, once the run has started (``start`` or ``restore``).

    Raises:
        ConfigError: if the device does not exist here.
        ModelFileError: if the model cannot be opened.
        UnsupportedElementError: on an element that the potential does not know.
    """

    title = "ASE"
    holds_axes = True
    dynamics: MolecularDynamics

    @classmethod
    def ignored(cls, ensemble: Ensemble) -> dict[str, str]:
        ignored = {"platform": "only OpenMM has platforms; give --engine openmm"}
        if ensemble == "npt":
            ignored["friction"] = "npt of the ase engine (MTK) has none"
        return ignored

    def __init__(self, settings: MDSettings, structure: Structure) -> None:
        self.settings = settings
        self.structure = structure
        self.atoms = structure.atoms.copy()
        self.calculator = MLIPCalculator(
            settings.model,
            head=settings.head,
            dtype=DTYPE_OF_PRECISION[settings.precision],
            device=settings.device,
        )
        self.potential = self.calculator.potential
        self.potential.species(self.atoms.numbers)
        self.atoms.calc = self.calculator
        self.rng = np.random.default_rng(settings.seed)
        self._steps_before = 0
        self._degrees = 0  # known when the run starts

    def warm_up(self) -> None:
        self.atoms.get_potential_energy()

    def minimize(self, force: float, steps: int) -> bool:
        """Relax the positions (FIRE) until forces are below ``force`` (eV/Å); False if not."""
        return bool(FIRE(self.atoms, logfile=None).run(fmax=force, steps=steps))

    def start(self) -> None:
        start_velocities(self.atoms, self.settings, self.rng)
        self._degrees = count_for_run(self.atoms, self.settings)
        self.dynamics = self._integrator()

    def _integrator(self) -> MolecularDynamics:
        settings, timestep = self.settings, self.settings.timestep * units.fs
        if settings.ensemble == "nve":
            return VelocityVerlet(self.atoms, timestep)
        if settings.ensemble == "nvt":
            return Langevin(
                self.atoms,
                timestep,
                temperature_K=settings.temperature,
                friction=settings.friction * 1e-3 / units.fs,
                fixcm=False,
                rng=self.rng,
            )
        return IsotropicMTKNPT(
            self.atoms,
            timestep,
            temperature_K=settings.temperature,
            pressure_au=settings.pressure * BAR,
            tdamp=100 * timestep,
            pdamp=1000 * timestep,
        )

    def advance(self) -> None:
        self.dynamics.run(1)

    def frame(self) -> Frame:
        atoms, settings = self.atoms, self.settings
        potential, kinetic = atoms.get_potential_energy(), atoms.get_kinetic_energy()
        step = self._steps_before + self.dynamics.nsteps
        conserved = float(potential + kinetic) if settings.ensemble == "nve" else None
        if isinstance(self.dynamics, IsotropicMTKNPT):
            conserved = self.dynamics.get_conserved_energy()
        pressure = None
        if atoms.pbc.all() and atoms.cell.rank == 3:
            pressure = -float(np.mean(atoms.get_stress(include_ideal_gas=True)[:3]))
        return Frame(
            step=step,
            time=step * settings.timestep * 1e-3,
            positions=atoms.get_positions(),
            velocities=atoms.get_velocities() * units.fs,
            cell=np.array(atoms.cell) if atoms.cell.rank == 3 else np.zeros((3, 3)),
            potential=float(potential),
            kinetic=float(kinetic),
            conserved=conserved,
            temperature=compute_temperature(kinetic, self._degrees),
            pressure=pressure,
            forces=atoms.get_forces(apply_constraint=False),
        )

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Positions, momenta, cell, thermostat variables; random state and step."""
        atoms = self.atoms
        arrays = {
            "positions": atoms.get_positions(),
            "momenta": atoms.get_momenta(),
            "cell": np.array(atoms.cell),
        }
        arrays |= {name: np.array(getattr(*place)) for name, place in self._mtk().items()}
        return arrays, {"rng": self.rng.bit_generator.state, DEGREES: self._degrees}

    def _mtk(self) -> dict[str, tuple[Any, str]]:
        """Where the MTK integrator has its variables beyond positions and momenta: attributes."""
        npt = self.dynamics
        if not isinstance(npt, IsotropicMTKNPT):
            return {}
        return {
            "mtk_eta": (npt._thermostat, "_eta"),
            "mtk_p_eta": (npt._thermostat, "_p_eta"),
            "mtk_xi": (npt._barostat, "_xi"),
            "mtk_p_xi": (npt._barostat, "_p_xi"),
            "mtk_eps": (npt, "_eps"),
            "mtk_p_eps": (npt, "_p_eps"),
            "mtk_cell0": (npt, "_cell0"),
            "mtk_volume0": (npt, "_volume0"),
        }

    def restore(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        self.atoms.set_cell(arrays["cell"])
        self.atoms.set_positions(arrays["positions"])
        self.atoms.set_momenta(arrays["momenta"])
        self._degrees = count_for_run(self.atoms, self.settings, values)
        self.rng.bit_generator.state = values["rng"]
        self.dynamics = self._integrator()
        self._steps_before = int(values["step"])
        for name, place in self._mtk().items():
            setattr(*place, arrays[name] if arrays[name].ndim else float(arrays[name]))

    def describe(self) -> dict[str, Any]:
        return {
            "engine": f"{self.title} {ase.__version__}",
            "integrator": type(self.dynamics).__name__,
            "precision": self.settings.precision,
        }

    def compilations(self) -> int:
        return self.calculator.engine.num_compilations
