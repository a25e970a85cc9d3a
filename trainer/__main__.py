"""``python -m mlip_md.trainer RECIPE …``: the same as ``mlip-md train RECIPE …``."""

import typer

from mlip_md.trainer.cli import train_command

if __name__ == "__main__":
    typer.run(train_command)
