"""What is said of a mistake in a recipe: file, line, column, the key and the nearest known one."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from mlip_md.hints import hint
from mlip_md.trainer.recipe.schema import Recipe

Keys = Sequence[str | int]
"""Keys (and positions in lists) that lead to a value."""

SYNONYMS = {
    "lr": "init_learning_rate",
    "learning_rate": "init_learning_rate",
    "clip": "grad_norm",
    "max_grad_norm": "grad_norm",
    "max_epochs": "epochs",
    "num_epochs": "epochs",
    "r_max": "cutoff",
    "channels": "num_channels",
    "num_interactions": "num_layers",
    "ema": "ema_decay",
    "loss_weight": "weight",
}
"""Words of other programs; used only to suggest a key, never accepted."""

UNION_BRANCHES = ("str", "list[str]")
"""What pydantic puts into a place for each type that the value might have had."""


@dataclasses.dataclass(frozen=True)
class Origins:
    """Where each value of a recipe came from, for messages and for the resolved recipe.

    Attributes:
        file: name of the recipe's file.
        lines: line and column, from 1, of every value in it.
        overrides: values given by ``--set``.
    """

    file: str = ""
    lines: Mapping[tuple[str | int, ...], tuple[int, int]] = dataclasses.field(default_factory=dict)
    overrides: frozenset[tuple[str | int, ...]] = frozenset()

    def _given(self, path: Keys) -> tuple[str | int, ...] | None:
        """The longest part of a path that was given, in the file or by ``--set``."""
        parts = (tuple(path[:end]) for end in range(len(path), 0, -1))
        return next((p for p in parts if p in self.overrides or p in self.lines), None)

    def prefix(self, path: Keys) -> str:
        """Text before a message on a key: ``train.yaml:3:3: optimizer.lrr``."""
        name, given = ".".join(map(str, path)), self._given(path)
        if given in self.overrides:
            return f"--set {name}"
        if given is not None:
            line, column = self.lines[given]
            return f"{self.file}:{line}:{column}: {name}"
        return f"{self.file}: {name}" if name else self.file

    def describe(self, path: Keys) -> str:
        """Short note on the origin of a value: ``default``, ``train.yaml:3`` or ``--set``."""
        if self._given(path) in self.overrides:
            return "--set"
        place = self.lines.get(tuple(path))
        return "default" if place is None else f"{self.file}:{place[0]}"


def describe_mistakes(error: ValidationError, origins: Origins) -> Iterator[str]:
    """One line per mistake, also where pydantic tells what each type of a union would need."""
    found: dict[tuple[str | int, ...], list[Any]] = {}
    for item in error.errors():
        path = tuple(p for p in item["loc"] if p not in UNION_BRANCHES)
        found.setdefault(path, []).append(item)
    kinds = {path: items[0]["type"] for path, items in found.items()}
    lists = {path[:-1] for path in found}
    misspelled = {path[:-1] for path, kind in kinds.items() if kind == "extra_forbidden"}
    for path, items in found.items():
        if kinds[path] == "extra_forbidden":
            yield describe_unknown(path, _known_keys(path[:-1]), origins)
            continue
        if (kinds[path] == "missing" and path[:-1] in misspelled) or (
            kinds[path] == "string_type" and path in lists
        ):
            continue  # said better by the unknown key, or by the bad entry of the list
        first, *others = map(_problem, items)
        text = " or ".join([first, *(t.removeprefix("Input should be ") for t in others)])
        value = items[0]["input"]
        given = "" if isinstance(value, dict) else f" (given: {value!r})"
        yield f"{origins.prefix(path)}: {text[:1].lower()}{text[1:]}{given}"


def _problem(item: Any) -> str:
    """The words for one of pydantic's errors; of our own validators, theirs."""
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    return "Input should be a valid map of keys" if item["type"] == "model_type" else item["msg"]


def _known_keys(path: Keys) -> list[str]:
    model: Any = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *typing.get_args(annotation)]
        candidates += [arg for c in candidates for arg in typing.get_args(c)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def describe_unknown(path: Keys, known: Sequence[str], origins: Origins) -> str:
    """The line on a key that does not exist.

    Args:
        path: of the key.
        known: the keys that exist there.
        origins: of the recipe's values.
    """
    synonyms = {word: name for word, name in SYNONYMS.items() if name in known}
    return f"{origins.prefix(path)}: unknown key; {hint(str(path[-1]), known, synonyms)}"
