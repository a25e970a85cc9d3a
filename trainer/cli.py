"""The commands ``train`` and ``evaluate``; heavy imports happen inside them."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mlip_md.errors import ConfigError, DataError, NotLearnedError, RejectedError
from mlip_md.files import check_new_file, check_new_folder, write_text
from mlip_md.formats.names import HEAD_HELP
from mlip_md.ownership import release_all
from mlip_md.signals import (
    ENDINGS,
    EXIT_KEYBOARD,
    EXIT_SAVED,
    Interruptions,
    ending_process,
)

if TYPE_CHECKING:
    from mlip_md.potential import Potential
    from mlip_md.trainer.data import Statistics, TrainingData
    from mlip_md.trainer.evaluation import Evaluation
    from mlip_md.trainer.parallel import Team
    from mlip_md.trainer.recipe import Recipe
    from mlip_md.trainer.train import Trainer


STARTED = time.monotonic()
"""When the process began; --max-time counts from here, reading and compiling included."""

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of the recipe."),
]


REJECTED = "rejected.csv"
"""Where bad records are listed: in a run's folder, beside a prepared one, or here."""

PREPARED = "prepared"
"""Folder in a run's folder for the data of files, so that they are read once; may be deleted."""
TELL_SECONDS = 10.0
"""Between lines on what was read."""

Strict = Annotated[
    bool, typer.Option("--strict", help="Stop (exit code 3) if the data are warned of.")
]


@contextlib.contextmanager
def _listing_rejected(path: Path) -> Iterator[list[tuple[str, str]]]:
    """Bad records, put into the list or raised as an error, are written to a file."""
    from mlip_md.trainer.data import write_rejected

    records: list[tuple[str, str]] = []
    try:
        yield records
    except RejectedError as error:
        records += error.records
        raise
    finally:
        if records:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_rejected(records, path)
            typer.echo(f"{len(records)} bad records are listed in {path}", err=True)


class _PlainWarnings(logging.Handler):
    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        typer.echo(f"Warning: {record.getMessage()}", err=True)


@contextlib.contextmanager
def _plain_warnings(strict: bool = False) -> Iterator[None]:
    """Warnings of the package become lines on stderr that begin with "Warning:".

    Raises:
        DataError: at the end, if ``strict`` and there was a warning.
    """
    logger, handler = logging.getLogger("mlip_md"), _PlainWarnings(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
    if strict and handler.count:
        raise DataError(f"--strict: {handler.count} warnings, see above")


def train_command(
    recipe: Annotated[
        str,
        typer.Argument(help="Recipe: a YAML file, or mace-spice2, nequip-spice2, organics-gfn2."),
    ],
    overrides: Overrides = None,
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="MODEL", help="Start from this potential: fine-tuning."),
    ] = None,
    head: Annotated[str | None, typer.Option(metavar="NAME", help=HEAD_HELP)] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME.")] = None,
    resume: Annotated[
        Literal["auto", "never", "must", "allow-changes"],
        typer.Option(
            help="Continue from the folder's checkpoints. auto: if there are any; allow-changes: "
            "also with other learning rates, warm-up, decay or clipping than before."
        ),
    ] = "auto",
    dry_run: Annotated[
        int, typer.Option(min=0, metavar="N", help="Time N steps and write nothing.")
    ] = 0,
    max_time: Annotated[
        str | None, typer.Option(metavar="HH:MM", help="Save and stop (exit code 75) after this.")
    ] = None,
    strict: Strict = False,
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="Devices of each process; default: one, or all of a process among several.",
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Several processes: where process 0 is reached."),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(min=1, help="How many there are; default: as SLURM or Open MPI says."),
    ] = None,
    process_number: Annotated[
        int | None, typer.Option(min=0, help="Which of them this is, from 0; likewise.")
    ] = None,
) -> None:
    """Train a potential from a recipe, on one device, several, or several machines.

    Exit codes: 0 done, 2 recipe, 3 data, 4 diverged (NaN), 5 storage, 75 interrupted, out of time
    or another process lost, with the state saved, 130 Ctrl-C with the state saved; 7 memory, 8
    nothing learned.
    """
    from mlip_md.trainer.recipe import load_recipe

    end = STARTED + parse_duration(max_time)
    chosen = [] if start is None else [f"start.potential={start}"]
    chosen += [] if head is None else [f"start.head={json.dumps(head)}"]
    checked, origins = load_recipe(recipe, [*(overrides or []), *chosen])
    folder = run or Path("runs") / checked.name
    check_new_folder(folder, "--run")
    trainer: Trainer | None = None
    with (
        _answering(lambda: trainer is None or not trainer.unsaved, end - time.monotonic()),
        _teamed(devices, coordinator, processes, process_number) as team,
    ):
        checked, parent = _with_parent(checked)
        data = _load(checked, folder, strict, team, keep=not dry_run)
        typer.echo("compiling the network")
        if dry_run:
            _dry_run(checked, data, folder, parent, team, dry_run)
            return
        with _plain_warnings(), _bar() as (echo, tick):
            from mlip_md.trainer.train import Trainer

            trainer = Trainer(
                checked, data, folder, parent=parent, origins=origins, echo=echo, tick=tick,
                team=team,
            )  # fmt: skip
            outcome = trainer.run(resume, end - time.monotonic())
    if outcome.problem:
        raise NotLearnedError(outcome.problem)
    raise typer.Exit({"done": 0, "keyboard": EXIT_KEYBOARD}.get(outcome.status, EXIT_SAVED))


