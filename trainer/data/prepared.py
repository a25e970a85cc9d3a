"""From files to the graphs of all parts of a data set, in memory or in a folder for many runs.

A folder holds the recipe's section on data with which it was made; ``open_prepared_for`` refuses
one that was made in another way than a recipe says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.constants import SPLITS
from mlip_md.elements import symbol
from mlip_md.errors import ConfigError, DataError, OutputError, RejectedError
from mlip_md.files import new_folder, write_text
from mlip_md.ownership import owning
from mlip_md.trainer.data.filters import CurationReport
from mlip_md.trainer.data.identity import merge_groups
from mlip_md.trainer.data.isolated import IsolatedAtoms
from mlip_md.trainer.data.judgement import Finding, describe_findings, judge
from mlip_md.trainer.data.sources import (
    BLOCKS,
    PARTIAL,
    UNNAMED,
    Reading,
    is_prepared,
    is_unfinished,
    list_paths,
    list_sets,
)
from mlip_md.trainer.data.split import find_overlap, split_groups
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
from mlip_md.trainer.data.structures import refusing_unreadable
from mlip_md.trainer.recipe.compare import find_differences
from mlip_md.trainer.recipe.schema import AtomicEnergies, DataConfig

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2

Tell = Callable[[int, float], None]
"""Hears how far the work is, see ``prepare``."""

OF_FILES = ("path", "validation", "test")

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
        isolated: atoms that its files hold; they are in no part.
        findings: what is probably wrong with labels, see ``judgement``.
        overlap: molecules in several parts, a line for each pair of parts that has some.
        rejected: records that were left out as unusable, and why; empty for an opened folder.
        validation_sets: rows of the validation part by the name of the set that they form; empty
            where sets have no names.
    """

    parts: Mapping[str, GraphStore]
    statistics: Statistics
    curation: Mapping[str, CurationReport]
    config: DataConfig
    isolated: IsolatedAtoms = dataclasses.field(default_factory=IsolatedAtoms)
    findings: tuple[Finding, ...] = ()
    overlap: Sequence[str] = ()
    rejected: Sequence[tuple[str, str]] = ()
    validation_sets: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


def prepare(
    config: DataConfig,
    atomic_energies: AtomicEnergies = "average",
    folder: str | Path | None = None,
    *,
    workers: int = 1,
    tell: Tell | None = None,
) -> PreparedData:
    """Read, curate and split files, and make the graphs of all parts.

    Files are read piece by piece; with a folder, memory does not grow with their size but for
    about 1 kB per structure.

    Args:
        config: files, filters, split, cutoff (Å). Where ``validation`` or ``test`` files are named,
            the fraction of that part goes to training.
        atomic_energies: as ``compute_statistics`` takes them.
        folder: new folder, to be named as ``data.path`` of later runs; None keeps everything in
            memory. What is done of it lies in ``FOLDER.partial`` meanwhile. After a kill or Ctrl-C
            it stays there, and the next call goes on with what still fits.
        workers: processes that make neighbor lists while this one reads. More than one are started
            by spawn: a script needs its ``if __name__ == "__main__"``. The folder is the same.
        tell: called again and again with the number of structures that are done and with how much
            of the files, from 0 to 1, is read (0 where a format does not tell).

    Returns:
        The parts and their statistics. What is doubtful about E0 is said by ``warn_of_energies``,
        for not every training takes them from its data.

    Raises:
        ConfigError: if no data set is named.
        DataError: on unusable files, structures that occur twice (a leak between parts), an empty
            training part, elements that only validation or test structures have, or if the folder
            exists.
        OutputError: if the folder cannot be written.
        OwnershipError: if another process prepares it.
    """
    reading = Reading(config)
    work = _Work(workers, tell)
    try:
        data = _prepare(reading, atomic_energies, folder, work)
    except DataError as error:  # labels in other units end in many ways
        findings = judge(reading.sample.frames())
        if not findings:
            raise
        records = error.records if isinstance(error, RejectedError) else []
        raise RejectedError(f"{error}. {describe_findings(findings)}", records) from error
    _warn(data)
    return data


@dataclasses.dataclass(frozen=True)
class _Work:
    """How graphs are made: processes, who hears of it, where finished blocks are kept."""

    workers: int
    tell: Tell | None
    keep: Path | None = None


