"""Molecular dynamics from a structure to a run folder; the engine is ASE or OpenMM.

A run folder holds the settings, a log, trajectories for mdtraj and for ASE, a plot, a summary and a
restart file, from which the run continues exactly and with which its files can be cut back to one
point in time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform as python_platform
import re
import time
from pathlib import Path
from typing import Any

import numpy as np

import mlip_md
from mlip_md.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    OutputError,
    SimulationError,
    StructureError,
)
from mlip_md.files import check_new_folder
from mlip_md.integrations.md import report, restart
from mlip_md.integrations.md.backends import BACKENDS
from mlip_md.integrations.md.backends.interface import Backend, Frame
from mlip_md.integrations.md.files import LOG, RunFiles, check_sizes, read_log
from mlip_md.integrations.md.held import check_held
from mlip_md.integrations.md.masses import prepare_start
from mlip_md.integrations.md.minimize import check_relaxed
from mlip_md.integrations.md.observers import RunObserver
from mlip_md.integrations.md.settings import MDSettings, read_settings, write_settings
from mlip_md.integrations.md.structures import (
    BondWatch,
    Structure,
    compare_bonds,
    describe_contact,
    read_structure,
)
from mlip_md.integrations.models import lasting_name, name_then
from mlip_md.ownership import FILE as OWNER
from mlip_md.ownership import owning
from mlip_md.signals import ENDINGS, Interruptions

MINIMIZE_FORCE = 0.05
"""eV/Å: largest force with which a run starts, unless the minimization ends before."""
MINIMIZE_STEPS = 300

RESTART_SECONDS = 10.0
"""How often a run puts its restart file on disk (and once more at its end, however it ends)."""

_UNSTABLE = (NonFiniteError, StructureError, SimulationError)
"""What a potential or an engine says when a simulation has left all reason."""


def make_backend(settings: MDSettings, structure: Structure) -> Backend:
    """The engine that the settings name, for a structure.

    Raises:
        StructureError: if the ensemble or engine cannot have this structure's periodicity or hold
            its constraints, or a charge or spin is stated for it.
    """
    structure.check_charge()
    engine = BACKENDS[settings.engine]()
    structure = check_held(engine, settings.ensemble, structure)
    atoms = structure.atoms
    if settings.ensemble == "npt" and not (atoms.pbc.all() and atoms.cell.rank == 3):
        raise StructureError(
            "npt needs a structure that is periodic in three directions, with its cell; use nvt, "
            "or give the structure a cell"
        )
    return engine(settings, structure)


def make_fresh_folder(name: str, parent: Path | None = None) -> Path:
    """Make the first free folder ``md-<name>-<n>`` in a folder (None: the working directory)."""
    clean = re.sub(r"[^A-Za-z0-9._+-]", "_", name)
    number = 0
    while True:
        number += 1
        folder = (parent or Path()) / f"md-{clean}-{number}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def check_output(folder: Path | None) -> None:
    """Look whether a run could write into a folder, before anything is computed.

    Args:
        folder: a folder that is empty or not there yet; None is a new one in this folder.

    Raises:
        ConfigError: if it is no folder, not empty, or cannot be made or written.
    """
    if folder is not None and folder.is_dir() and any(p.name != OWNER for p in folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; name another folder, or continue it (restart)")
    check_new_folder(Path() if folder is None else folder, "run folder")


def run_md(
    settings: MDSettings, folder: Path | None = None, *, progress: RunObserver | None = None
) -> Path:
    """Run molecular dynamics into a new folder.

    The first Ctrl-C, SIGTERM or SIGHUP ends the run after the present step, with everything saved.

    Args:
        settings: what to run.
        folder: a folder that is empty or not there yet; None makes ``md-<name>-<n>`` here.
        progress: is told how far the run is.

    Returns:
        The folder.

    Raises:
        StructureError, ConfigError, UnsupportedElementError: before anything runs.
        SimulationError: if the run becomes unstable; the frames until then are kept.
        CapacityError: if a device's memory does not suffice.
        OutputError: if a file cannot be written.
        OwnershipError: if another run has taken the folder meanwhile.
        KeyboardInterrupt: on Ctrl-C.
        StoppedError: on SIGTERM and SIGHUP.
    """
    observer = progress or RunObserver()
    check_output(folder)
    settings = dataclasses.replace(
        settings, report_interval=settings.interval, model=lasting_name(settings.model)
    )
    structure = read_structure(
        settings.structure, frame=settings.frame, drop_virtual_sites=settings.drop_virtual_sites
    )
    structure = prepare_start(settings, structure)
    backend = make_backend(settings, structure)
    observer.found(structure.line(), structure.report.notes)
    with Interruptions(*ENDINGS, patient=False, tell=observer.stopping) as interruptions:
        compile_seconds = _warm_up(backend, observer, interruptions)
        if settings.minimize:
            observer.stage("Minimizing")
            _minimize(backend, observer)
            interruptions.check()
        backend.start()
        interruptions.patient = True  # from here on there is something to save
        past = {
            "input": structure.as_dict(),
            "minimization": _compare_with_start(backend, observer) if settings.minimize else None,
        }
        if folder is None:
            folder = make_fresh_folder(structure.name)
        folder.mkdir(parents=True, exist_ok=True)
        with owning(folder):
            check_output(folder)  # again: another run may have used it meanwhile
            write_settings(folder, settings)
            _Run(settings, backend, folder, observer, compile_seconds, past).go(interruptions)
    return folder


def restart_md(
    folder: Path,
    *,
    steps: int | None = None,
    platform: str | None = None,
    device: str | None = None,
    progress: RunObserver | None = None,
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
        OwnershipError: if another run goes on in the folder.
        SimulationError, CapacityError, OutputError, KeyboardInterrupt, StoppedError: as ``run_md``.
    """
    read_settings(folder)  # is there a run at all?
    with owning(folder):
        _continue(folder, steps, platform, device, progress or RunObserver())
    return folder


