"""What a file states of single atoms holds through a run, in both engines: masses, constraints."""

import json

import ase.io
import numpy as np
import openmm
import pytest
from ase.constraints import FixAtoms, FixBondLength, FixCartesian
from md_cases import ENGINES, settings
from pair_engine import PairEngine
from typer.testing import CliRunner

from mlip_md.cli import app
from mlip_md.errors import ConfigError, StructureError
from mlip_md.integrations.md import MDSettings, files, report, restart
from mlip_md.integrations.md.backends import BACKENDS
from mlip_md.integrations.md.masses import prepare_start, repartition_masses
from mlip_md.integrations.md.minimize import relax_structure
from mlip_md.integrations.md.run import restart_md, run_md
from mlip_md.integrations.md.settings import choices_of
from mlip_md.integrations.md.structures import read_structure
from mlip_md.integrations.md.velocities import count_degrees_of_freedom, draw_velocities


@pytest.fixture
def edited(cluster, tmp_path):
    """Writes the cluster anew, changed, and gives the path."""

    def write(change, source=cluster):
        atoms = ase.io.read(source)
        change(atoms)
        path = tmp_path / "edited.extxyz"
        atoms.write(path)
        return str(path)

    return write


def heavy(atoms):
    atoms.set_masses([50.0] * 5 + [12.011] * (len(atoms) - 5))


def run_and_restart(structure, folder, **changes):
    run_md(settings(structure, steps=20, **changes), folder)
    restart_md(folder, steps=20)
    frames = ase.io.read(folder / files.TRAJECTORY_ASE, ":")
    return frames, files.read_log(folder / files.LOG)


@pytest.mark.parametrize("engine", ENGINES)
def test_masses_of_the_file_move_and_are_kept(edited, tmp_path, engine):
    frames, log = run_and_restart(edited(heavy), tmp_path / "run", engine=engine, ensemble="nve")
    assert len(frames) == 5
    for frame, kinetic in zip(frames, log["kinetic_eV"], strict=True):
        np.testing.assert_allclose(frame.get_masses()[:6], [50.0] * 5 + [12.011])
        assert frame.get_kinetic_energy() == pytest.approx(kinetic, rel=1e-2)
    assert log["temperature_K"][0] == pytest.approx(300.0, rel=1e-2)
    np.testing.assert_allclose(log["total_eV"], log["total_eV"][0], atol=2e-3)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
def test_fixed_atoms_stay_where_they_are(edited, tmp_path, engine, ensemble):
    path = edited(lambda atoms: atoms.set_constraint(FixAtoms([0, 4, 9])))
    changes = {"engine": engine, "ensemble": ensemble, "minimize": True}
    frames, log = run_and_restart(path, tmp_path / "run", **changes)
    start = ase.io.read(path)
    moved = np.abs([frame.positions - start.positions for frame in frames]).max(axis=(0, 2))
    assert moved[[0, 4, 9]].max() < 1e-6
    assert np.delete(moved, [0, 4, 9]).min() > 1e-3
    # 81 degrees of freedom instead of 72 would be 12 % off. A leapfrog's velocities are those of
    # half a step later than its kinetic energy.
    tolerance = 3e-2 if (engine, ensemble) == ("openmm", "nve") else 1e-2
    for frame, temperature in zip(frames, log["temperature_K"], strict=True):
        assert frame.constraints[0].get_indices().tolist() == [0, 4, 9]
        kinetic = frame.get_kinetic_energy()
        assert 2 * kinetic / (72 * ase.units.kB) == pytest.approx(temperature, rel=tolerance)


def test_one_axis_of_an_atom_is_held_by_ase_and_refused_by_openmm(edited, tmp_path):
    path = edited(lambda atoms: atoms.set_constraint(FixCartesian([2], (False, False, True))))
    frames, _ = run_and_restart(path, tmp_path / "run", engine="ase")
    moved = np.abs(frames[-1].positions - ase.io.read(path).positions)[2]
    assert moved[2] < 1e-6
    assert moved[:2].min() > 1e-4
    with pytest.raises(StructureError, match="of atom 3 only z is held"):
        run_md(settings(path, engine="openmm"), tmp_path / "other")


