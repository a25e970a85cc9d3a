"""Read labelled structures from SPICE files, curated HDF5 files and extended XYZ.

Everything comes out in Å, eV and eV/Å. A label that is missing, infinite or of the wrong shape is
an error that names file, key and index; nothing is ever filled in.
"""

from __future__ import annotations

import ast
import gzip
import io
import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

import ase
import ase.io
import h5py
import numpy as np

from mlip_md.errors import DataError
from mlip_md.trainer.data.structures import BOHR, HARTREE, MAX_ATOMIC_NUMBER, Structure

logger = logging.getLogger(__name__)

FORMATS = ("spice", "curated", "extxyz")
SPLITS = ("train", "validation", "test")

ENERGY_KEYS = ("REF_energy", "energy", "Energy")
FORCES_KEYS = ("REF_forces", "forces", "Forces")
STRESS_KEYS = ("REF_stress", "stress")
VIRIAL_KEYS = ("REF_virial", "REF_virials", "virial", "virials")
GROUP_KEYS = ("smiles", "SMILES", "group", "molecule")

LENGTH_UNITS = {"bohr": BOHR, "angstrom": 1.0, "nanometer": 10.0, "nanometers": 10.0, "nm": 10.0}
ENERGY_UNITS = {
    "hartree": HARTREE,
    "ev": 1.0,
    "kj/mol": HARTREE / 2625.4996394799,
    "kcal/mol": HARTREE / 627.5094740631,
}

ATOMIC_ENERGY_ATTRIBUTES = {
    "atomic_energies": 1.0,
    "atomic_energies_hartree": HARTREE,
    "atom_reference_energies_hartree": HARTREE,
}
"""Root attributes of an HDF5 file with energies of isolated atoms, and their units in eV."""

Fields = dict[str, Any]


def read(
    path: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    on_bad: str = "error",
    energy_key: str | None = None,
    forces_key: str | None = None,
) -> list[Structure]:
    """Read a file of labelled structures.

    Args:
        path: SPICE HDF5 (one group per molecule, bohr and hartree unless its ``units`` attributes
            say otherwise), curated HDF5 (one group per structure, Å and eV) or extended XYZ
            (Å and eV), the latter also gzipped.
        format: "spice", "curated" or "extxyz"; None recognises it from the content.
        split: only structures that the file itself marks "train", "validation" or "test"; there
            may be none. None reads all, marked or not.
        limit: stop after this many structures.
        on_bad: "error", or "skip" to leave out unusable structures (logged and counted).
        energy_key: extxyz: name of the energy; None tries ``REF_energy``, ``energy``, ``Energy``.
        forces_key: extxyz: name of the forces, likewise.

    Returns:
        The structures in the order of the file.

    Raises:
        DataError: if the file is not readable, or, naming ``file:key[index]``, on missing labels,
            NaN, wrong shapes and structures that stand in the file twice.
    """
    return list(
        iterate(
            path,
            format=format,
            split=split,
            limit=limit,
            on_bad=on_bad,
            energy_key=energy_key,
            forces_key=forces_key,
        )
    )


def iterate(
    path: str | Path,
    *,
    format: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    on_bad: str = "error",
    energy_key: str | None = None,
    forces_key: str | None = None,
    seen: dict[int, str] | None = None,
) -> Iterator[Structure]:
    """Yield the structures of a file one by one; arguments and errors as for ``read``.

    ``seen`` remembers structures: given to several calls, duplicates are found across their files.
    """
    path = Path(path)
    _check_choice("on_bad", on_bad, ("error", "skip"))
    if split is not None:
        _check_choice("split", split, SPLITS)
    format = recognize(path) if format is None else format
    _check_choice("format", format, FORMATS)
    if format == "extxyz":
        source = _iterate_extxyz(path, split, energy_key, forces_key)
    else:
        source = _iterate_hdf5(path, format, split)
    seen = {} if seen is None else seen
    count = skipped = 0
    for fields in source:
        if limit is not None and count >= limit:
            break
        try:
            structure = _structure(fields, seen)
        except DataError as error:
            if on_bad == "error":
                raise
            skipped += 1
            logger.warning("skipped: %s", error)
            continue
        count += 1
        yield structure
    if skipped:
        logger.warning("%s: %d unusable structures were skipped", path, skipped)
    if count == 0 and split is None and limit != 0:
        raise DataError(f"{path}: it holds no usable structure")