@contextlib.contextmanager
def _teamed(
    devices: str | None, coordinator: str | None, processes: int | None, number: int | None
) -> Iterator[Team]:
    """The devices that train; of several processes one speaks."""
    from mlip_md.trainer.parallel import find_place, gather, joined

    with joined(find_place(coordinator, processes, number)), contextlib.ExitStack() as stack:
        team = gather(devices)
        if not team.leads:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield team


def _load(recipe: Recipe, folder: Path, strict: bool, team: Team, keep: bool) -> TrainingData:
    """The data of a run, which says what it reads; kept prepared in the run's folder or not.

    Of several processes one reads files and compares checksums, and the others trust it.
    """
    from mlip_md.trainer.data import Statistics, load_data

    kept = folder / PREPARED if keep else None
    read: list[TrainingData] = []

    def first() -> dict[str, Any]:
        read.append(_read(recipe, folder, strict, kept))
        return read[0].statistics.to_dict()

    statistics = Statistics.from_dict(team.first(first))
    if not read:
        read.append(load_data(recipe, kept, known=statistics if keep else None))
    return read[0]


def _read(recipe: Recipe, folder: Path, strict: bool, kept: Path | None) -> TrainingData:
    from mlip_md.trainer.data import load_data, usable_cores

    _say_reading(recipe.data.path)
    with _listing_rejected(folder / REJECTED) as bad, _plain_warnings(strict):
        data = load_data(recipe, kept, workers=usable_cores(), tell=_tell_structures())
        bad += data.rejected
    _say_kept(folder / PREPARED)
    for line in (*data.notes, *statistics_lines(data.statistics)):
        typer.echo(line)
    return data


def _dry_run(
    recipe: Recipe,
    data: TrainingData,
    folder: Path,
    parent: Potential | None,
    team: Team,
    steps: int,
) -> None:
    from mlip_md.trainer.costs import time_steps
    from mlip_md.trainer.train import Trainer

    typer.echo(data.summary())
    trainer = Trainer(recipe, data, folder, parent=parent, team=team)
    for name, value in time_steps(trainer, steps).items():
        typer.echo(f"{name}: {value:.4g}")


@contextlib.contextmanager
def _answering(
    may_end: Callable[[], bool] = lambda: True, max_seconds: float = math.inf
) -> Iterator[None]:
    """Signals and a time limit end the command with 75 or 130 within seconds, whatever it does.

    Args:
        may_end: whether the process may end at once, with nothing lost.
        max_seconds: until the limit.
    """
    watch = ending_process(may_end, release_all, max_seconds=max_seconds)
    with Interruptions(*ENDINGS, patient=False), watch:
        yield


def _with_parent(recipe: Recipe) -> tuple[Recipe, Potential | None]:
    """The recipe with the network of the potential that it starts from, and this, if there is one.

    What the potential decides otherwise than the recipe is told.
    """
    if recipe.start is None:
        return recipe, None
    import mlip_md
    from mlip_md.trainer.finetune import adopt_network

    parent = mlip_md.load(recipe.start.potential, recipe.start.head)
    adopted, changes = adopt_network(recipe, parent)
    for line in changes:
        typer.echo(line)
    return adopted, parent


