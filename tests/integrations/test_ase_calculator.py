"""The ASE calculator: ASE's contract, units and signs, safety."""

import copy
import inspect
import json
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_forces, calculate_numerical_stress
from ase.filters import FrechetCellFilter
from ase.io import Trajectory
from small_models import ELEMENTS, random_mace

from mlip_md.engine import Engine
from mlip_md.errors import ConfigError, ModelFileError, StructureError, UnsupportedElementError
from mlip_md.formats import own
from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.md.structures import read_structure

CELL = np.array([[5.0, 0.0, 0.0], [1.2, 4.6, 0.0], [-0.8, 0.9, 5.5]])


@pytest.fixture(scope="module")
def potential():
    return random_mace(strength=20.0)


@pytest.fixture(scope="module")
def calculator(potential):
    return MLIPCalculator(potential, dtype="float64")


@pytest.fixture
def molecule():
    return read_structure().atoms[:8]


@pytest.fixture
def crystal():
    """Eight atoms in a triclinic cell, some of them outside of it."""
    rng = np.random.default_rng(3)
    grid = np.stack(np.meshgrid(*[[0.0, 0.5]] * 3), axis=-1).reshape(-1, 3)
    scaled = grid + rng.uniform(-0.06, 0.06, (8, 3)) + rng.integers(-2, 3, (8, 3))
    return Atoms("CHNOCHHO", scaled_positions=scaled, cell=CELL, pbc=True)


@pytest.fixture
def evaluations(monkeypatch):
    """Grows by one with every evaluation of a structure."""
    calls, evaluate = [], Engine.evaluate

    def counted(self, *structure):
        calls.append(1)
        return evaluate(self, *structure)

    monkeypatch.setattr(Engine, "evaluate", counted)
    return calls


class Shifted(MLIPCalculator):
    """What users derive: something of their own, added to the results."""

    def __init__(self, *arguments, shift, **options):
        super().__init__(*arguments, **options)
        self.shift = shift

    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        self.results["energy"] += self.shift["eV"]


def test_energies(calculator, molecule, potential):
    molecule.calc = calculator
    energy = molecule.get_potential_energy()
    assert type(energy) is float
    assert type(calculator.results["free_energy"]) is float
    assert energy == molecule.get_potential_energy(force_consistent=True)
    np.testing.assert_allclose(molecule.get_potential_energies().sum(), energy, rtol=1e-13)
    reference = dict(zip(ELEMENTS, potential.atomic_energies, strict=True))
    isolated = sum(reference[z] for z in molecule.numbers)
    assert 0.1 < abs(energy - isolated) < 1e3
    for z in ELEMENTS:
        atom = Atoms(numbers=[z], positions=[[1, 2, 3]], calculator=calculator)
        assert atom.get_potential_energy() == reference[z]


@pytest.mark.parametrize("name", ["molecule", "crystal"])
def test_forces_are_minus_the_gradient(calculator, name, request):
    atoms = request.getfixturevalue(name)
    atoms.calc = calculator
    forces = atoms.get_forces()
    assert forces.dtype == np.float64
    assert np.abs(forces).max() > 0.1
    numerical = calculate_numerical_forces(atoms, eps=1e-4)
    np.testing.assert_allclose(forces, numerical, atol=1e-6)


def test_stress_is_the_derivative_in_voigt_order(calculator, crystal):
    crystal.calc = calculator
    stress = crystal.get_stress()
    assert stress.shape == (6,)
    assert np.abs(stress).min() > 1e-5  # every component is tested, with its sign
    numerical = calculate_numerical_stress(crystal, eps=1e-4)
    np.testing.assert_allclose(stress, numerical, atol=1e-8)


def test_stress_needs_a_cell(calculator, molecule):
    molecule.calc = calculator
    molecule.get_potential_energy()
    for atoms in (molecule, Atoms("CO", [[0, 0, 0], [0, 0, 1.2]], cell=[5, 5, 0], pbc=[1, 1, 0])):
        atoms.calc = calculator
        with pytest.raises(PropertyNotImplementedError):
            atoms.get_stress()
        assert "stress" not in calculator.results


