"""Training from a potential: weights for more elements, E0, what the result inherits."""

import csv
import dataclasses

import h5py
import jax
import numpy as np
import pytest
from mace_torch_cases import write_torch_model
from model_files import make_potential
from training_cases import E0, small_recipe, write_data_set
from typer.testing import CliRunner

import mlip_md
from mlip_md.cli import app
from mlip_md.engine import Engine
from mlip_md.errors import ConfigError, HeadError, NotLearnedError
from mlip_md.formats import own
from mlip_md.formats.soundness import flatten
from mlip_md.trainer import finetune
from mlip_md.trainer.data import load_data
from mlip_md.trainer.train import Trainer

NETWORKS = {
    "mace": {},
    "mace, all by species": {"gate_nodes": True, "species_embedding_dim": 6},
    "nequip": {},
    "mace-torch": {},
}
WATER = np.array([[0.0, 0, 0], [0.96, 0, 0], [-0.2, 0.9, 0.3], [1.9, 0.4, 1.2]])


def parent_of(name):
    return make_potential(name.split(",")[0], **NETWORKS[name])


def forces(potential, numbers):
    return Engine(potential, dtype="float64").evaluate(WATER, numbers)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("nearest", [True, False])
def test_more_elements_change_nothing_for_those_that_were_known(name, nearest):
    parent = parent_of(name)
    numbers = [parent.elements[k] for k in (-1, 0, 0, -1)]
    added = [z for z in (3, 17, 35) if z not in parent.elements]
    elements = tuple(sorted({*parent.elements, *added}))
    graph = load_graph(parent)
    weights = finetune.starting_weights(parent, elements, nearest, jax.random.key(0), graph)
    e0 = [dict(zip(parent.elements, parent.atomic_energies, strict=True)).get(z, 0.0)
          for z in elements]  # fmt: skip
    wider = dataclasses.replace(
        parent, params=weights, elements=elements, atomic_energies=np.array(e0)
    )
    before, after = forces(parent, numbers), forces(wider, numbers)
    assert np.abs(before.forces).max() > 1e-3
    assert after.energy == pytest.approx(before.energy, rel=1e-7)
    np.testing.assert_allclose(after.forces, before.forces, atol=2e-6 * np.abs(before.forces).max())
    relative = finetune.nearest_element(added[-1], parent.elements)
    swapped = [added[-1] if z == relative else z for z in numbers]
    like = [relative if z == relative else z for z in numbers]
    same = np.allclose(forces(wider, swapped).forces, forces(parent, like).forces, rtol=1e-5)
    assert same == nearest


def load_graph(parent):
    """Any graph."""
    from mlip_md.formats.soundness import _ONE_EDGE

    return _ONE_EDGE


@pytest.mark.parametrize(
    ("number", "known", "nearest"),
    [(14, (1, 6, 8), 6), (35, (1, 9, 17, 34), 17), (11, (3, 10, 12), 3), (2, (1, 10), 10),
     (64, (57, 26), 57), (26, (24, 30), 24), (5, (6, 31), 31), (1, (3, 9), 3)],
)  # fmt: skip
def test_relatives_are_of_the_same_group(number, known, nearest):
    assert finetune.nearest_element(number, known) == nearest


