"""Structures of a store as extended XYZ, for people to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
from ase import Atoms

from mlip_md.files import replacing
from mlip_md.trainer.data.store import GraphStore

PREFIX = "mlip_md_"
"""Of the names of predictions, beside ``REF_`` of labels."""

Predicted = Callable[[int], Mapping[str, Any]]
"""Values of the structure of an index by name: a number, forces (n, 3) or a stress (3, 3)."""


def to_atoms(store: GraphStore, index: int) -> Atoms:
    """A structure with its labels, as far as it has them, and where it came from.

    Labels are ``REF_energy``, ``REF_forces`` and ``REF_stress``.

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
    if store.has_forces(index):
        atoms.arrays["REF_forces"] = np.asarray(store.forces[rows])
    if store.has_stress(index) and store.stress is not None:
        atoms.info["REF_stress"] = np.asarray(store.stress[index])
    return atoms


def write_structures(
    store: GraphStore,
    indices: Sequence[int] | np.ndarray,
    path: Path,
    predicted: Predicted | None = None,
) -> Path:
    """Write structures with their labels.

    Args:
        store: graphs and labels.
        indices: which structures, in which order.
        path: extended XYZ to write.
        predicted: gives further values of a structure; "forces" become a column of its atoms under
            ``mlip_md_forces``, others lie beside the energy, likewise named.

    Returns:
        The path.

    Raises:
        OutputError: if the file cannot be written.
    """

    def all_atoms() -> Iterator[Atoms]:
        for index in indices:
            atoms = to_atoms(store, int(index))
            for name, values in (predicted(int(index)) if predicted else {}).items():
                columns = atoms.arrays if name == "forces" else atoms.info
                columns[f"{PREFIX}{name}"] = values
            yield atoms

    with replacing(path) as temporary:
        ase.io.write(temporary, list(all_atoms()), format="extxyz")
    return path
