"""Signals and time limits that ask a long piece of work to end in good order."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from types import FrameType, TracebackType
from typing import Any, Literal

from mlip_md.errors import StoppedError

Reason = Literal["keyboard", "terminated", "hangup", "time"]

ENDINGS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
"""Signals that ask a process to end: Ctrl-C, the queue or the system, a terminal that closes."""

EXIT_SAVED, EXIT_KEYBOARD = 75, 130
"""What a command answers to the shell: 75 (EX_TEMPFAIL), ended by a signal or a time limit with the
state saved, start again with the same command; 130, ended by Ctrl-C, also with the state saved."""

_REASONS: Mapping[str, Reason] = {"SIGINT": "keyboard", "SIGTERM": "terminated", "SIGHUP": "hangup"}

GRACE_SECONDS = 5.0
"""Seconds that work has to end by itself before ``ending_process`` does it."""

_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Interruptions:
    """While entered, notes signals instead of dying of them, so that no library can swallow one.

    Python raises KeyboardInterrupt wherever it happens to be; in a destructor or in a callback of C
    code it is printed and lost, and the work goes on. A second Ctrl-C acts as usual; other signals
    come several times by themselves (shell and system both tell that a terminal closes), and one
    says it all. After one of these a KeyboardInterrupt leaves as StoppedError. Inside another one
    it takes that one's place, with what that one has noted. Signal handlers belong to the main
    thread; elsewhere, and where a signal is ignored or somebody else's, nothing changes and only
    the time limit is kept.

    Attributes:
        patient: signals are only noted; otherwise they also raise KeyboardInterrupt at once.
    """

    def __init__(
        self,
        *signals: signal.Signals,
        max_seconds: float = math.inf,
        patient: bool = True,
        tell: Callable[[], None] | None = None,
    ) -> None:
        """Start the clock.

        Args:
            signals: that are noted, such as ``signal.SIGINT``.
            max_seconds: limit after which ``reason`` becomes "time".
            patient: see the class.
            tell: called inside the signal handler when a signal is only noted.
        """
        self.patient = patient
        self._signals = signals
        self._end = time.monotonic() + max_seconds
        self._tell = tell
        self._noted: Reason | None = None
        self._before: dict[int, Any] = {}

    @property
    def reason(self) -> Reason | None:
        """Why the work should stop, or None."""
        if self._noted is None and time.monotonic() > self._end:
            return "time"
        return self._noted

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came."""
        if self._noted is not None:
            raise KeyboardInterrupt

    def _note(self, number: int, _frame: FrameType | None) -> None:
        pressed_again = number == signal.SIGINT and self._noted == "keyboard"
        if self._noted is not None and number != signal.SIGINT:
            return
        self._noted = _REASONS[signal.Signals(number).name]
        if pressed_again or not self.patient:
            raise KeyboardInterrupt
        if self._tell is not None:
            self._tell()

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:
                handler = signal.getsignal(number)
                outer = getattr(handler, "__self__", None)
                if isinstance(outer, Interruptions):
                    self._noted = self._noted or outer._noted
                elif handler not in _DEFAULTS:
                    continue
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt and self._noted in ("terminated", "hangup"):
            name = next(name for name, reason in _REASONS.items() if reason == self._noted)
            raise StoppedError(f"{name} ended the work; what was done is saved") from None


@contextlib.contextmanager
def ending_process(
    may_end: Callable[[], bool],
    clean: Callable[[], None],
    *,
    max_seconds: float = math.inf,
    grace: float = GRACE_SECONDS,
) -> Iterator[None]:
    """While entered, end the process where the work does not answer a signal or the time limit.

    Handlers of Python wait until the interpreter has its turn, and a compiler or a long computation
    can keep it waiting for minutes. A thread hears of the signal at once, gives the work some
    seconds, and ends the process with ``EXIT_SAVED`` or ``EXIT_KEYBOARD`` as soon as it may. It
    hears of signals that have a handler, see ``Interruptions``; nothing is done but in the main
    thread.

    Args:
        may_end: whether nothing would be lost now; called in that thread.
        clean: called before the end, in that thread; what it raises is lost.
        max_seconds: time limit that is answered like a signal.
        grace: seconds that the work has.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ended = threading.Event()
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def watch() -> None:
        reason = _hear(reader, time.monotonic() + max_seconds)
        latest = time.monotonic() + grace
        while reason is not None and not ended.wait(0.05):
            if time.monotonic() > latest and may_end():
                _end(reason, clean)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        ended.set()
        writer.send(b"\0")
        thread.join()
        reader.close()
        writer.close()


def _hear(reader: socket.socket, end: float) -> str | None:
    """Name of the signal of ``ENDINGS`` that comes, "" at the time limit, None for the end."""
    while True:
        try:
            reader.settimeout(None if math.isinf(end) else max(end - time.monotonic(), 1e-3))
            heard = reader.recv(1)
        except TimeoutError:
            return ""
        if heard == b"\0":
            return None
        if heard[0] in ENDINGS:
            return signal.Signals(heard[0]).name


def _end(reason: str, clean: Callable[[], None]) -> None:
    with contextlib.suppress(Exception):
        clean()
    # not through Python's streams: what the work does with them now, it may never finish
    shown = "\x1b[?25h" if sys.__stderr__ is not None and sys.__stderr__.isatty() else ""
    text = f"{shown}{reason or 'the time limit'} ended the work; what was done is saved\n"
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
    os._exit(EXIT_KEYBOARD if reason == "SIGINT" else EXIT_SAVED)
