"""Errors of a potential on labeled structures, the report of a run, and the training commands."""

import json
import sys

import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from pair_potential import PairPotential, pair_potential
from training_cases import E0, molecules, small_recipe, write_data_set
from typer.testing import CliRunner

from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer import cli
from mlip_md.trainer.config import dump_resolved, load_recipe
from mlip_md.trainer.data import Structure
from mlip_md.trainer.evaluate import evaluate, write_json
from mlip_md.trainer.report import draw_curves, draw_parity
from mlip_md.trainer.train import Outcome, Trainer

ERRORS = {"A": (0.3, 0.5), "B": (-0.1, 0.2)}
"""Of the labels of each subset: energy error in eV, force error in eV/Å on every component."""


@pytest.fixture(scope="module")
def potential() -> PairPotential:
    return pair_potential(cutoff=4.0, reference=tuple(E0.values()))


@pytest.fixture(scope="module")
def labeled(potential):
    """Structures whose labels are the potential's own values plus known errors."""
    plain = [Structure(n, p, 0.0, np.zeros_like(f)) for n, p, _, f in molecules(12, seed=4)]
    own = evaluate(potential, plain)
    forces = np.split(own.forces[:, 1].reshape(-1, 3), np.cumsum([len(s) for s in plain])[:-1])
    structures = []
    for k, (structure, force) in enumerate(zip(plain, forces, strict=True)):
        subset = "A" if k < 5 else "B"
        e0 = sum(E0[int(z)] for z in structure.atomic_numbers)
        energy = own.energies[k, 1] * len(structure) + e0
        structures.append(
            Structure(
                structure.atomic_numbers,
                structure.positions,
                energy - ERRORS[subset][0],
                force - ERRORS[subset][1],
                subset=subset,
            )
        )
    return structures


def test_errors_are_those_put_into_the_labels(potential, labeled):
    result = evaluate(potential, labeled, batch_size=5)
    assert result.overall["structures"] == 12
    for subset, (energy, force) in ERRORS.items():
        errors = result.by_subset[subset]
        sizes = [len(s) for s in labeled if s.subset == subset]
        assert errors["structures"] == len(sizes)
        assert errors["energy_mae"] == pytest.approx(abs(energy), rel=1e-4)
        expected = np.mean([abs(energy) / n for n in sizes])
        assert errors["energy_mae_per_atom"] == pytest.approx(expected, rel=1e-4)
        assert errors["forces_mae"] == pytest.approx(force, rel=1e-4)
        assert errors["forces_rmse"] == pytest.approx(force, rel=1e-4)
    atoms = [sum(len(s) for s in labeled if s.subset == name) for name in "AB"]
    expected = np.average([force for _, force in ERRORS.values()], weights=atoms)
    assert result.overall["forces_mae"] == pytest.approx(expected, rel=1e-4)


def test_errors_do_not_depend_on_the_batch_size(potential, labeled):
    few, many = evaluate(potential, labeled, batch_size=2), evaluate(potential, labeled, 12)
    for name, value in few.overall.items():
        assert many.overall[name] == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(few.forces, many.forces, atol=1e-5)


def test_the_evaluate_command_prints_and_writes(potential, labeled, tmp_path, monkeypatch):
    import ase
    import typer

    frames = []
    for structure in labeled:
        atoms = ase.Atoms(structure.atomic_numbers, structure.positions)
        atoms.calc = SinglePointCalculator(atoms, energy=structure.energy, forces=structure.forces)
        frames.append(atoms)
    write(tmp_path / "set.xyz", frames, format="extxyz")
    monkeypatch.setattr("mlip_md.load", lambda name: potential)
    app = typer.Typer()
    app.command()(cli.evaluate_command)
    arguments = ["model", str(tmp_path / "set.xyz"), "--output", str(tmp_path / "errors.json")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    errors = json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))
    expected = evaluate(potential, labeled).overall
    assert errors["overall"]["forces_rmse"] == pytest.approx(expected["forces_rmse"], rel=1e-4)
    assert f"{1000 * expected['forces_rmse']:.3f}" in result.output


def test_pictures_are_drawn_without_a_global_backend(potential, labeled, tmp_path, monkeypatch):
    # Other tests of this process may have loaded it.
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    rows = [
        {"epoch": e, "stage": 1 + (e > 2), "loss": 1.0 / (e + 1),
         "validation_energy_rmse_per_atom": 0.1, "validation_forces_rmse": 0.2}
        for e in range(5)
    ]  # fmt: skip
    draw_curves(rows, tmp_path / "curves.png")
    draw_parity(evaluate(potential, labeled), tmp_path / "parity.png", "test")
    for name in ("curves", "parity"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "matplotlib.pyplot" not in sys.modules
    write_json(evaluate(potential, labeled), tmp_path / "errors.json")
    assert set(json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))["by_subset"]) == {
        "A",
        "B",
    }


