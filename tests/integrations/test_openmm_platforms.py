"""On every OpenMM platform: the numbers of OpenMM-ML's own route through ASE, barostats, faults."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import openmm
import openmm.app
import pytest
from openmm import unit
from openmm_cases import (
    EV,
    PLATFORMS,
    crystal_atoms,
    energy_and_forces,
    molecule_atoms,
    platform_or_skip,
    topology_of,
)
from openmmml import MLPotential
from small_models import random_mace

from mlip_md.errors import ConfigError
from mlip_md.formats import own
from mlip_md.integrations import openmm_force
from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.md import MDSettings, files, report, run_md
from mlip_md.integrations.openmm import MLIPPotentialImpl
from mlip_md.integrations.openmm_force import share_potential

PEPTIDE = Path(__file__).parents[2] / "examples" / "alanine_dipeptide.pdb"


@pytest.fixture(scope="module", params=PLATFORMS)
def platform(request):
    return platform_or_skip(request.param)


@pytest.fixture(scope="module")
def potential():
    # Without reference energies: they would hide differences of the interaction.
    return dataclasses.replace(random_mace(strength=20.0), atomic_energies=np.zeros(4))


@pytest.fixture(scope="module")
def model(potential, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    own.save(potential, path)
    return str(path)


@pytest.fixture(scope="module")
def peptide():
    """Topology, positions (nm) and force-field System of a peptide in water, 340 atoms."""
    pdb = openmm.app.PDBFile(str(PEPTIDE))
    field = openmm.app.ForceField("amber14-all.xml", "amber14/tip3p.xml")
    modeller = openmm.app.Modeller(pdb.topology, pdb.positions)
    modeller.addSolvent(field, boxSize=openmm.Vec3(1.6, 1.6, 1.6))
    system = field.createSystem(
        modeller.topology,
        nonbondedMethod=openmm.app.PME,
        nonbondedCutoff=0.7,
        constraints=openmm.app.HBonds,
    )
    positions = np.array(modeller.positions.value_in_unit(unit.nanometer))
    # Far from the origin, the last water by other lattice vectors than the rest.
    positions += [3.2, -4.8, 1.6]
    positions[-3:] += [1.6, 0, -3.2]
    return modeller.topology, positions, system


def context_of(system, positions, platform):
    """A Context in the platform's highest precision, so that only ours could be too low."""
    names = platform.getPropertyNames()
    properties = {"Precision": "double"} if "Precision" in names else {}
    integrator = openmm.VerletIntegrator(0.0005)
    context = openmm.Context(system, integrator, platform, properties)
    context.setPositions(positions)
    context.computeVirtualSites()
    return context


def assert_same(one, other):
    """Energies to 1e-6, forces to 1e-5 of the largest."""
    assert np.abs(one[1]).max() > 0.1
    np.testing.assert_allclose(one[0], other[0], rtol=1e-6)
    np.testing.assert_allclose(one[1], other[1], rtol=1e-5, atol=1e-5 * np.abs(one[1]).max())


@pytest.mark.parametrize("make", [molecule_atoms, crystal_atoms])
def test_pure_system_equals_the_ase_route(platform, model, potential, make):
    atoms = make()
    topology = topology_of(atoms)
    system = MLPotential("mlip-md", modelPath=model).createSystem(topology)
    reference = MLPotential("ase").createSystem(topology, calculator=MLIPCalculator(potential))
    one, other = (context_of(s, atoms.positions / 10, platform) for s in (system, reference))
    assert system.usesPeriodicBoundaryConditions() == atoms.pbc.all()
    assert_same(energy_and_forces(one), energy_and_forces(other))
    # OpenMM's numbers are those of ASE itself: units and signs.
    atoms.calc = MLIPCalculator(potential)
    assert_same(energy_and_forces(one), (atoms.get_potential_energy(), atoms.get_forces()))
    # Any atom may be any number of boxes away; GPU platforms fold some of them back.
    if atoms.pbc.all():
        shifts = np.random.default_rng(1).integers(-5, 6, (len(atoms), 3)) @ atoms.cell.array
        one.setPositions((atoms.positions + shifts) / 10)
        assert_same(energy_and_forces(one), energy_and_forces(other))