def test_an_engine_is_what_the_table_says(edited, tmp_path, monkeypatch):
    """Its backend, its title and what it holds; no name falls through to another engine."""
    assert set(BACKENDS) == set(choices_of("engine"))
    titles = {name: load().title for name, load in BACKENDS.items()}
    assert titles == {"ase": "ASE", "openmm": "OpenMM"}

    class Another(BACKENDS["ase"]()):
        title = "Another"
        holds_axes = False

        @classmethod
        def ignored(cls, ensemble):
            return {"seed": f"{ensemble} is not random"}

    drawn = []
    monkeypatch.setitem(BACKENDS, "ase", lambda: Another)
    monkeypatch.setattr(report, "draw_plot", lambda *_, title, **__: drawn.append(title))
    path = edited(lambda atoms: atoms.set_constraint(FixCartesian([2], (False, False, True))))
    with pytest.raises(StructureError, match="Another can hold whole atoms only"):
        run_md(settings(path), tmp_path / "run")
    with pytest.raises(ConfigError, match="--seed would change nothing: nvt is not random"):
        CliRunner().invoke(app, ["md", path, "--seed", "1"], catch_exceptions=False)
    folder = run_md(settings(edited(heavy), steps=1), tmp_path / "run")
    summary = json.loads((folder / report.SUMMARY).read_text(encoding="utf-8"))
    assert summary["engine"].startswith("Another ")
    assert drawn == ["edited (27 atoms), NVT, Another"]


