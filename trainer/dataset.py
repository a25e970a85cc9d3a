"""From a recipe's data section to what the loop needs: graphs of all parts, statistics, batches."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.elements import symbol
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.config import SYMBOLS, CurationConfig, DataConfig, Recipe
from mlip_md.trainer.data import (
    Batch,
    BatchBudget,
    GraphStore,
    Split,
    Statistics,
    Structure,
    curate,
    iterate_batches,
    make_batch,
    plan_epoch,
    prepare_graphs,
    read,
    split,
)

Report = Callable[[str], None]


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
        subsets: names of the data set's subsets, one per structure, by part.
        notes: what reading and curation counted, as plain text.
    """

    train: GraphStore
    validation: GraphStore
    test: GraphStore | None
    statistics: Statistics
    budget: BatchBudget
    on_oversize: str = "error"
    subsets: dict[str, list[str]] = dataclasses.field(default_factory=dict)
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
            for array in (store.positions, store.species, store.forces, store.interaction_energy):
                digest.update(np.ascontiguousarray(array))
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
    """Read, curate and split the data set of a recipe, and make its graphs.

    Args:
        recipe: its ``data`` and ``model.atomic_energies`` count.

    Returns:
        The data of the run.

    Raises:
        ConfigError: if no data set is named.
        DataError: if a file, a label or the whole set is unusable.
    """
    config = recipe.data
    parts, notes = read_parts(config)
    for name in ("train", "validation"):
        if not getattr(parts, name):
            raise DataError(
                f"the {name} part is empty; it is needed. Change data.split, or name a file in "
                f"data.{'path' if name == 'train' else name}"
            )
    statistics, train, (validation, test) = prepare_graphs(
        parts.train,
        [parts.validation, parts.test],
        config.cutoff,
        atomic_energies=recipe.network.atomic_energies,
    )
    assert validation is not None  # checked above: it has structures
    budget = BatchBudget.from_card(
        config.batch_size, config.max_n_node, config.max_n_edge, store=train
    )
    subsets = {name: [s.subset for s in part] for name, part in parts._asdict().items()}
    data = TrainingData(
        train, validation, test, statistics, budget, config.on_oversize, subsets, notes
    )
    if any(step.value for step in recipe.loss.stress.weight) and train.stress is None:
        raise ConfigError("loss.stress has a weight, but the data set has no stresses")
    return data


def read_parts(config: DataConfig) -> tuple[Split, tuple[str, ...]]:
    """Curated structures for training, validation and test, and what was counted on the way."""
    if not config.path:
        raise ConfigError("no data set is given; name its file: --set data.path=FILE")
    notes: list[str] = []
    if config.split.from_file:
        marks = ("train", "validation", "test")
        parts = [_read(config.path, config.curate, notes, mark) for mark in marks]
        return Split(*parts), tuple(notes)
    everything = _read(config.path, config.curate, notes)
    validation, test = config.validation, config.test
    if validation is None and test is None:
        fractions = (config.split.train, config.split.validation, config.split.test)
        return split(everything, fractions, config.split.seed, config.split.by), tuple(notes)
    others = [_read(path, config.curate, notes) if path else [] for path in (validation, test)]
    if not others[0]:
        part = config.split.validation / (config.split.train + config.split.validation)
        pair = split(everything, (1.0 - part, part), config.split.seed, config.split.by)
        everything, others[0] = pair.train, pair.validation
    return Split(everything, *others), tuple(notes)


def _read(
    paths: str | Sequence[str],
    config: CurationConfig | None,
    notes: list[str],
    mark: str | None = None,
) -> list[Structure]:
    structures: list[Structure] = []
    for path in [paths] if isinstance(paths, str) else paths:
        if not Path(path).is_file():
            raise DataError(f"there is no file {path}")
        structures += read(path, split=mark)
    name = f"{paths} ({mark})" if mark else f"{paths}"
    if config is None:
        notes.append(f"{name}: {len(structures)} structures, not curated")
        return structures
    structures, report = curate(
        structures,
        neutral_only=config.neutral_only,
        max_force=config.max_force,
        max_net_force=config.max_net_force,
        hydrogen_bonds=config.one_bond_per_hydrogen,
        elements=None if config.elements is None else [SYMBOLS[name] for name in config.elements],
    )
    notes.append(f"{name}: {report}")
    return structures


def batches(
    store: GraphStore, plan: Sequence[np.ndarray], budget: BatchBudget
) -> Iterator[tuple[np.ndarray, Batch]]:
    """The batches of a plan with the indices of their structures, assembled ahead."""
    return zip(plan, iterate_batches(store, plan, budget), strict=True)
