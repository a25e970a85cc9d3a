"""A forked process, which JAX lets wait for ever, is told what to do instead."""

import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest
from model_files import make_potential
from pair_potential import pair_potential

import mlip_md
from mlip_md.engine import Engine
from mlip_md.formats.own import save

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks of POSIX")

DIMER = np.array([[0.0, 0, 0], [0, 0, 1.1]]), np.array([6, 8])
SECONDS = 60


def told_by_a_fork(work) -> str:
    """What a forked process raises; it is killed where it waits."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of JAX, that forks do not work
        child = os.fork()
    if child == 0:
        text = "nothing"
        try:
            work()
        except BaseException as error:
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, text.encode())
            os._exit(0)
    os.close(writing)
    end = time.monotonic() + SECONDS
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        time.sleep(0.02)
    with os.fdopen(reading) as pipe:
        return pipe.read() or "waited for ever"


def test_a_fork_is_refused_wherever_it_would_compute(tmp_path):
    save(make_potential("mace"), tmp_path / "tiny.safetensors")
    engine, potential = Engine(pair_potential()), pair_potential()
    for work in (
        lambda: engine.evaluate(*DIMER),
        lambda: engine.evaluate_batch([(*DIMER, None, False)]),
        lambda: Engine(potential),
        lambda: Engine(potential, device=engine.device),
        lambda: mlip_md.load(str(tmp_path / "tiny.safetensors")),
    ):
        told = told_by_a_fork(work)
        assert told.startswith("ForkError: ")
        assert f"fork of process {os.getpid()}" in told
        assert "'spawn'" in told
    assert np.isfinite(engine.evaluate(*DIMER).energy)


def test_a_fork_before_anything_is_opened_computes():
    code = """
import os, sys, warnings
import numpy as np
import mlip_md, mlip_md.engine
from pair_potential import pair_potential
if os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
result = mlip_md.engine.Engine(pair_potential()).evaluate(np.eye(3), [1, 6, 8])
os._exit(0 if np.isfinite(result.energy) else 1)
"""
    path = os.pathsep.join(sys.path)
    environment = os.environ | {"PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100, env=environment)
