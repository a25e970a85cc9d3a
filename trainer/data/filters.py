"""Curation: keep the structures from which a force field should learn; by default all of them.

The filters of the SPICE2 curation that both published cards were trained on: every hydrogen has
exactly one bond, the system is neutral, no force is extreme, and forces sum to zero. How bonds were
found is not published; here they come from covalent radii (see ``has_single_bonds``).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from ase.data import covalent_radii

from mlip_md.elements import ATOMIC_NUMBERS, MAX_ATOMIC_NUMBER
from mlip_md.trainer.data.structures import LabeledStructure
from mlip_md.trainer.recipe.schema import CurationConfig

logger = logging.getLogger(__name__)

MUCH = 0.05
"""Part of the structures of which a filter may remove more only with a warning."""

BOND_FACTOR = 1.3
"""Two atoms are bonded when closer than this times the sum of their covalent radii."""

Filters = dict[str, Callable[[LabeledStructure], bool]]

_IONS = [3, 4, 11, 12, 19, 20, 37, 38, 55, 56]
"""Alkali and alkaline earth metals: cations beside a hydrogen, not bonded to it."""

BOND_RADII = covalent_radii.copy()
BOND_RADII[_IONS] = -np.inf


@dataclasses.dataclass
class CurationReport:
    """How many structures each filter removed; a structure counts under the first that hits it.

    Attributes:
        total: structures given.
        kept: structures left.
        removed: count by filter, in the order of application.
        examples: names of the first structures that each filter removed.
        unused: names that look like labels and were not used, with how many structures have them.
    """

    total: int = 0
    kept: int = 0
    removed: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    unused: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.describe(name) for name in self.removed]
        return f"kept {self.kept} of {self.total} structures (removed {'; '.join(parts) or 'none'})"

    def describe_unused(self) -> str:
        """What looks like labels and was not used; empty without."""
        if not self.unused:
            return ""
        names = ", ".join(f"{name} ({count})" for name, count in sorted(self.unused.items()))
        return (
            f"not used, although they look like labels: {names}; data.energy_key, forces_key, "
            "stress_key and virial_key name what to read"
        )

    def describe(self, name: str) -> str:
        """What a filter removed: count, share, examples."""
        count, examples = self.removed[name], self.examples.get(name, [])
        share = f", {100 * count / self.total:.2g} %, e.g. {', '.join(examples)}" if count else ""
        return f"{name}: {count}{share}"

    def warn_of_much(self, path: str) -> None:
        """Log a warning for every filter that removed more than 5 % of a file's structures."""
        for name, count in self.removed.items():
            if count > MUCH * self.total:
                logger.warning(
                    "%s: data.curate removed by %s; null switches the filter off if these "
                    "structures are meant", path, self.describe(name),
                )  # fmt: skip


def make_filters(config: CurationConfig | None) -> Filters:
    """The filters of a curation, named by its rows, in the order of application.

    Args:
        config: what to remove, see ``CurationConfig``; None removes nothing.
    """
    filters: Filters = {}
    if config is None:
        return filters
    max_force, max_net_force = config.max_force, config.max_net_force
    max_noise = config.max_net_force_per_sqrt_atom
    if config.elements is not None:
        allowed = np.zeros(MAX_ATOMIC_NUMBER + 1, bool)
        allowed[[ATOMIC_NUMBERS[name] for name in config.elements]] = True
        filters["elements"] = lambda s: bool(allowed[s.atomic_numbers].all())
    if config.one_bond_per_hydrogen:
        filters["one_bond_per_hydrogen"] = has_single_bonds
    if config.neutral_only:
        filters["neutral_only"] = lambda s: s.charge == 0
    if max_force is not None:
        filters["max_force"] = lambda s: _longest(s.forces) <= max_force  # 0 without labels
    if max_net_force is not None:
        # The sum of all forces is numerical noise of the reference method.
        filters["max_net_force"] = lambda s: _longest(s.forces.sum(axis=0)) <= max_net_force
    if max_noise is not None:
        filters["max_net_force_per_sqrt_atom"] = lambda s: (
            _longest(s.forces.sum(axis=0)) <= max_noise * math.sqrt(len(s))
        )
    return filters


def apply_filters(
    structures: Iterable[LabeledStructure], filters: Filters, report: CurationReport
) -> Iterator[LabeledStructure]:
    """Yield the structures that pass all filters; the report grows with every structure."""
    for name in filters:
        report.removed.setdefault(name, 0)
    for structure in structures:
        report.total += 1
        hit = next((name for name, passes in filters.items() if not passes(structure)), None)
        if hit is None:
            report.kept += 1
            yield structure
            continue
        report.removed[hit] += 1
        examples = report.examples.setdefault(hit, [])
        if len(examples) < 3:
            examples.append(structure.name)


def _longest(vectors: np.ndarray) -> float:
    return math.sqrt(float((vectors * vectors).sum(axis=-1).max()))


def has_single_bonds(structure: LabeledStructure) -> bool:
    """Whether every hydrogen has exactly one bond.

    A bond is a distance below 1.3 times the sum of the covalent radii (Cordero et al., Dalton
    Trans. 2008, 2832, as tabulated by ASE): C-H up to 1.39 Å, O-H up to 1.26 Å, H-H up to 0.81 Å.
    Alkali and alkaline earth metals count as ions without bonds.

    Raises:
        DataError: as ``LabeledStructure.find_edges``, if the structure is periodic.
    """
    numbers = structure.atomic_numbers
    hydrogens = np.flatnonzero(numbers == 1)
    if not hydrogens.size:
        return True
    radii = BOND_RADII[numbers]
    if structure.cell is not None:
        return _periodic_single_bonds(structure, radii, hydrogens)
    positions = structure.positions
    difference = positions[hydrogens, None] - positions[None]
    squared = np.einsum("hni,hni->hn", difference, difference)
    squared[np.arange(len(hydrogens)), hydrogens] = np.inf
    limit = np.maximum(BOND_FACTOR * (radii[hydrogens, None] + radii[None]), 0.0)
    return bool(((squared < limit**2).sum(axis=1) == 1).all())


def _periodic_single_bonds(
    structure: LabeledStructure, radii: np.ndarray, hydrogens: np.ndarray
) -> bool:
    longest = BOND_FACTOR * (covalent_radii[1] + max(float(radii.max()), 0.0))
    i, j, _, lengths = structure.find_edges(longest)
    bonded = lengths < BOND_FACTOR * (radii[i] + radii[j])
    counts = np.bincount(i[bonded], minlength=len(structure))
    return bool((counts[hydrogens] == 1).all())
