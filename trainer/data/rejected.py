"""Records that no training can use: all of a data set in one pass, by name and reason."""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import re
from pathlib import Path

from mlip_md.errors import DataError, RejectedError
from mlip_md.files import write_text

logger = logging.getLogger(__name__)

MOST = 100_000
"""Records of which name and reason are kept; more are only counted."""


@dataclasses.dataclass
class Rejected:
    """Bad records of a data set.

    Attributes:
        records: where each was found, and what is wrong with it.
        count: of all, also of those beyond ``MOST``.
        examined: records looked at, the bad ones included.
        read: part, from 0 to 1, of the file that is being read; 0 where it does not tell.
    """

    records: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    count: int = 0
    examined: int = 0
    read: float = 0.0

    def add(self, error: DataError) -> None:
        """Note a bad record by the error that names it: ``file:key[index]: reason``."""
        self.count += 1
        if len(self.records) < MOST:
            name, colon, reason = str(error).partition(": ")
            self.records.append((name, reason) if colon else ("", name))

    def summary(self) -> str:
        """How many there are of each kind, with an example."""
        kinds: dict[str, list[str]] = {}
        for name, reason in self.records:
            kind = re.sub(r"[-+]?\d[\d.eE+-]*|'[^']*'|\([^)]*\)|\S*[/\\]\S*", "", reason)
            kinds.setdefault(kind, []).append(f"{name}: {reason}")
        parts = [f"{examples[0]} ({len(examples)} such)" for examples in kinds.values()]
        return f"{self.count} of {self.examined} records are bad: {'; '.join(parts[:8])}"

    def check(self, on_bad: str) -> None:
        """Refuse them if ``on_bad`` is "error", else log what is left out.

        Raises:
            RejectedError: with all of them.
        """
        if not self.count:
            return
        if on_bad == "error":
            one = f"{': '.join(self.records[0])}" if self.count == 1 else self.summary()
            advice = "correct them, or leave them out with data.on_bad: skip"
            raise RejectedError(f"{one}; {advice}", self.records)
        logger.warning("left out (data.on_bad: skip): %s", self.summary())


def write_rejected(records: list[tuple[str, str]], path: Path) -> None:
    """Write bad records as a table of record and reason.

    Raises:
        OutputError: if the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("record", "reason"), *records])
    write_text(path, text.getvalue())
