"""The loop: order of events, interruption and exact resume, bad steps, choice of the best model."""

import csv
import itertools
import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from pair_potential import PairNetwork
from training_cases import FLIP, small_recipe, write_data_set

from mlip_md.errors import CheckpointError, NonFiniteError
from mlip_md.trainer import train
from mlip_md.trainer.checkpoint import leaves_by_path, state_hash
from mlip_md.trainer.dataset import load_data
from mlip_md.trainer.evaluate import evaluate_store
from mlip_md.trainer.loss import weights_at
from mlip_md.trainer.step import averaged_params, init_state, make_eval_step, make_train_step
from mlip_md.trainer.train import Trainer

EPOCHS, STEPS = 4, 6
"""Epochs of the small recipe and batches of each."""


@pytest.fixture(scope="module", autouse=True)
def saved():
    """Train a pair potential, which compiles quickly; collect the models that a run writes."""
    models = []

    def save(potential, path):
        models.append((path.name, potential))
        path.write_bytes(b"a model")

    network = PairNetwork(3, 4.0)

    def build(config, *, num_species, cutoff, **_):
        assert (num_species, cutoff) == (3, 4.0)
        return network

    evaluation = make_eval_step(network.apply)
    step_of: dict[str, object] = {}

    def compiled_once(apply, recipe):
        key = str(recipe.optimizer) + str(recipe.loss)
        return step_of.setdefault(key, make_train_step(apply, recipe))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_network", build)
        patch.setattr(train, "make_train_step", compiled_once)
        patch.setattr(train, "make_eval_step", lambda apply: evaluation)
        patch.setattr(train.model_file, "save", save)
        yield models


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return small_recipe(write_data_set(tmp_path_factory.mktemp("data") / "set.hdf5"))


@pytest.fixture(scope="module")
def data(recipe):
    return load_data(recipe)


@pytest.fixture(scope="module")
def finished(recipe, data, saved, tmp_path_factory):
    """A run without interruption: its trainer, outcome and models."""
    saved.clear()
    trainer = Trainer(recipe, data, tmp_path_factory.mktemp("straight"))
    outcome = trainer.run()
    return trainer, outcome, list(saved)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def events(folder):
    return [
        json.loads(line)
        for line in (folder / "events.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def fingerprint(trainer):
    return state_hash(leaves_by_path(trainer.state))


def at_step(trainer, number, action):
    """Call ``action`` before the step of this number (from 1, of this trainer)."""
    step, count = trainer.train_step, 0

    def wrapped(*arguments):
        nonlocal count
        count += 1
        if count == number:
            action()
        return step(*arguments)

    trainer.train_step = wrapped


def test_a_run_leaves_what_it_promises(finished):
    trainer, outcome, models = finished
    assert outcome.status == "done"
    assert [int(row["epoch"]) for row in rows(trainer.folder)] == list(range(EPOCHS + 1))
    assert [int(row["step"]) for row in rows(trainer.folder)] == [STEPS * k for k in range(5)]
    names = {path.name for path in trainer.folder.iterdir()}
    assert names == {
        "best-stage1.safetensors", "best-stage2.safetensors", "checkpoints", "config.resolved.yaml",
        "data.json", "environment.json", "events.jsonl", "log.txt", "metrics.csv",
        "model.safetensors",
    }  # fmt: skip
    assert len(list((trainer.folder / "checkpoints").iterdir())) == 2
    assert models[-1][0] == "model.safetensors"
    assert float(rows(trainer.folder)[-1]["loss"]) != float(rows(trainer.folder)[1]["loss"])


def test_exchanging_the_weights_compiles_nothing(finished):
    trainer, _, _ = finished
    assert [float(row["energy_weight"]) for row in rows(trainer.folder)] == [40, 40, 40, 1e3, 1e3]
    assert [float(row["forces_weight"]) for row in rows(trainer.folder)] == [1e3, 1e3, 1e3, 40, 40]
    assert trainer.train_step._cache_size() == 1
    assert trainer.eval_step._cache_size() == 1


def test_the_best_model_is_chosen_anew_after_the_exchange(finished):
    trainer, outcome, models = finished
    table = rows(trainer.folder)
    for stage, epochs in (("1", (1, 2)), ("2", (3, 4))):
        best = trainer.progress.best[stage]
        scores = {epoch: float(table[epoch]["score"]) for epoch in epochs}
        assert best["epoch"] == min(scores, key=scores.get)
        assert best["score"] == pytest.approx(min(scores.values()))
        last = [model for name, model in models if name == f"best-stage{stage}.safetensors"][-1]
        assert last.info["training"]["epoch"] == best["epoch"]
    assert outcome.errors == trainer.progress.best["2"]["errors"]
    assert models[-1][1].info["training"]["epoch"] == trainer.progress.best["2"]["epoch"]


def test_validation_uses_averaged_weights_and_at_the_start_the_first_ones(finished, recipe, data):
    trainer, _, _ = finished
    table = rows(trainer.folder)
    fresh = Trainer(recipe, data, trainer.folder)
    averaged = averaged_params(trainer.state, recipe.train.ema_decay)
    for row, params in ((table[0], fresh.state.params), (table[-1], averaged)):
        errors = evaluate_store(trainer.eval_step, params, data.validation, data.budget)
        for name, value in errors.items():
            assert float(row[f"validation_{name}"]) == pytest.approx(value, rel=1e-6)
    raw = evaluate_store(trainer.eval_step, trainer.state.params, data.validation, data.budget)
    assert raw["forces_rmse"] != pytest.approx(float(table[-1]["validation_forces_rmse"]), rel=1e-6)


def test_an_interrupted_run_ends_with_the_same_bits(finished, recipe, data, tmp_path):
    """SIGTERM in the middle of epoch 1, a crash in epoch 2, Ctrl-C in epoch 3, then to the end."""
    straight, _, _ = finished
    handler = signal.getsignal(signal.SIGINT)

    class CrashError(Exception):
        pass

    def crash():
        raise CrashError

    first = Trainer(recipe, data, tmp_path)
    at_step(first, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert first.run().status == "terminated"
    assert (first.progress.epoch, first.progress.batch) == (1, 3)

    second = Trainer(recipe, data, tmp_path)
    at_step(second, 8, crash)
    with pytest.raises(CrashError):
        second.run("must")
    assert (second.progress.epoch, second.progress.step) == (2, 10)

    third = Trainer(recipe, data, tmp_path)
    at_step(third, 6, lambda: os.kill(os.getpid(), signal.SIGINT))
    assert third.run().status == "keyboard"
    assert third.progress.step == 14

    last = Trainer(recipe, data, tmp_path)
    assert last.run("must").status == "done"
    assert fingerprint(last) == fingerprint(straight)
    assert last.progress.best == straight.progress.best
    timed = ("seconds", "structures_per_second")
    for row, expected in zip(rows(tmp_path), rows(straight.folder), strict=True):
        assert {k: v for k, v in row.items() if k not in timed} == {
            k: v for k, v in expected.items() if k not in timed
        }
    steps = [event["step"] for event in events(tmp_path) if event["event"] == "step"]
    assert steps == sorted(set(steps))
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_damaged_checkpoint_costs_steps_but_no_bits(finished, recipe, data, tmp_path):
    straight, _, _ = finished
    first = Trainer(recipe, data, tmp_path)
    at_step(first, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    first.run()
    newest = first.checkpoints.files()[0]
    content = bytearray(newest.read_bytes())
    content[-9] ^= 1
    newest.write_bytes(content)
    second = Trainer(recipe, data, tmp_path)
    assert second.run().status == "done"
    assert fingerprint(second) == fingerprint(straight)


def test_time_limit_and_what_resume_allows(finished, recipe, data, tmp_path):
    straight, _, _ = finished
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        Trainer(recipe, data, tmp_path).run("must")
    assert Trainer(recipe, data, tmp_path).run(max_seconds=0.0).status == "time"
    with pytest.raises(CheckpointError, match="earlier run"):
        Trainer(recipe, data, tmp_path).run("never")
    other = recipe.model_copy(update={"seed": 4})
    with pytest.raises(CheckpointError, match="differing: seed"):
        Trainer(other, data, tmp_path).run("auto")
    longer = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 5})})
    copy = shutil.copytree(straight.folder, tmp_path / "copy")
    assert Trainer(longer, data, copy).run("must").epoch == 5


