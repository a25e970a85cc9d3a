"""Minutes of dynamics: energy drift, and the canonical distribution of the bundled potential."""

import dataclasses

import numpy as np
import pytest
import test_physics as physics
from ase import units
from ase.build import molecule
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS

from mlip_md.integrations.ase import MLIPCalculator

pytestmark = pytest.mark.slow

TEMPERATURE = 300.0  # K


class Swirling(MLIPCalculator):
    """The potential and a weak field that has no energy: what a wrong gradient looks like."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        super().calculate(atoms, properties, system_changes)
        swirl = np.cross([0.0, 0.0, 0.02], self.atoms.positions)
        self.results["forces"] = self.results["forces"] + swirl


def methanol(calculator):
    """A rested molecule without net momentum, at the temperature of the tests after a while."""
    atoms = molecule("CH3OH", calculator=calculator)
    rng = np.random.default_rng(7)
    kick(atoms, 2 * TEMPERATURE, rng)
    Langevin(
        atoms, 0.5 * units.fs, temperature_K=TEMPERATURE, friction=0.05 / units.fs,
        fixcm=False, rng=rng,
    ).run(1000)  # fmt: skip
    stop_the_center(atoms)
    return atoms


def kick(atoms, temperature, rng):
    widths = np.sqrt(units.kB * temperature * atoms.get_masses())[:, None]
    atoms.set_momenta(widths * rng.normal(size=(len(atoms), 3)))


def stop_the_center(atoms):
    momenta, masses = atoms.get_momenta(), atoms.get_masses()[:, None]
    atoms.set_momenta(momenta - masses * momenta.sum(axis=0) / masses.sum())


def in_a_minimum(name, dtype):
    """Atoms in a minimum of a random network's energy, which at 10 K they do not leave.

    Elsewhere there are holes without bottom; NequIP is made weaker lest it has no such minimum.
    """
    atoms = {"mace": physics.pair, "nequip": physics.molecule}[name]()
    potential, factor = physics.potential(name), {"mace": 1.0, "nequip": 0.75}[name]
    params = physics.strengthened(potential.params, factor)
    atoms.calc = MLIPCalculator(dataclasses.replace(potential, params=params), dtype=dtype)
    atoms.set_masses(len(atoms) * [12.0])
    assert BFGS(atoms, logfile=None, maxstep=0.05).run(fmax=0.005, steps=600)
    kick(atoms, 20.0, np.random.default_rng(7))  # half of it becomes potential energy
    stop_the_center(atoms)
    return atoms


def drift(atoms, picoseconds=10.0, timestep=0.5):
    """Slope of the total energy in meV/atom/ps, and it over the time in deviations of E_kin."""
    total, kinetic = [], []
    dynamics = VelocityVerlet(atoms, timestep * units.fs)

    def record():
        kinetic.append(atoms.get_kinetic_energy())
        total.append(atoms.get_potential_energy() + kinetic[-1])

    dynamics.attach(record, interval=5)
    dynamics.run(round(1000 * picoseconds / timestep))
    times = np.arange(len(total)) * 5 * timestep / 1000
    slope = np.polyfit(times, total, 1)[0]
    return 1000 * slope / len(atoms), abs(slope) * picoseconds / np.std(kinetic)


LIMITS = {"float64": 0.01, "float32": 0.1}
"""meV/atom/ps"""


def check_drift(atoms, dtype, record_property, **options):
    slope, relative = drift(atoms, **options)
    record_property("meV/atom/ps", float(slope))
    record_property("in deviations of the kinetic energy", float(relative))
    assert abs(slope) < LIMITS[dtype]
    assert relative < 1.0


@pytest.mark.parametrize(("dtype", "picoseconds"), [("float64", 10.0), ("float32", 50.0)])
def test_energy_does_not_drift(dtype, picoseconds, record_property):
    atoms = methanol(MLIPCalculator("organics-gfn2", dtype=dtype))
    check_drift(atoms, dtype, record_property, picoseconds=picoseconds)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", ["mace", "nequip"])
def test_energy_of_random_networks_does_not_drift(name, dtype, record_property):
    atoms = in_a_minimum(name, dtype)
    start = atoms.get_all_distances()
    check_drift(atoms, dtype, record_property)
    assert np.abs(atoms.get_all_distances() - start).max() < 0.5, "the minimum was left"


def test_a_force_without_energy_drifts():
    swirling = methanol(Swirling("organics-gfn2", dtype="float64"))
    slope, _ = drift(swirling, picoseconds=2.0)
    assert abs(slope) > 0.1


@pytest.mark.parametrize("dtype", LIMITS)
def test_temperature_distribution(dtype, record_property):
    """Kinetic energy of the canonical ensemble: mean f/2 kT, variance f/2 (kT)², f = 3N."""
    atoms = methanol(MLIPCalculator("organics-gfn2", dtype=dtype))
    dynamics = Langevin(
        atoms, 0.5 * units.fs, temperature_K=TEMPERATURE, friction=0.05 / units.fs,
        fixcm=False, rng=np.random.default_rng(8),
    )  # fmt: skip
    kinetic = []
    dynamics.attach(lambda: kinetic.append(atoms.get_kinetic_energy()), interval=20)
    dynamics.run(80_000)
    freedom, kT = 3 * len(atoms), units.kB * TEMPERATURE
    mean, variance = np.mean(kinetic) / (freedom / 2 * kT), np.var(kinetic) / (freedom / 2 * kT**2)
    record_property("mean", float(mean))
    record_property("variance", float(variance))
    assert mean == pytest.approx(1.0, abs=0.01)
    assert variance == pytest.approx(1.0, abs=0.1)