def recognize(path: str | Path) -> str:
    """Format of a data file by its content: "spice", "curated" or "extxyz".

    Raises:
        DataError: if there is no such file, or its content is none of the three.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: there is no such file")
    if h5py.is_hdf5(path):
        with h5py.File(path, "r") as file:
            return _recognize_hdf5(file, path)
    try:
        with _open_text(path) as stream:
            first = stream.readline().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: neither HDF5 nor text ({error})") from error
    if first.isdigit():
        return "extxyz"
    raise DataError(
        f"{path}: not a known format; its first line {first[:40]!r} is no number of atoms "
        "(extended XYZ), and it is not an HDF5 file"
    )


def read_atomic_energies(path: str | Path) -> dict[int, float] | None:
    """Energies of isolated atoms that a file carries, eV by atomic number, or None.

    They are looked for in the attributes ``atomic_energies`` (eV), ``atomic_energies_hartree`` and
    ``atom_reference_energies_hartree`` of an HDF5 file (JSON maps of atomic number to energy), and
    in the one-atom structures without periodicity of an extended XYZ file.

    Raises:
        DataError: if the file or the attribute is not readable.
    """
    path = Path(path)
    if recognize(path) == "extxyz":
        atoms = [s for s in iterate(path) if len(s) == 1 and s.cell is None and s.charge == 0]
        return {int(s.atomic_numbers[0]): s.energy for s in atoms} or None
    with h5py.File(path, "r") as file:
        for name, unit in ATOMIC_ENERGY_ATTRIBUTES.items():
            if name in file.attrs:
                return _parse_energies(_text(file.attrs[name]), unit, f"{path}: attribute {name}")
    return None


def formal_charge(smiles: str) -> int:
    """Total charge of a SMILES string: the sum of the formal charges of its bracket atoms."""
    total = 0
    for atom in re.findall(r"\[([^\]]*)\]", smiles):
        match = re.search(r"(\++|-+)(\d*)(?::\d+)?$", atom)
        if match:
            size = int(match.group(2)) if match.group(2) else len(match.group(1))
            total += size if match.group(1)[0] == "+" else -size
    return total


def _open_text(path: Path) -> TextIO:
    opener = gzip.open if path.suffix == ".gz" else open
    return cast(TextIO, opener(path, "rt", encoding="utf-8"))


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DataError(f"{name} = {value!r} is not known; it must be one of {', '.join(allowed)}")


def _structure(fields: Fields | DataError, seen: dict[int, str]) -> Structure:
    if isinstance(fields, DataError):
        raise fields
    structure = Structure(**fields)
    content = structure.atomic_numbers.tobytes() + structure.positions.tobytes()
    key = hash(content + (b"" if structure.cell is None else structure.cell.tobytes()))
    if key in seen:
        raise DataError(
            f"{structure.name}: a duplicate, with the same atoms at the same positions as "
            f"{seen[key]}; remove one of them, or read with on_bad='skip'"
        )
    seen[key] = structure.name
    return structure


def _text(value: Any) -> str:
    value = np.asarray(value).reshape(-1)[0] if np.ndim(value) else value
    value = value[()] if isinstance(value, np.ndarray) else value
    return value.decode() if isinstance(value, bytes) else str(value)


def _parse_energies(text: str, unit: float, name: str) -> dict[int, float]:
    plain = re.sub(r"array\(([^()]*)\)", r"\1", text)  # files written with repr() of NumPy numbers
    try:
        values = json.loads(plain) if plain.lstrip().startswith('{"') else ast.literal_eval(plain)
        energies = {int(z): float(energy) * unit for z, energy in values.items()}
    except (ValueError, SyntaxError, AttributeError, TypeError) as error:
        raise DataError(
            f"{name}: not a map of atomic number to energy: {text[:60]!r} ({error})"
        ) from error
    bad = [z for z, e in energies.items() if not 1 <= z <= MAX_ATOMIC_NUMBER or not np.isfinite(e)]
    if bad:
        raise DataError(f"{name}: impossible atomic number or energy for {bad}")
    return energies


# HDF5


def _recognize_hdf5(file: h5py.File, path: Path) -> str:
    for group in file.values():
        if isinstance(group, h5py.Group):
            if "conformations" in group:
                return "spice"
            if "positions" in group:
                return "curated"
            raise DataError(
                f"{path}: not a known HDF5 layout; group {group.name} holds "
                f"{', '.join(sorted(group)) or 'nothing'}, but a SPICE file has 'conformations' "
                "and a curated file 'positions' in every group"
            )
    raise DataError(f"{path}: the HDF5 file holds no groups")


def _iterate_hdf5(path: Path, format: str, split: str | None) -> Iterator[Fields | DataError]:
    try:
        with h5py.File(path, "r") as file:
            groups = ((key, g) for key, g in file.items() if isinstance(g, h5py.Group))
            for key, group in groups:
                name = f"{path}:{key}"
                mark = _mark(_optional(group, "split"), split, name)
                if split is not None and mark != split:
                    continue
                if format == "spice":
                    yield from _spice_group(group, mark, name)
                else:
                    yield _curated_group(group, key, mark, name)
    except OSError as error:
        raise DataError(f"{path}: HDF5 cannot read it ({error})") from error


def _mark(value: Any, wanted: str | None, name: str) -> str:
    if value is None:
        if wanted is None:
            return ""
        raise DataError(
            f"{name}: no split is marked here, but {wanted!r} was asked for; leave split out and "
            "let the trainer split by fractions"
        )
    marks = {_text(mark) for mark in np.ravel(value)}
    if len(marks) != 1 or not marks <= set(SPLITS):
        raise DataError(
            f"{name}: its split mark is {', '.join(sorted(marks))}; it must be one of "
            f"{', '.join(SPLITS)} for all conformers of a molecule"
        )
    return marks.pop()


def _optional(group: h5py.Group, *names: str) -> Any:
    for name in names:
        if name in group.attrs:
            return group.attrs[name]
        if name in group:
            return group[name][()]
    return None


def _unit(dataset: h5py.Dataset, units: Mapping[str, float], default: str, name: str) -> float:
    unit = _text(dataset.attrs.get("units", default)).strip().lower()
    if unit not in units:
        raise DataError(
            f"{name}: unit {unit!r} of {dataset.name.split('/')[-1]} is not known; known are "
            f"{', '.join(units)}"
        )
    return units[unit]


GRADIENT_UNITS = {
    f"{energy}/{length}": e / l
    for energy, e in ENERGY_UNITS.items()
    for length, l in LENGTH_UNITS.items()
}


def _spice_group(group: h5py.Group, mark: str, name: str) -> Iterator[Fields | DataError]:
    needed = ("atomic_numbers", "conformations", "dft_total_energy", "dft_total_gradient")
    missing = [key for key in needed if key not in group]
    if missing:
        yield DataError(
            f"{name}: {', '.join(missing)} missing; it holds {', '.join(sorted(group))}. Without "
            "energies and gradients there is nothing to train on"
        )
        return
    numbers, conformations, energies, gradients = (group[key] for key in needed)
    shape = (*energies.shape, *numbers.shape, 3)
    if conformations.shape != shape or gradients.shape != shape:
        yield DataError(
            f"{name}: {energies.shape} energies and {numbers.shape} atoms, but conformations of "
            f"shape {conformations.shape} and gradients of shape {gradients.shape}; both must be "
            f"{shape}"
        )
        return
    positions = conformations[()].astype(np.float64)
    positions *= _unit(conformations, LENGTH_UNITS, "bohr", name)
    energy = energies[()].astype(np.float64) * _unit(energies, ENERGY_UNITS, "hartree", name)
    forces = -gradients[()].astype(np.float64)
    forces *= _unit(gradients, GRADIENT_UNITS, "hartree/bohr", name)
    smiles = _optional(group, "smiles")
    common = {
        "atomic_numbers": numbers[()].astype(np.int64),
        "charge": _charge(group, smiles, name),
        "group": _molecule_key(smiles, group.name[1:]),
        "subset": _text(group["subset"][()]) if "subset" in group else "",
        "mark": mark,
    }
    for index in range(len(energy)):
        yield {
            "positions": positions[index],
            "energy": energy[index],
            "forces": forces[index],
            "name": f"{name}[{index}]",
            **common,
        }


def _charge(group: h5py.Group, smiles: Any, name: str) -> int:
    charge = _optional(group, "total_charge", "charge")
    if charge is None:
        return 0 if smiles is None else formal_charge(_text(smiles))
    return _whole(charge, name)


def _whole(charge: Any, name: str) -> int:
    try:
        value = float(np.asarray(charge, np.float64).reshape(-1)[0])
        if value == round(value):
            return int(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"{name}: total charge {charge!r} is not a whole number") from error
    raise DataError(f"{name}: total charge {charge!r} is not a whole number")


def _molecule_key(smiles: Any, key: str) -> str:
    """SMILES without its atom-map numbers, which only say in which order the atoms are written."""
    return re.sub(r":\d+\]", "]", _text(smiles)) if smiles is not None else key


def _curated_group(group: h5py.Group, key: str, mark: str, name: str) -> Fields | DataError:
    numbers = _optional(group, "elements", "atomic_numbers")
    energy = _optional(group, "energy")
    missing = [
        what
        for what, absent in (
            ("elements", numbers is None),
            ("positions", "positions" not in group),
            ("energy", energy is None),
            ("forces", "forces" not in group),
        )
        if absent
    ]
    if missing:
        return DataError(
            f"{name}: {', '.join(missing)} missing; it holds {', '.join(sorted(group))} and the "
            f"attributes {', '.join(sorted(group.attrs))}"
        )
    cell, pbc = _optional(group, "cell"), _optional(group, "pbc")
    if cell is None or (pbc is not None and not np.any(pbc)):
        cell, pbc = None, np.zeros(3, bool)
    smiles = _optional(group, "smiles")
    return {
        "atomic_numbers": numbers,
        "positions": group["positions"][()],
        "energy": np.asarray(energy).reshape(-1)[0],
        "forces": group["forces"][()],
        "stress": _optional(group, "stress"),
        "cell": cell,
        "pbc": np.ones(3, bool) if pbc is None else pbc,
        "charge": _charge(group, smiles, name),
        # conformers of one molecule differ in the last number of the name
        "group": _molecule_key(smiles, re.sub(r"_\d+$", "", key)),
        "subset": key.split("-", 1)[0] if "-" in key else "",
        "mark": mark,
        "name": name,
    }


# Extended XYZ


def _iterate_extxyz(
    path: Path, split: str | None, energy_key: str | None, forces_key: str | None
) -> Iterator[Fields | DataError]:
    for index, text in enumerate(_frames(path)):
        name = f"{path}:[{index}]"
        try:
            atoms = cast(ase.Atoms, ase.io.read(io.StringIO(text), index=0, format="extxyz"))
        except Exception as error:  # the parser has no error class of its own
            yield DataError(f"{name}: not readable as extended XYZ ({error})")
            continue
        mark = _mark(atoms.info.get("split"), split, name)
        if split is not None and mark != split:
            continue
        try:
            yield {**_extxyz_fields(atoms, name, energy_key, forces_key), "mark": mark}
        except DataError as error:
            yield error


def _frames(path: Path) -> Iterator[str]:
    """Text of each frame; ASE's own search for frames is quadratic in gzipped files."""
    with _open_text(path) as stream:
        for index, line in enumerate(filter(str.strip, stream)):
            if not line.strip().isdigit():
                raise DataError(f"{path}:[{index}]: {line[:40]!r} is not a number of atoms")
            yield line + "".join(itertools.islice(stream, int(line) + 1))


