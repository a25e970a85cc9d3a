"""OpenMM-ML potential: ``MLPotential("mlip-md", modelPath=...)``.

Keywords, periodicity and embedding; the force itself is ``openmm_force.MLForce``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import openmm
import openmm.app
from openmm import unit
from openmmml.embeddings.mechanicalembedding import MechanicalEmbedding
from openmmml.mlpotential import MLPotentialImpl

from mlip_md.errors import ConfigError, StructureError
from mlip_md.integrations.models import DEFAULT_MODEL, DTYPES, lasting_name
from mlip_md.integrations.openmm_force import ANGSTROM_PER_NM, MLForce, open_potential, pack

_IGNORED = ("mlLongRange", "linkAtomDistances")
"""Keywords that OpenMM-ML's embeddings read and hand on to every potential."""


class ForceOptions(NamedTuple):
    """Keywords of ``createSystem`` and ``createMixedSystem``.

    Attributes:
        precision: "single" (also None) or "double".
        returnEnergyType: "interaction_energy" leaves out the energies of the isolated atoms, a
            constant that costs digits in single-precision platforms; "energy" is the total.
        device: JAX device, "cpu", "gpu", "cuda:1", or a ``jax.Device``; None is JAX's default.
            OpenMM's own device is chosen apart from it (platform property DeviceIndex).
        charge: total charge, 0 for the models of today.
        multiplicity: spin multiplicity, 1 for the models of today.
        skin: nm or a Quantity, see ``Engine``; None is its default. Results do not depend on it.
        capacityFactor: room for neighbours at the start, as a factor on those there are; it grows
            when needed. None is ``Engine``'s default.
        moleculeBonds: add the topology's bonds between ML atoms with strength zero, so that
            barostats move, and periodic output keeps, whole molecules instead of atoms.
        embedModel: keep the model itself in the System's XML instead of its path and hash.
        periodic: None is periodic where the topology has a box or the System is periodic.
    """

    precision: str | None = None
    returnEnergyType: str = "interaction_energy"  # noqa: N815 (OpenMM-ML's name)
    device: Any = None
    charge: float = 0
    multiplicity: int = 1
    skin: Any = None
    capacityFactor: float | None = None  # noqa: N815 (as its neighbours)
    moleculeBonds: bool = False  # noqa: N815 (as its neighbours)
    embedModel: bool = False  # noqa: N815 (as its neighbours)
    periodic: bool | None = None

    def engine(self) -> dict[str, Any]:
        """Keywords of ``Engine``, as plain values."""
        device, skin = self.device, self.skin
        if device is not None and not isinstance(device, str):
            device = f"{device.platform}:{device.id}"
        options = {"dtype": DTYPES[self.precision or "single"], "device": device}
        if skin is not None:
            nanometers = skin.value_in_unit(unit.nanometer) if unit.is_quantity(skin) else skin
            options["skin"] = nanometers * ANGSTROM_PER_NM
        if self.capacityFactor is not None:
            options["capacity_margin"] = self.capacityFactor
        return options


