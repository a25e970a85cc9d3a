"""AMSGrad with clipping, masked L2 decay, a warm-up schedule, accumulation; and the EMA of weights.

Order of the chain: L2 decay is added to the gradient (masked), the sum is clipped to a global norm,
then AMSGrad (S. J. Reddi et al., ICLR 2018; maximum over bias-corrected second moments, as in
optax) and the learning rate. The learning-rate schedule counts micro-steps, also under gradient
accumulation: warmup_steps and transition_steps are batches seen, not updates made.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from mlip_md.potential import Params
from mlip_md.trainer.recipe import OptimizerConfig

Decays = Callable[[str], bool]
"""Whether weight decay acts on the weight of a path: ``decays`` of a network's configuration."""


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by micro-step: linear from init to peak, then to final, then constant."""
    warmup = optax.linear_schedule(
        config.init_learning_rate, config.peak_learning_rate, config.warmup_steps
    )
    transition = optax.linear_schedule(
        config.peak_learning_rate, config.final_learning_rate, config.transition_steps
    )
    return optax.join_schedules([warmup, transition], [config.warmup_steps])


def decay_mask(params: Params, decays: Decays) -> Params:
    """Which weights decay: a tree of bools."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: decays(jax.tree_util.keystr(path)), params
    )


def make_optimizer(config: OptimizerConfig, decays: Decays) -> optax.GradientTransformation:
    """The optimizer of a recipe; its updates are zero until an accumulation is complete."""
    chain = optax.chain(
        optax.add_decayed_weights(config.weight_decay, mask=lambda p: decay_mask(p, decays)),
        optax.clip_by_global_norm(config.grad_norm),
        optax.scale_by_amsgrad(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0),
    )
    every = config.num_gradient_accumulation_steps
    if every > 1:
        chain = optax.MultiSteps(chain, every_k_schedule=every).gradient_transformation()
    return optax.chain(chain, optax.scale_by_learning_rate(learning_rate_schedule(config)))


def update_ema(ema: Params, params: Params, decay: float) -> Params:
    """One step of the running average: ema <- d·ema + (1 - d)·params; it starts at zero.

    ``optax.incremental_update`` has the terms in the other order; compiled, that rounds otherwise.
    """
    return jax.tree_util.tree_map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)


def debiased_ema(ema: Params, updates: jax.Array | int, decay: float) -> Params:
    """The average without the pull of its zero start: ema / (1 - d^n) after n >= 1 updates."""
    correction = 1.0 - jnp.asarray(decay, jnp.float32) ** updates
    return jax.tree_util.tree_map(lambda e: e / correction, ema)