def test_groups_of_the_table():
    places = {1: (1, 1), 2: (1, 18), 5: (2, 13), 26: (4, 8), 57: (6, 3), 71: (6, 3), 72: (6, 4),
              86: (6, 18), 118: (7, 18)}  # fmt: skip
    assert {z: finetune.place_in_table(z) for z in places} == places


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A potential of H, C and O, trained a little."""
    folder = tmp_path_factory.mktemp("parent")
    recipe = small_recipe(write_data_set(folder / "set.hdf5"), train={"epochs": 6})
    Trainer(recipe, load_data(recipe), folder / "run").run()
    return folder / "run" / "model.safetensors"


def swap_element(path, old, new, shift):
    """The data set with another element in the place of one, and its E0."""
    with h5py.File(path, "r+") as file:
        for group in file.values():
            numbers = group["elements"][:]
            group.attrs["energy"] += shift * int(np.sum(numbers == old))
            group["elements"][:] = np.where(numbers == old, new, numbers)
    return path


def begin(path, parent, folder, **sections):
    potential = mlip_md.load(parent)
    recipe = small_recipe(path, start={"potential": str(parent)}, **sections)
    recipe, changes = finetune.adopt_network(recipe, potential)
    return Trainer(recipe, load_data(recipe), folder, parent=potential), changes


def first_row(folder):
    with open(folder / "metrics.csv", newline="") as stream:
        return next(csv.DictReader(stream))


def test_it_starts_with_the_parents_errors_and_ends_with_smaller_ones(trained, tmp_path):
    data = write_data_set(tmp_path / "set.hdf5", seed=5)
    trainer, changes = begin(
        data, trained, tmp_path / "run", model={"num_channels": 9}, data={"cutoff": 5.0}
    )
    assert [line.partition(" is")[0] for line in changes] == ["model.num_channels", "data.cutoff"]
    outcome = trainer.run()
    from mlip_md.trainer.evaluation import evaluate

    potential = mlip_md.load(trained)
    judged = evaluate(potential, trainer.data.validation, 8).overall
    start = first_row(tmp_path / "run")
    assert float(start["validation_forces_rmse"]) == pytest.approx(judged["forces_rmse"], rel=1e-4)
    assert outcome.errors["forces_rmse"] < judged["forces_rmse"]
    child = mlip_md.load(tmp_path / "run")
    assert child.info["parent"]["sha256"] == potential.sha256
    assert child.used_radial_scale == potential.used_radial_scale
    np.testing.assert_array_equal(child.atomic_energies, potential.atomic_energies)


def test_new_elements_get_e0_beside_the_parents_and_its_own_stay(trained, tmp_path):
    data = swap_element(write_data_set(tmp_path / "set.hdf5"), 8, 16, -500.0)
    trainer, _ = begin(data, trained, tmp_path / "run", train={"epochs": 1})
    statistics, parent = trainer.data.statistics, mlip_md.load(trained)
    assert statistics.elements == (1, 6, 8, 16)
    np.testing.assert_array_equal(statistics.atomic_energies[:3], parent.atomic_energies)
    assert statistics.atomic_energies[3] == pytest.approx(E0[8] - 500.0, abs=3.0)
    assert "of S fitted" in statistics.atomic_energies_source
    trainer.run()
    child = mlip_md.load(tmp_path / "run")
    water = Engine(child).evaluate(WATER[:3], [8, 1, 1])  # oxygen was not in the data
    assert np.isfinite(water.forces).all()


def test_refitted_e0_are_the_datas_and_lacking_elements_keep_theirs(trained, tmp_path):
    data = swap_element(write_data_set(tmp_path / "set.hdf5"), 8, 16, -500.0)
    start = {"potential": str(trained), "atomic_energies": "refit"}
    potential = mlip_md.load(trained)
    recipe, _ = finetune.adopt_network(small_recipe(data).model_copy(
        update={"start": finetune_start(start)}), potential)  # fmt: skip
    fitted = load_data(recipe)
    trainer = Trainer(recipe, fitted, tmp_path / "run", parent=potential)
    found = dict(zip(trainer.data.statistics.elements,
                     trainer.data.statistics.atomic_energies, strict=True))  # fmt: skip
    own_e0 = dict(zip(fitted.statistics.elements, fitted.statistics.atomic_energies, strict=True))
    assert found[8] == potential.atomic_energies[2]
    assert {z: found[z] for z in (1, 6, 16)} == own_e0
    assert "of O the parent's" in trainer.data.statistics.atomic_energies_source


def finetune_start(values):
    from mlip_md.trainer.recipe import StartConfig

    return StartConfig(**values)


def test_another_level_of_theory_is_named(trained, tmp_path):
    data = swap_element(write_data_set(tmp_path / "set.hdf5"), 8, 8, 40.0)
    trainer, _ = begin(data, trained, tmp_path / "run", train={"epochs": 1})
    trainer.run()
    log = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    assert "The levels of theory differ" in log


def test_a_scaled_parent_keeps_its_scaling(trained, tmp_path):
    """InstaDeep's zips may scale and shift the energies of atoms."""
    plain = mlip_md.load(trained)
    scaled = dataclasses.replace(plain, scaling_mean=0.25, scaling_stdev=2.0)
    own.save(scaled, tmp_path / "scaled.safetensors")
    data = write_data_set(tmp_path / "set.hdf5")
    trainer, _ = begin(data, tmp_path / "scaled.safetensors", tmp_path / "run", train={"epochs": 1})
    trainer.run()
    from mlip_md.trainer.evaluation import evaluate

    judged = evaluate(scaled, trainer.data.validation, 8).overall
    start = float(first_row(tmp_path / "run")["validation_energy_rmse_per_atom"])
    assert start == pytest.approx(judged["energy_rmse_per_atom"], rel=1e-4)
    child = mlip_md.load(tmp_path / "run")
    assert (child.scaling_mean, child.scaling_stdev) == (0.25, 2.0)


