"""OpenMM-ML potential: ``MLPotential("mlip-md", modelPath=...)``.

OpenMM's units (nm, kJ/mol, kJ/mol/nm) exist in this file only. The force runs through
``openmm.PythonForce``, which calls ``MLForce`` with the positions of every step.
"""

from __future__ import annotations

import collections
import difflib
import os
import threading
import traceback
import warnings
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openmm
import openmm.app
from openmmml.mlpotential import MLPotentialImpl

import mlip_md
from mlip_md.engine import Engine
from mlip_md.errors import ConfigError, MLIPError, ModelFileError, NonFiniteError, StructureError
from mlip_md.integrations.models import DEFAULT_MODEL, lasting_name
from mlip_md.potential import Potential

KJ_PER_MOL_PER_EV = 1.602176634e-19 * 6.02214076e23 / 1000.0
"""1 eV in kJ/mol; exact since the SI of 2019 (e and N_A are defined numbers)."""

ANGSTROM_PER_NM = 10.0

PRECISIONS = {None: "float32", "single": "float32", "double": "float64"}
ENERGY_TYPES = ("interaction_energy", "energy")

_IGNORED = ("mlLongRange", "linkAtomDistances")
"""Keywords that OpenMM-ML's embeddings read and hand on to every potential."""


class ForceOptions(NamedTuple):
    """Keywords of ``createSystem`` and ``createMixedSystem``.

    Attributes:
        precision: "single" (also None) or "double".
        returnEnergyType: "interaction_energy" leaves out the energies of the isolated atoms, a
            constant that costs digits in single-precision platforms; "energy" is the total.
        device: JAX device, "cpu", "gpu", "cuda:1"; None is JAX's default.
        charge: total charge, 0 for the models of today.
        multiplicity: spin multiplicity, 1 for the models of today.
        periodic: None takes it from the topology and the System.
    """

    precision: str | None = None
    returnEnergyType: str = "interaction_energy"  # noqa: N815 (OpenMM-ML's name)
    device: Any = None
    charge: float = 0
    multiplicity: int = 1
    periodic: bool | None = None


def force_options(keywords: dict[str, Any]) -> ForceOptions:
    """Check the keywords of ``createSystem``.

    Raises:
        TypeError: on an unknown keyword, naming the nearest one.
        ConfigError: on a value that is not allowed, or a charge or spin that no model supports.
    """
    _refuse_unknown(keywords, (*ForceOptions._fields, *_IGNORED), "createSystem")
    options = ForceOptions(**{k: v for k, v in keywords.items() if k not in _IGNORED})
    if options.precision not in PRECISIONS:
        raise ConfigError(
            f"precision = {options.precision!r} is not allowed; it must be 'single' or 'double'"
        )
    if options.returnEnergyType not in ENERGY_TYPES:
        raise ConfigError(
            f"returnEnergyType = {options.returnEnergyType!r} is not allowed; it must be "
            "'interaction_energy' or 'energy'"
        )
    if options.charge != 0 or options.multiplicity != 1:
        raise ConfigError(
            f"charge = {options.charge}, multiplicity = {options.multiplicity}: this model has no "
            "input for charge or spin; only charge = 0, multiplicity = 1 can be computed"
        )
    if options.periodic not in (None, True, False):
        raise ConfigError(f"periodic = {options.periodic!r} is not allowed; None, True or False")
    return options


def _refuse_unknown(keywords: Iterable[str], known: Sequence[str], where: str) -> None:
    for name in keywords:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise TypeError(f"mlip-md: {where} has no keyword {name!r}; {hint}")


