"""Read labeled structures from SPICE files, curated HDF5 files and extended XYZ.

Everything comes out in Å, eV and eV/Å. A label that is missing, infinite or of the wrong shape is
an error that names file, key and index; nothing is ever filled in.
"""

from __future__ import annotations

import ast
import bz2
import contextlib
import functools
import gzip
import io
import itertools
import json
import logging
import lzma
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO, cast

import ase
import ase.db
import ase.io
import ase.units
import h5py
import numpy as np

from mlip_md.constants import ANGSTROM_PER_NM, BOHR, HARTREE, KJ_PER_KCAL, KJ_PER_MOL_PER_EV, SPLITS
from mlip_md.elements import MAX_ATOMIC_NUMBER
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.data.arrays import is_deepmd, iterate_deepmd, iterate_npz
from mlip_md.trainer.data.isolated import IsolatedAtoms
from mlip_md.trainer.data.labels import LabelKeys, read_labels
from mlip_md.trainer.data.rejected import Rejected
from mlip_md.trainer.data.structures import (
    READ,
    Fields,
    LabeledStructure,
    Source,
    refusing_unreadable,
)
from mlip_md.trainer.recipe.schema import to_atomic_number

logger = logging.getLogger(__name__)

SMILES_KEYS = ("smiles", "SMILES")
GROUP_KEYS = (*SMILES_KEYS, "group", "molecule")

LENGTH_UNITS = {"bohr": BOHR, "angstrom": 1.0, "nanometer": ANGSTROM_PER_NM}
ENERGY_UNITS = {
    "hartree": HARTREE,
    "ev": 1.0,
    "kj/mol": 1.0 / KJ_PER_MOL_PER_EV,
    "kcal/mol": KJ_PER_KCAL / KJ_PER_MOL_PER_EV,
}
_QUOTIENTS = [(e, l, ENERGY_UNITS[e], LENGTH_UNITS[l]) for e in ENERGY_UNITS for l in LENGTH_UNITS]
FORCE_UNITS = {f"{e}/{l}": energy / length for e, l, energy, length in _QUOTIENTS}
STRESS_UNITS = {f"{e}/{l}^3": energy / length**3 for e, l, energy, length in _QUOTIENTS}
STRESS_UNITS["gpa"] = ase.units.GPa

OTHER_UNIT_NAMES = {
    **dict.fromkeys(("å", "a", "ang", "angstroms"), "angstrom"),
    **dict.fromkeys(("å^3", "å³", "a^3", "ang^3"), "angstrom^3"),
    **dict.fromkeys(("nm", "nanometers"), "nanometer"),
    **dict.fromkeys(("eh", "ha"), "hartree"),
}

ATOMIC_ENERGY_ATTRIBUTES = {
    "atomic_energies": 1.0,
    "atomic_energies_hartree": HARTREE,
    "atom_reference_energies_hartree": HARTREE,
}
"""Root attributes of an HDF5 file with energies of isolated atoms, and their units in eV."""


def read(path: str | Path, **options: Any) -> list[LabeledStructure]:
    """All structures of a file at once; options and errors as for ``iterate``."""
    return list(iterate(path, **options))


def iterate(
    path: str | Path,
    *,
    split: str | None = None,
    on_bad: str = "error",
    keys: LabelKeys | None = None,
    energy_key: str | None = None,
    forces_key: str | None = None,
    seen: dict[int, str] | None = None,
    rejected: Rejected | None = None,
) -> Iterator[LabeledStructure]:
    """Yield the labeled structures of a file one by one, in its order.

    Args:
        path: SPICE HDF5 (one group per molecule, bohr and hartree), curated HDF5 (one group per
            structure, Å and eV), extended XYZ (Å and eV), also packed, or another of ``FORMATS``.
            The ``units`` attributes of HDF5 data sets are followed where there are any; the unit
            of an attribute such as ``energy`` may stand beside it, as ``energy_units``.
        split: only structures that the file itself marks "train", "validation" or "test"; there
            may be none. None reads all, marked or not.
        on_bad: "error", or "skip" to leave out unusable structures (logged and counted).
        keys: extxyz: names of labels; None tries the usual ones.
        energy_key: extxyz: name of the energy alone, where no ``keys`` are given.
        forces_key: extxyz: name of the forces, likewise.
        seen: remembers structures: given to several calls, duplicates are found across their files.
        rejected: takes all unusable structures, whatever ``on_bad`` says; None obeys it.

    Raises:
        DataError: if the file is not readable, or, naming ``file:key[index]``, on missing labels,
            NaN, wrong shapes, unknown units and structures that stand in the file twice.
    """
    path = Path(path)
    _check_choice("on_bad", on_bad, ("error", "skip"))
    if split is not None:
        _check_choice("split", split, SPLITS)
    source = FORMATS[recognize(path)].iterate(
        path, split, keys or LabelKeys(energy_key, forces_key)
    )
    seen = {} if seen is None else seen
    count = skipped = 0
    with contextlib.closing(source):  # an error would keep the file open until it is forgotten
        for fields in source if rejected is None else _to_the_end(source, rejected):
            try:
                structure = _structure(fields, seen)
            except DataError as error:
                if rejected is not None:
                    rejected.add(error)
                    continue
                if on_bad == "error":
                    raise
                skipped += 1
                logger.warning("skipped: %s", error)
                continue
            count += 1
            yield structure
    if skipped:
        logger.warning("%s: %d unusable structures were skipped", path, skipped)
    if count == 0 and split is None and rejected is None:
        raise DataError(f"{path}: it holds no usable structure")


