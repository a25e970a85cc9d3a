"""Rows of epochs in TensorBoard's files and in Weights & Biases."""

import struct
import sys
from types import SimpleNamespace

import pytest
from training_cases import small_recipe

from mlip_md.errors import ConfigError
from mlip_md.trainer.loggers import open_loggers

ROW = {"epoch": 3, "step": 18, "loss": 0.25, "score": float("nan")}


def recipe_with(**log):
    return small_recipe("set.hdf5", log=log)


def scalars(folder):
    """(step, name, value) of TensorBoard's event files: framed protocol buffers."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    found = []
    for path in sorted(folder.glob("events.*")):
        content, place = path.read_bytes(), 0
        while place < len(content):
            (length,) = struct.unpack_from("<Q", content, place)
            event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            place += length + 16
    return found


def test_nothing_is_opened_unasked(tmp_path):
    with open_loggers(recipe_with(), tmp_path, 0) as loggers:
        assert loggers == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_has_the_numbers_of_the_row(tmp_path):
    pytest.importorskip("tensorboardX")
    with open_loggers(recipe_with(tensorboard=True), tmp_path, 0) as [log]:
        log(ROW)
    assert set(scalars(tmp_path / "tensorboard")) == {
        (18, "epoch", 3.0), (18, "step", 18.0), (18, "loss", 0.25)
    }  # fmt: skip


def test_wandb_has_one_run_for_a_folder(tmp_path, monkeypatch):
    begun, logged, ended = [], [], []

    def init(**options):
        begun.append(options)
        return SimpleNamespace(
            log=lambda row, step: logged.append((step, row)), finish=lambda: ended.append(True)
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for _ in range(2):
        with open_loggers(recipe_with(wandb="mine"), tmp_path, 0) as [log]:
            log(ROW)
    assert ended == [True, True]
    assert begun[0] == begun[1]
    assert begun[0]["project"] == "mine"
    assert begun[0]["resume"] == "allow"
    assert begun[0]["config"]["train"]["epochs"] == 4
    assert logged == 2 * [(18, {"epoch": 3.0, "step": 18.0, "loss": 0.25})]


@pytest.mark.parametrize(("row", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_named_with_what_to_install(row, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    value = True if row == "tensorboard" else "mine"
    with pytest.raises(ConfigError, match=rf"log.{row} needs {package}.*mlip-md\[{row}\]"):
        open_loggers(recipe_with(**{row: value}), tmp_path, 0).__enter__()
