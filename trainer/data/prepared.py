"""From files to the graphs of all parts of a data set, in memory or in a folder for many runs.

A folder holds the recipe's section on data with which it was made; ``open_prepared_for`` refuses
one that was made in another way than a recipe says.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.constants import SPLITS
from mlip_md.elements import symbol
from mlip_md.errors import ConfigError, DataError
from mlip_md.files import new_folder, write_text
from mlip_md.trainer.data.filters import CurationReport, apply_filters, make_filters
from mlip_md.trainer.data.readers import iterate
from mlip_md.trainer.data.split import split_groups
from mlip_md.trainer.data.statistics import (
    FITTED,
    Statistics,
    compute_statistics,
    warn_of_open_energies,
)
from mlip_md.trainer.data.store import (
    WRITTEN_BY,
    GraphStore,
    check_format,
    check_sums,
    open_store,
    sum_files,
)
from mlip_md.trainer.data.structures import LabeledStructure, refusing_unreadable
from mlip_md.trainer.recipe.compare import find_differences
from mlip_md.trainer.recipe.schema import AtomicEnergies, DataConfig

FORMAT_VERSION = 2

OF_BATCHES = {"path", "max_n_node", "max_n_edge", "batch_size", "on_oversize"}
"""Rows of ``DataConfig`` that every run chooses for itself, also with prepared data."""


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedData:
    """The parts of a data set, ready for batches.

    Attributes:
        parts: stores by name ("train", "validation", "test"), with E0 set; empty parts are absent.
            Their flat arrays are shared.
        statistics: of the training part.
        curation: what the filters removed, by file.
        config: how it was made.
    """

    parts: Mapping[str, GraphStore]
    statistics: Statistics
    curation: Mapping[str, CurationReport]
    config: DataConfig


def prepare(
    config: DataConfig,
    atomic_energies: AtomicEnergies = "average",
    folder: str | Path | None = None,
) -> PreparedData:
    """Read, curate and split files, and make the graphs of all parts.

    Files are read piece by piece; with a folder, memory does not grow with their size but for
    about 1 kB per structure. A warning is logged if the data leave E0 open.

    Args:
        config: files, filters, split, cutoff (Å). Where ``validation`` or ``test`` files are named,
            the fraction of that part goes to training.
        atomic_energies: "average" (or None), "zero" or a map of atomic number to eV.
        folder: new folder, to be named as ``data.path`` of later runs; None keeps everything in
            memory.

    Returns:
        The parts and their statistics.

    Raises:
        ConfigError: if no data set is named.
        DataError: on unusable files, structures that occur twice (a leak between parts), an empty
            training part, elements that only validation or test structures have, or if the folder
            exists.
        OutputError: if the folder cannot be written.
    """
    reading = _Reading(config)
    if folder is None:
        store = GraphStore.from_structures(reading.structures(), config.cutoff)
        data = _part(store, reading, atomic_energies)
    else:
        with new_folder(Path(folder)) as partial:
            graphs = partial / "graphs"
            store = GraphStore.from_structures(reading.structures(), config.cutoff, folder=graphs)
            _write(partial, _part(store, reading, atomic_energies), store)
        data = open_prepared(folder)
    warn_of_open_energies(data.statistics)
    return data


def open_prepared(folder: str | Path) -> PreparedData:
    """Open what ``prepare`` wrote to a folder.

    Raises:
        DataError: if it is no such folder, of another version, or damaged.
    """
    folder = Path(folder)
    with refusing_unreadable(folder, "not a folder of prepared data"):
        index = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
        check_format(folder, index, FORMAT_VERSION)
        values = _upgrade(index["settings"]) if index["format_version"] == 1 else index["data"]
        config = DataConfig.model_validate(values)
        statistics = Statistics.from_dict(index["statistics"])
        rows = {name: np.load(folder / f"{name}.npy") for name in index["parts"]}
        reports = {name: CurationReport(**report) for name, report in index["curation"].items()}
        together = np.sort(np.concatenate(list(rows.values())))
    store = open_store(folder / "graphs")
    if not np.array_equal(together, np.arange(len(store))):
        raise DataError(
            f"{folder} is damaged: its parts ({', '.join(rows)}) do not hold each of its "
            f"{len(store)} structures exactly once; prepare the data again"
        )
    with refusing_unreadable(folder, "not a folder of prepared data"):
        check_sums(folder, index.get("sha256", {}))  # written since version 0.2.0
    parts = {name: _labeled(store.subset(r), statistics) for name, r in rows.items()}
    return PreparedData(parts, statistics, reports, config)


def open_prepared_for(config: DataConfig, atomic_energies: AtomicEnergies) -> PreparedData:
    """Open the folder ``config.path`` with other E0; everything else must be as it was prepared.

    Args:
        config: of the run.
        atomic_energies: "average" (or None), "zero" or a map of atomic number to eV.

    Raises:
        ConfigError: if the folder was made in another way than ``config`` says.
        DataError: as ``open_prepared``, and if E0 of an element is missing.
    """
    data = open_prepared(str(config.path))
    for name, (prepared, given) in _find_changes(data.config, config).items():
        raise ConfigError(
            f"{name} is {json.dumps(given)}, but {config.path} was prepared with "
            f"{json.dumps(prepared)}; prepare the data again or change {name}"
        )
    fitted = data.statistics.atomic_energies_source == FITTED
    if "train" in data.parts and not (atomic_energies in (None, "average") and fitted):
        statistics = compute_statistics(data.parts["train"], atomic_energies)
        parts = {name: _labeled(part, statistics) for name, part in data.parts.items()}
        data = dataclasses.replace(data, parts=parts, statistics=statistics)
    warn_of_open_energies(data.statistics)
    return data


def is_prepared(folder: str | Path) -> bool:
    """Whether a path looks like a folder that ``prepare`` wrote."""
    return (Path(folder) / "prepared.json").is_file()


def _find_changes(prepared: DataConfig, given: DataConfig) -> dict[str, tuple[Any, Any]]:
    """Rows that a folder was prepared with and that a recipe has otherwise."""
    trees: list[dict[str, Any]] = []
    for config in (prepared, given):
        rows = config.model_dump(mode="json", exclude=OF_BATCHES)
        for name in ("validation", "test"):
            if getattr(given, name) is None:  # leaves it to the folder
                del rows[name]
            else:
                rows[name] = _list_paths(rows[name])
        if config.split.from_file:
            rows["split"] = {"from_file": True}  # the others mean nothing then
        trees.append(rows)
    before, now = trees
    return find_differences(before, now, "data")


def _upgrade(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The section on data of a folder of format version 1, which had words of its own for it."""
    files, split, curate = settings["files"], settings["split"], settings["curate"]
    if curate is not None:
        curate = {**curate, "one_bond_per_hydrogen": curate.get("hydrogen_bonds", True)}
        curate.pop("hydrogen_bonds", None)
        if curate.get("elements") is not None:
            curate["elements"] = [symbol(z) for z in curate["elements"]]
    fractions = dict(zip(SPLITS, (*split["fractions"], 0.0), strict=False))
    return {
        "path": files["train"],
        "validation": files["validation"] or None,
        "test": files["test"] or None,
        "split": {"from_file": split["marks"], "by": split["by"], "seed": split["seed"]}
        | fractions,
        "curate": curate,
        **{name: settings[name] for name in ("cutoff", "on_bad", "energy_key", "forces_key")},
    }


