"""Labels: families of names, structures without forces, weights of single structures."""

import dataclasses
import json

import ase
import ase.io
import jax
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from pair_potential import pair_potential
from training_cases import E0, molecules, random_batch, small_recipe
from typer.testing import CliRunner

from mlip_md.cli import app
from mlip_md.errors import ConfigError, DataError
from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.trainer.data import (
    BatchBudget,
    GraphStore,
    LabeledStructure,
    LabelKeys,
    load_data,
    make_batch,
    open_prepared,
    prepare,
    read,
)
from mlip_md.trainer.evaluation import evaluate
from mlip_md.trainer.loss import LossWeights, batch_loss, structure_losses
from mlip_md.trainer.metrics import error_sums, mean_errors
from mlip_md.trainer.recipe import LossConfig
from mlip_md.trainer.runlog import RunLog
from mlip_md.trainer.train import Trainer


def write(path, count=12, **labels):
    """Frames of water with labels: values, or functions of the number of the frame."""
    frames = []
    for k in range(count):
        atoms = molecule("H2O", cell=[9, 9, 9], pbc=True)
        atoms.rattle(0.03, seed=k)
        for name, value in labels.items():
            value = value(k) if callable(value) else value
            if value is not None:
                (atoms.arrays if np.shape(value) == (3, 3) else atoms.info)[name] = value
        frames.append(atoms)
    ase.io.write(path, frames, format="extxyz")
    return path


def forces(value):
    return np.full((3, 3), value)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"energy": -1.0, "forces": forces(1.0)}, (-1.0, 1.0)),
        ({"Energy": -1.0, "forces": forces(1.0)}, (-1.0, 1.0)),
        ({"REF_energy": -2.0, "REF_forces": forces(2.0), "energy": -1.0, "forces": forces(1.0)},
         (-2.0, 2.0)),
        ({"REF_energy": -2.0, "REF_forces": forces(2.0), "dft_energy": 7.0}, (-2.0, 2.0)),
    ],
)  # fmt: skip
def test_labels_are_of_one_family(labels, expected, tmp_path):
    frame = read(write(tmp_path / "a.xyz", **labels))[0]
    assert (frame.energy, frame.forces[0, 0]) == expected


@pytest.mark.parametrize(
    "labels",
    [
        {"REF_energy": -2.0, "forces": forces(9.9)},
        {"energy": -1.0, "REF_forces": forces(2.0)},
        {"energy": -1.0, "dft_forces": forces(2.0)},
        {"TotEnergy": -1.0, "energy": -1.0, "force": forces(2.0)},
    ],
)
def test_families_are_never_mixed(labels, tmp_path):
    with pytest.raises(DataError, match=r"forces only under .*Name both \(data\.energy_key"):
        read(write(tmp_path / "a.xyz", **labels))
    names = [next(k for k, v in labels.items() if (np.shape(v) == (3, 3)) == f) for f in (0, 1)]
    frame = read(tmp_path / "a.xyz", keys=LabelKeys(*names))[0]
    assert frame.forces[0, 0] == labels[names[1]][0, 0]


def test_forces_of_another_family_are_no_labels(tmp_path):
    path = write(tmp_path / "a.xyz", REF_energy=-2.0, forces=forces(9.9))
    said = ""
    try:
        read(path)
    except DataError as error:
        said = str(error)
    assert "forces only under forces" in said


def test_what_looks_like_a_label_and_is_not_used_is_told(tmp_path):
    path = write(tmp_path / "a.xyz", energy=-1.0, forces=forces(1.0), dft_energy=-3.0,
                 total_virial="1 2", config_weight=1.0)  # fmt: skip
    keys = LabelKeys()
    read(path, keys=keys)
    assert keys.unused == {"dft_energy": 12, "total_virial": 12}
    rows = {"curate": None, "max_n_node": None, "max_n_edge": None, "split": {"by": "structure"}}
    notes = load_data(small_recipe(path, data=rows)).notes
    (said,) = [note for note in notes if "look like labels" in note]
    assert "dft_energy (12), total_virial (12)" in said


def test_rows_name_stress_and_virial(tmp_path):
    matrix = np.arange(9.0)
    path = write(tmp_path / "a.xyz", energy=lambda k: -1.0 - k, forces=forces(1.0),
                 dft_stress=matrix, dft_virial=-729 * matrix)  # fmt: skip
    assert read(path)[0].stress is None
    for keys in (LabelKeys(stress="dft_stress"), LabelKeys(virial="dft_virial")):
        np.testing.assert_allclose(read(path, keys=keys)[0].stress, matrix.reshape(3, 3))
    rows = {"stress_key": "dft_stress", "max_n_node": None, "max_n_edge": None,
            "split": {"by": "structure"}}  # fmt: skip
    data = load_data(small_recipe(path, data=rows))
    np.testing.assert_allclose(data.train.stress[0], matrix.reshape(3, 3))


# Masks and weights in the loss


