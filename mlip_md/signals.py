"""Ctrl-C while something runs that should end in good order."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType


class CtrlC:
    """While entered, notes Ctrl-C, so that no library can swallow it.

    Python raises KeyboardInterrupt wherever it happens to be; in a destructor or in a callback of C
    code it is printed and lost, and the work goes on. Signal handlers belong to the main thread;
    elsewhere, and where SIGINT is ignored or somebody else's, nothing changes.

    Attributes:
        requested: whether Ctrl-C was pressed.
        patient: the first press only sets ``requested``; otherwise it raises KeyboardInterrupt at
            once, as the second one always does.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        """Keep what is called, inside the signal handler, when a press is only noted."""
        self.requested = self.patient = False
        self._tell = tell
        self._installed = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if Ctrl-C was pressed."""
        if self.requested:
            raise KeyboardInterrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again or not self.patient:
            raise KeyboardInterrupt
        self._tell()

    def __enter__(self) -> CtrlC:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._note)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
