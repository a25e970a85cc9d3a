"""What somebody who mistyped a name probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name nearest to a given one, whatever the case of letters; None if none is near."""
    by_lower = {word.lower(): word for word in known}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def hint(name: str, known: Iterable[str], synonyms: Mapping[str, str] | None = None) -> str:
    """What to say of an unknown name: the one probably meant, or all that are known.

    Args:
        name: as given.
        known: the names that exist.
        synonyms: other words for some of them, which are suggested but never named as known.

    Returns:
        ``did you mean …?`` or ``known are …``, to stand after a semicolon.
    """
    known = list(known)
    meant = nearest(name, [*known, *(synonyms or {})])
    if meant is None:
        return f"known are {', '.join(known)}"
    return f"did you mean {(synonyms or {}).get(meant, meant)}?"
