"""The loop: order of events, interruption and exact resume, bad steps, choice of the best model."""

import csv
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal

import ase.io
import jax
import numpy as np
import pytest
from pair_potential import PairNetwork
from training_cases import FLIP, small_recipe, write_data_set

from mlip_md import devices
from mlip_md.devices import DeviceMemory
from mlip_md.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    OwnershipError,
)
from mlip_md.trainer import train
from mlip_md.trainer.checkpoint import leaves_by_path, state_hash
from mlip_md.trainer.costs import time_steps
from mlip_md.trainer.data import load_data
from mlip_md.trainer.evaluation import evaluate_store
from mlip_md.trainer.loss import weights_at
from mlip_md.trainer.optimizer import learning_rate_schedule
from mlip_md.trainer.resume import check_same, identify
from mlip_md.trainer.step import averaged_params, init_state, make_eval_step, make_train_step
from mlip_md.trainer.train import Trainer

EPOCHS, STEPS = 4, 6
"""Epochs of the small recipe and batches of each."""
OTHER_CUTOFF = 3.5
RATES = ("init", "peak", "final")


@pytest.fixture(scope="module", autouse=True)
def saved():
    """Train a pair potential, which compiles quickly; collect the models that a run writes."""
    models = []

    def save(potential, path):
        models.append((path.name, potential))
        path.write_bytes(b"a model")

    network = PairNetwork(3, 4.0)

    def build(config, *, num_species, cutoff, **_):
        assert num_species == 3
        assert cutoff in (4.0, OTHER_CUTOFF)
        return network

    evaluation = make_eval_step(network.apply)
    step_of: dict[str, object] = {}

    def compiled_once(apply, recipe, mesh=None):
        key = str(recipe.optimizer) + str(recipe.loss)
        return step_of.setdefault(key, make_train_step(apply, recipe))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_network", build)
        patch.setattr(train, "make_train_step", compiled_once)
        patch.setattr(train, "make_eval_step", lambda apply, **_: evaluation)
        patch.setattr(train.own, "save", save)
        patch.setattr(train.own, "load", lambda path: models[-1][1])
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


def changed(recipe, **sections):
    """A recipe with other values: ``train={"epochs": 5}``."""
    update = {
        name: value
        if not isinstance(value, dict)
        else {**recipe.model, **value}
        if name == "model"
        else getattr(recipe, name).model_copy(update=value)
        for name, value in sections.items()
    }
    return recipe.model_copy(update=update)


def stop_at_step(trainer, number):
    """Begin a run and end it with SIGTERM after the step of this number."""
    at_step(trainer, number, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.run().status == "terminated"


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
        "model.safetensors", "card.md", "report",
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


def test_an_interrupted_run_ends_with_the_same_bits(
    finished, recipe, data, tmp_path, interruptible
):
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
    longer = changed(recipe, train={"epochs": 5}, checkpoint={"keep_latest": 3})
    copy = shutil.copytree(straight.folder, tmp_path / "copy")
    assert Trainer(longer, data, copy).run("must").epoch == 5
    assert "epochs: 5 " in (copy / "config.resolved.yaml").read_text(encoding="utf-8")
    assert [event["changes"] for event in events(copy) if event["event"] == "resumed"] == [
        {"train.epochs": [4, 5], "checkpoint.keep_latest": [2, 3]}
    ]
    assert "with train.epochs 4 -> 5" in (copy / "log.txt").read_text(encoding="utf-8")


def test_a_run_with_given_atomic_energies_is_resumed(recipe, tmp_path):
    given = changed(recipe, model={"atomic_energies": {"H": -13.6, 6: -1030.5, "8": -2043.9}})
    data = load_data(given)
    assert data.statistics.atomic_energies_source == "given"
    assert Trainer(given, data, tmp_path).run(max_seconds=0.0).status == "time"
    assert Trainer(given, data, tmp_path).run("must", max_seconds=0.0).status == "time"
    other = changed(given, model={"atomic_energies": {"H": -13.5, "C": -1030.5, "O": -2043.9}})
    with pytest.raises(CheckpointError, match=r"differing: model\.atomic_energies\.H, the struct"):
        Trainer(other, load_data(other), tmp_path).run("allow-changes")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 4}, "seed"),
        ({"model": {"num_channels": 5}}, "model.num_channels"),
        ({"loss": {"kind": "huber"}}, "loss.kind"),
        ({"train": {"ema_decay": 0.8}}, "train.ema_decay"),
        ({"train": {"select_energy_weight": 1.0}}, "train.select_energy_weight"),
        ({"optimizer": {"grad_norm": 1.0}}, "optimizer.grad_norm"),
        (
            {"optimizer": {"num_gradient_accumulation_steps": 2}},
            "optimizer.num_gradient_accumulation_steps",
        ),
        ({"data": {"cutoff": OTHER_CUTOFF}}, "data.cutoff"),
        ({"data": {"batch_size": 9}}, "data.batch_size"),
    ],
)
def test_another_recipe_or_data_set_is_refused_by_name(
    changes, name, finished, recipe, data, tmp_path
):
    folder = shutil.copytree(finished[0].folder, tmp_path / "copy")
    other = changed(recipe, **changes)
    set_ = load_data(other) if "data" in changes else data
    with pytest.raises(CheckpointError, match=rf"\(differing: {name}\)") as caught:
        Trainer(other, set_, folder).run()
    assert ("--resume allow-changes" in str(caught.value)) == (name == "optimizer.grad_norm")
    if name != "optimizer.grad_norm":
        with pytest.raises(CheckpointError, match=rf"\(differing: {name}\)"):
            Trainer(other, set_, folder).run("allow-changes")


