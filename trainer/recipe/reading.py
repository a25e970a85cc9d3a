"""Recipes from YAML: every key with its line and column, overrides, aliases, the resolved recipe.

Unknown keys, wrong types and duplicate keys are refused with file, line, column and the nearest
known key; a value can be overridden with ``section.key=value``. YAML 1.2 is read (``1e-3`` is a
number, ``No`` is text).
"""

from __future__ import annotations

import dataclasses
import glob
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from mlip_md.errors import ConfigError
from mlip_md.networks.config import CONFIGS
from mlip_md.trainer.recipe.messages import Origins, describe_mistakes, describe_unknown
from mlip_md.trainer.recipe.schema import Recipe, to_atomic_number

RECIPES = Path(__file__).parent / "recipes"

ALIASES = {
    ("model", "avg_um_neighbors"): "avg_num_neighbors",
    ("data", "graph_cutoff_angstrom"): "cutoff",
    ("data", "cutoff_angstrom"): "cutoff",
    ("train", "ema_decay_rate"): "ema_decay",
}
"""Other spellings of keys, among them the published cards' own, and what they mean here."""


PATHS = (
    ("data", "path"), ("data", "validation"), ("data", "test"), ("start", "replay"),
    ("model", "atomic_energies"),
)  # fmt: skip
"""Rows that name files; ``model.atomic_energies`` may."""