def _prepare(
    reading: Reading, atomic_energies: AtomicEnergies, folder: str | Path | None, work: _Work
) -> PreparedData:
    """``prepare`` of what is being read."""
    if folder is None:
        return _part(_make_graphs(reading, None, work), reading, atomic_energies)
    folder = Path(folder)
    with _unfinished(folder) as place, new_folder(folder, place) as partial:
        work = dataclasses.replace(work, keep=place / BLOCKS)
        store = _make_graphs(reading, partial / "graphs", work)
        data = _part(store, reading, atomic_energies)
        _write(partial, data, store)
    return dataclasses.replace(open_prepared(folder), rejected=data.rejected)


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """``FOLDER.partial``, ours alone; it outlives a kill, Ctrl-C and a full disk only."""
    place = folder.with_name(folder.name + PARTIAL)
    if folder.exists():
        raise DataError(f"{folder} exists already; remove it or choose another folder")
    if place.exists() and not is_unfinished(place):
        raise DataError(f"{place}, where unfinished work would lie, is something else; move it")
    try:
        (place / BLOCKS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{place} could not be made ({error.strerror}); name another") from error
    with owning(place):
        for stale in place.glob(".*.tmp"):
            shutil.rmtree(stale, ignore_errors=True)
        try:
            yield place
        except (OutputError, KeyboardInterrupt):
            raise
        except Exception:
            shutil.rmtree(place, ignore_errors=True)
            raise
    shutil.rmtree(place, ignore_errors=True)


def _make_graphs(reading: Reading, folder: Path | None, work: _Work) -> GraphStore:
    config, rejected, tell = reading.config, reading.rejected, work.tell
    try:
        store = GraphStore.from_structures(
            reading.structures(), config.cutoff, folder=folder, reject=reading.reject,
            workers=work.workers, keep=work.keep,
            tell=None if tell is None else lambda count: tell(count, reading.read),
        )  # fmt: skip
    except DataError:
        rejected.check(config.on_bad)  # says more than that nothing was left
        raise
    rejected.check(config.on_bad)
    return store


def _warn(data: PreparedData) -> None:
    """Log what is probably wrong with filters and labels."""
    for path, report in data.curation.items():
        report.warn_of_much(path)
    if data.config.split.by == "group" and len({*data.parts["train"].groups}) > 1:
        for line in data.overlap:
            logger.warning("%s; errors there look better than they are", line)
    for finding in data.findings:
        logger.warning("%s", finding.text)


def warn_of_energies(data: PreparedData) -> None:
    """Log what is probably wrong with E0, for a training that takes those of its data."""
    statistics = data.statistics
    warn_of_open_energies(statistics)
    if statistics.atomic_energies_source == FITTED:
        fitted = zip(statistics.elements, statistics.atomic_energies.tolist(), strict=True)
        data.isolated.warn_if_unused(dict(fitted))


def open_prepared(folder: str | Path, trusted: bool = False) -> PreparedData:
    """Open what ``prepare`` wrote to a folder.

    Args:
        folder: that ``prepare`` made.
        trusted: whether another process has just opened it; then no checksum is compared, and of
            the large arrays nothing is read before it is needed.

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
        isolated = IsolatedAtoms.from_dict(index.get("isolated", {"found": {}, "ions": []}))
        findings = tuple(Finding(**found) for found in index.get("findings", []))
        together = np.sort(np.concatenate(list(rows.values())))
        sets = {name: np.load(_set_file(folder, name)) for name in index.get("sets", [])}
    store = open_store(folder / "graphs", trusted)
    if not np.array_equal(together, np.arange(len(store))):
        raise DataError(
            f"{folder} is damaged: its parts ({', '.join(rows)}) do not hold each of its "
            f"{len(store)} structures exactly once; prepare the data again"
        )
    if not trusted:
        with refusing_unreadable(folder, "not a folder of prepared data"):
            check_sums(folder, index.get("sha256", {}))  # written since version 0.2.0
    parts = {name: _labeled(store.subset(r), statistics) for name, r in rows.items()}
    return PreparedData(
        parts, statistics, reports, config, isolated, findings, index.get("overlap", []),
        validation_sets=sets,
    )  # fmt: skip


def open_prepared_for(config: DataConfig, atomic_energies: AtomicEnergies) -> PreparedData:
    """Open the folder ``config.path`` with other E0; everything else must be as it was prepared.

    Args:
        config: of the run.
        atomic_energies: as ``compute_statistics`` takes them.

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
        statistics = compute_statistics(data.parts["train"], atomic_energies, data.isolated)
        data = relabel(data, statistics)
    _warn(data)
    return data


def relabel(data: PreparedData, statistics: Statistics) -> PreparedData:
    """The data with the E0 of other statistics.

    Args:
        data: as it was opened.
        statistics: of its training part.
    """
    parts = {name: _labeled(part, statistics) for name, part in data.parts.items()}
    return dataclasses.replace(data, parts=parts, statistics=statistics)


def prepare_once(
    config: DataConfig,
    atomic_energies: AtomicEnergies,
    folder: Path,
    *,
    workers: int = 1,
    tell: Tell | None = None,
) -> PreparedData:
    """Prepared data that are kept in a folder and, the next time, taken from it.

    Where the folder was made with other rows, of other files or of other content, or is damaged,
    the files are read again and it is replaced.

    Args:
        config: files, filters, split, cutoff (Å).
        atomic_energies: as ``compute_statistics`` takes them.
        folder: made if needed.
        workers: as ``prepare`` takes them.
        tell: as ``prepare`` takes it.

    Raises:
        ConfigError: as ``prepare``.
        DataError: as ``prepare``.
        OutputError: as ``prepare``.
    """
    if is_prepared(folder):
        reason = _find_reason(folder, config)
        if not reason:
            kept = config.model_copy(update={"path": str(folder)})
            return open_prepared_for(kept, atomic_energies)
        logger.info("%s is made anew: %s", folder, reason)
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    data = prepare(config, atomic_energies, fresh, workers=workers, tell=tell)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)
    return data