def test_e0_that_the_data_leave_open_are_asked_for(trained, tmp_path):
    data = write_data_set(tmp_path / "set.hdf5")
    with h5py.File(data, "r+") as file:  # sulfur and chlorine always together
        for group in file.values():
            numbers = group["elements"][:]
            numbers[:2] = 16, 17
            group["elements"][:] = np.where(np.arange(len(numbers)) > 1, 1, numbers)
    with pytest.raises(ConfigError, match="do not determine E0 of S Cl beside"):
        begin(data, trained, tmp_path / "run")


def test_the_command_line_starts_from_a_model(trained, tmp_path):
    data = write_data_set(tmp_path / "set.hdf5")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: tuned\ndata: {{path: {data}, batch_size: 8, curate: null}}\n"
        "optimizer: {transition_steps: to the end, warmup_steps: 0}\n"
        "train: {epochs: 1}\nlog: {plots: false}\n"
    )
    result = CliRunner().invoke(
        app, ["train", str(recipe), "--from", str(trained), "--run", str(tmp_path / "run")]
    )
    assert result.exit_code == 0, result.output
    assert "starts from small" in result.output
    assert "model.num_channels is the parent's, 4, not the recipe's" in result.output
    checked = CliRunner().invoke(app, ["check", str(recipe), "--set", f"start.potential={trained}"])
    weights = mlip_md.load(trained).num_parameters
    assert f"mace with {weights:,} weights" in checked.output
    assert "E0 (the parent's)" in checked.output
    again = CliRunner().invoke(app, ["train", str(recipe), "--run", str(tmp_path / "run")])
    assert again.exit_code != 0
    assert "start" in again.output


def test_a_model_of_mace_torch_is_trained_further(tmp_path):
    parent = write_torch_model(tmp_path, "two-heads")
    data = swap_element(write_data_set(tmp_path / "set.hdf5", 20), 8, 16, -500.0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: tuned\ndata: {{path: {data}, batch_size: 8, curate: null, split: {{by: structure, "
        "train: 0.8, validation: 0.1, test: 0.1}}\n"
        "start: {potential: none, atomic_energies: refit}\n"
        "optimizer: {transition_steps: to the end, warmup_steps: 0, peak_learning_rate: 0.01,\n"
        '  factors: {"*/layer_0/*": 0, "*/embedding/*": 0}}\n'
        "train: {epochs: 1, ema_decay: 0.0}\nlog: {plots: false}\n"
    )
    command = ["train", str(recipe), "--from", str(parent), "--run", str(tmp_path / "run")]
    said = CliRunner().invoke(app, command)
    assert isinstance(said.exception, HeadError)
    said = CliRunner().invoke(app, [*command, "--head", "own"])
    assert isinstance(said.exception, NotLearnedError), said.output  # two steps, random weights
    told = [line for line in said.output.splitlines() if "is the parent's" in line]
    assert told[0] == "model.kind is the parent's, mace-torch, not the recipe's, mace"
    assert [line.partition(" ")[0] for line in told] == ["model.kind", "data.cutoff"]
    before, after = mlip_md.load(parent, "own"), mlip_md.load(tmp_path / "run")
    assert after.elements == (1, 6, 8, 16)
    changing = {"atomic_energies": None, "avg_num_neighbors": None}
    after_config, before_config = (
        dataclasses.replace(p.config, **changing) for p in (after, before)
    )
    assert after_config == before_config
    assert after.avg_num_neighbors == before.avg_num_neighbors
    assert (after.scaling_mean, after.scaling_stdev) == (before.scaling_mean, before.scaling_stdev)
    assert after.info["parent"]["sha256"] == before.sha256
    assert after.atomic_energies[2] == before.atomic_energies[2]  # not in the data
    assert abs(after.atomic_energies[:2] - before.atomic_energies[:2]).min() > 1.0
    weights = flatten(after.params), flatten(before.params)
    same = {name for name in weights[1] if name in weights[0] and np.array_equal(
        weights[0][name], np.asarray(weights[1][name], np.float32))}  # fmt: skip
    frozen = {name for name in weights[1] if name in weights[0] and "layer_0" in name
              and weights[0][name].shape == weights[1][name].shape}  # fmt: skip
    assert frozen
    assert same == frozen