def spoiled(batch):
    return batch.replace(energy=np.full_like(batch.energy, np.nan))


def test_a_bad_step_changes_nothing_but_its_counters(recipe, data):
    step = make_train_step(PairNetwork(3, 4.0).apply, recipe)
    network, example = PairNetwork(3, 4.0), data.example()
    state = init_state(recipe, network.init(jax.random.key(0), example.graph))
    weights = weights_at(recipe.loss, 1)
    state, _ = step(state, example, weights)
    before = leaves_by_path(state)
    state, log = step(state, spoiled(example), weights)
    after = leaves_by_path(state)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {".bad_steps", ".bad_in_row"}
    assert int(log.bad_in_row) == 1
    state, log = step(state, example, weights)
    assert int(log.bad_in_row) == 0
    assert int(state.bad_steps) == 1
    assert all(np.isfinite(leaf).all() for leaf in leaves_by_path(state).values())


def test_bad_steps_in_a_row_end_the_run_with_the_names(recipe, data, tmp_path):
    recipe = recipe.model_copy(
        update={"faults": recipe.faults.model_copy(update={"max_bad_steps_in_row": 2})}
    )
    trainer = Trainer(recipe, data, tmp_path)
    step = trainer.train_step
    trainer.train_step = lambda state, batch, weights: step(state, spoiled(batch), weights)
    start = leaves_by_path(trainer.state.params)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row .*set\.hdf5:molecule-\d+"):
        trainer.run()
    assert state_hash(leaves_by_path(trainer.state.params)) == state_hash(start)


def test_averages_wait_for_the_end_of_an_accumulation(recipe, data):
    optimizer = recipe.optimizer.model_copy(update={"num_gradient_accumulation_steps": 3})
    recipe = recipe.model_copy(update={"optimizer": optimizer})
    network, example = PairNetwork(3, 4.0), data.example()
    step = make_train_step(network.apply, recipe)
    state = init_state(recipe, network.init(jax.random.key(0), example.graph))
    averages, updates = [], []
    for _ in range(6):
        state, _ = step(state, example, weights_at(recipe.loss, 1))
        averages.append(state_hash(leaves_by_path(state.ema)))
        updates.append(int(state.updates))
    assert updates == [0, 0, 1, 1, 1, 2]
    assert [a == b for a, b in itertools.pairwise(averages)] == [
        True, False, True, True, False
    ]  # fmt: skip


def test_a_dry_run_writes_nothing(recipe, data, tmp_path):
    times = Trainer(recipe, data, tmp_path / "run").dry_run(3)
    assert times["structures_per_second"] > 0
    assert not (tmp_path / "run").exists()


def test_the_flip_is_in_the_epoch_of_the_recipe(finished):
    stages = [int(row["stage"]) for row in rows(finished[0].folder)]
    assert stages == [1 + (epoch >= FLIP) for epoch in range(EPOCHS + 1)]
