"""Minutes of dynamics with the bundled potential: energy drift and the canonical distribution."""

import numpy as np
import pytest
from ase import units
from ase.build import molecule
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet

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
    masses = atoms.get_masses()[:, None]
    atoms.set_momenta(np.sqrt(2 * units.kB * TEMPERATURE * masses) * rng.normal(size=(6, 3)))
    Langevin(
        atoms, 0.5 * units.fs, temperature_K=TEMPERATURE, friction=0.05 / units.fs,
        fixcm=False, rng=rng,
    ).run(1000)  # fmt: skip
    momenta = atoms.get_momenta()
    atoms.set_momenta(momenta - masses * momenta.sum(axis=0) / masses.sum())
    return atoms


def drift(calculator, picoseconds=10.0, timestep=0.5):
    """Slope of the total energy in meV/atom/ps, and it over the time in deviations of E_kin."""
    atoms = methanol(calculator)
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


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 0.01), ("float32", 0.1)])
def test_energy_does_not_drift(dtype, limit, record_property):
    slope, relative = drift(MLIPCalculator("organics-gfn2", dtype=dtype))
    record_property("meV/atom/ps", float(slope))
    assert abs(slope) < limit
    assert relative < 1.0


def test_a_force_without_energy_drifts():
    slope, _ = drift(Swirling("organics-gfn2", dtype="float64"), picoseconds=2.0)
    assert abs(slope) > 0.1


def test_temperature_distribution(record_property):
    """Kinetic energy of the canonical ensemble: mean f/2 kT, variance f/2 (kT)², f = 3N."""
    atoms = methanol(MLIPCalculator("organics-gfn2"))
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
