"""Training in float64: per object, in every digit, with float32 left as it was."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_potential import PairNetwork
from training_cases import small_recipe, write_data_set

from mlip_md.devices import precision
from mlip_md.errors import CheckpointError
from mlip_md.trainer import train
from mlip_md.trainer.checkpoint import leaves_by_path, state_hash
from mlip_md.trainer.data import load_data, make_batch
from mlip_md.trainer.loss import weights_at
from mlip_md.trainer.optimizer import debiased_ema
from mlip_md.trainer.train import Trainer


@pytest.fixture(scope="module", autouse=True)
def saved():
    models = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_network", lambda *_, **__: PairNetwork(3, 4.0))
        patch.setattr(train.own, "save", lambda potential, path: models.append(potential))
        patch.setattr(train.own, "load", lambda path: models[-1])
        yield models


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    path = write_data_set(tmp_path_factory.mktemp("data") / "set.hdf5", count=40)
    return {
        dtype: small_recipe(path, train={"precision": dtype, "epochs": 2, "ema_decay": 0.9})
        for dtype in ("float32", "float64")
    }


@pytest.fixture(scope="module")
def data(recipes):
    return load_data(recipes["float64"])


def test_a_run_is_in_float64_and_the_process_is_not(recipes, data, saved, tmp_path):
    trainer = Trainer(recipes["float64"], data, tmp_path)
    first = leaves_by_path(Trainer(recipes["float32"], data, tmp_path).state.params)
    kinds = {str(leaf.dtype) for leaf in leaves_by_path(trainer.state).values()}
    assert kinds == {"float64", "int32"}
    for name, leaf in leaves_by_path(trainer.state.params).items():
        np.testing.assert_array_equal(leaf, first[name].astype(np.float64))  # the seed's weights
    assert trainer.run().status == "done"
    assert {str(leaf.dtype) for leaf in leaves_by_path(trainer.state).values()} == kinds
    assert jnp.zeros(1).dtype == jnp.float32
    assert trainer.train_step._cache_size() == trainer.eval_step._cache_size() == 1
    params = saved[-1].params["params"]
    assert {str(leaf.dtype) for leaf in params.values()} == {"float32"}


def test_gradients_are_those_of_float64(recipes, data, tmp_path):
    """Against differences of the loss, which float32 could not resolve."""
    trainer = Trainer(recipes["float64"], data, tmp_path)
    network, batch = PairNetwork(3, 4.0), data.example("float64")
    weights = weights_at(trainer.recipe.loss, 1)
    from mlip_md.potential import predict
    from mlip_md.trainer.loss import batch_loss

    def loss(params):
        return batch_loss(
            trainer.recipe.loss, predict(network.apply, params, batch.graph), batch, weights
        )

    with trainer.computing():
        params = jax.tree_util.tree_map(jnp.copy, trainer.state.params)
        value, gradient = jax.value_and_grad(loss)(params)
        moved = jax.tree_util.tree_map(lambda p: p + 1e-6, params)
        back = jax.tree_util.tree_map(lambda p: p - 1e-6, params)
        slope = (loss(moved) - loss(back)) / 2e-6
        total = sum(jnp.sum(leaf) for leaf in jax.tree_util.tree_leaves(gradient))
        assert float(slope) == pytest.approx(float(total), rel=1e-7)
        _, log = trainer.train_step(trainer.state, batch, weights)
    assert float(log.loss) == pytest.approx(float(value), rel=1e-13)
    assert log.loss.dtype == np.float64


def test_an_interrupted_run_ends_with_the_same_bits_and_its_precision(recipes, data, tmp_path):
    recipe = recipes["float64"]
    straight = Trainer(recipe, data, tmp_path / "straight")
    straight.run()
    assert Trainer(recipe, data, tmp_path / "run").run(max_seconds=0.0).status == "time"
    other = Trainer(recipes["float32"], data, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"differing: train\.precision"):
        other.run()
    resumed = Trainer(recipe, data, tmp_path / "run")
    resumed.run("must")
    hashes = [state_hash(leaves_by_path(t.state)) for t in (straight, resumed)]
    assert hashes[0] == hashes[1]


def test_labels_keep_their_digits(data):
    """Interaction energies of 1e5 eV, as large cells have them, and differences of 1 meV."""
    exact = 1e5 + 1e-3 * np.arange(len(data.train))
    e0 = data.train.compositions @ data.train.atomic_energies
    store = dataclasses.replace(data.train, energy=exact + e0)
    indices = np.arange(3)
    fine = make_batch(store, indices, data.budget, "float64")
    np.testing.assert_allclose(np.diff(fine.energy[:3]), 1e-3, rtol=1e-5)
    coarse = make_batch(store, indices, data.budget)
    assert coarse.energy.dtype == coarse.forces.dtype == coarse.graph.positions.dtype == np.float32
    assert np.diff(coarse.energy[:3]).max() == 0.0
    assert fine.graph.cell.dtype == fine.forces.dtype == np.float64


def test_averages_are_corrected_in_their_own_precision():
    with precision("float64", "cpu"):
        found = debiased_ema({"w": jnp.ones(1)}, jnp.int32(3), 0.99)["w"]
        assert float(found[0]) == pytest.approx(1 / (1 - 0.99**3), rel=1e-13)
