"""Where recipes are compared: with that of a continued run, and of a prepared folder."""

from __future__ import annotations

from typing import Any


def find_differences(before: Any, now: Any, name: str = "") -> dict[str, tuple[Any, Any]]:
    """Values that differ between two trees of JSON values, by dotted name.

    Args:
        before: one tree; only maps are looked into.
        now: the other, whose order the result has.
        name: of the trees themselves, put before the names in them.

    Returns:
        Both values by name; None stands for what one of the trees lacks.
    """
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return {} if before == now else {name: (before, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in (*now, *(key for key in before if key not in now)):
        dotted = f"{name}.{key}" if name else key
        found |= find_differences(before.get(key), now.get(key), dotted)
    return found
