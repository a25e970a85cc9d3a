"""Training on several devices and in several processes: the numbers of one, and one end for all."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from pair_potential import PairNetwork
from training_cases import small_recipe, write_data_set

import mlip_md
from mlip_md import errors
from mlip_md.errors import ConfigError, DataError
from mlip_md.potential import predict
from mlip_md.trainer import load_recipe
from mlip_md.trainer.data import Shares, iterate_parts, load_data, prepared, store
from mlip_md.trainer.data.shares import divide, share_budget
from mlip_md.trainer.loss import batch_loss, weights_at
from mlip_md.trainer.parallel import Place, Team, find_place
from mlip_md.trainer.train import IN_FLIGHT

EPOCHS, STEPS = 8, 7
"""Of the recipe below; batches hold 7 or 6 structures, so parts of two devices are uneven."""

TRAINING = """
import json, os, signal, sys
from pair_potential import PairNetwork
from mlip_md import cli
from mlip_md.trainer import train
from mlip_md.trainer.checkpoint import leaves_by_path, state_hash

act, at = os.environ.get("TEST_ACT", ":0").split(":")
train.build_network = lambda *_, num_species, cutoff, **__: PairNetwork(num_species, cutoff)
train.own.save = lambda potential, path: path.write_bytes(b"a model")
train.Trainer._finish = lambda self: train.Outcome("done", self.folder, 0, {})
step, run, count = train.Trainer.step, train.Trainer.run, 0

def acting(self, *arguments):
    global count
    count += 1
    if act == "NAN" and count in (int(at), int(at) + 1):
        batch, weights, *others = arguments
        arguments = batch, weights._replace(energy=weights.energy * float("nan")), *others
    elif count == int(at):
        os.kill(os.getpid(), getattr(signal, act))
    return step(self, *arguments)

def telling(self, *arguments):
    outcome = run(self, *arguments)
    digest = state_hash(leaves_by_path(self.state))
    os.write(1, f"ENDED {outcome.status} {self.progress.step} {digest}\\n".encode())
    return outcome

