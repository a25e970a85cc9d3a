"""Every row of a recipe with its default and meaning, from the sections' own words."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

from mlip_md.networks.config import CONFIGS
from mlip_md.trainer.recipe.schema import Recipe, Section

_REQUIRED = object()
_SECTION = re.compile(r"^[a-z_]+: ")


def describe_rows() -> str:
    """A Markdown page: a table per section and per network."""
    parts = ["# Rows of a recipe", "", "`mlip-md check --rows` prints this page.", ""]
    for name, section in _sections():
        rows = {
            row: _REQUIRED if field.is_required() else field.get_default(call_default_factory=True)
            for row, field in section.model_fields.items()
            if name != "top level" or _section_of(row) is None
        }
        parts += _table(name, section, rows)
    for kind, config in CONFIGS.items():
        rows = {field.name: field.default for field in dataclasses.fields(config) if field.init}
        parts += _table(f"model, kind: {kind}", config, rows)
    return "\n".join(parts)


def _table(name: str, described: type, rows: Mapping[str, Any]) -> list[str]:
    text = inspect.getdoc(described) or ""
    meanings = _attributes(text)
    return [
        f"## {name}",
        "",
        " ".join(text.split("\n\n")[0].split()).replace("``", "`"),
        "",
        "| row | default | meaning |",
        "|---|---|---|",
        *(f"| `{row}` | {_as_yaml(rows[row])} | {meanings[row]} |" for row in rows),
        "",
    ]


def _sections() -> Iterator[tuple[str, type[Section]]]:
    yield "top level", Recipe
    for row in Recipe.model_fields:
        section = _section_of(row)
        if section is not None:
            yield row, section
            for inner in section.model_fields:
                below = _section_of(inner, section)
                if below is not None and below.__name__ != "LossTermConfig":
                    yield f"{row}.{inner}", below


def _section_of(row: str, section: type[Section] = Recipe) -> type[Section] | None:
    """The section that a row holds, or None for a plain value."""
    annotation = section.model_fields[row].annotation
    kinds = [annotation, *getattr(annotation, "__args__", ())]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)


def _attributes(text: str) -> dict[str, str]:
    """The "Attributes" of a docstring by name, each in one line."""
    found: dict[str, str] = {}
    name = ""
    for line in text.partition("Attributes:\n")[2].splitlines():
        words = line.strip()
        if _SECTION.match(words) and line.startswith("    ") and not line.startswith("     "):
            name, _, words = words.partition(": ")
        if name:
            found[name] = (
                f"{found.get(name, '')} {words}".strip().replace("|", "\\|").replace("``", "`")
            )
    return found


def _as_yaml(value: object) -> str:
    if value is _REQUIRED:
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Section):
        rows = value.model_dump(mode="json")
        if set(rows) == {"weight"}:
            return f"{rows['weight'][0]['value']:g}"
        return "see below"
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, dict):
        return f"`{{{', '.join(f'{k}: {v}' for k, v in value.items())}}}`"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'
