"""A labeled structure: what every reader gives and all of the trainer works on, in Å and eV."""

from __future__ import annotations

import contextlib
import dataclasses
import lzma
import math
import zipfile
import zlib
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple

import numpy as np

from mlip_md.elements import MAX_ATOMIC_NUMBER
from mlip_md.errors import CapacityError, DataError, StructureError
from mlip_md.neighbors import check_cell, check_positions, neighbor_list

Fields = dict[str, Any]
"""What a ``LabeledStructure`` is made of; under ``READ``, if known, the part of its file so far."""
READ = "read"


@contextlib.contextmanager
def refusing_unreadable(name: object, what: str = "damaged or not readable") -> Iterator[None]:
    """Raise whatever a damaged file or a wrong label raises as a DataError with its name.

    h5py has no error class of its own; which of these it raises depends on where the damage is.
    """
    try:
        yield
    except DataError:
        raise
    except (
        OSError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, MemoryError,
        RuntimeError, LookupError, TypeError, ValueError,
    ) as error:  # fmt: skip
        raise DataError(f"{name}: {what} ({error})") from error


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """What is wrong with a structure becomes a DataError that says which."""
    try:
        yield
    except (StructureError, CapacityError) as error:
        raise DataError(f"{name}: {error}") from error


def _array(value: object, shape: tuple[int, ...], what: str, name: str) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: {what} are not numbers ({error})") from error
    if array.shape != shape:
        raise DataError(f"{name}: {what} have shape {array.shape}; it must be {shape}")
    if not np.isfinite(array).all():
        raise DataError(f"{name}: {what} hold NaN or infinity")
    return array


class Edges(NamedTuple):
    """Edges sorted by receiver: senders, receivers (m,), shifts (m, 3) int32; lengths (m,) Å."""

    senders: np.ndarray
    receivers: np.ndarray
    shifts: np.ndarray
    lengths: np.ndarray


Source = Generator[Fields | DataError, None, None]
"""The structures of a file, or what is wrong with them."""


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class LabeledStructure:
    """Atoms with the energy and the forces that a reference method gave for them.

    Attributes:
        atomic_numbers: (n,) int64.
        positions: (n, 3) float64 Å.
        energy: total energy, eV.
        forces: (n, 3) float64 eV/Å, minus the gradient of the energy; None, where they are not
            labeled, becomes 0.
        has_forces: whether forces are labels.
        stress: (3, 3) float64 eV/Å³, positive under tension, or None when not labeled.
        cell: (3, 3) float64 Å, rows are lattice vectors, or None without periodicity.
        pbc: (3,) bool, periodic directions.
        charge: total charge, elementary charges.
        group: key of the molecule; structures of one group are never parted by a split.
        subset: name of the part of the data set that it comes from.
        mark: "train", "validation" or "test" if its file says so, else empty.
        weights: of energy, forces and stress in the loss, each at least 0.
        smiles: of the molecule if its file states it, else empty.
        name: where it was read from, ``file:key[index]``, for messages.

    Raises:
        DataError: if a shape, a number or the cell is impossible (``neighbors.check_cell``); the
            message begins with ``name``.
    """

    atomic_numbers: np.ndarray
    positions: np.ndarray
    energy: float
    forces: np.ndarray
    stress: np.ndarray | None = None
    cell: np.ndarray | None = None
    pbc: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(3, bool))
    charge: int = 0
    group: str = ""
    subset: str = ""
    mark: str = ""
    smiles: str = ""
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    has_forces: bool = True
    name: str = "structure"

    def __post_init__(self) -> None:
        numbers = np.asarray(self.atomic_numbers)
        if numbers.ndim != 1 or numbers.size == 0 or numbers.dtype.kind not in "iu":
            raise DataError(
                f"{self.name}: atomic numbers have shape {numbers.shape} and type {numbers.dtype}; "
                "a list of at least one whole number is needed"
            )
        if numbers.min() < 1 or numbers.max() > MAX_ATOMIC_NUMBER:
            raise DataError(
                f"{self.name}: atomic numbers run from {numbers.min()} to {numbers.max()}; "
                f"allowed are 1 to {MAX_ATOMIC_NUMBER}"
            )
        n = len(numbers)
        set_field = object.__setattr__  # the usual way to convert inside a frozen dataclass
        set_field(self, "atomic_numbers", numbers.astype(np.int64, copy=False))
        set_field(self, "positions", _array(self.positions, (n, 3), "positions", self.name))
        if not (isinstance(self.energy, float) and math.isfinite(self.energy)):
            set_field(self, "energy", _array(self.energy, (), "energies", self.name))
        set_field(self, "energy", float(self.energy))
        if self.forces is None:
            set_field(self, "forces", np.zeros((n, 3)))
            set_field(self, "has_forces", False)
        set_field(self, "forces", _array(self.forces, (n, 3), "forces", self.name))
        if self.stress is not None:
            set_field(self, "stress", _array(self.stress, (3, 3), "stresses", self.name))
        if self.weights != (1.0, 1.0, 1.0):
            weights = _array(self.weights, (3,), "weights", self.name)
            if (weights < 0).any():
                raise DataError(f"{self.name}: weights {self.weights} of labels must be at least 0")
        pbc = np.asarray(self.pbc)
        if pbc.shape != (3,) or pbc.dtype.kind not in "biuf":
            raise DataError(f"{self.name}: pbc is {self.pbc!r}; it must be three of True and False")
        set_field(self, "pbc", pbc.astype(bool))
        self._check_geometry()

    def _check_geometry(self) -> None:
        cell = None if self.cell is None else _array(self.cell, (3, 3), "cells", self.name)
        with _naming(self.name):
            check_positions(self.positions)
            if cell is not None or self.pbc.any():
                check_cell(cell, self.pbc)
        object.__setattr__(self, "cell", cell)

    def __len__(self) -> int:
        return len(self.atomic_numbers)

    def find_edges(self, cutoff: float) -> Edges:
        """All pairs of atoms closer than the cutoff (Å), in both directions.

        Raises:
            DataError: if the atoms are too many, or too many cells away, for a list.
        """
        with _naming(self.name):
            senders, receivers, shifts = neighbor_list(self.positions, self.cell, self.pbc, cutoff)
        vectors = self.positions[receivers] - self.positions[senders]
        if self.cell is not None:
            vectors += shifts @ self.cell
        return Edges(senders, receivers, shifts, np.linalg.norm(vectors, axis=1))
