"""Replay: a second data set beside the new one, with a weight of its own, in every step."""

import dataclasses
import os
import signal

import h5py
import jax
import numpy as np
import pytest
from pair_potential import PairNetwork, pair_potential
from training_cases import E0, small_recipe, write_data_set

from mlip_md.errors import CheckpointError, ConfigError, DataError
from mlip_md.potential import predict
from mlip_md.trainer import train
from mlip_md.trainer.checkpoint import leaves_by_path, state_hash
from mlip_md.trainer.data import load_data, make_batch, prepare
from mlip_md.trainer.data.batching import join_batches
from mlip_md.trainer.evaluation import evaluate, evaluate_store
from mlip_md.trainer.loss import batch_loss, weights_at
from mlip_md.trainer.recipe import StartConfig
from mlip_md.trainer.train import Trainer

PARENT = pair_potential(cutoff=4.0)


@pytest.fixture(scope="module", autouse=True)
def saved():
    models = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_network", lambda *_, num_species, **__: PairNetwork(3, 4.0))
        patch.setattr(train.own, "save", lambda potential, path: models.append(potential))
        patch.setattr(train.own, "load", lambda path: models[-1])
        yield models


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    paths = {n: str(write_data_set(folder / f"{n}.hdf5", count=c, seed=s))
             for n, c, s in (("new", 40, 1), ("old", 25, 2), ("few", 9, 3))}  # fmt: skip
    with h5py.File(paths["old"], "r+") as file:
        for group in file.values():
            e0 = sum(E0[int(z)] for z in group["elements"][:])
            group.attrs["energy"] += group.attrs["energy"] - e0
            group["forces"][:] = 2 * group["forces"][:]
    return paths


def tuning(files, **start):
    recipe = small_recipe(files["new"], train={"epochs": 2, "ema_decay": 0.5})
    return recipe.model_copy(update={"start": StartConfig(potential="parent", **start)})


def begin(recipe, folder):
    return Trainer(recipe, load_data(recipe), folder, parent=PARENT)


def result_of(recipe, folder):
    trainer = begin(recipe, folder)
    trainer.run()
    return trainer, state_hash(leaves_by_path(trainer.state))


def some(files, name, rows, **changes):
    """A batch of a file, with the parent's E0, of a store with some arrays changed."""
    data = load_data(small_recipe(files[name]))
    store = data.train.with_atomic_energies(PARENT.atomic_energies)
    arrays = {key: make(len(store)) for key, make in changes.items()}
    store = dataclasses.replace(store, **arrays)
    return make_batch(store, np.array(rows), data.budget)


STRESSES = {
    "stress": lambda n: np.random.default_rng(0).normal(size=(n, 3, 3)).astype(np.float32),
    "stress_mask": lambda n: np.arange(n) % 2 == 0,
    "cell": lambda n: np.tile(20 * np.eye(3, dtype=np.float32), (n, 1, 1)),
}
WEIGHTS = {"weights": lambda n: np.random.default_rng(1).uniform(1, 3, (n, 3)).astype(np.float32)}
MASKS = {"forces_mask": lambda n: np.arange(n) % 3 > 0}


@pytest.mark.parametrize("first", [{}, STRESSES, WEIGHTS])
@pytest.mark.parametrize("second", [{}, STRESSES, MASKS])
@pytest.mark.parametrize("weight", [0.0, 0.3, 4.0])
def test_the_loss_is_the_sum_of_both_means(first, second, weight, files):
    """In value and gradient, whatever labels one of them lacks."""
    one = some(files, "new", [0, 3, 5, 7], **first)
    two = some(files, "old", [1, 2], **second)
    recipe = small_recipe(files["new"], loss={"stress": {"weight": [
        {"from_epoch": 0, "value": 1e3}]}})  # fmt: skip
    weights, network = weights_at(recipe.loss, 1), PairNetwork(3, 4.0)

    def loss(params, batch):
        return batch_loss(recipe.loss, predict(network.apply, params, batch.graph), batch, weights)

    def alone(params):
        return loss(params, one) + weight * loss(params, two)

    joined = join_batches(one, two, weight)
    assert (joined.stress is None) == ("stress" not in first and "stress" not in second)
    found = jax.value_and_grad(loss)(PARENT.params, joined)
    expected = jax.value_and_grad(alone)(PARENT.params)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5)


