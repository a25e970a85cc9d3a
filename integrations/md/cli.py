"""The commands ``mlip-md md`` and ``mlip-md minimize``.

Everything heavy is imported inside the commands, so that help and errors come at once.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlip_md.errors import ConfigError, MLIPError
from mlip_md.integrations.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from ase import Atoms

    from mlip_md.integrations.md.report import Frame
    from mlip_md.integrations.md.run import MDSettings

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Bundled name, .safetensors file, .zip or run folder."),
]


def _one_of(*choices: str) -> Any:
    """Keywords of an option that takes one of some words; a misspelled one is told the nearest."""

    def parse(text: str) -> str:
        from mlip_md.integrations.md.run import allowed

        if text not in choices:
            raise typer.BadParameter(f"{text!r} is not allowed; {allowed(text, choices)}")
        return text

    return {"parser": parse, "metavar": f"[{'|'.join(choices)}]"}


PrecisionOption = Annotated[
    str, typer.Option(help="Precision of the potential.", **_one_of("single", "double"))
]
DeviceOption = Annotated[
    str | None, typer.Option(help="JAX device: cpu, gpu, cuda:1. Default: JAX's choice.")
]
StructureArgument = Annotated[
    str | None,
    typer.Argument(
        help="File that ASE or OpenMM reads (xyz, extxyz, pdb, cif, ...), or a bundled molecule. "
        "Default: paracetamol.",
        show_default=False,
    ),
]

LINES = 10
"""Progress lines of a run whose output is no terminal."""


def md_command(
    context: typer.Context,
    structure: StructureArgument = None,
    model: ModelOption = DEFAULT_MODEL,
    engine: Annotated[
        str, typer.Option(help="What integrates the motion.", **_one_of("ase", "openmm"))
    ] = "ase",
    ensemble: Annotated[
        str,
        typer.Option(
            help="npt needs a structure that is periodic in three directions. nvt: Langevin. npt: "
            "MTK with ase; Langevin and Monte Carlo moves of the volume with openmm, which unlike "
            "OpenMM's own barostat continue exactly after a restart.",
            **_one_of("nve", "nvt", "npt"),
        ),
    ] = "nvt",
    temperature: Annotated[
        float, typer.Option("--temperature", "-T", min=0.0, help="K, of thermostat and start")
    ] = 300.0,
    pressure: Annotated[float, typer.Option(help="bar; npt only")] = 1.0,
    timestep: Annotated[float, typer.Option(help="fs")] = 0.5,
    length: Annotated[
        float | None,
        typer.Option(help="ps; with --restart: how much further. Default: 2000 steps."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of --length.")] = None,
    friction: Annotated[
        float, typer.Option(min=0.0, help="1/ps, of the Langevin thermostat")
    ] = 10.0,
    minimize: Annotated[bool, typer.Option(help="Relax the positions first.")] = True,
    seed: Annotated[
        int, typer.Option(min=0, max=2**31 - 2, help="Of velocities and thermostat.")
    ] = 0,
    precision: PrecisionOption = "single",
    device: DeviceOption = None,
    platform: Annotated[
        str | None,
        typer.Option(help="OpenMM platform: Reference, CPU, CUDA, ... Default: the fastest."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="New folder. Default: md-<name>-<n>."),
    ] = None,
    restart: Annotated[
        Path | None,
        typer.Option(help="Continue the run in this folder; its files grow.", show_default=False),
    ] = None,
    report_interval: Annotated[
        int | None,
        typer.Option(
            min=1, help="Steps between frames; the last step is one too. Default: about 500 frames."
        ),
    ] = None,
    trajectory_format: Annotated[
        str,
        typer.Option(
            help="Of the trajectory for mdtraj; xtc is smaller, rounded to 0.01 Å. One for ASE is "
            "always there.",
            **_one_of("dcd", "xtc"),
        ),
    ] = "dcd",
) -> None:
    """Run molecular dynamics; the result is a folder with trajectory, log, plot and summary.

    Without arguments: 1 ps of a paracetamol molecule at 300 K with the bundled model.

    Ctrl-C ends a run after the present step, with everything saved.
    """
    given = {
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    if length is not None and steps is not None:
        raise ConfigError("--length and --steps both say how long to run; give one of them")
    if restart is not None:
        _refuse_with_restart(given)
        _restart(restart, length, steps, platform, device)
        return
    from mlip_md.integrations.md.run import DEFAULT_STEPS, MDSettings, run_md

    _refuse_useless(given, engine, ensemble)
    _check_device(device)
    wanted = _steps(steps, length, timestep)
    settings = MDSettings(
        structure=structure,
        model=model,
        engine=engine,  # type: ignore[arg-type]  # the parser let nothing else through
        ensemble=ensemble,  # type: ignore[arg-type]
        temperature=temperature,
        pressure=pressure,
        timestep=timestep,
        steps=DEFAULT_STEPS if wanted is None else wanted,
        friction=friction,
        minimize=minimize,
        seed=seed,
        precision=precision,  # type: ignore[arg-type]
        device=device,
        platform=platform,
        report_interval=report_interval,
        trajectory_format=trajectory_format,  # type: ignore[arg-type]
    )
    with _Progress(settings, structure or "paracetamol") as progress:
        folder = _interruptible(lambda: run_md(settings, output, progress=progress), progress)
    _conclusion(folder)


def _steps(steps: int | None, length: float | None, timestep: float) -> int | None:
    """Number of steps asked for, or None."""
    if length is None:
        return steps
    for name, value, unit in (("length", length, "ps"), ("timestep", timestep, "fs")):
        if not 0 < value < math.inf:
            raise ConfigError(
                f"--{name} {value:g} {unit} is not allowed; it must be positive and finite"
            )
    return max(round(length * 1e3 / timestep), 1)


def _refuse_with_restart(given: set[str]) -> None:
    """With --restart everything but length and hardware is in the folder already."""
    surplus = sorted(given - {"restart", "length", "steps", "platform", "device"})
    if surplus:
        names = ", ".join(n if n == "structure" else "--" + n.replace("_", "-") for n in surplus)
        raise ConfigError(
            f"--restart goes on with the settings of the run; {names} cannot be changed. Only "
            "--length or --steps, --platform and --device can be given with it"
        )


def _refuse_useless(given: set[str], engine: str, ensemble: str) -> None:
    """Options that would change nothing are mistakes."""
    for name, useless, why in (
        ("friction", ensemble == "nve", "nve has no thermostat"),
        ("friction", engine == "ase" and ensemble == "npt", "npt of the ase engine (MTK) has none"),
        ("pressure", ensemble != "npt", f"{ensemble} keeps the volume; give --ensemble npt"),
        ("platform", engine != "openmm", "only OpenMM has platforms; give --engine openmm"),
    ):
        if useless and name in given:
            raise ConfigError(f"--{name} would change nothing: {why}")


def _check_device(device: str | None) -> None:
    if device is None:
        return
    from mlip_md.devices import find_device

    try:
        find_device(device)
    except ConfigError as error:
        there = str(error).partition(". ")[0]
        raise ConfigError(
            f"--device: {there}. Write --device cpu, gpu or cuda:1, or leave it out; for a GPU "
            "install the extra: pip install 'mlip-md[cuda13]'"
        ) from error


def _restart(
    folder: Path,
    length: float | None,
    steps: int | None,
    platform: str | None,
    device: str | None,
) -> None:
    from mlip_md.integrations.md.run import read_settings, restart_md

    settings = read_settings(folder)
    if platform is not None:
        _refuse_useless({"platform"}, settings.engine, settings.ensemble)
    _check_device(device)
    more = _steps(steps, length, settings.timestep)
    with _Progress(settings, f"continuing {folder}") as progress:
        if (platform, device) != (None, None):
            progress.later(
                "On another platform or device the run goes on from its last positions and "
                "velocities, but not exactly as it would have"
            )
        _interruptible(
            lambda: restart_md(
                folder, steps=more, platform=platform, device=device, progress=progress
            ),
            progress,
        )
    _conclusion(folder)


def _headline(settings: MDSettings, structure: str) -> str:
    target = "" if settings.ensemble == "nve" else f" at {settings.temperature:g} K"
    if settings.ensemble == "npt":
        target += f" and {settings.pressure:g} bar"
    return (
        f"[bold]{structure}[/bold]: {settings.ensemble.upper()}{target}, "
        f"{settings.timestep:g} fs steps, model {settings.model}, engine {settings.engine}"
    )


def _interruptible(run: Callable[[], Path], progress: _Progress) -> Path:
    """Run; after Ctrl-C say how to go on."""
    try:
        return run()
    except KeyboardInterrupt:
        progress.stop()
        if progress.folder is None:
            raise  # nothing to go on with
        typer.echo(f"Interrupted. Continue with: mlip-md md --restart {progress.folder}", err=True)
        raise typer.Exit(130) from None
    except MLIPError:
        progress.stop()
        raise


class _Progress:
    """Progress of a run: a bar on a terminal, some lines elsewhere."""

    def __init__(self, settings: MDSettings, structure: str) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)
        self.timestep = settings.timestep
        self.total = settings.steps
        self.folder: Path | None = None
        self._waiting = [_headline(settings, structure)]
        self._bar: Any = None
        self._task: Any = None
        self._next_line = 0.0

    def __enter__(self) -> _Progress:
        if self.console.is_terminal:
            self._bar = _bar(self.console)
            self._bar.start()
            self._task = self._bar.add_task("Starting", total=None, info="")
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar off the screen's bottom; what it showed last stays."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def later(self, text: str) -> None:
        """Say something when the input has been found good."""
        self._waiting.append(text)

    def stage(self, text: str) -> None:
        """A phase without steps begins; at the first one, all input has been found good."""
        while self._waiting:
            self.console.print(self._waiting.pop(0))
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self.console.print(f"{text} ...")

    def note(self, text: str) -> None:
        """Something the user should know."""
        self.console.print(f"[yellow]{text}[/yellow]")

    def stopping(self) -> None:
        """Ctrl-C came; nothing here may wait for what the signal has interrupted."""
        if self._bar is not None:
            self._bar.update(self._task, description="Stopping after this step")
        else:
            os.write(2, b"Stopping after this step; Ctrl-C again stops at once\n")

    def begin(self, folder: Path, done: int, total: int) -> None:
        """Stepping begins."""
        self.folder = folder
        self._first, self.total = done, total
        self._next_line = done + (total - done) / LINES
        if self._bar is not None:
            self._bar.reset(self._task, description="Running", total=total, completed=done)

    def update(self, frame: Frame, steps_per_second: float) -> None:
        """Another frame is there."""
        per_day = steps_per_second * self.timestep * 1e-6 * 86400
        left = _clock((self.total - frame.step) / steps_per_second) if steps_per_second else "?"
        info = (
            f"{frame.time:.3f} ps  {frame.temperature:4.0f} K  {_short(steps_per_second)} steps/s  "
            f"{_short(per_day)} ns/day  {left} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=frame.step, info=info)
        elif frame.step >= min(self._next_line, self.total):
            share = 100 * frame.step / self.total
            self.console.print(
                f"step {frame.step}/{self.total} {share:3.0f}%  {info}", soft_wrap=True
            )
            self._next_line += (self.total - self._first) / LINES


def _short(value: float) -> str:
    """Three digits, and as many as there are before the point: 0.0123, 12.3, 12345."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
        expand=True,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"


