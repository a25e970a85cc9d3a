"""Memory that is kept between steps.

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


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, up to 2 GiB, for its next step.

    It changes how the C library of this process manages memory, so it is to be asked for.

    Returns:
        Whether it does; False on systems with another C library than glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _KEPT))