def _say_kept(folder: Path) -> None:
    """How large the data are that a run keeps prepared, if any."""
    if folder.is_dir():
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        typer.echo(f"prepared data: {size / 1e6:.3g} MB in {folder}, for the next start")


def _say_reading(paths: str | list[str]) -> None:
    if paths:  # without any, an error says so
        typer.echo(f"reading {paths if isinstance(paths, str) else ', '.join(paths)}")


def _tell_structures() -> Callable[[int, float], None]:
    """Say how many structures are done and when the rest will be read.

    A line now and then, which a terminal, a pipe and a log of a queue can all take.
    """
    start = said = time.monotonic()

    def tell(count: int, read: float) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= TELL_SECONDS:
            said = now
            line = f"{count:,} structures done, {count / (now - start):,.0f} a second"
            if read > 0.01:
                left = datetime.timedelta(seconds=round((now - start) * (1 - read) / read))
                line += f", {100 * read:.0f} % read, {left} to the end of the files"
            typer.echo(line)

    return tell


@contextlib.contextmanager
def _bar() -> Iterator[tuple[Callable[[str], None], Callable[[int, int, int], None] | None]]:
    """Where lines go and what moves with the steps: a bar on a terminal, plain lines elsewhere."""
    console = Console()
    if not console.is_terminal:
        yield typer.echo, None
        return
    columns = (TextColumn("epoch {task.fields[epoch]}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        task = progress.add_task("training", epoch=1, total=None)

        def tick(epoch: int, done: int, total: int) -> None:
            progress.update(task, epoch=epoch, completed=done, total=total)

        yield lambda line: progress.console.out(line, highlight=False), tick


def check_command(
    recipe: Annotated[str, typer.Argument(help="Recipe: a YAML file or a shipped name.")] = "",
    overrides: Overrides = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compile and time some steps: memory, hours.")
    ] = False,
    print_only: Annotated[
        bool, typer.Option("--print", help="Print the recipe as it is written, nothing else.")
    ] = False,
    rows: Annotated[
        bool, typer.Option("--rows", help="Print every row that a recipe may have, nothing else.")
    ] = False,
    strict: Strict = False,
) -> None:
    """Check a recipe and its data without training: labels, E0, padding, size of the network.

    A shipped recipe is the start of an own one: mlip-md check organics-gfn2 --print > own.yaml
    """
    from mlip_md.trainer.recipe import describe_rows, load_recipe, print_recipe

    if rows:
        typer.echo(describe_rows(), nl=False)
        return
    if not recipe:
        raise ConfigError("name a recipe: a YAML file or a shipped name; or use --rows")
    if print_only:
        typer.echo(print_recipe(recipe), nl=False)
        return
    checked, origins = load_recipe(recipe, overrides or [])
    checked, parent = _with_parent(checked)
    from mlip_md.trainer.costs import judge_costs
    from mlip_md.trainer.data import load_data
    from mlip_md.trainer.train import Trainer

    with _listing_rejected(Path(REJECTED)) as bad, _plain_warnings(strict):
        data = load_data(checked, tell=_tell_structures())
        bad += data.rejected
    trainer = Trainer(checked, data, Path("runs") / checked.name, parent=parent, origins=origins)
    data = trainer.data  # with the elements and E0 of what it starts from
    for line in (*data.notes, data.summary(), *statistics_lines(data.statistics)):
        typer.echo(line)
    typer.echo(f"{checked.model['kind']} with {trainer.num_parameters:,} weights")
    for line in trainer.unreached:
        typer.echo(f"Warning: {line}")
    if deep:
        for line in judge_costs(trainer).lines():
            typer.echo(line)


def init_command(
    data: Annotated[
        list[Path], typer.Argument(help="Data files of one set; isolated atoms may be among them.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Recipe to write.")] = Path(
        "train.yaml"
    ),
    name: Annotated[str | None, typer.Option(help="Name of the potential.")] = None,
    hours: Annotated[
        float | None,
        typer.Option(min=0.0, help="Length of the training, from some steps that are timed here."),
    ] = None,
) -> None:
    """Look at a data set and write a recipe for it, every row explained."""
    from mlip_md.trainer.init import look_at, paths_for, write_recipe
    from mlip_md.trainer.recipe import load_recipe

    check_new_file(output, "--output")
    if output.exists():
        raise ConfigError(f"{output} exists; choose another name with --output")
    paths = paths_for(data, output)
    _say_reading(paths)
    with _plain_warnings():
        look = look_at(paths)
    name = name or data[0].name.split(".")[0]
    write_text(output, write_recipe(look, name))
    recipe, _ = load_recipe(str(output))
    if hours is not None:
        write_text(output, write_recipe(look, name, _epochs_in(hours, recipe)))
        load_recipe(str(output))
    typer.echo(f"{output} is for {look.count} structures; go on with")
    typer.echo(f"  mlip-md check {output}")
    typer.echo(f"  mlip-md train {output}")


def _epochs_in(hours: float, recipe: Recipe) -> int:
    """How many epochs of a recipe take so many hours here."""
    from mlip_md.trainer.costs import judge_costs
    from mlip_md.trainer.data import load_data
    from mlip_md.trainer.train import Trainer

    typer.echo("compiling the network and timing some steps")
    with _plain_warnings():
        costs = judge_costs(Trainer(recipe, load_data(recipe), Path("runs") / recipe.name))
    epochs = costs.epochs_in(hours)
    for line in dataclasses.replace(costs, epochs=epochs).lines():
        typer.echo(line)
    return epochs


def statistics_lines(statistics: Statistics) -> list[str]:
    """What a user should look at in the statistics of a training set, in words."""
    from mlip_md.elements import symbol

    pairs = zip(statistics.elements, statistics.atomic_energies, strict=True)
    energies = ", ".join(f"{symbol(z)} {energy:.4f}" for z, energy in pairs)
    shortest = statistics.avg_r_min
    return [
        f"E0 ({statistics.atomic_energies_source}), eV: {energies}",
        f"neighbors per atom {statistics.avg_num_neighbors:.2f}, shortest distance "
        f"{math.nan if shortest is None else shortest:.3f} Å on average, forces "
        f"{statistics.forces_rms:.3f} eV/Å (root mean square)",
    ]


def prepare_command(
    recipe: Annotated[str, typer.Argument(help="Recipe: a YAML file or a shipped name.")],
    folder: Annotated[Path, typer.Argument(help="New folder; name it as data.path afterwards.")],
    overrides: Overrides = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; the folder is the same. Default: cores.")
    ] = None,
    strict: Strict = False,
) -> None:
    """Read, curate and split the data of a recipe once, into a folder that many runs can use.

    After a kill or Ctrl-C the same command goes on with what lies in FOLDER.partial.
    """
    from mlip_md.trainer.data import describe_reading, prepare, usable_cores, warn_of_energies
    from mlip_md.trainer.recipe import load_recipe

    prepared = load_recipe(recipe, overrides or [])[0]
    check_new_folder(folder, "prepare")
    _say_reading(prepared.data.path)
    listing = _listing_rejected(folder.parent / REJECTED)
    with _answering(), listing as bad, _plain_warnings(strict):
        data = prepare(
            prepared.data, prepared.network.atomic_energies, folder,
            workers=workers or usable_cores(), tell=_tell_structures(),
        )  # fmt: skip
        warn_of_energies(data)
        bad += data.rejected
    for line in (*describe_reading(data), *statistics_lines(data.statistics)):
        typer.echo(line)
    counts = ", ".join(f"{len(store)} {name}" for name, store in data.parts.items())
    typer.echo(f"{folder}: {counts}; train with --set data.path={folder}")


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Potential: bundled name, file or run folder.")],
    data: Annotated[
        Path, typer.Argument(help="Labeled structures: HDF5, extended XYZ, or a prepared folder.")
    ],
    head: Annotated[str | None, typer.Option(metavar="NAME", help=HEAD_HELP)] = None,
    split: Annotated[
        str | None, typer.Option(help="Only structures that the file marks so, e.g. test.")
    ] = None,
    on_bad: Annotated[
        Literal["error", "skip"],
        typer.Option(help="Structures without usable labels, or of unknown elements."),
    ] = "error",
    energy_key: Annotated[
        str | None, typer.Option(help="Extended XYZ: name of the energy; default: usual ones.")
    ] = None,
    forces_key: Annotated[
        str | None, typer.Option(help="Extended XYZ: name of the forces, likewise.")
    ] = None,
    stress_key: Annotated[
        str | None, typer.Option(help="Extended XYZ: name of the stress, likewise.")
    ] = None,
    virial_key: Annotated[
        str | None, typer.Option(help="Extended XYZ: name of the virial, likewise.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Structures per batch.")] = 16,
    worst: Annotated[
        int, typer.Option(min=0, metavar="N", help="Structures with the largest errors to name.")
    ] = 5,
    output: Annotated[
        Path | None, typer.Option(help="Also write the errors as JSON to this file.")
    ] = None,
    extxyz: Annotated[
        Path | None,
        typer.Option(help="Also write the structures, predictions beside labels, to this file."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw predictions against labels to this PNG.")
    ] = None,
) -> None:
    """Errors of a potential on a data set: whole, by subset, by element, the worst structures."""
    import mlip_md
    from mlip_md.trainer.data import LabelKeys
    from mlip_md.trainer.evaluation import evaluate, read_graphs

    for path, option in ((output, "--output"), (extxyz, "--extxyz"), (plot, "--plot")):
        if path is not None:
            check_new_file(path, option)
    potential = mlip_md.load(model, head)
    with _plain_warnings():
        store, left_out = read_graphs(
            data,
            potential,
            split=split,
            on_bad=on_bad,
            keys=LabelKeys(energy_key, forces_key, stress_key, virial_key),
        )
    if left_out:
        typer.echo(f"{left_out} structures of other elements were left out", err=True)
    result = evaluate(potential, store, batch_size)
    tables = error_table(result), element_table(result), worst_table(result, worst)
    Console().print(*(table for table in tables if table.row_count))
    _write_evaluation(result, worst, output, extxyz, plot)


