"""Requests to stop: SIGTERM, SIGINT, a time limit. The loop looks at them between two steps."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any, Literal

Reason = Literal["terminated", "keyboard", "time"]


class Interruptions:
    """While entered, notes signals instead of dying of them; a second Ctrl-C kills as usual.

    Signal handlers can be set in the main thread only; elsewhere just the time limit is kept.
    """

    def __init__(self, max_seconds: float) -> None:
        """Start the clock.

        Args:
            max_seconds: limit after which ``reason`` becomes "time".
        """
        self._end = time.monotonic() + max_seconds
        self._signal: Reason | None = None
        self._old: dict[int, Any] = {}

    @property
    def reason(self) -> Reason | None:
        """Why the run should stop, or None."""
        if self._signal is None and time.monotonic() > self._end:
            return "time"
        return self._signal

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signal = "keyboard" if number == signal.SIGINT else "terminated"
        signal.signal(number, self._old[number])

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
