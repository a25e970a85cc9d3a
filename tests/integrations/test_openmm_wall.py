"""Atoms that overlap: a wall for OpenMM, an error for everybody else."""

import numpy as np
import openmm
import pytest
from ase import Atoms
from openmm_cases import (
    context_of,
    crystal_atoms,
    energy_and_forces,
    make_model,
    molecule_atoms,
    topology_of,
)
from openmmml import MLPotential

from mlip_md.errors import StructureError
from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.openmm_wall import STEEPNESS

LIMIT = 0.05


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), strength=20.0)


def make_context(model, atoms):
    system = MLPotential("mlip-md", modelPath=model).createSystem(topology_of(atoms))
    return context_of(system, atoms)


def put(context, atoms, j, i, vector, image=(0, 0, 0)):
    """Energy and forces with atom j at a vector (Å) from atom i, in another image."""
    moved = atoms.copy()
    moved.positions[j] = atoms.positions[i] + vector + image @ atoms.cell.array
    context.setPositions(moved.positions / 10)
    return energy_and_forces(context)


@pytest.mark.parametrize(
    ("atoms", "image"), [(molecule_atoms(), (0, 0, 0)), (crystal_atoms(), (2, -1, 1))]
)
def test_energy_and_forces_rise_as_atoms_come_closer(model, atoms, image):
    context = make_context(model, atoms)
    along = np.array([0.6, 0.0, 0.8])
    middle = atoms.copy()
    middle.positions[3] += 0.025 * along  # the pair's centre stays while it closes

    def at(length):
        start = middle.copy()
        start.positions[3] -= 0.5 * length * along
        return put(context, start, 5, 3, length * along, image)

    lengths = [LIMIT + 1e-4, 0.0499, 0.03, 0.01, 1e-9]
    energies, forces = zip(*map(at, lengths), strict=True)
    assert np.isfinite(energies).all()
    np.testing.assert_allclose(energies[1] - energies[0], 0.1, atol=0.02)  # no jump at the limit
    np.testing.assert_allclose(
        np.diff(energies[1:4]), [STEEPNESS * 0.0199, STEEPNESS * 0.02], rtol=1e-4
    )
    for energy_force in forces[1:4]:
        pull = energy_force[5] - energy_force[3]
        np.testing.assert_allclose(pull, 2 * STEEPNESS * along, rtol=1e-3, atol=1.0)


@pytest.mark.parametrize("crowd", [[5], [4, 5, 6, 7], list(range(1, 8))])
def test_atoms_at_one_point_have_a_finite_repulsion(model, crowd):
    atoms = molecule_atoms()
    context = make_context(model, atoms)
    atoms.positions[crowd] = atoms.positions[0]
    context.setPositions(atoms.positions / 10)
    energy, forces = energy_and_forces(context)
    pairs = len(crowd) * (len(crowd) + 1) / 2
    assert energy > 0.9 * pairs * STEEPNESS * LIMIT
    assert np.isfinite(forces).all()
    assert np.linalg.norm(forces[0]) > 0.9 * STEEPNESS
    np.testing.assert_allclose(forces.sum(axis=0), 0, atol=0.05)
    again = make_context(model, atoms)
    assert energy_and_forces(again)[0] == energy


def test_mixed_systems_have_the_wall(model):
    atoms = molecule_atoms()
    topology = topology_of(atoms, bonds=np.zeros((0, 2), int))  # no link atoms
    mm = openmm.System()
    for _ in atoms:
        mm.addParticle(12.0)
    chosen = [6, 2, 7, 1]
    system = MLPotential("mlip-md", modelPath=model).createMixedSystem(topology, mm, chosen)
    atoms.positions[7] = atoms.positions[2] + [0.01, 0, 0]
    energy, forces = energy_and_forces(context_of(system, atoms))
    assert energy > 0.7 * STEEPNESS * LIMIT
    assert forces[7, 0] - forces[2, 0] > 1.9 * STEEPNESS
    assert not forces[[0, 3, 4, 5]].any()


@pytest.mark.parametrize("length", [0.0, 1e-3])
def test_minimizer_of_openmm_survives_overlaps(model, length):
    atoms = molecule_atoms()
    context = make_context(model, atoms)
    atoms.positions[5] = atoms.positions[3] + [length, 0, 0]
    context.setPositions(atoms.positions / 10)
    openmm.LocalEnergyMinimizer.minimize(context, 10, 20)
    positions = context.getState(positions=True).getPositions(asNumpy=True)._value
    assert np.linalg.norm(positions[5] - positions[3]) > LIMIT / 10


def test_everybody_else_hears_of_overlaps(model):
    calculator = MLIPCalculator(model)
    atoms = Atoms("CH", [[0, 0, 0], [0.01, 0, 0]], calculator=calculator)
    with pytest.raises(StructureError, match=r"0\.01 Å apart"):
        atoms.get_potential_energy()
    with pytest.raises(StructureError, match=r"structure 0: .*0.01 Å apart"):
        calculator.evaluate([atoms])