def recipe_path(name_or_path: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped recipe such as ``mace-spice2``.

    Raises:
        ConfigError: if there is neither.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = RECIPES / f"{name_or_path.replace('-', '_')}.yaml"
    if shipped.is_file():
        return shipped
    names = ", ".join(sorted(p.stem.replace("_", "-") for p in RECIPES.glob("*.yaml")))
    raise ConfigError(f"there is no recipe {name_or_path}; give the path of one, or one of {names}")


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> tuple[Recipe, Origins]:
    """Read and check a recipe.

    Args:
        name_or_path: of the YAML file, or the name of a shipped recipe.
        overrides: ``section.key=value`` strings; the value is read as YAML.

    Returns:
        The recipe and where its values came from.

    Raises:
        ConfigError: on unreadable YAML, unknown keys or bad values, with file, line and column.
    """
    path = recipe_path(name_or_path)
    tree = _read_yaml(_text(path), path.name)
    found = list(_walk(tree))
    lines = {keys: place for keys, _, place in found}
    written = Origins(path.name, lines)
    for keys, value, _ in found:
        _refuse_tag(value, written.prefix(keys))
    values = _plain(tree)
    changed = frozenset(_apply_override(values, override) for override in overrides)
    origins = Origins(path.name, lines, changed)
    _resolve_aliases(values, origins)
    _resolve_paths(values, path.parent, changed)
    return _validate(values, origins), origins


def dump_resolved(recipe: Recipe, origins: Origins) -> str:
    """The recipe as YAML with every default filled in and the origin of each value as a comment."""
    tree = CommentedMap(recipe.plain())
    for name, value in list(tree.items()):
        if isinstance(value, dict):
            section = CommentedMap(value)
            for key in section:
                section.yaml_add_eol_comment(origins.describe((name, key)), key, column=60)
            tree[name] = section
        else:
            tree.yaml_add_eol_comment(origins.describe((name,)), name, column=60)
    stream = io.StringIO()
    YAML().dump(tree, stream)
    return stream.getvalue()


def print_recipe(name_or_path: str) -> str:
    """The text of a recipe as it is written, with its comments.

    Raises:
        ConfigError: if there is no such recipe, or it is no UTF-8 text.
    """
    return _text(recipe_path(name_or_path))


def _text(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise ConfigError(f"{path.name}:{line}: not UTF-8 text; save the file as UTF-8") from error


def _read_yaml(text: str, name: str) -> CommentedMap:
    try:
        tree = YAML().load(text)
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        raise ConfigError(f"{place}: {_problem(error)}") from error
    except (YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{name}: {_problem(error)}") from error
    if not isinstance(tree, CommentedMap):
        raise ConfigError(f"{name}: a recipe is a map of sections (model, data, optimizer, …)")
    return tree


def _problem(error: Exception) -> str:
    """The first line of what a YAML reader has to say."""
    text = getattr(error, "problem", None) or str(error) or "not readable as YAML"
    return str(text).splitlines()[0]


def _walk(
    tree: Any, path: tuple[str | int, ...] = (), place: tuple[int, int] = (0, 0)
) -> Iterator[tuple[tuple[str | int, ...], Any, tuple[int, int]]]:
    """A tree and all values in it: their keys, they themselves, line and column of each, from 1."""
    yield path, tree, (place[0] + 1, place[1] + 1)
    items = tree.items() if isinstance(tree, CommentedMap) else ()
    items = enumerate(tree) if isinstance(tree, CommentedSeq) else items
    for key, value in items:
        yield from _walk(value, (*path, key), _place(tree, key))


def _place(tree: CommentedMap | CommentedSeq, key: Any) -> tuple[int, int]:
    """Line and column of a key, from 0; of a merged one (``<<: *anchor``), where it is written."""
    if isinstance(tree, CommentedSeq):
        return tree.lc.item(key)
    holders = [tree, *tree.merge]
    return next((m.lc.key(key) for m in holders if key in (m.lc.data or ())), (tree.lc.line, 0))


def _refuse_tag(value: Any, place: str) -> None:
    """Refuse a tag of YAML, which nothing here would obey."""
    tag = getattr(value, "tag", None)
    if isinstance(value, TaggedScalar) or (tag is not None and tag.value is not None):
        raise ConfigError(f"{place}: the tag {tag} means nothing here; remove it")


def _plain(value: Any) -> Any:
    """A value of the YAML reader, which remembers comments and spellings, as Python's own."""
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _apply_override(values: dict[str, Any], override: str) -> tuple[str | int, ...]:
    name, equals, text = override.partition("=")
    path = tuple(name.strip().split("."))
    if not equals or not all(path):
        raise ConfigError(f"--set {override}: write it as section.key=value")
    target = values
    for key in path[:-1]:
        target = target.setdefault(key, {})
        if not isinstance(target, dict):
            raise ConfigError(f"--set {override}: {key} holds no keys")
    try:
        target[path[-1]] = _plain(YAML(typ="safe").load(text))
    except (YAMLError, ValueError, RecursionError) as error:
        problem = _problem(error)
        raise ConfigError(f"--set {override}: the value is no YAML ({problem})") from error
    return path


def _resolve_aliases(values: dict[str, Any], origins: Origins) -> None:
    for (section, alias), name in ALIASES.items():
        part = values.get(section)
        if not isinstance(part, dict) or alias not in part:
            continue
        if name in part:
            raise ConfigError(
                f"{origins.prefix((section, alias))}: the same as {section}.{name}, which is given "
                "too; keep one of them"
            )
        part[name] = part.pop(alias)


def _resolve_paths(
    values: dict[str, Any], folder: Path, changed: frozenset[tuple[str | int, ...]]
) -> None:
    """Paths that are not found from here, but from the recipe's folder, are meant from there."""
    for section, name in PATHS:
        part = values.get(section)
        if isinstance(part, dict) and name in part and (section, name) not in changed:
            part[name] = _find_from(folder, part[name], (section, name), changed)


def _find_from(
    folder: Path, name: Any, keys: tuple[str, ...], changed: frozenset[tuple[str | int, ...]]
) -> Any:
    """A path, a list of paths or a map that holds some; what was given here stays as it is."""
    if isinstance(name, list):
        return [_find_from(folder, item, keys, changed) for item in name]
    if isinstance(name, dict):
        return {k: _find_from(folder, item, (*keys, k), changed) for k, item in name.items()}
    if keys in changed or not isinstance(name, str) or not name or _is_there(name):
        return name
    beside = folder / name
    return str(beside) if _is_there(str(beside)) else name


def _is_there(name: str) -> bool:
    return os.path.exists(name) or any(glob.iglob(name, recursive=True))


def _validate(values: dict[str, Any], origins: Origins) -> Recipe:
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(describe_mistakes(error, origins))) from error
    kind = str(recipe.model.get("kind"))
    if kind not in CONFIGS:
        raise ConfigError(
            f"{origins.prefix(('model', 'kind'))}: {kind} is not allowed; it must be one of "
            + ", ".join(CONFIGS)
        )
    known = [field.name for field in dataclasses.fields(CONFIGS[kind])]
    for key in recipe.model:
        if key != "kind" and key not in known:
            raise ConfigError(describe_unknown(("model", key), known, origins))
    _check_energies(recipe.model.get("atomic_energies"), origins)
    try:
        _ = recipe.network
    except (ValueError, TypeError) as error:
        field = error.field if isinstance(error, ConfigError) else ""
        path = ("model", field) if field else ("model",)
        raise ConfigError(f"{origins.prefix(path)}: {error}") from error
    return recipe


def _check_energies(energies: Any, origins: Origins) -> None:
    """Refuse keys of a map of E0 that name no element, or one that another key names too."""
    seen: dict[int, object] = {}
    for key in energies if isinstance(energies, dict) else ():
        place = origins.prefix(("model", "atomic_energies", key))
        try:
            number = to_atomic_number(key)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        if number in seen:
            raise ConfigError(f"{place}: the same element as {seen[number]}; keep one of them")
        seen[number] = key
