"""Runs that die at random moments, and go on: what they leave is that of a run that was let live.

Each is a process of its own with the bundled potential, as in a shell. One run of each engine dies
again and again on its way; then it dies near its end, once of each signal.
"""

import contextlib
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ase.build import molecule
from md_cases import ENGINES

from mlip_md.integrations.md import files, report, restart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX"),
]

STEPS, INTERVAL = 199, 3
"""The last frame lies between two reports."""

# The restart file is refreshed in each run several times, not every 10 s only.
PROGRAM = """
from mlip_md.cli import main
from mlip_md.integrations.md.observers import TerminalObserver

def begin(self, *progress, told=TerminalObserver.begin):
    from mlip_md.integrations.md import run
    run.RESTART_SECONDS = 0.3
    told(self, *progress)

TerminalObserver.begin = begin
main()
"""

CODES = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 75, "SIGHUP": 75, "SIGINT": 130}
"""How a run of dynamics ends on each signal, when it has begun."""

OF_THE_INVOCATION = {
    "compile_seconds",
    "compilations",
    "run_seconds",
    "run_steps",
    "steps_per_second",
    "ns_per_day",
}
"""Values of a summary that do not tell of the whole run."""


NOHUP = ("sh", "-c", 'trap "" HUP; exec "$@"', "sh")
"""Starts a program as ``nohup`` does."""


@contextlib.contextmanager
def running(arguments, before=()):
    """A process of ``mlip-md md``, which does not outlive the test."""
    child = subprocess.Popen(
        [*before, sys.executable, "-c", PROGRAM, "md", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def end(child):
    """Wait; the exit code and what was said on stderr."""
    told = child.communicate(timeout=300)[1]
    return child.returncode, told


def count_rows(folder):
    """Rows of the log that are there, whole."""
    with contextlib.suppress(FileNotFoundError):
        return max((folder / files.LOG).read_bytes().count(b"\n") - 1, 0)
    return 0


def wait_for_rows(child, folder, number, seconds=math.inf):
    """Wait for rows of the log, so many seconds at most."""
    until = time.monotonic() + seconds
    while child.poll() is None and count_rows(folder) < number and time.monotonic() < until:
        time.sleep(0.002)


class Case:
    """A run that a test lets die."""

    def __init__(self, structure, engine, folder):
        self.new = [structure, "--engine", engine, "--steps", STEPS]
        self.new += ["--report-interval", INTERVAL, "-o", folder]
        self.folder = folder

    def copy(self, folder):
        """The same run in another folder."""
        shutil.copytree(self.folder, folder)
        copied = Case(self.new[0], self.new[2], folder)
        return copied

    @property
    def done(self):
        """Whether the folder is that of a run that has ended well."""
        path = self.folder / report.SUMMARY
        return path.exists() and json.loads(path.read_text())["status"] == "finished"

    def arguments(self):
        """Those of the next process: continue, or begin if there is nothing to go on with."""
        if (self.folder / restart.RESTART).exists():
            return ["--restart", self.folder]
        shutil.rmtree(self.folder, ignore_errors=True)
        return self.new

    def kill(self, name, moment):
        """Run until a moment, send the signal; the exit code and what was said."""
        with running(self.arguments()) as child:
            moment(child)
            child.send_signal(signal.Signals[name])
            return end(child)

    def finish(self):
        """Let the rest of the run live, with hangups that are ignored on purpose."""
        with running(self.arguments(), NOHUP) as child:
            wait_for_rows(child, self.folder, count_rows(self.folder) + 1)
            child.send_signal(signal.SIGHUP)
            code, told = end(child)
        assert code == 0, told


def compare(folder, whole):
    """Nothing in a folder tells that the run died, bit for bit."""
    for name in (files.LOG, files.TRAJECTORY_ASE, files.TOPOLOGY):
        assert (folder / name).read_text() == (whole / name).read_text(), name
    first, second = ((f / files.TRAJECTORIES["dcd"]).read_bytes() for f in (folder, whole))
    # Between the header and the frames stands the time at which the file was made.
    assert first[:90] == second[:90]
    assert first[264:] == second[264:]
    first, second = (restart.read_restart(f / restart.RESTART) for f in (folder, whole))
    assert first[1] == second[1]
    assert first[0].keys() == second[0].keys()
    for name, array in first[0].items():
        np.testing.assert_array_equal(array, second[0][name], err_msg=name)
    first, second = (
        {k: v for k, v in report.read_summary(f).items() if k not in OF_THE_INVOCATION}
        for f in (folder, whole)
    )
    assert first == second
    assert (folder / report.PLOT).read_bytes() == (whole / report.PLOT).read_bytes()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_run_that_dies_at_random_moments_equals_one_that_lives(tmp_path, engine, interruptible):
    random_moments = random.Random(f"moments of {engine}")
    structure = tmp_path / "water.xyz"
    molecule("H2O").write(structure)
    whole = Case(structure, engine, tmp_path / "whole")
    with running(whole.new) as child:
        begin = time.monotonic()
        wait_for_rows(child, whole.folder, 1)
        startup = time.monotonic() - begin
        code, told = end(child)
    assert code == 0, told

    case = Case(structure, engine, tmp_path / "run")
    for name in random_moments.sample(sorted(CODES), len(CODES)):
        rows, wait = count_rows(case.folder) + 3, random_moments.uniform(0.0, startup)

        def moment(child, rows=rows, wait=wait):
            # A later start may be quicker than the first one.
            wait_for_rows(child, case.folder, rows, wait)

        code, told = case.kill(name, moment)
        # Before there is something to save, a process dies as any other.
        assert code in (CODES[name], -signal.Signals[name]), (name, wait, told)
    for name in random_moments.sample(sorted(CODES), len(CODES)):
        rows = count_rows(case.folder) + random_moments.randint(1, 11)
        wait = random_moments.uniform(0.0, 0.05)

        def moment(child, rows=rows, wait=wait):
            wait_for_rows(child, case.folder, rows)
            time.sleep(wait)

        code, told = case.kill(name, moment)
        assert code == CODES[name], (name, rows, told)
        if name != "SIGKILL":
            assert f"mlip-md md --restart {case.folder}" in told.replace("\n", "")
    for name in CODES:
        ending = case.copy(tmp_path / name)
        wait = random_moments.uniform(0.0, 2.0)

        def moment(child, ending=ending, wait=wait):
            wait_for_rows(child, ending.folder, STEPS // INTERVAL - 2)
            time.sleep(wait)

        code, told = ending.kill(name, moment)
        assert code in (CODES[name], -signal.Signals[name], 0), (name, wait, told)
        if not ending.done:
            ending.finish()
        compare(ending.folder, whole.folder)
