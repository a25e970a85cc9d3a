"""Molecular dynamics from a structure to a run folder; the engine is ASE or OpenMM.

A run folder holds the settings, a log, trajectories for mdtraj and for ASE, a plot, a summary and a
restart file, from which the run continues exactly and with which its files can be cut back to one
point in time.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import platform
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from ase import Atoms

import mlip_md
from mlip_md.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    SimulationError,
    StructureError,
)
from mlip_md.integrations.md import report
from mlip_md.integrations.md.report import Frame
from mlip_md.integrations.md.structures import BondWatch, Structure, make_topology, read_structure
from mlip_md.integrations.models import DEFAULT_MODEL, lasting_name
from mlip_md.potential import Potential
from mlip_md.signals import Interruptions

EngineName = Literal["ase", "openmm"]
Ensemble = Literal["nve", "nvt", "npt"]
Precision = Literal["single", "double"]
TrajectoryFormat = Literal["dcd", "xtc"]

DEFAULT_STEPS = 2000

RESTART_SECONDS = 10.0
"""How often a run puts its restart file on disk (and once more at its end, however it ends)."""


@dataclasses.dataclass(frozen=True)
class MDSettings:
    """What to run.

    Attributes:
        structure: file or bundled molecule; None is the bundled default.
        model: what ``mlip_md.load`` opens.
        engine: "ase" or "openmm".
        ensemble: "nve", "nvt" (Langevin) or "npt" (isotropic; periodic structures only).
        temperature: K; of the thermostat, and of the velocities at the start.
        pressure: bar, for npt.
        timestep: fs.
        steps: number of steps of the whole run.
        friction: 1/ps, of the Langevin thermostat.
        minimize: relax the positions first.
        seed: of velocities and thermostat.
        precision: "single" or "double".
        device: JAX device of the potential; None is JAX's default.
        platform: OpenMM platform; None is the fastest there is.
        report_interval: steps between frames; None makes about 500 frames.
        trajectory_format: of the trajectory for mdtraj: "dcd", or "xtc" (smaller; rounded to
            0.01 Å). The one for ASE is always there.
    """

    structure: str | None = None
    model: str = DEFAULT_MODEL
    engine: EngineName = "ase"
    ensemble: Ensemble = "nvt"
    temperature: float = 300.0
    pressure: float = 1.0
    timestep: float = 0.5
    steps: int = DEFAULT_STEPS
    friction: float = 10.0
    minimize: bool = True
    seed: int = 0
    precision: Precision = "single"
    device: str | None = None
    platform: str | None = None
    report_interval: int | None = None
    trajectory_format: TrajectoryFormat = "dcd"

    def __post_init__(self) -> None:
        for name, choices in (
            ("engine", EngineName),
            ("ensemble", Ensemble),
            ("precision", Precision),
            ("trajectory_format", TrajectoryFormat),
        ):
            if getattr(self, name) not in get_args(choices):
                raise ConfigError(
                    f"{name} = {getattr(self, name)!r} is not allowed; "
                    + allowed(str(getattr(self, name)), get_args(choices))
                )
        for name in ("temperature", "friction"):
            if not 0 <= getattr(self, name) < np.inf:
                raise ConfigError(
                    f"{name} = {getattr(self, name)} is not allowed; it must be at least 0 and "
                    "finite"
                )
        if not np.isfinite(self.pressure):
            raise ConfigError(f"pressure = {self.pressure} is not allowed; it must be finite")
        if not 0 < self.timestep < np.inf:
            raise ConfigError(
                f"timestep = {self.timestep} fs is not allowed; it must be positive and finite"
            )
        for name in ("steps", "report_interval"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value} is not allowed; it must be at least 1")
        if not 0 <= self.seed < 2**31 - 1:
            raise ConfigError(f"seed = {self.seed} is not allowed; it must be in 0 … 2^31 - 2")

    @property
    def interval(self) -> int:
        """Steps between frames."""
        return self.report_interval or min(max(self.steps // 500, 10), self.steps)


def allowed(given: str, choices: Sequence[str]) -> str:
    """The choices there are, and which one was probably meant, for an error message."""
    lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(given.lower(), lower, n=1, cutoff=0.5)
    hint = f" (did you mean {lower[near[0]]}?)" if near else ""
    return f"it must be one of {', '.join(choices)}{hint}"


class Backend(Protocol):
    """An engine that integrates the equations of motion of one structure."""

    potential: Potential
    structure: Structure

    def warm_up(self) -> None:
        """Evaluate once, so that everything is compiled."""

    def minimize(self) -> bool:
        """Relax the positions; False if the iterations were used up before forces were small."""

    def start(self) -> None:
        """Draw velocities and set up the integrator."""

    def advance(self, steps: int) -> None:
        """Integrate a number of steps."""

    def frame(self) -> Frame:
        """The present state."""

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and JSON values from which ``restore`` continues exactly."""

    def restore(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Set up the integrator in a saved state."""

    def describe(self) -> dict[str, Any]:
        """Engine, integrator, device: for the summary."""

    def compilations(self) -> int:
        """How often the potential has been compiled so far."""


class Progress(Protocol):
    """Told by a run how far it is."""

    def stage(self, text: str) -> None:
        """A phase without steps begins; at the first one, all input has been found good."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def stopping(self) -> None:
        """Ctrl-C came and the run stops after this step; called inside a signal handler."""

    def begin(self, folder: Path, done: int, total: int) -> None:
        """Stepping begins."""

    def update(self, frame: Frame, steps_per_second: float) -> None:
        """Another frame is there."""


class Silent:
    """A ``Progress`` that says nothing."""

    def stage(self, text: str) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def stopping(self) -> None:
        """Say nothing."""

    def begin(self, folder: Path, done: int, total: int) -> None:
        """Say nothing."""

    def update(self, frame: Frame, steps_per_second: float) -> None:
        """Say nothing."""


def temperature(kinetic: float, degrees_of_freedom: int) -> float:
    """Temperature (K) of a kinetic energy (eV)."""
    from ase.units import kB

    return 2.0 * kinetic / (max(degrees_of_freedom, 1) * kB)


def make_backend(settings: MDSettings, structure: Structure) -> Backend:
    """The engine that the settings name, for a structure.

    Raises:
        StructureError: if the ensemble or engine cannot have this structure's periodicity.
    """
    if settings.ensemble == "npt" and not _periodic(structure):
        raise StructureError(
            "npt needs a structure that is periodic in three directions, with its cell; use nvt, "
            "or give the structure a cell"
        )
    if settings.engine == "ase":
        from mlip_md.integrations.md.backends.ase import ASEBackend

        return ASEBackend(settings, structure)
    from mlip_md.integrations.md.backends.openmm import OpenMMBackend

    return OpenMMBackend(settings, structure)


def _periodic(structure: Structure) -> bool:
    return bool(structure.atoms.pbc.all()) and structure.atoms.cell.rank == 3


def fresh_folder(name: str, parent: Path | None = None) -> Path:
    """Make the first free folder ``md-<name>-<n>``."""
    clean = re.sub(r"[^A-Za-z0-9._+-]", "_", name)
    number = 1
    while True:
        folder = (parent or Path()) / f"md-{clean}-{number}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return folder


def check_output(folder: Path | None) -> None:
    """Look whether a run could write into a folder, before anything is computed.

    Args:
        folder: a folder that is empty or not there yet; None is a new one in this folder.

    Raises:
        ConfigError: if it is no folder, not empty, or cannot be made or written.
    """
    path = Path() if folder is None else folder
    if folder is not None and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; name another folder, or continue it (restart)")
    path = next(p for p in (path, *path.parents) if p.exists())
    if not path.is_dir():
        raise ConfigError(f"{path} is a file, and so {folder} cannot be a folder; name another one")
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{path.resolve()} may not be written; name another folder")


def run_md(
    settings: MDSettings,
    folder: Path | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Run molecular dynamics into a new folder.

    The first Ctrl-C ends the run after the present step, with everything saved.

    Args:
        settings: what to run.
        folder: a folder that is empty or not there yet; None makes ``md-<name>-<n>`` here.
        progress: is told how far the run is.

    Returns:
        The folder.

    Raises:
        StructureError, ConfigError, UnsupportedElementError: before anything runs.
        SimulationError: if the run becomes unstable; the frames until then are kept.
        KeyboardInterrupt: on Ctrl-C.
    """
    progress = progress or Silent()
    check_output(folder)
    settings = dataclasses.replace(
        settings, report_interval=settings.interval, model=lasting_name(settings.model)
    )
    structure = read_structure(settings.structure)
    backend = make_backend(settings, structure)
    with Interruptions(signal.SIGINT, patient=False, tell=progress.stopping) as interruptions:
        progress.stage("Compiling")
        compile_seconds = _seconds(backend.warm_up)
        interruptions.check()
        if settings.minimize:
            progress.stage("Minimizing")
            _minimize(backend, progress)
            interruptions.check()
        backend.start()
        if folder is None:
            folder = fresh_folder(structure.name)
        folder.mkdir(parents=True, exist_ok=True)
        report.write_json(folder / report.SETTINGS, dataclasses.asdict(settings))
        _Run(settings, backend, folder, progress, compile_seconds, interruptions).go()
    return folder


def restart_md(
    folder: Path,
    *,
    steps: int | None = None,
    platform: str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Continue a run in its folder; frames are appended to its files.

    With the platform and device of the run the continuation is exact: as if it had not been
    interrupted. With others it goes on from the same positions and velocities, but its rounding and
    random numbers differ.

    Args:
        folder: folder of a run.
        steps: how many steps to add to what has been done; None does the rest of the run.
        platform: another OpenMM platform; None keeps the run's.
        device: another JAX device; None keeps the run's.
        progress: is told how far the run is.

    Returns:
        The folder.

    Raises:
        CheckpointError: if the folder holds no run that can go on.
        ConfigError: if there is no such folder, platform or device.
        SimulationError, KeyboardInterrupt: as ``run_md``.
    """
    progress = progress or Silent()
    settings = read_settings(folder)
    arrays, values = report.read_restart(folder / report.RESTART)
    done = values["step"]
    settings = dataclasses.replace(
        settings,
        steps=settings.steps if steps is None else done + steps,
        platform=settings.platform if platform is None else platform,
        device=settings.device if device is None else device,
    )
    if done >= settings.steps:
        raise CheckpointError(
            f"the run in {folder} has all its {done} steps; say how much further to go: --steps or "
            "--length (in Python steps=...)"
        )
    backend = make_backend(settings, _saved_structure(folder, arrays, values["name"]))
    if backend.potential.sha256 != values["sha256"]:
        raise CheckpointError(
            f"{settings.model} is not the model that the run in {folder} was started with"
        )
    report.check_sizes(folder, values["sizes"])
    with Interruptions(signal.SIGINT, patient=False, tell=progress.stopping) as interruptions:
        progress.stage("Compiling")
        compile_seconds = _seconds(backend.warm_up)
        interruptions.check()
        try:
            backend.restore(arrays, values)
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{folder / report.RESTART} does not hold the state of such a run ({error!r}); "
                "start a new run"
            ) from error
        report.write_json(folder / report.SETTINGS, dataclasses.asdict(settings))
        _Run(
            settings, backend, folder, progress, compile_seconds, interruptions, values["sizes"]
        ).go()
    return folder


def read_settings(folder: Path) -> MDSettings:
    """Settings of the run in a folder.

    Raises:
        ConfigError: if there is no such folder.
        CheckpointError: if it holds no settings or they are damaged.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    path = folder / report.SETTINGS
    if not path.exists():
        raise CheckpointError(f"{folder} holds no run: there is no {report.SETTINGS} in it")
    try:
        return MDSettings(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} holds no usable settings of a run: {error}") from error


def _saved_structure(folder: Path, arrays: dict[str, np.ndarray], name: str) -> Structure:
    """The structure at the restart point; the file it first came from is not needed.

    Raises:
        CheckpointError: if the topology is missing or of another structure.
    """
    path = folder / report.TOPOLOGY
    if not path.exists():
        raise CheckpointError(f"there is no {path}, without which the run cannot go on")
    topology = read_structure(path).topology
    numbers = [atom.element.atomic_number for atom in topology.atoms()]
    if numbers != arrays["numbers"].tolist():
        raise CheckpointError(f"{path} has other atoms than {report.RESTART}")
    atoms = Atoms(numbers, arrays["positions"], cell=arrays["cell"], pbc=arrays["pbc"])
    return Structure(name, atoms, topology)


def _minimize(backend: Backend, progress: Progress) -> None:
    try:
        if not backend.minimize():
            progress.note(
                "The minimization used up its iterations before all forces were small; the run "
                "starts from where it got"
            )
    except (NonFiniteError, StructureError, SimulationError) as error:
        raise SimulationError(
            f"the structure cannot be minimized with this model: {error}\nThe model was probably "
            "not made for such structures; --no-minimize (in Python minimize=False) leaves the "
            "step out"
        ) from error


def _seconds(function: Callable[[], None]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


class _Run:
    """One invocation's steps: advance, record, keep the restart file, report.

    Args:
        settings: what to run.
        backend: ready to step.
        folder: where to.
        progress: is told.
        compile_seconds: for the summary.
        interruptions: says when to stop.
        sizes: of the growing files at the restart point, or None for a new run.
    """

    def __init__(
        self,
        settings: MDSettings,
        backend: Backend,
        folder: Path,
        progress: Progress,
        compile_seconds: float,
        interruptions: Interruptions,
        sizes: dict[str, int] | None = None,
    ) -> None:
        self.settings, self.backend, self.folder = settings, backend, folder
        self.progress, self.compile_seconds, self.interruptions = (
            progress,
            compile_seconds,
            interruptions,
        )
        self.watch = BondWatch(backend.structure.atoms)
        self.last = backend.frame()
        self.first_step = self.last.step
        self.timed_steps, self.timed_seconds = 0, 0.0
        self.new = sizes is None
        self.files = report.RunFiles(
            folder,
            backend.structure.atoms,
            make_topology(backend.structure),
            timestep=settings.timestep,
            interval=settings.interval,
            trajectory=report.trajectory_name(settings.trajectory_format),
            sizes=sizes,
        )

    def go(self) -> None:
        """Step to the end; whatever happens, the folder stays usable."""
        status = "failed"
        try:
            if self.new:
                self._keep(write=True)
            self._steps()
            status = "finished"
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self._save_restart()
            # The last frame is always there. The restart file does not count one between two
            # reports: a continued run drops it, and is the same as an uninterrupted one.
            if self.last.step % self.settings.interval:
                self.files.write(self.last)
            self.files.close()
            self._conclude(status)

    def _steps(self) -> None:
        total, interval = self.settings.steps, self.settings.interval
        self.progress.begin(self.folder, self.last.step, total)
        self.interruptions.patient = True
        saved = time.perf_counter()
        while self.last.step < total:
            self.interruptions.check()
            step, compiled, begin = self.last.step, self.backend.compilations(), time.perf_counter()
            self.last = self._advance(min(interval - step % interval, total - step))
            self._keep(write=self.last.step % interval == 0)
            now = time.perf_counter()
            if now - saved > RESTART_SECONDS:
                self._save_restart()
                saved = now
            self._time(self.last.step - step, time.perf_counter() - begin, compiled)
            self.progress.update(self.last, self._rate)

    def _time(self, steps: int, seconds: float, compiled: int) -> None:
        """Book steps as run time, or as compile time when the potential was compiled meanwhile."""
        if self.backend.compilations() > compiled:
            self.compile_seconds += seconds
        else:
            self.timed_steps += steps
            self.timed_seconds += seconds

    @property
    def _rate(self) -> float:
        """Steps per second, without those during which something was compiled."""
        return self.timed_steps / self.timed_seconds if self.timed_seconds else 0.0

    def _advance(self, steps: int) -> Frame:
        """Advance, at most to the end of the step in which Ctrl-C is pressed, and look at it."""
        try:
            for _ in range(steps):
                self.backend.advance(1)
                if self.interruptions.reason is not None:
                    break
            frame = self.backend.frame()
        except (NonFiniteError, StructureError, SimulationError) as error:
            raise self._unstable(str(error)) from error
        finite = all(np.isfinite(x).all() for x in (frame.positions, frame.velocities))
        if not finite or not np.isfinite(frame.potential):
            raise self._unstable("positions, velocities or energy are not finite")
        limit = max(20.0 * self.settings.temperature, 5000.0)
        if frame.temperature > limit:
            raise self._unstable(f"the temperature rose to {frame.temperature:.4g} K")
        if lost := self.watch.broken(frame.positions, frame.cell):
            raise self._unstable(f"the molecules fell apart: {lost} atoms are now alone in space")
        return frame

    def _unstable(self, what: str) -> SimulationError:
        advice = [f"a smaller time step than {self.settings.timestep:g} fs"]
        advice += [] if self.settings.minimize else ["minimizing first"]
        return SimulationError(
            f"the run became unstable after step {self.last.step}: {what}\n"
            f"The frames until then are in {self.folder}. Look at the last one; try "
            f"{', '.join(advice)}, or a model that was trained on such structures."
        )

    def _keep(self, write: bool) -> None:
        """Write a good frame, and remember the state that continues it."""
        if write:
            self.files.write(self.last)
        self._good = (*self.backend.state(), self.files.sizes(), self.last.step)

    def _save_restart(self) -> None:
        if not hasattr(self, "_good"):
            return
        arrays, values, sizes, step = self._good
        atoms = self.backend.structure.atoms
        arrays = arrays | {"numbers": atoms.numbers, "pbc": atoms.pbc}
        values = values | {
            "step": step,
            "sizes": sizes,
            "name": self.backend.structure.name,
            "sha256": self.backend.potential.sha256,
        }
        report.write_restart(self.folder / report.RESTART, arrays, values)

    def _conclude(self, status: str) -> None:
        """Plot and summary, of the whole run so far."""
        settings, atoms = self.settings, self.backend.structure.atoms
        log = report.read_log(self.folder / report.LOG)
        summary = {
            "status": status,
            "structure": self.backend.structure.name,
            "formula": atoms.get_chemical_formula(),
            "n_atoms": len(atoms),
            "model": self.backend.potential.info.get("name", settings.model),
            "model_sha256": self.backend.potential.sha256,
            "ensemble": settings.ensemble,
            **self.backend.describe(),
            "step": self.last.step,
            "time_ps": self.last.time,
            "compile_seconds": round(self.compile_seconds, 3),
            "compilations": self.backend.compilations(),
            "run_seconds": round(self.timed_seconds, 3),
            "run_steps": self.last.step - self.first_step,
            "steps_per_second": round(self._rate, 2),
            "ns_per_day": round(self._rate * settings.timestep * 1e-6 * 86400, 4),
            **report.statistics(log, len(atoms)),
            "versions": {"mlip-md": mlip_md.__version__, "python": platform.python_version()},
        }
        report.write_json(self.folder / report.SUMMARY, summary)
        if len(log["step"]):
            title = (
                f"{summary['structure']} ({len(atoms)} atoms), {settings.ensemble.upper()}, "
                f"{settings.engine.upper() if settings.engine == 'ase' else 'OpenMM'}"
            )
            target = None if settings.ensemble == "nve" else settings.temperature
            report.plot(log, self.folder / report.PLOT, title=title, target=target)
