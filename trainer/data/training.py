"""From a recipe to the data of a run: graphs of all parts, statistics, the batches of an epoch."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.elements import symbol
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.data.batching import (
    Batch,
    BatchBudget,
    join_batches,
    make_batch,
    plan_epoch,
)
from mlip_md.trainer.data.blocks import OF_ATOMS, OF_EDGES
from mlip_md.trainer.data.prepared import (
    PreparedData,
    Tell,
    open_prepared,
    open_prepared_for,
    prepare,
    prepare_once,
    relabel,
    warn_of_energies,
)
from mlip_md.trainer.data.shares import Shares, iterate_parts
from mlip_md.trainer.data.sources import is_prepared
from mlip_md.trainer.data.statistics import Statistics, describe_open_energies
from mlip_md.trainer.data.store import GraphStore
from mlip_md.trainer.recipe.schema import Recipe, SplitConfig

IF_THERE = ("forces_mask", "weights")
"""Arrays that count in a fingerprint only if there are any, as runs without them began without."""
OF_STRUCTURES = ("num_atoms", "num_edges", "interaction_energy", "cell", "stress", "stress_mask")
"""Arrays of a store that a training depends on, besides the flat ones."""


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
        rejected: records that were left out as unusable, and why.
        validation_sets: rows of ``validation`` by the name of the set that they form; empty where
            sets have no names.
        replay: graphs of ``start.replay``; E0 are the parent's.
        replay_budget: shape of their batches.
    """

    train: GraphStore
    validation: GraphStore
    test: GraphStore | None
    statistics: Statistics
    budget: BatchBudget
    on_oversize: str = "error"
    notes: tuple[str, ...] = ()
    rejected: Sequence[tuple[str, str]] = ()
    validation_sets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    replay: GraphStore | None = None
    replay_budget: BatchBudget | None = None

    def plan(self, seed: int, epoch: int) -> list[np.ndarray]:
        """Which structures form which batch of a training epoch, see ``plan_epoch``."""
        return plan_epoch(self.train, self.budget, seed, epoch, on_oversize=self.on_oversize)

    def validates_forces(self, name: str | None = None) -> bool:
        """Whether any validation structure, or any of the set of a name, has force labels."""
        mask = self.validation.forces_mask
        rows = slice(None) if name is None else self.validation_sets[name]
        return mask is None or bool(mask[rows].any())

    def sets(self) -> dict[str, GraphStore]:
        """The validation sets by name, the name of a single one being empty."""
        named = {name: self.validation.subset(r) for name, r in self.validation_sets.items()}
        return named or {"": self.validation}

    def batches(
        self,
        plan: Sequence[np.ndarray],
        seed: int,
        epoch: int,
        done: int = 0,
        dtype: str = "float32",
        replay_weight: float = 1.0,
        shares: Shares | None = None,
    ) -> Iterator[tuple[np.ndarray, list[Batch]]]:
        """The batches of a training epoch with the indices of their training structures, in parts.

        Beside each stands the batch of the same number of an epoch of the replayed structures,
        which begins again where it is shorter.

        Args:
            plan: of the epoch, see ``plan``.
            seed: of the run.
            epoch: from 1.
            done: batches to leave out at the start.
            dtype: as ``make_batch`` takes it.
            replay_weight: of the loss of replayed structures.
            shares: parts of every batch that this process makes; None: one, the whole.
        """
        batches = iterate_parts(self.train, plan, self.budget, shares, done, dtype)
        if self.replay is None or self.replay_budget is None:
            yield from batches
            return
        replayed = plan_epoch(self.replay, self.replay_budget, seed, epoch)
        beside = [replayed[k % len(replayed)] for k in range(len(plan))]
        others = iterate_parts(self.replay, beside, self.replay_budget, shares, done, dtype)
        for (indices, parts), (more, replays) in zip(batches, others, strict=True):
            counts = len(indices), len(more)
            yield (
                indices,
                [
                    join_batches(part, replay, replay_weight, counts)
                    for part, replay in zip(parts, replays, strict=True)
                ],
            )

    def example(self, dtype: str = "float32") -> Batch:
        """One batch, to build a network with.

        Args:
            dtype: as ``make_batch`` takes it.

        Raises:
            DataError: if no training structure fits into a batch.
        """
        first = np.flatnonzero(self.budget.fits(self.train))[:1]
        if not len(first):
            raise DataError(
                "no training structure fits into a batch; raise max_n_node or max_n_edge"
            )
        return make_batch(self.train, first, self.budget, dtype)

    def names(self, indices: np.ndarray) -> list[str]:
        """Where training structures came from."""
        return [self.train.names[int(k)] for k in indices]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that the course of the training depends on."""
        digest = hashlib.sha256(repr((self.budget, self.on_oversize)).encode())
        if self.replay is not None:
            digest.update(repr(self.replay_budget).encode())
        for store in (self.train, self.validation, *([self.replay] if self.replay else [])):
            digest.update(repr((store.cutoff, store.elements)).encode())
            for part, atoms, edges in store.chunks():
                rows = {**dict.fromkeys(OF_ATOMS, atoms), **dict.fromkeys(OF_EDGES, edges)}
                there = [name for name in IF_THERE if getattr(store, name) is not None]
                for name in (*OF_ATOMS, *OF_EDGES, *OF_STRUCTURES, *there):
                    array = getattr(store, name)
                    digest.update(f"\0{name}\0".encode())
                    if array is not None:
                        digest.update(array[rows.get(name, part)].tobytes())
        for name, rows_of_set in self.validation_sets.items():
            digest.update(f"\0{name}\0".encode() + rows_of_set.tobytes())
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
            "structures": self._counts(),
            "validation_sets": {name: len(rows) for name, rows in self.validation_sets.items()},
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

    def _counts(self) -> dict[str, int]:
        stores = self.parts() | ({} if self.replay is None else {"replay": self.replay})
        return {name: len(store) for name, store in stores.items()}

    def summary(self) -> str:
        """One line for the log."""
        counts = ", ".join(f"{count} {name}" for name, count in self._counts().items())
        nodes, edges = self.fill()
        elements = " ".join(symbol(z) for z in self.statistics.elements)
        plan = self.plan(0, 1)
        mean = sum(map(len, plan)) / len(plan)
        return (
            f"{counts} structures of {elements}; {len(plan)} batches of {mean:.3g} "
            f"structure{'s' * (self.budget.n_graph > 2)}, at most {self.budget.n_graph - 1}, "
            f"{100 * nodes:.0f} % of the nodes and {100 * edges:.0f} % of the edges used"
        )


def load_data(
    recipe: Recipe,
    keep: Path | None = None,
    *,
    workers: int = 1,
    tell: Tell | None = None,
    known: Statistics | None = None,
) -> TrainingData:
    """Read, curate and split the data set of a recipe, or open the folder that holds it prepared.

    Args:
        recipe: its ``data`` and ``model.atomic_energies`` count.
        keep: folder in which files are kept prepared, and from which they are taken the next time;
            None keeps them in memory.
        workers: as ``prepare`` takes them, for what is kept.
        tell: as ``prepare`` takes it.
        known: statistics that another process, with the same recipe and ``keep``, has found in the
            data; then no file is read again, only what batches are made of.

    Returns:
        The data of the run.

    Raises:
        ConfigError: if no data set is named, or a prepared one was made in another way than the
            recipe says.
        DataError: if a file, a label or the whole set is unusable.
    """
    config, energies = recipe.data, recipe.network.atomic_energies
    if known is not None:
        data = relabel(open_prepared(_prepared_folder(config.path, keep), trusted=True), known)
    elif isinstance(config.path, str) and is_prepared(config.path):
        data = open_prepared_for(config, energies)
    elif keep is not None:
        data = prepare_once(config, energies, keep, workers=workers, tell=tell)
    else:
        data = prepare(config, energies, tell=tell)
    from_data = recipe.start is None or recipe.start.atomic_energies != "keep"
    if from_data and known is None:
        warn_of_energies(data)
    if "validation" not in data.parts:
        raise DataError(
            "the validation part is empty, but the best model is chosen by it; change data.split, "
            "or name a file in data.validation"
        )
    by, sets = recipe.train.select_by, data.validation_sets
    if by is not None and by not in sets:
        there = f"has only {', '.join(sets)}" if sets else "names none: {NAME: FILE}"
        raise ConfigError(f"train.select_by is {by}, a set that data.validation lacks; it {there}")
    train = data.parts["train"]
    if recipe.loss.trains_stress and train.stress is None:
        raise ConfigError("loss.stress has a weight, but the data set has no stresses")
    unlabeled = train.forces_mask is not None and not train.forces_mask.any()
    if any(step.value for step in recipe.loss.forces.weight) and unlabeled:
        raise ConfigError("loss.forces has a weight, but the data set has no forces")
    replay = _load_replay(recipe, keep, workers, tell, trusted=known is not None)
    return TrainingData(
        train=train,
        validation=data.parts["validation"],
        test=data.parts.get("test"),
        statistics=data.statistics,
        budget=BatchBudget.from_card(
            config.batch_size, config.max_n_node, config.max_n_edge, store=train
        ),
        on_oversize=config.on_oversize,
        notes=tuple(describe_reading(data)),
        rejected=data.rejected,
        validation_sets=sets,
        replay=replay,
        replay_budget=None
        if replay is None
        else BatchBudget.from_card(config.batch_size, store=replay),
    )


def _prepared_folder(path: str | list[str], keep: Path | None) -> Path:
    """The folder that another process of this training has opened or made."""
    if isinstance(path, str) and is_prepared(path):
        return Path(path)
    if keep is None or not is_prepared(keep):
        raise DataError(
            f"{keep or path} is no prepared data here, but process 0 has them: all processes of a "
            "training must see the run's folder"
        )
    return keep


def _load_replay(
    recipe: Recipe, keep: Path | None, workers: int, tell: Tell | None, trusted: bool
) -> GraphStore | None:
    """All structures of ``start.replay``, read as those of ``data.path`` are; without E0 yet."""
    start = recipe.start
    if start is None or start.replay is None or not start.replay_weight:
        return None
    config = recipe.data.model_copy(
        update={
            "path": start.replay,
            "validation": None,
            "test": None,
            "split": SplitConfig(train=1.0, validation=0.0),
        }
    )
    if isinstance(start.replay, str) and is_prepared(start.replay):
        store = open_prepared(start.replay, trusted).parts["train"]
        if store.cutoff != config.cutoff:
            raise ConfigError(
                f"start.replay: {start.replay} was prepared with a cutoff of {store.cutoff} Å, the "
                f"parent has {config.cutoff} Å; name the data files themselves"
            )
        return store
    if keep is None:
        return prepare(config, "zero", tell=tell).parts["train"]
    kept = keep.with_name(f"{keep.name}-replay")
    if trusted:
        return open_prepared(_prepared_folder([], kept), trusted).parts["train"]
    return prepare_once(config, "zero", kept, workers=workers, tell=tell).parts["train"]


def describe_reading(data: PreparedData) -> list[str]:
    """What reading, filters and isolated atoms came to, a line each."""
    notes = []
    for path, report in data.curation.items():
        lines = filter(None, (str(report), report.describe_unused()))
        notes += [f"{path}: {line}" for line in lines]
    sources, ions = data.isolated.sources(), data.isolated.ions
    if sources:
        notes.append(f"isolated atoms, in no part: {sources}")
    if ions:
        notes.append(f"single ions, in no part: {len(ions)}, e.g. {ions[0]}")
    notes += [f"{name}: {text}" for name, part in data.parts.items() if (text := _missing(part))]
    if "train" in data.parts and len({*data.parts["train"].groups}) > 1:  # one is in all parts
        notes += data.overlap
    if "train" in data.parts:
        notes.append(describe_residuals(data.parts["train"]))
    return notes + describe_open_energies(data.statistics)


def _missing(store: GraphStore) -> str:
    """What labels structures lack and how they are weighted, if not alike."""
    parts = []
    if store.forces_mask is not None:
        parts.append(f"{int((~store.forces_mask).sum())} of {len(store)} structures have no forces")
    if store.weights is not None:
        low, high = store.weights.min(), store.weights.max()
        parts.append(f"weights of single structures run from {low:g} to {high:g}")
    return ", ".join(parts)


def describe_residuals(store: GraphStore) -> str:
    """How far energies are from E0 alone, and which structures are farthest."""
    gaps = store.interaction_energy.astype(np.float64) / store.num_atoms
    far = np.argsort(-np.abs(gaps - np.median(gaps)), kind="stable")[:3].tolist()
    worst = ", ".join(f"{store.names[k]} ({gaps[k]:+.4g})" for k in far)
    return (
        f"energies beyond E0, eV/atom: {np.sqrt(np.mean(gaps**2)):.4g} (root mean square), from "
        f"{gaps.min():.4g} to {gaps.max():.4g}; farthest {worst}"
    )
