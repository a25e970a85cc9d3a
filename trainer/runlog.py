"""The records of a run folder: ``metrics.csv`` by epoch, ``events.jsonl``, ``log.txt``."""

from __future__ import annotations

import csv
import datetime
import json
import math
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from mlip_md.files import write_text

Echo = Callable[[str], None]

EPOCH_EVENTS = ("epoch", "best")
"""Events that belong to a finished epoch, not to a step."""


class RunLog:
    """Writes the records of one run; a resumed run continues them without double points.

    Args:
        folder: of the run; must exist.
        echo: called with every line of ``log.txt`` as well.
        writes: whether anything is written; of several processes one does.
    """

    def __init__(self, folder: Path, echo: Echo | None = None, writes: bool = True) -> None:
        self.metrics = folder / "metrics.csv"
        self.events = folder / "events.jsonl"
        self.text = folder / "log.txt"
        self._echo, self._writes = echo, writes

    def line(self, text: str) -> None:
        """Append a line, with the time, to ``log.txt``."""
        if not self._writes:
            return
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with open(self.text, "a", encoding="utf-8") as stream:
            stream.write(f"{now} {text}\n")
        if self._echo is not None:
            self._echo(text)

    def event(self, kind: str, **values: Any) -> None:
        """Append one JSON object to ``events.jsonl``; NaN, which JSON has not, becomes null."""
        if not self._writes:
            return
        values = {key: None if value != value else value for key, value in values.items()}
        with open(self.events, "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"event": kind, **values}) + "\n")

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Append the row of an epoch to ``metrics.csv``, and the same as an event."""
        if not self._writes:
            return
        header = [] if not self.metrics.exists() else self._table()[0]
        new = not self.metrics.exists() or self.metrics.stat().st_size == 0
        columns = header[0].split(",") if header else list(row)  # of the version that began
        with open(self.metrics, "a", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(
                stream, columns, restval=math.nan, extrasaction="ignore", lineterminator="\n"
            )
            if new:
                writer.writeheader()
            writer.writerow(row)
        self.event("epoch", **row)

    def rows(self) -> list[dict[str, float]]:
        """The whole rows of ``metrics.csv``; empty if there are none yet."""
        return [row for _, row in self._table()[1]]

    def _table(self) -> tuple[list[str], list[tuple[str, dict[str, float]]]]:
        """The header of ``metrics.csv``, [] if it is lost; its whole rows as text and numbers."""
        if not self.metrics.exists():
            return [], []
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        if not lines or not lines[0].startswith("epoch,"):
            return [], []
        rows = ((line, _parse_row(lines[0], line)) for line in lines[1:])
        return lines[:1], [(line, row) for line, row in rows if row is not None]

    def truncate(self, step: int, epoch: int) -> None:
        """Drop what was recorded after a checkpoint, and what a crash or a full disk cut off.

        Args:
            step: batches the checkpoint has seen.
            epoch: last epoch whose validation it contains.

        Raises:
            OutputError: if a file cannot be written; its old content is kept then.
        """
        if not self._writes:
            return
        if self.metrics.exists():
            header, rows = self._table()
            kept = [line for line, row in rows if row["epoch"] <= epoch]
            _write_lines(self.metrics, header + kept)
        if self.events.exists():
            lines = self.events.read_text(encoding="utf-8", errors="replace").splitlines()
            _write_lines(self.events, [line for line in lines if _is_before(line, step, epoch)])


def _write_lines(path: Path, lines: list[str]) -> None:
    write_text(path, "".join(f"{line}\n" for line in lines))


def _parse_row(header: str, line: str) -> dict[str, float] | None:
    """A row of ``metrics.csv`` by column; None if the row is not whole."""
    try:
        return dict(zip(header.split(","), map(float, line.split(",")), strict=True))
    except ValueError:
        return None


def _is_before(line: str, step: int, epoch: int) -> bool:
    try:
        event = json.loads(line)
    except ValueError:  # a line cut off by a crash
        return False
    if event["event"] in EPOCH_EVENTS:
        return bool(event["epoch"] <= epoch)
    return bool(event.get("step", 0) <= step)


def describe_environment() -> dict[str, Any]:
    """Versions and devices that a run depends on, as plain values."""
    packages = ("mlip-md", "jax", "jaxlib", "flax", "optax", "e3nn-jax", "numpy", "ase", "h5py")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version(name) for name in packages},
        "devices": [str(device) for device in jax.devices()],
    }


def changed_versions(before: Path) -> list[str]:
    """What differs from the environment of a run that is continued, in words.

    Args:
        before: its ``environment.json``; nothing is said without one.
    """
    try:
        known = json.loads(before.read_text(encoding="utf-8"))
        flat = {"python": known["python"], **known["packages"]}
    except (OSError, ValueError, KeyError, TypeError):
        return []
    present = describe_environment()
    now = {"python": present["python"], **present["packages"]}
    return [f"{name} {flat.get(name)} -> {v}" for name, v in now.items() if v != flat.get(name)]


def describe_errors(values: Mapping[str, float], prefix: str = "") -> str:
    """Root mean square errors in words.

    Args:
        values: as ``metrics`` defines them.
        prefix: of their names.
    """
    meV = 1000.0
    errors = (
        f"energy {meV * values[f'{prefix}energy_rmse_per_atom']:8.3f} meV/atom  "
        f"forces {meV * values[f'{prefix}forces_rmse']:8.2f} meV/Å (rmse)"
    )
    if f"{prefix}stress_rmse" in values:
        errors += f"  stress {meV * values[f'{prefix}stress_rmse']:8.3f} meV/Å³"
    return errors


def describe_epoch(row: Mapping[str, float]) -> str:
    """The line of ``log.txt`` for a row of ``metrics.csv``."""
    errors = describe_errors(row, "validation_")
    if row["epoch"] == 0:
        return f"epoch    0  before training: {errors}"
    return (
        f"epoch {row['epoch']:4d}  step {row['step']:8d}  loss {row['loss']:10.4g}  {errors}  "
        f"{row['structures_per_second']:7.1f} structures/s"
    )