class MLIPPotentialImpl(MLPotentialImpl):
    """What ``MLPotential("mlip-md", modelPath=...)`` makes.

    Args:
        name: the name under which OpenMM-ML knows it.
        modelPath: what ``mlip_md.load`` opens: path of a model file, of an InstaDeep zip, of a run
            folder, or name of a bundled model. None is the bundled default.

    Raises:
        TypeError: on another keyword.
    """

    def __init__(
        self, name: str, modelPath: str | os.PathLike[str] | None = None, **args: Any
    ) -> None:
        _refuse_unknown(args, ("modelPath",), f"MLPotential({name!r})")
        self.name = name
        self.model_path = lasting_name(DEFAULT_MODEL if modelPath is None else modelPath)

    def addForces(  # noqa: N802 (OpenMM-ML's name)
        self,
        topology: openmm.app.Topology,
        system: openmm.System,
        atoms: Iterable[int] | None,
        forceGroup: int,
        **args: Any,
    ) -> None:
        """Add the force of this potential to a System.

        Args:
            topology: gives the elements and, if any, the box.
            system: gets the force.
            atoms: indices of the atoms to model; None is all.
            forceGroup: group of the force.
            **args: see ``ForceOptions``; ``mlLongRange`` and ``linkAtomDistances`` are left to the
                embedding.

        Raises:
            TypeError: on an unknown keyword.
            ConfigError: on a value that is not allowed.
            UnsupportedElementError: on an element that the potential does not know.
            StructureError: on atoms without element or listed twice.
        """
        options = force_options(args)
        particles = None if atoms is None else [int(i) for i in atoms]
        numbers = _atomic_numbers(topology, particles)
        periodic = _is_periodic(topology, system, particles, options.periodic)
        potential = _open(self.model_path)
        potential.species(numbers)
        force = openmm.PythonForce(MLForce(potential, self.model_path, numbers, periodic, options))
        force.setName("mlip-md")
        force.setForceGroup(forceGroup)
        force.setUsesPeriodicBoundaryConditions(periodic)
        if particles is not None:
            force.setParticles(particles)
        system.addForce(force)

    def getMLLongRange(self) -> bool:  # noqa: N802 (OpenMM-ML's name)
        """The networks end at their cutoff: no long-range part."""
        return False


def _atomic_numbers(topology: openmm.app.Topology, particles: list[int] | None) -> np.ndarray:
    everything = list(topology.atoms())
    if particles is None:
        particles = list(range(len(everything)))
    if len(set(particles)) != len(particles):
        raise StructureError("an atom is listed twice among the atoms of the ML potential")
    if not particles:
        raise StructureError("no atoms to model with the ML potential")
    without = [i for i in particles if everything[i].element is None]
    if without:
        raise StructureError(
            f"{len(without)} atoms have no element (first: index {without[0]}, name "
            f"{everything[without[0]].name!r}); the ML potential needs the element of every atom"
        )
    return np.array([everything[i].element.atomic_number for i in particles], np.int32)


def _is_periodic(
    topology: openmm.app.Topology,
    system: openmm.System,
    particles: list[int] | None,
    wanted: bool | None,
) -> bool:
    """Periodicity from the keyword, the topology and the System; contradictions are refused."""
    boxed = topology.getPeriodicBoxVectors() is not None
    surroundings = system.usesPeriodicBoundaryConditions()
    if wanted is False and surroundings and particles is not None:
        raise ConfigError(
            "periodic=False, but the System is periodic: OpenMM would hand the ML atoms over in "
            "scattered periodic images; leave the keyword out"
        )
    if wanted is True and not boxed and particles is None and not surroundings:
        raise ConfigError(
            "periodic=True, but the topology has no box; set it with "
            "topology.setPeriodicBoxVectors(...)"
        )
    if wanted is None and not boxed and particles is not None and not system.getNumParticles():
        # With interpolate=True OpenMM-ML shows an empty System, which hides its periodicity.
        warnings.warn(
            "the topology has no box and interpolate=True hides the System: the ML force is made "
            "non-periodic; state periodic=True or periodic=False to say what is meant",
            stacklevel=2,
        )
    return bool(boxed or surroundings) if wanted is None else wanted


_potentials: weakref.WeakValueDictionary[str, Potential] = weakref.WeakValueDictionary()
_registry_lock = threading.Lock()


def _open(model: str, sha256: str | None = None) -> Potential:
    """Open a potential, or find it among those in use; with a hash, only that very one."""
    with _registry_lock:
        if sha256 is not None and sha256 in _potentials:
            return _potentials[sha256]
        potential = mlip_md.load(model)
        if sha256 is not None and potential.sha256 != sha256:
            raise ModelFileError(
                f"{model} holds another model (sha256 {potential.sha256[:12]}…) than this System "
                f"was made with ({sha256[:12]}…); put the original file back or make the System "
                "anew"
            )
        return _potentials.setdefault(potential.sha256, potential)


