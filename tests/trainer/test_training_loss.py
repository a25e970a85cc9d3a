"""Losses, their weights by epoch, and errors, against reference numbers and by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import golden, golden_batch, golden_with_stress, weights

from mlip_md.errors import ConfigError
from mlip_md.trainer import metrics
from mlip_md.trainer.loss import (
    batch_loss,
    force_deltas,
    stage_at,
    structure_losses,
    weights_at,
)
from mlip_md.trainer.recipe import LossConfig, load_recipe


def loss_config(kind):
    return LossConfig.model_validate(
        {"kind": kind, "energy": weights(40.0, 1e3, 115), "forces": weights(1e3, 40.0, 115)}
    )


@pytest.mark.parametrize("kind", ["mse", "huber"])
@pytest.mark.parametrize(("epoch", "when"), [(1, "before"), (114, "before"), (115, "after")])
def test_losses_are_the_reference_losses(kind, epoch, when):
    arrays, numbers = golden()
    config = loss_config(kind)
    loss = batch_loss(config, *golden_batch(arrays)[:2], weights_at(config, epoch),
                      golden_batch(arrays)[2])  # fmt: skip
    assert float(loss) == pytest.approx(numbers[f"loss_{kind}_{when}"]["loss"], rel=3e-6)


@pytest.mark.parametrize("kind", ["l1", "l1-l2"])
def test_absolute_losses_by_hand(kind):
    arrays, _ = golden()
    prediction, batch, _ = golden_batch(arrays)
    graph = batch.graph
    energy, forces, _ = structure_losses(loss_config(kind), prediction, batch)
    errors = np.asarray(prediction.forces) - batch.forces
    norms = np.linalg.norm(errors, axis=1) if kind == "l1-l2" else np.abs(errors).mean(1)
    for g in np.flatnonzero(graph.graph_mask):
        here = (graph.node_graph == g) & graph.node_mask
        assert float(forces[g]) == pytest.approx(norms[here].mean(), rel=1e-5)
        wrong = abs(float(prediction.energy[g]) - float(batch.energy[g])) / here.sum()
        assert float(energy[g]) == pytest.approx(wrong, rel=1e-5)


def test_the_length_of_no_error_has_a_gradient():
    arrays, _ = golden()
    prediction, batch, _ = golden_batch(arrays)
    config = loss_config("l1-l2")

    def loss(forces):
        right = prediction._replace(forces=forces)
        return batch_loss(config, right, batch, weights_at(config, 1))

    assert np.isfinite(jax.grad(loss)(jnp.asarray(batch.forces))).all()


def test_errors_are_the_reference_errors():
    arrays, numbers = golden()
    prediction, batch, _ = golden_batch(arrays)
    total = {}
    metrics.add_sums(total, metrics.error_sums(prediction, batch))
    errors, expected = metrics.mean_errors(total), numbers["loss_mse_before"]
    assert errors["energy_mae"] == pytest.approx(expected["mae_e"], rel=1e-6)
    assert errors["energy_mae_per_atom"] == pytest.approx(expected["mae_e_per_atom"], rel=1e-6)
    assert errors["energy_rmse_per_atom"] ** 2 == pytest.approx(expected["mse_e_per_atom"])
    assert errors["forces_mae"] == pytest.approx(expected["mae_f"], rel=1e-6)
    assert errors["forces_rmse"] ** 2 == pytest.approx(expected["mse_f"], rel=1e-6)


def test_padding_changes_no_loss_and_no_error():
    arrays, _ = golden()
    prediction, batch, _ = golden_batch(arrays)
    padding = ~batch.graph.node_mask[:, None]
    wild = prediction._replace(
        energy=np.where(batch.graph.graph_mask, prediction.energy, 1e6),
        forces=np.where(padding, 1e6, prediction.forces),
    )
    config = loss_config("mse")
    both = [float(batch_loss(config, p, batch, weights_at(config, 1))) for p in (prediction, wild)]
    assert both[0] == both[1]
    sums = [metrics.error_sums(p, batch) for p in (prediction, wild)]
    assert all(float(sums[0][name]) == float(sums[1][name]) for name in sums[0])


def test_small_molecules_weigh_as_much_as_large_ones():
    """ℓ_F is a mean per structure first: errors 1 on 3 atoms and 0 on 5 atoms give ½, not 3/8."""
    arrays = {
        "loss_n_node": np.array([3, 5, 0, 1]), "loss_e_ref": np.zeros(4),
        "loss_f_ref": np.zeros((9, 3)), "loss_e_pred": np.zeros(4),
        "loss_f_pred": np.where(np.arange(9)[:, None] < 3, 1.0, 0.0) * np.ones((9, 3)),
        "loss_weight": np.ones(4),
    }  # fmt: skip
    prediction, batch, _ = golden_batch(arrays)
    mask = np.arange(4) < 2
    batch = batch.replace(graph=batch.graph.replace(graph_mask=mask))
    config = LossConfig.model_validate({"energy": {"weight": 0.0}, "forces": {"weight": 1.0}})
    assert float(batch_loss(config, prediction, batch, weights_at(config, 1))) == 0.5


def test_classes_of_the_adaptive_huber_loss():
    norms = np.array([0.0, 99.9, 100.0, 100.1, 199.9, 200.0, 200.1, 299.9, 300.0, 1e4], np.float32)
    forces = norms[:, None] * np.array([[0.0, 1.0, 0.0]], np.float32)
    factors = [1, 1, 0.1, 0.7, 0.7, 0.1, 0.4, 0.4, 0.1, 0.1]
    np.testing.assert_allclose(
        force_deltas(forces, 0.01)[:, 0], 0.01 * np.array(factors), rtol=1e-6
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("mse", [8.0, 0.0, 0.25 / 9]), ("huber", [3.375 * 8 / 9, 0.0, 0.125 / 9])],
)
def test_stress_is_a_mean_of_nine_where_there_is_a_label(kind, expected):
    """Errors of 3 but for one component, none where there is no label, ½ in one component."""
    error = np.zeros((4, 3, 3), np.float32)
    error[0], error[1], error[2, 0, 1] = 3.0, 5.0, 0.5
    error[0, 1, 1] = 0.0
    config = LossConfig.model_validate(
        {"kind": kind, "delta": 1.5, "stress": {"weight": 7.0},
         "energy": {"weight": 0.0}, "forces": {"weight": 0.0}}
    )  # fmt: skip
    prediction, batch = golden_with_stress(golden()[0], error)
    np.testing.assert_allclose(structure_losses(config, prediction, batch)[2][:3], expected)
    loss = batch_loss(config, prediction, batch, weights_at(config, 1))
    assert float(loss) == pytest.approx(7.0 * sum(expected) / 3, rel=1e-6)


@pytest.mark.parametrize("name", ["mace-spice2", "nequip-spice2"])
def test_the_cards_exchange_their_weights_in_epoch_115(name):
    loss = load_recipe(name)[0].loss
    assert [float(w) for w in weights_at(loss, 114)[:2]] == [40.0, 1000.0]
    assert [float(w) for w in weights_at(loss, 115)[:2]] == [1000.0, 40.0]
    assert [stage_at(loss, epoch) for epoch in (0, 1, 114, 115, 220)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("epochs", [[2], [0, 0], [0, 9, 5], []])
def test_schedules_that_leave_epochs_open_are_refused(epochs, tmp_path):
    steps = ", ".join(f"{{from_epoch: {e}, value: 1.0}}" for e in epochs)
    (tmp_path / "r.yaml").write_text(f"loss:\n  energy:\n    weight: [{steps}]\n")
    with pytest.raises(ConfigError, match=r"r\.yaml:3:5: loss\.energy\.weight: .*ascend"):
        load_recipe(str(tmp_path / "r.yaml"))


def test_errors_do_not_depend_on_the_batching():
    generator = np.random.default_rng(0)
    total, atoms = {}, (3, 8, 2)
    all_forces, all_energies = [], []
    for n in atoms:
        energy, forces = generator.normal(), generator.normal(size=(n, 3))
        metrics.add_sums(total, metrics.structure_sums(energy, forces))
        all_forces.append(forces)
        all_energies.append(energy / n)
    errors, forces = metrics.mean_errors(total), np.concatenate(all_forces)
    assert errors["forces_rmse"] == pytest.approx(math.sqrt(np.mean(forces**2)))
    assert errors["energy_mae_per_atom"] == pytest.approx(np.mean(np.abs(all_energies)))
    assert math.isnan(metrics.mean_errors({})["forces_mae"])
    score = metrics.selection_score(errors, 10.0)
    assert score == errors["forces_rmse"] + 10.0 * errors["energy_rmse_per_atom"]
    stressed = {**errors, "stress_rmse": 0.01}
    assert metrics.selection_score(stressed, 10.0) == score
    assert metrics.selection_score(stressed, 10.0, stress_weight=20.0) == pytest.approx(score + 0.2)
    assert metrics.selection_score(errors, 10.0, stress_weight=20.0) == score
