"""What a training takes: memory by the compiler's account, time by the clock."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from typing import Any

import jax

from mlip_md.devices import check_memory, device_memory, device_name, find_device
from mlip_md.errors import NonFiniteError
from mlip_md.trainer.data import iterate_batches, plan_epoch
from mlip_md.trainer.loss import weights_at
from mlip_md.trainer.train import Trainer

TIMED = 10
"""Steps that are timed for a judgement."""
ENOUGH = 20.0
"""Seconds after which no further step is."""


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a run takes on the device at hand.

    Attributes:
        needed: bytes of a step: weights, their moments and averages, a batch, and working memory.
        available: bytes on the device; None where nothing tells.
        flops: arithmetic of a step by the compiler's count; NaN if it counts none.
        steps: of an epoch.
        seconds_per_step: measured.
        validation_seconds: of a validation, from its first batches.
        compile_seconds: before the first step and the first validation.
        epochs: of the recipe.
    """

    needed: float
    available: int | None
    flops: float
    steps: int
    seconds_per_step: float
    validation_seconds: float
    compile_seconds: float
    epochs: int

    @property
    def epoch_seconds(self) -> float:
        """Of an epoch with its validation."""
        return self.steps * self.seconds_per_step + self.validation_seconds

    def hours(self) -> float:
        """From the start of the training to its end."""
        whole = self.compile_seconds + self.validation_seconds + self.epochs * self.epoch_seconds
        return whole / 3600

    def epochs_in(self, hours: float) -> int:
        """How many epochs a training of so many hours has, at least 1."""
        left = 3600 * hours - self.compile_seconds - self.validation_seconds
        return max(1, math.floor(left / self.epoch_seconds))

    def lines(self) -> list[str]:
        """The same in words."""
        there = "" if self.available is None else f" of {self.available / 1e9:.3g} GB available"
        work = "" if math.isnan(self.flops) else f"; arithmetic: {self.flops / 1e9:.3g} Gflop"
        return [
            f"memory: a step needs {self.needed / 1e9:.3g} GB{there}{work}",
            f"time: {self.steps} steps per epoch, {self.seconds_per_step:.3g} s per step, "
            f"{self.validation_seconds:.3g} s per validation; {self.epochs} epochs take "
            f"{self.hours():.3g} hours on {device_name(find_device(None))}",
        ]


def judge_costs(trainer: Trainer) -> Costs:
    """Compile a step of a run, compare its memory with the device's, and time some steps.

    Args:
        trainer: of the run, not to be run afterwards; nothing is written.

    Raises:
        CapacityError: if a step needs more memory than is there.
        NonFiniteError: if a loss is NaN or infinite.
    """
    begun = time.monotonic()
    with trainer.computing():
        compiled = _compile(trainer)
        plan, counts = compiled.memory_analysis(), compiled.cost_analysis() or {}
        # what a step gives back lies where its input was
        needed = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        memory = device_memory(trainer.device)
        check_memory(trainer.load, trainer.device, int(needed))
        compiling = time.monotonic() - begun
        trainer.train_step = compiled
        times = time_steps(trainer, TIMED, ENOUGH)
        evaluating, validating = _time_validation(trainer)
    return Costs(
        needed=float(needed),
        available=None if memory is None else memory.free,
        flops=float(counts.get("flops", math.nan)),
        steps=len(trainer.data.plan(trainer.recipe.seed, 1)),
        seconds_per_step=times["seconds_per_step"],
        validation_seconds=validating,
        compile_seconds=compiling + evaluating,
        epochs=trainer.recipe.train.epochs,
    )


def _compile(trainer: Trainer) -> Any:
    """The program of a training step, with its account."""
    weights = weights_at(trainer.recipe.loss, 1)
    _, batch = next(trainer.batches(1))
    return trainer.train_step.lower(trainer.state, batch, weights).compile()


def _time_validation(trainer: Trainer) -> tuple[float, float]:
    """Seconds to compile a validation, and those that it takes, from some of its batches."""
    data, dtype = trainer.data, trainer.recipe.train.precision
    store = data.validation
    plan = plan_epoch(store, data.budget, 0, 0, shuffle=False, on_oversize=data.on_oversize)
    some = [plan[0], *plan[:TIMED]]  # the first one compiles
    times = [time.monotonic()]
    for _, batch in iterate_batches(store, some, data.budget, dtype=dtype):
        jax.block_until_ready(trainer.eval_step(trainer.state.params, batch)[1])
        times.append(time.monotonic())
    return times[1] - times[0], (times[-1] - times[1]) * len(plan) / (len(some) - 1)


def time_steps(trainer: Trainer, steps: int, enough: float = math.inf) -> dict[str, float]:
    """Time some steps of a run without writing anything; its weights are used up.

    Args:
        trainer: of the run, not to be run afterwards.
        steps: steps to time after the first one, which compiles; at least 1.
        enough: seconds after which the step at hand is the last.

    Returns:
        compile_seconds, seconds_per_step, structures_per_second.

    Raises:
        CapacityError: if a step does not fit into the device's memory.
        NonFiniteError: if a loss is NaN or infinite.
    """
    data, weights = trainer.data, weights_at(trainer.recipe.loss, 1)
    times, structures = [time.monotonic()], []
    batches = itertools.chain.from_iterable(map(trainer.batches, itertools.count(1)))
    for indices, batch in itertools.islice(batches, steps + 1):
        with trainer.computing():
            log = trainer.step(batch, weights)
        if not math.isfinite(float(log.loss)):
            raise NonFiniteError(f"the loss is not finite for {data.names(indices)}")
        times.append(time.monotonic())
        structures.append(len(indices))
        if len(times) > 2 and times[-1] - times[0] > enough:
            break
    seconds = times[-1] - times[1]
    return {
        "compile_seconds": times[1] - times[0],
        "seconds_per_step": seconds / (len(times) - 2),
        "structures_per_second": sum(structures[1:]) / seconds,
    }
