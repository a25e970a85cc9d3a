"""What people attach ASE's calculator to: optimisers, dynamics, NEB, vibrations, phonons, files."""

import multiprocessing
import threading
from importlib.metadata import entry_points

import ase.db
import jax
import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.fd import calculate_numerical_stress
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.constraints import FixAtoms, FixBondLengths, FixCom
from ase.filters import FrechetCellFilter
from ase.io import Trajectory, read, write
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, NoseHooverChainNVT
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from ase.phonons import Phonons
from ase.vibrations import Vibrations
from pair_potential import pair_potential

from mlip_md.errors import StructureError
from mlip_md.integrations.ase import MLIPCalculator


@pytest.fixture(scope="module")
def potential():
    """Its atoms C bind at 4.3 Å: a tetrahedron of four, a face-centred crystal of a = 6.52 Å."""
    return pair_potential(cutoff=6.0, scaling_stdev=10.0)


@pytest.fixture(scope="module")
def calculator(potential):
    return MLIPCalculator(potential, dtype="float64")


@pytest.fixture
def cluster(calculator):
    """Four atoms, bound, not at rest."""
    tetrahedron = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    rng = np.random.default_rng(1)
    return Atoms("C3O", 1.5 * tetrahedron + rng.uniform(-0.2, 0.2, (4, 3)), calculator=calculator)


@pytest.fixture
def crystal(calculator):
    """Disordered atoms in a cell between one and two cutoffs thick."""
    atoms = bulk("C", "fcc", a=6.4, cubic=True) * (2, 1, 1)
    atoms.rattle(0.05, seed=2)
    atoms.calc = calculator
    return atoms


@pytest.mark.parametrize("optimizer", [BFGS, FIRE])
def test_relaxation_of_a_molecule(cluster, optimizer):
    energies = []
    relax = optimizer(cluster, logfile=None)
    relax.attach(lambda: energies.append(cluster.get_potential_energy()))
    assert relax.run(fmax=1e-4, steps=500)
    assert energies[-1] < energies[0] - 0.1
    # A minimum: every displacement costs energy.
    for seed in range(5):
        displaced = cluster.copy()
        displaced.calc = cluster.calc
        displaced.rattle(0.03, seed=seed)
        assert displaced.get_potential_energy() > energies[-1]


def test_relaxation_of_a_cell(crystal):
    volume = crystal.get_volume()
    assert BFGS(FrechetCellFilter(crystal), logfile=None).run(fmax=1e-4, steps=300)
    assert crystal.get_volume() / volume == pytest.approx((6.5236 / 6.4) ** 3, rel=1e-3)
    assert np.abs(calculate_numerical_stress(crystal, eps=1e-4)).max() < 1e-5


def start(atoms, temperature=300.0, seed=3):
    thermalize_momenta(atoms, temperature_K=temperature, rng=np.random.default_rng(seed))
    return atoms


def recorded(dynamics, quantity, steps):
    values = []
    dynamics.attach(lambda: values.append(quantity()))
    dynamics.run(steps)
    return np.array(values)


def test_newtonian_dynamics_conserve_energy_and_momentum(crystal):
    start(crystal)
    momentum = crystal.get_momenta().sum(axis=0)
    kinetic = crystal.get_kinetic_energy()
    dynamics = VelocityVerlet(crystal, 0.5 * units.fs)
    total = recorded(dynamics, crystal.get_total_energy, 200)
    assert np.ptp(total) < 1e-3 * kinetic
    assert abs(crystal.get_kinetic_energy() - kinetic) > 0.05 * kinetic
    np.testing.assert_allclose(crystal.get_momenta().sum(axis=0), momentum, atol=1e-9)


@pytest.mark.parametrize("name", ["nose-hoover", "isotropic", "anisotropic"])
def test_extended_systems_conserve_their_quantity(crystal, name):
    """Thermostat and barostat of Nosé-Hoover and MTK: forces, stress and sign fit together."""
    start(crystal)
    times = {"timestep": 0.5 * units.fs, "temperature_K": 300, "tdamp": 50 * units.fs}
    press = {"pressure_au": 0.01, "pdamp": 200 * units.fs}
    dynamics = {
        "nose-hoover": lambda: NoseHooverChainNVT(crystal, **times),
        "isotropic": lambda: IsotropicMTKNPT(crystal, **times, **press),
        "anisotropic": lambda: MTKNPT(crystal, **times, **press),
    }[name]()
    volume, energy = crystal.get_volume(), crystal.get_total_energy()
    conserved = recorded(dynamics, dynamics.get_conserved_energy, 300)
    assert abs(crystal.get_total_energy() - energy) > 0.02
    assert np.ptp(conserved) < 2e-3
    if name != "nose-hoover":
        assert abs(crystal.get_volume() / volume - 1) > 1e-3