def _to_the_end(source: Source, rejected: Rejected) -> Iterator[Fields | DataError]:
    """What a source yields, counted; where it breaks off is a bad record, too."""
    try:
        for fields in source:
            rejected.examined += 1
            if isinstance(fields, dict):
                rejected.read = fields.get(READ, 0.0)
            yield fields
    except DataError as error:
        rejected.examined += 1
        rejected.add(error)


MAGIC = ((0, b"SQLite format 3", "db"), (0, b"- of Ulm", "traj"), (0, b"PK\x03\x04", "npz"))
"""Place and bytes by which binary files are known."""
FOREIGN = (
    (16, b"\xde\xc0\xef\xbe", "an LMDB database, as fairchem writes them; read it there with ASE "
     "(fairchem's or ase-db-backends' reader) and write an ASE database or extended XYZ"),
    (0, b"\x93NUMPY", "a single array of NumPy; a data set is an npz file or a DeePMD folder"),
    *((0, bytes((0x80, protocol)), "a pickle of Python; reading one runs what is in it, so write "
       "extended XYZ with the program that made it") for protocol in range(2, 6)),
)  # fmt: skip
"""Place and bytes of files that are not read, and what to do."""
KNOWN = (
    "extended XYZ, SPICE and curated HDF5, ASE databases and trajectories, npz (rMD17, 3BPA), "
    "folders of DeePMD-kit, OUTCAR and vasprun.xml of VASP"
)

NAMED_BY_GROUPS = ("spice", "curated")
"""Formats in which a molecule is known by the name of its group only, if no SMILES is stated."""


def recognize(path: str | Path) -> str:
    """Format of a data file, or of a folder of DeePMD-kit, by its content (see ``FORMATS``).

    Raises:
        DataError: if there is no such file, or its content is of no known format; it says what it
            is, where that can be told.
    """
    path = Path(path)
    if path.is_dir() and is_deepmd(path):
        return "deepmd"
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if h5py.is_hdf5(path):
        with _open_hdf5(path) as file:
            return _recognize_hdf5(file, path)
    with refusing_unreadable(path), open(path, "rb") as binary:
        start = binary.read(64)
    for place, magic, kind in MAGIC:
        if start[place:].startswith(magic):
            return kind
    for place, magic, words in FOREIGN:
        if start[place:].startswith(magic):
            raise DataError(f"{path}: {words}")
    if not start.strip():
        raise DataError(f"{path}: the file is empty")
    with refusing_unreadable(path, "neither HDF5 nor text"), _open_text(path) as (stream, _):
        first = next(filter(None, map(str.strip, stream)), "")
        return "extxyz" if first.isdecimal() else _recognize_text(first, stream, path)


def _recognize_text(first: str, stream: TextIO, path: Path) -> str:
    """Format by the first line that is not empty, and some that follow."""
    lines = [first, *itertools.islice(stream, 60)]
    if first.startswith("<?xml") and any("<modeling" in line for line in lines):
        return "vasprun"
    if first.startswith("vasp."):
        return "outcar"
    if first.startswith("{") and any('"ids"' in line or '"1": {' in line for line in lines):
        return "db"
    raise DataError(
        f"{path}: not a known format; its first line {first[:40]!r} is no number of atoms "
        f"(extended XYZ). Known are {KNOWN}; ase.io.write(..., format='extxyz') writes the first"
    )


