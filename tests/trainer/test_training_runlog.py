"""The records of a run after a crash or a full disk."""

import os

import pytest

from mlip_md.errors import OutputError
from mlip_md.trainer.runlog import RunLog

ROWS = [{"epoch": k, "step": 6 * k, "loss": 0.5 / (k + 1), "seconds": float("nan")} for k in (0, 1)]


def columns(log):
    return [(row["epoch"], row["step"], row["loss"]) for row in log.rows()]


EXPECTED = [(0, 0, 0.5), (1, 6, 0.25)]


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path)
    for row in ROWS:
        log.epoch(row)
    return log


def test_rows_come_back(log):
    assert columns(log) == EXPECTED
    log.truncate(6, 0)
    assert columns(log) == EXPECTED[:1]
    log.epoch(ROWS[1])
    assert columns(log) == EXPECTED


@pytest.mark.parametrize("content", ["", "\n"])
def test_an_empty_table_gets_its_header_back(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    log = RunLog(tmp_path)
    assert log.rows() == []
    log.truncate(0, -1)
    for row in ROWS:
        log.epoch(row)
    assert columns(log) == EXPECTED


@pytest.mark.parametrize("torn", ["2,12,0.1", "2,12,0.1,3,4", "2", "\0\0\0\0", "x,1,2,3"])
def test_a_torn_row_is_no_row(log, torn):
    with open(log.metrics, "a", encoding="utf-8") as stream:
        stream.write(torn)
    assert columns(log) == EXPECTED
    log.truncate(6, 5)
    log.epoch({**ROWS[1], "epoch": 2})
    assert columns(log) == [*EXPECTED, (2, 6, 0.25)]


def test_a_table_without_header_begins_anew(log):
    log.metrics.write_text(log.metrics.read_text(encoding="utf-8").split("\n", 1)[1])
    assert log.rows() == []
    log.truncate(6, 1)
    log.epoch(ROWS[1])
    assert columns(log) == EXPECTED[1:]


def test_a_full_disk_while_dropping_rows_keeps_the_old_ones(log, monkeypatch):
    before = log.metrics.read_bytes(), log.events.read_bytes()

    def full(_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        log.truncate(0, 0)
    assert (log.metrics.read_bytes(), log.events.read_bytes()) == before