def test_structures_without_forces_add_no_force_loss_and_no_error():
    prediction, batch, _ = random_batch()
    mask = np.array([True, False, True, False])
    masked = batch.replace(forces_mask=mask)
    whole = structure_losses(LossConfig(), prediction, batch)[1]
    part = structure_losses(LossConfig(), prediction, masked)[1]
    np.testing.assert_array_equal(part[:3], np.where(mask, whole, 0.0)[:3])
    assert whole[1] > 0
    sums = error_sums(prediction, masked)
    atoms = np.bincount(batch.graph.node_graph)
    assert sums["components"] == 3 * (atoms[0] + atoms[2])
    assert sums["structures"] == 3


def test_weights_multiply_the_terms_of_their_structure():
    prediction, batch, _ = random_batch()
    own = np.array([[2, 0, 1], [0, 3, 1], [1, 1, 1], [9, 9, 9]], np.float32)
    weights = LossWeights(np.float32(40), np.float32(1000), np.float32(0))
    energy, force, _ = structure_losses(LossConfig(), prediction, batch)
    expected = (40 * energy * own[:, 0] + 1000 * force * own[:, 1])[:3].sum() / 3
    found = batch_loss(LossConfig(), prediction, batch.replace(weights=own), weights)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def labeled(count=30, weights=lambda k: (1.0, 1.0, 1.0), unlabeled=lambda k: k % 3 == 0):
    for k, (numbers, positions, energy, force) in enumerate(molecules(count)):
        yield LabeledStructure(numbers, positions, energy, None if unlabeled(k) else force,
                               weights=weights(k), name=f"[{k}]")  # fmt: skip


def test_a_store_keeps_masks_and_weights_in_memory_and_on_disk(tmp_path):
    structures = list(labeled(weights=lambda k: (1.0, float(k), 2.0)))
    stores = [
        GraphStore.from_structures(structures, 4.0, atomic_energies=E0, folder=folder)
        for folder in (None, tmp_path / "graphs")
    ]
    stores[1] = stores[1].with_atomic_energies(E0)
    budget = BatchBudget(60, 600, 6)
    batches = [make_batch(store, np.array([3, 4, 5]), budget) for store in stores]
    jax.tree.map(np.testing.assert_array_equal, *batches)
    assert batches[0].forces_mask.tolist() == [False, True, True, False, False, False]
    assert batches[0].weights[:3].tolist() == [[1, 3, 2], [1, 4, 2], [1, 5, 2]]
    index = json.loads((tmp_path / "graphs" / "index.json").read_text(encoding="utf-8"))
    assert index["format_version"] == 2
    plain = GraphStore.from_structures(labeled(5, unlabeled=lambda k: False), 4.0,
                                       folder=tmp_path / "plain")  # fmt: skip
    assert (plain.forces_mask, plain.weights) == (None, None)
    index = json.loads((tmp_path / "plain" / "index.json").read_text(encoding="utf-8"))
    assert index["format_version"] == 1


@pytest.mark.parametrize("weight", [-1.0, float("nan")])
def test_impossible_weights_are_refused(weight, tmp_path):
    path = write(tmp_path / "a.xyz", energy=-1.0, forces=forces(1.0), config_weight=weight)
    with pytest.raises(DataError, match=r"\[0\]: .*weights"):
        read(path)


def test_weights_of_a_file(tmp_path):
    path = write(tmp_path / "a.xyz", energy=-1.0, forces=forces(1.0), config_weight=2.0,
                 config_energy_weight=lambda k: float(k), config_forces_weight=0.5)  # fmt: skip
    assert [frame.weights for frame in read(path)][:2] == [(0.0, 1.0, 2.0), (2.0, 1.0, 2.0)]


def small(path, **rows):
    rows = {"max_n_node": None, "max_n_edge": None, "split": {"by": "structure"}, **rows}
    return small_recipe(path, data=rows, train={"epochs": 1})


def test_structures_without_forces_train_and_are_validated(tmp_path):
    frames = []
    for k, (numbers, positions, energy, force) in enumerate(molecules(24)):
        atoms = ase.Atoms(numbers, positions)
        atoms.info["energy"] = energy
        if k % 2:
            atoms.arrays["forces"] = force
        frames.append(atoms)
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    data = load_data(small(tmp_path / "a.xyz"))
    assert any("structures have no forces" in note for note in data.notes)
    outcome = Trainer(small(tmp_path / "a.xyz"), data, tmp_path / "run").run()
    assert outcome.status == "done"
    assert np.isfinite(outcome.errors["forces_rmse"])
    ase.io.write(tmp_path / "b.xyz", frames[::2], format="extxyz")
    with pytest.raises(ConfigError, match=r"loss\.forces has a weight, but .* no forces"):
        load_data(small(tmp_path / "b.xyz"))
    recipe = small(tmp_path / "b.xyz")
    loss = recipe.loss.model_copy(update={"forces": LossConfig().stress})
    recipe = recipe.model_copy(update={"loss": loss})
    outcome = Trainer(recipe, load_data(recipe), tmp_path / "energies").run()
    assert np.isfinite(outcome.errors["energy_rmse"])
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "run"), str(tmp_path / "b.xyz")])
    assert result.exit_code == 0, result.output
    assert " - " in result.stdout


