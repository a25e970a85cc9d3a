"""The OpenMM-ML potential: keywords, units, serialisation, errors, traps of PythonForce."""

import _thread
import copy
import dataclasses
import functools
import gc
import operator
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
import zlib
from unittest import mock

import jax
import numpy as np
import openmm
import openmm.app
import pytest
from ase import Atoms
from openmm import unit
from openmm_cases import (
    EV,
    context_of,
    crystal_atoms,
    energy_and_forces,
    make_model,
    molecule_atoms,
    topology_of,
)
from openmmml import MLPotential
from small_models import random_mace

from mlip_md.errors import ConfigError, ModelFileError, StructureError, UnsupportedElementError
from mlip_md.formats import own
from mlip_md.integrations import openmm_force
from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.openmm import force_options


@pytest.fixture(scope="module")
def potential():
    return random_mace(strength=20.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"), strength=20.0)


@pytest.fixture
def molecule():
    return molecule_atoms()


@pytest.fixture
def crystal():
    return crystal_atoms()


def make_system(model, atoms, **keywords):
    return MLPotential("mlip-md", modelPath=model).createSystem(topology_of(atoms), **keywords)


def test_double_precision_and_total_energy(model, potential, molecule):
    system = make_system(model, molecule, precision="double", returnEnergyType="energy")
    energy, forces = energy_and_forces(context_of(system, molecule))
    molecule.calc = MLIPCalculator(potential, dtype="float64")
    np.testing.assert_allclose(forces, molecule.get_forces(), atol=1e-12)
    np.testing.assert_allclose(energy, molecule.get_potential_energy(), rtol=1e-13)


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
        ({"precison": "single"}, TypeError, "did you mean precision"),
        ({"returnEnergyTyp": "energy"}, TypeError, "did you mean returnEnergyType"),
        ({"xyzzy": 1}, TypeError, "known are precision"),
        ({"precision": "float32"}, ConfigError, "'single', 'double'"),
        ({"returnEnergyType": "total"}, ConfigError, "interaction_energy"),
        ({"charge": 1}, ConfigError, "charge"),
        ({"multiplicity": 3}, ConfigError, "multiplicity"),
        ({"periodic": "yes"}, ConfigError, "periodic"),
        ({"periodic": True}, ConfigError, "no box"),
        ({"device": "abacus"}, ConfigError, "device"),
        ({"skin": -0.1}, ConfigError, "skin = -1"),
        ({"capacityFactor": 0.5}, ConfigError, "0.5"),
        ({"moleculeBonds": "all"}, ConfigError, "moleculeBonds"),
        ({"embedModel": 2}, ConfigError, "embedModel"),
        ({"embedModel": 1}, ConfigError, "embedModel = 1"),
        ({"removeCMmotion": False}, TypeError, "did you mean removeCMMotion"),
        ({"interpolat": True}, TypeError, "did you mean interpolate"),
        ({"device": 3}, ConfigError, "device = 3"),
        ({"device": ""}, ConfigError, "device"),
        ({"skin": "0.05 nm"}, ConfigError, "skin = '0.05 nm'.*nanometers"),
        ({"skin": 1 * unit.kelvin}, ConfigError, "skin = .*nanometers"),
        ({"skin": True}, ConfigError, "skin = True"),
        ({"capacityFactor": "a"}, ConfigError, "capacityFactor = 'a'"),
        ({"charge": "none"}, ConfigError, "charge = 'none'"),
        ({"charge": 1 * unit.elementary_charge}, ConfigError, "only charge = 0"),
    ],
)
def test_bad_keywords(model, molecule, keywords, error, text):
    with pytest.raises(error, match=text):
        make_system(model, molecule, **keywords)


def test_keywords_of_the_engine():
    assert force_options({}).engine() == {"dtype": "float32", "device": None}
    keywords = {"skin": 0.5 * unit.angstrom, "capacityFactor": 1.5, "precision": "double"}
    expected = {"dtype": "float64", "device": "cpu:0", "skin": 0.5, "capacity_margin": 1.5}
    assert force_options(keywords | {"device": jax.devices("cpu")[0]}).engine() == expected
    keywords |= {"device": "cpu:0", "skin": 0.05, "charge": 0 * unit.elementary_charge}
    assert force_options(keywords).engine() == expected
    assert force_options({"periodic": np.bool_(True)}).periodic is True