def test_mixed_system_equals_the_ase_route(platform, model, potential, peptide):
    """A whole peptide; its side chain with a link atom and a water; a link atom further out."""
    topology, positions, mm = peptide
    index = {atom.name: atom.index for atom in list(topology.atoms())[:22]}
    side_chain = [index[name] for name in ("CB", "HB1", "HB2", "HB3")]
    far = {"linkAtomDistances": [(index["CB"], index["CA"], 1.3 * unit.angstrom)]}
    for atoms, link in ((range(22), {}), ([*side_chain, 337, 338, 339], {}), (side_chain, far)):
        contexts = []
        for name, keywords, options in (
            ("mlip-md", {"modelPath": model}, {}),
            ("ase", {}, {"calculator": MLIPCalculator(potential), "mlLongRange": False}),
        ):
            info = MLPotential(name, **keywords).createMixedSystem(
                topology, mm, atoms, returnInfo=True, **options, **link
            )
            full = np.zeros((info["system"].getNumParticles(), 3))
            full[info["oldToNew"]] = positions
            contexts.append(context_of(info["system"], full, platform))
        assert len(full) == len(positions) + (len(atoms) < 22)
        inside = set(atoms)
        outside = [
            index
            for index in range(mm.getNumConstraints())
            if not inside.issuperset(mm.getConstraintParameters(index)[:2])
        ]
        assert info["system"].getNumConstraints() == len(outside) < mm.getNumConstraints()
        one, other = map(energy_and_forces, contexts)
        assert_same(one, other)
        ml = np.linalg.norm(one[1][list(atoms)], axis=1)
        assert ml.max() > 0.1


def test_interpolation(platform, model, peptide):
    """λ = 0 is the force field, λ = 1 the mixed System, between them a straight line."""
    topology, positions, mm = peptide
    ml = MLPotential("mlip-md", modelPath=model)
    mixed = ml.createMixedSystem(topology, mm, range(22), removeConstraints=False)
    blend = ml.createMixedSystem(topology, mm, range(22), removeConstraints=False, interpolate=True)
    ends = [energy_and_forces(context_of(s, positions, platform)) for s in (mm, mixed)]
    context = context_of(blend, positions, platform)
    for fraction in (0.0, 1.0, 0.25):
        context.setParameter("lambda_interpolate", fraction)
        expected = [(1 - fraction) * a + fraction * b for a, b in zip(*ends, strict=True)]
        assert_same(energy_and_forces(context), expected)
    assert abs(ends[1][0] - ends[0][0]) > 1e-3 * abs(ends[0][0])
    again = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(blend))
    restored = context_of(again, positions, platform)
    restored.setParameter("lambda_interpolate", 0.25)
    assert_same(energy_and_forces(restored), energy_and_forces(context))


