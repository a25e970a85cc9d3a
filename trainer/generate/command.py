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
    share: Annotated[
        list[str] | None,
        typer.Option(help='Factor on one subset, as "Dissociation=0.5"; may be repeated.'),
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Continue an interrupted run; --no-resume starts afresh.")
    ] = True,
) -> None:
    """Make our own labeled data set: SMILES, GFN2-xTB dynamics, labels, one HDF5 file."""
    import json
    import logging

    from rich.console import Console
    from rich.table import Table

    from mlip_md.constants import HARTREE
    from mlip_md.elements import symbol
    from mlip_md.trainer.generate.make_dataset import make_dataset
    from mlip_md.trainer.generate.spice_file import SUBSET_COLUMNS, count_subsets, read_attributes

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    path = make_dataset(
        output,
        seed=seed,
        method=method,
        workers=workers,
        scale=scale,
        subsets=subset,
        max_atoms=max_atoms,
        shares=parse_shares(share or []),
        resume=resume,
    )
    table = Table("subset", *SUBSET_COLUMNS, title=str(path))
    for name, row in count_subsets(path).items():
        numbers = [f"{row[c]:.2f}" if c.endswith("force") else str(row[c]) for c in SUBSET_COLUMNS]
        table.add_row(name, *numbers)
    energies = json.loads(str(read_attributes(path)["atomic_energies_hartree"]))
    by_symbol = ", ".join(f"{symbol(int(z))}: {e * HARTREE:.7f}" for z, e in energies.items())
    console = Console()
    # a file or pipe has no width of its own: let no column be cut there
    (console if console.is_terminal else Console(width=160)).print(table)
    typer.echo(f"for a recipe, in eV: atomic_energies: {{{by_symbol}}}")


def parse_shares(texts: list[str]) -> dict[str, float]:
    """Factors by subset out of texts such as "Dissociation=0.5".

    Raises:
        ConfigError: one has another form.
    """
    from mlip_md.errors import ConfigError

    shares = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            shares[name] = float(number)
        except ValueError:
            raise ConfigError(
                f"--share {text!r} is not a subset and a number, such as Dissociation=0.5"
            ) from None
    return shares