def test_bad_models_and_atoms(model, molecule, tmp_path):
    with pytest.raises(TypeError, match="did you mean modelPath"):
        MLPotential("mlip-md", modelpath=model)
    with pytest.raises(TypeError, match=r"precision.*createSystem"):
        MLPotential("mlip-md", modelPath=model, precision="single")
    for wrong in (str(tmp_path / "no.safetensors"), "", 3):
        with pytest.raises(ModelFileError):
            MLPotential("mlip-md", modelPath=wrong)
    ml = MLPotential("mlip-md", modelPath=model)
    with pytest.raises(UnsupportedElementError, match="Fe"):
        ml.createSystem(topology_of(Atoms("Fe")))
    for atoms, text in (
        ([0, 0], "twice"), ([], "no atoms"), ([-1], "0 to 7"), ([8], "0 to 7"),
        ([0.5, 1.7], "indices"), (["0"], "indices"),
    ):  # fmt: skip
        with pytest.raises(StructureError, match=text):
            ml.createMixedSystem(topology_of(molecule), openmm.System(), atoms)
    topology = topology_of(molecule)
    topology.addAtom("M", None, next(topology.residues()))
    with pytest.raises(StructureError, match="element"):
        ml.createSystem(topology)


def test_pass_through_keywords_and_pbc_override(model, crystal):
    system = make_system(model, crystal, mlLongRange=False, linkAtomDistances=[], periodic=False)
    assert not system.usesPeriodicBoundaryConditions()
    assert make_system(model, crystal).usesPeriodicBoundaryConditions()


def test_a_relative_path_holds_in_another_folder(molecule, tmp_path, monkeypatch):
    make_model(tmp_path, seed=8)
    monkeypatch.chdir(tmp_path)
    system = make_system("model.safetensors", molecule)
    text = openmm.XmlSerializer.serialize(system)
    energy, _ = energy_and_forces(context_of(system, molecule))
    del system
    gc.collect()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = openmm.XmlSerializer.deserialize(text)
    assert energy_and_forces(context_of(again, molecule))[0] == energy


def test_a_cell_that_atoms_do_not_fit_into_is_refused(model, molecule):
    """CRYST1 1 1 1 is what some programs write for a molecule without a box."""
    molecule.set_cell(np.eye(3))
    molecule.pbc = True
    context = context_of(make_system(model, molecule), molecule)
    with pytest.raises(openmm.OpenMMException, match="8 atoms do not fit into a cell of 1 Å"):
        context.getState(energy=True)


@pytest.mark.filterwarnings("ignore:mlip-md. the topology has a box:UserWarning")
@pytest.mark.parametrize("interpolate", [False, True])
@pytest.mark.parametrize("remove", [False, True])
def test_constraints_between_ml_atoms_go_only_if_wanted(model, crystal, remove, interpolate):
    """Also where the topology has a box and the System none."""
    mm = openmm.System()
    for _ in range(8):
        mm.addParticle(12.0)
    pairs = [(0, 1), (1, 3), (4, 5)]
    for pair in pairs:
        mm.addConstraint(*pair, 0.15)
    mm.addForce(openmm.HarmonicBondForce())
    system = MLPotential("mlip-md", modelPath=model).createMixedSystem(
        topology_of(crystal), mm, [0, 1, 2], removeConstraints=remove, interpolate=interpolate
    )
    left = [system.getConstraintParameters(i)[:2] for i in range(system.getNumConstraints())]
    assert [tuple(pair) for pair in left] == pairs[remove:]


def test_a_box_that_only_the_topology_has(model, crystal):
    """A force field without cutoff and a topology with a box contradict each other."""
    ml, topology = MLPotential("mlip-md", modelPath=model), topology_of(crystal)
    mm = openmm.System()
    for _ in range(8):
        mm.addParticle(12.0)
    mm.addForce(openmm.NonbondedForce())
    for _ in range(8):
        mm.getForce(0).addParticle(0.0, 0.1, 0.0)
    for interpolate in (False, True):
        with pytest.warns(UserWarning, match="has a box, but the System is not periodic") as told:
            system = ml.createMixedSystem(topology, mm, [0, 1, 2], interpolate=interpolate)
        assert len(told) == 1
        assert system.usesPeriodicBoundaryConditions()  # as with OpenMM-ML's other potentials
        for periodic in (False, True):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                system = ml.createMixedSystem(
                    topology, mm, [0, 1, 2], interpolate=interpolate, periodic=periodic
                )
            assert system.usesPeriodicBoundaryConditions() == periodic


