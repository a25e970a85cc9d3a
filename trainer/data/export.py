"""Structures of a store as extended XYZ, for people to look at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms

from mlip_md.files import replacing
from mlip_md.trainer.data.store import GraphStore

Columns = Mapping[str, np.ndarray]
"""More values of a structure by name: of its atoms (N, …), or one (1,)."""


def to_atoms(store: GraphStore, index: int) -> Atoms:
    """A structure with its labels, as ``REF_energy`` and ``REF_forces``, and where it came from.

    Args:
        store: graphs and labels.
        index: of the structure.
    """
    first, count = int(store.first_atom[index]), int(store.num_atoms[index])
    rows = slice(first, first + count)
    cell = None if store.cell is None else store.cell[index]
    atoms = Atoms(
        store.atomic_numbers[rows],
        store.positions[rows],
        cell=cell,
        pbc=cell is not None and np.linalg.norm(cell, axis=1) > 0,
    )
    atoms.info |= {"REF_energy": float(store.energy[index]), "name": store.names[index]}
    if store.subsets[index]:
        atoms.info["subset"] = store.subsets[index]
    atoms.arrays["REF_forces"] = np.asarray(store.forces[rows])
    return atoms


def write_structures(
    store: GraphStore,
    indices: Sequence[int] | np.ndarray,
    path: Path,
    more: Mapping[int, Columns] | None = None,
) -> Path:
    """Write structures with their labels.

    Args:
        store: graphs and labels.
        indices: which structures, in which order.
        path: extended XYZ to write.
        more: further values by structure, such as predictions.

    Returns:
        The path.

    Raises:
        OutputError: if the file cannot be written.
    """

    def all_atoms() -> Iterator[Atoms]:
        for index in indices:
            atoms = to_atoms(store, int(index))
            for name, values in (more or {}).get(int(index), {}).items():
                if len(values) == 1 != len(atoms):
                    atoms.info[name] = float(values[0])
                else:
                    atoms.arrays[name] = np.asarray(values)
            yield atoms

    with replacing(path) as temporary:
        ase.io.write(temporary, list(all_atoms()), format="extxyz")
    return path
