"""The optimizer and the averaged weights against reference traces of twelve steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from training_cases import golden

from mlip_md.errors import ConfigError
from mlip_md.networks import MACEConfig, NequIPConfig
from mlip_md.trainer.optimizer import (
    debiased_ema,
    decay_mask,
    learning_factors,
    learning_rate_schedule,
    lowered_rate,
    make_optimizer,
    schedule_free_average,
    settle_steps,
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


# Kinds, schedules and factors


def descend(config, steps=60):
    """Weights after some steps down a bowl whose axes differ, and the optimizer's state."""
    optimizer = make_optimizer(config, lambda _: True)
    params = {"matrix": jnp.ones((3, 2)), "head": {"vector": jnp.array([2.0, -1.0])}}
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        gradient = {
            "matrix": params["matrix"] * jnp.array([[1.0, 30.0]]),
            "head": {"vector": 3.0 * params["head"]["vector"]},
        }
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def constant(kind, rate=0.05, **values):
    rates = {f"{name}_learning_rate": rate for name in ("init", "peak", "final")}
    return OptimizerConfig(kind=kind, warmup_steps=0, **{**rates, **values})


@pytest.mark.parametrize("kind", ["amsgrad", "adam", "adamw", "muon", "schedule-free"])
@pytest.mark.parametrize("every", [1, 2])
def test_every_kind_goes_down(kind, every):
    config = constant(kind, num_gradient_accumulation_steps=every)
    params, _ = descend(config, steps=120 * every)
    assert np.abs(params["matrix"]).max() < 0.5
    assert np.abs(params["head"]["vector"]).max() < 0.6


def test_kinds_are_what_their_names_say():
    one, _ = descend(constant("adam"), steps=1)
    np.testing.assert_allclose(one["matrix"], 0.95, rtol=1e-5)  # sign of the gradient times rate
    orthogonal, _ = descend(constant("muon"), steps=1)
    taken = np.linalg.svd(np.asarray(1.0 - orthogonal["matrix"]) / 0.05, compute_uv=False)
    assert 0.6 < taken[0] < 1.3  # Newton-Schulz iterations end near 1
    moved = np.array([2.0, -1.0]) - orthogonal["head"]["vector"]
    np.testing.assert_allclose(moved, [0.07368, -0.07368], rtol=1e-3)  # Adam's with Nesterov's sum


def test_decay_of_adamw_passes_by_the_moments():
    coupled, decoupled = (
        descend(constant(kind, weight_decay=0.1), steps=1)[0]["matrix"]
        for kind in ("adam", "adamw")
    )
    np.testing.assert_allclose(coupled, 0.95, rtol=1e-5)
    np.testing.assert_allclose(decoupled, 0.95 - 0.05 * 0.1, rtol=1e-5)


def test_schedule_free_is_judged_by_the_mean_of_its_steps():
    """Of x_{t+1} = (1 - c_t) x_t + c_t z_{t+1} with c_t = 1/t, by hand."""
    optimizer = make_optimizer(constant("schedule-free", grad_norm=1e9), lambda _: True)
    y = z = x = 1.0
    params = {"w": jnp.array([1.0])}
    state, second = optimizer.init(params), 0.0
    for t in range(1, 8):
        gradient = 4.0 * y
        updates, state = optimizer.update({"w": jnp.array([gradient])}, state, params)
        params = optax.apply_updates(params, updates)
        second = 0.999 * second + 0.001 * gradient**2
        z -= 0.05 * gradient / (np.sqrt(second / (1.0 - 0.999**t)) + 1e-8)
        x += (z - x) / t
        y = 0.1 * z + 0.9 * x
        np.testing.assert_allclose(params["w"], y, rtol=2e-5)
        np.testing.assert_allclose(schedule_free_average(state, params)["w"], x, rtol=2e-5)


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("linear", 0.505), ("cosine", 0.505), ("exponential", 0.1), ("plateau", 1.0)],
)
def test_schedules_go_from_the_peak_to_the_end(schedule, middle):
    config = OptimizerConfig(
        schedule=schedule, init_learning_rate=0.0, peak_learning_rate=1.0,
        final_learning_rate=0.01, warmup_steps=4, transition_steps=10,
    )  # fmt: skip
    rates = [float(learning_rate_schedule(config)(count)) for count in (0, 2, 4, 9, 14, 50)]
    end = 1.0 if schedule == "plateau" else 0.01
    np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, middle, end, end], atol=1e-6)


def test_lengths_may_be_in_epochs_and_to_the_end():
    config = OptimizerConfig(warmup_epochs=0.5, transition_steps="to the end")
    settled = settle_steps(config, steps_per_epoch=30, epochs=10)
    assert (settled.warmup_steps, settled.transition_steps) == (15, 285)
    config = OptimizerConfig(warmup_steps=7, transition_epochs=2.0)
    settled = settle_steps(config, steps_per_epoch=30, epochs=10)
    assert (settled.warmup_steps, settled.transition_steps) == (7, 60)
    plain = OptimizerConfig()
    assert settle_steps(plain, 30, 10) == plain


def test_factors_slow_parts_down_and_freeze_them():
    factors = {"*": 0.5, "head/*": 0.0}
    (params, _), (whole, _) = (
        descend(constant("adam", factors=f, weight_decay=0.1), steps=1) for f in (factors, {})
    )
    np.testing.assert_array_equal(params["head"]["vector"], [2.0, -1.0])
    np.testing.assert_allclose(1 - params["matrix"], 0.5 * (1 - whole["matrix"]), rtol=1e-4)


def test_frozen_parts_do_not_count_where_gradients_are_clipped():
    gradients = {"matrix": jnp.ones((1, 1)), "head": {"vector": jnp.array([1e6])}}
    config = constant("adamw", grad_norm=1.0, factors={"head/*": 0.0})
    optimizer = make_optimizer(config, lambda _: True)
    _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose(optax.tree.get(state, "mu")["matrix"], 0.1, rtol=1e-6)


def test_a_pattern_that_fits_nothing_is_refused():
    with pytest.raises(
        ConfigError, match=r"optimizer.factors: haed/\* fits no weights.*head/vector"
    ):
        learning_factors({"head": {"vector": 1.0}}, {"haed/*": 0.1})


def test_a_network_whose_weights_are_all_frozen_is_refused():
    params = {"head": {"vector": 1.0}, "matrix": 2.0}
    assert learning_factors(params, {"*": 0.0, "matrix": 0.1})["matrix"] == 0.1
    with pytest.raises(ConfigError, match=r"optimizer.factors freeze every weight"):
        learning_factors(params, {"head/*": 0.0, "matrix": 0.0})


def test_a_plateau_is_lowered_to_the_final_rate_and_no_further():
    config = OptimizerConfig(
        schedule="plateau", plateau_epochs=3, peak_learning_rate=1.0, final_learning_rate=0.3
    )
    assert [lowered_rate(config, stale, 1.0) for stale in (0, 2, 3, 4)] == [1.0, 1.0, 0.5, 0.5]
    assert lowered_rate(config, 3, 0.5) == 0.3
    assert lowered_rate(OptimizerConfig(), 100, 1.0) == 1.0
