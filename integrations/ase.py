"""ASE calculator.

Units and signs are ASE's: eV, Å, eV/Å, stress in eV/Å³ in Voigt order (xx, yy, zz, yz, xz, xy),
positive under tension.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

import mlip_md
from mlip_md.engine import Engine, Result
from mlip_md.errors import ConfigError, StructureError
from mlip_md.integrations.models import DEFAULT_MODEL
from mlip_md.potential import Potential

_NEUTRAL_SINGLET: dict[str, tuple[int, ...]] = {
    "charge": (0,),
    "total_charge": (0,),
    "spin": (0, 1),
    "multiplicity": (1,),
    "spin_multiplicity": (1,),
}
"""Keys of ``atoms.info`` that state a charge or spin, and what a model without either accepts."""


class MLIPCalculator(Calculator):
    """A potential as ASE calculator: energy, free_energy, energies, forces, stress.

    Works with any ``Atoms`` (no structure is needed to make one), can be pickled and deep-copied,
    and never changes the ``Atoms`` it is given. Stress is there for cells of rank 3 only.

    Args:
        potential_or_path: a ``Potential``, or what ``mlip_md.load`` opens (name of a bundled
            model, path of a model file, of an InstaDeep zip or of a run folder).
        dtype: "float32" or "float64": the working precision of this object; JAX's global setting
            is not touched.
        device: a JAX device, or "cpu", "gpu", "cuda:1"; None is JAX's default.
        skin: Å, see ``mlip_md.neighbors.NeighborSpec``; results never depend on it.
        default_dtype: other calculators' name of ``dtype``.

    Attributes:
        potential: the ``Potential``.
        allowed_atomic_numbers: set of the atomic numbers it knows.

    Raises:
        ConfigError: if dtype and default_dtype disagree, or a keyword's value is not allowed.
        ModelFileError: if the model cannot be opened.
    """

    name = "mlip-md"
    implemented_properties = [  # noqa: RUF012 (ASE declares a list)
        "energy",
        "free_energy",
        "energies",
        "forces",
        "stress",
    ]
    ignored_changes = {"initial_charges", "initial_magmoms"}  # noqa: RUF012 (ASE declares a set)

    def __init__(
        self,
        potential_or_path: Potential | str | os.PathLike[str] = DEFAULT_MODEL,
        *,
        dtype: str = "float32",
        device: Any = None,
        skin: float = 0.0,
        default_dtype: str | None = None,
    ) -> None:
        super().__init__()
        if default_dtype not in (None, dtype) and dtype != "float32":
            raise ConfigError(
                f"dtype = {dtype!r} and default_dtype = {default_dtype!r} contradict each other; "
                "give one of them"
            )
        if isinstance(potential_or_path, Potential):
            self.potential = potential_or_path
        else:
            self.potential = mlip_md.load(os.fspath(potential_or_path))
        self._options = {"dtype": default_dtype or dtype, "device": device, "skin": skin}
        self.allowed_atomic_numbers = set(self.potential.elements)
        self._engine: Engine | None = None
        self._info: dict[str, Any] = {}
        # Checks the options now rather than at the first energy.
        self._engine = Engine(self.potential, **self._options)

    @property
    def engine(self) -> Engine:
        """The compiled potential behind this calculator."""
        if self._engine is None:
            self._engine = Engine(self.potential, **self._options)
        return self._engine

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Fill ``results`` for ``atoms``; all properties come from one evaluation.

        Raises:
            StructureError: on non-finite positions, atoms on top of each other, periodicity
                without a cell, no atoms, or a charge or spin in ``atoms.info``.
            UnsupportedElementError: on an element that the potential does not know.
            NonFiniteError: if the potential gave NaN or infinity.
        """
        if atoms is None:
            raise StructureError("no atoms to calculate; attach the calculator: atoms.calc = ...")
        # A stress without cell is asked for again and again; nothing has to be computed for it.
        if not system_changes and "energy" in self.results:
            return
        check_neutral_singlet(atoms)
        self.results = {}
        result = self.engine.evaluate(*_inputs(atoms))
        self.atoms = atoms.copy()
        self._info = _charge_info(atoms)
        self.results = _properties(result)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation; a charge or spin in ``info`` counts too."""
        changes = super().check_state(atoms, tol=tol)
        if self.atoms is not None and self._info != _charge_info(atoms):
            changes.append("info")
        return changes

    def evaluate(self, structures: Sequence[Atoms]) -> list[dict[str, Any]]:
        """Properties of several structures, computed in batches.

        Args:
            structures: any number of ``Atoms``; sizes, elements and periodicity may differ.

        Returns:
            For each structure a new dict as in ``results``; ``stress`` only with a rank-3 cell.

        Raises:
            StructureError, UnsupportedElementError, NonFiniteError: as ``calculate``.
        """
        for atoms in structures:
            check_neutral_singlet(atoms)
        results = self.engine.evaluate_batch([_inputs(atoms) for atoms in structures])
        return [_properties(result) for result in results]

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        """What makes this calculator reproducible: model, its content hash, precision."""
        device = self._options["device"]
        return {
            "model": str(self.potential.info.get("name", self.potential.config.architecture)),
            "sha256": self.potential.sha256,
            "dtype": self._options["dtype"],
            "skin": self._options["skin"],
            "device": None if device is None else str(device),
            "version": mlip_md.__version__,
        }

    def __getstate__(self) -> dict[str, Any]:
        device = self._options["device"]
        if device is not None and not isinstance(device, str):
            device = f"{device.platform}:{device.id}"
        return self.__dict__ | {
            "_engine": None,
            "_options": self._options | {"device": device},
            # A fresh copy leaves the network and other derived objects behind.
            "potential": dataclasses.replace(self.potential),
        }

    def __deepcopy__(self, memo: dict[int, Any]) -> MLIPCalculator:
        copied = MLIPCalculator(self.potential, **self._options)
        copied.atoms = None if self.atoms is None else self.atoms.copy()
        copied.results = {k: np.copy(v) if np.ndim(v) else v for k, v in self.results.items()}
        copied._info = dict(self._info)
        memo[id(self)] = copied
        return copied


def _inputs(atoms: Atoms) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Positions, atomic numbers, cell, pbc as ``Engine.evaluate`` takes them."""
    return atoms.get_positions(), atoms.get_atomic_numbers(), atoms.cell.array, atoms.get_pbc()