def read_atomic_energies(path: str | Path) -> dict[int, float] | None:
    """Energies of isolated atoms that a file carries, eV by atomic number, or None.

    They are looked for in the attributes ``atomic_energies`` (eV), ``atomic_energies_hartree`` and
    ``atom_reference_energies_hartree`` of an HDF5 file (JSON maps of atomic number to energy), and
    in the neutral structures of one atom without periodicity of other files.

    Raises:
        DataError: if the file or the attribute is not readable.
    """
    path = Path(path)
    kind = recognize(path)
    stated = FORMATS[kind].read_atomic_energies(path)
    if stated is not None or kind in NAMED_BY_GROUPS:
        return stated
    atoms = IsolatedAtoms()
    for _ in atoms.part_from((s for s in iterate(path) if s.cell is None), 1.0):
        pass
    return {z: energy for z, ((energy, _), *_) in atoms.found.items()} or None


def read_stated_energies(path: str | Path) -> dict[int, float] | None:
    """Energies that a file states beside its structures, as ``read_atomic_energies`` has them."""
    path = Path(path)
    return FORMATS[recognize(path)].read_atomic_energies(path)


def read_energy_file(path: str | Path) -> dict[int, float]:
    """E0 (eV) by atomic number from a file of their own.

    Args:
        path: a JSON map, ``{"H": -13.6}``, by symbol or atomic number; or a data file with isolated
            atoms, see ``read_atomic_energies``.

    Raises:
        DataError: if it is not readable or has no energies of atoms.
    """
    path = Path(path)
    with refusing_unreadable(path, "no file of atomic energies"):
        content = path.read_bytes()
        if content.lstrip().startswith(b"{"):
            return _parse_energies(content.decode(), 1.0, str(path))
    energies = read_atomic_energies(path)
    if energies is None:
        raise DataError(f'{path}: it holds no isolated atoms; write a JSON map: {{"H": -13.6}}')
    return energies


def formal_charge(smiles: str) -> int:
    """Total charge of a SMILES string: the sum of the formal charges of its bracket atoms."""
    total = 0
    for atom in re.findall(r"\[([^\]]*)\]", smiles):
        match = re.search(r"(\++|-+)(\d*)(?::\d+)?$", atom)
        if match:
            size = int(match.group(2)) if match.group(2) else len(match.group(1))
            total += size if match.group(1)[0] == "+" else -size
    return total


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[tuple[TextIO, Callable[[], float]]]:
    """A text file, also packed (whatever its name) and with a byte order mark.

    Beside it stands what tells how much of the file, from 0 to 1, is read.
    """
    openers: dict[bytes, Callable[..., Any]] = {
        b"\x1f\x8b": gzip.open,
        b"BZh": bz2.open,
        b"\xfd7zXZ\x00": lzma.open,
    }
    with open(path, "rb") as file:
        start, size = file.read(6), file.seek(0, io.SEEK_END)
        file.seek(0)
        opener = next((o for magic, o in openers.items() if start.startswith(magic)), None)
        unpacked = file if opener is None else opener(file)
        with io.TextIOWrapper(unpacked, encoding="utf-8-sig") as stream:
            yield stream, lambda: file.tell() / size


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(f"{name} = {value!r} is not known; it must be one of {', '.join(allowed)}")


def _structure(fields: Fields | DataError, seen: dict[int, str]) -> LabeledStructure:
    if isinstance(fields, DataError):
        raise fields
    fields.pop(READ, None)
    structure = LabeledStructure(**fields)
    if len(structure) == 1 and structure.cell is None:
        return structure  # its place says nothing; ``IsolatedAtoms`` looks at its energy
    content = structure.atomic_numbers.tobytes() + structure.positions.tobytes()
    key = hash(content + (b"" if structure.cell is None else structure.cell.tobytes()))
    if key in seen:
        raise DataError(
            f"{structure.name}: a duplicate, with the same atoms at the same positions as "
            f"{seen[key]}; remove one of them"
        )
    seen[key] = structure.name
    return structure


def _text(value: Any, what: str) -> str:
    """The text (or number, as text) that a value is or, if it is an array, begins with."""
    entry = next(iter(np.ravel(value)), None)
    with contextlib.suppress(UnicodeError):
        entry = entry.decode() if isinstance(entry, bytes) else entry
        if isinstance(entry, str | int | float | np.number | np.bool_):
            return str(entry).encode().decode()  # h5py lets bytes pass that are no text
    raise DataError(f"{what} is {value!r:.60}; text is needed")