def test_barostats_compile_a_handful_of_times(potential, crystal):
    calculator = MLIPCalculator(potential, dtype="float64")
    crystal.calc = calculator
    start(crystal)
    dynamics = MTKNPT(
        crystal, timestep=units.fs, temperature_K=300, tdamp=50 * units.fs, pressure_au=0.02,
        pdamp=100 * units.fs,
    )  # fmt: skip
    crystal.get_forces()
    before = calculator.engine.num_compilations
    volumes = recorded(dynamics, crystal.get_volume, 300)
    assert np.ptp(volumes) > 0.02 * volumes[0]
    assert calculator.engine.num_compilations - before <= 3


@pytest.mark.parametrize("thermostat", [Langevin, Bussi])
def test_thermostats_sample_the_canonical_distribution(calculator, thermostat):
    """Kinetic energy in mean and variance, and equipartition with the potential energy.

    Gates are 3.5 standard errors of 21 degrees of freedom, which forget their kinetic energy in
    4.5 steps and their potential energy in 40. Forces that are 20 % too small add 20 % to the
    potential energy.
    """
    crystal = bulk("C", "fcc", a=6.4, cubic=True) * (2, 1, 1)
    crystal.calc = calculator
    ground = crystal.get_potential_energy()
    crystal.rattle(0.05, seed=2)
    crystal.set_constraint(FixCom())
    options = {
        Langevin: {"friction": 0.1 / units.fs, "fixcm": False},
        Bussi: {"taut": 4 * units.fs},
    }
    start(crystal, temperature=100)
    dynamics = thermostat(
        crystal,
        2 * units.fs,
        temperature_K=400,
        rng=np.random.default_rng(0),
        **options[thermostat],
    )
    quantities = recorded(
        dynamics, lambda: (crystal.get_kinetic_energy(), crystal.get_potential_energy()), 2700
    )[200:]
    kinetic, potential = (quantities - [0.0, ground]).T / (0.5 * units.kB * 400)
    assert kinetic.mean() == pytest.approx(21, rel=0.05)
    assert kinetic.var() == pytest.approx(2 * 21, rel=0.25)
    assert potential.mean() == pytest.approx(21, rel=0.14)


def test_nudged_elastic_band_with_one_calculator(calculator):
    """An atom passes through a triangle, from one side to the other."""
    triangle = 2.5 * np.array([[1, 0, 0], [-0.5, 0.866, 0], [-0.5, -0.866, 0]])
    ends = []
    for side in (2.5, -2.5):
        atoms = Atoms("C4", [*triangle, [0, 0, side]], calculator=calculator)
        assert BFGS(atoms, logfile=None).run(fmax=0.01, steps=300)
        ends.append(atoms)
    forces = []
    for shared in (True, False):
        images = [ends[0].copy(), *(ends[0].copy() for _ in range(3)), ends[1].copy()]
        for image in images:
            own = MLIPCalculator(calculator.potential, dtype="float64")
            image.calc = calculator if shared else own
        band = NEB(images, k=0.5, method="improvedtangent", allow_shared_calculator=shared)
        band.interpolate()
        forces.append(band.get_forces())
    np.testing.assert_allclose(*forces, atol=1e-10)
    assert BFGS(band, logfile=None).run(fmax=0.1, steps=200)
    energies = [image.get_potential_energy() for image in images]
    assert energies[2] > max(energies[0], energies[-1]) + 0.2
    assert energies[0] == pytest.approx(energies[-1], abs=1e-3)


def test_vibrations(calculator, cluster, tmp_path):
    cluster.symbols = "C4"
    BFGS(cluster, logfile=None).run(fmax=1e-5, steps=500)
    vibrations = Vibrations(cluster, name=str(tmp_path / "vib"), delta=0.005)
    vibrations.run()
    frequencies = vibrations.get_frequencies()
    assert np.abs(frequencies[:6]).max() < 1.0  # translations and rotations
    found = frequencies[6:].real
    # A tetrahedron vibrates in representations of dimension 2, 3 and 1.
    np.testing.assert_allclose(found, np.repeat(found[[0, 2, 5]], [2, 3, 1]), rtol=1e-2)
    assert found[0] > 100
    assert (np.diff(found[[0, 2, 5]]) > 50).all()