def force_options(keywords: dict[str, Any]) -> ForceOptions:
    """Check the keywords of ``createSystem``.

    Raises:
        TypeError: on an unknown keyword, naming the nearest one.
        ConfigError: on a value that is not allowed, or a charge or spin that no model supports.
    """
    _refuse_unknown(keywords, (*ForceOptions._fields, *_IGNORED), "createSystem")
    options = ForceOptions(**{k: v for k, v in keywords.items() if k not in _IGNORED})
    for name, allowed in (
        ("precision", (None, "single", "double")),
        ("returnEnergyType", ("interaction_energy", "energy")),
        ("moleculeBonds", (False, True)),
        ("embedModel", (False, True)),
        ("periodic", (None, False, True)),
    ):
        value = getattr(options, name)
        if value not in allowed:
            raise ConfigError(
                f"{name} = {value!r} is not allowed; it must be one of "
                + ", ".join(map(repr, allowed))
            )
    if options.charge != 0 or options.multiplicity != 1:
        raise ConfigError(
            f"charge = {options.charge}, multiplicity = {options.multiplicity}: this model has no "
            "input for charge or spin; only charge = 0, multiplicity = 1 can be computed"
        )
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
        ModelFileError: if there is no such model or it is unusable.
    """

    def __init__(
        self, name: str, modelPath: str | os.PathLike[str] | None = None, **args: Any
    ) -> None:
        _refuse_unknown(args, ("modelPath",), f"MLPotential({name!r})")
        self.name = name
        self.model_path = lasting_name(DEFAULT_MODEL if modelPath is None else modelPath)
        self.potential = open_potential(self.model_path)

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
            StructureError: on atoms without element, listed twice or not there.
        """
        options = force_options(args)
        particles = None if atoms is None else [int(i) for i in atoms]
        numbers = _atomic_numbers(topology, particles)
        self.potential.species(numbers)
        periodic = _is_periodic(topology, system, particles, options.periodic)
        function = MLForce(
            self.model_path,
            self.potential.sha256,
            numbers,
            particles,
            periodic,
            options.returnEnergyType == "energy",
            options.engine(),
            pack(self.potential) if options.embedModel else None,
        )
        _ = function.engine  # what it refuses is refused here, not at the first step
        force = openmm.PythonForce(function)
        force.setName("mlip-md")
        force.setForceGroup(forceGroup)
        force.setUsesPeriodicBoundaryConditions(periodic)
        if particles is not None:
            force.setParticles(particles)
        system.addForce(force)
        if options.moleculeBonds:
            system.addForce(_molecule_bonds(topology, particles, periodic))

    def getMLLongRange(self) -> bool:  # noqa: N802 (OpenMM-ML's name)
        """The networks end at their cutoff: no long-range part."""
        return False

    def getSupportedEmbeddings(self) -> list[str]:  # noqa: N802 (OpenMM-ML's name)
        """Mechanical embedding comes through ``createMixedSystem`` of this class."""
        return ["mechanical"]

    def createMixedSystem(  # noqa: N802 (OpenMM-ML's name)
        self,
        topology: openmm.app.Topology,
        system: openmm.System,
        atoms: list[int],
        forceGroup: int,
        interpolate: bool,
        embedding: str,
        returnInfo: bool = False,
        **args: Any,
    ) -> openmm.System | dict[str, Any]:
        """OpenMM-ML's mechanical embedding, with periodicity taken from the whole System.

        With ``interpolate=True`` the embedding calls ``addForces`` with an empty System, which says
        nothing of the real one's periodicity; here the real one is still at hand.

        Raises:
            The errors of ``addForces``, before anything is built.
        """
        options = force_options(args)
        particles = [int(i) for i in atoms]
        self.potential.species(_atomic_numbers(topology, particles))
        args["periodic"] = _is_periodic(topology, system, particles, options.periodic)
        return MechanicalEmbedding().createMixedSystem(
            self, topology, system, particles, forceGroup, interpolate, returnInfo, **args
        )


def _atomic_numbers(topology: openmm.app.Topology, particles: list[int] | None) -> np.ndarray:
    everything = list(topology.atoms())
    if particles is None:
        particles = list(range(len(everything)))
    if len(set(particles)) != len(particles):
        raise StructureError("an atom is listed twice among the atoms of the ML potential")
    if not particles:
        raise StructureError("no atoms to model with the ML potential")
    if min(particles) < 0 or max(particles) >= len(everything):
        raise StructureError(
            f"atoms from {min(particles)} to {max(particles)} are to be modelled, but the topology "
            f"has atoms 0 to {len(everything) - 1}"
        )
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
    if wanted is False and surroundings:
        raise ConfigError(
            "periodic=False, but the System is periodic: OpenMM would hand the ML atoms over in "
            "scattered periodic images; leave the keyword out"
        )
    if wanted is True and particles is None and not (boxed or surroundings):
        raise ConfigError(
            "periodic=True, but the topology has no box; set it with "
            "topology.setPeriodicBoxVectors(...)"
        )
    if wanted is None and particles is not None and not (boxed or system.getNumParticles()):
        raise ConfigError(
            "the topology has no box and the System is not shown to the potential (embeddings that "
            "interpolate do that): say periodic=True or periodic=False"
        )
    return boxed or surroundings if wanted is None else wanted


def _molecule_bonds(
    topology: openmm.app.Topology, particles: list[int] | None, periodic: bool
) -> openmm.Force:
    """Bonds without strength: they tell OpenMM which atoms belong to one molecule."""
    force = openmm.HarmonicBondForce()
    force.setName("mlip-md molecules")
    force.setUsesPeriodicBoundaryConditions(periodic)
    modelled = None if particles is None else set(particles)
    for bond in topology.bonds():
        pair = [atom.index for atom in bond]
        if modelled is None or modelled.issuperset(pair):
            force.addBond(*pair, 0.1, 0.0)
    return force
