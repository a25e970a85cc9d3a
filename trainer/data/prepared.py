"""From files to the graphs of all parts of a data set, in memory or in a folder for many runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.errors import DataError
from mlip_md.trainer.data.filters import (
    CurationReport,
    FilterCounts,
    Filters,
    apply_filters,
    make_filters,
)
from mlip_md.trainer.data.readers import SPLITS, iterate
from mlip_md.trainer.data.split import split_groups
from mlip_md.trainer.data.statistics import AtomicEnergies, Statistics, compute_statistics
from mlip_md.trainer.data.store import GraphStore, new_folder, open_store
from mlip_md.trainer.data.structures import Structure

FORMAT_VERSION = 1
Paths = str | Path | Sequence[str | Path]


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedData:
    """The parts of a data set, ready for batches.

    Attributes:
        parts: stores by name ("train", "validation", "test"), with E0 set; empty parts are absent.
            Their flat arrays are shared.
        statistics: of the training part.
        curation: what the filters removed, by file.
        settings: how it was made, as plain JSON values.
    """

    parts: Mapping[str, GraphStore]
    statistics: Statistics
    curation: Mapping[str, CurationReport]
    settings: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class SplitRule:
    """How structures are parted that no file of their own assigns to a part.

    Attributes:
        marks: follow the marks that the files carry; then the rest is not used.
        fractions: of training, validation and test structures.
        seed: of the random choice.
        by: "group" (whole molecules) or "structure".
    """

    marks: bool = False
    fractions: Sequence[float] = (0.9, 0.1, 0.0)
    seed: int = 0
    by: str = "group"


def prepare(
    paths: Paths,
    cutoff: float,
    *,
    validation: Paths = (),
    test: Paths = (),
    split: SplitRule | None = None,
    curate: Mapping[str, Any] | None = None,
    atomic_energies: AtomicEnergies = "average",
    on_rank_deficient: str = "warn",
    on_bad: str = "error",
    energy_key: str | None = None,
    forces_key: str | None = None,
    folder: str | Path | None = None,
) -> PreparedData:
    """Read, curate and split files, and make the graphs of all parts.

    Files are read piece by piece; with a folder, memory does not grow with their size but for
    about 1 kB per structure.

    Args:
        paths: file or files to train on, and to split where no other files are given.
        cutoff: Å.
        validation: file or files for validation; then nothing is split off for it.
        test: file or files for testing, likewise.
        split: how the structures of ``paths`` are parted; None: 90 % and 10 %, by molecule. With
            ``validation`` or ``test`` files the fraction of that part goes to training.
        curate: options of ``make_filters``; None keeps everything.
        atomic_energies: "average", "zero" or a map of atomic number to eV.
        on_rank_deficient: "warn" or "error", see ``compute_statistics``.
        on_bad: "error", or "skip" for unusable structures.
        energy_key: extxyz: name of the energy; None tries the usual ones.
        forces_key: extxyz: name of the forces, likewise.
        folder: new folder for ``open_prepared``; None keeps everything in memory.

    Returns:
        The parts and their statistics.

    Raises:
        DataError: on unusable files, structures that occur twice (a leak between parts), an empty
            training part, or elements that only validation or test structures have.
    """
    rule = split or SplitRule()
    sources = [_paths(paths), _paths(validation), _paths(test)]
    filters = {} if curate is None else make_filters(**curate)
    how = {"on_bad": on_bad, "energy_key": energy_key, "forces_key": forces_key}
    settings = {
        **how,
        "files": {name: [str(p) for p in s] for name, s in zip(SPLITS, sources, strict=True)},
        "cutoff": float(cutoff),
        "split": {**dataclasses.asdict(rule), "fractions": [float(x) for x in rule.fractions]},
        "curate": None if curate is None else dict(curate),
    }
    reading = _Reading(sources, filters, how, rule.marks)
    if folder is None:
        store = GraphStore.from_structures(reading.structures(), cutoff)
        return _parted(store, reading, rule, settings, atomic_energies, on_rank_deficient)
    with new_folder(Path(folder)) as partial:
        store = GraphStore.from_structures(reading.structures(), cutoff, folder=partial / "graphs")
        data = _parted(store, reading, rule, settings, atomic_energies, on_rank_deficient)
        _write(partial, data, store)
    return open_prepared(folder)


def open_prepared(folder: str | Path) -> PreparedData:
    """Open what ``prepare`` wrote to a folder.

    Raises:
        DataError: if it is no such folder, of another version, or damaged.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        if index["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{folder}: format version {index['format_version']}, this program reads "
                f"{FORMAT_VERSION}; prepare the data again"
            )
        statistics = Statistics.from_dict(index["statistics"])
        rows = {name: np.load(folder / f"{name}.npy") for name in index["parts"]}
        reports = {name: CurationReport(**report) for name, report in index["curation"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder}: not a folder of prepared data ({error})") from error
    store = open_store(folder / "graphs")
    if sum(len(r) for r in rows.values()) != len(store):
        raise DataError(f"{folder}: its parts do not make up the whole; prepare the data again")
    parts = {name: _labeled(store.subset(r), statistics) for name, r in rows.items()}
    return PreparedData(parts, statistics, reports, index["settings"])


def is_prepared(folder: str | Path) -> bool:
    """Whether a path looks like a folder that ``prepare`` wrote."""
    return (Path(folder) / "prepared.json").is_file()


def _paths(paths: Paths) -> list[Path]:
    return [Path(paths)] if isinstance(paths, str | Path) else [Path(p) for p in paths]


class _Reading:
    """Structures of all files, one after the other; notes the part of each that was kept."""

    def __init__(
        self, sources: list[list[Path]], filters: Filters, how: Mapping[str, Any], marks: bool
    ):
        self.sources, self.filters, self.how, self.marks = sources, filters, how, marks
        self.part: list[int] = []  # of each kept structure; -1: to be split
        self.reports: dict[str, CurationReport] = {}

    def structures(self) -> Iterator[Structure]:
        seen: dict[int, str] = {}
        for part, paths in enumerate(self.sources):
            for path in paths:
                counts = FilterCounts()
                read = iterate(path, seen=seen, **self.how)
                for structure in apply_filters(read, self.filters, counts):
                    self.part.append(self._part(structure, part))
                    yield structure
                self.reports[str(path)] = counts.report()
        if not self.part:
            reports = "; ".join(f"{path}: {report}" for path, report in self.reports.items())
            raise DataError(f"no structure is left to work with ({reports or 'no file is named'})")

    def _part(self, structure: Structure, part: int) -> int:
        if part > 0:
            return part
        if not self.marks:
            return -1
        if not structure.mark:
            raise DataError(
                f"{structure.name}: no split is marked here; split by fractions instead"
            )
        return SPLITS.index(structure.mark)


def _parted(
    store: GraphStore,
    reading: _Reading,
    rule: SplitRule,
    settings: Mapping[str, Any],
    atomic_energies: AtomicEnergies,
    on_rank_deficient: str,
) -> PreparedData:
    part = np.array(reading.part)
    free = np.flatnonzero(part < 0)
    if len(free):
        fractions = np.append(np.asarray(rule.fractions, np.float64), 0.0)[:3]
        for k in (1, 2):
            if reading.sources[k]:
                fractions[[0, k]] = fractions[0] + fractions[k], 0.0
        groups = [store.groups[k] for k in free.tolist()]
        part[free] = split_groups(groups, fractions.tolist(), rule.seed, rule.by)
    stores = {}
    for k, name in enumerate(SPLITS):
        rows = np.flatnonzero(part == k)
        if len(rows):
            stores[name] = store.subset(rows)
    if "train" not in stores:
        raise DataError("the training part is empty; change the split or name other files")
    train = stores["train"]
    present = [z for z, n in zip(train.elements, train.compositions.sum(0), strict=True) if n]
    stores = {name: part.with_elements(present) for name, part in stores.items()}
    statistics = compute_statistics(
        stores["train"], atomic_energies=atomic_energies, on_rank_deficient=on_rank_deficient
    )
    labeled = {name: _labeled(part, statistics) for name, part in stores.items()}
    return PreparedData(labeled, statistics, reading.reports, settings)


def _labeled(store: GraphStore, statistics: Statistics) -> GraphStore:
    return store.with_elements(statistics.elements).with_atomic_energies(statistics.atomic_energies)


def _write(folder: Path, data: PreparedData, store: GraphStore) -> None:
    for name, part in data.parts.items():
        rows = np.searchsorted(store.first_atom, part.first_atom)
        np.save(folder / f"{name}.npy", rows)
    index = {
        "format_version": FORMAT_VERSION,
        "parts": list(data.parts),
        "settings": data.settings,
        "statistics": data.statistics.to_dict(),
        "curation": {path: dataclasses.asdict(r) for path, r in data.curation.items()},
    }
    (folder / "prepared.json").write_text(json.dumps(index, indent=1))