def _conclusion(folder: Path) -> None:
    """The summary as a table, and what lies in the folder."""
    from rich.console import Console
    from rich.table import Table

    from mlip_md.integrations.md import report

    console = Console(highlight=False)
    summary = json.loads((folder / report.SUMMARY).read_text(encoding="utf-8"))
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in report.summary_lines(summary):
        table.add_row(f"[bold]{name}[/bold]", text)
    console.print(table)
    console.print(f"\n[bold]{folder}[/bold]")
    for name, text in report.contents(folder):
        console.print(f"  {name:<18} {text}", soft_wrap=True)
    if sys.stdout.isatty():
        console.print(f"Continue with: mlip-md md --restart {folder} --length 1")


def minimize_command(
    structure: StructureArgument = None,
    model: ModelOption = DEFAULT_MODEL,
    fmax: Annotated[float, typer.Option(help="eV/Å: largest force at which to stop.")] = 0.01,
    steps: Annotated[int, typer.Option(min=1, help="At most so many steps.")] = 500,
    optimizer: Annotated[
        str, typer.Option(help="fire for thousands of atoms.", **_one_of("bfgs", "fire"))
    ] = "bfgs",
    relax_cell: Annotated[
        bool, typer.Option("--relax-cell", help="Relax the cell too (periodic structures).")
    ] = False,
    precision: PrecisionOption = "single",
    device: DeviceOption = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="File to write. Default: <name>-minimized.extxyz."),
    ] = None,
) -> None:
    """Relax a structure and write it."""
    if not 0 < fmax < math.inf:
        raise ConfigError(f"--fmax {fmax:g} is not allowed; it must be positive and finite")
    _check_device(device)
    from ase.io import write
    from rich.console import Console

    from mlip_md.integrations.ase import MLIPCalculator
    from mlip_md.integrations.md.backends.ase import minimize
    from mlip_md.integrations.md.structures import read_structure
    from mlip_md.integrations.models import DTYPES

    console = Console(highlight=False)
    given = read_structure(structure)
    path = output or Path(f"{given.name}-minimized.extxyz")
    _check_writable(path, given.atoms)
    calculator = MLIPCalculator(model, dtype=DTYPES[precision], device=device)
    console.print(f"[bold]{given.name}[/bold]: {len(given.atoms)} atoms, model {model}")
    shown: list[int] = []

    def observe(step: int, energy: float, largest: float) -> None:
        if step == 0 or step >= shown[-1] * 1.5:
            shown.append(max(step, 1))
            console.print(
                f"step {step:4d}  energy {energy:.6f} eV  largest force {largest:.4f} eV/Å"
            )

    relaxed, converged = minimize(
        given.atoms,
        calculator,
        fmax=fmax,
        steps=steps,
        relax_cell=relax_cell,
        optimizer=optimizer,
        observer=observe,
    )
    write(path, relaxed)
    energy = relaxed.get_potential_energy()
    ending = "Converged" if converged else f"[yellow]Not converged within {steps} steps[/yellow]"
    console.print(f"{ending}: {energy:.6f} eV. Wrote {path}")
    if not converged:
        raise typer.Exit(1)


def _check_writable(path: Path, atoms: Atoms) -> None:
    """Try to write a file of this name before anything is computed for it."""
    import tempfile

    from ase.io import write

    if path.exists():
        raise ConfigError(f"{path} exists; name another file with --output")
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {path.parent} for {path.name}; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{path.parent.resolve()} may not be written; name another --output")
    with tempfile.TemporaryDirectory() as folder:
        try:
            write(Path(folder) / path.name, atoms)
        except Exception as error:
            raise ConfigError(
                f"ASE cannot write {path.name} ({type(error).__name__}: {error}); the ending says "
                "the format: .extxyz, .xyz, .pdb or .cif, for example"
            ) from error