def test_phonons(calculator, tmp_path):
    atoms = bulk("C", "fcc", a=6.5236)
    phonons = Phonons(atoms, calculator, supercell=(3, 3, 3), delta=0.01, name=str(tmp_path / "ph"))
    phonons.run()
    phonons.read(acoustic=False)  # the forces themselves must know that sound is soft
    zero, edge = phonons.band_structure([[0, 0, 0], [0.5, 0, 0.5]])
    assert np.abs(zero).max() < 0.02 * edge.max()
    assert edge.min() > 0.005


def test_constraints(cluster):
    cluster.set_constraint(FixAtoms([0, 1]))
    assert np.abs(cluster.get_forces(apply_constraint=False)[:2]).max() > 0.1
    before = cluster.positions[:2].copy()
    BFGS(cluster, logfile=None).run(fmax=0.01, steps=200)
    np.testing.assert_array_equal(cluster.positions[:2], before)
    cluster.set_constraint([FixBondLengths([[0, 1]]), FixCom()])
    center, length = cluster.get_center_of_mass(), cluster.get_distance(0, 1)
    start(cluster)
    Langevin(
        cluster, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, fixcm=False,
        rng=np.random.default_rng(0),
    ).run(20)  # fmt: skip
    assert cluster.get_distance(0, 1) == pytest.approx(length, abs=1e-6)
    np.testing.assert_allclose(cluster.get_center_of_mass(), center, atol=1e-8)


def test_sums_of_calculators(crystal, calculator):
    parts = [calculator, LennardJones(sigma=2.0, epsilon=0.1, rc=4.0, smooth=True)]
    sums = {name: 0.0 for name in ("energy", "forces", "stress")}
    for part in parts:
        crystal.calc = part
        sums["energy"] += crystal.get_potential_energy()
        sums["forces"] = sums["forces"] + crystal.get_forces()
        sums["stress"] = sums["stress"] + crystal.get_stress()
    crystal.calc = SumCalculator(parts)
    assert crystal.get_potential_energy() == pytest.approx(sums["energy"], rel=1e-12)
    np.testing.assert_allclose(crystal.get_forces(), sums["forces"], atol=1e-12)
    np.testing.assert_allclose(crystal.get_stress(), sums["stress"], atol=1e-12)


def test_files_keep_results(crystal, tmp_path):
    energy, forces = crystal.get_potential_energy(), crystal.get_forces()
    stress = crystal.get_stress()
    with Trajectory(tmp_path / "a.traj", "w", crystal) as trajectory:
        trajectory.write()
    write(tmp_path / "a.extxyz", crystal)
    with ase.db.connect(tmp_path / "a.db") as database:
        database.write(crystal)
    saved = [read(tmp_path / name) for name in ("a.traj", "a.extxyz")]
    saved.append(ase.db.connect(tmp_path / "a.db").get_atoms(1))
    for atoms in saved:
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-8)
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-7)
        np.testing.assert_allclose(atoms.get_stress(), stress, atol=1e-7)


def fresh(atoms, potential):
    """Energy and forces from a calculator that saw nothing before."""
    copied = atoms.copy()
    copied.calc = MLIPCalculator(potential, dtype="float64")
    return copied.get_potential_energy(), copied.get_forces()


def same(atoms, potential):
    energy, forces = fresh(atoms, potential)
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-10)
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-10)


def test_whatever_changes_between_calls(crystal, cluster, potential):
    """Two structures in turn, other elements, periodicity, wrapping, atoms added and removed."""
    energies = []
    for turn in range(3):
        for atoms in (crystal, cluster):
            atoms.rattle(0.01, seed=turn)
            same(atoms, potential)
    for change in (
        lambda a: a.numbers.__setitem__(0, 8),
        lambda a: setattr(a, "pbc", (True, False, True)),
        lambda a: a.positions.__iadd__(3 * a.cell[0]),
        lambda a: a.wrap(),
        lambda a: a.append("H"),
        lambda a: a.__delitem__(slice(2, 4)),
        lambda a: a.set_cell(1.05 * a.cell, scale_atoms=True),
    ):
        change(crystal)
        if crystal.symbols[-1] == "H":
            crystal.positions[-1] = crystal.positions[0] + [0.6, 0.7, 0.6]
        same(crystal, potential)
        energies.append(crystal.get_potential_energy())
    assert np.ptp(energies) > 1


