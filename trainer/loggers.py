"""Where else the row of an epoch goes: TensorBoard and Weights & Biases, both extras."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from mlip_md.errors import ConfigError
from mlip_md.trainer.recipe import Recipe

Logger = Callable[[Mapping[str, float]], None]
"""Takes the row of an epoch, as it stands in ``metrics.csv``."""


@contextlib.contextmanager
def open_loggers(recipe: Recipe, folder: Path, step: int) -> Iterator[list[Logger]]:
    """What the section ``log`` of a recipe asks for; what they were given is kept at the end.

    Args:
        recipe: of the run.
        folder: of the run.
        step: batches done; what was recorded after them is dropped.

    Raises:
        ConfigError: if a package is not installed.
    """
    with contextlib.ExitStack() as stack:
        loggers: list[Logger] = []
        if recipe.log.tensorboard:
            loggers.append(_tensorboard(folder, step, stack))
        if recipe.log.wandb is not None:
            loggers.append(_wandb(recipe, folder, stack))
        yield loggers


def _needed(package: str, row: str, extra: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(
            f"{row} needs {package}, which is not installed; pip install 'mlip-md[{extra}]', or "
            "take the row out"
        ) from error


def _tensorboard(folder: Path, step: int, stack: contextlib.ExitStack) -> Logger:
    module = _needed("tensorboardX", "log.tensorboard", "tensorboard")
    writer = module.SummaryWriter(
        logdir=str(folder / "tensorboard"), purge_step=step + 1, flush_secs=10
    )
    stack.callback(writer.close)

    def log(row: Mapping[str, float]) -> None:
        for name, value in _numbers(row).items():
            writer.add_scalar(name, value, global_step=int(row["step"]))

    return log


def _wandb(recipe: Recipe, folder: Path, stack: contextlib.ExitStack) -> Logger:
    """One run of theirs for one folder, however often it is resumed."""
    module = _needed("wandb", "log.wandb", "wandb")
    run = module.init(
        project=recipe.log.wandb,
        name=recipe.name,
        id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(folder),
        config=recipe.plain(),
    )
    stack.callback(run.finish)

    def log(row: Mapping[str, float]) -> None:
        run.log(_numbers(row), step=int(row["step"]))

    return log


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(v) for name, v in row.items() if math.isfinite(float(v))}