def _properties(result: Result) -> dict[str, Any]:
    """ASE's results dict, owning its arrays."""
    properties = {
        "energy": float(result.energy),
        "free_energy": float(result.energy),
        "energies": np.array(result.energies, np.float64),
        "forces": np.array(result.forces, np.float64),
    }
    if result.stress is not None:
        properties["stress"] = full_3x3_to_voigt_6_stress(np.array(result.stress, np.float64))
    return properties


def _charge_info(atoms: Atoms) -> dict[str, float]:
    """Charge and spin entries of ``atoms.info`` as plain numbers."""
    values: dict[str, float] = {}
    for key in _NEUTRAL_SINGLET:
        if atoms.info.get(key) is not None:
            number = np.asarray(atoms.info[key])
            if number.size != 1 or number.dtype.kind not in "iufb":
                raise StructureError(f"atoms.info[{key!r}] = {atoms.info[key]!r} is no number")
            values[key] = float(number.reshape(()))
    return values


def check_neutral_singlet(atoms: Atoms) -> None:
    """Refuse a charge or spin stated in ``atoms.info``: the models know neither.

    Raises:
        StructureError: if one is stated that is not that of a neutral singlet.
    """
    for key, value in _charge_info(atoms).items():
        if value not in _NEUTRAL_SINGLET[key]:
            raise StructureError(
                f"atoms.info[{key!r}] = {value:g}, but this model has no input for charge or spin "
                f"and would ignore it; remove the entry to compute with what it learnt"
            )
