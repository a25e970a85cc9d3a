"""The commands ``train`` and ``evaluate``; heavy imports happen inside them."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from mlip_md.errors import ConfigError

if TYPE_CHECKING:
    from mlip_md.trainer.evaluate import Evaluation

EXIT_SAVED, EXIT_KEYBOARD = 75, 130
"""75 (EX_TEMPFAIL): interrupted, the state is saved, start again with the same command."""


class ResumeOption(enum.StrEnum):
    """Whether a run continues from the checkpoints in its folder."""

    auto = "auto"
    never = "never"
    must = "must"


def train_command(
    recipe: Annotated[
        str,
        typer.Argument(
            help="Recipe: a YAML file, or mace-spice2, nequip-spice2, organics-gfn2.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a value of the recipe."),
    ] = None,
    run: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME.")] = None,
    resume: Annotated[
        ResumeOption, typer.Option(help="Continue from the folder's checkpoints.")
    ] = ResumeOption.auto,
    dry_run: Annotated[
        int, typer.Option(min=0, metavar="N", help="Time N steps and write nothing.")
    ] = 0,
    max_time: Annotated[
        str | None, typer.Option(metavar="HH:MM", help="Save and stop (exit code 75) after this.")
    ] = None,
) -> None:
    """Train a potential from a recipe.

    Exit codes: 0 done, 2 recipe, 3 data, 4 diverged (NaN), 5 storage, 75 interrupted or out of
    time with the state saved, 130 Ctrl-C with the state saved.
    """
    status = _train(recipe, overrides or [], run, resume.value, dry_run, max_time)
    raise typer.Exit({"done": 0, "keyboard": EXIT_KEYBOARD}.get(status, EXIT_SAVED))


def _train(
    recipe_name: str,
    overrides: list[str],
    folder: Path | None,
    resume: str,
    dry_run: int,
    max_time: str | None,
) -> str:
    from mlip_md.trainer.config import load_recipe

    console = Console()
    seconds = parse_duration(max_time)
    recipe, origins = load_recipe(recipe_name, overrides)
    from mlip_md.trainer.dataset import load_data
    from mlip_md.trainer.train import Trainer

    folder = folder or Path("runs") / recipe.name
    data = load_data(recipe)
    trainer = Trainer(recipe, data, folder, origins=origins, echo=console.out)
    if dry_run:
        console.out(data.summary())
        for name, value in trainer.dry_run(dry_run).items():
            console.out(f"{name}: {value:.4g}")
        return "done"
    return trainer.run(resume, seconds).status  # type: ignore[arg-type] # a ResumeOption's value


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Potential: bundled name, file or run folder.")],
    data: Annotated[Path, typer.Argument(help="Labelled structures: HDF5 or extended XYZ.")],
    split: Annotated[
        str | None, typer.Option(help="Only structures that the file marks so, e.g. test.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Structures per batch.")] = 16,
    output: Annotated[
        Path | None, typer.Option(help="Also write the errors as JSON to this file.")
    ] = None,
) -> None:
    """Errors of a potential on a data set, whole and by subset."""
    import mlip_md
    from mlip_md.trainer.data import read
    from mlip_md.trainer.evaluate import evaluate, write_json

    result = evaluate(mlip_md.load(model), read(data, split=split), batch_size)
    if output is not None:
        write_json(result, output)
    Console().print(error_table(result))


def error_table(result: Evaluation) -> Table:
    """Errors as a table, one row per subset, in meV/atom and meV/Å."""
    table = Table("subset", "structures", "E MAE", "E RMSE", "F MAE", "F RMSE")
    table.caption = "energies in meV/atom, forces in meV/Å (per component)"
    columns = ("energy_mae_per_atom", "energy_rmse_per_atom", "forces_mae", "forces_rmse")
    for name, errors in {**result.by_subset, "all": result.overall}.items():
        count = str(int(errors.get("structures", len(result.energies))))
        table.add_row(name, count, *(f"{1000 * errors[column]:.3f}" for column in columns))
    return table


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