@pytest.mark.parametrize("interpolate", [False, True])
def test_periodic_system_with_a_topology_without_box(platform, model, peptide, interpolate):
    """The force is periodic all the same: a water split over the boundary is whole to it."""
    topology, positions, mm = peptide
    ml = MLPotential("mlip-md", modelPath=model)
    water = [337, 338, 339]
    results = []
    for box in (topology.getPeriodicBoxVectors(), None):
        bare = openmm.app.Modeller(topology, positions * unit.nanometer).topology
        bare.setPeriodicBoxVectors(box)
        system = ml.createMixedSystem(bare, mm, water, interpolate=interpolate)
        moved = positions.copy()
        moved[338] += [0, 3.2, -1.6]
        if box is None:
            positions = moved
        results.append(energy_and_forces(context_of(system, positions, platform)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-6)
    np.testing.assert_allclose(results[0][1][water], results[1][1][water], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("interpolate", [False, True])
def test_molecules_of_a_mixed_system(model, peptide, interpolate):
    """Embedding removes the bonds of the ML part; bonds without strength keep it a molecule."""
    topology, positions, mm = peptide
    ml = MLPotential("mlip-md", modelPath=model)
    counts, energies = [], []
    for bonds in (False, True):
        system = ml.createMixedSystem(
            topology, mm, range(22), interpolate=interpolate, moleculeBonds=bonds
        )
        context = context_of(system, positions, openmm.Platform.getPlatformByName("Reference"))
        counts.append(len(context.getMolecules()))
        energies.append(energy_and_forces(context)[0])
    molecules = topology.getNumResidues() - 2
    assert counts == [molecules if interpolate else molecules + 21, molecules]
    assert energies[0] == energies[1]


def test_non_periodic_part_of_a_periodic_system_is_refused(model, peptide):
    """OpenMM 8.6 hands such a force wrong positions."""
    topology, _, mm = peptide
    ml = MLPotential("mlip-md", modelPath=model)
    for interpolate in (False, True):
        with pytest.raises(ConfigError, match="scattered"):
            ml.createMixedSystem(topology, mm, range(22), interpolate=interpolate, periodic=False)
    bare = topology_of(molecule_atoms())
    with pytest.raises(ConfigError, match="periodic=True or periodic=False"):
        MLIPPotentialImpl("mlip-md", model).addForces(bare, openmm.System(), range(8), 0)


def test_nan_forces_stop_the_simulation(platform, model, monkeypatch):
    """GPU platforms turn NaN into large numbers and would go on."""
    atoms = molecule_atoms()
    system = MLPotential("mlip-md", modelPath=model).createSystem(topology_of(atoms))
    context = context_of(system, atoms.positions / 10, platform)
    context.getIntegrator().step(3)
    evaluate = openmm_force.Engine.evaluate

    def broken(self, *structure):
        result = evaluate(self, *structure)
        forces = result.forces.copy()
        forces[5, 1] = np.nan
        return dataclasses.replace(result, forces=forces)

    monkeypatch.setattr(openmm_force.Engine, "evaluate", broken)
    with pytest.raises(openmm.OpenMMException, match=r"step \d: NonFiniteError.*\[5\]"):
        context.getIntegrator().step(3)


def test_barostats_and_compilations(platform, model):
    """All three barostats change the box; a box that changes is no reason to compile again."""
    atoms = crystal_atoms()
    topology = topology_of(atoms)
    pressure, each = 20000 * unit.bar, openmm.Vec3(20000, 20000, 20000) * unit.bar
    for barostat in (
        openmm.MonteCarloBarostat(pressure, 300, 5),
        openmm.MonteCarloAnisotropicBarostat(each, 300, True, True, True, 5),
        openmm.MonteCarloFlexibleBarostat(pressure, 300, 5),
    ):
        system = MLPotential("mlip-md", modelPath=model).createSystem(topology, precision="double")
        system.addForce(barostat)
        engine = open_engine(model, "float64")
        context = context_of(system, atoms.positions / 10, platform)
        energy_and_forces(context)
        compiled = engine.num_compilations
        volumes = []
        for _ in range(10):
            context.getIntegrator().step(20)
            volumes.append(context.getState().getPeriodicBoxVolume()._value)
        assert len(set(volumes)) > 3
        # What is left after many moves is what a new Context says of the same box.
        state = context.getState(positions=True)
        fresh = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
        fresh.setPeriodicBoxVectors(*state.getPeriodicBoxVectors())
        fresh.setPositions(state.getPositions())
        # In float64: of the energies in float32, sums in the order of two lists, 1e-6 is the noise.
        assert_same(energy_and_forces(context), energy_and_forces(fresh))
        assert engine.num_compilations - compiled <= 5


def open_engine(model, dtype="float32"):
    return openmm_force.Engine(share_potential(model), dtype)


def test_pressure_is_that_of_the_stress(platform, model, potential):
    atoms = crystal_atoms()
    system = MLPotential("mlip-md", modelPath=model).createSystem(
        topology_of(atoms), precision="double"
    )
    barostat = openmm.MonteCarloBarostat(1.0, 300, 5)
    system.addForce(barostat)
    context = context_of(system, atoms.positions / 10, platform)
    pressure = barostat.computeCurrentPressure(context).value_in_unit(unit.bar)
    atoms.calc = MLIPCalculator(potential, dtype="float64")
    expected = -atoms.get_stress()[:3].mean() * EV * 1e6 / 6.02214076e23 * 1e24 * 1e-2
    np.testing.assert_allclose(pressure, expected, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["single", "double"])
@pytest.mark.parametrize("name", ["molecule", "water"])
def test_ten_thousand_steps_keep_the_energy(name, precision, tmp_path):
    """Drift of NVE with the bundled potential: 0.1 and 0.01 meV/atom/ps."""
    structure = None
    if name == "water":
        structure = water_file(tmp_path)
    settings = MDSettings(
        structure=structure, engine="openmm", ensemble="nve", steps=10_000, precision=precision,
        platform="CPU",
    )  # fmt: skip
    folder = run_md(settings, tmp_path / "run")
    log = files.read_log(folder / files.LOG)
    drift = json.loads((folder / report.SUMMARY).read_text())["drift_meV_per_atom_ps"]
    assert np.ptp(log["kinetic_eV"]) > 0.1
    assert abs(drift) < {"single": 0.1, "double": 0.01}[precision]


@pytest.mark.slow
def test_two_thousand_steps_of_npt_compile_little(tmp_path):
    settings = MDSettings(
        structure=water_file(tmp_path), engine="openmm", ensemble="npt", steps=2000, platform="CPU"
    )
    folder = run_md(settings, tmp_path / "run")
    volumes = files.read_log(folder / files.LOG)["volume_A3"]
    assert np.ptp(volumes) > 0.01 * volumes.mean()
    assert json.loads((folder / report.SUMMARY).read_text())["compilations"] <= 5


def water_file(folder):
    """23 waters in a box of 9 Å."""
    modeller = openmm.app.Modeller(openmm.app.Topology(), [] * unit.nanometer)
    modeller.addSolvent(
        openmm.app.ForceField("amber14/tip3p.xml"), boxSize=openmm.Vec3(0.9, 0.9, 0.9)
    )
    path = folder / "water.pdb"
    with path.open("w") as file:
        openmm.app.PDBFile.writeFile(modeller.topology, modeller.positions, file)
    return str(path)