def test_other_labels_are_refused(recipe, data, finished):
    energy = data.validation.energy + np.eye(1, len(data.validation))[0]
    validation = dataclasses.replace(data.validation, energy=energy)
    other = dataclasses.replace(data, validation=validation)
    with pytest.raises(CheckpointError, match=r"\(differing: the structures, labels or batches\)"):
        Trainer(recipe, other, finished[0].folder).run()


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize(
    "name",
    ["positions", "atomic_numbers", "forces", "senders", "energy", "cell", "stress", "stress_mask",
     "cutoff", "atomic_energies"],
)  # fmt: skip
def test_every_part_of_the_data_counts_in_the_fingerprint(part, name, data):
    stress = {"stress": np.ones((len(data.train), 3, 3), np.float32),
              "stress_mask": np.ones(len(data.train), bool)}  # fmt: skip
    store = dataclasses.replace(getattr(data, part), **stress, cell=stress["stress"])
    before = dataclasses.replace(data, **{part: store}).fingerprint
    assert before != data.fingerprint
    value = np.array(getattr(store, name))
    first = {"positions": store.first_atom, "atomic_numbers": store.first_atom,
             "forces": store.first_atom, "senders": store.first_edge}  # fmt: skip
    if value.ndim == 0:
        value = float(value) + 0.1
    else:
        row = first.get(name, [0])[0]
        value[row] = 8 - 7 * (value[row] == 8) if name == "atomic_numbers" else value[row] == 0
    store = dataclasses.replace(store, **{name: value})
    assert dataclasses.replace(data, **{part: store}).fingerprint != before


