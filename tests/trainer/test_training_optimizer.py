"""The optimizer and the averaged weights against reference traces of twelve steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import golden

from mlip_md.networks import MACEConfig, NequIPConfig
from mlip_md.trainer.optimizer import (
    debiased_ema,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
    update_ema,
)
from mlip_md.trainer.recipe import OptimizerConfig

WARM = {
    "init_learning_rate": 1e-3,
    "peak_learning_rate": 0.01,
    "final_learning_rate": 1e-4,
    "warmup_steps": 4,
    "transition_steps": 5,
}
CASES = {
    "card_mace": {},
    "card_nequip": {f"{k}_learning_rate": 0.002 for k in ("init", "peak", "final")},
    "wd_warm": {**WARM, "weight_decay": 0.01},
    "acc2": {**WARM, "num_gradient_accumulation_steps": 2},
}


def tree(values):
    """Ten numbers as two weights, of which only the first decays."""
    return {"linear_down": jnp.asarray(values[:6]), "radial": jnp.asarray(values[6:])}


def flat(values):
    return np.concatenate([values["linear_down"], values["radial"]])


def trace(case, gradients):
    config = OptimizerConfig(**CASES[case])
    optimizer = make_optimizer(config, MACEConfig().decays)
    start = np.concatenate([np.linspace(-1, 1, 6), np.linspace(1, 2, 4)])
    params = tree(start.astype(np.float32))
    state, steps = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for gradient in gradients:
        updates, state = update(tree(gradient), state, params)
        params = optax.apply_updates(params, updates)
        steps.append(params)
    return config, steps


@pytest.mark.parametrize("case", CASES)
def test_steps_and_averages_are_the_reference_ones(case):
    arrays, _ = golden()
    config, steps = trace(case, arrays[f"opt_{case}_grads"])
    np.testing.assert_allclose(
        np.array([flat(step) for step in steps]), arrays[f"opt_{case}_params"], atol=2e-7
    )
    # The traces of the average take one update per micro-step, also with accumulation.
    ema = jax.tree_util.tree_map(jnp.zeros_like, steps[0])
    for step in steps:
        ema = update_ema(ema, step, 0.99)
    averaged = flat(debiased_ema(ema, len(steps), 0.99))
    np.testing.assert_allclose(averaged, arrays[f"opt_{case}_ema_debiased"], atol=1e-5)
    rates = [float(learning_rate_schedule(config)(count)) for count in range(12)]
    np.testing.assert_allclose(rates, arrays[f"opt_{case}_lr"], rtol=1e-6)


def test_accumulation_averages_and_waits():
    gradients = np.random.default_rng(0).normal(size=(4, 10)).astype(np.float32)
    _, steps = trace("acc2", gradients)
    np.testing.assert_array_equal(flat(steps[2]), flat(steps[1]))
    _, alone = trace("wd_warm", [])
    assert alone == []
    swapped = gradients[[1, 0, 3, 2]]
    np.testing.assert_allclose(flat(trace("acc2", swapped)[1][3]), flat(steps[3]), atol=1e-7)


def test_only_named_weights_decay_and_all_where_none_is_named():
    mace = {"linear_up": 1.0, "linear_down": 1.0, "SymmetricContraction_0": {"w1_0e": 1.0}}
    assert decay_mask(mace, MACEConfig().decays) == {
        "linear_up": False, "linear_down": True, "SymmetricContraction_0": {"w1_0e": True}
    }  # fmt: skip
    nequip = {"NequipLayer_0": {"Linear_0": 1.0}}
    assert decay_mask(nequip, NequIPConfig().decays) == {"NequipLayer_0": {"Linear_0": True}}


def test_average_of_constant_weights_is_the_weights():
    """The zero start must not show: after one update the average is the weights themselves."""
    params = {"w": jnp.array([2.0, -3.0])}
    ema = update_ema({"w": jnp.zeros(2)}, params, 0.99)
    np.testing.assert_allclose(debiased_ema(ema, 1, 0.99)["w"], params["w"], rtol=1e-5)
    np.testing.assert_allclose(ema["w"], 0.01 * params["w"], rtol=1e-5)
