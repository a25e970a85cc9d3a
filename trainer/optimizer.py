"""Optimizers with clipping, weight decay, schedules, accumulation, factors; the EMA of weights.

Order of the chain: L2 decay is added to the gradient (masked), the sum is clipped to a global norm,
then the rule of the optimizer, the learning rate, and the factors of parts. Schedules count
micro-steps, also under gradient accumulation: warmup_steps and transition_steps are batches seen,
not updates made. The rules are those of optax:

* amsgrad: S. J. Reddi et al., ICLR 2018; maximum over bias-corrected second moments.
* adam: D. P. Kingma and J. Ba, ICLR 2015. adamw: with decay decoupled from the gradient
  (I. Loshchilov and F. Hutter, ICLR 2019).
* muon: K. Jordan et al. (2024), orthogonalised momentum for matrices, AdamW for all other weights.
* schedule-free: A. Defazio et al., NeurIPS 2024, over Adam without momentum; what is validated and
  saved is its own average of the weights.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from mlip_md.errors import ConfigError
from mlip_md.potential import Params
from mlip_md.trainer.recipe import OptimizerConfig

Decays = Callable[[str], bool]
"""Whether weight decay acts on the weight of a path: ``decays`` of a network's configuration."""

DECOUPLED = ("adamw", "muon")
"""Kinds whose weight decay does not pass through the moments."""


def settle_steps(config: OptimizerConfig, steps_per_epoch: int, epochs: int) -> OptimizerConfig:
    """The same optimizer with the lengths of its schedule in steps.

    Args:
        config: with lengths in steps, in epochs or "to the end".
        steps_per_epoch: batches of an epoch.
        epochs: of the training.
    """
    warmup, transition = config.warmup_steps, config.transition_steps
    if config.warmup_epochs is not None:
        warmup = round(config.warmup_epochs * steps_per_epoch)
    if config.transition_epochs is not None:
        transition = max(1, round(config.transition_epochs * steps_per_epoch))
    elif isinstance(transition, str):
        transition = max(1, epochs * steps_per_epoch - warmup)
    lengths = {"warmup_steps": warmup, "transition_steps": transition}
    none = {"warmup_epochs": None, "transition_epochs": None}
    return config.model_copy(update={**lengths, **none})


def learning_rate_schedule(config: OptimizerConfig) -> optax.Schedule:
    """Learning rate by micro-step: linear from init to peak, then to final, then constant.

    Args:
        config: with lengths in steps, see ``settle_steps``.
    """
    peak, final, length = config.peak_learning_rate, config.final_learning_rate, _length(config)
    warmup = optax.linear_schedule(config.init_learning_rate, peak, config.warmup_steps)
    after: optax.Schedule
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, length, alpha=final / peak)
    elif config.schedule == "exponential":
        after = optax.exponential_decay(peak, length, final / peak, end_value=final)
    elif config.schedule == "plateau":
        after = optax.constant_schedule(peak)
    else:
        after = optax.linear_schedule(peak, final, length)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def _length(config: OptimizerConfig) -> int:
    if isinstance(config.transition_steps, str):
        raise ConfigError("the steps of an epoch are not known here; give transition_steps")
    return config.transition_steps