def test_a_run_goes_on_with_another_learning_rate(recipe, data, tmp_path):
    stop_at_step(Trainer(recipe, data, tmp_path), 8)
    slower = changed(recipe, optimizer={f"{k}_learning_rate": 1e-4 for k in RATES})
    with pytest.raises(CheckpointError, match="or go on with --resume allow-changes"):
        Trainer(slower, data, tmp_path).run()
    trainer = Trainer(slower, data, tmp_path)
    at_step(trainer, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.run("allow-changes").status == "terminated"
    assert Trainer(slower, data, tmp_path).run("must").status == "done"
    table = rows(tmp_path)
    assert float(table[1]["learning_rate"]) == pytest.approx(0.01 - 0.009 * 3 / 20)
    assert [float(row["learning_rate"]) for row in table[2:]] == pytest.approx([1e-4] * 3)
    (change,) = [e["changes"] for e in events(tmp_path) if e["event"] == "resumed" and e["changes"]]
    assert change["optimizer.peak_learning_rate"] == [0.01, 1e-4]


def test_the_clock_asks_for_checkpoints_too(recipe, data, tmp_path):
    """With none due by the count of steps, every step is saved at an interval of no time."""
    often = changed(recipe, checkpoint={"every_steps": 10**9, "every_minutes": 1e-9})
    trainer = Trainer(often, data, tmp_path)

    def look():
        assert trainer.checkpoints.files()[0].name == "step-000000003.safetensors"
        os.kill(os.getpid(), signal.SIGTERM)

    at_step(trainer, 4, look)
    assert trainer.run().status == "terminated"


def test_validation_errors_that_are_not_finite_end_the_run(recipe, data, tmp_path):
    energy = np.full(len(data.validation), np.inf)
    broken = dataclasses.replace(data.validation, energy=energy)
    trainer = Trainer(recipe, dataclasses.replace(data, validation=broken), tmp_path)
    with pytest.raises(NonFiniteError, match=r"after epoch 0 .*--resume allow-changes"):
        trainer.run()


def test_structures_too_large_are_left_out_of_validation_too(recipe, data, tmp_path):
    """A validation structure with more atoms than a batch has; the others are those judged."""
    sizes = data.validation.num_atoms
    largest = int(sizes.argmax())
    budget = dataclasses.replace(data.budget, n_node=int(sizes[largest]))
    with pytest.raises(DataError, match="fit into no batch"):
        Trainer(recipe, dataclasses.replace(data, budget=budget), tmp_path / "a").run()
    dropping = dataclasses.replace(data, budget=budget, on_oversize="drop")
    trainer = Trainer(recipe, dropping, tmp_path / "b")

    def stop():
        raise RuntimeError("before the first step")

    at_step(trainer, 1, stop)
    with pytest.raises(RuntimeError, match="before the first step"):
        trainer.run()
    rest = data.validation.subset(np.flatnonzero(sizes < sizes[largest]))
    errors = evaluate_store(trainer.eval_step, trainer.state.params, rest, budget)
    row = rows(tmp_path / "b")[0]
    assert float(row["validation_forces_rmse"]) == pytest.approx(errors["forces_rmse"], rel=1e-2)


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


def spoil_steps(trainer, numbers):
    """Give NaN labels to steps of these numbers, counted as they are made."""
    step, made = trainer.train_step, itertools.count(1)

    def spoiling(state, batch, *others):
        return step(state, spoiled(batch) if next(made) in numbers else batch, *others)

    trainer.train_step = spoiling


def test_bad_steps_in_a_row_end_the_run_with_the_names(recipe, data, tmp_path):
    recipe = changed(recipe, faults={"max_bad_steps_in_row": 2, "rollbacks": 0})
    trainer = Trainer(recipe, data, tmp_path)
    spoil_steps(trainer, range(1, 100))
    start = leaves_by_path(trainer.state.params)
    with pytest.raises(NonFiniteError, match=r"2 steps in a row .*set\.hdf5:molecule-\d+"):
        trainer.run()
    assert state_hash(leaves_by_path(trainer.state.params)) == state_hash(start)


def test_bad_steps_lead_back_to_the_last_checkpoint_with_a_lower_rate(recipe, data, tmp_path):
    """Checkpoints are of steps 0, 4, …; steps 6 and 7 are bad, once."""
    recipe = changed(recipe, faults={"max_bad_steps_in_row": 2}, train={"epochs": 2})
    trainer = Trainer(recipe, data, tmp_path)
    spoil_steps(trainer, (6, 7))
    assert trainer.run().status == "done"
    assert (trainer.progress.rollbacks, trainer.progress.rate) == (1, 0.5)
    told = [event for event in events(tmp_path) if event["event"] == "rolled_back"]
    assert [(event["step"], event["from_step"]) for event in told] == [(6, 7)]  # end of epoch 1
    assert int(rows(tmp_path)[-1]["step"]) == 2 * STEPS
    batch = ase.io.read(tmp_path / "bad-step-7.extxyz", ":")
    assert all("set.hdf5:molecule-" in atoms.info["name"] for atoms in batch)
    assert all("REF_forces" in atoms.arrays for atoms in batch)
    assert float(rows(tmp_path)[-1]["learning_rate"]) == pytest.approx(
        0.5 * float(learning_rate_schedule(trainer.optimizer)(2 * STEPS))
    )


def test_bad_steps_that_come_back_end_the_run_after_all(recipe, data, tmp_path):
    recipe = changed(recipe, faults={"max_bad_steps_in_row": 1, "rollbacks": 2})
    trainer = Trainer(recipe, data, tmp_path)
    spoil_steps(trainer, range(3, 100))
    with pytest.raises(NonFiniteError, match="1 steps in a row"):
        trainer.run()
    assert trainer.progress.rollbacks == 2
    again = Trainer(recipe, data, tmp_path)  # the count is kept
    spoil_steps(again, range(1, 100))
    with pytest.raises(NonFiniteError):
        again.run()
    assert again.progress.rollbacks == 2


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
    times = time_steps(Trainer(recipe, data, tmp_path / "run"), 3)
    assert times["structures_per_second"] > 0
    assert not (tmp_path / "run").exists()


def test_the_flip_is_in_the_epoch_of_the_recipe(finished):
    stages = [int(row["stage"]) for row in rows(finished[0].folder)]
    assert stages == [1 + (epoch >= FLIP) for epoch in range(EPOCHS + 1)]


def test_a_folder_has_one_training_at_a_time(recipe, data, tmp_path):
    def start_another():
        with pytest.raises(OwnershipError, match="in use by process"):
            Trainer(recipe, data, tmp_path).run()
        told.append(True)

    told = []
    recipe = changed(recipe, train={"epochs": 1})
    trainer = Trainer(recipe, data, tmp_path)
    at_step(trainer, 2, start_another)
    assert trainer.run().status == "done"
    assert told == [True]
    assert len(rows(tmp_path)) == 2


def test_a_hangup_saves_and_a_second_one_changes_nothing(recipe, data, tmp_path, interruptible):
    def hang_up():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGHUP)

    trainer = Trainer(recipe, data, tmp_path)
    at_step(trainer, 2, hang_up)
    assert trainer.run().status == "hangup"
    assert Trainer(recipe, data, tmp_path).checkpoints.files()


