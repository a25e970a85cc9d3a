"""OpenMM-ML potential: ``MLPotential("mlip-md", modelPath=..., head=...)``.

Keywords, periodicity and embedding; the force itself is ``openmm_force.MLForce``. ``minimize``
relaxes a Simulation in bounded steps; use it instead of ``minimizeEnergy``.
"""

from __future__ import annotations

import copy
import logging
import numbers
import operator
import os
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import openmm
import openmm.app
from openmm import unit
from openmmml.embeddings.mechanicalembedding import MechanicalEmbedding
from openmmml.mlpotential import MLPotentialImpl

from mlip_md.constants import ANGSTROM_PER_NM
from mlip_md.devices import device_name, find_device
from mlip_md.errors import ConfigError, StructureError
from mlip_md.formats import own
from mlip_md.hints import hint
from mlip_md.integrations.charges import check_stated, stated_in_topology
from mlip_md.integrations.models import DEFAULT_MODEL, DTYPE_OF_PRECISION, lasting_name
from mlip_md.integrations.openmm_force import MLForce, share_potential
from mlip_md.integrations.openmm_minimize import minimize as minimize
from mlip_md.integrations.statements import lacks_hydrogens

logger = logging.getLogger(__name__)

_IGNORED = ("mlLongRange", "linkAtomDistances")
"""Keywords that OpenMM-ML's embeddings read and hand on to every potential."""

_OF_OPENMM_ML = (
    "removeCMMotion", "removeConstraints", "forceGroup", "interpolate", "embedding", "returnInfo",
)  # fmt: skip
"""Keywords that OpenMM-ML keeps to itself; they arrive here only if misspelt."""


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
        capacityFactor: room for neighbors at the start, as a factor on those there are; it grows
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
    capacityFactor: float | None = None  # noqa: N815 (as its neighbors)
    moleculeBonds: bool = False  # noqa: N815 (as its neighbors)
    embedModel: bool = False  # noqa: N815 (as its neighbors)
    periodic: bool | None = None

    def engine(self) -> dict[str, Any]:
        """Keywords of ``Engine``, as plain values."""
        device = self.device
        if device is not None and not isinstance(device, str):
            device = device_name(find_device(device))
        options = {"dtype": DTYPE_OF_PRECISION[self.precision or "single"], "device": device}
        if self.skin is not None:
            options["skin"] = _plain("skin", self.skin, unit.nanometer) * ANGSTROM_PER_NM
        if self.capacityFactor is not None:
            options["capacity_margin"] = _plain("capacityFactor", self.capacityFactor, None)
        return options


def _plain(name: str, value: Any, in_unit: unit.Unit | None) -> float:
    """A number, given as such or as a Quantity.

    Raises:
        ConfigError: on anything else, naming the keyword.
    """
    number = value
    if unit.is_quantity(value):
        compatible = in_unit is not None and value.unit.is_compatible(in_unit)
        number = value.value_in_unit(in_unit) if compatible else None
    if isinstance(number, numbers.Real) and not isinstance(number, bool):
        return float(number)
    kind = "a number" if in_unit is None else f"a number of {in_unit.get_name()}s or a Quantity"
    raise ConfigError(f"{name} = {value!r} is not allowed; it must be {kind}")


def force_options(keywords: dict[str, Any], where: str = "createSystem") -> ForceOptions:
    """Check the keywords of ``createSystem`` or ``createMixedSystem``.

    Raises:
        TypeError: on an unknown keyword, naming the nearest one.
        ConfigError: on a value that is not allowed, or a charge or spin that no model supports.
    """
    _refuse_unknown(keywords, (*ForceOptions._fields, *_IGNORED), where, _OF_OPENMM_ML)
    given: dict[str, Any] = {
        name: bool(value) if isinstance(value, np.bool_) else value
        for name, value in keywords.items()
        if name not in _IGNORED
    }
    options = ForceOptions(**given)
    for name, allowed in (
        ("precision", (None, "single", "double")),
        ("returnEnergyType", ("interaction_energy", "energy")),
        ("moleculeBonds", (False, True)),
        ("embedModel", (False, True)),
        ("periodic", (None, False, True)),
    ):
        value = getattr(options, name)
        if not any(value is one or (value == one and isinstance(one, str)) for one in allowed):
            raise ConfigError(
                f"{name} = {value!r} is not allowed; it must be one of "
                + ", ".join(map(repr, allowed))
            )
    charge = _plain("charge", options.charge, unit.elementary_charge)
    if charge != 0 or _plain("multiplicity", options.multiplicity, None) != 1:
        raise ConfigError(
            f"charge = {options.charge}, multiplicity = {options.multiplicity}: this model has no "
            "input for charge or spin; only charge = 0, multiplicity = 1 can be computed"
        )
    return options


def _refuse_unknown(
    keywords: Iterable[str], known: Sequence[str], where: str, others: Sequence[str] = ()
) -> None:
    for name in keywords:
        if name not in known:
            told = hint(name, known, {other: other for other in others})
            if name in ForceOptions._fields:
                told = "it is one of createSystem and createMixedSystem"
            raise TypeError(f"mlip-md: {where} has no keyword {name!r}; {told}")


