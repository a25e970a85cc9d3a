"""The OpenMM-ML potential: exact against the ASE calculator, units, traps of PythonForce."""

import copy
import gc
import pickle
import signal
import subprocess
import sys
import time
import weakref

import numpy as np
import openmm
import openmm.app
import pytest
from ase import Atoms
from openmm import unit
from openmmml import MLPotential
from small_models import random_mace

from mlip_md import model_file
from mlip_md.errors import ConfigError, ModelFileError, StructureError, UnsupportedElementError
from mlip_md.integrations import openmm as integration
from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.structures import Structure, make_topology, read_structure

# 1 eV in kJ/mol and Å in nm, from their definitions and not from the package.
EV = 1.602176634e-19 * 6.02214076e23 * 1e-3
PLATFORMS = ["Reference", "CPU"]


@pytest.fixture(scope="module")
def potential():
    return random_mace(strength=20.0)


@pytest.fixture(scope="module")
def model(potential, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    model_file.save(potential, path)
    return str(path)


@pytest.fixture
def molecule():
    return read_structure().atoms[:8]


@pytest.fixture
def crystal():
    """Eight atoms in a triclinic box of OpenMM's form, some of them many boxes away."""
    rng = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(*[[0.0, 0.5]] * 3), axis=-1).reshape(-1, 3)
    scaled = grid + rng.uniform(-0.06, 0.06, (8, 3)) + rng.integers(-4, 5, (8, 3))
    cell = np.array([[5.0, 0.0, 0.0], [1.2, 4.6, 0.0], [-0.8, 0.9, 5.5]])
    return Atoms("CHNOCHHO", scaled_positions=scaled, cell=cell, pbc=True)


def topology_of(atoms):
    return make_topology(Structure("test", atoms))


def context_of(system, atoms, platform="Reference"):
    integrator = openmm.VerletIntegrator(0.0005)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName(platform))
    context.setPositions(atoms.positions / 10)
    return context


def energy_and_forces(context):
    """eV and eV/Å."""
    state = context.getState(energy=True, forces=True)
    forces = state.getForces(asNumpy=True).value_in_unit(unit.kilojoule_per_mole / unit.nanometer)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole)
    return energy / EV, np.array(forces) / (EV * 10)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", ["molecule", "crystal"])
def test_equals_the_ase_calculator(model, potential, name, platform, request):
    atoms = request.getfixturevalue(name)
    atoms.calc = MLIPCalculator(potential)
    reference = potential.reference_energies(potential.species(atoms.numbers)).sum()
    ml = MLPotential("mlip-md", modelPath=model)
    system = ml.createSystem(topology_of(atoms))
    energy, forces = energy_and_forces(context_of(system, atoms, platform))
    assert np.abs(forces).max() > 0.1
    np.testing.assert_allclose(energy, atoms.get_potential_energy() - reference, rtol=1e-6)
    np.testing.assert_allclose(forces, atoms.get_forces(), rtol=1e-5, atol=1e-6)
    system = ml.createSystem(topology_of(atoms), returnEnergyType="energy")
    energy, _ = energy_and_forces(context_of(system, atoms, platform))
    np.testing.assert_allclose(energy, atoms.get_potential_energy(), rtol=1e-6)
    assert system.usesPeriodicBoundaryConditions() == atoms.pbc.all()


def test_double_precision(model, potential, molecule):
    system = MLPotential("mlip-md", modelPath=model).createSystem(
        topology_of(molecule), precision="double"
    )
    _, forces = energy_and_forces(context_of(system, molecule))
    molecule.calc = MLIPCalculator(potential, dtype="float64")
    np.testing.assert_allclose(forces, molecule.get_forces(), atol=1e-12)


