"""The command ``mlip-md``: the only module that sees all three rooms.

Everything heavy is imported inside the commands, so that ``mlip-md --help`` answers at once.
Exit codes are those of ``EXIT_CODES`` and the ones of ``docs/exit-codes.md`` that no error has.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import mlip_md
from mlip_md import errors, files, native
from mlip_md.formats.names import FORMAT_HELP, HEAD_HELP, MODEL_HELP
from mlip_md.integrations.md.cli import md_command, minimize_command
from mlip_md.signals import EXIT_SAVED, Interruptions
from mlip_md.streams import lasting_streams
from mlip_md.trainer.cli import (
    check_command,
    evaluate_command,
    init_command,
    prepare_command,
    train_command,
)
from mlip_md.trainer.generate.command import make_dataset_command

if TYPE_CHECKING:
    from rich.table import Table

    from mlip_md.potential import Potential

EXIT_CODES: Mapping[type[Exception], int] = {
    errors.DataError: 3,
    errors.NonFiniteError: 4,
    errors.SimulationError: 4,
    errors.CheckpointError: 5,
    errors.OutputError: 5,
    errors.OwnershipError: 5,
    errors.CapacityError: 7,
    errors.NotLearnedError: 8,
    errors.StoppedError: EXIT_SAVED,
    errors.MLIPError: 2,
    FileNotFoundError: 2,
    OSError: 5,
}
"""Exit code of the first class that an error is of."""

app = typer.Typer(
    name="mlip-md",
    help="Molecular dynamics with machine-learned potentials, and the trainer that makes them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

_ONLY_IN_JSON = ("recipe.", "units.", "data.statistics.", "data.batch")
"""Parts of a potential's provenance that are long or said elsewhere in the table."""

_COMPUTING = ("md", "minimize", "train", "evaluate")
"""Commands that compile what the next process will need again."""

_USE, _MAKE, _LOOK = "Use a potential", "Make a potential", "Look at models"

app.command("md", rich_help_panel=_USE)(md_command)
app.command("minimize", rich_help_panel=_USE)(minimize_command)
app.command("init", rich_help_panel=_MAKE)(init_command)
app.command("train", rich_help_panel=_MAKE)(train_command)
app.command("check", rich_help_panel=_MAKE)(check_command)
app.command("evaluate", rich_help_panel=_MAKE)(evaluate_command)
app.command("prepare", rich_help_panel=_MAKE)(prepare_command)
app.command("make-dataset", rich_help_panel=_MAKE)(make_dataset_command)


def main() -> None:
    """Run the command line; errors made on purpose become one line and an exit code."""
    try:
        with lasting_streams():
            _main()
    except SystemExit as end:
        parallel = sys.modules.get("mlip_md.trainer.parallel")
        if parallel is not None and end.code:
            parallel.end_alone(end.code)
        raise


def _main() -> None:
    arguments = [a for a in sys.argv[1:] if a != "--debug"]
    try:
        # A Ctrl-C that a library swallows while it is imported is known to the work that follows.
        with Interruptions(signal.SIGINT, patient=False):
            app(args=arguments, prog_name="mlip-md")
    except (errors.MLIPError, OSError) as error:
        if len(arguments) < len(sys.argv[1:]):
            raise
        _print_error(f"Error: {_told(error)}")
        sys.exit(next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind)))
    except SystemExit as end:
        # A command that has said so itself, and how to go on, ends without KeyboardInterrupt.
        if isinstance(getattr(end.__context__, "__cause__", None), KeyboardInterrupt):
            _print_error("Interrupted.")
        raise


def _told(error: Exception) -> str:
    """An error's text; of an operating system's error the file that the user named, and why."""
    if isinstance(error, errors.MLIPError) or not isinstance(error, OSError):
        return str(error)
    name = error.filename2 or error.filename
    why = error.strerror or str(error)
    return why if name is None else f"{name}: {why}"


def _print_error(message: str) -> None:
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True).print(Text(message, style="bold red"), soft_wrap=True)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mlip-md {mlip_md.__version__}\nconvolution on processors: {native.describe()}")
        raise typer.Exit()


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error (anywhere in the line).")
    ] = False,
    cache: Annotated[
        bool,
        typer.Option(help="Keep compiled programs on the disk (MLIP_MD_CACHE: where, or off)."),
    ] = True,
) -> None:
    del version, debug  # acted on elsewhere
    if context.invoked_subcommand in _COMPUTING:
        mlip_md.keep_memory()
        if cache:
            mlip_md.enable_cache()