def test_one_evaluation_serves_all_properties(potential, crystal, evaluations):
    calculator = MLIPCalculator(potential, dtype="float64")
    crystal.calc = calculator
    crystal.get_potential_energy()
    crystal.get_forces()
    crystal.get_stress()
    crystal.get_potential_energies()
    assert len(evaluations) == 1
    crystal.positions[0, 0] += 1e-6
    crystal.get_forces()
    assert len(evaluations) == 2
    crystal.set_cell(crystal.cell * 1.001)
    crystal.get_forces()
    assert len(evaluations) == 3
    crystal.pbc = [True, True, False]
    crystal.get_potential_energy()
    assert len(evaluations) == 4


def test_stress_asked_without_cell_costs_nothing(potential, molecule, evaluations):
    calculator = MLIPCalculator(potential, dtype="float64")
    molecule.calc = calculator
    molecule.get_potential_energy()
    for _ in range(3):
        with pytest.raises(PropertyNotImplementedError):
            molecule.get_stress()
        assert calculator.get_property("stress", molecule, allow_calculation=False) is None
    assert len(evaluations) == 1
    derived = Shifted(potential, shift={"eV": 1.0}, dtype="float64")
    energy = molecule.get_potential_energy()
    molecule.calc = derived
    assert molecule.get_potential_energy() == energy + 1.0
    with pytest.raises(PropertyNotImplementedError):
        molecule.get_stress()
    assert molecule.get_potential_energy() == energy + 1.0  # added once


def test_calculate_believes_the_atoms_not_the_list_of_changes(calculator, molecule):
    molecule.calc = calculator
    energy, forces = molecule.get_potential_energy(), molecule.get_forces()
    other = molecule.copy()
    other.rattle(0.05)
    calculator.calculate(other, ["energy"], [])
    assert abs(calculator.results["energy"] - energy) > 1e-3
    assert calculator.check_state(other) == []
    calculator.calculate(molecule, ["energy"], [])
    np.testing.assert_array_equal(calculator.results["forces"], forces)


def test_results_and_atoms_are_nobody_elses(calculator, crystal):
    before = crystal.copy()
    crystal.calc = calculator
    forces = crystal.get_forces()
    kept = forces.copy()
    for array in (forces, crystal.get_stress(), crystal.get_potential_energies()):
        array[:] = 0.0
    np.testing.assert_array_equal(crystal.get_forces(), kept)
    assert np.abs(crystal.get_stress()).min() > 0
    assert np.abs(crystal.get_potential_energies()).min() > 0
    asked = calculator.calculate_properties(crystal, ["forces", "stress"])
    for results in (calculator.results, calculator.export_properties(), asked):
        for name in ("forces", "stress", "energies"):
            with pytest.raises(ValueError, match="read-only"):
                results[name][:] = 0.0
    np.testing.assert_array_equal(crystal.get_forces(), kept)
    np.testing.assert_array_equal(crystal.positions, before.positions)
    np.testing.assert_array_equal(crystal.cell, before.cell)
    assert crystal.info == before.info
    first, second = calculator.evaluate([crystal, crystal])
    first["forces"][:] = 0.0
    np.testing.assert_allclose(second["forces"], kept, atol=1e-12)
    results = calculator.results["forces"]
    crystal.rattle(0.01)
    crystal.get_forces()
    np.testing.assert_array_equal(results, kept)


def test_batch_equals_one_by_one(calculator, molecule, crystal):
    slab = crystal.copy()
    slab.pbc = [True, True, False]
    structures = [molecule, crystal, molecule[:3], slab]
    results = calculator.evaluate(atoms for atoms in structures)
    for atoms, result in zip(structures, results, strict=True):
        single = atoms.copy()
        single.calc = calculator
        assert type(result["energy"]) is float
        np.testing.assert_allclose(result["energy"], single.get_potential_energy(), rtol=1e-12)
        np.testing.assert_allclose(result["forces"], single.get_forces(), atol=1e-10)
        assert ("stress" in result) == (atoms.cell.rank == 3)
        if "stress" in result:
            np.testing.assert_allclose(result["stress"], single.get_stress(), atol=1e-10)


def test_batches_are_lists(calculator, molecule):
    assert calculator.evaluate([]) == []
    with pytest.raises(StructureError, match=r"give a list: evaluate\(\[atoms\]\)"):
        calculator.evaluate(molecule)
    with pytest.raises(StructureError, match="structure 1: a ndarray is no Atoms"):
        calculator.evaluate([molecule, molecule.positions])
    charged = molecule.copy()
    charged.info["charge"] = 1
    with pytest.raises(StructureError, match=r"structure 1: .*charge"):
        calculator.evaluate([molecule, charged])