def _label(atoms: ase.Atoms, keys: tuple[str, ...]) -> Any:
    results = atoms.calc.results if atoms.calc is not None else {}
    for key in keys:
        for place in (atoms.info, atoms.arrays, results):
            if key in place:
                return place[key]
    return None


def _extxyz_fields(
    atoms: ase.Atoms, name: str, energy_key: str | None, forces_key: str | None
) -> Fields:
    energy_keys = (energy_key,) if energy_key else ENERGY_KEYS
    forces_keys = (forces_key,) if forces_key else FORCES_KEYS
    energy, forces = _label(atoms, energy_keys), _label(atoms, forces_keys)
    if forces is None and len(atoms) == 1 and not atoms.pbc.any():
        forces = np.zeros((1, 3))  # exact: nothing acts on a single atom
    for what, value, keys in (("energy", energy, energy_keys), ("forces", forces, forces_keys)):
        if value is None:
            there = sorted({*atoms.info, *atoms.arrays} - {"numbers", "positions"})
            raise DataError(
                f"{name}: no {what} under {' or '.join(keys)}; it has {', '.join(there) or 'none'}"
            )
    periodic = bool(atoms.pbc.any())
    given = next((atoms.info[key] for key in GROUP_KEYS if key in atoms.info), None)
    charge = atoms.info.get("charge", atoms.info.get("total_charge"))
    return {
        "atomic_numbers": atoms.numbers,
        "positions": atoms.positions,
        "energy": energy,
        "forces": forces,
        "stress": _stress(atoms, name),
        "cell": atoms.cell.array if periodic else None,
        "pbc": atoms.pbc,
        "charge": _whole(0 if charge is None else charge, name),
        "group": atoms.get_chemical_formula() if given is None else _molecule_key(given, ""),
        "subset": str(atoms.info.get("config_type", atoms.info.get("data_id", ""))),
        "name": name,
    }


def _stress(atoms: ase.Atoms, name: str) -> np.ndarray | None:
    """Stress (3, 3) eV/Å³ from a stress label, or from a virial (minus stress times volume)."""
    stress, factor = _label(atoms, STRESS_KEYS), 1.0
    if stress is None and atoms.pbc.all():
        stress, factor = _label(atoms, VIRIAL_KEYS), -1.0 / atoms.cell.volume
    if stress is None or not atoms.pbc.all():
        return None
    stress = np.asarray(stress, np.float64)
    if stress.shape == (6,):  # Voigt order xx yy zz yz xz xy
        stress = stress[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
    if stress.size != 9:
        raise DataError(f"{name}: stress of shape {stress.shape}; it must be (6,), (9,) or (3, 3)")
    return factor * stress.reshape(3, 3)
