"""Platforms, structures and readings that the OpenMM tests share."""

import numpy as np
import openmm
import openmm.app
import pytest
from ase import Atoms
from openmm import unit
from small_models import random_mace

from mlip_md.formats import own
from mlip_md.integrations.md.structures import Structure, make_topology, read_structure

# 1 eV in kJ/mol, from its definition and not from the package.
EV = 1.602176634e-19 * 6.02214076e23 * 1e-3

PLATFORMS = ("Reference", "CPU", "OpenCL", "CUDA")


def platform_or_skip(name):
    """The OpenMM platform of a name; skips the test where it cannot compute."""
    try:
        found = openmm.Platform.getPlatformByName(name)
        system = openmm.System()
        system.addParticle(1.0)
        openmm.Context(system, openmm.VerletIntegrator(0.001), found)
    except openmm.OpenMMException as error:
        pytest.skip(f"no OpenMM platform {name}: {error}")
    return found


def make_model(folder, **options):
    """Path of a model file with a small random potential."""
    path = folder / "model.safetensors"
    own.save(random_mace(**options), path)
    return str(path)


def molecule_atoms():
    """Eight atoms of paracetamol."""
    return read_structure().atoms[:8]


def crystal_atoms():
    """Eight atoms in a triclinic box of OpenMM's form, some of them many boxes away."""
    rng = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(*[[0.0, 0.5]] * 3), axis=-1).reshape(-1, 3)
    scaled = grid + rng.uniform(-0.06, 0.06, (8, 3)) + rng.integers(-4, 5, (8, 3))
    cell = np.array([[5.0, 0.0, 0.0], [1.2, 4.6, 0.0], [-0.8, 0.9, 5.5]])
    return Atoms("CHNOCHHO", scaled_positions=scaled, cell=cell, pbc=True)


def topology_of(atoms, bonds=None):
    """The topology of atoms, with bonds (n, 2) or those that distances imply."""
    return make_topology(Structure("test", atoms, bonds=bonds))


def context_of(system, atoms, platform=None, integrator=None):
    """A Context (Reference unless told) with the atoms' positions."""
    platform = platform or openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, integrator or openmm.VerletIntegrator(0.0005), platform)
    context.setPositions(atoms.positions / 10)
    return context


def energy_and_forces(context):
    """eV and eV/Å."""
    state = context.getState(energy=True, forces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    return energy / EV, np.array(forces) / (EV * 10)
