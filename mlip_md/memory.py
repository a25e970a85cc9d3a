"""How much memory this machine has for its processes, and how sizes of it are told."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from pathlib import Path, PurePosixPath

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
"""Where Linux tells its memory, and the limits of control groups (containers, batch systems)."""
UNKNOWN = 2**62
"""Bytes, in place of a size that a system does not tell."""


def as_gib(size: float) -> str:
    """A number of bytes in GiB, with two digits or more."""
    gib = size / 2**30
    return f"{gib:.0f} GiB" if gib >= 100 else f"{gib:.3g} GiB"


@functools.cache
def total_memory() -> int:
    """Bytes that all processes of this machine may have together, swap included.

    Less in a container or a batch job whose control group (version 1 or 2) has a limit.
    """
    told = _meminfo()
    total = told.get("MemTotal", 0) + told.get("SwapTotal", 0) or _physical_memory()
    return min([total, *_group_limits()])


def free_memory() -> int:
    """Bytes that a process could still have without another one losing any, as Linux tells it."""
    told = _meminfo()
    free = told.get("MemAvailable", UNKNOWN) + told.get("SwapFree", 0)
    return min(free, total_memory())


def _meminfo() -> dict[str, int]:
    """Bytes by name; nothing on systems without the file."""
    try:
        text = (PROC / "meminfo").read_text(encoding="ascii")
    except OSError:
        return {}
    return {name: 1024 * int(size) for name, size in re.findall(r"^(\w+): +(\d+) kB", text, re.M)}


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return UNKNOWN


def _group_limits() -> list[int]:
    """Limits of this process's control group and of those around it."""
    try:
        lines = (PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    found = []
    for _, controllers, group in (line.split(":", 2) for line in lines if line.count(":") > 1):
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = CGROUPS, "memory.max"
        if controllers:
            root, name = CGROUPS / "memory", "memory.limit_in_bytes"
        inner = PurePosixPath(group.lstrip("/"))
        for folder in (inner, *inner.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                found.append(int((root / folder / name).read_text(encoding="ascii")))
    return found
