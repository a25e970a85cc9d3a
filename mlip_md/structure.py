"""What a structure is asked before it is computed, in float64 on the host; errors name atoms."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlip_md.elements import symbol
from mlip_md.errors import CoincidenceError, StructureError
from mlip_md.neighbors import (
    HostEdges,
    check_cell,
    check_positions,
    host_edges,
    morton_order,
    place,
)
from mlip_md.potential import Potential

COINCIDENT = 0.05
"""Å; atoms closer than this are one atom written twice, or a structure in the wrong units."""
BIN = 2.0
"""Å; atoms that share such a cube are sorted no further."""
MIN_ATOM_VOLUME = 1.0
"""Å³ of a periodic cell per atom; diamond has 5.7, hydrogen at 500 GPa more than 1."""


@dataclasses.dataclass(frozen=True)
class CheckedStructure:
    """A structure that a potential can be evaluated on.

    Attributes:
        positions: (n, 3) float64 Å, wrapped into the cell, without gaps, centered.
        numbers: (n,) atomic numbers.
        species: (n,) int32, the potential's.
        cell: (3, 3) float64 Å, zeros if there is none.
        pbc: (3,) bool.
        edges: its exact list, or None if that is made on the device.
        labels: (n,) the caller's index of each atom, or None if the order is the caller's.
    """

    positions: NDArray[np.float64]
    numbers: NDArray[np.int64]
    species: NDArray[np.int32]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]
    edges: HostEdges | None = None
    labels: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.species)

    @property
    def n_edges(self) -> int:
        """Number of listed edges."""
        return 0 if self.edges is None else len(self.edges.senders)

    def label(self, atoms: NDArray[np.integer]) -> NDArray[np.integer]:
        """The caller's indices of atoms."""
        return atoms if self.labels is None else self.labels[atoms]

    def restore(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of atoms (n, ...) in the caller's order."""
        if self.labels is None:
            return values
        restored = np.empty_like(values)
        restored[self.labels] = values
        return restored


def check_structure(
    potential: Potential,
    positions: ArrayLike,
    atomic_numbers: ArrayLike,
    cell: ArrayLike | None,
    pbc: ArrayLike,
) -> CheckedStructure:
    """Check a structure, wrap it into its cell, close its gaps and center it.

    Args:
        potential: that will be evaluated.
        positions: (n, 3) Å, anywhere in space.
        atomic_numbers: (n,).
        cell: (3, 3) Å, rows are lattice vectors, or None.
        pbc: one bool, or three.

    Returns:
        The structure, without edges.

    Raises:
        StructureError: if there are no atoms, values are not finite, shapes do not fit, the
            periodic vectors span no volume, or atoms do not fit into it.
        UnsupportedElementError: if the potential does not know an element.
    """
    checked = check_positions(positions)
    numbers = np.asarray(atomic_numbers)
    if len(checked) == 0:
        raise StructureError("the structure has no atoms; there is nothing to compute")
    if numbers.shape != (len(checked),):
        raise StructureError(
            f"there are {len(checked)} positions but atomic numbers of shape {numbers.shape}"
        )
    species = potential.species(numbers)
    checked_cell, periodic = check_cell(cell, pbc)
    if periodic.all():
        _check_volume(len(checked), checked_cell)
    placed = place(checked, checked_cell, periodic, potential.cutoff)
    return CheckedStructure(placed, numbers, species, checked_cell, periodic)


def _check_volume(n_atoms: int, cell: NDArray[np.float64]) -> None:
    """Refuse cells that atoms do not fit into: placeholders (CRYST1 1 1 1) and wrong units."""
    volume = abs(float(np.linalg.det(cell)))
    if volume < MIN_ATOM_VOLUME * n_atoms:
        raise StructureError(
            f"{n_atoms} atoms do not fit into a cell of {volume:.3g} Å³; if it is a placeholder, "
            "remove it and the periodicity, else check that it is in Å"
        )


def sort_in_space(structure: CheckedStructure) -> CheckedStructure:
    """The structure, without edges, with its atoms in an order in which neighbors are close by.

    What an edge reads of its sender is then mostly in the processor's cache already.
    """
    order = morton_order(structure.positions, BIN)
    return dataclasses.replace(
        structure,
        positions=structure.positions[order],
        numbers=structure.numbers[order],
        species=structure.species[order],
        labels=order,
    )


def list_edges(structure: CheckedStructure, cutoff: float) -> CheckedStructure:
    """The structure with its exact list of edges within a cutoff (Å).

    Raises:
        CoincidenceError: if two atoms coincide, naming them.
        CapacityError: if there are too many edges.
    """
    edges = host_edges(structure.positions, structure.cell, structure.pbc, cutoff, closed=True)
    if len(edges.lengths) and edges.lengths.min() < COINCIDENT:
        raise _coincidence(structure, edges)
    return dataclasses.replace(structure, edges=edges)


def _coincidence(structure: CheckedStructure, edges: HostEdges) -> CoincidenceError:
    """An error that names the closest pair, and holds all."""
    first, second = structure.label(edges.senders), structure.label(edges.receivers)
    near = np.flatnonzero((edges.lengths < COINCIDENT) & (first < second))
    ends = structure.positions[edges.receivers[near]]
    vectors = ends - structure.positions[edges.senders[near]]
    vectors = vectors + edges.shifts[near] @ structure.cell
    edge = int(np.argmin(edges.lengths))
    i, j, shift = int(first[edge]), int(second[edge]), edges.shifts[edge]
    ends_of_edge = structure.numbers[[edges.senders[edge], edges.receivers[edge]]]
    names = [symbol(number) for number in ends_of_edge.tolist()]
    image = f" (its image {shift.tolist()} by whole lattice vectors)" if shift.any() else ""
    return CoincidenceError(
        f"atoms {i} ({names[0]}) and {j} ({names[1]}){image} are {edges.lengths[edge]:.3g} Å "
        f"apart, less than {COINCIDENT} Å; remove the duplicate, or check that the units are Å",
        list(zip(first[near].tolist(), second[near].tolist(), strict=True)),
        vectors.tolist(),
        COINCIDENT,
    )
