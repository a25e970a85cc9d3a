"""A training that is killed again and again, at any moment, ends with the bits of a whole one."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from training_cases import small_recipe, write_data_set

KILLS, EPOCHS, STEPS = 20, 60, 4

TRAINING = """
import os, signal, sys, threading, time
from pathlib import Path
from pair_potential import PairNetwork
from mlip_md.trainer import load_recipe, load_data, train
from mlip_md.trainer.checkpoint import leaves_by_path, state_hash

recipe, folder, at, delay = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
train.build_network = lambda *_, num_species, cutoff, **__: PairNetwork(num_species, cutoff)
train.own.save = lambda potential, path: path.write_bytes(b"a model")
train.Trainer._finish = lambda self: None  # card and report are of the model file
recipe = load_recipe(recipe)[0]
trainer = train.Trainer(recipe, load_data(recipe), folder)
step, count = trainer.train_step, 0

def kill():
    time.sleep(delay)
    os.kill(os.getpid(), signal.SIGKILL)

def counted(*arguments):
    global count
    count += 1
    if count == at:
        threading.Thread(target=kill).start()
    return step(*arguments)

trainer.train_step = counted
trainer.run()
print(state_hash(leaves_by_path(trainer.state)), flush=True)
"""


def train(path, folder, at=0, delay=0.0):
    """What a run prints; killed some time (s) after its step of this number begins."""
    tests = Path(__file__).parents[1]
    python = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", TRAINING, str(path), str(folder), str(at), str(delay)],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": python},
    )  # fmt: skip


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    path = tmp_path / "train.yaml"
    recipe = small_recipe(
        write_data_set(tmp_path / "set.hdf5", count=40), train={"epochs": EPOCHS},
        checkpoint={"every_steps": 3},
    )  # fmt: skip
    path.write_text(json.dumps(recipe.plain()), encoding="utf-8")
    straight = train(path, tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    random, killed = np.random.default_rng(0), 0
    for _ in range(KILLS):
        ended = train(path, tmp_path / "run", random.integers(1, 14), random.uniform(0, 0.1))
        assert ended.returncode in (0, -signal.SIGKILL), ended.stderr
        killed += ended.returncode != 0
    assert killed == KILLS
    last = train(path, tmp_path / "run")
    assert last.stdout == straight.stdout
    tables = []
    for name in ("straight", "run"):
        with open(tmp_path / name / "metrics.csv", newline="") as stream:
            tables.append(list(csv.DictReader(stream)))
    timed = ("seconds", "structures_per_second")
    for one, other in zip(*tables, strict=True):
        assert [v for k, v in one.items() if k not in timed] == [
            v for k, v in other.items() if k not in timed
        ]
    assert len(tables[0]) == EPOCHS + 1
    with open(tmp_path / "run" / "events.jsonl", encoding="utf-8") as stream:
        steps = [json.loads(line) for line in stream]
    noted = [event["step"] for event in steps if event["event"] == "step"]
    assert noted == list(range(2, EPOCHS * STEPS + 1, 2))
