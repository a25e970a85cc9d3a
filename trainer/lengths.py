"""Rows of a recipe that a training of some length never comes to."""

from __future__ import annotations

from mlip_md.errors import ConfigError
from mlip_md.trainer.loss import stage_at
from mlip_md.trainer.optimizer import learning_rate_schedule, settle_steps
from mlip_md.trainer.recipe import Recipe

REACHED = 0.9
"""Part of the way to the final learning rate that counts as all of it: steps may be estimates."""


def find_unreached(recipe: Recipe, steps_per_epoch: int) -> list[str]:
    """Values that would never act, a sentence each; a shortened trial may mean that.

    Args:
        recipe: of the training.
        steps_per_epoch: batches of an epoch.

    Raises:
        ConfigError: if the training is too short for a single update of the weights.
    """
    epochs = recipe.train.epochs
    steps, every = epochs * steps_per_epoch, recipe.optimizer.num_gradient_accumulation_steps
    length = f"{epochs} epochs of {steps_per_epoch} steps"
    if every > steps:
        raise ConfigError(
            f"optimizer.num_gradient_accumulation_steps: {every} is more than the whole training "
            f"has ({length}): no weight would ever change; lower it"
        )
    found = []
    for name in ("energy", "forces", "stress"):
        late = [s for s in getattr(recipe.loss, name).weight if s.from_epoch > epochs]
        found += [
            f"loss.{name}.weight: {step.value:g} from epoch {step.from_epoch} on is never reached; "
            f"train.epochs is {epochs}"
            for step in late
        ]
    return found + _judge_rates(recipe, steps_per_epoch, length) + _judge_waits(recipe, steps)


def _judge_rates(recipe: Recipe, steps_per_epoch: int, length: str) -> list[str]:
    epochs = recipe.train.epochs
    settled = settle_steps(recipe.optimizer, steps_per_epoch, epochs)
    init, peak, final = (
        getattr(settled, f"{name}_learning_rate") for name in ("init", "peak", "final")
    )
    last = float(learning_rate_schedule(settled)(epochs * steps_per_epoch))
    if settled.warmup_steps > epochs * steps_per_epoch and init != peak:
        return [
            f"optimizer: the warm-up takes {settled.warmup_steps} steps, the whole training has "
            f"{length}: the learning rate rises to {last:.3g}, never to its peak; shorten the "
            "warm-up"
        ]
    falls = settled.schedule != "plateau" and peak > final
    if falls and last - final > (1 - REACHED) * (peak - final):
        return [
            f"optimizer: after {length} the learning rate is {last:.3g}, not final_learning_rate: "
            f"{final:.3g}; transition_steps: to the end brings it there"
        ]
    return []


def _judge_waits(recipe: Recipe, steps: int) -> list[str]:
    """What waits for more epochs or steps than there are."""
    settings, epochs = recipe.train, recipe.train.epochs
    stages = [stage_at(recipe.loss, epoch) for epoch in range(1, epochs + 1)]
    left, found = stages.count(stages[-1]) - 1, []
    if settings.patience is not None and settings.patience > left:
        found.append(
            f"train.patience: {settings.patience} never ends this training early; its last stage "
            f"of loss weights has {left} epochs after its first"
        )
    if recipe.optimizer.schedule == "plateau" and recipe.optimizer.plateau_epochs >= epochs:
        found.append(
            f"optimizer.plateau_epochs: {recipe.optimizer.plateau_epochs} never lowers the "
            f"learning rate in {epochs} epochs"
        )
    updates = steps // recipe.optimizer.num_gradient_accumulation_steps
    if settings.ema_decay and 1 / (1 - settings.ema_decay) > updates:
        found.append(
            f"train.ema_decay: {settings.ema_decay:g} averages the weights of some "
            f"{1 / (1 - settings.ema_decay):.0f} updates, and there are {updates}: early weights "
            "count to the end; lower it"
        )
    return found
