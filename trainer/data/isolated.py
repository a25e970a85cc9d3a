"""Isolated atoms among the structures: no training frames, but the one exact source of E0."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mlip_md.elements import symbol
from mlip_md.errors import DataError
from mlip_md.trainer.data.structures import LabeledStructure

logger = logging.getLogger(__name__)

MARK = "isolatedatom"
"""``config_type`` of an isolated atom, in small letters without ``_``."""

SAME_ENERGY = 1e-3
"""eV; energies of one atom that differ by more are of two states or two methods."""


def is_isolated(structure: LabeledStructure, cutoff: float) -> bool:
    """Whether a structure is one atom without neighbors.

    Args:
        structure: any; one that its ``config_type`` calls an isolated atom must be one.
        cutoff: Å, within which an atom has neighbors; the nearest image of an atom in a large box
            is none.

    Raises:
        DataError: if a structure is called an isolated atom and has several atoms, or near images.
    """
    marked = structure.subset.lower().replace("_", "").replace(" ", "") == MARK
    if len(structure) > 1 and not marked:
        return False
    alone = len(structure) == 1 and (
        structure.cell is None or not len(structure.find_edges(cutoff).lengths)
    )
    if marked and not alone:
        raise DataError(
            f"{structure.name}: its config_type is {structure.subset}, but it has "
            f"{len(structure)} atoms, or images within the cutoff of {cutoff:g} Å; an isolated "
            "atom is one atom, without a cell or in a larger one"
        )
    return alone


@dataclasses.dataclass
class IsolatedAtoms:
    """Energies of isolated atoms that were met.

    Attributes:
        found: by atomic number, total energies (eV) of neutral atoms, each with its source.
        ions: names of single atoms with a charge, which say nothing of E0.
    """

    found: dict[int, list[tuple[float, str]]] = dataclasses.field(default_factory=dict)
    ions: list[str] = dataclasses.field(default_factory=list)

    def add(self, atomic_number: int, energy: float, source: str) -> None:
        """Note the energy (eV) of an atom and where it was found, unless it is known already."""
        known = self.found.setdefault(atomic_number, [])
        if all(abs(energy - other) > SAME_ENERGY for other, _ in known):
            known.append((energy, source))

    def part_from(
        self, structures: Iterable[LabeledStructure], cutoff: float
    ) -> Iterator[LabeledStructure]:
        """Yield all other structures; isolated atoms are noted here and go no further.

        Args:
            structures: of a file.
            cutoff: Å, see ``is_isolated``.
        """
        for structure in structures:
            if not is_isolated(structure, cutoff):
                yield structure
            elif structure.charge:
                self.ions.append(structure.name)
            else:
                self.add(int(structure.atomic_numbers[0]), structure.energy, structure.name)

    def energies_of(self, elements: Sequence[int]) -> dict[int, float]:
        """E0 (eV) by atomic number.

        Raises:
            DataError: if an element has none, or several that contradict each other.
        """
        missing = [symbol(z) for z in elements if z not in self.found]
        if missing:
            raise DataError(
                f"model.atomic_energies is isolated, but there is no isolated atom of "
                f"{', '.join(missing)} in the data; add it (config_type=IsolatedAtom), give E0 as "
                "a map or a file, or let them be fitted: average"
            )
        for z in elements:
            if len(self.found[z]) > 1:
                several = ", ".join(f"{energy:.6g} ({source})" for energy, source in self.found[z])
                raise DataError(
                    f"isolated atoms of {symbol(z)} have different energies, eV: {several}; leave "
                    "the one of the same method and of the ground state"
                )
        return {z: self.found[z][0][0] for z in elements}

    def sources(self) -> str:
        """Where each energy was found, in words; empty if there is none."""
        return ", ".join(
            f"{symbol(z)} {energy:.6g} eV ({source})"
            for z, known in sorted(self.found.items())
            for energy, source in known
        )

    def warn_if_unused(self, fitted: Mapping[int, float]) -> None:
        """Log how far fitted E0 (eV by atomic number) are from the isolated atoms that are there.

        Args:
            fitted: what is used although isolated atoms are known.
        """
        gaps = {
            symbol(z): max(abs(fitted[z] - energy) for energy, _ in known)
            for z, known in self.found.items()
            if z in fitted
        }
        if gaps:
            logger.warning(
                "the data hold isolated atoms of %s, which are no training structures, but E0 are "
                "fitted and up to %.4g eV (%s) away from them; model.atomic_energies: isolated "
                "takes theirs",
                ", ".join(gaps), max(gaps.values()), max(gaps, key=lambda name: gaps[name]),
            )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """The same as plain JSON values."""
        return {"found": {str(z): known for z, known in self.found.items()}, "ions": self.ions}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> IsolatedAtoms:
        """Inverse of ``to_dict``."""
        found = {
            int(z): [(float(e), str(s)) for e, s in known] for z, known in values["found"].items()
        }
        return cls(found, list(values["ions"]))
