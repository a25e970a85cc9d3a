"""ASE calculator.

Units and signs are ASE's: eV, Å, eV/Å, stress in eV/Å³ in Voigt order (xx, yy, zz, yz, xz, xy),
positive under tension.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress

import mlip_md
from mlip_md.devices import device_name
from mlip_md.engine import Engine, Result
from mlip_md.errors import ConfigError, StructureError
from mlip_md.integrations.models import DEFAULT_MODEL
from mlip_md.integrations.statements import Watch
from mlip_md.potential import Potential


class MLIPCalculator(Calculator):
    """A potential as ASE calculator: energy, free_energy, energies, forces, stress.

    Works with any ``Atoms`` (no structure is needed to make one), can be pickled and copied, may be
    shared by threads (they take turns), and never changes the ``Atoms`` it is given. Stress is
    there for cells of rank 3 only. A total charge or spin in ``atoms.info`` is refused unless it
    is that of a neutral singlet; so is disorder that ASE's readers hand on; per-atom
    ``initial_charges`` and ``initial_magmoms``, which ASE's tools set freely, are ignored.

    Args:
        potential_or_path: a ``Potential``, or what ``mlip_md.load`` opens (name of a bundled
            model, path of a model file, of an InstaDeep zip or of a run folder).
        head: which head of a mace-torch model that has several.
        dtype: "float32" (what None means) or "float64": the working precision of this object;
            JAX's global setting is not touched.
        device: a JAX device, or "cpu", "gpu", "cuda:1"; None is JAX's default of now.
        skin: Å, see ``mlip_md.neighbors.NeighborSpec``; results never depend on it. None lets the
            engine choose.
        backend: of the neighbor search: "auto", "vesin" (host), "dense", "cells" or "nvalchemi"
            (device).
        capacity_margin: at least 1, factor on the first number of edges; None is the engine's
            default.
        default_dtype: other calculators' name of ``dtype``.

    Attributes:
        potential: the ``Potential``.
        allowed_atomic_numbers: set of the atomic numbers it knows.

    Raises:
        ConfigError: if dtype and default_dtype disagree, or a keyword's value is not allowed.
        HeadError: if the model has no such head, or several and none is named.
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
        head: str | None = None,
        dtype: str | None = None,
        device: Any = None,
        skin: float | None = None,
        backend: str = "auto",
        capacity_margin: float | None = None,
        default_dtype: str | None = None,
    ) -> None:
        super().__init__()
        if dtype is None:
            dtype = "float32" if default_dtype is None else default_dtype
        elif default_dtype not in (None, dtype):
            raise ConfigError(
                f"dtype = {dtype!r} and default_dtype = {default_dtype!r} contradict each other; "
                "give one of them"
            )
        given = potential_or_path
        if isinstance(given, Potential):
            if head is not None:
                raise ConfigError(f"a Potential has its head; leave head = {head!r} out")
            self.potential = given
        else:
            self.potential = mlip_md.load(given, head)
        self.allowed_atomic_numbers = set(self.potential.elements)
        self._lock = threading.RLock()
        self._watch = Watch()
        self._options = {"dtype": dtype, "device": device, "skin": skin, "backend": backend}
        if capacity_margin is not None:
            self._options["capacity_margin"] = capacity_margin
        # Checks the options now rather than at the first energy.
        self._engine: Engine | None = Engine(self.potential, **self._options)
        # Copies compute where this one does, whatever JAX's default is by then.
        self._options["device"] = device_name(self._engine.device)

    @property
    def engine(self) -> Engine:
        """The compiled potential behind this calculator."""
        if self._engine is None:
            self._engine = Engine(self.potential, **self._options)
        return self._engine

    def set(self, **kwargs: Any) -> dict[str, Any]:
        """Refuse to change a parameter: a calculator has none that can be changed.

        Raises:
            ConfigError: if there is any keyword.
        """
        if kwargs:
            raise ConfigError(
                f"{', '.join(kwargs)} cannot be set in a calculator that exists; make a new one: "
                "MLIPCalculator(potential, dtype=..., device=...)"
            )
        return {}

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """A property of ``atoms``, calculated if need be; arrays are copies.

        Raises:
            PropertyNotImplementedError: on a stress without a cell of rank 3, or a property that
                is not in ``implemented_properties``.
            StructureError, UnsupportedElementError, NonFiniteError: as ``calculate``.
        """
        with self._lock:
            given = self.atoms if atoms is None else atoms
            # Asked for again and again by whoever logs; nothing has to be computed to refuse it.
            if name == "stress" and allow_calculation and given is not None and given.cell.rank < 3:
                raise PropertyNotImplementedError("there is no stress without a cell of rank 3")
            return super().get_property(name, atoms, allow_calculation)

    def calculate_properties(self, atoms: Atoms, properties: Sequence[str]) -> Any:
        """Several properties of ``atoms`` in one of ASE's ``Properties``; arrays are read-only."""
        with self._lock:
            return super().calculate_properties(atoms, properties)

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),  # noqa: ARG002 (ASE's signature)
        system_changes: Sequence[str] = all_changes,  # noqa: ARG002
    ) -> None:
        """Fill ``results`` for ``atoms``; all properties come from one evaluation.

        The arrays in ``results`` are read-only, because later questions are answered from them.

        Raises:
            StructureError: on non-finite positions, atoms on top of each other, periodicity
                without a cell, no atoms, or what ``atoms`` state beside (charge, spin, disorder,
                alternatives, residues without hydrogens, names of other elements).
            UnsupportedElementError: on an element that the potential does not know.
            NonFiniteError: if the potential gave NaN or infinity.
        """
        if atoms is None:
            raise StructureError("no atoms to calculate; attach the calculator: atoms.calc = ...")
        with self._lock:
            self.results = {}
            if problem := self._watch.problem_of(atoms):
                raise StructureError(problem)
            result = self.engine.evaluate(*_inputs(atoms))
            self.atoms = atoms.copy()
            self.results = _read_only(_properties(result))

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation; what ``calculate`` refuses counts too."""
        changes = super().check_state(atoms, tol=tol)
        # There are results of neutral singlets only.
        if not changes and self._watch.problem_of(atoms):
            changes.append("info")
        return changes

    def evaluate(self, structures: Iterable[Atoms]) -> list[dict[str, Any]]:
        """Properties of several structures, computed in batches.

        Args:
            structures: any number of ``Atoms``; sizes, elements and periodicity may differ.

        Returns:
            For each structure a new dict as in ``results``; ``stress`` only with a rank-3 cell.

        Raises:
            StructureError, UnsupportedElementError, NonFiniteError: as ``calculate``; the message
                starts with the structure's index.
        """
        if isinstance(structures, Atoms):
            raise StructureError("evaluate takes many structures; give a list: evaluate([atoms])")
        inputs, watch = [], Watch()
        for index, atoms in enumerate(structures):
            if not isinstance(atoms, Atoms):
                raise StructureError(f"structure {index}: a {type(atoms).__name__} is no Atoms")
            if problem := watch.problem_of(atoms):
                raise StructureError(f"structure {index}: {problem}")
            inputs.append(_inputs(atoms))
        return [_properties(result) for result in self.engine.evaluate_batch(inputs)]

    def get_hessian(self, atoms: Atoms) -> np.ndarray:
        """Second derivatives of the energy, for vibrations, phonons and transition states.

        Args:
            atoms: the structure; its constraints are not looked at. Use ``dtype="float64"`` for
                modes of low frequency.

        Returns:
            (3n, 3n) eV/Å², symmetric; coordinates in the order x, y, z of atom 0, of atom 1, …

        Raises:
            StructureError, UnsupportedElementError, NonFiniteError: as ``calculate``.
        """
        if problem := Watch().problem_of(atoms):
            raise StructureError(problem)
        return self.engine.hessian(*_inputs(atoms))

    def todict(self, skip_default: bool = True) -> dict[str, Any]:  # noqa: ARG002 (ASE's)
        """What makes this calculator reproducible: model, its content hash, precision, device."""
        return {
            "model": str(self.potential.info.get("name", self.potential.config.architecture)),
            "sha256": self.potential.sha256,
            **self._options,
            "version": mlip_md.__version__,
        }

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:  # atoms and results of one calculation
            return {k: v for k, v in self.__dict__.items() if k not in _OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._engine, self._lock, self._watch = None, threading.RLock(), Watch()
        self.results = _read_only(dict(self.results))  # arrays lose it in copies

    def __deepcopy__(self, memo: dict[int, Any]) -> MLIPCalculator:
        copied = memo[id(self)] = type(self).__new__(type(self))
        memo[id(self.potential)] = self.potential  # copies share it: it never changes
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


_OWN = ("_engine", "_lock", "_watch")
"""Attributes that a copy of a calculator makes anew."""


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


def _read_only(results: dict[str, Any]) -> dict[str, Any]:
    """The same dict, its arrays locked."""
    for value in results.values():
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    return results