@app.command(rich_help_panel=_LOOK)
def show(
    model: Annotated[
        str,
        typer.Argument(help=MODEL_HELP),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
    head: Annotated[str | None, typer.Option(metavar="NAME", help=HEAD_HELP)] = None,
) -> None:
    """Show what a model is: network, elements, energies of atoms, origin, licence."""
    from rich.console import Console
    from rich.markdown import Markdown

    from mlip_md import bundled

    potential = _load_any_head(model, head)
    if as_json:
        identity = {"sha256": potential.sha256, "num_parameters": potential.num_parameters}
        typer.echo(json.dumps(potential.description() | identity, indent=2))
        return
    console = Console()
    console.print(_model_table(potential, model))
    card = bundled.card(model) if model in bundled.names() else None
    if card is not None:
        console.print(Markdown(card))


def _load_any_head(model: str, head: str | None) -> Potential:
    """A potential to look at: of several heads the first, if none is named."""
    try:
        return mlip_md.load(model, head)
    except errors.HeadError as error:
        if head is not None:
            raise
        first, *_ = error.heads
        typer.echo(f"This is head {first} of several; --head NAME shows another.", err=True)
        return mlip_md.load(model, first)


@app.command(rich_help_panel=_LOOK)
def convert(
    source: Annotated[
        str,
        typer.Argument(help=MODEL_HELP),
    ],
    destination: Annotated[
        Path | None, typer.Argument(help="File to write; by default SOURCE's name, in this folder.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(metavar="FORMAT", help=FORMAT_HELP),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    head: Annotated[str | None, typer.Option(metavar="NAME", help=HEAD_HELP)] = None,
) -> None:
    """Write a model in another format; its weights and energies stay the same.

    An InstaDeep zip (read by mlip 0.1 and, as models_v1, 0.2) has no place for a model's origin.
    """
    from mlip_md.formats.open import FORMATS

    writers = {name: known.save for name, known in FORMATS.items() if known.save is not None}
    endings = {name: FORMATS[name].ending for name in writers}
    destination, to = _choose_format(source, destination, to, endings)
    files.check_new_file(destination, "DESTINATION")
    if destination.exists() and not force:
        raise errors.ConfigError(f"{destination} exists; give --force to replace it")
    potential = mlip_md.load(source, head)
    writers[to](potential, destination)
    FORMATS[to].load(destination)  # reads and checks what was written
    network = f"{potential.config.architecture}, {potential.num_parameters:,} parameters"
    typer.echo(f"{destination}: {network}")


def _choose_format(
    source: str, destination: Path | None, to: str | None, endings: Mapping[str, str]
) -> tuple[Path, str]:
    """The file that ``convert`` writes and its format, of those that have the endings given."""
    words = " or --to ".join(endings)
    if to is not None and to not in endings:
        raise errors.ConfigError(f"unknown format {to!r}, or one only read; write --to {words}")
    if destination is None:
        if to is None:
            raise errors.ConfigError("give a file to write, or a format with --to")
        name = Path(source).resolve().name
        return Path(name.removesuffix(Path(source).suffix) + endings[to]), to
    allowed = {name: ending for name, ending in endings.items() if to in (None, name)}
    fitting = [name for name, ending in allowed.items() if ending == destination.suffix]
    if not fitting:
        whose = ", ".join(f"{ending} is {name}'s" for name, ending in endings.items())
        listed = " or ".join(dict.fromkeys(allowed.values()))
        raise errors.ConfigError(
            f"{destination}: the ending decides the format; write {listed} ({whose})"
        )
    if len(fitting) > 1:
        words = " or --to ".join(fitting)
        raise errors.ConfigError(f"{destination}: several formats end so; write --to {words}")
    return destination, fitting[0]


def _model_table(potential: Potential, name: str) -> Table:
    """Everything about a potential as one table of names and values."""
    from rich.table import Table

    from mlip_md.elements import symbol
    from mlip_md.formats.soundness import flatten
    from mlip_md.networks.config import config_to_dict

    config = potential.config
    reach = config.num_layers * potential.cutoff
    r_min = "none" if potential.avg_r_min is None else f"{potential.avg_r_min:g} Å"
    table = Table(title=name, show_header=False, title_justify="left", pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("architecture", config.architecture)
    table.add_row("parameters", f"{potential.num_parameters:,}")
    table.add_row("elements", " ".join(symbol(z) for z in potential.elements))
    table.add_row("cutoff", f"{potential.cutoff:g} Å; an atom sees up to {reach:g} Å")
    table.add_row("units", "energy eV, positions Å, forces eV/Å, stress eV/Å³")
    table.add_row("sha256", potential.sha256, end_section=True)
    for key, value in config_to_dict(config).items():
        table.add_row(key, _plain(value))
    table.add_section()
    table.add_row("training set", f"{potential.avg_num_neighbors:g} neighbors per atom")
    table.add_row("", f"mean shortest distance: {r_min}")
    table.add_row("scaling", f"{potential.scaling_mean:g} eV + {potential.scaling_stdev:g} · ε")
    energies = zip(potential.elements, potential.atomic_energies, strict=True)
    lines = [f"{symbol(z):<2} {energy:>18.6f}" for z, energy in energies]
    table.add_row("E0 (eV)", "\n".join(lines), end_section=True)
    for key, value in flatten(potential.info, ".").items():
        if not key.startswith(_ONLY_IN_JSON):
            table.add_row(key, _plain(value))
    table.add_row("on processors", native.describe())
    table.add_row("everything", "mlip-md show --json")
    return table


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
