"""Molecular dynamics with OpenMM.

Integrators and the checkpoint are OpenMM's. The minimizer is not (``openmm_minimize`` says why),
nor the barostat (``VolumeMoves``), nor are the reporters: all engines write the same log,
trajectories and restart file, which can be cut back to one point in time, so that a continued run
equals an uninterrupted one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import openmm
import openmm.app
from ase import units
from openmm import unit

from mlip_md.constants import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV
from mlip_md.devices import reserves_most
from mlip_md.errors import CapacityError, ConfigError, SimulationError, StructureError
from mlip_md.hints import hint
from mlip_md.integrations.md.backends.interface import Backend, Frame
from mlip_md.integrations.md.settings import Ensemble, MDSettings
from mlip_md.integrations.md.structures import (
    Structure,
    make_topology,
    reduce_lattice,
    reduce_structure,
    whole_molecules,
)
from mlip_md.integrations.md.velocities import (
    DEGREES,
    compute_temperature,
    count_for_run,
    start_velocities,
)
from mlip_md.integrations.md.volume_moves import MOVE_INTERVAL, VolumeMoves
from mlip_md.integrations.models import DTYPE_OF_PRECISION
from mlip_md.integrations.openmm_calls import read_told
from mlip_md.integrations.openmm_force import MLForce, share_potential
from mlip_md.integrations.openmm_minimize import minimize

logger = logging.getLogger(__name__)

NM_PER_PS = ANGSTROM_PER_NM * 1e-3
"""1 nm/ps in Å/fs."""


def reduce_cell(structure: Structure) -> Structure:
    """Rotate a structure so that its cell has OpenMM's reduced lower triangular form.

    Raises:
        StructureError: if the structure is periodic in one or two directions only.
    """
    atoms = structure.atoms.copy()
    if not atoms.pbc.any():
        atoms.cell = None
        return dataclasses.replace(structure, atoms=atoms)
    if not atoms.pbc.all() or atoms.cell.rank < 3:
        raise StructureError(
            f"OpenMM is periodic in all three directions or in none, this structure has pbc = "
            f"{atoms.pbc.tolist()}; use the ASE engine"
        )
    return reduce_structure(structure)


class OpenMMBackend(Backend):
    """Verlet or Langevin dynamics of OpenMM, with Monte Carlo moves of the volume for npt.

    Args:
        settings: ensemble, temperature, time step, precision, platform, device.
        structure: what to run.

    Raises:
        StructureError: on periodicity in one or two directions only.
        ConfigError: if the platform or device does not exist here.
        ModelFileError: if the model cannot be opened.
        UnsupportedElementError: on an element that the potential does not know.
    """

    title = "OpenMM"
    holds_axes = False

    @classmethod
    def ignored(cls, ensemble: Ensemble) -> dict[str, str]:  # noqa: ARG003 (as every backend has it)
        return {}

    def __init__(self, settings: MDSettings, structure: Structure) -> None:
        self.settings = settings
        self.structure = reduce_cell(structure)
        # OpenMM computes in the frame of a reduced cell; what it gives out is turned back.
        self._rotation, self._vectors = np.eye(3), np.eye(3)
        if structure.atoms.pbc.any():
            cell = structure.atoms.cell.array
            reduced, self._rotation = reduce_lattice(cell)
            self._vectors = np.rint(cell @ self._rotation.T @ np.linalg.inv(reduced))
        self.potential = share_potential(settings.model, head=settings.head)
        self.atoms = self.structure.atoms
        self._periodic = bool(self.atoms.pbc.any())
        species = self.potential.species(self.atoms.numbers)
        self._reference = float(self.potential.reference_energies(species).sum())
        # Kept at hand because the pressure needs the stress, for which OpenMM has no place.
        self._force = MLForce(
            settings.model,
            self.potential.sha256,
            self.atoms.numbers,
            None,
            self._periodic,
            False,
            {"dtype": DTYPE_OF_PRECISION[settings.precision], "device": settings.device},
            head=settings.head,
        )
        _ = self._force.engine  # what it refuses is refused here, not at the first step
        labels = None
        if settings.ensemble == "npt":
            self.atoms.positions, labels = whole_molecules(self.atoms)
        self._simulation = self._make_simulation()
        self._context = self._simulation.context
        self._degrees = 0  # known when the run starts
        self._moves: VolumeMoves | None = None
        if labels is not None:
            self._moves = VolumeMoves(
                self._context, labels, settings.pressure, settings.temperature, settings.seed
            )

    def _make_simulation(self) -> openmm.app.Simulation:
        settings = self.settings
        topology = make_topology(self.structure)
        # No remover of the centre of mass' motion, neither for the thermostat nor for nve: all 3N
        # degrees of freedom are sampled, and nve starts at rest.
        system = openmm.System()
        if self._periodic:
            system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
        for mass in self._masses(topology):
            system.addParticle(mass)
        force = openmm.PythonForce(self._force)
        force.setUsesPeriodicBoundaryConditions(self._periodic)
        system.addForce(force)
        integrator = self._integrator()
        platform = None if settings.platform is None else _find_platform(settings.platform)
        with _as_simulation_error():
            simulation = openmm.app.Simulation(topology, system, integrator, platform)
        self._set_positions(simulation.context, self.atoms.positions, self.atoms.cell.array)
        return simulation

    def _masses(self, topology: openmm.app.Topology) -> np.ndarray:
        """Masses (n,) u: OpenMM's of the elements, the file's own, and 0 for atoms in place."""
        masses = np.array([atom.element.mass._value for atom in topology.atoms()])
        own = self.structure.own_masses
        masses[own] = self.atoms.get_masses()[own]
        masses[self.structure.fixed.all(axis=1)] = 0.0
        return masses

    def _integrator(self) -> openmm.Integrator:
        settings, timestep = self.settings, self.settings.timestep * unit.femtoseconds
        if settings.ensemble == "nve":
            return openmm.VerletIntegrator(timestep)
        integrator = openmm.LangevinMiddleIntegrator(
            settings.temperature * unit.kelvin, settings.friction / unit.picosecond, timestep
        )
        # OpenMM draws a new seed for 0.
        integrator.setRandomNumberSeed(settings.seed + 1)
        return integrator

    def _set_positions(
        self, context: openmm.Context, positions: np.ndarray, cell: np.ndarray
    ) -> None:
        if self._periodic:
            context.setPeriodicBoxVectors(*(cell / ANGSTROM_PER_NM))
        context.setPositions(positions / ANGSTROM_PER_NM)

    def warm_up(self) -> None:
        with _as_simulation_error():
            self._context.getState(energy=True, forces=True)

    def notes(self) -> list[str]:
        """What to know of a card on which JAX and OpenMM compute together."""
        device = self._force.engine.device
        if not (reserves_most(device) and self._on_card(device.local_hardware_id)):
            return []
        return [
            f"JAX has reserved three quarters of the memory of {device.device_kind}, and OpenMM "
            "computes on it too. Should that not suffice for OpenMM, start with "
            "XLA_PYTHON_CLIENT_PREALLOCATE=false mlip-md md ..."
        ]

    def _on_card(self, index: int | None) -> bool:
        """Whether OpenMM computes on the card that CUDA counts so."""
        platform = self._context.getPlatform()
        if platform.getName() not in ("CUDA", "HIP"):
            return platform.getName() == "OpenCL"  # it counts in another order: perhaps
        return platform.getPropertyValue(self._context, "DeviceIndex").split(",")[0] == str(index)

    def minimize(self, force: float, steps: int) -> bool:
        """Relax the positions (L-BFGS) until forces are below ``force`` (eV/Å); False if not."""
        tolerance = force * KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM
        with _as_simulation_error():
            result = minimize(self._simulation, tolerance, steps)
        return result.converged or result.iterations < steps

    def start(self) -> None:
        positions = self._context.getState(positions=True).getPositions(asNumpy=True)._value
        atoms = self.atoms.copy()
        atoms.positions = positions * ANGSTROM_PER_NM
        start_velocities(atoms, self.settings, np.random.default_rng(self.settings.seed))
        self._degrees = count_for_run(atoms, self.settings)
        self._context.setVelocities(atoms.get_velocities() * units.fs / NM_PER_PS)

    def advance(self) -> None:
        """Integrate one step; for npt with a move of the volume every so often."""
        with _as_simulation_error():
            self._simulation.step(1)
            if self._moves is not None and self._simulation.currentStep % MOVE_INTERVAL == 0:
                self._moves.attempt()

    def _read_motion(self, state: openmm.State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions (n, 3) Å, velocities (n, 3) Å/fs, and cell (3, 3) Å, zeros without one."""
        cell = np.zeros((3, 3))
        if self._periodic:
            cell = np.array(state.getPeriodicBoxVectors(asNumpy=True)._value) * ANGSTROM_PER_NM
        positions = np.array(state.getPositions(asNumpy=True)._value) * ANGSTROM_PER_NM
        return positions, np.array(state.getVelocities(asNumpy=True)._value) * NM_PER_PS, cell

    def frame(self) -> Frame:
        settings, rotation = self.settings, self._rotation
        with _as_simulation_error():
            state = self._context.getState(
                positions=True, velocities=True, energy=True, forces=True
            )
        positions, velocities, cell = self._read_motion(state)
        interaction = state.getPotentialEnergy()._value / KJ_PER_MOL_PER_EV
        potential = interaction + self._reference
        kinetic = state.getKineticEnergy()._value / KJ_PER_MOL_PER_EV
        pressure = None
        if self._periodic:
            pressure = self._pressure(positions, cell, interaction, kinetic)
        step = self._simulation.currentStep
        return Frame(
            step=step,
            time=step * settings.timestep * 1e-3,
            positions=positions @ rotation,
            velocities=velocities @ rotation,
            cell=self._vectors @ cell @ rotation,
            potential=potential,
            kinetic=kinetic,
            conserved=potential + kinetic if settings.ensemble == "nve" else None,
            temperature=compute_temperature(kinetic, self._degrees),
            pressure=pressure,
            forces=np.array(state.getForces(asNumpy=True)._value)
            @ rotation
            / (KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM),
        )

    def _pressure(
        self, positions: np.ndarray, cell: np.ndarray, interaction: float, kinetic: float
    ) -> float:
        """Pressure (eV/Å³) from the potential's stress; ``interaction`` and ``kinetic`` in eV."""
        result = self._force.last_result
        # After a refused move of the volume the latest result is that of the move.
        if result is None or not np.isclose(
            result.interaction_energy, interaction, rtol=1e-12, atol=0.0
        ):
            result = self._force.engine.evaluate(positions, self.atoms.numbers, cell, True)
        if result.stress is None:
            raise StructureError("the cell has no volume, and so there is no pressure")
        volume = abs(float(np.linalg.det(cell)))
        return 2.0 * kinetic / (3.0 * volume) - float(np.trace(result.stress)) / 3.0

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """OpenMM's checkpoint (exact), and positions and velocities for other platforms.

        All in the frame of the reduced cell, with what leads back to that of the file.
        """
        motion = self._read_motion(self._context.getState(positions=True, velocities=True))
        arrays = dict(zip(("positions", "velocities", "cell"), motion, strict=True))
        arrays["checkpoint"] = np.frombuffer(self._context.createCheckpoint(), np.uint8)
        arrays |= {"rotation": self._rotation, "vectors": self._vectors}
        values: dict[str, Any] = {"platform": self._context.getPlatform().getName()}
        values[DEGREES] = self._degrees
        if self._moves is not None:
            arrays["molecules"] = self._moves.labels
            values["moves"] = self._moves.state()
        return arrays, values

    def restore(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Go on from a checkpoint; on another machine or platform, with fresh thermostat noise."""
        try:
            if values["platform"] == self._context.getPlatform().getName():
                self._context.loadCheckpoint(arrays["checkpoint"].tobytes())
            else:
                self._restore_motion(arrays, values["step"])
        except openmm.OpenMMException as error:
            logger.warning(
                "OpenMM's checkpoint (%s) does not fit this machine (%s); going on from its "
                "positions and velocities with new random numbers",
                values["platform"],
                error,
            )
            self._restore_motion(arrays, values["step"])
        self._simulation.currentStep = int(values["step"])
        atoms = self.atoms.copy()
        atoms.positions = arrays["positions"]
        atoms.set_velocities(arrays["velocities"] / units.fs)
        self._degrees = count_for_run(atoms, self.settings, values)
        # Runs of version 0.1.0 stay in the frame that their files have.
        self._rotation = arrays.get("rotation", self._rotation)
        self._vectors = arrays.get("vectors", self._vectors)
        if self._moves is not None:
            self._moves.labels = arrays["molecules"]
            self._moves.restore(values["moves"])

    def _restore_motion(self, arrays: dict[str, np.ndarray], step: int) -> None:
        """Positions and velocities, and a seed that does not repeat the noise of the start."""
        integrator = self._simulation.integrator
        if isinstance(integrator, openmm.LangevinMiddleIntegrator):
            integrator.setRandomNumberSeed((self.settings.seed + step) % (2**31 - 1) + 1)
            self._context.reinitialize()
        self._set_positions(self._context, arrays["positions"], arrays["cell"])
        self._context.setVelocities(arrays["velocities"] / NM_PER_PS)

    def describe(self) -> dict[str, Any]:
        return {
            "engine": f"{self.title} {openmm.version.short_version}",
            "integrator": type(self._simulation.integrator).__name__
            + (" and Monte Carlo barostat" if self._moves else ""),
            "platform": self._context.getPlatform().getName(),
            "precision": self.settings.precision,
        }

    def compilations(self) -> int:
        return self._force.engine.num_compilations


def _find_platform(name: str) -> openmm.Platform:
    try:
        return openmm.Platform.getPlatformByName(name)
    except openmm.OpenMMException as error:
        count = openmm.Platform.getNumPlatforms()
        known = [openmm.Platform.getPlatform(i).getName() for i in range(count)]
        raise ConfigError(f"OpenMM has no platform {name!r} here; {hint(name, known)}") from error


@contextlib.contextmanager
def _as_simulation_error() -> Iterator[None]:
    """OpenMM's exceptions as ours; a Ctrl-C that fell into the potential as what it was."""
    try:
        yield
    except openmm.OpenMMException as error:
        told = read_told(error)
        if told.interrupted:
            raise KeyboardInterrupt from None
        raise (CapacityError if told.full else SimulationError)(told.text) from error
