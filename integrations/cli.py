"""The commands ``mlip-md md`` and ``mlip-md minimize``.

Everything heavy is imported inside the commands, so that help and errors come at once.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mlip_md.errors import ConfigError, MLIPError
from mlip_md.integrations.models import DEFAULT_MODEL

if TYPE_CHECKING:
    from mlip_md.integrations.md import MDSettings
    from mlip_md.integrations.report import Frame

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="Bundled name, .safetensors file, .zip or run folder."),
]
PrecisionOption = Annotated[
    Literal["single", "double"], typer.Option(help="Precision of the potential.")
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
        Literal["ase", "openmm"], typer.Option(help="What integrates the motion.")
    ] = "ase",
    ensemble: Annotated[
        Literal["nve", "nvt", "npt"],
        typer.Option(help="npt needs a structure that is periodic in three directions."),
    ] = "nvt",
    temperature: Annotated[
        float, typer.Option("--temperature", "-T", help="K, of thermostat and start")
    ] = 300.0,
    pressure: Annotated[float, typer.Option(help="bar; npt only")] = 1.0,
    timestep: Annotated[float, typer.Option(help="fs")] = 0.5,
    length: Annotated[
        float | None,
        typer.Option(help="ps; with --restart: how much further. Default: 2000 steps."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Instead of --length.")] = None,
    friction: Annotated[float, typer.Option(help="1/ps, of the Langevin thermostat (nvt)")] = 10.0,
    minimize: Annotated[bool, typer.Option(help="Relax the positions first.")] = True,
    seed: Annotated[int, typer.Option(help="Of velocities and thermostat.")] = 0,
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
        int | None, typer.Option(help="Steps between frames. Default: about 500 frames.")
    ] = None,
) -> None:
    """Run molecular dynamics; the result is a folder with trajectory, log, plot and summary.

    Without arguments: 1 ps of a paracetamol molecule at 300 K with the bundled model.
    """
    if length is not None and steps is not None:
        raise ConfigError("--length and --steps both say how long to run; give one of them")
    if restart is not None:
        _refuse_with_restart(context)
        _restart(restart, length, steps)
        return
    from mlip_md.integrations.md import DEFAULT_STEPS, MDSettings, run_md

    wanted = _steps(steps, length, timestep)
    settings = MDSettings(
        structure=structure,
        model=model,
        engine=engine,
        ensemble=ensemble,
        temperature=temperature,
        pressure=pressure,
        timestep=timestep,
        steps=DEFAULT_STEPS if wanted is None else wanted,
        friction=friction,
        minimize=minimize,
        seed=seed,
        precision=precision,
        device=device,
        platform=platform,
        report_interval=report_interval,
    )
    _headline(settings, structure)
    with _Progress(settings) as progress:
        folder = _interruptible(lambda: run_md(settings, output, progress=progress), progress)
    _conclusion(folder)


def _steps(steps: int | None, length: float | None, timestep: float) -> int | None:
    """Number of steps asked for, or None."""
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps {steps} is not allowed; it must be at least 1")
    if length is None:
        return steps
    if not (length > 0 and timestep > 0):
        raise ConfigError(
            f"--length {length:g} ps in steps of {timestep:g} fs is not allowed; both must be "
            "positive"
        )
    return max(round(length * 1e3 / timestep), 1)


def _refuse_with_restart(context: typer.Context) -> None:
    """With --restart everything but the length is in the folder already."""
    given = {
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    }
    surplus = sorted(given - {"restart", "length", "steps"})
    if surplus:
        names = ", ".join(n if n == "structure" else "--" + n.replace("_", "-") for n in surplus)
        raise ConfigError(
            f"--restart goes on with the settings of the run; {names} cannot be changed. Only "
            "--length or --steps can be given with it"
        )


def _restart(folder: Path, length: float | None, steps: int | None) -> None:
    from mlip_md.integrations.md import read_settings, restart_md

    settings = read_settings(folder)
    more = _steps(steps, length, settings.timestep)
    _headline(settings, f"continuing {folder}")
    with _Progress(settings) as progress:
        _interruptible(lambda: restart_md(folder, steps=more, progress=progress), progress)
    _conclusion(folder)


def _headline(settings: MDSettings, structure: str | None) -> None:
    from rich.console import Console

    target = "" if settings.ensemble == "nve" else f" at {settings.temperature:g} K"
    if settings.ensemble == "npt":
        target += f" and {settings.pressure:g} bar"
    Console(highlight=False).print(
        f"[bold]{structure or 'paracetamol'}[/bold]: {settings.ensemble.upper()}{target}, "
        f"{settings.timestep:g} fs steps, model {settings.model}, engine {settings.engine}"
    )


def _interruptible(run: Any, progress: _Progress) -> Path:
    """Run; after Ctrl-C say how to go on."""
    try:
        return run()
    except KeyboardInterrupt:
        progress.stop()
        folder = progress.folder
        if folder is not None:
            typer.echo(f"Interrupted. Continue with: mlip-md md --restart {folder}", err=True)
        raise typer.Exit(130) from None
    except MLIPError:
        progress.stop()
        raise


class _Progress:
    """Progress of a run: a bar on a terminal, some lines elsewhere."""

    def __init__(self, settings: MDSettings) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)
        self.timestep = settings.timestep
        self.total = settings.steps
        self.folder: Path | None = None
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

    def stage(self, text: str) -> None:
        """A phase without steps begins."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self.console.print(f"{text} ...")

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
        left = _clock((self.total - frame.step) / max(steps_per_second, 1e-9))
        info = f"{frame.time:.3f} ps  {frame.temperature:4.0f} K  {per_day:.3g} ns/day  {left} left"
        if self._bar is not None:
            self._bar.update(self._task, completed=frame.step, info=info)
        elif frame.step >= min(self._next_line, self.total):
            self.console.print(f"step {frame.step}/{self.total}  {info}")
            self._next_line += (self.total - self._first) / LINES


def _bar(console: Any) -> Any:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
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

    from mlip_md.integrations import report

    console = Console(highlight=False)
    summary = json.loads((folder / report.SUMMARY).read_text(encoding="utf-8"))
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in report.summary_lines(summary):
        table.add_row(f"[bold]{name}[/bold]", text)
    console.print(table)
    console.print(f"\n[bold]{folder}[/bold]")
    for name, text in report.contents(folder):
        console.print(f"  {name:<20} {text}")
    if sys.stdout.isatty():
        console.print(f"Continue with: mlip-md md --restart {folder} --length 1")


def minimize_command(
    structure: StructureArgument = None,
    model: ModelOption = DEFAULT_MODEL,
    fmax: Annotated[float, typer.Option(help="eV/Å: largest force at which to stop.")] = 0.01,
    steps: Annotated[int, typer.Option(help="At most so many steps.")] = 500,
    optimizer: Annotated[
        Literal["bfgs", "fire"], typer.Option(help="fire for thousands of atoms.")
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
    from ase.io import write
    from rich.console import Console

    from mlip_md.integrations.ase import MLIPCalculator
    from mlip_md.integrations.md_ase import minimize
    from mlip_md.integrations.models import DTYPES
    from mlip_md.integrations.structures import read_structure

    console = Console(highlight=False)
    given = read_structure(structure)
    path = output or Path(f"{given.name}-minimized.extxyz")
    if path.exists():
        raise ConfigError(f"{path} exists; name another file with --output")
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