def _parse_energies(text: str, unit: float, name: str) -> dict[int, float]:
    plain = re.sub(r"array\(([^()]*)\)", r"\1", text)  # files written with repr() of NumPy numbers
    try:
        values = json.loads(plain) if plain.lstrip().startswith('{"') else ast.literal_eval(plain)
        energies = {to_atomic_number(z): float(energy) * unit for z, energy in values.items()}
    except (
        ConfigError, ValueError, SyntaxError, AttributeError, TypeError, ArithmeticError,
        RecursionError, MemoryError,
    ) as error:  # fmt: skip
        raise DataError(
            f"{name}: not a map of atomic number to energy: {text[:60]!r} ({error})"
        ) from error
    known = range(1, MAX_ATOMIC_NUMBER + 1)
    bad = [z for z, energy in energies.items() if z not in known or not np.isfinite(energy)]
    if bad:
        raise DataError(f"{name}: impossible atomic number or energy for {bad}")
    return energies


# HDF5


@contextlib.contextmanager
def _open_hdf5(path: Path) -> Iterator[h5py.File]:
    with refusing_unreadable(path):
        file = h5py.File(path, "r")
    with file:
        yield file


def _groups(file: h5py.File, path: Path) -> Iterator[tuple[str, _Group]]:
    with refusing_unreadable(path):
        for key in file:
            item = file[key]  # items() would pass over what cannot be opened
            if isinstance(item, h5py.Group):
                yield str(key), _Group(item, f"{path}:{key}")


def _recognize_hdf5(file: h5py.File, path: Path) -> str:
    for _, group in _groups(file, path):
        if "conformations" in group:
            return "spice"
        if "positions" in group:
            return "curated"
        raise DataError(
            f"{group.name}: not a known HDF5 layout; it holds {group.contents()}, but a SPICE file "
            "has 'conformations' and a curated file 'positions' in every group"
        )
    raise DataError(f"{path}: the HDF5 file holds no groups")


def _atomic_energies_hdf5(path: Path) -> dict[int, float] | None:
    with _open_hdf5(path) as file, refusing_unreadable(path):
        for name, unit in ATOMIC_ENERGY_ATTRIBUTES.items():
            if name in file.attrs:
                what = f"{path}: attribute {name}"
                return _parse_energies(_text(file.attrs[name], what), unit, what)
    return None


def _iterate_hdf5(
    fields_of: Callable[[_Group, str], Iterator[Fields]],
    path: Path,
    split: str | None,
    _: LabelKeys,
) -> Source:
    with _open_hdf5(path) as file:
        count = len(file)
        for number, (key, group) in enumerate(_groups(file, path)):
            mark = _mark(group.value("split"), split, group.name)
            if split is not None and mark != split:
                continue
            try:
                for fields in fields_of(group, key):
                    yield {**fields, "mark": mark, READ: number / count}
            except DataError as error:
                yield error