@pytest.mark.parametrize(("charge", "said"), [(-1.0, True), (0.0, False), (1e-3, False)])
def test_a_charge_that_the_system_gives_the_ml_atoms_is_said(model, caplog, charge, said):
    atoms = Atoms("OHHOHH", np.arange(18.0).reshape(6, 3))
    topology = topology_of(atoms)
    every = list(topology.atoms())
    for i, j in ((0, 1), (0, 2)):
        topology.addBond(every[i], every[j])
    mm, nonbonded = openmm.System(), openmm.NonbondedForce()
    mm.addForce(nonbonded)
    for i in range(6):
        mm.addParticle(12.0)
        nonbonded.addParticle(charge / 3 if i < 3 else 0.4, 0.1, 0.0)
    ml = MLPotential("mlip-md", modelPath=model)
    ml.createMixedSystem(topology, mm, [0, 1, 2])
    assert ("total charge of -1" in caplog.text) == said
    caplog.clear()
    ml.createMixedSystem(topology, mm, [0])  # a part of a molecule has no charge of its own
    assert "total charge" not in caplog.text


def test_sites_without_element_may_surround_the_ml_atoms(model, molecule):
    """Four-site water: OpenMM-ML asks every atom for its number to make link atoms."""
    topology = topology_of(molecule)
    carbon = next(i for i, z in enumerate(molecule.numbers) if z == 6)
    site = topology.addAtom("M", None, next(topology.residues()))
    mm = openmm.System()
    for _ in topology.atoms():
        mm.addParticle(12.0)
    ml = MLPotential("mlip-md", modelPath=model)
    info = ml.createMixedSystem(topology, mm, [carbon], returnInfo=True)
    bonds = sum(carbon in (b[0].index, b[1].index) for b in topology.bonds())
    assert bonds > 0
    assert info["system"].getNumParticles() == 9 + bonds
    elements = [atom.element for atom in info["topology"].atoms()]
    assert elements[8] is None
    assert site.element is None
    assert all(elements[:8])
    with pytest.raises(StructureError, match="have no element"):
        ml.createMixedSystem(topology, mm, [carbon, 8])


def test_bonds_without_strength_make_molecules(model, molecule):
    plain = make_system(model, molecule)
    assert len(context_of(plain, molecule).getMolecules()) == 8
    bonded = make_system(model, molecule, moleculeBonds=True)
    assert len(context_of(bonded, molecule).getMolecules()) == 1
    ml = MLPotential("mlip-md", modelPath=model)
    grouped = ml.createMixedSystem(
        topology_of(molecule), plain, range(8), forceGroup=7, moleculeBonds=True
    )
    assert [f.getForceGroup() for f in grouped.getForces()][-2:] == [7, 7]
    one, other = (energy_and_forces(context_of(s, molecule)) for s in (plain, bonded))
    assert one[0] == other[0]
    np.testing.assert_array_equal(one[1], other[1])


FRESH = """
import sys, numpy as np, openmm
for name in sys.argv[2:]:
    system = openmm.XmlSerializer.deserialize(open(name).read())
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(np.load(sys.argv[1]))
    try:
        print(repr(context.getState(energy=True).getPotentialEnergy()._value))
    except openmm.OpenMMException as error:
        print(str(error).splitlines()[0])
"""