def _continue(
    folder: Path, steps: int | None, platform: str | None, device: str | None, observer: RunObserver
) -> None:
    """``restart_md`` in a folder that is ours."""
    settings = read_settings(folder)
    path = folder / restart.RESTART
    arrays, values = restart.read_restart(path)
    done = values["step"]
    settings = dataclasses.replace(
        settings,
        steps=settings.steps if steps is None else done + steps,
        platform=settings.platform if platform is None else platform,
        device=settings.device if device is None else device,
    )
    if done >= settings.steps and _is_finished(folder, done):
        raise CheckpointError(
            f"the run in {folder} has all its {done} steps; say how much further to go: --steps or "
            "--length (in Python steps=...)"
        )
    settings = dataclasses.replace(settings, model=name_then(settings.model, values["sha256"]))
    structure = restart.read_saved_structure(folder, arrays, values["name"])
    backend = make_backend(settings, structure)
    if backend.potential.sha256 != values["sha256"]:
        raise CheckpointError(
            f"{settings.model} is not the model that the run in {folder} was started with"
        )
    check_sizes(folder, values["sizes"])
    with Interruptions(*ENDINGS, patient=False, tell=observer.stopping) as interruptions:
        compile_seconds = _warm_up(backend, observer, interruptions)
        try:
            backend.restore(arrays, values)
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} does not hold the state of such a run ({error!r}); start a new run"
            ) from error
        interruptions.patient = True
        write_settings(folder, settings)
        _Run(settings, backend, folder, observer, compile_seconds, values).go(interruptions)


def _is_finished(folder: Path, step: int) -> bool:
    """Whether a run that had all its steps lived on until the last of its files was written."""
    try:
        summary = report.read_summary(folder)
    except (OSError, ValueError):
        return False
    return (summary.get("status"), summary.get("step")) == ("finished", step)


def _warm_up(backend: Backend, observer: RunObserver, interruptions: Interruptions) -> float:
    """Compile; the seconds that it took."""
    observer.stage("Compiling")
    begin = time.perf_counter()
    backend.warm_up()
    for text in backend.notes():
        observer.note(text)
    interruptions.check()
    return time.perf_counter() - begin


def _minimize(backend: Backend, observer: RunObserver) -> None:
    try:
        if not backend.minimize(MINIMIZE_FORCE, MINIMIZE_STEPS):
            observer.note(
                "The minimization used up its iterations before all forces were small; the run "
                "starts from where it got"
            )
    except _UNSTABLE as error:
        raise SimulationError(
            f"the structure cannot be minimized with this model: {error}\nThe model was probably "
            "not made for such structures; --no-minimize (in Python minimize=False) leaves the "
            "step out"
        ) from error