def _write_evaluation(
    result: Evaluation, worst: int, output: Path | None, extxyz: Path | None, plot: Path | None
) -> None:
    from mlip_md.trainer.evaluation import write_errors, write_predictions
    from mlip_md.trainer.report import draw_parity

    if output is not None:
        write_errors(result, output, worst)
    if extxyz is not None:
        write_predictions(result, extxyz)
    if plot is not None:
        draw_parity(result, plot, f"{len(result.energies)} structures")


def error_table(result: Evaluation) -> Table:
    """Errors as a table, one row per subset if there are several, in meV/atom and meV/Å."""
    table = Table("subset", "structures", "E MAE", "E RMSE", "F MAE", "F RMSE")
    table.caption = "energies in meV/atom, forces in meV/Å (per component)"
    columns = ["energy_mae_per_atom", "energy_rmse_per_atom", "forces_mae", "forces_rmse"]
    if "stress_rmse" in result.overall:
        table.add_column("S MAE")
        table.add_column("S RMSE")
        table.caption += ", stress in meV/Å³ (per component)"
        columns += ["stress_mae", "stress_rmse"]
    subsets = result.by_subset if len(result.by_subset) > 1 else {}
    for name, errors in {**subsets, "all": result.overall}.items():
        count = str(int(errors.get("structures", len(result.energies))))
        table.add_row(name, count, *_in_milli(errors, columns))
    return table


