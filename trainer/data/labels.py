"""Labels of ``ase.Atoms``: under which names they stand, which belong together, what they weigh."""

from __future__ import annotations

import dataclasses
import re
from typing import Any, NamedTuple

import ase
import numpy as np

from mlip_md.errors import DataError
from mlip_md.trainer.data.structures import refusing_unreadable

ENERGY_KEYS = ("REF_energy", "energy", "Energy")
FORCES_KEYS = ("REF_forces", "forces", "Forces")
STRESS_KEYS = ("REF_stress", "stress")
VIRIAL_KEYS = ("REF_virial", "REF_virials", "virial", "virials")
"""Names that are tried, in this order. Those with ``REF_`` are one family, the others another."""

WEIGHT_KEYS = (
    "config_weight", "config_energy_weight", "config_forces_weight", "config_stress_weight",
)  # fmt: skip
"""Weight of a structure in the loss, and of its energy, forces and stress."""

_LIKE_LABELS = re.compile(r"energ|force|stress|virial|gradient", re.IGNORECASE)
_OURS = {*ENERGY_KEYS, *FORCES_KEYS, *STRESS_KEYS, *VIRIAL_KEYS, *WEIGHT_KEYS}
_BESIDES = {"free_energy", "energies", "stresses"}
"""What ASE's calculators give as well."""


@dataclasses.dataclass
class LabelKeys:
    """Names of labels that were chosen; None tries the usual ones.

    Attributes:
        energy: of the total energy.
        forces: of the forces.
        stress: of the stress.
        virial: of the virial, minus stress times volume.
        unused: names that look like labels and were not used, with how many structures have them.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    virial: str | None = None
    unused: dict[str, int] = dataclasses.field(default_factory=dict)


class _Found(NamedTuple):
    key: str
    value: Any


def _find(atoms: ase.Atoms, keys: tuple[str, ...]) -> _Found | None:
    """The first of some names that is there, in info, arrays or results."""
    results = atoms.calc.results if atoms.calc is not None else {}
    places = (atoms.info, atoms.arrays, results)
    found = (_Found(key, place[key]) for key in keys for place in places if key in place)
    return next(found, None)


def _of_reference(key: str) -> bool:
    return key.startswith("REF_")


def read_labels(atoms: ase.Atoms, keys: LabelKeys, name: str) -> dict[str, Any]:
    """Energy, forces, stress and weights of a frame, as fields of a ``LabeledStructure``.

    Where names are not chosen, all labels are of the family of the energy. Forces may be missing
    if nothing looks like them.

    Args:
        atoms: the frame.
        keys: names that were chosen; what is not used is counted there.
        name: of the frame, for messages.

    Raises:
        DataError: without an energy, or if forces stand under another name.
    """
    energy = _find(atoms, (keys.energy,) if keys.energy else ENERGY_KEYS)
    if energy is None:
        wanted = keys.energy or " or ".join(ENERGY_KEYS)
        raise DataError(
            f"{name}: no energy under {wanted}; it has {_names(atoms)} (data.energy_key and "
            "data.forces_key name what to read)"
        )

    def family(tried: tuple[str, ...], chosen: str | None) -> _Found | None:
        if chosen:
            return _find(atoms, (chosen,))
        same = _of_reference(energy.key)
        free = keys.energy is not None
        return _find(atoms, tuple(k for k in tried if free or _of_reference(k) == same))

    forces = family(FORCES_KEYS, keys.forces)
    stress = family(STRESS_KEYS, keys.stress)
    virial = family(VIRIAL_KEYS, keys.virial)
    unused = _unused(atoms, [f.key for f in (energy, forces, stress, virial) if f])
    if forces is None:
        _check_missing(keys, energy.key, unused, atoms, name)
    for key in unused:
        keys.unused[key] = keys.unused.get(key, 0) + 1
    return {
        "energy": energy.value,
        "forces": _forces(atoms, forces),
        "stress": _stress(atoms, name, stress, virial),
        "weights": _weights(atoms, name),
    }


def _names(atoms: ase.Atoms) -> str:
    results = atoms.calc.results if atoms.calc is not None else {}
    there = sorted({*atoms.info, *atoms.arrays, *results} - {"numbers", "positions"})
    return ", ".join(there) or "none"


def _unused(atoms: ase.Atoms, used: list[str]) -> list[str]:
    results = atoms.calc.results if atoms.calc is not None else {}
    there = [*atoms.info, *atoms.arrays, *results]
    alike = [k for k in there if _LIKE_LABELS.search(k) and k not in _BESIDES]
    return sorted({*alike} - {*used} - {*WEIGHT_KEYS})


def _check_missing(
    keys: LabelKeys, energy: str, unused: list[str], atoms: ase.Atoms, name: str
) -> None:
    """Refuse a frame whose forces are there, but not where they are looked for."""
    alike = [key for key in unused if re.search("force|gradient", key, re.IGNORECASE)]
    if keys.forces:
        raise DataError(f"{name}: no forces under {keys.forces}; it has {_names(atoms)}")
    if alike:
        raise DataError(
            f"{name}: the energy stands under {energy}, but forces only under {', '.join(alike)}; "
            "which labels belong together? Name both (data.energy_key, data.forces_key)"
        )


def _forces(atoms: ase.Atoms, found: _Found | None) -> Any:
    if found is None and len(atoms) == 1:
        return np.zeros((1, 3))  # exact: nothing acts on a single atom, and images cancel
    return None if found is None else found.value


def _stress(
    atoms: ase.Atoms, name: str, stress: _Found | None, virial: _Found | None
) -> np.ndarray | None:
    """Stress (3, 3) eV/Å³ from a stress label, or from a virial (minus stress times volume)."""
    label = stress or virial
    if label is None or not atoms.pbc.all():
        return None
    factor = 1.0 if stress else -1.0 / atoms.cell.volume if atoms.cell.volume else np.nan
    with refusing_unreadable(name, "the stress label is no array of numbers"):
        values = np.asarray(label.value, np.float64)
    if values.shape == (6,):  # Voigt order xx yy zz yz xz xy
        values = values[[0, 5, 4, 5, 1, 3, 4, 3, 2]]
    if values.size != 9:
        raise DataError(f"{name}: stress of shape {values.shape}; it must be (6,), (9,) or (3, 3)")
    return factor * values.reshape(3, 3)


def _weights(atoms: ase.Atoms, name: str) -> tuple[float, float, float]:
    """Weights of energy, forces and stress."""
    given = [atoms.info.get(key, 1.0) for key in WEIGHT_KEYS]
    with refusing_unreadable(name, "a weight (config_weight, …) is no number"):
        whole, energy, forces, stress = (float(weight) for weight in given)
    return whole * energy, whole * forces, whole * stress
