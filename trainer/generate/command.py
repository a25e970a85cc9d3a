"""The command `mlip-md make-dataset`."""

from pathlib import Path
from typing import Annotated, Literal

import typer


def make_dataset_command(
    output: Annotated[Path, typer.Argument(help="HDF5 file to write (layout of SPICE 2).")] = Path(
        "organics-gfn2.h5"
    ),
    seed: Annotated[int, typer.Option(help="Decides molecules, geometries and splits.")] = 0,
    method: Annotated[
        Literal["gfn2", "wb97m-d3bj"],
        typer.Option(
            help="gfn2 (half an hour; extra data) or wb97m-d3bj (weeks; extras data, wb97m)."
        ),
    ] = "gfn2",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread each. Default: all cores.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on the size of the data set.")] = 1.0,
    subset: Annotated[
        list[str] | None, typer.Option(help="Make only this subset; may be repeated.")
    ] = None,
    max_atoms: Annotated[
        int | None, typer.Option(min=1, help="Leave out structures with more atoms.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted run; --no-resume starts afresh.")
    ] = True,
) -> None:
    """Make our own labeled data set: SMILES, GFN2-xTB dynamics, labels, one HDF5 file."""
    import logging

    from rich.console import Console
    from rich.table import Table

    from mlip_md.trainer.generate.make_dataset import make_dataset
    from mlip_md.trainer.generate.spice_file import SUBSET_COLUMNS, count_subsets

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = make_dataset(
        output,
        seed=seed,
        method=method,
        workers=workers,
        scale=scale,
        subsets=subset,
        max_atoms=max_atoms,
        resume=resume,
    )
    table = Table("subset", *SUBSET_COLUMNS, title=str(path))
    for name, row in count_subsets(path).items():
        numbers = [f"{row[c]:.2f}" if c.endswith("force") else str(row[c]) for c in SUBSET_COLUMNS]
        table.add_row(name, *numbers)
    console = Console()
    # a file or pipe has no width of its own: let no column be cut there
    (console if console.is_terminal else Console(width=160)).print(table)