def element_table(result: Evaluation) -> Table:
    """Force errors by element, in meV/Å; no row where there is only one, or no label of forces."""
    table = Table("element", "atoms", "F MAE", "F RMSE")
    elements = result.by_element if len(result.by_element) > 1 else {}
    for name, errors in elements.items():
        columns = ["forces_mae", "forces_rmse"]
        table.add_row(name, str(int(errors["atoms"])), *_in_milli(errors, columns))
    return table


def worst_table(result: Evaluation, count: int) -> Table:
    """The structures with the largest errors, in meV/atom, meV/Å and meV/Å³."""
    table = Table("largest errors", "|ΔE|/atom", "F RMSE")
    columns = ["energy_mae_per_atom", "forces_rmse"]
    if "stress_rmse" in result.overall:
        table.add_column("S RMSE")
        columns.append("stress_rmse")
    for row in result.worst(count):
        table.add_row(row["name"], *_in_milli(row, columns))
    return table


def _in_milli(errors: Mapping[str, float], columns: list[str]) -> list[str]:
    values = (1000 * errors.get(column, math.nan) for column in columns)
    return ["-" if math.isnan(value) else f"{value:.3f}" for value in values]


def parse_duration(text: str | None) -> float:
    """Seconds of ``HH:MM``; infinity for None.

    Raises:
        ConfigError: if the text is no duration.
    """
    if text is None:
        return float("inf")
    hours, colon, minutes = text.partition(":")
    if not colon or not hours.isdigit() or not minutes.isdigit() or int(minutes) > 59:
        raise ConfigError(f"--max-time {text}: write it as HH:MM, such as 23:30")
    return 3600.0 * int(hours) + 60.0 * int(minutes)
