"""Files of the data set in the layout of SPICE 2: one shard per group, merged into one HDF5 file.

A shard is written beside its place and renamed, so a killed run leaves whole shards only.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from mlip_md.errors import DataError
from mlip_md.trainer.generate.sampling import ORIGINS

UNITS = {
    "conformations": "bohr",
    "formation_energy": "hartree",
    "dft_total_energy": "hartree",
    "dft_total_gradient": "hartree/bohr",
}


@dataclass(frozen=True)
class LabeledGroup:
    """All conformations of one molecule with their labels.

    Attributes:
        name, subset, split: of the group.
        smiles: mapped SMILES in array order.
        atomic_numbers: (N,) int.
        charge: total charge in e.
        conformations: (M, N, 3) float32 in bohr.
        energies: (M,) float64 in hartree.
        gradients: (M, N, 3) in hartree/bohr; gradient = -force.
        origins: (M,) index into `ORIGINS`.
        dropped: reason -> number of structures that were left out.
    """

    name: str
    subset: str
    split: str
    smiles: str
    atomic_numbers: np.ndarray
    charge: int
    conformations: np.ndarray
    energies: np.ndarray
    gradients: np.ndarray
    origins: np.ndarray
    dropped: Mapping[str, int]


def shard_path(folder: Path, name: str) -> Path:
    """Where the shard of a group lies."""
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.h5"


def write_shard(path: Path, group: LabeledGroup, atomic_energies: Mapping[int, float]) -> None:
    """Write one group as a file of its own, all or nothing."""
    with _replacing(path) as temporary, h5py.File(temporary, "w") as file:
        _write_group(file, group, atomic_energies)


def merge(
    shards: Iterable[Path], output: Path, attributes: Mapping[str, object]
) -> dict[str, dict[str, int]]:
    """Copy shards into one file, all or nothing, in the order given.

    Args:
        shards: existing shard files.
        output: HDF5 file, replaced when it exists.
        attributes: root attributes.

    Returns:
        For each split: number of groups and of conformations.
    """
    counts: dict[str, dict[str, int]] = {}
    dropped: dict[str, int] = {}
    with _replacing(output) as temporary, h5py.File(temporary, "w") as file:
        for shard in shards:
            with h5py.File(shard, "r") as source:
                for name, group in source.items():
                    for reason, number in json.loads(group.attrs["dropped"]).items():
                        dropped[reason] = dropped.get(reason, 0) + number
                    if "conformations" not in group:
                        continue
                    source.copy(group, file, name)
                    entry = counts.setdefault(
                        group.attrs["split"], {"groups": 0, "conformations": 0}
                    )
                    entry["groups"] += 1
                    entry["conformations"] += len(group["conformations"])
        for key, value in attributes.items():
            file.attrs[key] = value
        file.attrs["dropped"] = json.dumps(dropped, sort_keys=True)
        file.attrs["splits"] = json.dumps(counts, sort_keys=True)
    return counts


def read_attributes(path: Path) -> dict[str, object]:
    """Root attributes of a data set file.

    Raises:
        DataError: not an HDF5 file.
    """
    try:
        with h5py.File(path, "r") as file:
            return dict(file.attrs)
    except OSError as error:
        raise DataError(
            f"{path} is not a readable HDF5 file; remove it or choose another name"
        ) from error


def statistics(path: Path) -> dict[str, dict[str, float]]:
    """Counts of a data set file by subset.

    Returns:
        For each subset: groups, conformations, atoms (of all conformations), conformations that
        are charged and of each split, rms and largest |force| of an atom in eV/Å.
    """
    from mlip_md.trainer.generate.labels import FORCE_UNIT

    table: dict[str, dict[str, float]] = {}
    squares: dict[str, float] = {}
    with h5py.File(path, "r") as file:
        for group in file.values():
            subset = group["subset"].asstr()[0]
            row = table.setdefault(subset, dict.fromkeys(COLUMNS, 0))
            norms = np.linalg.norm(group["dft_total_gradient"][()], axis=-1) * FORCE_UNIT
            row["groups"] += 1
            row["conformations"] += norms.shape[0]
            row["atoms"] += norms.size
            row["charged"] += norms.shape[0] * bool(group.attrs["total_charge"])
            row[group.attrs["split"]] += norms.shape[0]
            row["max_force"] = max(row["max_force"], float(norms.max()))
            squares[subset] = squares.get(subset, 0.0) + float((norms**2).sum())
    for subset, row in table.items():
        row["rms_force"] = float(np.sqrt(squares[subset] / row["atoms"]))
    return table


COLUMNS = (
    "groups",
    "conformations",
    "atoms",
    "charged",
    "train",
    "validation",
    "test",
    "rms_force",
    "max_force",
)


def _write_group(
    file: h5py.File, group: LabeledGroup, atomic_energies: Mapping[int, float]
) -> None:
    target = file.create_group(group.name)
    target.attrs["total_charge"] = group.charge
    target.attrs["split"] = group.split
    target.attrs["dropped"] = json.dumps(dict(group.dropped), sort_keys=True)
    if not len(group.energies):
        return
    text = h5py.string_dtype()
    target.create_dataset("subset", data=[group.subset], dtype=text)
    target.create_dataset("smiles", data=[group.smiles], dtype=text)
    target.create_dataset("atomic_numbers", data=group.atomic_numbers.astype(np.int16))
    atoms = sum(atomic_energies[int(z)] for z in group.atomic_numbers)
    numeric = {
        "conformations": group.conformations.astype(np.float32),
        "formation_energy": group.energies - atoms,
        "dft_total_energy": group.energies,
        "dft_total_gradient": group.gradients.astype(np.float32),
    }
    for key, values in numeric.items():
        dataset = target.create_dataset(key, data=values, compression="gzip", shuffle=True)
        dataset.attrs["units"] = UNITS[key]
    origin = target.create_dataset("origin", data=group.origins.astype(np.int8))
    origin.attrs["names"] = list(ORIGINS)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if nothing fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
