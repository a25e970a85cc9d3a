"""Memory that a process keeps: pages are asked for once."""

import platform
import subprocess
import sys

import pytest

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