def test_entry_point_loads_no_jax():
    code = (
        "import sys, mlip_md.integrations; assert 'openmm' not in sys.modules\n"
        "import openmmml; assert 'jax' not in sys.modules and 'ase' not in sys.modules\n"
        "impl = openmmml.MLPotential('mlip-md')._impl; assert impl.getMLLongRange() is False\n"
        "from mlip_md.integrations import MLIPPotentialImplFactory as Factory\n"
        "assert type(openmmml.MLPotential._implFactories['mlip-md']) is Factory\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "from mlip_md.integrations import MLIPPotentialImplFactory as Factory\n"
        "import openmmml\n"
        "assert type(openmmml.MLPotential._implFactories['mlip-md']) is Factory\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"precison": "single"}, TypeError, "did you mean 'precision'"),
        ({"returnEnergyTyp": "energy"}, TypeError, "did you mean 'returnEnergyType'"),
        ({"xyzzy": 1}, TypeError, "known are precision"),
        ({"precision": "float32"}, ConfigError, "'single' or 'double'"),
        ({"returnEnergyType": "total"}, ConfigError, "interaction_energy"),
        ({"charge": 1}, ConfigError, "charge"),
        ({"multiplicity": 3}, ConfigError, "multiplicity"),
        ({"periodic": "yes"}, ConfigError, "periodic"),
        ({"periodic": True}, ConfigError, "no box"),
        ({"device": "abacus"}, ConfigError, "device"),
    ],
)
def test_bad_keywords(model, molecule, keywords, error, text):
    with pytest.raises(error, match=text):
        MLPotential("mlip-md", modelPath=model).createSystem(topology_of(molecule), **keywords)


def test_bad_models_and_atoms(model, molecule, tmp_path):
    with pytest.raises(TypeError, match="did you mean 'modelPath'"):
        MLPotential("mlip-md", modelpath=model)
    with pytest.raises(ModelFileError):
        MLPotential("mlip-md", modelPath=str(tmp_path / "no.safetensors")).createSystem(
            topology_of(molecule)
        )
    ml = MLPotential("mlip-md", modelPath=model)
    with pytest.raises(UnsupportedElementError, match="Fe"):
        ml.createSystem(topology_of(Atoms("Fe")))
    topology = topology_of(molecule)
    topology.addAtom("M", None, next(topology.residues()))
    with pytest.raises(StructureError, match="element"):
        ml.createSystem(topology)
    with pytest.raises(StructureError, match="twice"):
        ml._impl.addForces(topology_of(molecule), openmm.System(), [0, 0], 0)


def test_pass_through_keywords_and_pbc_override(model, crystal):
    system = MLPotential("mlip-md", modelPath=model).createSystem(
        topology_of(crystal), mlLongRange=False, linkAtomDistances=[], periodic=False
    )
    assert not system.usesPeriodicBoundaryConditions()