class _Group:
    """A group of an HDF5 file; its attributes and data sets are read alike.

    Every error names the group, what was found there and what is needed.
    """

    def __init__(self, group: h5py.Group, name: str) -> None:
        self.name, self._group = name, group
        with refusing_unreadable(name):
            self._attributes, self._members = set(group.attrs), set(group)

    def __contains__(self, key: str) -> bool:
        return key in self._attributes or key in self._members

    def contents(self) -> str:
        """Names of everything in it."""
        return ", ".join(sorted(map(str, self._attributes | self._members))) or "nothing"

    def first(self, *keys: str) -> str | None:
        """The first of these keys that is there."""
        return next((key for key in keys if key in self), None)

    def require(self, *keys: str) -> None:
        """Raise a DataError if one of these keys is missing."""
        missing = [key for key in keys if key not in self]
        if missing:
            raise DataError(
                f"{self.name}: {', '.join(missing)} missing; it holds {self.contents()}. Without "
                "positions and their labels there is nothing to train on"
            )

    def value(self, *keys: str) -> Any:
        """What stands under the first of these keys that is there, or None."""
        key = self.first(*keys)
        if key is None:
            return None
        with refusing_unreadable(f"{self.name}: {key}"):
            item = self._item(key)
            if getattr(item, "shape", ()) is None or isinstance(item, h5py.Group | h5py.Datatype):
                raise DataError(f"{self.name}: {key} is {_kind(item)}; a value is needed")
            return _read_whole(item.id) if isinstance(item, h5py.Dataset) else item

    def text(self, key: str) -> str | None:
        """The text under a key, or None."""
        return _text(self.value(key), f"{self.name}: {key}") if key in self else None

    def numbers(
        self,
        key: str,
        shape: tuple[int | None, ...],
        units: Mapping[str, float] | None = None,
        default: str = "",
    ) -> np.ndarray:
        """The numbers under a key, float64 in our units.

        Args:
            key: must be there.
            shape: what they must have; None stands for any length. () also takes an array of one.
            units: allowed units, and what they are in ours; None for numbers without a unit.
            default: unit where none is stated.
        """
        with refusing_unreadable(f"{self.name}: {key}"):
            item = self._item(key)
            if not isinstance(item, h5py.HLObject | h5py.Empty):
                item = np.asarray(item)
            found = getattr(item, "shape", None)
            if found is not None and shape == () and np.prod(found) == 1:
                found = ()
            # before anything is read: a damaged shape may be of any size
            if not _fits(found, shape) or item.dtype.kind not in "biuf":
                wanted = ", ".join("any" if n is None else str(n) for n in shape)
                raise DataError(
                    f"{self.name}: {key} is {_kind(item)}; numbers of shape ({wanted}) are needed"
                )
            whole = _read_whole(item.id) if isinstance(item, h5py.Dataset) else item
            values = np.asarray(whole, np.float64).reshape(item.shape if shape else ())
            return values if units is None else values * self._factor(key, item, units, default)

    def atomic_numbers(self, key: str) -> np.ndarray:
        """The whole numbers under a key."""
        numbers = self.numbers(key, (None,))
        with np.errstate(invalid="ignore"):
            whole = numbers.astype(np.int64)
        if (whole != numbers).any():
            raise DataError(f"{self.name}: {key} {numbers[whole != numbers]} are no whole numbers")
        return whole

    def _item(self, key: str) -> Any:
        if key in self._attributes:
            return self._group.attrs[key]
        # what ``self._group[key]`` does, but for a File that it makes each time to ask its mode
        found = h5py.h5o.open(self._group.id, key.encode())
        known = isinstance(found, h5py.h5d.DatasetID)
        return h5py.Dataset(found, readonly=True) if known else self._group[key]

    def _factor(self, key: str, item: Any, units: Mapping[str, float], default: str) -> float:
        beside = f"{key}_units"
        stated = None
        if isinstance(item, h5py.Dataset) and h5py.h5a.exists(item.id, b"units"):
            stated = _read_whole(h5py.h5a.open(item.id, b"units"))
        if stated is None:
            stated = self.value(beside) if beside in self else default
        text = _text(stated, f"{self.name}: the unit of {key}")
        parts = text.strip().lower().split("/")
        unit = "/".join(OTHER_UNIT_NAMES.get(part, part) for part in parts)
        if unit not in units:
            raise DataError(
                f"{self.name}: unit {text!r} of {key} is not known; known are {', '.join(units)}"
            )
        return units[unit]


def _read_whole(found: Any) -> Any:
    """All values of a data set or an attribute, by its identifier.

    SPICE has few and small values in a group, and h5py's own way, which could also read parts of
    them, takes three times as long.
    """
    if found.shape is None:
        return h5py.Empty(found.dtype)
    values = np.zeros(found.shape, found.dtype)
    everything = (h5py.h5s.ALL, h5py.h5s.ALL) if isinstance(found, h5py.h5d.DatasetID) else ()
    found.read(*everything, values)
    return values[()]


def _fits(found: tuple[int, ...] | None, shape: tuple[int | None, ...]) -> bool:
    if found is None or len(found) != len(shape):
        return False
    return all(n in (None, m) for n, m in zip(shape, found, strict=True))


def _kind(item: Any) -> str:
    if isinstance(item, h5py.Group | h5py.Datatype):
        return "a group" if isinstance(item, h5py.Group) else "a data type"
    if item.shape is None:
        return "empty"
    kind = item.dtype.kind
    what = "numbers" if kind in "biuf" else "text" if kind in "OSU" else str(item.dtype)
    return f"{what} of shape {item.shape}"


