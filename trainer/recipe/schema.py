"""Recipes: the typed schema of a training run, read from YAML with line numbers in every error.

A recipe holds every row of a published model card under the card's own name. Unknown keys, wrong
types and duplicate keys are refused with file, line, column and the nearest known key; a value can
be overridden with ``section.key=value``. YAML 1.2 is read (``1e-3`` is a number, ``No`` is text).
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq, TaggedScalar
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from mlip_md.elements import symbol
from mlip_md.errors import ConfigError
from mlip_md.networks.config import CONFIGS, LIMITS, NetworkConfig, config_from_dict, config_to_dict

SYMBOLS = {symbol(z): z for z in range(1, 119)}
"""Atomic number by symbol."""

RECIPES = Path(__file__).parent / "recipes"

MAX_SEED = 2**63 - 1
"""Largest seed that JAX takes."""

ALIASES = {
    ("model", "avg_um_neighbors"): "avg_num_neighbors",
    ("data", "graph_cutoff_angstrom"): "cutoff",
    ("data", "cutoff_angstrom"): "cutoff",
    ("train", "ema_decay_rate"): "ema_decay",
}
"""Other spellings of keys, among them the published cards' own, and what they mean here."""

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


class Section(BaseModel):
    """Base of all parts of a recipe: no unknown keys, no silent conversions, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WeightStep(Section):
    """A value of a loss weight and the first epoch (counted from 1) in which it holds."""

    from_epoch: int = Field(ge=0)
    value: float = Field(ge=0, allow_inf_nan=False)


class LossTermConfig(Section):
    """One term of the loss: a schedule of weights; a single number holds in all epochs."""

    weight: list[WeightStep]

    @field_validator("weight", mode="before")
    @classmethod
    def _from_number(cls, weight: Any) -> Any:
        if isinstance(weight, (int, float)) and not isinstance(weight, bool):
            return [{"from_epoch": 0, "value": weight}]
        return weight

    @field_validator("weight")
    @classmethod
    def _check_schedule(cls, weight: list[WeightStep]) -> list[WeightStep]:
        epochs = [step.from_epoch for step in weight]
        if not epochs or epochs[0] > 1 or epochs != sorted(set(epochs)):
            raise ValueError("from_epoch must start at 0 or 1 and ascend")
        return weight


def _constant(weight: float) -> LossTermConfig:
    return LossTermConfig(weight=[WeightStep(from_epoch=0, value=weight)])


class LossConfig(Section):
    """The loss; its terms are defined in ``mlip_md.trainer.loss``.

    Attributes:
        kind: "mse" or "huber".
        delta: of the Huber loss, eV per atom and eV/Å.
        energy: weight of the squared error per atom, 1/eV².
        forces: weight of the squared force error, Å²/eV².
        stress: weight of the squared stress error, Å⁶/eV²; 0 leaves stresses out.
    """

    kind: Literal["mse", "huber"] = "mse"
    delta: float = Field(default=0.01, gt=0)
    energy: LossTermConfig = _constant(1.0)
    forces: LossTermConfig = _constant(25.0)
    stress: LossTermConfig = _constant(0.0)


class OptimizerConfig(Section):
    """AMSGrad and its learning-rate schedule (steps are batches, from 0).

    Attributes:
        kind: "amsgrad".
        init_learning_rate: at step 0.
        peak_learning_rate: reached linearly after warmup_steps.
        final_learning_rate: reached linearly after further transition_steps, then kept.
        weight_decay: L2 decay added to the gradient before clipping.
        warmup_steps: length of the warm-up.
        transition_steps: length of the decay to the final learning rate.
        grad_norm: global norm to which gradients are clipped.
        num_gradient_accumulation_steps: batches whose gradients are averaged before an update.
    """

    kind: Literal["amsgrad"] = "amsgrad"
    init_learning_rate: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    peak_learning_rate: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    final_learning_rate: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=4000, ge=0)
    transition_steps: int = Field(default=360000, ge=1)
    grad_norm: float = Field(default=500.0, gt=0)
    num_gradient_accumulation_steps: int = Field(default=1, ge=1)


class SplitConfig(Section):
    """Which structures serve for what.

    Attributes:
        from_file: take the marks in the file itself; the other values then mean nothing.
        train: fraction to train on; the three fractions sum to 1.
        validation: fraction by which the best model is chosen.
        test: fraction that is kept for the final errors.
        by: "group" keeps all conformers of a molecule in one part; "structure" does not.
        seed: of the random split.
    """

    from_file: bool = False
    train: float = Field(default=0.9, gt=0, le=1)
    validation: float = Field(default=0.1, ge=0, lt=1)
    test: float = Field(default=0.0, ge=0, lt=1)
    by: Literal["group", "structure"] = "group"
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _check_sum(self) -> SplitConfig:
        total = self.train + self.validation + self.test
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"train + validation + test must be 1, not {total:g}")
        return self


class CurationConfig(Section):
    """Filters on the structures; null switches one off.

    Attributes:
        elements: symbols; keep only structures of these elements.
        neutral_only: keep only structures of total charge 0.
        one_bond_per_hydrogen: keep only structures whose hydrogens have exactly one bond.
        max_net_force: eV/Å, largest allowed norm of the sum of all forces.
        max_force: eV/Å, largest allowed norm of a force.
    """

    elements: list[str] | None = None
    neutral_only: bool = True
    one_bond_per_hydrogen: bool = True
    max_net_force: float | None = Field(default=0.1, gt=0)
    max_force: float | None = Field(default=15.0, gt=0)

    @field_validator("elements")
    @classmethod
    def _check_symbols(cls, elements: list[str] | None) -> list[str] | None:
        unknown = [name for name in elements or [] if name not in SYMBOLS]
        if unknown:
            raise ValueError(f"not symbols of elements: {', '.join(unknown)}")
        return elements


class DataConfig(Section):
    """Where the structures come from and how they are batched.

    Attributes:
        path: file of the data set, a list of files, or one folder made by ``mlip-md prepare``. With
            a folder, the rows on reading, filters and splits must be those it was made with.
        validation: file(s) used for validation instead of a split of ``path``.
        test: file(s) used for the final test instead of a split of ``path``.
        split: into training, validation and test set, where no own files are given.
        curate: filters; null keeps everything readable.
        cutoff: Å, radius of the neighborhoods.
        max_n_node: atoms per structure for which batches are sized, on average; null: measured.
        max_n_edge: undirected edges per structure, likewise.
        batch_size: most structures in a batch. Batches are padded to batch_size·max_n_node + 1
            nodes, 2·batch_size·max_n_edge edges and batch_size + 1 structures.
        on_oversize: what to do with a structure that fits into no batch.
        on_bad: what to do with a structure without usable labels: "skip" leaves it out and logs it.
        energy_key: extxyz: name of the energy; null tries REF_energy, energy, Energy.
        forces_key: extxyz: name of the forces, likewise.
    """

    path: str | list[str] = ""
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    split: SplitConfig = SplitConfig()
    curate: CurationConfig | None = CurationConfig()
    cutoff: float = Field(default=5.0, ge=LIMITS["cutoff"][0], le=LIMITS["cutoff"][1])
    max_n_node: int | None = Field(default=None, ge=1)
    max_n_edge: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    on_oversize: Literal["error", "drop"] = "error"
    on_bad: Literal["error", "skip"] = "error"
    energy_key: str | None = None
    forces_key: str | None = None


class TrainConfig(Section):
    """Length of the training, averaging of weights, choice of the best model.

    Attributes:
        epochs: passes over the training set, counted from 1.
        ema_decay: d of the exponential moving average of the weights.
        select_energy_weight: 1/Å; the best model has the lowest
            forces_rmse + select_energy_weight · energy_rmse_per_atom on the validation set. The
            search starts anew when the loss weights change.
    """

    epochs: int = Field(default=220, ge=1)
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    select_energy_weight: float = Field(default=10.0, ge=0)


class CheckpointConfig(Section):
    """When the complete state is written; always at the end of an epoch and on interruption."""

    every_steps: int = Field(default=1000, ge=1)
    every_minutes: float = Field(default=15.0, gt=0)
    keep_latest: int = Field(default=2, ge=1)


class FaultConfig(Section):
    """What to do when a step gives NaN or infinity: it is never applied; after so many stop."""

    max_bad_steps_in_row: int = Field(default=5, ge=1)


class LogConfig(Section):
    """How often a step is logged, and whether plots are drawn."""

    every_steps: int = Field(default=50, ge=1)
    plots: bool = True


class Recipe(Section):
    """A whole training run.

    Attributes:
        name: of the potential; goes into the model file.
        description: free text; goes into the model file.
        seed: of the initial weights and of the order of the structures.
        model: ``kind`` (mace or nequip) and the hyperparameters of the network; E0 are given by
            symbol or atomic number, ``atomic_energies: {H: -13.6, 6: -1030.5}`` (eV).
        data: data set, cutoff, batches.
        loss: terms and weights.
        optimizer: learning rates, clipping, accumulation.
        train: epochs, averaging, choice of the best model.
        checkpoint: when the state is saved.
        faults: guard against NaN.
        log: how much is written.
    """

    name: str = "potential"
    description: str = ""
    seed: int = Field(default=42, ge=0, le=MAX_SEED)
    model: dict[str, Any] = Field(default_factory=lambda: {"kind": "mace"})
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()
    log: LogConfig = LogConfig()

    @property
    def network(self) -> NetworkConfig:
        """The validated hyperparameters of the network."""
        fields = {name: value for name, value in self.model.items() if name != "kind"}
        energies = fields.get("atomic_energies")
        if isinstance(energies, Mapping):
            fields["atomic_energies"] = {_atomic_number(z): e for z, e in energies.items()}
        return config_from_dict(self.model["kind"], fields)

    def plain(self) -> dict[str, Any]:
        """All values, defaults included, as plain JSON values."""
        values = self.model_dump(mode="json")
        model = {"kind": self.model["kind"], **config_to_dict(self.network)}
        if isinstance(model["atomic_energies"], Mapping):
            model["atomic_energies"] = {
                symbol(int(z)): e for z, e in model["atomic_energies"].items()
            }
        return {**values, "model": model}


def _atomic_number(key: object) -> int:
    """Atomic number of a symbol, a number or the text of a number, as keys of JSON are."""
    number = key if type(key) is int else 0
    if isinstance(key, str):
        number = SYMBOLS.get(key, int(key) if key.isdecimal() else 0)
    if number not in SYMBOLS.values():
        raise ConfigError(f"{key} is neither the symbol of an element nor an atomic number")
    return number


@dataclasses.dataclass(frozen=True)
class Origins:
    """Where each value of a recipe came from, for messages and for the resolved recipe."""

    file: str
    lines: Mapping[tuple[str | int, ...], tuple[int, int]]
    overrides: frozenset[tuple[str | int, ...]]

    def prefix(self, path: Sequence[str | int]) -> str:
        """Text before a message on a key: ``train.yaml:3:3: optimizer.lrr``."""
        name = ".".join(str(p) for p in path)
        for end in range(len(path), 0, -1):
            key = tuple(path[:end])
            if key in self.overrides:
                return f"--set {name}"
            if key in self.lines:
                line, column = self.lines[key]
                return f"{self.file}:{line}:{column}: {name}"
        return f"{self.file}: {name}" if name else self.file

    def of(self, path: Sequence[str | int]) -> str:
        """Short note on the origin of a value: ``default``, ``train.yaml:3`` or ``--set``."""
        prefix = self.prefix(path)
        if prefix.startswith("--set"):
            return "--set"
        return (
            f"{self.file}:{self.lines[tuple(path)][0]}" if tuple(path) in self.lines else "default"
        )


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
    lines = dict(_positions(tree))
    _refuse_tags(tree, Origins(path.name, lines, frozenset()))
    values = _plain(tree)
    changed = set()
    for override in overrides:
        changed.add(_apply_override(values, override))
    origins = Origins(path.name, lines, frozenset(changed))
    _resolve_aliases(values, origins)
    return _validate(values, origins), origins


def dump_resolved(recipe: Recipe, origins: Origins) -> str:
    """The recipe as YAML with every default filled in and the origin of each value as a comment."""
    tree = CommentedMap(recipe.plain())
    for name, value in list(tree.items()):
        if isinstance(value, dict):
            section = CommentedMap(value)
            for key in section:
                section.yaml_add_eol_comment(origins.of((name, key)), key, column=60)
            tree[name] = section
        else:
            tree.yaml_add_eol_comment(origins.of((name,)), name, column=60)
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


def _positions(
    tree: Any, path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], tuple[int, int]]]:
    if isinstance(tree, CommentedMap):
        for key, value in tree.items():
            line, column = _place(tree, key)
            yield (*path, key), (line + 1, column + 1)
            yield from _positions(value, (*path, key))
    elif isinstance(tree, CommentedSeq):
        for index, value in enumerate(tree):
            line, column = tree.lc.item(index)
            yield (*path, index), (line + 1, column + 1)
            yield from _positions(value, (*path, index))


def _place(tree: CommentedMap, key: Any) -> tuple[int, int]:
    """Line and column of a key, from 0; of a merged one (``<<: *anchor``), where it is written."""
    holders = [tree, *tree.merge]
    return next((m.lc.key(key) for m in holders if key in (m.lc.data or ())), (tree.lc.line, 0))


def _refuse_tags(value: Any, origins: Origins, path: tuple[str | int, ...] = ()) -> None:
    tag = getattr(value, "tag", None)
    if isinstance(value, TaggedScalar) or (tag is not None and tag.value is not None):
        raise ConfigError(f"{origins.prefix(path)}: the tag {tag} means nothing here; remove it")
    items = value.items() if isinstance(value, CommentedMap) else ()
    items = enumerate(value) if isinstance(value, CommentedSeq) else items
    for key, part in items:
        _refuse_tags(part, origins, (*path, key))


def _plain(value: Any) -> Any:
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


def _validate(values: dict[str, Any], origins: Origins) -> Recipe:
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_messages(error, origins))) from error
    kind = str(recipe.model.get("kind"))
    if kind not in CONFIGS:
        raise ConfigError(
            f"{origins.prefix(('model', 'kind'))}: {kind} is not allowed; it must be one of "
            + ", ".join(CONFIGS)
        )
    known = [field.name for field in dataclasses.fields(CONFIGS[kind])]
    for key in recipe.model:
        if key != "kind" and key not in known:
            raise ConfigError(_unknown(("model", key), known, origins))
    _check_energies(recipe.model.get("atomic_energies"), origins)
    try:
        _ = recipe.network
    except (ValueError, TypeError) as error:
        field = next((word for word in re.findall(r"\w+", str(error)) if word in known), "")
        path = ("model", field) if field else ("model",)
        raise ConfigError(f"{origins.prefix(path)}: {error}") from error
    return recipe


def _check_energies(energies: Any, origins: Origins) -> None:
    """Refuse keys of a map of E0 that name no element, or one that another key names too."""
    seen: dict[int, object] = {}
    for key in energies if isinstance(energies, dict) else ():
        place = origins.prefix(("model", "atomic_energies", key))
        try:
            number = _atomic_number(key)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        if number in seen:
            raise ConfigError(f"{place}: the same element as {seen[number]}; keep one of them")
        seen[number] = key


def _messages(error: ValidationError, origins: Origins) -> Iterator[str]:
    """One line per mistake, also where pydantic tells what each type of a union would need."""
    found: dict[tuple[str | int, ...], list[Any]] = {}
    for item in error.errors():
        path = tuple(p for p in item["loc"] if p not in ("str", "list[str]"))
        found.setdefault(path, []).append(item)
    lists = {path[:-1] for path in found}
    misspelled = {path[:-1] for path, items in found.items() if _is(items, "extra_forbidden")}
    for path, items in found.items():
        if _is(items, "extra_forbidden"):
            yield _unknown(path, _known_keys(path[:-1]), origins)
            continue
        if (_is(items, "missing") and path[:-1] in misspelled) or (
            _is(items, "string_type") and path in lists
        ):
            continue  # said better by the unknown key, or by the bad entry of the list
        texts = [item["msg"].removeprefix("Value error, ") for item in items]
        texts = [re.sub(r"dictionary or instance of \w+", "map of keys", t) for t in texts]
        text = " or ".join([texts[0], *(t.removeprefix("Input should be ") for t in texts[1:])])
        value = items[0]["input"]
        given = "" if isinstance(value, dict) else f" (given: {value!r})"
        yield f"{origins.prefix(path)}: {text[:1].lower()}{text[1:]}{given}"


def _is(items: Sequence[Any], kind: str) -> bool:
    return bool(items[0]["type"] == kind)


def _known_keys(path: Sequence[str | int]) -> list[str]:
    model: Any = Recipe
    for part in path:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *typing.get_args(annotation)]
        candidates += [arg for c in candidates for arg in typing.get_args(c)]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _unknown(path: Sequence[str | int], known: Sequence[str], origins: Origins) -> str:
    key = str(path[-1])
    words = {**{w: n for w, n in SYNONYMS.items() if n in known}, **{name: name for name in known}}
    near = difflib.get_close_matches(key, words, n=1, cutoff=0.6)
    hint = f"did you mean {words[near[0]]}?" if near else f"known are {', '.join(known)}"
    return f"{origins.prefix(path)}: unknown key; {hint}"
