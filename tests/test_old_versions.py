"""Every kind of file that version 0.1.0 wrote opens with the numbers that it held there.

``data/version_0_1_0`` was written by that version and is never written again.
"""

import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import openmm
import pytest
from ase.io import read

import mlip_md
from mlip_md.engine import Engine
from mlip_md.errors import ModelFileError
from mlip_md.graph import Graph
from mlip_md.integrations.md import MDSettings, restart_md, run_md
from mlip_md.integrations.openmm_force import share_potential
from mlip_md.networks import MACEConfig, NequIPConfig, build_network, draw_weights
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


BUNDLED_THEN = "25d57c210a7d768df60df880f73c1b5e850c638e9f9dccb6c4847e7594f4b65a"
"""Identity of what 0.1.0 called organics-gfn2."""


def test_a_system_of_the_potential_that_was_bundled_then():
    """Another has its name now; Systems find it by its identity."""
    assert mlip_md.load("organics-gfn2").sha256 != BUNDLED_THEN
    assert share_potential("organics-gfn2", BUNDLED_THEN).sha256 == BUNDLED_THEN
    assert share_potential("organics-gfn2").sha256 == mlip_md.load("organics-gfn2").sha256
    with pytest.raises(ModelFileError, match="holds another model"):
        share_potential("organics-gfn2", "0" * 64)


@pytest.mark.parametrize("engine", ["ase", "openmm"])
def test_dynamics_of_the_potential_that_was_bundled_then(tmp_path, engine):
    folder = tmp_path / "run"
    settings = MDSettings(
        str(OLD / "water.xyz"), "organics-gfn2-v1", engine, steps=2, report_interval=1
    )
    run_md(settings, folder)
    written = json.loads((folder / "settings.json").read_text())
    written["model"] = "organics-gfn2"  # as 0.1.0 called it
    (folder / "settings.json").write_text(json.dumps(written))
    restart_md(folder, steps=2)
    assert json.loads((folder / "summary.json").read_text())["model_sha256"] == BUNDLED_THEN


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


@pytest.mark.parametrize(
    ("config", "weighted_sum"),
    [
        (MACEConfig(num_channels=4, l_max=2, node_symmetry=2), -73674.22563371553),
        (NequIPConfig(node_irreps="4x0e+4x0o+2x1e+2x1o", l_max=1, num_layers=3), 66769.26544645999),
    ],
)
def test_a_seed_draws_the_same_weights(config, weighted_sum):
    index = np.zeros(1, np.int32)
    graph = Graph(
        positions=np.zeros((1, 3), np.float32),
        species=index,
        cell=np.zeros((1, 3, 3), np.float32),
        senders=index,
        receivers=index,
        shifts=np.zeros((1, 3), np.int32),
        node_graph=index,
        node_mask=np.ones(1, bool),
        edge_mask=np.ones(1, bool),
        graph_mask=np.ones(1, bool),
    )
    network = build_network(
        config, num_species=3, cutoff=5.0, avg_num_neighbors=10.0, avg_r_min=1.0
    )
    draw = functools.partial(draw_weights, network, config)
    weights = jax.tree_util.tree_leaves(jax.jit(draw)(jax.random.key(42), graph))
    # Of each weight, times its place in its array.
    places = [np.arange(w.size).reshape(w.shape) for w in weights]
    found = sum(
        float((np.asarray(w, float) * k).sum()) for w, k in zip(weights, places, strict=True)
    )
    assert found == pytest.approx(weighted_sum, rel=1e-5)
