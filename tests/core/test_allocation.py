"""Memory that a process keeps, so that pages are asked for once, and gives back when asked."""

import platform
import subprocess
import sys

import jax
import numpy as np
import pytest
from pair_potential import pair_potential

from mlip_md import devices
from mlip_md.engine import Engine

SCRIPT = """
import ctypes, resource, sys
import mlip_md

assert sys.argv[1] == "given back" or mlip_md.keep_memory()
library, size = ctypes.CDLL(None), 64 * 2**20
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    memory = library.malloc(size)
    ctypes.memset(ctypes.c_void_p(memory), 1, size)
    library.free(memory)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
@pytest.mark.parametrize(("what", "kept"), [("given back", False), ("kept", True)])
def test_pages_are_asked_for_once(what, kept):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, what], capture_output=True, text=True, check=True
    )
    assert (int(run.stdout) < 64) is kept


RELEASE = """
import ctypes
from pathlib import Path
from mlip_md.allocation import release_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])

library, size = ctypes.CDLL(None), 2**16
library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [library.malloc(size) for _ in range(1024)]
for piece in pieces:
    ctypes.memset(ctypes.c_void_p(piece), 1, size)
for piece in pieces[:-1]:  # the last one keeps those before it from being given back
    library.free(piece)
before = resident()
release_memory()
print((before - resident()) * 4096 // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for glibc")
def test_free_memory_is_given_back():
    run = subprocess.run(
        [sys.executable, "-c", RELEASE], capture_output=True, text=True, check=True
    )
    assert int(run.stdout) > 48


def test_memory_is_given_back_between_compiling_and_computing(monkeypatch):
    events = []
    engine = Engine(pair_potential())
    runtime, get = engine.runtime, jax.device_get
    monkeypatch.setattr(devices, "release_memory", lambda: events.append("released"))
    monkeypatch.setattr(jax, "device_get", lambda tree: events.append("computed") or get(tree))
    engine.evaluate(np.eye(3), [1, 6, 8])
    engine.evaluate(1.1 * np.eye(3), [1, 6, 8])
    assert events == ["released", "computed", "computed"]
    assert runtime.num_compilations == 1