@pytest.mark.parametrize("engine", ENGINES)
def test_constraints_that_cannot_be_held_are_refused(edited, crystal, tmp_path, engine):
    path = edited(lambda atoms: atoms.set_constraint(FixAtoms([0])), crystal)
    with pytest.raises(StructureError, match="npt scales the cell"):
        run_md(settings(path, engine=engine, ensemble="npt"), tmp_path / "run")
    path = edited(lambda atoms: atoms.set_constraint(FixAtoms(range(27))))
    with pytest.raises(StructureError, match="nothing would move"):
        run_md(settings(path, engine=engine), tmp_path / "run")
    atoms = ase.io.read(path)
    atoms.set_constraint(FixBondLength(0, 1))
    atoms.write(tmp_path / "bond.traj")
    with pytest.raises(StructureError, match="FixBondLength"):
        run_md(settings(str(tmp_path / "bond.traj"), engine=engine), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
def test_velocities_are_drawn_for_what_moves(cluster, ensemble):
    atoms = ase.io.read(cluster)
    heavy(atoms)
    atoms.set_constraint([FixAtoms([0, 1]), FixCartesian([2], (True, False, False))])
    assert count_degrees_of_freedom(atoms, ensemble) == 3 * 27 - 7
    kinetic = []
    for seed in range(200):
        draw_velocities(atoms, ensemble, 300.0, np.random.default_rng(seed))
        kinetic.append(atoms.get_kinetic_energy())
    assert not atoms.get_momenta()[:2].any()
    assert atoms.get_momenta()[2, 0] == 0
    expected = 0.5 * 74 * ase.units.kB * 300.0
    assert np.mean(kinetic) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_restart_file_of_0_1_0_without_masses_goes_on(cluster, tmp_path, engine):
    folder = run_md(settings(cluster, engine=engine), tmp_path / "run")
    arrays, values = restart.read_restart(folder / restart.RESTART)
    del arrays["fixed"]  # standard masses are not there
    restart.write_restart(folder / restart.RESTART, arrays, values)
    restart_md(folder, steps=10)
    frame = ase.io.read(folder / files.TRAJECTORY_ASE)
    np.testing.assert_allclose(frame.get_masses(), 12.011)


def test_minimizing_holds_what_is_fixed(edited, potential):
    from mlip_md.integrations.ase import MLIPCalculator

    structure = read_structure(edited(lambda atoms: atoms.set_constraint(FixAtoms([0]))))
    relaxed, _ = relax_structure(structure.atoms, MLIPCalculator(), steps=5)
    moved = np.abs(relaxed.positions - structure.atoms.positions).max(axis=1)
    assert moved[0] == 0
    assert moved[1:].min() > 1e-5


def pdb_of_two_chains(path, charge="  "):
    """Six carbon atoms, three in a residue, in two chains, with one charge or without."""
    rows = []
    for i in range(6):
        residue, chain = ("LIG", "A") if i < 3 else ("UNK", "B")
        x, y = 2.2 * (i % 3), 2.3 * (i // 3)
        rows.append(
            f"HETATM{i + 1:5d}  Q{i % 3}  {residue} {chain}{7 + i // 3:4d}    {x:8.3f}{y:8.3f}"
            f"{0.4 * (i % 2):8.3f}  1.00  0.00           C{charge if i == 0 else '  '}"
        )
    path.write_text("\n".join([*rows, "END"]) + "\n")
    return str(path)


def test_minimize_says_what_a_pdb_file_cannot_hold(edited, crystal, tmp_path, monkeypatch):
    def slab(atoms):
        heavy(atoms)
        atoms.pbc[2] = False
        atoms.set_constraint(FixAtoms([3]))

    monkeypatch.chdir(tmp_path)
    told = {}
    for name, path in (("slab", edited(slab, crystal)), ("plain", crystal)):
        for ending in ("pdb", "pdb.gz", "extxyz"):
            file = f"{name}.{ending}"
            done = CliRunner().invoke(app, ["minimize", path, "--steps", "2", "-o", file])
            told[file] = done.output.splitlines()[-1].partition(f" Wrote {file}")[2]
    lost = (
        " (a PDB file cannot hold own masses of 5 atoms, constraints on 1 atom, periodicity along "
        "a and b only (read again, it is periodic in all directions); extxyz can)"
    )
    assert (told["slab.pdb"], told["slab.pdb.gz"]) == (lost, lost)
    assert {text for file, text in told.items() if not file.startswith("slab.pdb")} == {""}
    again = {ending: read_structure(f"slab.{ending}") for ending in ("pdb", "extxyz")}
    for ending, kept in (("pdb", False), ("extxyz", True)):
        assert again[ending].atoms.pbc.all() != kept
        assert again[ending].fixed.any() == kept
        assert again[ending].own_masses.any() == kept


def test_minimizing_a_pdb_file_keeps_residues_chains_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = pdb_of_two_chains(tmp_path / "given.pdb")
    CliRunner().invoke(app, ["minimize", given, "--steps", "3", "-o", "out.pdb"])
    before, after = read_structure(given), read_structure("out.pdb")
    assert after.labels == before.labels
    moved = np.abs(after.atoms.positions - before.atoms.positions).max()
    assert 1e-3 < moved < 1.0


def test_a_run_says_what_it_read(edited, tmp_path):
    path = edited(lambda atoms: (heavy(atoms), atoms.set_constraint(FixAtoms([0]))))
    folder = str(tmp_path / "run")
    result = CliRunner().invoke(app, ["md", path, "--steps", "2", "--no-minimize", "-o", folder])
    line = f"{path}: 27 atoms (C27), own masses of 5 atoms, constraints on 1 atom\n"
    assert line in result.output
    restart_md(tmp_path / "run", steps=2)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["input"]["constrained_atoms"] == 1
    assert summary["input"]["own_masses"] == 5


def test_a_stated_charge_is_refused_by_all_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = pdb_of_two_chains(tmp_path / "charged.pdb", charge="1-")
    for engine in ENGINES:
        with pytest.raises(StructureError, match="no input for charge"):
            run_md(settings(path, engine=engine), tmp_path / "run")
    with pytest.raises(StructureError, match="no input for charge"):
        CliRunner().invoke(app, ["minimize", path], catch_exceptions=False)


def test_createsystem_refuses_formal_charges(tmp_path, potential):
    from mlip_md.integrations.openmm import MLIPPotentialImpl

    path = pdb_of_two_chains(tmp_path / "charged.pdb", charge="1-")
    topology = read_structure(path).topology
    implementation = MLIPPotentialImpl("mlip-md")
    with pytest.raises(StructureError, match="formal charge of the topology"):
        implementation.addForces(topology, openmm.System(), None, 0)
    neutral = read_structure(pdb_of_two_chains(tmp_path / "neutral.pdb")).topology
    system = openmm.System()
    implementation.addForces(neutral, system, None, 0)
    assert system.getNumForces() == 1


def test_createsystem_refuses_residues_without_any_hydrogen(potential):
    from mlip_md.integrations.openmm import MLIPPotentialImpl

    topology = openmm.app.Topology()
    residue = topology.addResidue("GLY", topology.addChain())
    for _ in range(2):
        topology.addAtom("C", openmm.app.element.carbon, residue)
    implementation = MLIPPotentialImpl("mlip-md")
    with pytest.raises(StructureError, match="residues GLY and not one hydrogen"):
        implementation.addForces(topology, openmm.System(), None, 0)
    implementation.addForces(topology, openmm.System(), [0, 1], 0, periodic=False)


@pytest.mark.parametrize("engine", ENGINES)
def test_velocities_of_the_file_start_a_run(edited, cluster, tmp_path, engine):
    given = np.random.default_rng(1).normal(size=(27, 3)) * 0.01
    path = edited(lambda atoms: atoms.set_velocities(given))
    run_md(settings(path, engine=engine, velocities="file", steps=2), tmp_path / "run")
    first = ase.io.read(tmp_path / "run" / files.TRAJECTORY_ASE, 0)
    np.testing.assert_allclose(first.get_velocities(), given, atol=1e-6)
    with pytest.raises(StructureError, match="holds no velocities"):
        run_md(settings(cluster, engine=engine, velocities="file"), tmp_path / "other")
    with pytest.raises(ConfigError, match="--no-minimize"):
        settings(path, velocities="file", minimize=True)


@pytest.mark.parametrize("engine", ENGINES)
def test_motion_of_the_whole_counts_where_the_file_has_it(edited, tmp_path, engine):
    def drift(atoms):
        atoms.set_velocities(np.full((27, 3), 0.01))

    def rest(atoms):
        draw_velocities(atoms, "nve", 300, np.random.default_rng(0))

    def turn(atoms):
        away = atoms.positions - atoms.get_center_of_mass()
        atoms.set_velocities(0.01 * np.cross([0.0, 0.0, 1.0], away))

    for change, free in ((drift, 78), (rest, 75), (turn, 78)):
        path = edited(change)
        changes = {"velocities": "file", "ensemble": "nve", "steps": 1, "report_interval": 1}
        folder = run_md(settings(path, engine=engine, **changes), tmp_path / change.__name__)
        log = files.read_log(folder / files.LOG)
        wanted = 2 * log["kinetic_eV"][0] / (free * ase.units.kB)
        np.testing.assert_allclose(log["temperature_K"][0], wanted, rtol=1e-6)


def test_one_frame_of_several_is_run(cluster, tmp_path):
    atoms = ase.io.read(cluster)
    other = atoms.copy()
    other.positions *= 1.05
    ase.io.write(tmp_path / "two.xyz", [atoms, other])
    path = str(tmp_path / "two.xyz")
    with pytest.raises(StructureError, match="--frame"):
        run_md(settings(path), tmp_path / "run")
    run_md(settings(path, frame=-1, steps=2), tmp_path / "run")
    first = ase.io.read(tmp_path / "run" / files.TRAJECTORY_ASE, 0)
    np.testing.assert_allclose(first.positions, other.positions, atol=1e-5)


def test_hydrogen_takes_mass_from_its_heavy_neighbor():
    structure = read_structure("paracetamol")
    masses = repartition_masses(structure, 2.0)
    hydrogen = structure.atoms.numbers == 1
    np.testing.assert_allclose(masses[hydrogen], 2.0)
    assert masses.sum() == pytest.approx(structure.atoms.get_masses().sum(), rel=1e-12)
    assert (masses[~hydrogen] <= structure.atoms.get_masses()[~hydrogen]).all()
    prepared = prepare_start(MDSettings(hydrogen_mass=2.0), structure)
    np.testing.assert_allclose(prepared.atoms.get_masses(), masses)
    with pytest.raises(StructureError, match="smaller --hydrogen-mass"):
        repartition_masses(structure, 5.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_trajectory_holds_fresh_energies_and_forces(edited, tmp_path, engine):
    def label(atoms):
        atoms.info["REF_energy"] = 1.0
        atoms.info["config_type"] = "old"
        atoms.set_array("REF_forces", np.full((27, 3), 9.0))
        atoms.set_constraint(FixAtoms([0]))

    run_md(settings(edited(label), engine=engine, steps=10), tmp_path / "run")
    text = (tmp_path / "run" / files.TRAJECTORY_ASE).read_text(encoding="utf-8")
    assert "REF" not in text
    assert "config_type" not in text
    for frame in ase.io.read(tmp_path / "run" / files.TRAJECTORY_ASE, ":"):
        fresh = PairEngine(None).evaluate(frame.positions, frame.numbers)
        assert frame.get_potential_energy() == pytest.approx(fresh.energy, rel=1e-6)
        forces = frame.get_forces(apply_constraint=False)
        np.testing.assert_allclose(forces, fresh.forces, atol=1e-4)