train.Trainer.step, train.Trainer.run = acting, telling
*first, last = json.loads(sys.argv[1])
for arguments in first:
    sys.argv = ["mlip-md", "train", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 0
sys.argv = ["mlip-md", "train", *last]
cli.main()
"""

TESTS = Path(__file__).parents[1]
DEADLINE = 300


def start(*runs, devices=1, act=""):
    """A process of one or several ``mlip-md train``; "SIGTERM:7" is sent before its 7th step.

    "NAN:7" spoils its 7th and 8th.
    """
    folders = Path(mlip_md.__file__).parents[1], TESTS, os.environ.get("PYTHONPATH", "")
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    if act:
        environment["TEST_ACT"] = act
    arguments = json.dumps([[str(word) for word in run] for run in runs])
    return subprocess.Popen(
        [sys.executable, "-c", TRAINING, arguments],
        text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


class Ended:
    """How a process ended: its code, what it printed, and status, step and hash of its runs."""

    def __init__(self, process):
        self.out, self.err = process.communicate(timeout=DEADLINE)
        self.code = process.returncode
        lines = self.out.splitlines()
        self.runs = [line.split()[1:] for line in lines if line.startswith("ENDED")]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_together(*arguments, acts=("", "")):
    """Two processes of one training, of one device each."""
    place = "--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process-number"
    processes = [start([*arguments, *place, k], act=act) for k, act in enumerate(acts)]
    try:
        return [Ended(process) for process in processes]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.kill()


def steps(folder):
    """Loss and norm of the gradient of every step, (n, 2)."""
    with open(folder / "events.jsonl", encoding="utf-8") as stream:
        events = [json.loads(line) for line in stream]
    return np.array([(e["loss"], e["norm"]) for e in events if e["event"] == "step"])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """In float64, on chains of 3 to 7 atoms: the file of the recipe."""
    folder = tmp_path_factory.mktemp("parallel")
    recipe = small_recipe(
        write_data_set(folder / "set.hdf5"), data={"batch_size": 7, "max_n_node": 8},
        train={"epochs": EPOCHS, "precision": "float64"}, log={"every_steps": 1},
    )  # fmt: skip
    path = folder / "train.yaml"
    path.write_text(json.dumps(recipe.plain()), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(recipe, tmp_path_factory):
    """One process with two devices: runs on one, on both, on both and then on one; accumulated."""
    folder = tmp_path_factory.mktemp("alone")
    accumulated = "--set", "optimizer.num_gradient_accumulation_steps=3"
    early = [recipe, "--run", folder / "moved", "--set", "train.epochs=4", "--devices", 2]
    process = start(
        [recipe, "--run", folder / "one"],
        [recipe, "--run", folder / "two", "--devices", "all"],
        early,
        [recipe, "--run", folder / "moved"],
        [recipe, "--run", folder / "one-of-3", *accumulated],
        [recipe, "--run", folder / "two-of-3", *accumulated, "--devices", 2],
        devices=2,
    )
    ended = Ended(process)
    assert ended.code == 0, ended.err
    return folder, ended


def test_two_devices_give_the_losses_of_one(alone):
    folder, ended = alone
    assert "one of 2 devices trains; --devices all uses all" in ended.out
    assert "2 devices of 1 processes divide every batch" in ended.out
    expected = steps(folder / "one")
    assert len(expected) == EPOCHS * STEPS > 50
    np.testing.assert_allclose(steps(folder / "two"), expected, rtol=1e-9)
    accumulated = steps(folder / "one-of-3")
    assert abs(accumulated / expected - 1).max() > 1e-3
    np.testing.assert_allclose(steps(folder / "two-of-3"), accumulated, rtol=1e-9)


def test_a_checkpoint_of_two_devices_goes_on_with_one(alone):
    folder, ended = alone
    assert f"resumed at epoch 5, step {4 * STEPS}" in ended.out
    assert [run[:2] for run in ended.runs[2:4]] == [["done", "28"], ["done", "56"]]
    found, two = steps(folder / "moved"), steps(folder / "two")
    np.testing.assert_array_equal(found[: 4 * STEPS], two[: 4 * STEPS])
    np.testing.assert_allclose(found, steps(folder / "one"), rtol=1e-9)


def test_one_of_two_processes_is_killed_and_the_run_goes_on(recipe, alone, tmp_path):
    """To the bits of two devices in one process; only one process writes and speaks."""
    folder, expected = alone
    run = recipe, "--run", tmp_path / "run"
    killed = train_together(*run, acts=("", "SIGKILL:21"))
    assert [process.code for process in killed] == [75, -signal.SIGKILL], killed[0].err
    assert "another process of this training ended" in killed[0].err.splitlines()[-1]
    rest = train_together(*run)
    assert [process.code for process in rest] == [0, 0], rest[0].err + rest[1].err
    assert [process.runs for process in rest] == [expected.runs[1:2]] * 2
    np.testing.assert_array_equal(steps(tmp_path / "run"), steps(folder / "two"))
    assert "resumed at epoch 3, step 20" in rest[0].out
    ours = [line for line in rest[1].out.splitlines() if not line.startswith("[Gloo]")]
    assert ours == [f"ENDED {' '.join(rest[1].runs[0])}"]


@pytest.mark.slow
def test_process_0_is_killed(recipe, tmp_path):
    ended = train_together(recipe, "--run", tmp_path / "run", acts=("SIGKILL:21", ""))
    assert [process.code for process in ended] == [-signal.SIGKILL, 75], ended[1].err
    assert "another process of this training ended" in ended[1].err.splitlines()[-1]


@pytest.mark.slow
def test_a_process_that_is_silent_is_lost(recipe, tmp_path):
    """Stopped, not ended: its connections stay open, and only its heart is missed."""
    place = "--coordinator", f"127.0.0.1:{free_port()}", "--processes", 2, "--process-number"
    run = recipe, "--run", tmp_path / "run", *place
    waiting, silent = start([*run, 0]), start([*run, 1], act="SIGSTOP:21")
    try:
        ended = Ended(waiting)
    finally:
        silent.kill()
    assert ended.code == 75, ended.err
    assert "another process of this training ended" in ended.err.splitlines()[-1]


@pytest.mark.slow
def test_a_signal_to_one_process_ends_all_after_the_same_step(recipe, alone, tmp_path):
    run = recipe, "--run", tmp_path / "run"
    ended = train_together(*run, acts=("", "SIGTERM:20"))
    assert [process.code for process in ended] == [75, 75], ended[0].err + ended[1].err
    stopped = 21 + IN_FLIGHT  # what the 20th step takes is made before the signal comes
    assert [process.runs[0][:2] for process in ended] == 2 * [["terminated", str(stopped)]]
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:09d}.safetensors").exists()
    assert [process.runs for process in train_together(*run)] == [alone[1].runs[1:2]] * 2


@pytest.mark.slow
def test_bad_steps_take_all_processes_back_together(recipe, tmp_path):
    """With steps in flight behind the bad ones; as one process does that waits for each."""
    rows = "--set", "faults.max_bad_steps_in_row=2"
    spoiled = "NAN:17"
    both = train_together(recipe, "--run", tmp_path / "both", *rows, acts=(spoiled, spoiled))
    assert [process.code for process in both] == [0, 0], both[0].err + both[1].err
    alone = Ended(
        start([recipe, "--run", tmp_path / "alone", *rows, "--devices", 2], devices=2, act=spoiled)
    )
    assert "Back to step 16" in both[0].out
    assert "Back to step 16" in alone.out
    assert [process.runs for process in both] == [alone.runs] * 2
    np.testing.assert_array_equal(steps(tmp_path / "both"), steps(tmp_path / "alone"))


ERRORS = [
    kind for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, errors.MLIPError)
]  # fmt: skip


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_reaches_the_other_processes(kind, monkeypatch):
    own = kind("there is no tpu", "take cpu") if kind is errors.DeviceError else kind("none")
    sent = []

    def fail():
        raise own

    monkeypatch.setattr(Team, "processes", 2)
    monkeypatch.setattr(Team, "leads", True)
    monkeypatch.setattr(Team, "_from_first", lambda _, content: sent.append(content) or content)
    with pytest.raises(kind):
        Team().first(fail)
    monkeypatch.setattr(Team, "leads", False)
    monkeypatch.setattr(Team, "_from_first", lambda _, content: sent.pop(0))
    with pytest.raises(kind) as found:
        Team().first(fail)
    assert type(found.value) is kind
    assert str(found.value) == str(own)
    assert not sent


@pytest.mark.slow
def test_an_error_of_process_0_is_an_error_of_all(recipe, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step-000000001.safetensors").write_bytes(b"none")
    ended = train_together(recipe, "--run", tmp_path / "run")
    assert ended[0].code == 5
    assert "no checkpoint is usable" in ended[0].err
    assert ended[1].code in (5, 75)  # whichever it hears of first


@pytest.fixture(scope="module")
def data(recipe):
    return load_data(load_recipe(str(recipe))[0])


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_every_structure_is_in_one_part(data, parts):
    plan = data.plan(seed=3, epoch=1)
    divided = [divide(data.train, indices, parts) for indices in plan]
    room = share_budget(data.train, divided, data.budget)
    for indices, batch in zip(plan, divided, strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate(batch)), np.sort(indices))
        counts = [len(part) for part in batch]
        assert max(counts) - min(counts) <= 1
        edges = [data.train.num_edges[part].sum() for part in batch]
        assert max(edges) - min(edges) <= data.train.num_edges[indices].max()
        assert all(sum(data.train.num_atoms[part]) < room.n_node for part in batch)
    if parts == 1:
        assert room == data.budget


def test_processes_make_their_parts_only(data):
    """Also from the middle of an epoch, in the shape of its start."""
    plan = data.plan(seed=3, epoch=1)
    whole = list(iterate_parts(data.train, plan, data.budget, Shares(3, range(3))))
    late = list(iterate_parts(data.train, plan, data.budget, Shares(3, range(1, 3)), done=4))
    assert len(late) == len(whole) - 4
    for (indices, parts), (same, mine) in zip(whole[4:], late, strict=True):
        np.testing.assert_array_equal(indices, same)
        for one, other in zip(parts[1:], mine, strict=True):
            np.testing.assert_array_equal(one.energy, other.energy)
            np.testing.assert_array_equal(one.graph.senders, other.graph.senders)


@pytest.mark.parametrize("count", [2, 8])  # of 8 parts of 7 structures one is empty
def test_parts_add_up_to_the_loss_of_the_whole(recipe, data, count):
    """Also beside replayed structures, of which there are as many parts."""
    loss = load_recipe(str(recipe))[0].loss
    replayed = dataclasses.replace(data, replay=data.validation, replay_budget=data.budget)
    network, weights = PairNetwork(3, 4.0), weights_at(loss, 1)
    params = jax.jit(network.init)(jax.random.key(0), data.example().graph)
    plan = data.plan(seed=3, epoch=1)[:1]

    @jax.jit
    def value(batch):
        return batch_loss(loss, predict(network.apply, params, batch.graph), batch, weights)

    for of in (data, replayed):
        ((_, (whole,)),) = of.batches(plan, 3, 1, replay_weight=0.3)
        ((_, parts),) = of.batches(
            plan, 3, 1, replay_weight=0.3, shares=Shares(count, range(count))
        )
        counts = [part.graph.graph_mask.sum() for part in parts]
        total = sum(n * float(value(part)) for n, part in zip(counts, parts, strict=True))
        assert len(parts) == count
        assert total / sum(counts) == pytest.approx(float(value(whole)), rel=1e-5)


def test_a_process_that_trusts_another_reads_no_array(recipe, data, tmp_path, monkeypatch):
    checked, _ = load_recipe(str(recipe))
    kept = load_data(checked, tmp_path / "prepared")
    for module in (prepared, store):
        monkeypatch.setattr(module, "check_sums", lambda *_: pytest.fail("read"))
    trusting = load_data(checked, tmp_path / "prepared", known=kept.statistics)
    assert trusting.fingerprint == kept.fingerprint == data.fingerprint
    with pytest.raises(DataError, match="all processes of a training must see the run's folder"):
        load_data(checked, tmp_path / "elsewhere", known=kept.statistics)


SLURM = {"SLURM_NTASKS": "4", "SLURM_PROCID": "2"}
STEP = {**SLURM, "SLURM_STEP_NODELIST": "node[1-2]"}
MPI = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize(
    ("given", "environment", "place"),
    [
        ((), {}, None),
        ((), {**SLURM, "SLURM_NTASKS": "1"}, None),
        ((None, 1), SLURM, None),
        ((), STEP, Place(None, 4, 2)),
        (("node1:99",), STEP, Place("node1:99", 4, 2)),
        ((), {**MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:9"}, Place(None, 3, 1)),
        (("node1:99",), MPI, Place("node1:99", 3, 1)),
        (("node1:99", 2, 0), {}, Place("node1:99", 2, 0)),
    ],
)
def test_processes_are_found(given, environment, place):
    assert find_place(*given, environment=environment) == place


@pytest.mark.parametrize(
    ("given", "environment", "advice"),
    [
        ((), SLURM, "srun mlip-md train"),
        ((), MPI, "--coordinator HOST:PORT"),
        (("node1", 2, 0), {}, "HOST:PORT, such as"),
        (("node1:99",), {}, "--processes and --process-number"),
        ((None, 2), {}, "--processes and --process-number"),
        (("node1:99", 2, 2), {}, "from 0 to 1"),
    ],
)
def test_what_is_missing_is_said(given, environment, advice):
    with pytest.raises(ConfigError, match=advice):
        find_place(*given, environment=environment)
