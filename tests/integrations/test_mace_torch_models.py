"""Models of mace-torch where they are used: the numbers of its own calculator, and heads."""

import json
import pickle

import numpy as np
import openmm
import pytest
from mace_torch_cases import of_calculator, write_torch_model
from openmm_cases import context_of, energy_and_forces, topology_of
from openmmml import MLPotential
from typer.testing import CliRunner

import mlip_md
from mlip_md.cli import app
from mlip_md.errors import CheckpointError, ConfigError, HeadError
from mlip_md.integrations import openmm_force
from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.md.run import restart_md, run_md
from mlip_md.integrations.md.settings import MDSettings, read_settings

CASES = [("two-heads", "own"), ("two-heads", "mp"), ("mp-0b3", "Default")]


@pytest.fixture
def model(tmp_path):
    """The path of a model of two heads."""
    return str(write_torch_model(tmp_path, "two-heads"))


def openmm_system(path, head, atoms, **keywords):
    potential = MLPotential("mlip-md", modelPath=str(path), head=head)
    return potential.createSystem(topology_of(atoms), returnEnergyType="energy", **keywords)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_openmm_has_the_numbers_of_mace_torchs_calculator(tmp_path, name, head):
    path = write_torch_model(tmp_path, name)
    assert len(of_calculator(name, head)) == 2
    for atoms, wanted in of_calculator(name, head):
        system = openmm_system(path, head, atoms, precision="double")
        assert system.usesPeriodicBoundaryConditions() == atoms.pbc.all()
        energy, forces = energy_and_forces(context_of(system, atoms))
        assert energy == pytest.approx(wanted.energy, rel=1e-10)
        largest = abs(wanted.forces).max()
        assert largest > 0.5
        np.testing.assert_allclose(forces, wanted.forces, rtol=0, atol=1e-9 * largest)


def test_the_head_travels_with_xml_and_copies(model):
    (atoms, wanted), _ = of_calculator("two-heads", "own")
    for embedded in (False, True):
        system = openmm_system(model, "own", atoms, precision="double", embedModel=embedded)
        xml = openmm.XmlSerializer.serialize(system)
        del system
        openmm_force._potentials.clear()  # as in another process
        again = openmm.XmlSerializer.deserialize(xml)
        energy, _ = energy_and_forces(context_of(again, atoms))
        assert energy == pytest.approx(wanted.energy, rel=1e-10)
    calculator = pickle.loads(pickle.dumps(MLIPCalculator(model, head="own", dtype="float64")))
    atoms.calc = calculator
    assert atoms.get_potential_energy() == pytest.approx(wanted.energy, rel=1e-10)


def test_a_wrong_head_and_none_are_told(model):
    for opened in (
        lambda head: MLIPCalculator(model, head=head),
        lambda head: MLPotential("mlip-md", modelPath=model, head=head),
        lambda head: run_md(MDSettings(model=model, head=head, steps=1)),
    ):
        with pytest.raises(HeadError, match=r"several heads; name one .*: mp, own$"):
            opened(None)
        with pytest.raises(HeadError, match=r"no head 'x'; it has: mp, own$"):
            opened("x")
    with pytest.raises(HeadError, match=r"organics-gfn2: it has no heads .* leave head 'mp' out"):
        MLIPCalculator("organics-gfn2", head="mp")
    with pytest.raises(ConfigError, match="a Potential has its head"):
        MLIPCalculator(mlip_md.load(model, "mp"), head="mp")


@pytest.mark.parametrize("engine", ["ase", "openmm"])
def test_a_run_keeps_its_head(tmp_path, model, engine):
    (atoms, _), _ = of_calculator("two-heads", "own")
    atoms.write(tmp_path / "m.xyz")
    common = {"structure": str(tmp_path / "m.xyz"), "model": model, "engine": engine}
    common |= {"minimize": False, "report_interval": 1, "timestep": 0.01}
    first = {}
    for head in ("mp", "own"):
        folder = run_md(MDSettings(**common, head=head, steps=2), tmp_path / head)
        assert read_settings(folder).head == head
        restart_md(folder, steps=1)
        first[head] = (folder / "log.csv").read_text().splitlines()[1]
    assert first["mp"] != first["own"]
    settings = tmp_path / "own" / "settings.json"
    settings.write_text(settings.read_text().replace('"head": "own"', '"head": "mp"'))
    with pytest.raises(CheckpointError, match="not the model"):
        restart_md(tmp_path / "own", steps=1)


def test_the_commands_take_a_head(tmp_path, model):
    (atoms, wanted), _ = of_calculator("two-heads", "own")
    atoms.write(tmp_path / "m.xyz")
    run = ["md", str(tmp_path / "m.xyz"), "--model", model, "--steps", "1", "--no-minimize"]
    run += ["--timestep", "0.01"]
    relax = ["minimize", str(tmp_path / "m.xyz"), "--model", model, "--fmax", "1e6"]
    relax += ["--output", str(tmp_path / "out.extxyz")]
    atoms.info["energy"], atoms.arrays["forces"] = wanted.energy, wanted.forces
    atoms.write(tmp_path / "labels.xyz")
    judge = ["evaluate", model, str(tmp_path / "labels.xyz"), "--output", str(tmp_path / "e.json")]
    for command in ([*run, "--output", str(tmp_path / "run")], relax, judge):
        said = CliRunner().invoke(app, command)
        assert isinstance(said.exception, HeadError), command
        said = CliRunner().invoke(app, [*command, "--head", "own"])
        assert said.exit_code == 0, said.output
    errors = json.loads((tmp_path / "e.json").read_text())["overall"]
    assert errors["energy_mae_per_atom"] < 2e-5
    assert errors["forces_mae"] < 2e-5 * abs(wanted.forces).max()
    assert read_settings(tmp_path / "run").head == "own"