def test_system_survives_xml_in_a_fresh_process(model, molecule, tmp_path):
    system = MLPotential("mlip-md", modelPath=model).createSystem(topology_of(molecule))
    energy, _ = energy_and_forces(context_of(system, molecule))
    text = openmm.XmlSerializer.serialize(system)
    assert len(text) < 10_000
    again = openmm.XmlSerializer.deserialize(text)
    assert energy_and_forces(context_of(again, molecule))[0] == energy
    (tmp_path / "system.xml").write_text(text)
    np.save(tmp_path / "positions.npy", molecule.positions / 10)
    code = f"""
import numpy as np, openmm
system = openmm.XmlSerializer.deserialize(open({str(tmp_path / "system.xml")!r}).read())
context = openmm.Context(system, openmm.VerletIntegrator(0.001),
                         openmm.Platform.getPlatformByName("Reference"))
context.setPositions(np.load({str(tmp_path / "positions.npy")!r}))
print(context.getState(energy=True).getPotentialEnergy()._value)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    np.testing.assert_allclose(float(run.stdout) / EV, energy, rtol=1e-6)


def test_token_refuses_another_model(model, molecule, tmp_path):
    path = tmp_path / "model.safetensors"
    model_file.save(random_mace(seed=5), path)
    force = _ml_force(str(path), molecule)
    token = pickle.dumps(force)
    assert len(token) < 10_000
    del force
    gc.collect()
    model_file.save(random_mace(seed=6), path)
    with pytest.raises(ModelFileError, match="another model"):
        pickle.loads(token)


def _ml_force(path, atoms, **keywords):
    potential = integration._open(path)
    return integration.MLForce(
        potential, path, atoms.numbers, bool(atoms.pbc.all()), integration.force_options(keywords)
    )


class State:
    """What an MLForce reads of an OpenMM State."""

    def __init__(self, positions, box=None, step=7):
        self.positions, self.box, self.step = positions, box, step

    def getPositions(self, asNumpy):  # noqa: N802
        return self.positions * unit.nanometer

    def getPeriodicBoxVectors(self, asNumpy):  # noqa: N802
        return self.box * unit.nanometer

    def getStepCount(self):  # noqa: N802
        return self.step


def test_memo_is_exact(model, crystal):
    force = _ml_force(model, crystal)
    calls, compute = [], force._compute
    force._compute = lambda *a: calls.append(1) or compute(*a)
    one, box = crystal.positions / 10, crystal.cell.array / 10
    two = one.copy()
    two[0, 0] += 1e-3
    first, _ = force(State(one, box))
    force(State(two, box))
    assert force(State(one, box))[0] == first
    assert force(State(two.copy(), box))[0] != first
    assert len(calls) == 2
    scaled, _ = force(State(one, box * 1.01))
    assert len(calls) == 3
    assert abs(scaled - first) > 1e-3
    force(State(two, box))  # two geometries are kept, not more
    force(State(one, box))
    assert len(calls) >= 4


def test_box_change_reaches_the_potential(model, potential, crystal):
    system = MLPotential("mlip-md", modelPath=model).createSystem(topology_of(crystal))
    context = context_of(system, crystal)
    energy_and_forces(context)
    crystal.set_cell(crystal.cell * 1.02)  # positions stay
    context.setPeriodicBoxVectors(*(crystal.cell.array / 10))
    energy, forces = energy_and_forces(context)
    crystal.calc = MLIPCalculator(potential)
    reference = potential.reference_energies(potential.species(crystal.numbers)).sum()
    np.testing.assert_allclose(energy, crystal.get_potential_energy() - reference, rtol=1e-6)
    np.testing.assert_allclose(forces, crystal.get_forces(), rtol=1e-5, atol=1e-6)


def test_errors_tell_the_story_and_leak_nothing(model, molecule):
    class Big(np.ndarray):
        pass

    leaked = []

    def explode(positions, box):
        array = np.zeros(10**5).view(Big)
        leaked.append(weakref.ref(array))
        raise ValueError("the reason")

    force = _ml_force(model, molecule)
    force._compute = explode
    for _ in range(3):
        with pytest.raises(RuntimeError, match="step 7: ValueError: the reason") as error:
            force(State(molecule.positions / 10))
        assert "in explode" in str(error.value)
        assert error.value.__context__ is None
        assert error.value.__cause__ is None
    del error
    gc.collect()
    assert [r() for r in leaked] == [None] * 3


def test_errors_through_openmm(model, molecule):
    system = MLPotential("mlip-md", modelPath=model).createSystem(topology_of(molecule))
    context = context_of(system, molecule)
    molecule.positions[1] = molecule.positions[0]
    context.setPositions(molecule.positions / 10)
    with pytest.raises(openmm.OpenMMException, match=r"StructureError.*apart") as error:
        context.getState(energy=True)
    assert "minimize" in str(error.value)


def test_non_finite_values_stop_the_simulation(model, molecule):
    force = _ml_force(model, molecule)
    positions = molecule.positions / 10
    positions[3, 1] = np.nan
    with pytest.raises(RuntimeError, match="NonFiniteError: the position of atom 3"):
        force(State(positions))
    result = force._engine.evaluate(molecule.positions, molecule.numbers)
    for field, value in (("forces", result.forces * np.inf), ("interaction_energy", np.nan)):
        bad = copy.copy(result)
        object.__setattr__(bad, field, value)

        class Broken:
            def evaluate(self, *structure, bad=bad):
                return bad

        force._engine = Broken()
        with pytest.raises(RuntimeError, match="NonFiniteError"):
            force(State(molecule.positions / 10))


def test_control_c_inside_the_potential(model, molecule, interruptible):
    force = _ml_force(model, molecule)

    def slow(positions, box):
        signal.raise_signal(signal.SIGINT)  # as if the key was pressed during the computation
        time.sleep(10)
        raise AssertionError("the signal did not interrupt")

    force._compute = slow
    with pytest.raises(RuntimeError, match="Ctrl-C"):
        force(State(molecule.positions / 10))


@pytest.mark.parametrize("interpolate", [False, True])
def test_mixed_system(model, potential, interpolate):
    """One molecule of two is modelled: energy and forces are those of it alone."""
    ml_part = read_structure().atoms[:8]
    far = ml_part.copy()
    far.translate([30.0, 0, 0])
    both = far + ml_part  # the modelled atoms do not come first
    topology = topology_of(both)
    mm = openmm.System()
    springs = openmm.HarmonicBondForce()
    for atom in topology.atoms():
        mm.addParticle(atom.element.mass)
    springs.addBond(0, 1, 0.2, 1000.0)
    mm.addForce(springs)
    atoms = list(range(8, 16))
    keywords = {"interpolate": True, "periodic": False} if interpolate else {}
    system = MLPotential("mlip-md", modelPath=model).createMixedSystem(
        topology, mm, atoms, **keywords
    )
    context = context_of(system, both)
    if interpolate:
        context.setParameter("lambda_interpolate", 1.0)
    _, forces = energy_and_forces(context)
    ml_part.calc = MLIPCalculator(potential)
    np.testing.assert_allclose(forces[8:], ml_part.get_forces(), rtol=1e-5, atol=1e-6)
    assert np.abs(forces[2:8]).max() == 0.0
    if interpolate:
        context.setParameter("lambda_interpolate", 0.0)
        _, forces = energy_and_forces(context)
        assert np.abs(forces[8:]).max() == 0.0


def test_hidden_periodicity_is_asked_for(model, molecule):
    ml = MLPotential("mlip-md", modelPath=model)
    topology = topology_of(molecule)
    with pytest.warns(UserWarning, match="periodic=True or periodic=False"):
        ml._impl.addForces(topology, openmm.System(), list(range(8)), 0)
    periodic = openmm.System()
    nonbonded = openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    periodic.addParticle(1.0)
    periodic.addForce(nonbonded)
    with pytest.raises(ConfigError, match="scattered"):
        ml._impl.addForces(topology, periodic, list(range(8)), 0, periodic=False)
    ml._impl.addForces(topology, periodic, list(range(8)), 3)
    added = periodic.getForce(periodic.getNumForces() - 1)
    assert added.usesPeriodicBoundaryConditions()
    assert added.getForceGroup() == 3


def test_dynamics_conserves_energy(model, molecule):
    system = MLPotential("mlip-md", modelPath=model).createSystem(
        topology_of(molecule), removeCMMotion=False, precision="double"
    )
    context = context_of(system, molecule)
    context.setVelocitiesToTemperature(100.0, 1)
    energies = []
    for _ in range(20):
        context.getIntegrator().step(5)
        state = context.getState(energy=True)
        energies.append([state.getPotentialEnergy()._value, state.getKineticEnergy()._value])
    kinetic = np.array(energies)[:, 1]
    assert np.ptp(kinetic) > 0.1
    assert np.ptp(np.sum(energies, axis=1)) < 0.02 * np.ptp(kinetic)
