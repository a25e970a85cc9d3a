"""One owner at a time, whatever happened to the last one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mlip_md import ownership
from mlip_md.errors import OutputError, OwnershipError
from mlip_md.files import temporary_name
from mlip_md.ownership import FILE, owning

HOLD = """
import sys, time
from pathlib import Path
from mlip_md.ownership import owning
with owning(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that owns the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "mine\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_nothing_is_left(tmp_path):
    for _ in range(2):
        with owning(tmp_path):
            assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
        assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_was_writing_is_removed(tmp_path):
    """Old temporary files and folders of ours go; fresh ones and those of others stay."""
    (tmp_path / "checkpoints").mkdir()
    old = [tmp_path / temporary_name("log.csv"), tmp_path / "checkpoints" / temporary_name("step")]
    fresh = [tmp_path / temporary_name("summary.json"), tmp_path / FILE]
    others = [tmp_path / ".notes.tmp", tmp_path / "a.0123456789ab.tmp", tmp_path / ".bashrc"]
    old[1].mkdir()
    (old[1] / "weights").touch()
    for path in (old[0], fresh[0], *others):
        path.touch()
    for path in (*old, *others):
        os.utime(path, times=(0, time.time() - 2 * ownership.DEAD_SECONDS))
    with owning(tmp_path):
        assert [path.exists() for path in old] == [False, False]
        assert all(path.exists() for path in (*fresh, *others))


def test_the_second_one_says_so(tmp_path, holder):
    message = f"in use by process {holder.pid} on {socket.gethostname()}; wait"
    with pytest.raises(OwnershipError, match=message), owning(tmp_path):
        pass
    assert (tmp_path / FILE).exists()


def test_a_second_one_in_the_same_process(tmp_path):
    with owning(tmp_path), pytest.raises(OwnershipError), owning(tmp_path):
        pass


def test_a_killed_owner_owns_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / FILE).exists()
    with owning(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()


def other_host(tmp_path, seconds):
    """An owner elsewhere that was last heard of some seconds ago."""
    file = tmp_path / FILE
    file.write_text(json.dumps({"host": "node17", "pid": 1, "start": None, "token": "a"}))
    then = time.time() - seconds
    os.utime(file, (then, then))


def test_another_host_counts_while_it_is_heard_of(tmp_path):
    other_host(tmp_path, 30)
    said = r"process 1 on node17.* [3-5]\d s ago"
    with pytest.raises(OwnershipError, match=said), owning(tmp_path):
        pass
    other_host(tmp_path, ownership.DEAD_SECONDS + 10)
    with owning(tmp_path):
        pass


def test_an_owner_is_heard_of(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership, "TOUCH_SECONDS", 0.01)
    with owning(tmp_path):
        os.utime(tmp_path / FILE, (0, 0))
        for _ in range(500):
            if (tmp_path / FILE).stat().st_mtime > 0:
                break
            time.sleep(0.01)
        else:
            pytest.fail("the owner does not touch its file")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x", "host": "%s"}'])
def test_a_torn_owner_file_is_nobodys(tmp_path, text):
    (tmp_path / FILE).write_text(text.replace("%s", socket.gethostname()))
    with owning(tmp_path):
        pass


def test_a_process_number_used_again_is_another_process(tmp_path):
    owner = {"host": socket.gethostname(), "pid": os.getppid(), "start": "-1", "token": "a"}
    (tmp_path / FILE).write_text(json.dumps(owner))
    with owning(tmp_path):
        pass


def test_a_folder_that_is_gone(tmp_path):
    with pytest.raises(OutputError, match="no folder"), owning(tmp_path / "gone"):
        pass


def test_whoever_was_robbed_leaves_the_robbers_file(tmp_path):
    with owning(tmp_path):
        (tmp_path / FILE).write_text("another's")
    assert (tmp_path / FILE).read_text() == "another's"


def test_of_many_at_once_one_gets_it(tmp_path):
    """Also when all find the same dead owner."""
    code = HOLD.replace("time.sleep(60)", "sys.stdin.read()")
    for _ in range(3):
        (tmp_path / FILE).write_text("torn")
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", code, str(tmp_path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )
            for _ in range(4)
        ]  # fmt: skip
        said = [process.stdout.readline() for process in processes]
        for process in processes:
            process.communicate("")
        assert said.count("mine\n") <= 1
    assert not (tmp_path / FILE).exists() or "torn" not in (tmp_path / FILE).read_text()
