"""The records of a run folder: ``metrics.csv`` by epoch, ``events.jsonl``, ``log.txt``."""

from __future__ import annotations

import csv
import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Echo = Callable[[str], None]

EPOCH_EVENTS = ("epoch", "best")
"""Events that belong to a finished epoch, not to a step."""


class RunLog:
    """Writes the records of one run; a resumed run continues them without double points."""

    def __init__(self, folder: Path, echo: Echo | None = None) -> None:
        """Use a run folder.

        Args:
            folder: of the run; must exist.
            echo: called with every line of ``log.txt`` as well.
        """
        self.metrics = folder / "metrics.csv"
        self.events = folder / "events.jsonl"
        self.text = folder / "log.txt"
        self._echo = echo

    def line(self, text: str) -> None:
        """Append a line, with the time, to ``log.txt``."""
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with open(self.text, "a", encoding="utf-8") as stream:
            stream.write(f"{now} {text}\n")
        if self._echo is not None:
            self._echo(text)

    def event(self, kind: str, **values: Any) -> None:
        """Append one JSON object to ``events.jsonl``; NaN, which JSON has not, becomes null."""
        values = {key: None if value != value else value for key, value in values.items()}
        with open(self.events, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": kind, **values}) + "\n")

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Append the row of an epoch to ``metrics.csv``, and the same as an event."""
        new = not self.metrics.exists()
        with open(self.metrics, "a", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(row))
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.event("epoch", **row)

    def rows(self) -> list[dict[str, float]]:
        """The rows of ``metrics.csv``; empty if there are none yet."""
        if not self.metrics.exists():
            return []
        with open(self.metrics, encoding="utf-8", newline="") as stream:
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]

    def truncate(self, step: int, epoch: int) -> None:
        """Drop what was recorded after a checkpoint.

        Args:
            step: batches the checkpoint has seen.
            epoch: last epoch whose validation it contains.
        """
        if self.metrics.exists():
            rows = self.metrics.read_text(encoding="utf-8").splitlines()
            kept = rows[:1] + [r for r in rows[1:] if int(r.split(",", 1)[0]) <= epoch]
            self.metrics.write_text("\n".join(kept) + "\n", encoding="utf-8")
        if self.events.exists():
            lines = self.events.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_before(line, step, epoch)]
            self.events.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _is_before(line: str, step: int, epoch: int) -> bool:
    try:
        event = json.loads(line)
    except ValueError:  # a line cut off by a crash
        return False
    if event["event"] in EPOCH_EVENTS:
        return bool(event["epoch"] <= epoch)
    return bool(event.get("step", 0) <= step)