class MLForce:
    """The callable behind a ``PythonForce``: a State in, energy and forces in OpenMM's units out.

    Pickles as a token (model path, content hash, options), not as weights: OpenMM pickles it when
    the force is made and copies the bytes into every XML file.

    Args:
        potential: the potential.
        model_path: where to find it again.
        atomic_numbers: (n,) of the particles of this force.
        periodic: whether the State carries a box.
        options: precision, energy type, device.
    """

    def __init__(
        self,
        potential: Potential,
        model_path: str,
        atomic_numbers: np.ndarray,
        periodic: bool,
        options: ForceOptions,
    ) -> None:
        self.potential = potential
        self.model_path = model_path
        self.atomic_numbers = atomic_numbers
        self.periodic = periodic
        self.options = options
        # Engines of the same potential share weights and compiled functions.
        self._engine = Engine(potential, dtype=PRECISIONS[options.precision], device=options.device)
        # OpenMM lets several Contexts, and so threads, call one force.
        self._lock = threading.Lock()
        # Barostats and getState ask for the two latest geometries again.
        self._memo: collections.deque[tuple[bytes, float, np.ndarray]] = collections.deque(maxlen=2)

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        """Energy (kJ/mol) and forces (n, 3) (kJ/mol/nm) of a State.

        Raises:
            RuntimeError: with the whole story in its text, because OpenMM passes on nothing else.
        """
        try:
            return self._evaluate(state)
        except KeyboardInterrupt:
            message = "interrupted (Ctrl-C) inside the ML potential; the last step is incomplete"
        except BaseException as error:
            message = _story(error, state)
        # Raised outside the handler and without the State: OpenMM never frees what the exception
        # holds on to.
        del state
        raise RuntimeError(message)

    def _evaluate(self, state: openmm.State) -> tuple[float, np.ndarray]:
        positions = np.asarray(state.getPositions(asNumpy=True)._value)
        box = np.zeros((3, 3))
        if self.periodic:
            box = np.asarray(state.getPeriodicBoxVectors(asNumpy=True)._value)
        key = positions.tobytes() + box.tobytes()
        with self._lock:
            for known, energy, forces in self._memo:
                if known == key:
                    return energy, forces
            energy, forces = self._compute(positions, box)
            self._memo.append((key, energy, forces))
            return energy, forces

    def _compute(self, positions: np.ndarray, box: np.ndarray) -> tuple[float, np.ndarray]:
        """Energy in kJ/mol and forces in kJ/mol/nm at positions and box in nm."""
        if not np.isfinite(positions).all():
            first = int(np.flatnonzero(~np.isfinite(positions).all(axis=1))[0])
            raise NonFiniteError(f"the position of atom {first} of the ML potential is not finite")
        result = self._engine.evaluate(
            positions * ANGSTROM_PER_NM,
            self.atomic_numbers,
            box * ANGSTROM_PER_NM,
            np.full(3, self.periodic),
        )
        total = self.options.returnEnergyType == "energy"
        energy = (result.energy if total else result.interaction_energy) * KJ_PER_MOL_PER_EV
        forces = np.asarray(result.forces) * (KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM)
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            # GPU platforms turn NaN forces into huge numbers and go on.
            raise NonFiniteError("the ML potential gave energies or forces that are not finite")
        return float(energy), np.ascontiguousarray(forces, np.float64)

    def __reduce__(self) -> tuple[Any, ...]:
        device = self.options.device
        options = self.options._replace(device=None if device is None else str(device))
        numbers = self.atomic_numbers.astype(np.int32).tolist()
        token = (self.model_path, self.potential.sha256, numbers, self.periodic, options._asdict())
        return _restore, token


def _restore(
    model_path: str, sha256: str, numbers: list[int], periodic: bool, options: dict[str, Any]
) -> MLForce:
    potential = _open(model_path, sha256)
    return MLForce(
        potential, model_path, np.array(numbers, np.int32), periodic, ForceOptions(**options)
    )


def _story(error: BaseException, state: openmm.State) -> str:
    """Type, message, place, step and a hint, as one text."""
    lines = [f"mlip-md at step {state.getStepCount()}: {type(error).__name__}: {error}"]
    if isinstance(error, (NonFiniteError, StructureError)):
        lines.append(
            "The simulation has probably become unstable: minimize first, use a smaller time "
            "step, or look at the structure of the last saved frame."
        )
    if not isinstance(error, MLIPError):
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        lines += [f"  {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames]
    return "\n".join(lines)