# Options


def test_training_ends_early_where_nothing_gets_better(recipe, data, tmp_path):
    """With rates of zero every epoch is like the first; the last stage begins in epoch 3."""
    frozen = {"init_learning_rate": 0.0, "peak_learning_rate": 1e-12, "final_learning_rate": 0.0}
    long = changed(recipe, optimizer=frozen, train={"epochs": 30, "patience": 2})
    trainer = Trainer(long, data, tmp_path)
    assert trainer.run().status == "done"
    best = trainer.progress.best["2"]["epoch"]
    assert [int(row["epoch"]) for row in rows(tmp_path)][-1] == best + 2
    assert "train.patience" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    again = Trainer(long, data, tmp_path)
    assert again.run().status == "done"
    assert again.progress.step == trainer.progress.step


def test_a_plateau_lowers_the_rate_also_after_a_resume(recipe, data, tmp_path):
    still = {
        "schedule": "plateau", "plateau_epochs": 1, "init_learning_rate": 1e-9,
        "peak_learning_rate": 1e-9, "final_learning_rate": 0.0,
    }  # fmt: skip
    slow = changed(recipe, optimizer=still, train={"epochs": 8, "ema_decay": 0.0})
    straight = Trainer(slow, data, tmp_path / "straight")
    straight.run()
    rates = [float(row["learning_rate"]) for row in rows(tmp_path / "straight")]
    assert min(rates) < max(rates) == pytest.approx(1e-9)
    first = Trainer(slow, data, tmp_path / "resumed")
    stop_at_step(first, 6 * STEPS + 2)
    second = Trainer(slow, data, tmp_path / "resumed")
    second.run()
    assert fingerprint(second) == fingerprint(straight)
    assert [float(row["learning_rate"]) for row in rows(tmp_path / "resumed")] == rates


