"""Data sets in arrays of NumPy: npz files of known layouts, and the folders of DeePMD-kit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlip_md.constants import KJ_PER_KCAL, KJ_PER_MOL_PER_EV
from mlip_md.elements import ATOMIC_NUMBERS, symbol
from mlip_md.errors import DataError
from mlip_md.trainer.data.labels import LabelKeys
from mlip_md.trainer.data.structures import READ, Source, refusing_unreadable

Arrays = Mapping[str, np.ndarray]


class _Layout(NamedTuple):
    """Names of arrays in an npz file, and what its energies are in eV (lengths are in Å)."""

    numbers: str
    positions: str
    energy: str
    forces: str
    unit: float


KCAL = KJ_PER_KCAL / KJ_PER_MOL_PER_EV
LAYOUTS = (
    _Layout("nuclear_charges", "coords", "energies", "forces", KCAL),  # revised MD17
    _Layout("z", "R", "E", "F", KCAL),  # MD17
    _Layout("atomic_numbers", "pos", "energy", "forces", 1.0),  # 3BPA as nequip packs it
)
"""Layouts of npz files, by the names of their arrays."""


def _numbers(values: Any, shape: tuple[int | None, ...], what: str) -> np.ndarray:
    array = np.asarray(values)
    fits = array.ndim == len(shape) and all(
        want in (None, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits or array.dtype.kind not in "iuf":
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise DataError(
            f"{what} is of type {array.dtype} and shape {array.shape}; numbers of shape ({wanted}) "
            "are needed"
        )
    return array


def _refuse_split(path: Path, split: str | None) -> None:
    if split is not None:
        raise DataError(f"{path}: no split is marked in such files; leave split out")


def iterate_npz(path: Path, split: str | None, _keys: LabelKeys) -> Source:
    """Frames of an npz file of one of the ``LAYOUTS``."""
    _refuse_split(path, split)
    with refusing_unreadable(path), np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    layout = next((x for x in LAYOUTS if {*x[:4]} <= {*arrays}), None)
    if layout is None:
        known = "; ".join(", ".join(x[:4]) for x in LAYOUTS)
        raise DataError(
            f"{path}: the arrays in it are {', '.join(arrays)}; known layouts are {known}. Write "
            "extended XYZ with ASE instead"
        )
    positions = _numbers(arrays[layout.positions], (None, None, 3), f"{path}: {layout.positions}")
    count, atoms, _ = positions.shape
    numbers = arrays[layout.numbers]
    shape = (atoms,) if numbers.ndim == 1 else (count, atoms)
    numbers = np.broadcast_to(
        _numbers(numbers, shape, f"{path}: {layout.numbers}"), (count, atoms)
    ).astype(np.int64)
    energies = _numbers(arrays[layout.energy].reshape(-1), (count,), f"{path}: {layout.energy}")
    forces = _numbers(arrays[layout.forces], positions.shape, f"{path}: {layout.forces}")
    cells = _cells(arrays, count, path)
    for k in range(count):
        yield {
            "atomic_numbers": numbers[k],
            "positions": positions[k],
            "energy": energies[k] * layout.unit,
            "forces": forces[k] * layout.unit,
            "cell": None if cells is None else cells[k],
            "pbc": np.full(3, cells is not None),
            "group": _formula(numbers[k]),
            "name": f"{path}:[{k}]",
            READ: k / count,
        }


def _cells(arrays: Arrays, count: int, path: Path) -> np.ndarray | None:
    """Cells (count, 3, 3) Å of an npz file, if it says that its frames are periodic."""
    if "cell" not in arrays or not np.any(arrays.get("pbc", False)):
        return None
    if not np.all(arrays["pbc"]):
        raise DataError(f"{path}: frames periodic along some directions only are not read from npz")
    cells = _numbers(arrays["cell"], (None,) * arrays["cell"].ndim, f"{path}: cell")
    with refusing_unreadable(path, "the cells are no 3 by 3 matrices, one or one per frame"):
        return np.broadcast_to(cells, (count, 3, 3))


def _formula(numbers: np.ndarray) -> str:
    kinds, counts = np.unique(numbers, return_counts=True)
    pairs = zip(kinds.tolist(), counts.tolist(), strict=True)
    return "".join(f"{symbol(z)}{n if n > 1 else ''}" for z, n in pairs)


def is_deepmd(folder: Path) -> bool:
    """Whether a folder is a system of DeePMD-kit."""
    return (folder / "type.raw").is_file() and any(folder.glob("set.*"))


def find_deepmd(folder: Path) -> list[Path]:
    """Systems of DeePMD-kit in a folder and the folders in it, itself included, in order."""
    return sorted(path.parent for path in folder.rglob("type.raw") if is_deepmd(path.parent))


def iterate_deepmd(folder: Path, split: str | None, _keys: LabelKeys) -> Source:
    """Frames of a system of DeePMD-kit (npy sets, also mixed types): Å, eV, eV/Å, virials in eV."""
    _refuse_split(folder, split)
    kinds = _type_map(folder)
    with refusing_unreadable(folder / "type.raw", "no list of types of atoms"):
        types = np.loadtxt(folder / "type.raw", dtype=int, ndmin=1)
    periodic = not (folder / "nopbc").exists()
    places = sorted(folder.glob("set.*"))
    for number, place in enumerate(places):
        try:
            arrays = {file.stem: _load(file) for file in sorted(place.glob("*.npy"))}
            for fields in _deepmd_frames(place, arrays, types, kinds, periodic):
                yield {**fields, READ: number / len(places)}
        except DataError as error:
            yield error


def _load(file: Path) -> np.ndarray:
    with refusing_unreadable(file):
        return np.asarray(np.load(file, allow_pickle=False))


def _type_map(folder: Path) -> np.ndarray:
    """Atomic number of each type."""
    file = folder / "type_map.raw"
    if not file.is_file():
        raise DataError(
            f"{folder}: there is no type_map.raw, which says what elements the types are; write "
            "one with a symbol per line"
        )
    with refusing_unreadable(file):
        names = file.read_text(encoding="utf-8").split()
    unknown = [name for name in names if name not in ATOMIC_NUMBERS]
    if unknown:
        raise DataError(f"{file}: {', '.join(unknown)} are no symbols of elements")
    return np.array([ATOMIC_NUMBERS[name] for name in names])


def _deepmd_frames(
    place: Path, arrays: Arrays, types: np.ndarray, kinds: np.ndarray, periodic: bool
) -> Iterator[dict[str, Any]]:
    missing = [name for name in ("coord", "energy") if name not in arrays]
    missing += ["box"] if periodic and "box" not in arrays else []
    if missing:
        raise DataError(f"{place}: {', '.join(f'{name}.npy' for name in missing)} missing")
    coordinates = arrays["coord"]
    count, atoms = len(coordinates), len(types)
    energies = arrays["energy"].reshape(-1)
    rows = {
        "coord": (coordinates, (count, 3 * atoms)),
        "energy": (energies, (count,)),
        "force": (arrays.get("force"), (count, 3 * atoms)),
        "box": (arrays.get("box"), (count, 9)),
        "virial": (arrays.get("virial"), (count, 9)),
        "real_atom_types": (arrays.get("real_atom_types"), (count, atoms)),
    }
    for name, (array, shape) in rows.items():
        if array is not None:
            _numbers(array.reshape(count, -1) if array.ndim == 3 else array, shape,
                     f"{place}/{name}.npy")  # fmt: skip
    mixed = rows["real_atom_types"][0]
    for k in range(count):
        yield _deepmd_frame(place, k, rows, types if mixed is None else mixed[k], kinds, periodic)


def _deepmd_frame(
    place: Path,
    k: int,
    rows: Mapping[str, tuple[Any, Any]],
    types: np.ndarray,
    kinds: np.ndarray,
    periodic: bool,
) -> dict[str, Any]:
    real = types >= 0  # mixed systems are filled up with atoms of type -1
    if types.max() >= len(kinds):
        raise DataError(f"{place}[{k}]: type {types.max()} is not in type_map.raw")
    numbers = kinds[types[real]]
    cell = np.asarray(rows["box"][0][k], float).reshape(3, 3) if periodic else None
    force, virial = rows["force"][0], rows["virial"][0]
    stress = None
    if virial is not None and cell is not None:
        stress = -np.asarray(virial[k], float).reshape(3, 3) / abs(np.linalg.det(cell))
    return {
        "atomic_numbers": numbers,
        "positions": rows["coord"][0][k].reshape(-1, 3)[real],
        "energy": rows["energy"][0][k],
        "forces": None if force is None else force[k].reshape(-1, 3)[real],
        "stress": stress,
        "cell": cell,
        "pbc": np.full(3, periodic),
        "group": _formula(numbers),
        "subset": place.parent.name,
        "name": f"{place}[{k}]",
    }