def test_system_survives_xml_in_a_fresh_process(molecule, tmp_path):
    """The token needs the model file, the embedded model does not; nothing crashes without it."""
    (tmp_path / "gone").mkdir()
    kept, gone = make_model(tmp_path, seed=1), make_model(tmp_path / "gone", seed=2)
    expected = {}
    for name, path, embed in (
        ("token.xml", kept, False),
        ("orphan.xml", gone, False),
        ("embedded.xml", gone, True),
    ):
        system = make_system(path, molecule, embedModel=embed)
        text = openmm.XmlSerializer.serialize(system)
        assert embed or len(text) < 10_000
        (tmp_path / name).write_text(text)
        again = openmm.XmlSerializer.deserialize(text)
        expected[name], forces = energy_and_forces(context_of(system, molecule))
        energy, same = energy_and_forces(context_of(again, molecule))
        assert energy == expected[name]
        np.testing.assert_array_equal(forces, same)
    assert expected["token.xml"] != expected["embedded.xml"]
    os.remove(gone)
    np.save(tmp_path / "positions.npy", molecule.positions / 10)
    run = subprocess.run(
        [sys.executable, "-c", FRESH, "positions.npy", *expected],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    token, orphan, embedded = run.stdout.splitlines()
    assert float(token) / EV == expected["token.xml"]
    assert float(embedded) / EV == expected["embedded.xml"]
    assert re.search(r"ModelFileError: the model of this System cannot be opened: there", orphan)


def test_moved_and_changed_models(molecule, tmp_path):
    path = make_model(tmp_path, seed=5)
    system = make_system(path, molecule)
    energy, _ = energy_and_forces(context_of(system, molecule))
    text = openmm.XmlSerializer.serialize(system)
    del system
    gc.collect()
    moved = tmp_path / "moved.safetensors"
    os.rename(path, moved)
    own.save(random_mace(seed=6), path)
    context = context_of(openmm.XmlSerializer.deserialize(text), molecule)
    with pytest.raises(openmm.OpenMMException, match="another model"):
        context.getState(energy=True)
    os.remove(path)
    with pytest.raises(openmm.OpenMMException, match="If the file has moved"):
        context.getState(energy=True)
    potential = MLPotential("mlip-md", modelPath=str(moved))  # as the message says
    assert energy_and_forces(context)[0] == energy
    del potential


def test_copies_share_the_potential(model, molecule):
    """What OpenMM copies is a token: no weights are stored twice, nothing is compiled again."""
    force = _ml_force(model, molecule)
    one, _ = force(State(molecule.positions / 10))
    compiled = force.engine.num_compilations
    for again in (copy.deepcopy(force), pickle.loads(pickle.dumps(force))):
        assert again(State(molecule.positions / 10))[0] == one
        assert again.engine.potential is force.engine.potential
        assert again.engine.num_compilations == compiled


def test_unpickling_opens_nothing():
    """What raises while OpenMM unpickles would end the process."""
    force = openmm_force.MLForce("gone.safetensors", "5" * 64, [6], None, False, False, {})
    for again in (copy.deepcopy(force), pickle.loads(pickle.dumps(force))):
        with pytest.raises(RuntimeError, match="ModelFileError: the model of this System"):
            again(State(np.zeros((1, 3))))


TOKEN = (
    "8004952d010000000000008c216d6c69705f6d642e696e746567726174696f6e732e6f70656e6d6d5f666f72"
    "6365948c074d4c466f7263659493942981947d94288c056d6f64656c948c0d6f7267616e6963732d67666e32"
    "948c06736861323536948c403232323232323232323232323232323232323232323232323232323232323232"
    "3232323232323232323232323232323232323232323232323232323232323232948c076e756d626572739443"
    "0b78dae360640400001e000b948c097061727469636c657394431178da6361606060056236200600007c0010"
    "948c08706572696f64696394888c0c746f74616c5f656e6572677994898c0e656e67696e655f6f7074696f6e"
    "73947d94288c056474797065948c07666c6f61743332948c06646576696365944e758c07636f6e74656e7494"
    "4e75622e"
)
"""A pickled force of three atoms, as version 0.1.0 writes it into XML files."""


def test_tokens_are_small_and_stay_readable():
    """Thousands of atoms fit into a token, and one of version 0.1.0 can be read."""
    numbers, particles = np.tile([8, 1, 1], 3000), np.arange(500, 9500)
    force = openmm_force.MLForce("m.zip", "5" * 64, numbers, particles, True, False, {})
    assert len(pickle.dumps(force)) < 20_000
    old = pickle.loads(bytes.fromhex(TOKEN))
    assert type(old) is openmm_force.MLForce
    token = old.__getstate__()
    assert {*token, "version", "head"} == force.__getstate__().keys()
    assert list(zlib.decompress(token["numbers"])) == [8, 1, 1]
    assert np.frombuffer(zlib.decompress(token["particles"]), np.int32).tolist() == [4, 5, 6]
    assert token["engine_options"] == {"dtype": "float32", "device": None}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda token: token | {"version": 3, "engine_options": {"future": 1}},
            "the ML force of this System is of format version 3, and mlip-md .* reads 1 to 2; upgr",
        ),
        (lambda token: token | {"version": "two"}, "is of format version 'two'"),
        (
            lambda token: {k: v for k, v in token.items() if k not in ("content", "periodic")},
            "lacks periodic, content: its file is damaged; make the System anew",
        ),
    ],
)
def test_tokens_that_cannot_be_read_are_refused_with_their_version(model, molecule, change, told):
    """At the first use, in one line: what raises while OpenMM unpickles would end the process."""
    force = _ml_force(model, molecule)
    force.__setstate__(change(force.__getstate__()))
    again = pickle.loads(pickle.dumps(force))
    with pytest.raises(ModelFileError, match=told):
        _ = again.engine
    with pytest.raises(RuntimeError, match=rf"step 7: ModelFileError: .*{told}") as caught:
        again(State(molecule.positions / 10))
    assert "\n" not in str(caught.value)


