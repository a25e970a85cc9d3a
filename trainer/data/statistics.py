"""Statistics of a training set that a potential is built with: E0, neighbors, distances."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from mlip_md.elements import symbol
from mlip_md.errors import DataError
from mlip_md.trainer.data.isolated import IsolatedAtoms
from mlip_md.trainer.data.readers import read_energy_file
from mlip_md.trainer.data.store import GraphStore
from mlip_md.trainer.recipe.schema import ENERGY_WORDS, AtomicEnergies

logger = logging.getLogger(__name__)

FITTED = "fitted to the data"
ISOLATED = "isolated atoms"
"""Sources of atomic energies, in ``Statistics``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Statistics:
    """What a potential has to know of its training set.

    Attributes:
        elements: atomic numbers, ascending.
        atomic_energies: (len(elements),) float64 eV, E0.
        atomic_energies_source: "fitted to the data", "isolated atoms", "given", "zero" or, with
            its name, a file.
        undetermined: combinations of E0 that the data leave open, in words; empty when none.
        avg_num_neighbors: mean number of neighbors of the atoms that have any.
        avg_r_min: Å, mean over structures of the shortest distance; None if no structure has edges.
        forces_rms: eV/Å, root mean square of the force components.
        num_structures: structures counted.
        num_atoms: atoms counted.
        num_edges: directed edges counted.
    """

    elements: tuple[int, ...]
    atomic_energies: np.ndarray
    atomic_energies_source: str
    undetermined: tuple[str, ...]
    avg_num_neighbors: float
    avg_r_min: float | None
    forces_rms: float
    num_structures: int
    num_atoms: int
    num_edges: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return dataclasses.asdict(self) | {
            "atomic_energies": self.atomic_energies.tolist(),
            "elements": list(self.elements),
            "undetermined": list(self.undetermined),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Statistics:
        """Inverse of ``to_dict``."""
        arrays = {"atomic_energies": np.array(values["atomic_energies"], np.float64)}
        tuples = {name: tuple(values[name]) for name in ("elements", "undetermined")}
        return cls(**{**values, **tuples, **arrays})


def compute_statistics(
    store: GraphStore,
    atomic_energies: AtomicEnergies = "average",
    isolated: IsolatedAtoms | None = None,
) -> Statistics:
    """Compute the statistics of a training set.

    Args:
        store: its graphs.
        atomic_energies: "average" (or None) fits E0 to the total energies, "isolated" takes those
            of isolated atoms, "zero" sets them to 0; a file (see ``readers.read_energy_file``) or
            a map of atomic number to eV gives them.
        isolated: atoms of the data set.

    Returns:
        The statistics; where the compositions do not determine every E0, with the solution of
        least norm (see ``warn_of_open_energies``).

    Raises:
        DataError: on elements without an energy, or if no atom has a neighbor.
    """
    num_connected, num_edges = int(store.num_connected.sum()), int(store.num_edges.sum())
    if num_connected == 0:
        raise DataError(f"no atom has a neighbor within the cutoff of {store.cutoff} Å")
    energies, undetermined, source = _choose_energies(
        store, atomic_energies, isolated or IsolatedAtoms()
    )
    shortest = np.asarray(store.min_distance, np.float64)
    return Statistics(
        elements=store.elements,
        atomic_energies=energies,
        atomic_energies_source=source,
        undetermined=undetermined,
        avg_num_neighbors=num_edges / num_connected,
        avg_r_min=float(shortest[np.isfinite(shortest)].mean()),
        forces_rms=store.forces_rms(),
        num_structures=len(store),
        num_atoms=int(store.num_atoms.sum()),
        num_edges=num_edges,
    )


def _choose_energies(
    store: GraphStore, wanted: AtomicEnergies, isolated: IsolatedAtoms
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """E0 (S,) eV, what the data leave open of them, and their source in words."""
    if wanted is None or wanted == "average":
        fit = fit_atomic_energies(store.compositions, store.energy, store.elements)
        return *fit, FITTED
    source = "given"
    if wanted == "isolated":
        wanted, source = isolated.energies_of(store.elements), ISOLATED
    elif isinstance(wanted, str) and wanted not in ENERGY_WORDS and "." in wanted:
        source, wanted = f"of {wanted}", read_energy_file(wanted)
    if not isinstance(wanted, str):
        given = store.with_atomic_energies(wanted)
        return np.asarray(given.atomic_energies), (), source
    if wanted != "zero":
        raise DataError(
            f"atomic_energies = {wanted!r} is not allowed; it must be 'average', 'isolated', "
            "'zero', null, a file or a map of atomic number to eV"
        )
    return np.zeros(len(store.elements)), (), "zero"


def warn_of_open_energies(statistics: Statistics) -> None:
    """Log a warning for every combination of E0 that the data leave open.

    None where all structures are multiples of one formula, see ``describe_open_energies``.
    """
    for combination in () if _has_one_formula(statistics) else statistics.undetermined:
        logger.warning(
            "the data leave E0 open by any multiple of %s. Energies of other compositions and of "
            "broken bonds mean nothing; give energies of isolated atoms of the same method "
            "(model.atomic_energies), or add structures of other compositions",
            combination,
        )


def describe_open_energies(statistics: Statistics) -> list[str]:
    """A note on E0 of data that hold one formula and its multiples only: one molecule, water.

    Every such set leaves E0 open, and no energy of that formula depends on how.
    """
    if not _has_one_formula(statistics):
        return []
    return [
        f"all structures have one formula, so E0 are open by any multiple of "
        f"{', '.join(statistics.undetermined)}: energies of other compositions and of broken bonds "
        "mean nothing, unless model.atomic_energies gives those of isolated atoms"
    ]


def _has_one_formula(statistics: Statistics) -> bool:
    open_ones = len(statistics.undetermined)
    return open_ones > 0 and open_ones == len(statistics.elements) - 1


def fit_atomic_energies(
    compositions: np.ndarray, energies: np.ndarray, elements: Sequence[int]
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Fit E0 by least squares: total energies against numbers of atoms.

    Args:
        compositions: (n, S) number of atoms of each element in each structure.
        energies: (n,) eV, total energies.
        elements: (S,) atomic numbers.

    Returns:
        E0 (S,) float64 eV, of least norm, and the undetermined combinations in words.
    """
    counts = np.asarray(compositions, np.float64)
    solution, _, rank, _ = np.linalg.lstsq(counts, np.asarray(energies, np.float64), rcond=1e-8)
    if rank == counts.shape[1]:
        return solution, ()
    return solution, tuple(_in_words(vector, elements) for vector in _null_space(counts))


def _null_space(counts: np.ndarray) -> list[list[Fraction]]:
    """Exact basis of the null space of a matrix of whole numbers, by Gauss-Jordan elimination.

    The Gram matrix has the same null space and is only as large as the number of elements.
    """
    rows = [[Fraction(int(x)) for x in row] for row in counts.T @ counts]
    size = len(rows)
    pivots: list[int] = []
    for column in range(size):
        top = len(pivots)
        row = next((r for r in range(top, size) if rows[r][column]), None)
        if row is None:
            continue
        rows[top], rows[row] = rows[row], rows[top]
        rows[top] = [x / rows[top][column] for x in rows[top]]
        for r in range(size):
            if r != top:
                factor = rows[r][column]
                rows[r] = [x - factor * y for x, y in zip(rows[r], rows[top], strict=True)]
        pivots.append(column)
    basis = []
    for free in sorted(set(range(size)) - set(pivots)):
        vector = [Fraction(0)] * size
        vector[free] = Fraction(1)
        for row, pivot in enumerate(pivots):
            vector[pivot] = -rows[row][free]
        basis.append(vector)
    return basis


def _in_words(vector: list[Fraction], elements: Sequence[int]) -> str:
    """E.g. "1 E0(H) - 2 E0(O)", in the smallest whole numbers."""
    scale = np.lcm.reduce([x.denominator for x in vector])
    whole = [int(x * int(scale)) for x in vector]
    divisor = np.gcd.reduce([abs(x) for x in whole])
    first = next(x for x in whole if x)
    whole = [x // int(divisor) * (1 if first > 0 else -1) for x in whole]
    terms = [(x, symbol(int(z))) for x, z in zip(whole, elements, strict=True) if x]
    text = " ".join(f"{'+' if x > 0 else '-'} {abs(x)} E0({name})" for x, name in terms)
    return text.removeprefix("+ ")