def test_a_lowered_rate_is_what_steps_are_made_with(recipe, data, tmp_path):
    def weights(rate):
        trainer = Trainer(changed(recipe, optimizer={"schedule": "plateau"}), data, tmp_path)
        before = jax.device_get(trainer.state.params)
        state, _ = trainer.train_step(
            trainer.state, data.example(), weights_at(recipe.loss, 1), rate
        )
        return [
            np.asarray(b) - a
            for b, a in zip(*map(jax.tree_util.tree_leaves, (state.params, before)), strict=True)
        ]

    for whole, half in zip(weights(np.float32(1.0)), weights(np.float32(0.5)), strict=True):
        np.testing.assert_allclose(half, 0.5 * whole, rtol=1e-4, atol=1e-7)


def test_frozen_weights_keep_their_bits_into_the_model(recipe, data, saved, tmp_path):
    trainer = Trainer(recipe, data, tmp_path)
    names = list(trainer.state.params["params"])
    frozen = changed(recipe, optimizer={"factors": {f"params/{names[0]}": 0.0}})
    trainer = Trainer(frozen, data, tmp_path)
    before = np.asarray(trainer.state.params["params"][names[0]])
    saved.clear()
    trainer.run()
    after = saved[-1][1].params["params"]
    np.testing.assert_array_equal(after[names[0]], before)
    assert any(np.any(after[n] != np.asarray(trainer.state.params["params"][n])) for n in names[1:])


def test_schedules_to_the_end_end_with_the_training(recipe, data, tmp_path):
    whole = changed(
        recipe, optimizer={"transition_steps": "to the end", "final_learning_rate": 0.0}
    )
    Trainer(whole, data, tmp_path).run()
    assert float(rows(tmp_path)[-1]["learning_rate"]) == pytest.approx(0.0, abs=1e-9)
    assert float(rows(tmp_path)[-2]["learning_rate"]) > 1e-4


def test_rows_that_an_earlier_version_did_not_know_are_no_difference(recipe, data, tmp_path):
    now = identify(recipe, data)
    old = {**now, "optimizer": dict(now["optimizer"]), "train": dict(now["train"])}
    del old["optimizer"]["schedule"], old["optimizer"]["factors"], old["train"]["patience"]
    check_same(old, now, tmp_path, allow_changes=False)
    other = identify(changed(recipe, optimizer={"factors": {"*": 0.5}}), data)
    with pytest.raises(CheckpointError, match=r"optimizer.factors"):
        check_same(old, other, tmp_path, allow_changes=False)


def test_what_a_training_never_comes_to_is_said_at_its_start(recipe, data, tmp_path):
    short = changed(recipe, train={"epochs": FLIP - 1})
    Trainer(short, data, tmp_path).run()
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    told = [line for line in lines if "Warning: loss." in line]
    assert len(told) == 2
    assert f"1000 from epoch {FLIP} on is never reached; train.epochs is {FLIP - 1}" in told[0]
    assert lines.index(told[1]) < next(k for k, line in enumerate(lines) if "epoch    0" in line)