def _ml_force(path, atoms, **keywords):
    options = force_options(keywords)
    potential = openmm_force.share_potential(path)
    force = openmm_force.MLForce(
        path, potential.sha256, atoms.numbers, None, bool(atoms.pbc.all()), False, options.engine()
    )
    _ = force.engine
    return force


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


def test_memo_is_exact(model, crystal, evaluations):
    force = _ml_force(model, crystal)
    one, box = crystal.positions / 10, crystal.cell.array / 10
    two = one.copy()
    two[0, 0] = np.nextafter(two[0, 0], 9)
    first, _ = force(State(one, box))
    force(State(two, box))
    assert force(State(one, box))[0] == first
    force(State(two.copy(), box))
    assert len(evaluations) == 2
    scaled, _ = force(State(one, box * 1.01))
    assert len(evaluations) == 3
    assert abs(scaled - first) > 1e-3
    for step in range(5):  # six geometries are kept, not more
        force(State(two + 1e-3 * step, box))
    assert len(evaluations) == 7
    force(State(one, box * 1.01))
    assert len(evaluations) == 7
    force(State(one, box))
    assert len(evaluations) == 8


def test_contexts_that_take_turns_do_not_pay_twice(model, molecule, evaluations):
    system = make_system(model, molecule)
    contexts = [context_of(system, molecule) for _ in range(3)]
    for index, context in enumerate(contexts):
        context.setVelocitiesToTemperature(100, index + 1)
    for _ in range(4):
        for context in contexts:
            context.getIntegrator().step(1)
        for context in contexts:
            context.getState(energy=True)
    assert len(evaluations) == 1 + 4 * 3  # all start from the same positions


@pytest.fixture
def evaluations(monkeypatch):
    """Grows by one with every evaluation of a potential under OpenMM."""
    calls = []
    evaluate = openmm_force.Engine.evaluate

    def counted(self, *structure):
        calls.append(threading.get_ident())
        return evaluate(self, *structure)

    monkeypatch.setattr(openmm_force.Engine, "evaluate", counted)
    return calls


def test_one_evaluation_per_step_whoever_asks(model, molecule, evaluations):
    context = context_of(make_system(model, molecule), molecule)
    context.setVelocitiesToTemperature(100, 1)
    for _ in range(5):
        context.getIntegrator().step(1)
        context.getState(energy=True)
        context.getState(forces=True, positions=True, velocities=True)
    assert len(evaluations) == 6


def test_three_contexts_and_threads(model, molecule, evaluations):
    """Contexts of one System share one callable; each gets its own numbers."""
    system = make_system(model, molecule)
    starts = [molecule.copy() for _ in range(3)]
    for index, atoms in enumerate(starts):
        atoms.positions += 0.02 * index * np.sin(np.arange(24.0)).reshape(8, 3)
    alone = []
    for atoms in starts:
        context = context_of(system, atoms)
        context.getIntegrator().step(20)
        alone.append(energy_and_forces(context))
    contexts = [context_of(system, atoms) for atoms in starts]
    threads = [threading.Thread(target=c.getIntegrator().step, args=(20,)) for c in contexts]
    evaluations.clear()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(evaluations)) == 3
    for context, (energy, forces) in zip(contexts, alone, strict=True):
        together = energy_and_forces(context)
        assert together[0] == energy
        np.testing.assert_array_equal(together[1], forces)


