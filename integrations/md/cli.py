"""The commands ``mlip-md md`` and ``mlip-md minimize``.

Everything heavy is imported inside the commands, so that help and errors come at once.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mlip_md.errors import ConfigError, DeviceError, StoppedError
from mlip_md.files import check_new_file
from mlip_md.formats.names import HEAD_HELP, MODEL_HELP
from mlip_md.hints import hint
from mlip_md.integrations.md.observers import TerminalObserver
from mlip_md.integrations.md.settings import (
    DEFAULT_STEPS,
    MAX_SEED,
    MDSettings,
    choices_of,
    read_settings,
)
from mlip_md.integrations.models import DEFAULT_MODEL
from mlip_md.signals import EXIT_KEYBOARD

ModelOption = Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)]
HeadOption = Annotated[str | None, typer.Option(metavar="NAME", help=HEAD_HELP)]


def _one_of(*choices: str) -> Any:
    """Keywords of an option that takes one of some words; a misspelled one is told the nearest."""

    def parse(text: str) -> str:
        if text not in choices:
            raise typer.BadParameter(f"{text!r} is not allowed; {hint(text, choices)}")
        return text

    return {"parser": parse, "metavar": f"[{'|'.join(choices)}]"}


PrecisionOption = Annotated[
    str, typer.Option(help="Precision of the potential.", **_one_of(*choices_of("precision")))
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

FrameOption = Annotated[
    int | None,
    typer.Option(help="Which of several frames or models, counted from 0; -1 is the last."),
]
DropOption = Annotated[
    bool,
    typer.Option("--drop-virtual-sites", help="Leave out sites without nucleus (of TIP4P, ...)."),
]


def md_command(
    context: typer.Context,
    structure: StructureArgument = None,
    model: ModelOption = DEFAULT_MODEL,
    head: HeadOption = None,
    engine: Annotated[
        str, typer.Option(help="What integrates the motion.", **_one_of(*choices_of("engine")))
    ] = MDSettings.engine,
    ensemble: Annotated[
        str,
        typer.Option(
            help="npt needs a structure that is periodic in three directions. nvt: Langevin. npt: "
            "MTK with ase; Langevin and Monte Carlo moves of the volume with openmm, which unlike "
            "OpenMM's own barostat continue exactly after a restart.",
            **_one_of(*choices_of("ensemble")),
        ),
    ] = MDSettings.ensemble,
    temperature: Annotated[
        float, typer.Option("--temperature", "-T", min=0.0, help="K, of thermostat and start")
    ] = MDSettings.temperature,
    pressure: Annotated[float, typer.Option(help="bar; npt only")] = MDSettings.pressure,
    timestep: Annotated[float, typer.Option(help="fs")] = MDSettings.timestep,
    length: Annotated[
        float | None,
        typer.Option(help="ps; with --restart: how much further. Default: 2000 steps."),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of --length.")] = None,
    friction: Annotated[
        float, typer.Option(min=0.0, help="1/ps, of the Langevin thermostat")
    ] = MDSettings.friction,
    minimize: Annotated[
        bool, typer.Option(help="Relax the positions first.")
    ] = MDSettings.minimize,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of velocities and thermostat.")
    ] = MDSettings.seed,
    precision: PrecisionOption = MDSettings.precision,
    device: DeviceOption = None,
    platform: Annotated[
        str | None,
        typer.Option(help="OpenMM platform: Reference, CPU, CUDA, ... Default: the fastest."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="New folder. Default: md-<name>-<n>.")
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
            **_one_of(*choices_of("trajectory_format")),
        ),
    ] = MDSettings.trajectory_format,
    frame: FrameOption = None,
    drop_virtual_sites: DropOption = False,
    velocities: Annotated[
        str,
        typer.Option(
            help="At the start; file: those it holds.", **_one_of(*choices_of("velocities"))
        ),
    ] = MDSettings.velocities,
    hydrogen_mass: Annotated[
        float | None,
        typer.Option(help="u: makes hydrogen heavier by what its heavy neighbor loses."),
    ] = None,
) -> None:
    """Run molecular dynamics; the result is a folder with trajectory, log, plot and summary.

    Without arguments: 1 ps of a paracetamol molecule at 300 K with the bundled model.

    Ctrl-C, SIGTERM and SIGHUP end a run after the present step, with everything saved.
    """
    options = locals()
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
    # The settings have the names of the options.
    told = {field.name: options[field.name] for field in dataclasses.fields(MDSettings)}
    told["steps"] = _count_steps(steps, length, timestep) or DEFAULT_STEPS
    settings = MDSettings(**told)
    _refuse_useless(given, settings)
    _check_device(device)
    from mlip_md.integrations.md.run import run_md

    observer = TerminalObserver(settings, structure or "paracetamol")
    _show(lambda: run_md(settings, output, progress=observer), observer)


def _count_steps(steps: int | None, length: float | None, timestep: float) -> int | None:
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


def _refuse_useless(given: set[str], settings: MDSettings) -> None:
    """Options that would change nothing are mistakes."""
    from mlip_md.integrations.md.backends import BACKENDS

    ignored = BACKENDS[settings.engine]().ignored(settings.ensemble)
    if settings.ensemble == "nve":
        ignored["friction"] = "nve has no thermostat"
    if settings.ensemble != "npt":
        ignored["pressure"] = f"{settings.ensemble} keeps the volume; give --ensemble npt"
    for name in sorted(given & ignored.keys()):
        raise ConfigError(f"--{name} would change nothing: {ignored[name]}")


def _check_device(device: str | None) -> None:
    if device is None:
        return
    from mlip_md.devices import find_device

    try:
        find_device(device)
    except DeviceError as error:
        raise ConfigError(
            f"--device: {error.problem}. Write --device cpu, gpu or cuda:1, or leave it out; for a "
            "GPU install the extra: pip install 'mlip-md[cuda13]'"
        ) from error


def _restart(
    folder: Path, length: float | None, steps: int | None, platform: str | None, device: str | None
) -> None:
    settings = read_settings(folder)
    if platform is not None:
        _refuse_useless({"platform"}, settings)
    _check_device(device)
    more = _count_steps(steps, length, settings.timestep)
    from mlip_md.integrations.md.run import restart_md

    observer = TerminalObserver(settings, f"continuing {folder}")
    if (platform, device) != (None, None):
        observer.later(
            "On another platform or device the run goes on from its last positions and "
            "velocities, but not exactly as it would have"
        )
    _show(
        lambda: restart_md(folder, steps=more, platform=platform, device=device, progress=observer),
        observer,
    )


def _show(run: Callable[[], Path], observer: TerminalObserver) -> None:
    """Run; say in the end what the folder holds, or after a signal how to go on."""
    try:
        with observer:
            folder = run()
    except KeyboardInterrupt:
        if observer.folder is None:
            raise  # nothing to go on with
        typer.echo(f"Interrupted. Continue with: mlip-md md --restart {observer.folder}", err=True)
        raise typer.Exit(EXIT_KEYBOARD) from None
    except StoppedError as error:
        told = f"{error}. Continue with: mlip-md md --restart {observer.folder}"
        if observer.folder is None:
            told = "a signal ended the run before its first step; start again"
        raise StoppedError(told) from None
    _conclude(folder)


def _conclude(folder: Path) -> None:
    """The summary as a table, and what lies in the folder."""
    from rich.console import Console
    from rich.table import Table

    from mlip_md.integrations.md.report import describe_summary, list_contents, read_summary

    console = Console(highlight=False)
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, text in describe_summary(read_summary(folder)):
        table.add_row(f"[bold]{name}[/bold]", text)
    console.print(table)
    console.print(f"\n[bold]{folder}[/bold]")
    for name, text in list_contents(folder):
        console.print(f"  {name:<18} {text}", soft_wrap=True)
    if sys.stdout.isatty():
        console.print(f"Continue with: mlip-md md --restart {folder} --length 1")


def minimize_command(
    structure: StructureArgument = None,
    model: ModelOption = DEFAULT_MODEL,
    head: HeadOption = None,
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
    frame: FrameOption = None,
    drop_virtual_sites: DropOption = False,
) -> None:
    """Relax a structure and write it."""
    if not 0 < fmax < math.inf:
        raise ConfigError(f"--fmax {fmax:g} is not allowed; it must be positive and finite")
    _check_device(device)
    from rich.console import Console
    from rich.markup import escape

    from mlip_md.integrations.ase import MLIPCalculator
    from mlip_md.integrations.md.minimize import relax_structure
    from mlip_md.integrations.md.structures import (
        compare_bonds,
        describe_unwritten,
        format_structure,
        read_structure,
        write_structure,
    )
    from mlip_md.integrations.models import DTYPE_OF_PRECISION

    console = Console(highlight=False)
    given = read_structure(structure, frame=frame, drop_virtual_sites=drop_virtual_sites)
    given.check_charge()
    path = output or Path(f"{given.name}-minimized.extxyz")
    if path.exists():
        raise ConfigError(f"{path} exists; name another file with --output")
    check_new_file(path, "--output")
    format_structure(path.name, given)  # what cannot be written is known before it is computed
    calculator = MLIPCalculator(
        model, head=head, dtype=DTYPE_OF_PRECISION[precision], device=device
    )
    console.print(f"[bold]{given.name}[/bold]: {len(given.atoms)} atoms, model {model}")
    console.print(escape(given.line()), soft_wrap=True)
    for note in given.report.notes:
        console.print(f"[yellow]{escape(note)}[/yellow]", soft_wrap=True)
    shown: list[int] = []

    def observe(step: int, energy: float, largest: float) -> None:
        if step == 0 or step >= shown[-1] * 1.5:
            shown.append(max(step, 1))
            console.print(
                f"step {step:4d}  energy {energy:.6f} eV  largest force {largest:.4f} eV/Å"
            )

    relaxed, converged = relax_structure(
        given.atoms,
        calculator,
        fmax=fmax,
        steps=steps,
        relax_cell=relax_cell,
        optimizer=optimizer,
        observer=observe,
    )
    if text := compare_bonds(given.atoms, relaxed).describe(relaxed):
        console.print(f"[yellow]The minimization {text} (bonds by distance)[/yellow]")
    write_structure(path, given, relaxed)
    energy = relaxed.get_potential_energy()
    ending = "Converged" if converged else f"[yellow]Not converged within {steps} steps[/yellow]"
    lost = describe_unwritten(path.name, given, relaxed)
    lost = f" [yellow]({escape(lost)})[/yellow]" if lost else ""
    console.print(f"{ending}: {energy:.6f} eV. Wrote {path}{lost}", soft_wrap=True)
    if not converged:
        raise typer.Exit(1)