def test_a_training_that_learned_nothing_says_so(recipe, data, tmp_path, saved):
    nothing = {f"{name}_learning_rate": 1e-30 for name in ("init", "peak", "final")}
    trainer = Trainer(changed(recipe, optimizer=nothing, train={"epochs": 1}), data, tmp_path)
    trainer.state = dataclasses.replace(
        trainer.state, params=jax.tree_util.tree_map(lambda p: 50.0 * p, trainer.state.params)
    )
    outcome = trainer.run()
    assert outcome.status == "done"
    assert "forces of zero would be" in outcome.problem
    assert outcome.problem in (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert (tmp_path / "model.safetensors").exists()


def test_a_step_that_does_not_fit_names_the_row_to_change(recipe, data, tmp_path):
    def full(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    trainer = Trainer(recipe, data, tmp_path)
    trainer.train_step = full
    with pytest.raises(CapacityError, match=r"steps of 8 structures .* lower data.batch_size"):
        trainer.run()


def test_steps_that_cannot_fit_are_refused_before_the_first(recipe, data, tmp_path, monkeypatch):
    little = DeviceMemory(2**14, 2**14, "a small device")
    monkeypatch.setattr(devices, "device_memory", lambda _: little)
    trainer = Trainer(recipe, data, tmp_path)
    before = trainer.state.params
    with pytest.raises(CapacityError, match=r"steps of 8 structures .* need about .* lower data"):
        trainer.run()
    assert trainer.state.params is before


def test_long_epochs_are_told_with_the_time_left(recipe, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TELL_AFTER", 0.0)
    Trainer(recipe, data, tmp_path).run()
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert re.search(r"epoch    2  batch 3 of 6; \d+:\d\d:\d\d to the end of epoch 4", log)


def test_other_versions_than_before_are_told(recipe, data, tmp_path):
    stop_at_step(Trainer(recipe, data, tmp_path), 3)
    path = tmp_path / "environment.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    values["packages"]["jax"] = "0.1"
    path.write_text(json.dumps(values), encoding="utf-8")
    Trainer(recipe, data, tmp_path).run()
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert f"other versions than before: jax 0.1 -> {jax.__version__}\n" in log


def test_a_finished_run_leaves_the_errors_of_its_test_part_and_a_card(finished, data):
    """Those of the weights in the model file, in the outcome, the log and the card."""
    trainer, outcome, models = finished
    params = models[-1][1].params
    errors = evaluate_store(trainer.eval_step, params, data.test, data.budget)
    assert outcome.test["structures"] == len(data.test)
    assert outcome.test["forces_rmse"] == pytest.approx(errors["forces_rmse"], rel=1e-5)
    shown = f"{1000 * errors['forces_rmse']:.2f} meV/Å"
    log = (trainer.folder / "log.txt").read_text(encoding="utf-8")
    [line] = [line for line in log.splitlines() if "test errors of" in line]
    assert shown in line
    card = (trainer.folder / "card.md").read_text(encoding="utf-8")
    assert card.startswith("# small\n")
    for text in (
        f"| test | {len(data.test)} |", f"{1000 * errors['forces_rmse']:.3f} |",
        f"| validation | {len(data.validation)} |", "By element, test", "fitted to the data",
        "MLIPCalculator", "createSystem", "energy 40 from epoch 1, 1000 from epoch 3",
    ):  # fmt: skip
        assert text in card
    assert "report/" not in card


@pytest.mark.parametrize(("first", "told"), [(0.1, True), (9.0, False)])
def test_a_better_model_of_an_earlier_stage_is_told(first, told, recipe, data, tmp_path):
    trainer = Trainer(changed(recipe, train={"epochs": 3}), data, tmp_path)
    stop_at_step(trainer, 17)  # in the last epoch
    trainer = Trainer(changed(recipe, train={"epochs": 3}), data, tmp_path)
    score = trainer._score
    trainer._score = lambda errors: 1.0 if trainer.progress.epoch == 3 else score(errors)
    take_up = trainer._take_up

    def with_other_best(state, saved):
        take_up(state, saved)
        trainer.progress.best["1"]["score"] = first

    trainer._take_up = with_other_best
    trainer.run()
    log = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert ("stage 1 had a better one by its score, 0.1 eV/Å" in log) == told
    assert ("best-stage1.safetensors" in log) == told


# Validation sets with names


def with_sets(recipe, folder, **sections):
    """The recipe with two validation sets of other molecules and nothing else to validate on."""
    sets = {}
    for seed, name in ((11, "near"), (12, "far-off")):
        sets[name] = str(write_data_set(folder / f"{name}.hdf5", count=9, seed=seed))
    return changed(recipe, data={"validation": sets, "test": None}, **sections)


def test_sets_are_judged_apart_and_one_of_them_chooses_the_best_model(
    recipe, saved, tmp_path, monkeypatch
):
    chosen = with_sets(recipe, tmp_path, train={"select_by": "far-off", "epochs": 2})
    data = load_data(chosen)
    trainer, saved[:] = Trainer(chosen, data, tmp_path / "run"), []
    assert trainer.run().status == "done"
    params = averaged_params(trainer.state, chosen.train.ema_decay)
    last = rows(tmp_path / "run")[-1]
    squares = 0.0
    for name, store in data.sets().items():
        errors = evaluate_store(trainer.eval_step, params, store, data.budget)
        for error, value in errors.items():
            assert float(last[f"validation_{name}_{error}"]) == pytest.approx(value, rel=1e-6)
        squares += errors["forces_rmse"] ** 2 * store.num_atoms.sum()
        if name == "far-off":
            score = errors["forces_rmse"] + 10.0 * errors["energy_rmse_per_atom"]
            assert float(last["score"]) == pytest.approx(score, rel=1e-6)
        report = tmp_path / "run" / "report" / f"errors-validation-{name}.json"
        assert json.loads(report.read_text())["overall"]["structures"] == 9
    whole = (squares / data.validation.num_atoms.sum()) ** 0.5
    assert float(last["validation_forces_rmse"]) == pytest.approx(whole, rel=1e-6)
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert len(re.findall(r"  far-off: energy +[\d.]+ meV/atom", log)) == 3
    training = saved[-1][1].info["training"]
    best = rows(tmp_path / "run")[training["epoch"]]
    found = training["validation_sets"]["near"]["forces_rmse"]
    assert found == pytest.approx(float(best["validation_near_forces_rmse"]))
    card = (tmp_path / "run" / "card.md").read_text(encoding="utf-8")
    error = 1000 * training["validation_sets"]["near"]["energy_mae_per_atom"]
    assert f"| validation, near | 9 | {error:.3f} |" in card


def test_sets_change_nothing_in_the_steps_and_count_in_the_fingerprint(recipe, tmp_path):
    named = with_sets(recipe, tmp_path)
    paths = list(named.data.validation.values())
    plain = changed(named, data={"validation": paths})
    first, second = load_data(named), load_data(plain)
    assert not second.validation_sets
    assert first.fingerprint != second.fingerprint
    np.testing.assert_array_equal(first.validation.energy, second.validation.energy)
    trainers = [Trainer(r, d, tmp_path / n) for r, d, n in
                ((named, first, "named"), (plain, second, "plain"))]  # fmt: skip
    for trainer in trainers:
        trainer.run()
    assert fingerprint(trainers[0]) == fingerprint(trainers[1])
    for one, other in zip(rows(tmp_path / "named"), rows(tmp_path / "plain"), strict=True):
        assert float(one["score"]) == pytest.approx(float(other["score"]), rel=1e-5)


def test_a_set_that_is_not_there_cannot_choose(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"select_by is farr, .*; it has only near, far-off"):
        load_data(with_sets(recipe, tmp_path, train={"select_by": "farr"}))
    with pytest.raises(ConfigError, match=r"select_by is near, .*; it names none: {NAME: FILE}"):
        load_data(changed(recipe, train={"select_by": "near"}))


def test_a_run_keeps_the_shape_of_its_batches(recipe, tmp_path):
    """Where the recipe leaves it open, whatever this version would measure."""
    free = changed(recipe, data={"max_n_node": None, "max_n_edge": None})
    data = load_data(free)
    other = dataclasses.replace(data, budget=dataclasses.replace(data.budget, n_node=99))
    stop_at_step(Trainer(free, other, tmp_path), 3)
    again = Trainer(free, data, tmp_path)
    assert again.data.budget == other.budget
    assert again.run().status == "done"
    smaller = changed(free, data={"batch_size": 4})
    with pytest.raises(CheckpointError, match=r"differing: data\.batch_size"):
        Trainer(smaller, load_data(smaller), tmp_path).run()


def test_the_fill_of_batches_is_told(finished, data):
    log = (finished[0].folder / "log.txt").read_text(encoding="utf-8")
    sizes = data.train.num_atoms.sum() / (STEPS * data.budget.n_node)
    assert f"6 batches of 8 structures, at most 8, {100 * sizes:.0f} % of the nodes" in log
