"""A recipe for a data set: it fits, it is explained, and nothing has to be repaired by hand."""

from pathlib import Path
from types import SimpleNamespace

import ase
import ase.io
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from test_data_judgement import SETS, springs, write
from typer.testing import CliRunner

from mlip_md.cli import app
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer import costs
from mlip_md.trainer.recipe import load_recipe


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments):
    return CliRunner().invoke(app, [*map(str, arguments)])


def check(*, expected=0):
    result = run("check", "train.yaml")
    assert result.exit_code == expected, (result.output, result.exception)
    return result


def test_one_molecule_with_its_atoms(tmp_path):
    write("set.xyz", SETS["one molecule"])
    atoms = [
        ase.Atoms(s, info={"energy": e}) for s, e in (("H", -13.6), ("C", -1030.5), ("O", -2e3))
    ]
    ase.io.write("atoms.xyz", atoms, format="extxyz")
    result = run("init", "set.xyz", "atoms.xyz")
    assert result.exit_code == 0, result.output
    recipe, _ = load_recipe("train.yaml")
    assert recipe.data.split.by == "structure"
    assert recipe.network.atomic_energies == "isolated"
    assert (recipe.loss.stress.weight[0].value, recipe.data.curate.neutral_only) == (0, False)
    text = (tmp_path / "train.yaml").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("  ") and ": " in line]
    bare = [row for row in rows if "#" not in row]
    assert len(rows) > 30
    assert len(bare) < len(rows) / 3
    result = check()
    assert result.stderr == ""
    assert "180 train, 20 validation" in result.stdout


def test_molecules_by_group_and_without_atoms():
    names = ("CH3OH", "C2H6", "CH3CHO", "H2CO", "CH3OCH3", "C2H4", "H2O", "CH4", "CH3CH2OH", "CO2")
    frames = [f for k, name in enumerate((*names, "C3H8")) for f in springs(name, 12, seed=k)]
    write("set.xyz", frames)
    assert run("init", "set.xyz", "--name", "own: one").exit_code == 0
    recipe, _ = load_recipe("train.yaml")
    assert recipe.name == "own: one"
    assert recipe.data.split.by == "group"
    assert recipe.network.atomic_energies == "average"
    assert check().stderr == ""


@pytest.mark.parametrize("which", ["one molecule", "water"])
def test_a_clean_set_of_one_composition_passes_strictly(which):
    """E0 are open there, which matters for no structure like these."""
    write("set.xyz", SETS["one molecule"] if which == "one molecule" else springs("H2O", 60))
    assert run("init", "set.xyz").exit_code == 0
    result = run("check", "train.yaml", "--strict")
    assert (result.exit_code, result.stderr) == (0, ""), result.exception
    assert "all structures have one formula, so E0 are open" in result.stdout


def test_a_batch_of_one_structure_and_what_the_filter_of_noise_is_are_said_plainly():
    write("set.xyz", springs("H2O", 30))
    assert run("init", "set.xyz").exit_code == 0
    written = Path("train.yaml").read_text(encoding="utf-8")
    assert "0.1    # eV/Å, net force over √atoms: noise of the method" in written
    assert "27 batches of 1 structure, at most 1, " in run("check", "train.yaml").stdout


def test_crystals_with_stress(tmp_path):
    random, frames = np.random.default_rng(0), []
    for k in range(40):
        atoms = bulk("Cu", "fcc", a=3.6 + 0.01 * (k % 5), cubic=True)
        atoms.positions += random.normal(0, 0.05, (4, 3))
        atoms.calc = EMT()
        results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces(),
                   "stress": atoms.get_stress()}  # fmt: skip
        atoms.calc = SinglePointCalculator(atoms, **results)
        frames.append(atoms)
    ase.io.write("cu.xyz", frames, format="extxyz")
    (tmp_path / "sub").mkdir()
    assert run("init", "cu.xyz", "-o", "sub/train.yaml").exit_code == 0
    recipe, _ = load_recipe("sub/train.yaml")
    assert recipe.loss.stress.weight[0].value > 0
    assert recipe.data.path == str(tmp_path / "cu.xyz")
    result = run("check", "sub/train.yaml")
    assert (result.exit_code, result.stderr) == (0, "")


def test_bad_records_charges_and_marks(tmp_path):
    frames = []
    for k in range(30):
        atoms = molecule("H2O")
        atoms.rattle(0.03, seed=k)
        forces = np.random.default_rng(k).normal(size=(3, 3)) + (1.0 if k % 2 else 0.0)
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0 * k, forces=forces)
        atoms.info["split"] = "validation" if k % 5 == 0 else "train"
        atoms.info["charge"] = int(k == 7)
        frames.append(atoms)
    frames[3].calc.results["forces"][0, 0] = np.nan
    ase.io.write("set.xyz", frames, format="extxyz")
    assert run("init", "set.xyz").exit_code == 0
    data = load_recipe("train.yaml")[0].data
    assert data.split.from_file
    assert data.on_bad == "skip"
    assert data.curate.neutral_only
    assert data.curate.max_net_force_per_sqrt_atom is None  # this set would lose much by it
    assert check().exit_code == 0


def test_energies_only():
    write("set.xyz", SETS["one molecule"])
    frames = ase.io.read("set.xyz", ":")
    for atoms in frames:
        atoms.calc.results.pop("forces")
    ase.io.write("energies.xyz", frames, format="extxyz")
    assert run("init", "energies.xyz").exit_code == 0
    assert load_recipe("train.yaml")[0].loss.forces.weight[0].value == 0
    check()


def test_what_is_refused(tmp_path):
    error = run("init", "none.xyz").exception
    assert isinstance(error, ConfigError)
    assert "there is no data file none.xyz" in str(error)
    write("set.xyz", SETS["one molecule"])
    (tmp_path / "train.yaml").write_text("")
    error = run("init", "set.xyz").exception
    assert isinstance(error, ConfigError)
    assert "train.yaml exists" in str(error)
    (tmp_path / "odd.xyz").write_text("nothing\n")
    assert isinstance(run("init", "odd.xyz", "-o", "b.yaml").exception, DataError)
    assert not (tmp_path / "b.yaml").exists()


def test_the_length_is_that_of_the_hours_given(tmp_path, monkeypatch):
    write("set.xyz", SETS["one molecule"])
    seen = []

    def judged(trainer):
        seen.append(trainer)
        return costs.Costs(1.0, None, 1.0, 12, 1.0, 3.0, 5.0, trainer.recipe.train.epochs)

    monkeypatch.setattr(costs, "judge_costs", judged)
    monkeypatch.setattr("mlip_md.trainer.train.Trainer", lambda r, d, f: SimpleNamespace(recipe=r))
    result = run("init", "set.xyz", "--hours", "0.5")
    assert result.exit_code == 0, (result.output, result.exception)
    recipe, _ = load_recipe("train.yaml")
    assert recipe.train.epochs == (1800 - 5 - 3) // (12 + 3)
    assert seen[0].recipe.train.epochs != recipe.train.epochs
    assert recipe.loss.energy.weight[1].from_epoch == round(0.75 * recipe.train.epochs)
    assert f"{recipe.train.epochs} epochs take 0.4" in result.stdout