def decay_mask(params: Params, decays: Decays) -> Params:
    """Which weights decay: a tree of bools."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: decays(jax.tree_util.keystr(path)), params
    )


def learning_factors(params: Params, factors: Mapping[str, float]) -> Params:
    """The factor on the learning rate of every weight: a tree of numbers.

    Args:
        params: weights.
        factors: by pattern of their names, those of modules joined by "/"; the last that fits
            counts.

    Raises:
        ConfigError: if a pattern fits no weight, or all weights are frozen.
    """
    unused = set(factors)

    def factor(path: tuple[jax.tree_util.DictKey, ...], _: object) -> float:
        name, chosen = "/".join(str(key.key) for key in path), 1.0
        for pattern, value in factors.items():
            if fnmatch.fnmatchcase(name, pattern):
                unused.discard(pattern)
                chosen = value
        return chosen

    tree = jax.tree_util.tree_map_with_path(factor, params)
    if unused:
        names = ["/".join(str(k.key) for k in path) for path, _ in _leaves(params)]
        raise ConfigError(
            f"optimizer.factors: {', '.join(sorted(unused))} fits no weights; their names are, for "
            f"example, {', '.join(names[:: max(1, len(names) // 3)][:3])}"
        )
    if factors and not any(jax.tree_util.tree_leaves(tree)):
        raise ConfigError(
            "optimizer.factors freeze every weight, and nothing would be trained; leave one above 0"
        )
    return tree


def _leaves(params: Params) -> list[tuple[tuple[jax.tree_util.DictKey, ...], object]]:
    return jax.tree_util.tree_flatten_with_path(params)[0]


def make_optimizer(config: OptimizerConfig, decays: Decays) -> optax.GradientTransformation:
    """The optimizer of a recipe; its updates are zero until an accumulation is complete.

    Args:
        config: with lengths in steps, see ``settle_steps``.
        decays: what weight decay acts on.
    """
    decay = optax.add_decayed_weights(config.weight_decay, mask=lambda p: decay_mask(p, decays))
    clip, rule = optax.clip_by_global_norm(config.grad_norm), _rule(config)
    steps = [clip, rule, decay] if config.kind in DECOUPLED else [decay, clip, rule]
    if config.factors:
        steps.insert(0, _only_trained(config.factors))
    chain, every = optax.chain(*steps), config.num_gradient_accumulation_steps
    if every > 1:
        chain = optax.MultiSteps(chain, every_k_schedule=every).gradient_transformation()
    if config.kind != "schedule-free":
        chain = optax.chain(chain, optax.scale_by_learning_rate(learning_rate_schedule(config)))
    return optax.chain(chain, _scale_parts(config.factors)) if config.factors else chain


def _rule(config: OptimizerConfig) -> optax.GradientTransformation:
    """Gradients to directions, for "schedule-free" to updates."""
    if config.kind == "amsgrad":
        return optax.scale_by_amsgrad(b1=0.9, b2=0.999, eps=1e-8, eps_root=0.0)
    if config.kind == "muon":
        return optax.chain(optax.contrib.muon(learning_rate=1.0), optax.scale(-1.0))
    if config.kind == "schedule-free":
        rates = learning_rate_schedule(config)
        every = config.num_gradient_accumulation_steps

        def rate(count: jax.Array) -> jax.Array:
            return jnp.asarray(rates(count * every))

        adam = optax.chain(optax.scale_by_adam(b1=0.0), optax.scale_by_learning_rate(rate))
        free: optax.GradientTransformation = optax.contrib.schedule_free(adam, rate, b1=0.9)
        return free
    return optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8)


def _only_trained(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Frozen weights have no gradient, also for the norm that is clipped."""

    def frozen(params: Params) -> Params:
        return jax.tree_util.tree_map(lambda f: f == 0.0, learning_factors(params, factors))

    return optax.masked(optax.set_to_zero(), frozen)


def _scale_parts(factors: Mapping[str, float]) -> optax.GradientTransformation:
    def scale(updates: Params, _: Params | None) -> Params:
        return jax.tree_util.tree_map(jnp.multiply, updates, learning_factors(updates, factors))

    return optax.stateless(scale)


def update_ema(ema: Params, params: Params, decay: float) -> Params:
    """One step of the running average: ema <- d·ema + (1 - d)·params; it starts at zero.

    ``optax.incremental_update`` has the terms in the other order; compiled, that rounds otherwise.
    """
    return jax.tree_util.tree_map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)


def debiased_ema(ema: Params, updates: jax.Array | int, decay: float) -> Params:
    """The average without the pull of its zero start: ema / (1 - d^n) after n >= 1 updates."""
    return jax.tree_util.tree_map(lambda e: e / (1.0 - jnp.asarray(decay, e.dtype) ** updates), ema)


def schedule_free_average(opt_state: optax.OptState, params: Params) -> Params:
    """The weights that "schedule-free" is judged by: x = (y - (1 - b1) z) / b1."""
    z, b1 = (optax.tree.get(opt_state, name) for name in ("z", "b1"))
    return jax.tree_util.tree_map(lambda y, z: (y - (1.0 - b1) * z) / b1, params, z)


def lowered_rate(config: OptimizerConfig, stale_epochs: int, factor: float) -> float:
    """Factor on a "plateau" learning rate after another epoch; never below its final value.

    Args:
        config: of the optimizer.
        stale_epochs: epochs since the score was better, or the rate lowered.
        factor: the present one.
    """
    if config.schedule != "plateau" or stale_epochs < config.plateau_epochs:
        return factor
    lowest = config.final_learning_rate / config.peak_learning_rate
    return max(factor * config.plateau_factor, min(lowest, 1.0))