def _mark(value: Any, wanted: str | None, name: str) -> str:
    if value is None:
        if wanted is None:
            return ""
        raise DataError(
            f"{name}: no split is marked here, but {wanted!r} was asked for; leave split out and "
            "let the trainer split by fractions"
        )
    marks = {_text(mark, f"{name}: its split mark") for mark in np.ravel(value)}
    if len(marks) != 1 or not marks <= set(SPLITS):
        raise DataError(
            f"{name}: its split mark is {', '.join(sorted(marks))}; it must be one of "
            f"{', '.join(SPLITS)} for all conformers of a molecule"
        )
    return marks.pop()


def _spice_group(group: _Group, key: str) -> Iterator[Fields]:
    group.require("atomic_numbers", "conformations", "dft_total_energy", "dft_total_gradient")
    numbers = group.atomic_numbers("atomic_numbers")
    energies = group.numbers("dft_total_energy", (None,), ENERGY_UNITS, "hartree")
    shape = (len(energies), len(numbers), 3)
    positions = group.numbers("conformations", shape, LENGTH_UNITS, "bohr")
    forces = -group.numbers("dft_total_gradient", shape, FORCE_UNITS, "hartree/bohr")
    smiles = group.text("smiles")
    common = {
        "atomic_numbers": numbers,
        "charge": _charge(group, smiles),
        "group": key if smiles is None else _molecule_key(smiles),
        "subset": group.text("subset") or "",
        "smiles": smiles or "",
    }
    for index, energy in enumerate(energies):
        yield {
            "positions": positions[index],
            "energy": energy,
            "forces": forces[index],
            "name": f"{group.name}[{index}]",
            **common,
        }


def _charge(group: _Group, smiles: str | None) -> int:
    charge = group.value("total_charge", "charge")
    return formal_charge(smiles or "") if charge is None else _whole(charge, group.name)


def _whole(charge: Any, name: str) -> int:
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        (value,) = set(np.ravel(np.asarray(charge, np.float64)).tolist())
        if value == round(value):
            return int(value)
    raise DataError(f"{name}: total charge {charge!r} is not a whole number")


def _molecule_key(smiles: str) -> str:
    """SMILES without its atom-map numbers, which only say in which order the atoms are written."""
    return re.sub(r":\d+\]", "]", smiles)


def _curated_group(group: _Group, key: str) -> Iterator[Fields]:
    elements = group.first("elements", "atomic_numbers") or "elements"
    group.require(elements, "positions", "energy", "forces")
    numbers = group.atomic_numbers(elements)
    shape = (len(numbers), 3)
    cell, stress, pbc = None, None, np.full(3, "cell" in group)
    if "pbc" in group:
        pbc = group.numbers("pbc", (3,)) != 0
    if "cell" in group and pbc.any():
        cell = group.numbers("cell", (3, 3), LENGTH_UNITS, "angstrom")
    if "stress" in group:
        stress = group.numbers("stress", (3, 3), STRESS_UNITS, "ev/angstrom^3")
    smiles = group.text("smiles")
    yield {
        "atomic_numbers": numbers,
        "positions": group.numbers("positions", shape, LENGTH_UNITS, "angstrom"),
        "energy": group.numbers("energy", (), ENERGY_UNITS, "ev"),
        "forces": group.numbers("forces", shape, FORCE_UNITS, "ev/angstrom"),
        "stress": stress,
        "cell": cell,
        "pbc": pbc,
        "charge": _charge(group, smiles),
        # conformers of one molecule differ in the last number of the name
        "group": re.sub(r"_\d+$", "", key) if smiles is None else _molecule_key(smiles),
        "subset": key.split("-", 1)[0] if "-" in key else "",
        "smiles": smiles or "",
        "name": group.name,
    }


# Files of ASE and VASP


def _iterate_atoms(kind: str, path: Path, split: str | None, keys: LabelKeys) -> Source:
    """Frames that ASE reads; what is wrong with a file has no error class of its own there."""
    frames = enumerate(READ_BY_ASE[kind](path))
    while True:
        try:
            index, atoms = next(frames)
        except StopIteration:
            return
        except Exception as error:
            yield DataError(f"{path}: not readable as {kind} by ASE ({error})")
            return
        yield from _of_atoms(atoms, f"{path}:[{index}]", split, keys)