def traced_only(engine, monkeypatch):
    """Let an engine trace what it would compile: counted the same, in a tenth of the time."""
    compiled = engine.runtime.step

    def zeros(*arguments):
        shapes = compiled.eval_shape(*arguments)
        return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)

    monkeypatch.setattr(engine.runtime, "step", zeros)


def test_compilations_grow_with_the_logarithm(monkeypatch):
    """Systems of 239 sizes up to 1000 atoms that grow, shrink and jump.

    A new shape for every ten atoms would be 119 compilations.
    """
    calculator = MLIPCalculator(pair_potential(cutoff=3.0, info={"test": "compilations"}))
    traced_only(calculator.engine, monkeypatch)
    sites = np.stack(np.meshgrid(*[np.arange(10.0)] * 3), axis=-1).reshape(-1, 3) * 2.2
    sizes = np.unique(np.geomspace(2, 1000, 400).astype(int))
    assert len(sizes) == 239

    def compilations(sizes):
        for size in sizes:
            Atoms(f"C{size}", sites[:size], calculator=calculator).get_forces()
        return calculator.engine.num_compilations

    growing = compilations(sizes)
    assert 10 < growing <= 5 * np.log2(1000)
    rng = np.random.default_rng(0)
    assert compilations([*sizes[::-1], *rng.permutation(sizes)]) <= growing + 2


def in_process(calculator, positions):
    return Atoms("C3O", positions, calculator=calculator).get_forces()


def test_processes_and_threads(cluster, calculator, potential):
    forces = cluster.get_forces()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = pool.apply(in_process, (calculator, cluster.positions))
    np.testing.assert_allclose(elsewhere, forces, atol=1e-12)
    found = {}

    def work(index):
        own = MLIPCalculator(potential, dtype="float64")
        for turn in range(5):
            atoms = Atoms("C3O", cluster.positions * (1 + 0.01 * index), calculator=own)
            atoms.rattle(0.01, seed=turn)
            found[index, turn] = atoms.get_forces()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (index, turn), result in found.items():
        atoms = Atoms("C3O", cluster.positions * (1 + 0.01 * index), calculator=calculator)
        atoms.rattle(0.01, seed=turn)
        np.testing.assert_allclose(result, atoms.get_forces(), atol=1e-12)
    assert len(found) == 20


def test_one_atom_and_the_properties_ase_asks_for(calculator, potential):
    atom = Atoms("O", calculator=calculator)
    assert atom.get_potential_energy(force_consistent=True) == atom.get_potential_energy()
    assert atom.get_potential_energies().sum() == atom.get_potential_energy()
    assert type(calculator.results["free_energy"]) is float
    np.testing.assert_array_equal(atom.get_forces(), np.zeros((1, 3)))
    with pytest.raises(PropertyNotImplementedError):
        atom.get_stress()
    atom.set_cell([3, 3, 3])  # a volume, though nothing is periodic
    assert atom.get_stress().shape == (6,)
    alone = atom.get_potential_energy()
    atom.pbc = True
    assert atom.get_potential_energy() != alone
    exported = calculator.export_properties()
    assert exported["energy"] == calculator.results["energy"]
    assert exported["energies"].shape == (1,)
    assert set(calculator.calculate_properties(atom, ["energy", "forces"])) >= {"energy", "forces"}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(crystal, value):
    crystal.get_forces()
    broken = crystal.copy()
    broken.calc = crystal.calc
    broken.positions[3, 1] = value
    with pytest.raises(StructureError, match=r"first atom 3"):
        broken.get_forces()
    broken = crystal.copy()
    broken.calc = crystal.calc
    broken.cell[1, 1] = value
    with pytest.raises(StructureError, match="cell"):
        broken.get_stress()
    with pytest.raises(StructureError):
        broken.get_stress()  # the failure is not remembered as a result


def test_ase_finds_the_calculator():
    plugins = pytest.importorskip("ase._4.plugins.plugin_collection")
    if not any(e.name == "mlip-md" for e in entry_points(group="ase.plugins")):
        pytest.skip("the package is not installed")
    found = plugins.PluginCollection.from_entry_points()
    mine = [p for p in found.calculators if p.name == "mlip-md"]
    assert len(mine) == 1
    assert mine[0].implementation is MLIPCalculator
    assert "mlip-md" in found.display()
