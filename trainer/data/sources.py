"""Files of a data set, read one after the other: what is kept, what is left out and why."""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlip_md.constants import SPLITS
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.data.arrays import find_deepmd
from mlip_md.trainer.data.filters import CurationReport, apply_filters, make_filters
from mlip_md.trainer.data.identity import identify_geometry, identify_smiles
from mlip_md.trainer.data.isolated import IsolatedAtoms
from mlip_md.trainer.data.judgement import Sample
from mlip_md.trainer.data.labels import LabelKeys
from mlip_md.trainer.data.readers import NAMED_BY_GROUPS, iterate, read_stated_energies, recognize
from mlip_md.trainer.data.rejected import Rejected
from mlip_md.trainer.data.structures import LabeledStructure
from mlip_md.trainer.recipe.schema import DataConfig

Paths = str | list[str] | None
UNNAMED = "split"
"""The set of validation structures that ``data.split`` takes from a file beside named sets."""


def list_paths(paths: Paths | Mapping[str, Paths]) -> list[str]:
    """One path or several, or none, or those of several sets, as a list."""
    return [path for given in list_sets(paths).values() for path in given]


def list_sets(paths: Paths | Mapping[str, Paths]) -> dict[str, list[str]]:
    """Lists of paths by the name of their set; empty names are of no set."""
    if isinstance(paths, Mapping):
        return {name: list_paths(given) for name, given in paths.items()}
    return {"": [paths] if isinstance(paths, str) else paths or []}


PARTIAL, BLOCKS = ".partial", "blocks"
"""Ending of a folder that ``prepare`` has not finished, and the folder in it that says so."""


def is_unfinished(folder: str | Path) -> bool:
    """Whether a path is a folder that ``prepare`` has begun and not finished."""
    return str(folder).endswith(PARTIAL) and (Path(folder) / BLOCKS).is_dir()


def is_prepared(folder: str | Path) -> bool:
    """Whether a path looks like a folder that ``prepare`` wrote."""
    return (Path(folder) / "prepared.json").is_file()


def sum_sizes(path: str | Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    place = Path(path)
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def find_files(path: str) -> list[str]:
    """The data files that a path stands for.

    Args:
        path: of a file, of a folder of DeePMD-kit or one that holds several, of a folder of files,
            or a pattern such as ``runs/*/OUTCAR``.

    Returns:
        Paths in alphabetical order.

    Raises:
        DataError: if there is none.
    """
    place = Path(path)
    if place.is_file():
        return [path]
    if is_unfinished(place):
        raise DataError(
            f"{path} is unfinished work of mlip-md prepare; give its command again, which "
            "finishes it"
        )
    if place.is_dir():
        systems = find_deepmd(place)
        files = systems or sorted(f for f in place.iterdir() if f.is_file() and f.name[0] != ".")
        if not files:
            raise DataError(f"{path} is a folder without data files")
        return [str(file) for file in files]
    matches = sorted(glob.glob(path, recursive=True))
    if not matches:
        raise DataError(f"there is no data file {path}")
    return [file for match in matches for file in find_files(match)]


class Reading:
    """Structures of all files, one after the other; notes the part of each that was kept."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        given = (config.path, config.validation, config.test)
        self.given = [list_paths(paths) for paths in given]
        self.part: list[int] = []  # of each kept structure; -1: to be split
        self.sets: list[str] = []  # of each kept structure; empty: none that has a name
        self.reports: dict[str, CurationReport] = {}
        self.isolated, self.sample = IsolatedAtoms(), Sample()
        self.rejected = Rejected()
        self.dropped: set[int] = set()  # of ``part``, what turned out to be impossible
        self.molecules: dict[str, str] = {}  # key of the molecule by name of the group
        self._check_files()
        self.files = [[f for path in paths for f in find_files(path)] for paths in self.given]
        self._sizes = {f: sum_sizes(f) for files in self.files for f in files}
        self._done, self._now = 0, 0  # bytes of the files before, and of the one that is read
        self.set_of = self._name_files()

    def _check_files(self) -> None:
        if not self.config.path:
            raise ConfigError("no data set is given; name its file: --set data.path=FILE")
        for path in itertools.chain(*self.given):
            if is_prepared(path):
                raise DataError(
                    f"{path} is a folder of prepared data; it can only stand alone, as data.path"
                )

    def _name_files(self) -> dict[str, str]:
        """The validation set of every file that belongs to one."""
        named: dict[str, str] = {}
        for name, paths in list_sets(self.config.validation).items():
            for file in (file for path in paths if name for file in find_files(path)):
                if file in named:
                    raise DataError(
                        f"{file} is in two sets of data.validation, {named[file]} and {name}; "
                        "leave it in one of them"
                    )
                named[file] = name
        return named

    def structures(self) -> Iterator[LabeledStructure]:
        """What passes the filters, file by file."""
        config, seen = self.config, dict[int, str]()
        filters = make_filters(config.curate)
        for part, paths in enumerate(self.files):
            for path in paths:
                report = CurationReport()
                self._done, self._now = self._done + self._now, self._sizes[path]
                self.rejected.read = 0.0
                keys = LabelKeys(
                    config.energy_key, config.forces_key, config.stress_key, config.virial_key
                )
                read = iterate(path, keys=keys, seen=seen, rejected=self.rejected)
                for z, energy in (read_stated_energies(path) or {}).items():
                    self.isolated.add(z, energy, f"stated in {path}")
                frames = self.isolated.part_from(read, config.cutoff)
                for structure in apply_filters(self.sample.watch(frames), filters, report):
                    self.part.append(self._part_of(structure, part))
                    self.sets.append(self.set_of.get(path, "") if part else "")
                    if structure.group not in self.molecules:
                        self.molecules[structure.group] = self._identify(structure, path)
                    yield structure
                report.unused = keys.unused
                self.reports[str(path)] = report
        if not self.part:
            reports = "; ".join(f"{path}: {report}" for path, report in self.reports.items())
            only = (
                "" if not self.isolated.found else ", but isolated atoms are no frames to train on"
            )
            raise DataError(f"no structure is left to work with ({reports}){only}")

    @property
    def read(self) -> float:
        """How much of all files, from 0 to 1, is read."""
        done = self._done + self.rejected.read * self._now
        return done / max(sum(self._sizes.values()), 1)

    def reject(self, number: int, error: DataError) -> None:
        """Note a structure, by its number among those kept, that no graph can be made of."""
        self.dropped.add(number)
        self.rejected.add(error)

    def _identify(self, structure: LabeledStructure, path: str) -> str:
        """Key of the molecule of a group; groups that a user named otherwise stay what they are."""
        if structure.smiles:
            return identify_smiles(structure.smiles, len(structure))
        if structure.cell is None and recognize(path) in NAMED_BY_GROUPS:
            return identify_geometry(structure.atomic_numbers, structure.positions)
        return ""

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