def _compare_with_start(backend: Backend, observer: RunObserver) -> dict[str, Any]:
    """Say which bonds the minimization has changed, and the same for the summary.

    Raises:
        SimulationError: if atoms lie on each other.
    """
    before = backend.structure.atoms
    after = backend.frame().place(before)
    check_relaxed(after)
    changes = compare_bonds(before, after)
    if text := changes.describe(before):
        observer.note(f"The minimization {text} (bonds by distance)")
    return {"bonds_broken": changes.broken.tolist(), "bonds_formed": changes.formed.tolist()}


class _Speed:
    """Steps per second, without those during which something was compiled."""

    def __init__(self, backend: Backend, compile_seconds: float) -> None:
        self.compile_seconds = compile_seconds
        self.seconds = 0.0
        self._steps, self._compiled, self._backend = 0, backend.compilations(), backend

    def count(self, steps: int, seconds: float) -> None:
        """Book steps as run time, or as compile time when the potential was compiled meanwhile."""
        compiled = self._backend.compilations()
        if compiled > self._compiled:
            self.compile_seconds += seconds
            self._compiled = compiled
        else:
            self._steps += steps
            self.seconds += seconds

    @property
    def rate(self) -> float:
        """Steps per second; 0 while nothing is known."""
        return self._steps / self.seconds if self.seconds else 0.0


