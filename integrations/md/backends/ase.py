"""Molecular dynamics and minimization with ASE."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ase
import numpy as np
from ase import Atoms, units
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE

from mlip_md.errors import ConfigError, StructureError
from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.md.report import BAR, Frame
from mlip_md.integrations.md.structures import Structure
from mlip_md.integrations.models import DTYPES

if TYPE_CHECKING:
    from mlip_md.integrations.md.run import MDSettings

MINIMIZE_FORCE = 0.05
MINIMIZE_STEPS = 300


def degrees_of_freedom(atoms: Atoms, ensemble: str) -> int:
    """Number of momenta that are free: thermostats touch all 3N, nve conserves the total ones."""
    count = 3 * len(atoms)
    if ensemble != "nve":
        return count
    count -= 3
    if not atoms.pbc.any():
        moments = atoms.get_moments_of_inertia()
        count -= int(np.sum(moments > 1e-6 * max(float(moments.max()), 1e-12)))
    return max(count, 1)


def draw_velocities(
    atoms: Atoms, ensemble: str, temperature_K: float, rng: np.random.Generator
) -> None:
    """Give atoms velocities of a temperature; in nve without total momentum and rotation."""
    thermalize_momenta(atoms, temperature_K, rng=rng)
    if ensemble != "nve" or len(atoms) == 1:
        return
    Stationary(atoms, preserve_temperature=False)
    if not atoms.pbc.any():
        ZeroRotation(atoms, preserve_temperature=False)
    kinetic = atoms.get_kinetic_energy()
    wanted = 0.5 * degrees_of_freedom(atoms, ensemble) * units.kB * temperature_K
    if kinetic > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(wanted / kinetic))


class ASEBackend:
    """Velocity Verlet, Langevin or isotropic MTK dynamics of ASE.

    Args:
        settings: ensemble, temperature, time step, precision.
        structure: what to run.
    """

    def __init__(self, settings: MDSettings, structure: Structure) -> None:
        self.settings = settings
        self.structure = structure
        self.atoms = structure.atoms.copy()
        self.calculator = MLIPCalculator(
            settings.model, dtype=DTYPES[settings.precision], device=settings.device
        )
        self.potential = self.calculator.potential
        self.potential.species(self.atoms.numbers)
        self.atoms.calc = self.calculator
        self.rng = np.random.default_rng(settings.seed)
        self._dynamics: MolecularDynamics | None = None
        self._steps_before = 0

    def warm_up(self) -> None:
        """Evaluate once, so that everything is compiled."""
        self.atoms.get_potential_energy()

    def minimize(self) -> bool:
        """Relax the positions (FIRE); False if the steps were used up before forces were small."""
        run = FIRE(self.atoms, logfile=None)
        return bool(run.run(fmax=MINIMIZE_FORCE, steps=MINIMIZE_STEPS))

    def start(self) -> None:
        """Draw velocities and set up the integrator."""
        draw_velocities(self.atoms, self.settings.ensemble, self.settings.temperature, self.rng)
        self._dynamics = self._integrator()

    @property
    def dynamics(self) -> MolecularDynamics:
        """The integrator, once the run has started."""
        if self._dynamics is None:
            raise ConfigError("the run has not been started (start or restore)")
        return self._dynamics

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

    def advance(self, steps: int) -> None:
        """Integrate a number of steps."""
        self.dynamics.run(steps)

    def frame(self) -> Frame:
        """The present state."""
        from mlip_md.integrations.md.run import temperature

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
            temperature=temperature(kinetic, degrees_of_freedom(atoms, settings.ensemble)),
            pressure=pressure,
        )

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Positions, momenta, cell, thermostat variables; random state and step."""
        atoms = self.atoms
        arrays = {
            "positions": atoms.get_positions(),
            "momenta": atoms.get_momenta(),
            "cell": np.array(atoms.cell),
        }
        arrays |= {f"mtk_{name}": np.array(value) for name, value in self._mtk().items()}
        return arrays, {"rng": self.rng.bit_generator.state}

    def _mtk(self) -> dict[str, Any]:
        """Variables of the MTK integrator beyond positions and momenta."""
        if not isinstance(self.dynamics, IsotropicMTKNPT):
            return {}
        npt = self.dynamics
        return {
            "eta": npt._thermostat._eta,
            "p_eta": npt._thermostat._p_eta,
            "xi": npt._barostat._xi,
            "p_xi": npt._barostat._p_xi,
            "eps": npt._eps,
            "p_eps": npt._p_eps,
            "cell0": npt._cell0,
            "volume0": npt._volume0,
        }

    def restore(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Set up the integrator in a saved state."""
        self.atoms.set_cell(arrays["cell"])
        self.atoms.set_positions(arrays["positions"])
        self.atoms.set_momenta(arrays["momenta"])
        self.rng.bit_generator.state = values["rng"]
        self._dynamics = self._integrator()
        self._steps_before = int(values["step"])
        if isinstance(self._dynamics, IsotropicMTKNPT):
            npt = self._dynamics
            npt._thermostat._eta, npt._thermostat._p_eta = arrays["mtk_eta"], arrays["mtk_p_eta"]
            npt._barostat._xi, npt._barostat._p_xi = arrays["mtk_xi"], arrays["mtk_p_xi"]
            npt._eps, npt._p_eps = float(arrays["mtk_eps"]), float(arrays["mtk_p_eps"])
            npt._cell0, npt._volume0 = arrays["mtk_cell0"], float(arrays["mtk_volume0"])

    def describe(self) -> dict[str, Any]:
        """Engine, integrator, precision."""
        return {
            "engine": f"ASE {ase.__version__}",
            "integrator": type(self.dynamics).__name__,
            "precision": self.settings.precision,
        }

    def compilations(self) -> int:
        """How often the potential has been compiled so far."""
        return self.calculator.engine.num_compilations


def minimize(
    atoms: Atoms,
    calculator: MLIPCalculator,
    *,
    fmax: float = 0.01,
    steps: int = 500,
    relax_cell: bool = False,
    optimizer: str = "bfgs",
    observer: Callable[[int, float, float], None] | None = None,
) -> tuple[Atoms, bool]:
    """Relax a structure.

    Args:
        atoms: the structure; not changed.
        calculator: the potential.
        fmax: eV/Å, largest force on an atom at which to stop.
        steps: at most so many steps.
        relax_cell: relax the cell too (at zero pressure); periodic structures only.
        optimizer: "bfgs" (small structures) or "fire".
        observer: called with step, energy (eV) and largest force (eV/Å) at every step.

    Returns:
        The relaxed copy with its calculator, and whether it converged.

    Raises:
        ConfigError: on an unknown optimizer.
        StructureError: if the cell cannot be relaxed because there is none.
    """
    optimizers = {"bfgs": BFGS, "fire": FIRE}
    if optimizer not in optimizers:
        raise ConfigError(f"optimizer = {optimizer!r} is not allowed; it must be bfgs or fire")
    if relax_cell and (atoms.cell.rank < 3 or not atoms.pbc.all()):
        raise StructureError(
            "only a structure with a cell, periodic in three directions, has one to relax"
        )
    relaxed = atoms.copy()
    relaxed.calc = calculator
    target = FrechetCellFilter(relaxed) if relax_cell else relaxed
    run = optimizers[optimizer](target, logfile=None)

    def observe() -> None:
        if observer is not None:
            largest = float(np.linalg.norm(target.get_forces(), axis=1).max())
            observer(run.nsteps, float(relaxed.get_potential_energy()), largest)

    run.attach(observe)
    converged = bool(run.run(fmax=fmax, steps=steps))
    return relaxed, converged
