"""Every kind of file that version 0.1.0 wrote opens with the numbers that it held there.

``data/version_0_1_0`` was written by that version and is never written again.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import openmm
import pytest
from ase.io import read

import mlip_md
from mlip_md.engine import Engine
from mlip_md.integrations.md import restart_md
from mlip_md.trainer.data import load_data
from mlip_md.trainer.recipe import load_recipe
from mlip_md.trainer.train import Trainer

OLD = Path(__file__).parent / "data" / "version_0_1_0"
EXPECTED = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))


@pytest.fixture
def old(tmp_path, monkeypatch) -> Path:
    """A copy of the old files, in the working directory."""
    folder = tmp_path / "old"
    shutil.copytree(OLD, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("ending", ["safetensors", "zip"])
@pytest.mark.parametrize("name", ["mace", "nequip"])
def test_models(name, ending):
    potential = mlip_md.load(OLD / f"{name}.{ending}")
    numbers, expected = EXPECTED["numbers"], EXPECTED[name]
    result = Engine(potential, "float64").evaluate(
        EXPECTED["positions"], numbers, EXPECTED["cell"], True
    )
    # Forces grow with the couplings of random weights; relative to the largest they are exact.
    scale = np.abs(expected["forces"]).max()
    np.testing.assert_allclose(result.forces, expected["forces"], rtol=0, atol=1e-9 * scale)
    np.testing.assert_allclose(result.stress, expected["stress"], rtol=1e-8, atol=1e-9)
    assert result.energy == pytest.approx(expected["energy"], rel=1e-11)


def test_systems_and_restart_files_still_name_the_bundled_potential():
    """Its file was saved anew; what 0.1.0 called it is the same."""
    identity = "25d57c210a7d768df60df880f73c1b5e850c638e9f9dccb6c4847e7594f4b65a"
    assert mlip_md.load("organics-gfn2").sha256 == identity


def test_a_trained_model():
    potential = mlip_md.load(OLD / "trained.safetensors")
    result = Engine(potential, "float64").evaluate(
        EXPECTED["positions"][:5], EXPECTED["numbers"][:5]
    )
    assert result.energy == pytest.approx(EXPECTED["trained"]["energy"], rel=1e-11)


def test_a_run_and_its_checkpoint_go_on_with_prepared_data(old):
    recipe, origins = load_recipe("run/config.resolved.yaml")
    outcome = Trainer(recipe, load_data(recipe), Path("run"), origins=origins).run("must")
    assert outcome.status == "done"
    for name, error in EXPECTED["trained"]["errors"].items():
        assert outcome.errors[name] == pytest.approx(error, rel=1e-3, nan_ok=True), name
    assert len((old / "run/metrics.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize("engine", ["ase", "openmm"])
def test_dynamics_go_on(old, engine):
    restart_md(Path(f"md-{engine}"), steps=10)
    last, expected = read(f"md-{engine}/trajectory.extxyz", "-1"), EXPECTED[f"md-{engine}"]
    row = Path(f"md-{engine}/log.csv").read_text().splitlines()[-1]
    found, wanted = ([float(x or 0) for x in text.split(",")] for text in (row, expected["log"]))
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    np.testing.assert_allclose(last.positions, expected["positions"], atol=1e-4)


def test_a_serialized_system():
    system = openmm.XmlSerializer.deserialize((OLD / "system.xml").read_text())
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    context.setPositions(read(OLD / "water.xyz").positions / 10)
    energy = context.getState(energy=True).getPotentialEnergy()._value
    assert energy == pytest.approx(EXPECTED["system"]["energy"], rel=1e-9)