def test_commands_check_and_prepare(tmp_path):
    from mlip_md.cli import app

    recipe = tmp_path / "train.yaml"
    path = write_data_set(tmp_path / "set.hdf5")
    resolved = small_recipe(path).plain()
    recipe.write_text(json.dumps(resolved))
    result = CliRunner().invoke(app, ["check", str(recipe), "--deep"])
    assert result.exit_code == 0, result.output
    for part in ("48 train, 6 validation, 6 test", "E0 (", "neighbors per atom", "working_bytes"):
        assert part in result.output
    result = CliRunner().invoke(app, ["prepare", str(recipe), str(tmp_path / "prepared")])
    assert result.exit_code == 0, result.output
    assert "48 train, 6 validation, 6 test" in result.output
    from mlip_md.trainer.dataset import load_data

    mapped = load_recipe(str(recipe), [f"data.path={tmp_path / 'prepared'}"])[0]
    direct = load_recipe(str(recipe))[0]
    assert load_data(mapped).fingerprint == load_data(direct).fingerprint
    other = load_recipe(str(recipe), [f"data.path={tmp_path / 'prepared'}", "data.cutoff=3.0"])[0]
    with pytest.raises(ConfigError, match=r"prepared with a cutoff of 4\.0"):
        load_data(other)


def test_labels_of_other_names_and_unusable_structures(tmp_path):
    """The recipe names the labels of an extxyz file and what to do with structures without them."""
    from ase.build import molecule

    from mlip_md.trainer.dataset import load_data

    frames = []
    for k in range(12):
        atoms = molecule("H2O")
        atoms.rattle(0.03, seed=k)
        atoms.info.update(dft_energy=-10.0 + k, smiles=f"water {k}")
        atoms.arrays["dft_forces"] = np.full((3, 3), 0.01 * k)
        frames.append(atoms)
    frames[5].arrays["dft_forces"][1] = np.nan
    write(tmp_path / "set.xyz", frames, format="extxyz")
    keys = {"energy_key": "dft_energy", "forces_key": "dft_forces", "curate": None}

    def load(**changes):
        data = {"path": str(tmp_path / "set.xyz"), **changes}
        return load_data(small_recipe("x", data=data))

    with pytest.raises(DataError, match="no energy under REF_energy or energy or Energy"):
        load()
    with pytest.raises(DataError, match=r"\[5\].*(NaN|finite)"):
        load(**keys)
    data = load(**keys, on_bad="skip")
    assert sum(len(part) for part in data.parts().values()) == 11


@pytest.mark.parametrize(
    ("status", "code"), [("done", 0), ("keyboard", 130), ("time", 75), ("terminated", 75)]
)
def test_exit_codes_of_the_train_command(status, code, tmp_path, monkeypatch):
    import typer

    class Instant:
        def __init__(self, recipe, data, folder, **_):
            self.folder = folder

        def run(self, resume, seconds):
            assert (resume, seconds) == ("must", 3600 * 23 + 60 * 30)
            return Outcome(status, self.folder, 3, {})

    monkeypatch.setattr("mlip_md.trainer.train.Trainer", Instant)
    monkeypatch.setattr("mlip_md.trainer.dataset.load_data", lambda recipe: None)
    app = typer.Typer()
    app.command()(cli.train_command)
    arguments = ["organics-gfn2", "--run", str(tmp_path), "--resume", "must", "--max-time", "23:30"]
    assert CliRunner().invoke(app, arguments).exit_code == code


@pytest.mark.parametrize("text", ["5", "1:60", "a:b", ":", "-1:00"])
def test_odd_durations_are_refused(text):
    with pytest.raises(ConfigError, match="HH:MM"):
        cli.parse_duration(text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mace", "nequip"])
def test_from_recipe_to_a_potential_that_loads(kind, tmp_path):
    """Whole way with real networks: train, best model, report, load, evaluate."""
    import mlip_md
    from mlip_md.trainer.data import read
    from mlip_md.trainer.dataset import load_data

    models = {
        "mace": small_recipe("x").model,
        "nequip": {
            "kind": "nequip", "num_layers": 2, "node_irreps": "4x0e + 2x1o", "l_max": 1,
            "radial_net_n_hidden": 8,
        },
    }  # fmt: skip
    path = write_data_set(tmp_path / "set.hdf5")
    recipe = small_recipe(path, model=models[kind], log={"plots": True})
    recipe = recipe.model_copy(update={"model": models[kind]})
    data = load_data(recipe)
    outcome = Trainer(recipe, data, tmp_path / "run").run()
    potential = mlip_md.load(str(tmp_path / "run"))
    assert potential.info["training"]["validation"] == outcome.errors
    assert {p.name for p in (tmp_path / "run" / "report").iterdir()} == {
        "curves.png", "errors-test.json", "parity.png"
    }  # fmt: skip
    errors = json.loads(
        (tmp_path / "run" / "report" / "errors-test.json").read_text(encoding="utf-8")
    )["overall"]
    test = [s for s in read(path) if s.name in set(data.test.names)]
    again = evaluate(potential, test).overall
    for name, value in errors.items():
        assert again[name] == pytest.approx(value, rel=1e-3)
    resolved = (tmp_path / "run" / "config.resolved.yaml").read_text(encoding="utf-8")
    assert "default" in resolved
    assert dump_resolved(*load_recipe(str(tmp_path / "run" / "config.resolved.yaml")))
