"""Bounded minimization: lower, never far, constraints and virtual sites kept, no more touched."""

import numpy as np
import openmm
import pytest
from openmm import app, unit

from mlip_md.errors import ConfigError
from mlip_md.integrations.openmm_calls import ADVICE
from mlip_md.integrations.openmm_minimize import MAX_STEP, minimize


def make_context(system, positions, platform="Reference"):
    platform = openmm.Platform.getPlatformByName(platform)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(positions)
    return context


def positions_of(context):
    return context.getState(positions=True).getPositions(asNumpy=True)._value


def energy_of(context):
    return context.getState(energy=True).getPotentialEnergy()._value


def dimer(energy, length):
    """Two particles with an energy (kJ/mol) of their distance r (nm)."""
    system = openmm.System()
    force = openmm.CustomBondForce(energy)
    for _ in range(2):
        system.addParticle(12.0)
    force.addBond(0, 1)
    system.addForce(force)
    return make_context(system, [[0, 0, 0], [length, 0, 0]])


def distance(context):
    first, second = positions_of(context)
    return float(np.linalg.norm(second - first))


SHALLOW = "100000*(r-0.12)^2*exp(-((r-0.12)/0.06)^2) - 300*step(r-0.3)"
"""A bond at 0.12 nm, with an energy that is lower where there is none."""


def test_a_bond_stays_where_openmm_breaks_it():
    ours, openmms = dimer(SHALLOW, 0.14), dimer(SHALLOW, 0.14)
    result = minimize(ours, tolerance=0.1)
    assert result.converged
    assert distance(ours) == pytest.approx(0.12, abs=1e-5)
    openmm.LocalEnergyMinimizer.minimize(openmms, 0.1)
    assert distance(openmms) > 0.3, "OpenMM's minimizer has learnt it; this module may go"


def test_no_atom_moves_farther_than_the_bound():
    context = dimer("-1e6*r", 0.1)
    minimize(context, maxIterations=1)
    before, after = np.array([[0, 0, 0], [0.1, 0, 0]]), positions_of(context)
    moved = np.linalg.norm(after - before, axis=1)
    np.testing.assert_allclose(moved, MAX_STEP, rtol=1e-6)
    minimize(context, maxIterations=1, maxStep=0.5 * unit.angstrom)
    np.testing.assert_allclose(np.linalg.norm(positions_of(context) - after, axis=1), 0.05)


def water_box(name):
    """Some waters of a rigid model, shaken."""
    forcefield = app.ForceField(f"{name}.xml")
    modeller = app.Modeller(app.Topology(), [])
    modeller.addSolvent(forcefield, model=name, boxSize=openmm.Vec3(2.1, 2.1, 2.1))
    system = forcefield.createSystem(
        modeller.topology, nonbondedMethod=app.PME, nonbondedCutoff=0.9
    )
    shaken = np.array(modeller.positions.value_in_unit(unit.nanometer))
    # Whole molecules: constraints are not to be violated by more than they can be drawn back.
    size = sum(1 for _ in next(modeller.topology.residues()).atoms())
    shaken += (
        np.random.default_rng(0)
        .normal(scale=0.02, size=(len(shaken) // size, 3))
        .repeat(size, axis=0)
    )
    return make_context(system, shaken, "CPU")


@pytest.mark.parametrize("name", ["tip3p", "tip4pew"])
def test_rigid_water_with_constraints_and_virtual_sites(name):
    ours, openmms = water_box(name), water_box(name)
    ours.setVelocitiesToTemperature(300, 1)
    velocities = ours.getState(velocities=True).getVelocities(asNumpy=True)._value
    start = energy_of(ours)
    result = minimize(ours, tolerance=100.0)
    assert result.converged
    assert result.energy == pytest.approx(energy_of(ours), abs=1e-3)
    openmm.LocalEnergyMinimizer.minimize(openmms, 100.0)
    drop = start - energy_of(openmms)
    assert start - result.energy > 0.7 * drop > 0
    system, positions = ours.getSystem(), positions_of(ours)
    for k in range(system.getNumConstraints()):
        i, j, length = system.getConstraintParameters(k)
        assert np.linalg.norm(positions[i] - positions[j]) == pytest.approx(length._value, abs=1e-5)
    ours.computeVirtualSites()
    np.testing.assert_allclose(positions_of(ours), positions, atol=1e-9)
    np.testing.assert_array_equal(
        ours.getState(velocities=True).getVelocities(asNumpy=True)._value, velocities
    )


def test_particles_without_mass_stay():
    context = dimer("1000*(r-0.1)^2", 0.15)
    context.getSystem().setParticleMass(0, 0.0)
    context.reinitialize(preserveState=True)
    assert minimize(context, tolerance=1e-3).converged
    np.testing.assert_allclose(positions_of(context), [[0, 0, 0], [0.1, 0, 0]], atol=1e-6)


def test_it_says_when_it_has_not_converged():
    result = minimize(dimer("1000*(r-0.1)^2", 5.0), maxIterations=3)
    assert not result.converged
    assert result.iterations == 3
    assert result.rms_force > 10


def test_a_minimum_stays_as_it_is():
    context = dimer("1000*(r-0.1)^2", 0.1)
    assert minimize(context).iterations == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tolerance", 0),
        ("tolerance", float("nan")),
        ("tolerance", 1 * unit.kelvin),
        ("maxStep", -1),
        ("maxStep", "far"),
        ("maxIterations", -1),
        ("maxIterations", 1.5),
    ],
)
def test_numbers_that_are_not_allowed(name, value):
    with pytest.raises(ConfigError, match=name):
        minimize(dimer("r", 0.1), **{name: value})


def test_it_is_what_the_integration_offers():
    from mlip_md.integrations.openmm import minimize as public

    assert public is minimize


def test_nobody_who_minimizes_is_told_to_minimize():
    """The force's advice is for simulations; its other words come through."""
    context = dimer("r", 0.1)

    class Fails(openmm.Context):
        def getState(self, **what):  # noqa: N802
            if "forces" in what:
                raise openmm.OpenMMException(f"the reason\n{ADVICE}")
            return super().getState(**what)

    context.__class__ = Fails
    with pytest.raises(openmm.OpenMMException) as caught:
        minimize(context)
    assert str(caught.value) == "the reason"
