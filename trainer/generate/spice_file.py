"""Files of the data set in the layout of SPICE 2: one shard per group, merged into one HDF5 file.

Every file is written whole or not at all, so a killed run leaves whole shards only.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from mlip_md.constants import SPLITS
from mlip_md.errors import DataError
from mlip_md.files import replacing
from mlip_md.trainer.generate.chemistry import ORIGINS, Molecule
from mlip_md.trainer.generate.labels import FORCE_UNIT

UNITS = {
    "conformations": "bohr",
    "formation_energy": "hartree",
    "dft_total_energy": "hartree",
    "dft_total_gradient": "hartree/bohr",
}
SUBSET_COLUMNS = (
    "groups",
    "conformations",
    "atoms",
    "charged",
    *SPLITS,
    "rms_force",
    "max_force",
)


@dataclass(frozen=True)
class LabeledConformation:
    """One conformation of a group as the file keeps it.

    Attributes:
        positions: (N, 3) float32 in bohr.
        energy: in hartree.
        gradient: (N, 3) in hartree/bohr; gradient = -force.
        origin: one of `ORIGINS`.
    """

    positions: np.ndarray
    energy: float
    gradient: np.ndarray
    origin: str


@dataclass(frozen=True)
class LabeledGroup:
    """All conformations of one molecule with their labels.

    Attributes:
        name, subset, split: of the group.
        molecule: whose conformations they are; None if it could not be embedded.
        conformations: those that are kept, perhaps none.
        dropped: reason -> number of structures that were left out.
    """

    name: str
    subset: str
    split: str
    molecule: Molecule | None
    conformations: Sequence[LabeledConformation]
    dropped: Mapping[str, int]


def shard_path(folder: Path, name: str) -> Path:
    """Where the shard of a group lies."""
    return folder / f"{hashlib.sha256(name.encode()).hexdigest()[:24]}.h5"


def write_shard(path: Path, group: LabeledGroup, atomic_energies: Mapping[int, float]) -> None:
    """Write one group as a file of its own.

    Args:
        path: file to write; its folder must exist.
        group: may be empty; its shard then says that it is done.
        atomic_energies: in hartree by atomic number.

    Raises:
        OutputError: the file system refuses.
    """
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        target = file.create_group(group.name)
        target.attrs["split"] = group.split
        target.attrs["dropped"] = json.dumps(dict(group.dropped), sort_keys=True)
        if group.molecule is not None and group.conformations:
            _write_content(target, group, group.molecule, atomic_energies)


def _write_content(
    target: h5py.Group,
    group: LabeledGroup,
    molecule: Molecule,
    atomic_energies: Mapping[int, float],
) -> None:
    target.attrs["total_charge"] = molecule.charge
    text = h5py.string_dtype()
    target.create_dataset("subset", data=[group.subset], dtype=text)
    target.create_dataset("smiles", data=[molecule.smiles], dtype=text)
    target.create_dataset("atomic_numbers", data=molecule.atomic_numbers.astype(np.int16))
    energies = np.array([one.energy for one in group.conformations])
    atoms = sum(atomic_energies[int(z)] for z in molecule.atomic_numbers)
    numeric = {
        "conformations": np.array([one.positions for one in group.conformations], np.float32),
        "formation_energy": energies - atoms,
        "dft_total_energy": energies,
        "dft_total_gradient": np.array([one.gradient for one in group.conformations], np.float32),
    }
    for key, values in numeric.items():
        dataset = target.create_dataset(key, data=values, compression="gzip", shuffle=True)
        dataset.attrs["units"] = UNITS[key]
    origins = [ORIGINS.index(one.origin) for one in group.conformations]
    origin = target.create_dataset("origin", data=np.array(origins, np.int8))
    origin.attrs["names"] = list(ORIGINS)


def merge_shards(shards: Iterable[Path], output: Path, attributes: Mapping[str, object]) -> None:
    """Copy shards into one file, in the order given.

    Args:
        shards: existing shard files.
        output: HDF5 file, replaced when it exists.
        attributes: root attributes; those that count splits and dropped structures are added.

    Raises:
        OutputError: the file system refuses.
    """
    counts: dict[str, Counter[str]] = {}
    dropped: Counter[str] = Counter()
    with replacing(output) as temporary, h5py.File(temporary, "w") as file:
        for shard in shards:
            with h5py.File(shard, "r") as source:
                for name, group in source.items():
                    dropped.update(json.loads(group.attrs["dropped"]))
                    if "conformations" in group:
                        source.copy(group, file, name)
                        counts.setdefault(group.attrs["split"], Counter()).update(
                            groups=1, conformations=len(group["conformations"])
                        )
        file.attrs.update(attributes)
        file.attrs["dropped"] = json.dumps(dropped, sort_keys=True)
        file.attrs["splits"] = json.dumps(counts, sort_keys=True)


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


def count_subsets(path: Path) -> dict[str, dict[str, float]]:
    """Counts of a data set file by subset, under the names of `SUBSET_COLUMNS`.

    Returns:
        For each subset: groups, conformations, atoms (of all conformations), conformations that
        are charged and of each split, rms and largest |force| of an atom in eV/Å.
    """
    table: dict[str, dict[str, float]] = {}
    with h5py.File(path, "r") as file:
        for group in file.values():
            row = table.setdefault(group["subset"].asstr()[0], dict.fromkeys(SUBSET_COLUMNS, 0))
            norms = np.linalg.norm(group["dft_total_gradient"][()], axis=-1) * FORCE_UNIT
            row["groups"] += 1
            row["conformations"] += norms.shape[0]
            row["atoms"] += norms.size
            row["charged"] += norms.shape[0] * bool(group.attrs["total_charge"])
            row[group.attrs["split"]] += norms.shape[0]
            row["max_force"] = max(row["max_force"], float(norms.max()))
            row["rms_force"] += float((norms**2).sum())
    for row in table.values():
        row["rms_force"] = float(np.sqrt(row["rms_force"] / row["atoms"]))
    return table