def test_reinitialize_and_checkpoint_replay(model, crystal):
    """The same steps from a checkpoint, in this Context and a new one, thermostat included."""
    system = make_system(model, crystal)

    def make_context():
        integrator = openmm.LangevinMiddleIntegrator(300, 1, 0.0005)
        integrator.setRandomNumberSeed(4)
        return context_of(system, crystal, integrator=integrator)

    def steps(context):
        context.getIntegrator().step(10)
        return context.getState(positions=True).getPositions(asNumpy=True)._value

    context = make_context()
    steps(context)
    checkpoint = context.createCheckpoint()
    first = steps(context)
    context.loadCheckpoint(checkpoint)
    context.reinitialize(preserveState=True)
    np.testing.assert_array_equal(steps(context), first)
    other = make_context()
    other.loadCheckpoint(checkpoint)
    del context
    gc.collect()
    np.testing.assert_array_equal(steps(other), first)


@pytest.mark.parametrize("backend", ["auto", "dense", "cells"])
def test_neighbors_may_become_more(model, potential, molecule, backend, monkeypatch):
    """A run that starts with room for hardly any neighbor ends with the right forces."""
    engine = openmm_force.Engine
    monkeypatch.setattr(openmm_force, "Engine", functools.partial(engine, backend=backend))
    system = make_system(model, molecule, capacityFactor=1.0)
    spread = molecule.copy()
    spread.positions = 3.9 * np.arange(8)[:, None] * [1, 0, 0]
    context = context_of(system, spread)
    energy_and_forces(context)
    context.setPositions(molecule.positions / 10)
    _, forces = energy_and_forces(context)
    molecule.calc = MLIPCalculator(potential)
    np.testing.assert_allclose(forces, molecule.get_forces(), rtol=1e-5, atol=1e-6)


def test_box_change_reaches_the_potential(model, potential, crystal):
    context = context_of(make_system(model, crystal), crystal)
    energy_and_forces(context)
    crystal.set_cell(crystal.cell * 1.02)  # positions stay
    context.setPeriodicBoxVectors(*(crystal.cell.array / 10))
    energy, forces = energy_and_forces(context)
    crystal.calc = MLIPCalculator(potential)
    reference = potential.reference_energies(potential.species(crystal.numbers)).sum()
    np.testing.assert_allclose(energy, crystal.get_potential_energy() - reference, rtol=1e-6)
    np.testing.assert_allclose(forces, crystal.get_forces(), rtol=1e-5, atol=1e-6)


def test_errors_tell_the_story_and_leak_nothing(model, molecule, monkeypatch):
    class Big(np.ndarray):
        pass

    leaked = []

    def explode(*structure):
        array = np.zeros(10**5).view(Big)
        leaked.append(weakref.ref(array))
        raise ValueError("the reason")

    force = _ml_force(model, molecule)
    monkeypatch.setattr(openmm_force.Engine, "evaluate", explode)
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
    context = context_of(make_system(model, molecule), molecule)
    good, _ = energy_and_forces(context)
    before = molecule.positions.copy()
    molecule.positions[1] = np.nan
    context.setPositions(molecule.positions / 10)
    with pytest.raises(openmm.OpenMMException, match=r"StructureError.*finite") as error:
        context.getState(energy=True)
    assert "minimize" in str(error.value)
    context.setPositions(before / 10)  # and the Context can be used again
    assert energy_and_forces(context)[0] == good


