"""On a card: the processor's numbers, long lists, runs at constant pressure, training with resume.

``pytest -m gpu`` runs these beside the suite of the engine; without a card all of them are skipped.
"""

import csv
import os
import signal

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from training_cases import small_recipe, write_data_set

import mlip_md
from mlip_md.engine import Engine
from mlip_md.integrations.md import MDSettings
from mlip_md.integrations.md.report import read_summary
from mlip_md.integrations.md.run import run_md
from mlip_md.trainer.data import load_data
from mlip_md.trainer.train import Trainer

pytestmark = [pytest.mark.gpu, pytest.mark.slow]

FILES = {"mace": "mace_card_v012.zip", "nequip": "nequip_card_strong_v012.zip"}
TOLERANCES = {"float32": 1e-4, "float64": 1e-9}
"""Parts of the largest force."""


def water(n_molecules: int, seed: int = 0) -> Atoms:
    """Molecules turned at random on a jittered lattice, at the density of the liquid; periodic."""
    rng = np.random.default_rng(seed)
    side = int(np.ceil(n_molecules ** (1 / 3)))
    length = (n_molecules / 0.0334) ** (1 / 3)
    sites = np.stack(np.meshgrid(*[range(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    sites = length / side * (sites[rng.permutation(side**3)[:n_molecules]] + 0.5)
    one = molecule("H2O")
    turns = np.linalg.qr(rng.normal(size=(n_molecules, 3, 3)))[0]
    turned = np.einsum("mij,aj->mai", turns, one.positions - one.positions[0])
    positions = (sites + rng.normal(scale=0.1, size=sites.shape))[:, None] + turned
    numbers = np.tile(one.numbers, n_molecules)
    return Atoms(numbers, positions.reshape(-1, 3), cell=length * np.eye(3), pbc=True)


def arrays(atoms: Atoms):
    return atoms.positions, atoms.numbers, atoms.cell.array, atoms.pbc


def assert_same(found, expected, tolerance):
    largest = np.abs(expected.forces).max()
    np.testing.assert_allclose(found.forces, expected.forces, rtol=0, atol=tolerance * largest)
    per_atom = (found.interaction_energy - expected.interaction_energy) / len(expected.energies)
    assert abs(per_atom) <= tolerance * np.abs(expected.energies).max() / 100
    if expected.stress is not None:
        scale = np.abs(expected.stress).max()
        np.testing.assert_allclose(found.stress, expected.stress, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", FILES)
def test_both_published_networks_say_what_they_say_on_a_processor(
    card, reference_data, name, dtype
):
    """A molecule and a liquid, lists on the card; and the same bits when asked again."""
    potential = mlip_md.load(reference_data / "golden" / FILES[name])
    aspirin = np.load(reference_data / "golden" / "inputs" / "aspirin.npz")
    structures = [Atoms(aspirin["numbers"], aspirin["positions"]), water(96)]
    engine, other = Engine(potential, dtype, card), Engine(potential, "float64", "cpu")
    for atoms in structures:
        found = engine.evaluate(*arrays(atoms))
        assert_same(found, other.evaluate(*arrays(atoms)), TOLERANCES[dtype])
        again = engine.evaluate(*arrays(atoms))
        if dtype == "float32":  # in a fixed order
            np.testing.assert_array_equal(again.forces, found.forces)
            assert again.energy == found.energy


def test_lists_of_a_hundred_thousand_atoms(card):
    """Made on the card, kept while atoms move, against those of the host."""
    potential, atoms, rng = mlip_md.load("organics-gfn2"), water(33_334), np.random.default_rng(0)
    engine, listed = Engine(potential, device=card), Engine(potential, device=card, backend="vesin")
    for scale in (0.0, 0.02, 0.05):
        atoms.positions += rng.normal(scale=scale, size=atoms.positions.shape)
        found = engine.evaluate(*arrays(atoms))
        assert_same(found, listed.evaluate(*arrays(atoms)), TOLERANCES["float32"])
    assert len(engine.device_lists) == 1


@pytest.mark.parametrize("engine", ["ase", "openmm"])
def test_a_thousand_steps_at_constant_pressure(card, engine, tmp_path):
    water(64).write(tmp_path / "water.extxyz")
    settings = MDSettings(
        str(tmp_path / "water.extxyz"), engine=engine, ensemble="npt", steps=1000, device="gpu"
    )
    summary = read_summary(run_md(settings, tmp_path / "run"))
    assert (summary["status"], summary["step"]) == ("finished", 1000)
    assert summary["compilations"] <= 8
    with open(tmp_path / "run" / "log.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    temperature = [float(row["temperature_K"]) for row in rows[len(rows) // 2 :]]
    assert 250 < np.mean(temperature) < 350


class Run:
    """A short training in a folder; its rows of epochs."""

    def __init__(self, recipe, data, folder, stop_after=None):
        self.batches = 0

        def count(*_):
            self.batches += 1
            if self.batches == stop_after:
                os.kill(os.getpid(), signal.SIGTERM)

        self.outcome = Trainer(recipe, data, folder, tick=count).run()
        with open(folder / "metrics.csv", newline="") as stream:
            self.rows = list(csv.DictReader(stream))

    def column(self, name):
        return [float(row[name]) for row in self.rows[1:]]


def test_training_goes_on_where_it_was_and_as_on_a_processor(card, tmp_path, interruptible):
    recipe = small_recipe(write_data_set(tmp_path / "set.hdf5"))
    data = load_data(recipe)
    with jax.default_device(card):
        straight = Run(recipe, data, tmp_path / "straight")
        stopped = Run(recipe, data, tmp_path / "stopped", stop_after=8)
        assert stopped.outcome.status == "terminated"
        resumed = Run(recipe, data, tmp_path / "stopped")
    with jax.default_device(jax.devices("cpu")[0]):
        other = Run(recipe, data, tmp_path / "processor")
    assert resumed.batches == straight.batches - 8
    # Gradients of weights are summed in any order there, which grows from step to step.
    for run in (resumed, other):
        for name in ("loss", "validation_energy_mae_per_atom", "validation_forces_rmse"):
            np.testing.assert_allclose(run.column(name), straight.column(name), rtol=1e-2)
    structure = arrays(water(2))
    potential = mlip_md.load(tmp_path / "stopped" / "model.safetensors")
    found = Engine(potential, device=card).evaluate(*structure)
    assert_same(found, Engine(potential, "float64", "cpu").evaluate(*structure), 1e-4)
