"""Charges and spins that somebody states for a structure, and the one check of them.

The models of today learnt neutral singlets and have no input for anything else. A total charge or
a spin that a file, ``Atoms`` or a topology states is therefore never ignored: it is refused, or in
a macromolecule, whose charged groups such models do learn, a warning. Partial charges of atoms and
the initial charges and moments of ASE, which its tools set freely, are no such statement.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlip_md.errors import StructureError
from mlip_md.integrations.residue_names import is_standard

NEUTRAL_SINGLET: Mapping[str, tuple[int, ...]] = {
    "charge": (0,),
    "total_charge": (0,),
    "spin": (0, 1),
    "multiplicity": (1,),
    "spin_multiplicity": (1,),
    "total_spin": (0,),
    "uhf": (0,),
}
"""Keys of ``atoms.info`` that state a charge or spin, and what a model without either accepts."""


@dataclasses.dataclass(frozen=True)
class Stated:
    """One statement of a total charge or a spin.

    Attributes:
        where: what states it, for messages: "atoms.info['charge']", "line 7 (M  CHG)".
        key: which of ``NEUTRAL_SINGLET``.
        value: as stated; charges in elementary charges.
    """

    where: str
    key: str
    value: Any

    @property
    def is_charge(self) -> bool:
        """Whether a charge is stated, and not a spin."""
        return self.key in ("charge", "total_charge")

    def problem(self) -> str | None:
        """What is wrong with it for a model of neutral singlets, or None."""
        value = _number(self.value)
        if value is None:
            return f"{self.where} = {self.value!r} is no number"
        if value in NEUTRAL_SINGLET[self.key]:
            return None
        return (
            f"{self.where} = {value:g}, but this model has no input for charge or spin and would "
            "ignore it; remove the entry to compute with what it learnt"
        )


def stated_in_info(info: Mapping[str, Any]) -> list[Stated]:
    """What the ``info`` of ASE's ``Atoms`` states."""
    found = ((key, info.get(key)) for key in NEUTRAL_SINGLET)
    return [Stated(f"atoms.info[{key!r}]", key, value) for key, value in found if value is not None]


def stated_in_topology(topology: Any, atoms: Iterable[int] | None = None) -> list[Stated]:
    """The sum of the formal charges in an OpenMM topology, if it has any.

    Args:
        topology: ``openmm.app.Topology``.
        atoms: indices of the atoms that count; None is all.
    """
    wanted = None if atoms is None else set(atoms)
    charges = [
        atom.formalCharge
        for atom in topology.atoms()
        if atom.formalCharge is not None and (wanted is None or atom.index in wanted)
    ]
    return [Stated("the formal charge of the topology", "charge", sum(charges))] if charges else []


def charge_or_spin(info: Mapping[str, Any]) -> str | None:
    """What is wrong with the charge or spin stated in ``atoms.info``; None for neutral singlets."""
    return next((text for one in stated_in_info(info) if (text := one.problem())), None)


def check_stated(stated: Sequence[Stated], residues: Iterable[str] = ()) -> list[str]:
    """Refuse what a model of neutral singlets would ignore.

    Args:
        stated: of one structure.
        residues: names of its residues; with two amino acids or nucleotides or more it is a
            macromolecule, whose charge is a warning.

    Returns:
        Warnings, each a sentence.

    Raises:
        StructureError: if a charge or spin is stated that is not that of a neutral singlet.
    """
    large = sum(1 for name in residues if is_standard(name)) >= 2
    warnings = []
    for one in stated:
        problem = one.problem()
        if problem is None:
            continue
        if not (large and one.is_charge and _number(one.value) is not None):
            raise StructureError(problem)
        warnings.append(
            f"{one.where} = {one.value:+g}: this model has no input for charges and computes the "
            "charged residues as it learnt such groups; look whether it knows them"
        )
    return warnings


def _number(value: Any) -> float | None:
    """A plain number; None for anything else, also for several or a masked one."""
    if np.ma.is_masked(value):
        return None
    try:
        array = np.asarray(value)
    except (TypeError, ValueError):  # rows of different lengths
        return None
    return float(array.item()) if array.size == 1 and array.dtype.kind in "iufb" else None
