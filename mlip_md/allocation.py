"""Memory that is kept between steps, and memory that compiling leaves.

A step of a hundred atoms and more takes tens of megabytes, which the C library of Linux (glibc)
returns to the system when the step ends; the next one pays for every page anew, on virtual machines
a fifth of its time. The command line keeps them, scripts do by ``mlip_md.keep_memory()``.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt(3)."""
_KEPT = 2**31 - 1
"""Bytes of free memory that are not returned: the most that mallopt takes."""
_LARGEST = 2**30
"""Bytes of a piece of memory from which on it is returned at once, as all from 32 MiB on are."""


def _c_library() -> ctypes.CDLL | None:
    """The C library of this process, on Linux."""
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def release_memory() -> None:
    """Give free memory back to the system, where the C library can (glibc).

    Compiling a step takes as much memory as computing it: the two peaks are not to add up.
    """
    trim = getattr(_c_library(), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, up to 2 GiB, for its next step.

    It changes how the C library of this process manages memory, so it is to be asked for.

    Returns:
        Whether it does; False on systems with another C library than glibc.
    """
    mallopt = getattr(_c_library(), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _KEPT))
