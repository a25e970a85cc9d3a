"""Signals and the time limit end a training soon, also while nothing in Python can run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pair_potential import PairNetwork
from training_cases import small_recipe, write_data_set

from mlip_md.trainer import train
from mlip_md.trainer.checkpoint import leaves_by_path, state_hash
from mlip_md.trainer.data import load_data
from mlip_md.trainer.train import Trainer

WAITING = """
import signal, sys, threading, time
from mlip_md.signals import ENDINGS, Interruptions, ending_process

kind, value, patient = sys.argv[1], float(sys.argv[2]), sys.argv[3] == "patient"
begun = time.monotonic()
watch = ending_process(
    lambda: kind != "unsaved" or time.monotonic() - begun > value,
    lambda: print("cleaned", flush=True),
    max_seconds=value if kind == "limit" else float("inf"),
    grace=0.2 if patient else 3.0,  # time to answer, on a busy machine too
)
with Interruptions(*ENDINGS, patient=patient), watch:
    if kind == "left":
        sys.exit(7)
    try:
        print("ready", flush=True)  # the signal may be here before the next line is
        threading.Lock().acquire() and threading.Event().wait()  # answers to nothing
    except KeyboardInterrupt:
        print("stopped", flush=True)
        if kind == "itself":
            raise
        threading.Event().wait()
"""


def start(*arguments, code=WAITING):
    folders = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
    path = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    return process


def say(process, until):
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if until in line:
            return lines
    raise AssertionError(f"no {until}: {lines} {process.stderr.read()}")


@pytest.mark.parametrize(
    ("name", "code"), [("SIGTERM", 75), ("SIGHUP", 75), ("SIGINT", 130), (None, 75)]
)
def test_work_that_answers_to_nothing_is_ended(name, code, interruptible):
    process = start("limit" if name is None else "", 1.0, "patient")
    say(process, "ready")
    if name is not None:
        process.send_signal(signal.Signals[name])
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code
    assert output == "cleaned\n"
    assert f"{name or 'the time limit'} ended the work" in errors


def test_nothing_is_ended_that_would_be_lost(interruptible):
    process = start("unsaved", 3.0, "patient")
    say(process, "ready")
    begun = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert time.monotonic() - begun > 2.0


@pytest.mark.parametrize(("kind", "cleaned"), [("itself", False), ("", True)])
def test_work_that_answers_ends_by_itself(kind, cleaned, interruptible):
    """Where it does not come to its end after all, the watch does it."""
    process = start(kind, 0, "impatient")
    say(process, "ready")
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=60)
    assert output.splitlines() == ["stopped", "cleaned"][: 1 + cleaned]
    assert (process.returncode == 75) == cleaned
    assert ("StoppedError" in errors) == (not cleaned)


def test_work_that_is_left_is_watched_no_more(interruptible):
    process = start("left", 0, "patient")
    process.communicate(timeout=60)
    assert process.returncode == 7


TRAINING = """
import sys, threading
from pathlib import Path
from pair_potential import PairNetwork
from mlip_md.cli import main
from mlip_md.trainer import train

train.build_network = lambda config, num_species, cutoff, **_: PairNetwork(num_species, cutoff)
where, recipe, folder = sys.argv[1:]
make, count = getattr(train, f"make_{where}_step"), 0

def stuck(*arguments, **options):
    step = make(*arguments, **options)
    def wait(*given):
        global count
        count += 1
        if (where, count) in (("train", 1), ("eval", 2)):
            print("stuck", flush=True)
            threading.Event().wait()
        return step(*given)
    return wait

setattr(train, f"make_{where}_step", stuck)
sys.argv = ["mlip-md", "train", recipe, "--run", folder]
main()
"""


@pytest.mark.parametrize("where", ["train", "eval"])
def test_a_training_that_compiles_ends_with_its_state_saved(where, tmp_path, interruptible):
    """The first step stands for its compilation, the second validation for a long one."""
    path = tmp_path / "train.yaml"
    recipe = small_recipe(write_data_set(tmp_path / "set.hdf5", count=40))
    path.write_text(json.dumps({**recipe.plain(), "train": {"epochs": 1}}), encoding="utf-8")
    process = start(where, path, tmp_path / "run", code=TRAINING)
    say(process, "stuck")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    names = {file.name for file in (tmp_path / "run").iterdir()}
    assert ".owner.json" not in names  # for a queue may start it on another host at once
    newest = max((tmp_path / "run" / "checkpoints").iterdir()).name
    assert newest == f"step-{0 if where == 'train' else 4:09d}.safetensors"


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        models = []
        patch.setattr(train, "build_network", lambda *_, **__: PairNetwork(3, 4.0))
        patch.setattr(train.own, "save", lambda potential, path: models.append(potential))
        patch.setattr(train.own, "load", lambda path: models[-1])
        yield patch


def test_long_steps_and_validations_find_everything_saved(patched, tmp_path):
    """So that a process may be ended in one of them; the weights are the same bits."""
    recipe = small_recipe(write_data_set(tmp_path / "set.hdf5", count=40))
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 2})})
    data, found, states = load_data(recipe), {}, []
    for slow in (0.0, 1e9):
        patched.setattr(train, "SLOW", slow)
        trainer = Trainer(recipe, data, tmp_path / f"run-{slow}")
        for name in ("train_step", "eval_step"):
            noting(trainer, name, found.setdefault((slow, name), []))
        trainer.run()
        states.append(state_hash(leaves_by_path(trainer.state)))
    assert states[0] == states[1]
    assert not any(found[0.0, "train_step"])
    assert not any(found[0.0, "eval_step"])
    assert any(found[1e9, "train_step"])


def noting(trainer, name, found):
    step = getattr(trainer, name)

    def asked(*arguments):
        found.append(trainer.unsaved)
        return step(*arguments)

    setattr(trainer, name, asked)