def _list_paths(paths: str | list[str] | None) -> list[str]:
    return [paths] if isinstance(paths, str) else paths or []


class _Reading:
    """Structures of all files, one after the other; notes the part of each that was kept."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.files = [_list_paths(p) for p in (config.path, config.validation, config.test)]
        self.part: list[int] = []  # of each kept structure; -1: to be split
        self.reports: dict[str, CurationReport] = {}
        self._check_files()

    def _check_files(self) -> None:
        if not self.config.path:
            raise ConfigError("no data set is given; name its file: --set data.path=FILE")
        for path in itertools.chain(*self.files):
            if is_prepared(path):
                raise DataError(
                    f"{path} is a folder of prepared data; it can only stand alone, as data.path"
                )
            if Path(path).is_dir():
                raise DataError(f"{path} is a folder; name the files in it")
            if not Path(path).is_file():
                raise DataError(f"there is no data file {path}")

    def structures(self) -> Iterator[LabeledStructure]:
        """What passes the filters, file by file."""
        config, seen = self.config, dict[int, str]()
        filters = make_filters(config.curate)
        for part, paths in enumerate(self.files):
            for path in paths:
                report = CurationReport()
                read = iterate(
                    path,
                    on_bad=config.on_bad,
                    energy_key=config.energy_key,
                    forces_key=config.forces_key,
                    seen=seen,
                )
                for structure in apply_filters(read, filters, report):
                    self.part.append(self._part_of(structure, part))
                    yield structure
                self.reports[str(path)] = report
        if not self.part:
            reports = "; ".join(f"{path}: {report}" for path, report in self.reports.items())
            raise DataError(f"no structure is left to work with ({reports})")

    def _part_of(self, structure: LabeledStructure, part: int) -> int:
        if part > 0:
            return part
        if not self.config.split.from_file:
            return -1
        if not structure.mark:
            raise DataError(
                f"{structure.name}: no split is marked here; split by fractions instead"
            )
        return SPLITS.index(structure.mark)


def _part(store: GraphStore, reading: _Reading, atomic_energies: AtomicEnergies) -> PreparedData:
    """The parts of a store with everything that was read, and their statistics."""
    part = np.array(reading.part)
    free = np.flatnonzero(part < 0)
    if len(free):
        groups = [store.groups[k] for k in free.tolist()]
        own_files = [name for k, name in enumerate(SPLITS) if k and reading.files[k]]
        part[free] = split_groups(groups, reading.config.split, own_files)
    rows = {name: np.flatnonzero(part == k) for k, name in enumerate(SPLITS)}
    stores = {name: store.subset(r) for name, r in rows.items() if len(r)}
    if "train" not in stores:
        raise DataError("the training part is empty; change the split or name other files")
    train = stores["train"]
    present = [z for z, n in zip(train.elements, train.compositions.sum(0), strict=True) if n]
    stores = {name: part.with_elements(present) for name, part in stores.items()}
    statistics = compute_statistics(stores["train"], atomic_energies)
    parts = {name: _labeled(part, statistics) for name, part in stores.items()}
    return PreparedData(parts, statistics, reading.reports, reading.config)


def _labeled(store: GraphStore, statistics: Statistics) -> GraphStore:
    return store.with_elements(statistics.elements).with_atomic_energies(statistics.atomic_energies)


def _write(folder: Path, data: PreparedData, store: GraphStore) -> None:
    for name, part in data.parts.items():
        rows = np.searchsorted(store.first_atom, part.first_atom)
        np.save(folder / f"{name}.npy", rows)
    files = [*(f"{name}.npy" for name in data.parts), "graphs/index.json"]
    index = {
        "format_version": FORMAT_VERSION,
        "written_by": WRITTEN_BY,
        "parts": list(data.parts),
        "sha256": sum_files(folder, files),
        "data": data.config.model_dump(mode="json"),
        "statistics": data.statistics.to_dict(),
        "curation": {path: dataclasses.asdict(r) for path, r in data.curation.items()},
    }
    write_text(folder / "prepared.json", json.dumps(index, indent=1))