class MLIPPotentialImpl(MLPotentialImpl):
    """What ``MLPotential("mlip-md", modelPath=...)`` makes.

    Args:
        name: the name under which OpenMM-ML knows it.
        modelPath: what ``mlip_md.load`` opens: path of a model file, of an InstaDeep zip, of a run
            folder, or name of a bundled model. None is the bundled default.
        head: which head of a mace-torch model that has several.

    Raises:
        TypeError: on another keyword.
        HeadError: if the model has no such head, or several and none is named.
        ModelFileError: if there is no such model or it is unusable.
    """

    def __init__(
        self,
        name: str,
        modelPath: str | os.PathLike[str] | None = None,
        head: str | None = None,
        **args: Any,
    ) -> None:
        _refuse_unknown(args, ("modelPath", "head"), f"MLPotential({name!r})")
        self.name, self.head = name, head
        self.model_path = lasting_name(DEFAULT_MODEL if modelPath is None else modelPath)
        self.potential = share_potential(self.model_path, head=head)

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
            StructureError: on atoms without element, listed twice or not there, on residues
                without hydrogens, and on formal charges of a topology that is no macromolecule.
        """
        options = force_options(args)
        particles = None if atoms is None else _indices(atoms)
        atomic_numbers = _atomic_numbers(topology, particles)
        self.potential.species(atomic_numbers)
        if particles is None:
            names = (residue.name for residue in topology.residues())
            if problem := lacks_hydrogens(atomic_numbers, names):
                raise StructureError(problem)
        for text in _check_charge(topology, particles):
            logger.warning("%s", text)
        periodic = _is_periodic(topology, system, particles, options.periodic)
        function = MLForce(
            self.model_path,
            self.potential.sha256,
            atomic_numbers,
            particles,
            periodic,
            options.returnEnergyType == "energy",
            options.engine(),
            own.to_bytes(self.potential) if options.embedModel else None,
            self.head,
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
            bonds = _molecule_bonds(topology, particles, periodic)
            bonds.setForceGroup(forceGroup)
            system.addForce(bonds)

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
        embedding: str,  # noqa: ARG002 (OpenMM-ML's signature)
        returnInfo: bool = False,
        **args: Any,
    ) -> openmm.System | dict[str, Any]:
        """OpenMM-ML's mechanical embedding, with periodicity taken from the whole System.

        With ``interpolate=True`` the embedding calls ``addForces`` with an empty System, which says
        nothing of the real one's periodicity; here the real one is still at hand.

        Raises:
            The errors of ``addForces``, before anything is built.
        """
        options = force_options(args, "createMixedSystem")
        particles = _indices(atoms)
        self.potential.species(_atomic_numbers(topology, particles))
        _check_charge(topology, particles)
        if charge := _charge_in_system(topology, system, particles):
            logger.warning(
                "the System gives the ML atoms a total charge of %+d; this model has no input for "
                "charges and computes them as the neutral groups that it learnt",
                charge,
            )
        args["periodic"] = _is_periodic(topology, system, particles, options.periodic)
        complete, sites = _without_bare_sites(topology)
        made = MechanicalEmbedding().createMixedSystem(
            self, complete, system, particles, forceGroup, interpolate, returnInfo, **args
        )
        if returnInfo:
            for atom in made["topology"].atoms():
                atom.element = None if atom.index in sites else atom.element
        return made


def _indices(atoms: Iterable[int]) -> list[int]:
    """Indices of atoms as plain ints.

    Raises:
        StructureError: on anything that is no whole number.
    """
    try:
        return [operator.index(atom) for atom in atoms]
    except TypeError as error:
        raise StructureError(f"atoms must be a list of indices of atoms: {error}") from error


def _without_bare_sites(topology: openmm.app.Topology) -> tuple[openmm.app.Topology, set[int]]:
    """A topology in which every atom has an element, and the indices of those that have none.

    OpenMM-ML asks all atoms for their atomic numbers to make link atoms, which the extra sites of
    four-site water models do not have; it never uses that of a site.
    """
    sites = {atom.index for atom in topology.atoms() if atom.element is None}
    if sites:
        topology = copy.deepcopy(topology)
        for atom in topology.atoms():
            atom.element = atom.element or openmm.app.element.hydrogen
    return topology, sites


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


def _check_charge(topology: openmm.app.Topology, particles: list[int] | None) -> list[str]:
    """Refuse formal charges of the modelled atoms, or in a macromolecule return warnings."""
    atoms = list(topology.atoms())
    modelled = atoms if particles is None else [atoms[i] for i in particles]
    residues = {atom.residue.index: atom.residue.name for atom in modelled}
    return check_stated(stated_in_topology(topology, particles), residues.values())


def _charge_in_system(
    topology: openmm.app.Topology, system: openmm.System, particles: list[int]
) -> int:
    """Total charge that a force field gives whole molecules; 0 for parts, which have none."""
    modelled = set(particles)
    if any(len(modelled & {atom.index for atom in bond}) == 1 for bond in topology.bonds()):
        return 0
    total = 0.0
    for force in system.getForces():
        if isinstance(force, openmm.NonbondedForce):
            there = [i for i in particles if i < force.getNumParticles()]
            total += sum(force.getParticleParameters(i)[0]._value for i in there)
    return round(total)


def _is_periodic(
    topology: openmm.app.Topology,
    system: openmm.System,
    particles: list[int] | None,
    wanted: bool | None,
) -> bool:
    """Periodicity from the keyword, the topology and the System.

    Contradictions are refused where the ML atoms would come in wrong places, else told.
    """
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
    if wanted is None and boxed and not surroundings and system.getNumForces() and particles:
        # OpenMM-ML's other potentials run here, periodic without a word.
        warnings.warn(
            "mlip-md: the topology has a box, but the System is not periodic: the ML atoms alone "
            "see their periodic images; say periodic=True if that is meant, else periodic=False",
            stacklevel=4,
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