def test_errors_name_particles_of_the_system(model, molecule):
    """The potential counts its own atoms; the message says which particles these are."""
    system = openmm.System()
    far = molecule.copy()
    far.translate([30, 0, 0])
    topology = topology_of(molecule + far, bonds=np.zeros((0, 2), int))  # no link atoms
    for _ in range(16):
        system.addParticle(12.0)
    atoms = [8, 9, 10, 15, 1]
    system = MLPotential("mlip-md", modelPath=model).createMixedSystem(topology, system, atoms)
    positions = np.vstack([molecule.positions, molecule.positions + 20]) / 10
    positions[15] = np.nan
    context = context_of(system, Atoms("H16", positions * 10))
    with pytest.raises(openmm.OpenMMException, match=r"StructureError.*finite") as error:
        context.getState(energy=True)
    assert "ML atoms 0-2 are 8-10, 3 is 15, 4 is 1." in str(error.value)


def test_non_finite_results_are_refused(model, molecule, monkeypatch):
    force = _ml_force(model, molecule)
    result = force.engine.evaluate(molecule.positions, molecule.numbers)
    for change in ({"forces": result.forces * np.inf}, {"interaction_energy": np.nan}):
        bad = dataclasses.replace(result, **change)
        monkeypatch.setattr(openmm_force.Engine, "evaluate", lambda *_, bad=bad: bad)
        with pytest.raises(RuntimeError, match="NonFiniteError"):
            force(State(molecule.positions / 10))


INTERRUPTED = """
import os, signal, sys, threading, time
import numpy as np, openmm
system = openmm.XmlSerializer.deserialize(open("system.xml").read())
platform = openmm.Platform.getPlatformByName("Reference")
context = openmm.Context(system, openmm.VerletIntegrator(1e-6), platform)
context.setPositions(np.load("positions.npy"))
context.getState(energy=True)
def press():
    while True:  # JAX's collection of garbage swallows one now and then, and says so
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=press, daemon=True).start()
try:
    while True:
        context.getIntegrator().step(1000)
except (KeyboardInterrupt, openmm.OpenMMException) as error:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(type(error).__name__, error)
print(np.isfinite(context.getState(energy=True).getPotentialEnergy()._value))
"""


def test_control_c(model, molecule, tmp_path, interruptible):
    """A real signal during dynamics stops it, says so, and leaves the Context usable."""
    system = make_system(model, molecule)
    (tmp_path / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    np.save(tmp_path / "positions.npy", molecule.positions / 10)
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=True,
    )  # fmt: skip
    first, last = run.stdout.splitlines()
    assert first.startswith("KeyboardInterrupt") or "Ctrl-C" in first
    assert last == "True"


def test_control_c_between_two_calls(model, molecule, interruptible):
    """The signal waits when the potential is called; Python raises before its first line runs."""
    force, state = _ml_force(model, molecule), State(molecule.positions / 10)
    before = force(state)
    calls = map(operator.call, [_thread.interrupt_main, functools.partial(force, state)])
    with pytest.raises(RuntimeError, match="Ctrl-C"):
        list(calls)  # no Python code between the two
    assert force(state) == before


def test_the_next_call_works_whatever_happened_in_the_last(model, molecule, monkeypatch):
    """An error that cannot be told, or that strikes while it is told, leaves nothing broken."""
    force, state = _ml_force(model, molecule), State(molecule.positions / 10)
    before = force(state)

    class UntoldError(Exception):
        def __str__(self):
            raise ValueError

    def fail(*structure):
        raise UntoldError

    away = State(molecule.positions / 10 + 1.0)
    monkeypatch.setattr(openmm_force.Engine, "evaluate", fail)
    with pytest.raises(RuntimeError, match="UntoldError, and no more to say"):
        force(away)
    monkeypatch.setattr(openmm_force.MLForce, "story", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        force(away)
    monkeypatch.undo()
    assert force(state) == before
    assert abs(force(away)[0] - before[0]) < 1e-3


def test_control_c_inside_the_potential(model, molecule, interruptible, monkeypatch):
    force = _ml_force(model, molecule)

    def slow(*structure):
        signal.raise_signal(signal.SIGINT)  # as if the key was pressed during the computation
        time.sleep(10)
        raise AssertionError("the signal did not interrupt")

    monkeypatch.setattr(openmm_force.Engine, "evaluate", slow)
    with pytest.raises(RuntimeError, match="Ctrl-C"):
        force(State(molecule.positions / 10))


def test_dynamics_conserves_energy(model, molecule):
    system = make_system(model, molecule, removeCMMotion=False, precision="double")
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