CLONES = [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))]


@pytest.mark.parametrize("clone", CLONES)
def test_copies_compute_the_same_and_are_independent(calculator, molecule, clone):
    molecule.calc = calculator
    forces = molecule.get_forces()
    copied = clone(calculator)
    np.testing.assert_array_equal(copied.results["forces"], forces)
    with pytest.raises(ValueError, match="read-only"):
        copied.results["forces"][:] = 0.0
    assert copied.check_state(molecule) == []
    other = molecule.copy()
    other.calc = copied
    other.rattle(0.05)
    assert np.abs(other.get_forces() - forces).max() > 1e-3
    np.testing.assert_array_equal(calculator.results["forces"], forces)
    assert calculator.check_state(molecule) == []
    other.positions = molecule.positions
    np.testing.assert_array_equal(other.get_forces(), forces)


@pytest.mark.parametrize("clone", CLONES)
def test_copies_are_of_the_same_class_and_options(potential, molecule, clone):
    options = {"dtype": "float64", "skin": 0.5, "backend": "vesin", "capacity_margin": 1.5}
    calculator = Shifted(potential, shift={"eV": 2.0}, **options)
    molecule.calc = calculator
    energy = molecule.get_potential_energy()
    copied = clone(calculator)
    assert type(copied) is Shifted
    assert copied.shift == calculator.shift
    assert (copied.shift is calculator.shift) == (clone is copy.copy)
    assert copied.engine.spec == calculator.engine.spec
    assert copied.engine.dtype == "float64"
    assert copied.todict() == calculator.todict()
    copied.reset()
    assert copied.get_potential_energy(molecule) == energy
    assert (copied.potential is potential) == (clone in CLONES[:2])
    pair = copy.deepcopy([calculator, calculator])
    assert pair[0] is pair[1]


def test_copies_stay_on_the_device():
    """A device chosen by JAX's default of the time, or handed over."""
    code = """
import copy, json, pickle
import jax
from pair_potential import pair_potential
from mlip_md.integrations.ase import MLIPCalculator
second, potential = jax.local_devices()[1], pair_potential()
with jax.default_device(second):
    calculators = [MLIPCalculator(potential)]
calculators.append(MLIPCalculator(potential, device=second))
for calculator in calculators:
    assert json.loads(json.dumps(calculator.todict()))["device"] == "cpu:1"
    for clone in (copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))):
        assert clone(calculator).engine.device == second
        assert clone(clone(calculator)).engine.device == second
"""
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


class Lingering(MLIPCalculator):
    """Lets other threads come between a calculation and the reading of its results."""

    def calculate(self, *arguments, **options):
        super().calculate(*arguments, **options)
        time.sleep(1e-3)


def test_threads_share_a_calculator(potential):
    """Each thread its own structure, one calculator for all: nobody gets another's numbers."""
    calculator = Lingering(potential, dtype="float64")
    rng = np.random.default_rng(5)
    structures, expected = [], []
    for _ in range(4):
        atoms = Atoms("CHNO", 1.5 * np.eye(4, 3) + rng.uniform(-0.2, 0.2, (4, 3)), cell=CELL)
        atoms.calc = calculator
        structures.append(atoms)
        expected.append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
    start = threading.Barrier(len(structures))

    def work(atoms, numbers):
        energy, forces, stress = numbers
        start.wait()
        for _ in range(25):
            assert atoms.get_potential_energy() == energy
            np.testing.assert_array_equal(atoms.get_forces(), forces)
            np.testing.assert_array_equal(atoms.get_stress(), stress)
            asked = atoms.get_properties(["energy", "forces"])
            np.testing.assert_array_equal(asked["forces"], forces)

    with ThreadPoolExecutor(len(structures)) as threads:
        list(threads.map(work, structures, expected))  # raises what a thread raised


def test_float32_agrees_and_leaves_jax_alone(potential, calculator, molecule):
    single = MLIPCalculator(potential, default_dtype="float32")
    forces = []
    for calc in (calculator, single):
        molecule.calc = calc
        forces.append(molecule.get_forces())
    assert forces[1].dtype == np.float64
    difference = np.abs(forces[0] - forces[1]).max()
    assert 0 < difference < 2e-5 * np.abs(forces[0]).max()
    assert not jax.config.jax_enable_x64


