"""Versions of what runs and Systems keep, so that what a newer mlip-md wrote is refused as such.

What states no version is of version 1, which mlip-md 0.1.0 wrote.
"""

from __future__ import annotations

from typing import Any

import mlip_md


def find_version_problem(version: Any, ours: int) -> str | None:
    """What is wrong with the version of something, to follow its name; None if it can be read.

    Args:
        version: as found there, 1 where there is none.
        ours: the newest that this mlip-md reads, and the one that it writes.
    """
    if type(version) is int and 1 <= version <= ours:
        return None
    return (
        f"is of format version {version!r}, and mlip-md {mlip_md.__version__} reads 1 to {ours}; "
        "upgrade mlip-md, or use the version that wrote it"
    )