def test_a_weight_of_zero_equals_none(files, tmp_path):
    _, none = result_of(tuning(files), tmp_path / "none")
    _, zero = result_of(tuning(files, replay=files["old"], replay_weight=0.0), tmp_path / "zero")
    assert zero == none
    replayed, half = result_of(tuning(files, replay=files["old"]), tmp_path / "half")
    assert half != none
    assert replayed.data.description()["structures"]["replay"] == 25
    tiny = tuning(files, replay=files["old"], replay_weight=1e-12)
    straight, limit = (begin(r, tmp_path / "n") for r in (tuning(files), tiny))
    for (_, plain), (_, joined) in zip(straight.batches(1), limit.batches(1), strict=True):
        weights = weights_at(tiny.loss, 1)
        straight.state, expected = straight.train_step(straight.state, plain, weights)
        limit.state, found = limit.train_step(limit.state, joined, weights)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-4)


def test_what_is_replayed_is_kept(files, tmp_path):
    """The old set is labelled by the parent, so that every error on it is what was forgotten."""
    data = load_data(tuning(files, replay=files["old"]))
    store = data.replay.with_elements(PARENT.elements)
    store = store.with_atomic_energies(PARENT.atomic_energies)
    said = evaluate(PARENT, store).predictions
    forces = np.concatenate(said.forces).astype(np.float32)
    data = dataclasses.replace(
        data, replay=dataclasses.replace(store, energy=said.energy, forces=forces)
    )
    errors = {}
    for weight in (1e-9, 10.0):
        recipe = tuning(files, replay=files["old"], replay_weight=weight)
        trainer = Trainer(recipe, data, tmp_path / str(weight), parent=PARENT)
        trainer.run()
        params, old = trainer.state.params, trainer.data.replay
        found = evaluate_store(trainer.eval_step, params, old, trainer.data.replay_budget)
        errors[weight] = found["forces_rmse"]
    assert errors[10.0] < 0.6 * errors[1e-9]


def test_energies_of_the_old_set_are_the_parents(files, tmp_path):
    """Also where those of the new one are fitted anew."""
    recipe = tuning(files, replay=files["old"], atomic_energies="refit")
    data = begin(recipe, tmp_path).data
    np.testing.assert_array_equal(data.replay.atomic_energies, PARENT.atomic_energies)
    assert np.abs(data.train.atomic_energies - PARENT.atomic_energies).max() > 0.1


def test_batches_go_round_where_the_old_set_is_shorter(files, tmp_path):
    trainer = begin(tuning(files, replay=files["few"]), tmp_path)
    whole = [batch for _, batch in trainer.batches(2)]
    n = trainer.data.budget.n_graph
    shown = [batch.energy[n:].tobytes() for batch in whole]
    assert len(whole) == 4
    assert len(set(shown)) == len(trainer.data.replay) // 8 + 1 == 2
    assert shown[:2] == shown[2:]
    rest = [batch for _, batch in trainer.batches(2, done=3)]
    assert [b.energy.tobytes() for b in rest] == [whole[3].energy.tobytes()]


def test_an_interrupted_run_ends_with_the_same_bits(files, tmp_path, interruptible):
    recipe = tuning(files, replay=files["few"])
    _, straight = result_of(recipe, tmp_path / "straight")
    trainer, made = begin(recipe, tmp_path / "run"), []
    step = trainer.train_step

    def stopping(*arguments):
        made.append(1)
        if len(made) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    trainer.train_step = stopping
    assert trainer.run().status == "terminated"
    other = tuning(files, replay=files["old"])
    with pytest.raises(CheckpointError, match=r"differing: start\.replay"):
        begin(other, tmp_path / "run").run()
    assert result_of(recipe, tmp_path / "run")[1] == straight


def test_a_prepared_folder_can_be_replayed(files, tmp_path):
    folder = str(tmp_path / "prepared")
    split = {"train": 1.0, "validation": 0.0, "test": 0.0}
    config = small_recipe(files["old"], data={"split": split}).data
    prepare(config, folder=folder)
    direct = load_data(tuning(files, replay=files["old"])).replay
    opened = load_data(tuning(files, replay=folder)).replay
    np.testing.assert_array_equal(direct.positions, opened.positions)
    prepare(config.model_copy(update={"cutoff": 3.0}), folder=tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"start\.replay: .* with a cutoff of 3\.0 Å"):
        load_data(tuning(files, replay=str(tmp_path / "narrow")))


def test_a_parent_is_needed(files, tmp_path):
    recipe = tuning(files)
    with pytest.raises(ConfigError, match="starts from parent; hand that potential over"):
        Trainer(recipe, load_data(recipe), tmp_path)
    with pytest.raises(DataError, match="there is no data file"):
        load_data(tuning(files, replay="nowhere.xyz"))