def test_host_files(calculator, crystal, tmp_path):
    crystal.calc = calculator
    crystal.get_potential_energy()
    with Trajectory(tmp_path / "a.traj", "w") as trajectory:
        trajectory.write(crystal)
    with Trajectory(tmp_path / "a.traj") as trajectory:
        saved = trajectory[0]
    assert saved.get_potential_energy() == crystal.get_potential_energy()
    np.testing.assert_array_equal(saved.get_stress(), crystal.get_stress())
    exported = calculator.export_properties()
    assert set(exported) == {"energy", "free_energy", "energies", "forces", "stress", "natoms"}
    description = calculator.todict()
    assert json.loads(json.dumps(description)) == description
    assert description["sha256"] == calculator.potential.sha256
    assert FrechetCellFilter(crystal).get_forces().shape == (11, 3)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a.positions.__setitem__((2, 1), np.nan), StructureError, "finite"),
        (lambda a: a.numbers.__setitem__(0, 79), UnsupportedElementError, "Au.*H, C, N, O"),
        (lambda a: a.__delitem__(slice(None)), StructureError, "no atoms"),
        (lambda a: setattr(a, "pbc", True), StructureError, "periodic|volume|cell"),
        (lambda a: a.positions.__setitem__(0, a.positions[1]), StructureError, "apart|same"),
        (lambda a: a.info.update(charge=-1), StructureError, "charge"),
        (lambda a: a.info.update(spin=3), StructureError, "spin"),
        (lambda a: a.info.update(charge=np.array([2.0])), StructureError, "charge"),
        (lambda a: a.info.update(charge="two"), StructureError, "no number"),
        (lambda a: a.info.update(charge=[[1], [1, 2]]), StructureError, "no number"),
        (lambda a: a.info.update(charge=[0, 0]), StructureError, "no number"),
        (lambda a: a.info.update(charge=np.ma.masked), StructureError, "no number"),
        (lambda a: a.info.update(spin=np.ma.array([1], mask=[True])), StructureError, "no number"),
        (lambda a: a.info.update(charge=np.nan), StructureError, "charge"),
        (lambda a: a.info.update(uhf=1), StructureError, "uhf"),
        (lambda a: a.info.update(total_spin=1), StructureError, "total_spin"),
        (lambda a: a.info.update(occupancy={"0": {"C": 0.5}}), StructureError, "disorder"),
    ],
)
def test_bad_structures_are_refused(calculator, molecule, change, error, text):
    molecule.calc = calculator
    energy = molecule.get_potential_energy()
    bad = molecule.copy()
    bad.calc = calculator
    change(bad)
    with pytest.raises(error, match=text):
        bad.get_potential_energy()
    with pytest.raises(error, match=text):
        calculator.evaluate([molecule, bad])
    assert molecule.get_potential_energy() == energy


class Watched(dict):
    """An info that counts how often its charge is looked up."""

    looks = 0

    def get(self, key, default=None):
        self.looks += key == "charge"
        return super().get(key, default)


def test_charge_in_info_is_not_overlooked(calculator, molecule):
    molecule.calc = calculator
    neutral = {"charge": 0, "total_charge": np.array([0]), "multiplicity": 1, "uhf": 0}
    molecule.info.update(neutral, spin=1, total_spin=0.0, spin_multiplicity=1)
    molecule.set_initial_charges(np.ones(8))  # ignored, as is said
    energy = molecule.get_potential_energy()
    assert calculator.check_state(molecule) == []
    for charge in (1, [[1], [1, 2]], np.ma.masked):
        molecule.info["charge"] = charge
        assert calculator.check_state(molecule) == ["info"]
        with pytest.raises(StructureError, match="charge"):
            molecule.get_potential_energy()
        molecule.info["charge"] = 0
        assert molecule.get_potential_energy() == energy
    molecule.info = Watched(molecule.info)
    for looks in (1, 2, 3):
        molecule.get_forces()
        assert molecule.info.looks == looks
        molecule.rattle(1e-3, seed=looks)


def test_the_readme_states_the_signature():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    stated = re.search(r"`MLIPCalculator\(([^`]*)\)` gives", readme).group(1)
    parameters = inspect.signature(MLIPCalculator).parameters.values()
    actual = [f"{one.name}={one.default!r}".replace("'", '"') for one in parameters]
    assert " ".join(stated.split()) == ", ".join([actual[0], "*", *actual[1:]])
    assert {one.kind for one in parameters if one.name != "potential_or_path"} == {
        inspect.Parameter.KEYWORD_ONLY
    }