def test_evaluation_counts_forces_where_they_are_labels():
    potential = pair_potential(cutoff=4.0, reference=tuple(E0.values()))
    everywhere = list(labeled(12, unlabeled=lambda k: False))
    kept = [s for k, s in enumerate(everywhere) if k % 3]
    some = [
        s if k % 3 else dataclasses.replace(s, forces=np.zeros_like(s.forces), has_forces=False)
        for k, s in enumerate(everywhere)
    ]
    part, known = evaluate(potential, some), evaluate(potential, kept)
    assert part.overall["forces_rmse"] == pytest.approx(known.overall["forces_rmse"])
    assert len(part.energies) == 12
    none = evaluate(potential, some[::3])
    assert np.isnan(none.overall["forces_rmse"])
    assert np.isfinite(none.overall["energy_mae"])
    assert np.isnan(mean_errors({"structures": 1.0})["forces_mae"])


def test_a_prepared_folder_keeps_them(tmp_path):
    path = write(tmp_path / "a.xyz", energy=lambda k: -1.0 - k, config_weight=lambda k: 1.0 + k,
                 forces=lambda k: forces(1.0) if k % 2 else None)  # fmt: skip
    recipe = small(path)
    data = prepare(recipe.data, folder=tmp_path / "prepared")
    again = open_prepared(tmp_path / "prepared")
    for name, part in data.parts.items():
        np.testing.assert_array_equal(part.forces_mask, again.parts[name].forces_mask)
        np.testing.assert_array_equal(part.weights, again.parts[name].weights)
    mapped = load_data(small(tmp_path / "prepared"))
    assert mapped.fingerprint == load_data(recipe).fingerprint
    light = dataclasses.replace(mapped.train, weights=2 * np.asarray(mapped.train.weights))
    assert dataclasses.replace(mapped, train=light).fingerprint != mapped.fingerprint


def test_errors_of_stress_count_where_there_are_labels(tmp_path):
    """In validation, in the log and in the table of evaluate, over bulk and clusters."""
    frames, random = [], np.random.default_rng(0)
    for k in range(24):
        atoms = bulk("Cu", "fcc", a=3.6 + 0.02 * (k % 3), cubic=True)
        atoms.positions += random.normal(0, 0.05, (4, 3))
        if k % 3 == 0:
            atoms = ase.Atoms("Cu4", atoms.positions)
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        results |= {"stress": atoms.get_stress()} if atoms.pbc.all() else {}
        atoms.calc = SinglePointCalculator(atoms, **results)
        atoms.info["config_type"] = "bulk" if atoms.pbc.all() else "cluster"
        frames.append(atoms)
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    recipe = small(tmp_path / "a.xyz", curate=None)
    loss = recipe.loss.model_copy(update={"stress": LossConfig().energy})
    chosen = recipe.train.model_copy(update={"select_stress_weight": 5.0})
    recipe = recipe.model_copy(update={"loss": loss, "train": chosen})
    outcome = Trainer(recipe, load_data(recipe), tmp_path / "run").run()
    row = RunLog(tmp_path / "run").rows()[-1]
    assert row["validation_stress_rmse"] == pytest.approx(outcome.errors["stress_rmse"])
    parts = row["validation_forces_rmse"] + 10 * row["validation_energy_rmse_per_atom"]
    stress = 5 * row["validation_stress_rmse"]
    assert row["score"] == pytest.approx(parts + stress)
    assert "meV/Å³" in (tmp_path / "run" / "log.txt").read_text(encoding="utf-8")
    file = str(tmp_path / "errors.json")
    command = ["evaluate", str(tmp_path / "run"), str(tmp_path / "a.xyz"), "--output", file]
    result = CliRunner().invoke(app, command, env={"COLUMNS": "120"})
    assert result.exit_code == 0, result.output
    assert "S RMSE" in result.stdout
    errors = json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))
    calculator = MLIPCalculator(str(tmp_path / "run"))
    differences = []
    for atoms in frames:
        if atoms.pbc.all():
            reference, copy = atoms.get_stress(voigt=False), atoms.copy()
            copy.calc = calculator
            differences.append(copy.get_stress(voigt=False) - reference)
    expected = np.sqrt(np.mean(np.square(differences)))
    assert errors["overall"]["stress_rmse"] == pytest.approx(expected, rel=1e-3)
    assert "stress_rmse" not in errors["by_subset"]["cluster"]


def test_a_table_of_an_older_version_keeps_its_columns(tmp_path):
    log = RunLog(tmp_path)
    log.epoch({"epoch": 1, "a": 2.0})
    log.epoch({"epoch": 2, "a": 3.0, "new": 4.0})
    assert log.rows() == [{"epoch": 1.0, "a": 2.0}, {"epoch": 2.0, "a": 3.0}]
