"""Who is told how far a run is: anybody (``RunObserver``), or a terminal."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlip_md.integrations.md.backends.interface import Frame
    from mlip_md.integrations.md.settings import MDSettings

LINES = 10
"""Progress lines of a run whose output is no terminal."""


class RunObserver:
    """Told by a run how far it is; says nothing of it, subclasses do."""

    def stage(self, text: str) -> None:
        """A phase without steps begins; at the first one, all input has been found good."""

    def found(self, line: str, notes: Sequence[str]) -> None:
        """The structure has been read: what it is in one line, and what to know of it."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def stopping(self) -> None:
        """A signal came and the run stops after this step; called inside its handler."""

    def begin(self, folder: Path, done: int, total: int) -> None:
        """Stepping begins in a folder, with some of all steps done before."""

    def update(self, frame: Frame, steps_per_second: float) -> None:
        """Another frame is there."""


class TerminalObserver(RunObserver):
    """A bar on a terminal, some lines elsewhere.

    Args:
        settings: of the run.
        structure: what is run, for the first line.

    Attributes:
        folder: the run's, once stepping has begun.
    """

    def __init__(self, settings: MDSettings, structure: str) -> None:
        from rich.console import Console

        self.console = Console(highlight=False)
        self.timestep = settings.timestep
        self.folder: Path | None = None
        self._first, self._total = 0, settings.steps
        self._waiting = [_headline(settings, structure)]
        self._bar: Any = None
        self._task: Any = None
        self._next_line = 0.0

    def __enter__(self) -> TerminalObserver:
        if self.console.is_terminal:
            self._bar = _make_bar(self.console)
            self._bar.start()
            self._task = self._bar.add_task("Starting", total=None, info="")
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bar off the screen's bottom; what it showed last stays."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def later(self, text: str) -> None:
        """Say something when the input has been found good."""
        self._waiting.append(text)

    def stage(self, text: str) -> None:
        """A phase without steps begins; at the first one, all input has been found good."""
        while self._waiting:
            self.console.print(self._waiting.pop(0), soft_wrap=True)
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            self.console.print(f"{text} ...")

    def found(self, line: str, notes: Sequence[str]) -> None:
        """The structure has been read; said when the input has been found good."""
        from rich.markup import escape

        self.later(escape(line))
        for text in notes:
            self.later(f"[yellow]{escape(text)}[/yellow]")

    def note(self, text: str) -> None:
        """Something the user should know."""
        self.console.print(f"[yellow]{text}[/yellow]")

    def stopping(self) -> None:
        """Ctrl-C came; nothing here may wait for what the signal has interrupted."""
        if self._bar is not None:
            self._bar.update(self._task, description="Stopping after this step")
        else:
            with contextlib.suppress(OSError):  # of a terminal that has been closed
                os.write(2, b"Stopping after this step; Ctrl-C again stops at once\n")

    def begin(self, folder: Path, done: int, total: int) -> None:
        """Stepping begins."""
        self.folder = folder
        self._first, self._total = done, total
        self._next_line = done + (total - done) / LINES
        if self._bar is not None:
            self._bar.reset(self._task, description="Running", total=total, completed=done)

    def update(self, frame: Frame, steps_per_second: float) -> None:
        """Another frame is there."""
        total, per_day = self._total, steps_per_second * self.timestep * 1e-6 * 86400
        left = _clock((total - frame.step) / steps_per_second) if steps_per_second else "?"
        info = (
            f"{frame.time:.3f} ps  {frame.temperature:4.0f} K  {_short(steps_per_second)} steps/s  "
            f"{_short(per_day)} ns/day  {left} left"
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=frame.step, info=info)
        elif frame.step >= min(self._next_line, total):
            share = 100 * frame.step / total
            self.console.print(f"step {frame.step}/{total} {share:3.0f}%  {info}", soft_wrap=True)
            self._next_line += (total - self._first) / LINES


def _headline(settings: MDSettings, structure: str) -> str:
    target = "" if settings.ensemble == "nve" else f" at {settings.temperature:g} K"
    if settings.ensemble == "npt":
        target += f" and {settings.pressure:g} bar"
    return (
        f"[bold]{structure}[/bold]: {settings.ensemble.upper()}{target}, "
        f"{settings.timestep:g} fs steps, model {settings.model}, engine {settings.engine}"
    )


def _short(value: float) -> str:
    """Three digits, and as many as there are before the point: 0.0123, 12.3, 12345."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _make_bar(console: Any) -> Any:
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TextColumn("{task.fields[info]}"),
        console=console,
        expand=True,
    )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