def _of_atoms(atoms: ase.Atoms, name: str, split: str | None, keys: LabelKeys) -> Source:
    """The frame, if it is of the wanted part."""
    mark = _mark(atoms.info.get("split"), split, name)
    if split is not None and mark != split:
        return
    try:
        yield {**_fields_of_atoms(atoms, name, keys), "mark": mark}
    except DataError as error:
        yield error


def _read_database(path: Path) -> Iterator[ase.Atoms]:
    with open(path, "rb") as file:
        kind = "db" if file.read(6) == b"SQLite" else "json"
    with ase.db.connect(path, type=kind) as database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info.update(row.key_value_pairs)
            yield atoms


def _read_vasp(path: Path, kind: str) -> Iterator[ase.Atoms]:
    """Ionic steps of a run of VASP, each with the free energy, whose slope its forces are."""
    for atoms in ase.io.iread(path, index=":", format=kind):
        results = atoms.calc.results
        results["energy"] = results.get("free_energy", results.get("energy"))
        yield atoms


READ_BY_ASE: Mapping[str, Callable[[Path], Iterator[ase.Atoms]]] = {
    "traj": lambda path: ase.io.iread(path, index=":", format="traj"),
    "db": _read_database,
    "outcar": lambda path: _read_vasp(path, "vasp-out"),
    "vasprun": lambda path: _read_vasp(path, "vasp-xml"),
}


# Extended XYZ


def _iterate_extxyz(path: Path, split: str | None, keys: LabelKeys) -> Source:
    for index, (text, part) in enumerate(_frames(path)):
        name = f"{path}:[{index}]"
        try:
            atoms = cast(ase.Atoms, ase.io.read(io.StringIO(text), index=0, format="extxyz"))
        except Exception as error:  # the parser has no error class of its own
            yield DataError(f"{name}: not readable as extended XYZ ({error})")
            continue
        for fields in _of_atoms(atoms, name, split, keys):
            yield {**fields, READ: part} if isinstance(fields, dict) else fields


def _frames(path: Path) -> Iterator[tuple[str, float]]:
    """Text of each frame, and how much of the file is read.

    ASE's own search for frames is quadratic in gzipped files.
    """
    with refusing_unreadable(path), _open_text(path) as (stream, part):
        for index, line in enumerate(filter(str.strip, stream)):
            if not line.strip().isdecimal():
                raise DataError(f"{path}:[{index}]: {line[:40]!r} is not a number of atoms")
            yield line + "".join(itertools.islice(stream, int(line) + 1)), part()


def _fields_of_atoms(atoms: ase.Atoms, name: str, keys: LabelKeys) -> Fields:
    periodic = bool(atoms.pbc.any())
    given = next((key for key in GROUP_KEYS if key in atoms.info), None)
    molecule = None if given is None else _text(atoms.info[given], f"{name}: {given}")
    charge = atoms.info.get("charge", atoms.info.get("total_charge"))
    return {
        "atomic_numbers": atoms.numbers,
        "positions": atoms.positions,
        **read_labels(atoms, keys, name),
        "cell": atoms.cell.array if periodic else None,
        "pbc": atoms.pbc,
        "charge": _whole(0 if charge is None else charge, name),
        "group": atoms.get_chemical_formula() if molecule is None else _molecule_key(molecule),
        "subset": str(atoms.info.get("config_type", atoms.info.get("data_id", ""))),
        "smiles": molecule if molecule is not None and given in SMILES_KEYS else "",
        "name": name,
    }


class Format(NamedTuple):
    """How files of a format are read.

    Attributes:
        iterate: from a path, the split that is wanted (or None) and the names of labels to the
            fields of a ``LabeledStructure``, or a DataError for an unusable one.
        read_atomic_energies: eV by atomic number that a file states beside its structures, or None.
    """

    iterate: Callable[[Path, str | None, LabelKeys], Source]
    read_atomic_energies: Callable[[Path], dict[int, float] | None]


FORMATS = {
    "spice": Format(functools.partial(_iterate_hdf5, _spice_group), _atomic_energies_hdf5),
    "curated": Format(functools.partial(_iterate_hdf5, _curated_group), _atomic_energies_hdf5),
    "extxyz": Format(_iterate_extxyz, lambda _: None),
    "npz": Format(iterate_npz, lambda _: None),
    "deepmd": Format(iterate_deepmd, lambda _: None),
    **{k: Format(functools.partial(_iterate_atoms, k), lambda _: None) for k in READ_BY_ASE},
}
"""By the word that ``recognize`` gives."""