class _Run:
    """One invocation's steps: advance, record, keep the restart file, report.

    Args:
        settings: what to run.
        backend: ready to step.
        folder: where to.
        observer: is told.
        compile_seconds: for the summary.
        past: of a new run its "input", what was read from the structure's file, and its
            "minimization", what that did to the bonds, or None; of a continued one the values of
            its restart file, in which version 0.1.0 had neither.
    """

    def __init__(
        self,
        settings: MDSettings,
        backend: Backend,
        folder: Path,
        observer: RunObserver,
        compile_seconds: float,
        past: dict[str, Any],
    ) -> None:
        self.settings, self.backend, self.folder = settings, backend, folder
        self.observer, self.new = observer, "sizes" not in past
        self.origin, self.minimization = past.get("input"), past.get("minimization")
        self.watch = BondWatch(backend.structure.atoms)
        self.last = backend.frame()
        self.first_step = self.last.step
        self._saved = time.perf_counter()
        self.speed = _Speed(backend, compile_seconds)
        self._good: tuple[dict[str, np.ndarray], dict[str, Any]] | None = None
        self.files = RunFiles(folder, backend.structure, settings, past.get("sizes"))

    def go(self, interruptions: Interruptions) -> None:
        """Step to the end; whatever happens, the folder stays usable."""
        try:
            if self.new:  # from its first moment on it can be continued
                self._keep(write=False)
                self._save_restart()
            if self.files.empty:
                self._keep(write=True)
            self._step_to_the_end(interruptions)
        except OutputError:  # nothing more can be written, or not everything
            with contextlib.suppress(OSError):
                self._end("failed", last_frame=False)
            raise
        except KeyboardInterrupt:
            reason = interruptions.reason
            self._end(reason if reason in ("terminated", "hangup") else "interrupted")
            raise
        except BaseException:
            self._end("failed")
            raise
        self._end("finished")

    def _end(self, status: str, *, last_frame: bool = True) -> None:
        """Write what a folder needs at the end."""
        try:
            self._save_restart()
            # The last frame is always there. The restart file does not count one between two
            # reports: a continued run drops it, and is the same as an uninterrupted one.
            if last_frame and self.last.step % self.settings.interval:
                self.files.write(self.last)
        finally:
            self.files.close()
        self._conclude(status)

    def _step_to_the_end(self, interruptions: Interruptions) -> None:
        total, interval = self.settings.steps, self.settings.interval
        self.observer.begin(self.folder, self.last.step, total)
        while self.last.step < total:
            interruptions.check()
            step, begin = self.last.step, time.perf_counter()
            steps = min(interval - step % interval, total - step)
            self.last = self._advance(steps, interruptions)
            self._keep(write=self.last.step % interval == 0)
            if self._restart_is_old():
                self._save_restart()
            self.speed.count(self.last.step - step, time.perf_counter() - begin)
            self.observer.update(self.last, self.speed.rate)

    def _advance(self, steps: int, interruptions: Interruptions) -> Frame:
        """Advance, but no further when something is to be saved, and look at the frame."""
        try:
            for _ in range(steps):
                self.backend.advance()
                if interruptions.reason is not None or self._restart_is_old():
                    break
            frame = self.backend.frame()
        except _UNSTABLE as error:
            raise self._unstable(str(error)) from error
        numbers = frame.positions, frame.velocities, frame.potential
        if not all(np.isfinite(x).all() for x in numbers):
            raise self._unstable("positions, velocities or energy are not finite")
        limit = max(20.0 * self.settings.temperature, 5000.0)
        if frame.temperature > limit:
            raise self._unstable(f"the temperature rose to {frame.temperature:.4g} K")
        if lost := self.watch.broken(frame.positions, frame.cell):
            raise self._unstable(f"the molecules fell apart: {lost} atoms are now alone in space")
        if contact := describe_contact(frame.place(self.backend.structure.atoms)):
            raise self._unstable(f"the structure collapsed: {contact}")
        return frame

    def _unstable(self, what: str) -> SimulationError:
        more = "" if self.settings.minimize else ", minimizing first"
        return SimulationError(
            f"the run became unstable after step {self.last.step}: {what}\n"
            f"The frames until then are in {self.folder}. Look at the last one; try a smaller time "
            f"step than {self.settings.timestep:g} fs{more}, or a model that was trained on such "
            "structures."
        )

    def _keep(self, write: bool) -> None:
        """Write a good frame, and remember the state that continues it."""
        if write:
            self.files.write(self.last)
        structure = self.backend.structure
        arrays, values = self.backend.state()
        self._good = (
            arrays | restart.describe_atoms(structure.atoms),
            values
            | {
                "step": self.last.step,
                "sizes": self.files.sizes(),
                "name": structure.name,
                "input": self.origin,
                "sha256": self.backend.potential.sha256,
                "minimization": self.minimization,
            },
        )

    def _save_restart(self) -> None:
        if self._good is not None:
            self.files.sync()
            restart.write_restart(self.folder / restart.RESTART, *self._good)
        self._saved = time.perf_counter()

    def _restart_is_old(self) -> bool:
        return time.perf_counter() - self._saved > RESTART_SECONDS

    def _conclude(self, status: str) -> None:
        """Plot and summary, of the whole run so far; the summary tells that all else is there."""
        log = read_log(self.folder / LOG)
        try:
            if len(log["step"]):
                self._draw(log)
        finally:
            report.write_summary(self.folder, self._summary(status, log))

    def _draw(self, log: dict[str, np.ndarray]) -> None:
        settings, structure = self.settings, self.backend.structure
        title = (
            f"{structure.name} ({len(structure.atoms)} atoms), {settings.ensemble.upper()}, "
            f"{self.backend.title}"
        )
        target = None if settings.ensemble == "nve" else settings.temperature
        report.draw_plot(log, self.folder / report.PLOT, title=title, target=target)

    def _summary(self, status: str, log: dict[str, np.ndarray]) -> dict[str, Any]:
        settings, backend, rate = self.settings, self.backend, self.speed.rate
        atoms = backend.structure.atoms
        return {
            "status": status,
            "structure": backend.structure.name,
            "formula": atoms.get_chemical_formula(),
            "n_atoms": len(atoms),
            "input": self.origin,
            "model": backend.potential.info.get("name", settings.model),
            "model_sha256": backend.potential.sha256,
            "ensemble": settings.ensemble,
            **backend.describe(),
            "minimization": self.minimization,
            "step": self.last.step,
            "time_ps": self.last.time,
            "compile_seconds": round(self.speed.compile_seconds, 3),
            "compilations": backend.compilations(),
            "run_seconds": round(self.speed.seconds, 3),
            "run_steps": self.last.step - self.first_step,
            "steps_per_second": round(rate, 2),
            "ns_per_day": round(rate * settings.timestep * 1e-6 * 86400, 4),
            **report.compute_averages(log, len(atoms)),
            "versions": {
                "mlip-md": mlip_md.__version__,
                "python": python_platform.python_version(),
            },
        }
