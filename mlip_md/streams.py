"""What a command prints reaches whatever reads it, or is dropped; the command goes on.

A terminal may know fewer letters than we use, a pipe's reader may leave (``mlip-md md … | head``),
and a terminal may be closed under a run that a signal is ending.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

_GONE = (errno.EPIPE, errno.EIO)
"""How the system says that nobody reads any more."""

_PLAIN = {"±": "+-", "→": "->", "–": "-", "−": "-", "·": "*", "µ": "u", "│": "|", "─": "-"}


@contextlib.contextmanager
def lasting_streams() -> Iterator[None]:
    """While entered, printing neither fails for a letter nor for a reader that has left."""
    codecs.register_error("mlip_md.plain", _write_plainly)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_lasting(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _write_plainly(error: UnicodeError) -> tuple[str, int]:
    """Letters that an encoding lacks, as such that all have: … is ..., Å is A, ³ is 3."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letters = error.object[error.start : error.end]
    plain = (_PLAIN.get(letter) or unicodedata.normalize("NFKD", letter) for letter in letters)
    text = "".join(plain).encode("ascii", "ignore").decode("ascii")
    return text or "?" * len(letters), error.end


class _Leaving(io.RawIOBase):
    """The file of a stream, whose reader may leave."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._gone = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._handle

    def isatty(self) -> bool:
        return os.isatty(self._handle)

    def write(self, content: Any, /) -> int:
        if not self._gone:
            try:
                return os.write(self._handle, content)
            except OSError as error:
                if error.errno not in _GONE:
                    raise
                self._gone = True
        return len(content)


def _lasting(stream: TextIO) -> TextIO:
    """A stream to the same file that lasts; the same stream where it has no file."""
    try:
        handle = stream.fileno()
    except (AttributeError, OSError):  # none at all, or one in memory
        with contextlib.suppress(AttributeError):
            stream.reconfigure(errors="mlip_md.plain")  # type: ignore[attr-defined]
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Leaving(handle)),
        encoding=stream.encoding,
        errors="mlip_md.plain",
        line_buffering=True,
    )
