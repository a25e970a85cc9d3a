"""Where a run stands, what it was made with, and what of that may change when it continues.

A run continues with the recipe that it began with, but for the rows of ``FREE``, and on demand
those of ``CHANGEABLE``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlip_md.errors import CheckpointError, DataError
from mlip_md.trainer.data import BatchBudget, TrainingData
from mlip_md.trainer.recipe import Recipe, find_differences

FREE = (
    "name",
    "description",
    "data.",
    "train.epochs",
    "train.patience",
    "checkpoint.",
    "faults.",
    "log.",
)
"""Rows of a recipe that may differ when a run continues. What comes out of the rows on data, the
graphs and batches, may not: ``TrainingData.fingerprint`` holds them."""

CHANGEABLE = (
    "optimizer.init_learning_rate",
    "optimizer.peak_learning_rate",
    "optimizer.final_learning_rate",
    "optimizer.warmup_steps",
    "optimizer.schedule",
    "optimizer.warmup_epochs",
    "optimizer.transition_steps",
    "optimizer.transition_epochs",
    "optimizer.plateau_epochs",
    "optimizer.plateau_factor",
    "optimizer.weight_decay",
    "optimizer.grad_norm",
)
"""Rows that may also differ if changes are allowed; the saved state means the same with others."""

DATA_SET = "the structures, labels or batches"
"""What differs if ``TrainingData.fingerprint`` does."""


@dataclasses.dataclass
class TrainingProgress:
    """Where a run stands; saved with every checkpoint.

    Attributes:
        epoch: the epoch being trained, counted from 1.
        batch: its batches that are done.
        step: batches done in all epochs.
        validated: last epoch that was validated; -1 before the evaluation of the start.
        best: per stage (as text, from "1"): epoch, score and errors of its best model.
        sums: over the present epoch: loss, gradient_norm, good (steps), structures, seconds.
        rate: factor on the learning rate, of a "plateau" and of rollbacks.
        lowered: epoch after which a "plateau" was lowered last.
        stopped: whether the training ended early.
        rollbacks: how often it went back to a checkpoint.
    """

    epoch: int = 1
    batch: int = 0
    step: int = 0
    validated: int = -1
    best: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    rate: float = 1.0
    lowered: int = 0
    stopped: bool = False
    rollbacks: int = 0

    def add(self, **values: float) -> None:
        """Add to the sums of the present epoch."""
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def last_best(self) -> dict[str, Any]:
        """Epoch, score and errors of the best model of the latest stage; empty without one."""
        return self.best[max(self.best, key=int)] if self.best else {}


def identify(recipe: Recipe, data: TrainingData) -> dict[str, Any]:
    """What a run is made with, as JSON gives it back: the recipe and the data's fingerprint."""
    values: dict[str, Any] = json.loads(json.dumps(recipe.plain()))
    return {**values, DATA_SET: data.fingerprint}


def with_defaults(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity of an earlier version, with the rows that it did not know.

    Args:
        identity: see ``identify``; its values stay.
    """
    defaults: dict[str, Any] = {**Recipe().model_dump(mode="json"), "model": {}}
    return dict(identity) | {
        name: {**rows, **identity[name]}
        for name, rows in defaults.items()
        if isinstance(rows, dict) and name in identity
    }


def keep_shape(data: TrainingData, recipe: Recipe, folder: Path) -> TrainingData:
    """The data in batches of the shape that a run began with, if its recipe leaves that open.

    Versions measure it by different rules; a run keeps its own.

    Args:
        data: of the run.
        recipe: of the run.
        folder: of the run, with ``data.json`` if it has begun.
    """
    rows = recipe.data
    if rows.max_n_node is not None and rows.max_n_edge is not None:
        return data
    try:
        known = json.loads((folder / "data.json").read_text(encoding="utf-8"))
        budget = BatchBudget(**known["batch"])
    except (OSError, ValueError, KeyError, TypeError, DataError):
        return data
    fits = budget.fits(data.train).all() and budget.n_graph == data.budget.n_graph
    return dataclasses.replace(data, budget=budget) if fits else data


def check_same(
    before: Mapping[str, Any], now: Mapping[str, Any], folder: Path, allow_changes: bool
) -> None:
    """Refuse to continue a run with what does not fit its saved state.

    Args:
        before: identity of the run, see ``identify``.
        now: identity of what should continue it.
        folder: of the run, for the message.
        allow_changes: whether rows of ``CHANGEABLE`` may differ.

    Raises:
        CheckpointError: if others differ; it names them.
    """
    changes = find_differences(with_defaults(before), now)
    allowed = FREE + (CHANGEABLE if allow_changes else ())
    refused = [name for name in changes if not name.startswith(allowed)]
    if not refused:
        return
    advice = "choose another folder"
    if set(refused) <= set(CHANGEABLE):
        advice += ", or go on with --resume allow-changes"
    if DATA_SET in refused:  # better named by the rows that made the difference
        rows = [name for name in changes if name.startswith("data.")]
        refused = [name for name in refused if name != DATA_SET] + (rows or [DATA_SET])
    raise CheckpointError(
        f"the checkpoints in {folder} were made with another recipe or data set "
        f"(differing: {', '.join(refused)}); {advice}"
    )
