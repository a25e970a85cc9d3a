"""What a step of a training takes: by the clock, and by the compiler's account."""

from __future__ import annotations

import math
import time

from mlip_md.errors import ConfigError, NonFiniteError
from mlip_md.trainer.data import iterate_batches
from mlip_md.trainer.loss import weights_at
from mlip_md.trainer.train import Trainer


def time_steps(trainer: Trainer, steps: int) -> dict[str, float]:
    """Time some steps of a run without writing anything; its weights are used up.

    Args:
        trainer: of the run, not to be run afterwards.
        steps: steps to time after the first one, which compiles.

    Returns:
        compile_seconds, seconds_per_step, structures_per_second.

    Raises:
        ConfigError: if there are less than two batches.
        CapacityError: if a step does not fit into the device's memory.
        NonFiniteError: if a loss is NaN or infinite.
    """
    data, weights = trainer.data, weights_at(trainer.recipe.loss, 1)
    plan = data.plan(trainer.recipe.seed, 1)[: steps + 1]
    times, structures = [time.monotonic()], []
    for indices, batch in iterate_batches(data.train, plan, data.budget):
        log = trainer.step(batch, weights)
        if not math.isfinite(float(log.loss)):
            raise NonFiniteError(f"the loss is not finite for {data.names(indices)}")
        times.append(time.monotonic())
        structures.append(len(indices))
    if len(times) < 3:
        raise ConfigError("a dry run needs at least two batches; reduce data.batch_size")
    seconds = times[-1] - times[1]
    return {
        "compile_seconds": times[1] - times[0],
        "seconds_per_step": seconds / (len(times) - 2),
        "structures_per_second": sum(structures[1:]) / seconds,
    }


def count_costs(trainer: Trainer) -> dict[str, float]:
    """What a step of a run takes by the compiler's account, without running one.

    Returns:
        state_bytes and working_bytes on the device; flops, if the compiler counts them.
    """
    weights = weights_at(trainer.recipe.loss, 1)
    lowered = trainer.train_step.lower(trainer.state, trainer.data.example(), weights)
    compiled = lowered.compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "state_bytes": float(memory.argument_size_in_bytes),
        "working_bytes": float(memory.temp_size_in_bytes),
        "flops": float(costs.get("flops", math.nan)),
    }