def _find_reason(folder: Path, config: DataConfig) -> str:
    """Why a folder is not what a recipe asks for; empty if it is."""
    try:
        before = open_prepared(folder).config
        index = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    except DataError as error:
        return str(error)
    for name in OF_FILES:
        if list_sets(getattr(config, name)) != list_sets(getattr(before, name)):
            return f"data.{name} is another"
    for path, state in index["files"].items():
        if Path(path).exists() and list(_state(path)) != state:
            return f"{path} has changed"
    return ", ".join(_find_changes(before, config))


def _state(path: str) -> tuple[int, int]:
    """Size and time of change of a file, or of the files in a folder."""
    place = Path(path)
    files = sorted(place.rglob("*")) if place.is_dir() else [place]
    states = [file.stat() for file in files if file.is_file()]
    return sum(s.st_size for s in states), max((s.st_mtime_ns for s in states), default=0)


def _find_changes(prepared: DataConfig, given: DataConfig) -> dict[str, tuple[Any, Any]]:
    """Rows that a folder was prepared with and that a recipe has otherwise."""
    trees: list[dict[str, Any]] = []
    for config in (prepared, given):
        rows = config.model_dump(mode="json", exclude=OF_BATCHES)
        for name in ("validation", "test"):
            if getattr(given, name) is None:  # leaves it to the folder
                del rows[name]
            else:
                named = isinstance(rows[name], Mapping)
                rows[name] = list_sets(rows[name]) if named else list_paths(rows[name])
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


def _part(store: GraphStore, reading: Reading, atomic_energies: AtomicEnergies) -> PreparedData:
    """The parts of a store with everything that was read, and their statistics."""
    part = np.delete(np.array(reading.part), sorted(reading.dropped))
    names = np.delete(np.array(reading.sets), sorted(reading.dropped))
    free = np.flatnonzero(part < 0)
    merged = merge_groups(reading.molecules)
    if len(free):
        groups = [merged[store.groups[k]] for k in free.tolist()]
        own_files = [name for k, name in enumerate(SPLITS) if k and reading.files[k]]
        part[free] = split_groups(groups, reading.config.split, own_files)
    overlap = find_overlap([merged[group] for group in store.groups], part)
    rows = {name: np.flatnonzero(part == k) for k, name in enumerate(SPLITS)}
    stores = {name: store.subset(r) for name, r in rows.items() if len(r)}
    if "train" not in stores:
        raise DataError("the training part is empty; change the split or name other files")
    train = stores["train"]
    present = [z for z, n in zip(train.elements, train.compositions.sum(0), strict=True) if n]
    stores = {name: part.with_elements(present) for name, part in stores.items()}
    statistics = compute_statistics(stores["train"], atomic_energies, reading.isolated)
    parts = {name: _labeled(part, statistics) for name, part in stores.items()}
    findings = tuple(judge(reading.sample.frames()))
    reports, config = reading.reports, reading.config
    sets = _find_sets(names[rows["validation"]])
    return PreparedData(parts, statistics, reports, config, reading.isolated, findings, overlap,
                        reading.rejected.records, sets)  # fmt: skip


def _find_sets(names: np.ndarray) -> dict[str, np.ndarray]:
    """Rows by name of the set; structures of none form one too where others have names."""
    if not names.astype(bool).any():
        return {}
    names = np.where(names == "", UNNAMED, names)
    return {name: np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}


def _set_file(folder: Path, name: str) -> Path:
    return folder / f"validation.{name}.npy"


def _labeled(store: GraphStore, statistics: Statistics) -> GraphStore:
    return store.with_elements(statistics.elements).with_atomic_energies(statistics.atomic_energies)


def _write(folder: Path, data: PreparedData, store: GraphStore) -> None:
    for name, part in data.parts.items():
        rows = np.searchsorted(store.first_atom, part.first_atom)
        np.save(folder / f"{name}.npy", rows)
    for name, places in data.validation_sets.items():
        np.save(_set_file(folder, name), places)
    sets = [_set_file(folder, name).name for name in data.validation_sets]
    files = [*(f"{name}.npy" for name in data.parts), *sets, "graphs/index.json"]
    index = {
        "format_version": FORMAT_VERSION,
        "written_by": WRITTEN_BY,
        "parts": list(data.parts),
        "sets": list(data.validation_sets),
        "sha256": sum_files(folder, files),
        "data": data.config.model_dump(mode="json"),
        "statistics": data.statistics.to_dict(),
        "curation": {path: dataclasses.asdict(r) for path, r in data.curation.items()},
        "isolated": data.isolated.to_dict(),
        "overlap": list(data.overlap),
        "files": {path: _state(path) for path in data.curation},
        "findings": [dataclasses.asdict(finding) for finding in data.findings],
    }
    write_text(folder / "prepared.json", json.dumps(index, indent=1))
