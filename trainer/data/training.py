"""From a recipe's data section to what the loop needs: graphs of all parts, statistics, batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.elements import ATOMIC_NUMBERS as SYMBOLS
from mlip_md.elements import symbol
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.data import (
    Batch,
    BatchBudget,
    GraphStore,
    PreparedData,
    SplitRule,
    Statistics,
    compute_statistics,
    is_prepared,
    iterate_batches,
    make_batch,
    open_prepared,
    plan_epoch,
    prepare,
)
from mlip_md.trainer.data.readers import SPLITS
from mlip_md.trainer.recipe import CurationConfig, DataConfig, Recipe

OF_ATOMS = ("positions", "atomic_numbers", "forces")
OF_EDGES = ("senders", "receivers", "shifts")
OF_STRUCTURES = ("num_atoms", "num_edges", "interaction_energy", "cell", "stress", "stress_mask")
"""Arrays of a store that a training depends on, by what their rows stand for."""


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingData:
    """The data of a run, ready for batches.

    Attributes:
        train: graphs to train on.
        validation: graphs by which the best model is chosen.
        test: graphs never looked at before the end, or None.
        statistics: of the training part: elements, E0, neighbors, shortest distance.
        budget: shape of all batches.
        on_oversize: "error" or "drop" for structures larger than a batch.
        notes: what reading and curation counted, as plain text.
    """

    train: GraphStore
    validation: GraphStore
    test: GraphStore | None
    statistics: Statistics
    budget: BatchBudget
    on_oversize: str = "error"
    notes: tuple[str, ...] = ()

    def plan(self, seed: int, epoch: int) -> list[np.ndarray]:
        """The batches of a training epoch: arrays of structure indices."""
        return plan_epoch(
            self.train, self.budget, seed, epoch, shuffle=True, on_oversize=self.on_oversize
        )

    def example(self) -> Batch:
        """One batch, to build a network with."""
        first = np.flatnonzero(self.budget.fits(self.train))[:1]
        if not len(first):
            raise DataError(
                "no training structure fits into a batch; raise max_n_node or max_n_edge"
            )
        return make_batch(self.train, first, self.budget)

    def names(self, indices: np.ndarray) -> list[str]:
        """Where training structures came from."""
        return [self.train.names[int(k)] for k in indices]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that the course of the training depends on."""
        digest = hashlib.sha256(repr((self.budget, self.on_oversize)).encode())
        for store in (self.train, self.validation):
            digest.update(repr((store.cutoff, store.elements)).encode())
            for part, atoms, edges in store.chunks():
                rows = {**dict.fromkeys(OF_ATOMS, atoms), **dict.fromkeys(OF_EDGES, edges)}
                for name in (*OF_ATOMS, *OF_EDGES, *OF_STRUCTURES):
                    array = getattr(store, name)
                    digest.update(f"\0{name}\0".encode())
                    if array is not None:
                        digest.update(array[rows.get(name, part)].tobytes())
        return digest.hexdigest()

    def fill(self) -> tuple[float, float]:
        """Parts of a batch's nodes and edges that are not padding, on average over an epoch."""
        count = len(self.plan(0, 1))
        kept = self.budget.fits(self.train)
        nodes = self.train.num_atoms[kept].sum() / (count * self.budget.n_node)
        edges = self.train.num_edges[kept].sum() / (count * self.budget.n_edge)
        return float(nodes), float(edges)

    def description(self) -> dict[str, Any]:
        """Counts, statistics and fingerprint as plain JSON values."""
        nodes, edges = self.fill()
        return {
            "structures": {name: len(store) for name, store in self.parts().items()},
            "statistics": self.statistics.to_dict(),
            "batch": dataclasses.asdict(self.budget),
            "batch_fill": {"nodes": round(nodes, 4), "edges": round(edges, 4)},
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
        }

    def parts(self) -> dict[str, GraphStore]:
        """The parts there are, by name."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {name: store for name, store in parts.items() if store is not None}

    def summary(self) -> str:
        """One line for the log."""
        counts = ", ".join(f"{len(store)} {name}" for name, store in self.parts().items())
        nodes, edges = self.fill()
        elements = " ".join(symbol(z) for z in self.statistics.elements)
        return (
            f"{counts} structures of {elements}; {len(self.plan(0, 1))} batches of "
            f"{self.budget.n_graph - 1} structures, {100 * nodes:.0f} % of the nodes and "
            f"{100 * edges:.0f} % of the edges used"
        )


def load_data(recipe: Recipe) -> TrainingData:
    """Read, curate and split the data set of a recipe, or open the folder that holds it prepared.

    Args:
        recipe: its ``data`` and ``model.atomic_energies`` count.

    Returns:
        The data of the run.

    Raises:
        ConfigError: if no data set is named, or a prepared one was made in another way than the
            recipe says.
        DataError: if a file, a label or the whole set is unusable.
    """
    config = recipe.data
    if isinstance(config.path, str) and is_prepared(config.path):
        data = _open(config.path, recipe)
    else:
        data = prepare_data(recipe)
    if "validation" not in data.parts:
        raise DataError(
            "the validation part is empty, but the best model is chosen by it; change data.split, "
            "or name a file in data.validation"
        )
    train = data.parts["train"]
    if any(step.value for step in recipe.loss.stress.weight) and train.stress is None:
        raise ConfigError("loss.stress has a weight, but the data set has no stresses")
    return TrainingData(
        train=train,
        validation=data.parts["validation"],
        test=data.parts.get("test"),
        statistics=data.statistics,
        budget=BatchBudget.from_card(
            config.batch_size, config.max_n_node, config.max_n_edge, store=train
        ),
        on_oversize=config.on_oversize,
        notes=tuple(f"{path}: {report}" for path, report in data.curation.items()),
    )


def prepare_data(recipe: Recipe, folder: Path | None = None) -> PreparedData:
    """Read, curate and split the files of a recipe, and make their graphs.

    Args:
        recipe: its ``data`` and ``model.atomic_energies`` count.
        folder: new folder for the result, to be named as ``data.path`` of later runs; None keeps
            everything in memory.

    Raises:
        ConfigError: if no data set is named.
        DataError: if a file, a label or the whole set is unusable, or the folder exists.
    """
    config = recipe.data
    if not config.path:
        raise ConfigError("no data set is given; name its file: --set data.path=FILE")
    for path in _paths(config):
        if is_prepared(path):
            raise DataError(
                f"{path} is a folder of prepared data; it can only stand alone, as data.path"
            )
        if Path(path).is_dir():
            raise DataError(f"{path} is a folder; name the files in it")
        if not Path(path).is_file():
            raise DataError(f"there is no data file {path}")
    return prepare(
        config.path,
        config.cutoff,
        validation=config.validation or (),
        test=config.test or (),
        split=_split_rule(config),
        curate=None if config.curate is None else _filters(config.curate),
        atomic_energies=recipe.network.atomic_energies,
        on_bad=config.on_bad,
        energy_key=config.energy_key,
        forces_key=config.forces_key,
        folder=folder,
    )


def _open(folder: str, recipe: Recipe) -> PreparedData:
    """A prepared data set, with the E0 of the recipe; everything else must be as prepared."""
    data = open_prepared(folder)
    for name, (prepared, given) in _preparation(data.settings, recipe.data).items():
        if prepared != given:
            raise ConfigError(
                f"data.{name} is {json.dumps(given)}, but {folder} was prepared with "
                f"{json.dumps(prepared)}; prepare the data again or change data.{name}"
            )
    wanted, train = recipe.network.atomic_energies, data.parts.get("train")
    fitted = data.statistics.atomic_energies_source == "fitted to the data"
    if train is None or (wanted in (None, "average") and fitted):
        return data
    statistics = compute_statistics(train, atomic_energies=wanted)
    energies = statistics.atomic_energies
    parts = {name: part.with_atomic_energies(energies) for name, part in data.parts.items()}
    return dataclasses.replace(data, parts=parts, statistics=statistics)


def _preparation(settings: Mapping[str, Any], config: DataConfig) -> dict[str, tuple[Any, Any]]:
    """What a folder was prepared with and what a recipe says, by name of the row of ``data``."""
    found: dict[str, tuple[Any, Any]] = {"cutoff": (settings["cutoff"], config.cutoff)}
    for name in ("validation", "test"):
        if getattr(config, name) is not None:  # null leaves it to the folder
            found[name] = (settings["files"][name], _listed(getattr(config, name)))
    for name in ("on_bad", "energy_key", "forces_key"):
        if name in settings:
            found[name] = (settings[name], getattr(config, name))
    split, rule = settings["split"], _split_rule(config)
    found["split.from_file"] = (split["marks"], rule.marks)
    if not rule.marks:
        fractions = (*split["fractions"], 0.0)[:3]
        for name, before, now in zip(SPLITS, fractions, rule.fractions, strict=True):
            found[f"split.{name}"] = (before, now)
        found["split.by"], found["split.seed"] = (split["by"], rule.by), (split["seed"], rule.seed)
    curate = None if config.curate is None else _filters(config.curate)
    if curate is None or settings["curate"] is None:
        return {**found, "curate": (settings["curate"], curate)}
    prepared = {**_filters(CurationConfig()), **settings["curate"]}
    names = {"hydrogen_bonds": "one_bond_per_hydrogen"}
    return found | {f"curate.{names.get(k, k)}": (prepared[k], v) for k, v in curate.items()}


def _split_rule(config: DataConfig) -> SplitRule:
    split = config.split
    fractions = (split.train, split.validation, split.test)
    return SplitRule(split.from_file, fractions, split.seed, split.by)


def _listed(paths: str | list[str]) -> list[str]:
    return [paths] if isinstance(paths, str) else paths


def _paths(config: DataConfig) -> list[str]:
    groups = (config.path, config.validation or [], config.test or [])
    return [path for group in groups for path in _listed(group)]


def _filters(config: CurationConfig) -> dict[str, Any]:
    names = config.elements
    return {
        "elements": None if names is None else [SYMBOLS[name] for name in names],
        "neutral_only": config.neutral_only,
        "hydrogen_bonds": config.one_bond_per_hydrogen,
        "max_force": config.max_force,
        "max_net_force": config.max_net_force,
    }


def batches(
    store: GraphStore, plan: Sequence[np.ndarray], budget: BatchBudget
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The batches of a plan with the indices of their structures, assembled ahead."""
    return zip(plan, iterate_batches(store, plan, budget), strict=True)