def test_construction(potential, molecule, tmp_path, calculator):
    path = tmp_path / "model.safetensors"
    own.save(potential, path)
    for name in (path, str(path)):
        assert MLIPCalculator(name).potential.sha256 == potential.sha256
    assert calculator.allowed_atomic_numbers == {1, 6, 7, 8}
    for nothing in (None, 123, [], b"organics-gfn2", "", calculator):
        with pytest.raises(ModelFileError, match=r"names no model; give .*organics-gfn2"):
            MLIPCalculator(nothing)
    with pytest.raises(ConfigError, match="device"):
        MLIPCalculator(potential, device="abacus")
    with pytest.raises(StructureError, match=r"atoms\.calc"):
        MLIPCalculator(potential).get_potential_energy()


def test_precision_has_two_names(potential):
    assert MLIPCalculator(potential).engine.dtype == "float32"
    for options in (
        {"dtype": "float64"},
        {"default_dtype": "float64"},
        {"dtype": "float64", "default_dtype": "float64"},
    ):
        assert MLIPCalculator(potential, **options).engine.dtype == "float64"
    for dtype, other in (("float64", "float32"), ("float32", "float64")):
        with pytest.raises(ConfigError, match="contradict"):
            MLIPCalculator(potential, dtype=dtype, default_dtype=other)
    for name in ("dtype", "default_dtype"):
        for wrong in ("float16", ""):
            with pytest.raises(ConfigError, match="dtype"):
                MLIPCalculator(potential, **{name: wrong})


def test_options_of_the_search_reach_the_engine(potential):
    assert MLIPCalculator(potential).engine.spec == Engine(potential).spec
    options = {"skin": 0.3, "backend": "cells", "capacity_margin": 1.4}
    calculator = MLIPCalculator(potential, **options)
    assert calculator.engine.spec == Engine(potential, **options).spec
    assert calculator.todict().items() >= options.items()
    for wrong in ({"skin": -1.0}, {"backend": "magic"}, {"capacity_margin": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MLIPCalculator(potential, **wrong)


def test_nothing_can_be_set(calculator):
    assert calculator.set() == {}
    for change in ({"dtype": "float64"}, {"device": "cpu", "label": "x"}):
        with pytest.raises(ConfigError, match=f"{', '.join(change)} cannot be set.*new one"):
            calculator.set(**change)
    assert not calculator.parameters


@pytest.mark.parametrize("name", ["molecule", "crystal"])
def test_hessian_is_the_derivative_of_the_forces(calculator, potential, name, request):
    atoms = request.getfixturevalue(name)
    hessian = calculator.get_hessian(atoms)
    assert hessian.shape == (24, 24)
    np.testing.assert_array_equal(hessian, hessian.T)
    moved, step = [], 1e-4
    for axis in range(5):
        for sign in (1, -1):
            moved.append(atoms.copy())
            moved[-1].positions.reshape(-1)[axis] += sign * step
    forces = [result["forces"].ravel() for result in calculator.evaluate(moved)]
    slopes = (np.array(forces[1::2]) - np.array(forces[::2])) / (2 * step)
    scale = np.abs(hessian).max()
    assert np.abs(hessian[:5] - slopes).max() < 1e-6 * scale
    # nothing changes where all atoms move together
    assert np.abs(hessian.reshape(24, 8, 3).sum(axis=1)).max() < 1e-10 * scale
    single = MLIPCalculator(potential).get_hessian(atoms)
    assert np.abs(single - hessian).max() < 1e-4 * scale


def test_hessian_refuses_what_energies_refuse(calculator, molecule):
    molecule.info["charge"] = 1
    with pytest.raises(StructureError, match="charge"):
        calculator.get_hessian(molecule)


def test_products_with_the_hessian(calculator, molecule):
    vectors = np.random.default_rng(5).normal(size=(3, 8, 3))
    arguments = molecule.positions, molecule.numbers
    products = calculator.engine.hessian_vector_products(*arguments, vectors)
    hessian = calculator.get_hessian(molecule)
    np.testing.assert_allclose(
        products.reshape(3, 24), vectors.reshape(3, 24) @ hessian, rtol=0, atol=1e-10
    )
    with pytest.raises(ConfigError, match=r"\(k, 8, 3\) is needed"):
        calculator.engine.hessian_vector_products(*arguments, vectors[0])
