"""Errors of a potential on labeled structures, the report of a run, and the training commands."""

import dataclasses
import errno
import importlib.util
import json
import logging
import math
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import ase
import ase.io
import numpy as np
import pytest
import typer
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write
from pair_potential import PairPotential, pair_potential
from training_cases import E0, molecules, small_recipe, write_data_set
from typer.testing import CliRunner

from mlip_md import devices, trainer
from mlip_md.cli import EXIT_CODES
from mlip_md.engine import Engine
from mlip_md.errors import CapacityError, ConfigError, DataError, OutputError
from mlip_md.trainer import cli, costs
from mlip_md.trainer.data import LabeledStructure, Statistics, load_data, prepare, read
from mlip_md.trainer.data.statistics import warn_of_open_energies
from mlip_md.trainer.evaluation import evaluate, write_errors
from mlip_md.trainer.recipe import (
    RECIPES,
    DataConfig,
    SplitConfig,
    dump_resolved,
    load_recipe,
)
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
    plain = [LabeledStructure(n, p, 0.0, np.zeros_like(f)) for n, p, _, f in molecules(12, seed=4)]
    own = evaluate(potential, plain)
    forces = np.split(own.forces[:, 1].reshape(-1, 3), np.cumsum([len(s) for s in plain])[:-1])
    structures = []
    for k, (structure, force) in enumerate(zip(plain, forces, strict=True)):
        subset = "A" if k < 5 else "B"
        e0 = sum(E0[int(z)] for z in structure.atomic_numbers)
        energy = own.energies[k, 1] * len(structure) + e0
        structures.append(
            LabeledStructure(
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


def test_errors_of_elements_are_those_of_their_atoms(potential, labeled):
    """Half of the oxygens are wrong by 1 eV/Å more along x."""
    off = [dataclasses.replace(s, forces=s.forces.copy(), subset="") for s in labeled]
    before, wrong = evaluate(potential, off).by_element, 0
    for structure in off[::2]:
        oxygens = structure.atomic_numbers == 8
        structure.forces[oxygens, 0] += 1.0
        wrong += int(oxygens.sum())
    result = evaluate(potential, off)
    assert list(result.by_element) == ["H", "C", "O"]
    for name in "HC":
        assert result.by_element[name] == before[name]
    numbers = np.concatenate([s.atomic_numbers for s in labeled])
    counts = {name: errors["atoms"] for name, errors in result.by_element.items()}
    assert counts == {n: float((numbers == z).sum()) for n, z in zip("HCO", E0, strict=True)}
    gaps = np.concatenate([s.forces for s in off])[numbers == 8]
    gaps -= np.concatenate(result.predictions.forces)[numbers == 8]
    assert result.by_element["O"]["forces_mae"] == pytest.approx(np.abs(gaps).mean(), rel=1e-5)
    expected = np.sqrt(np.square(gaps).mean())
    assert result.by_element["O"]["forces_rmse"] == pytest.approx(expected, rel=1e-5)
    assert wrong
    assert before["O"]["forces_rmse"] != pytest.approx(expected, rel=1e-2)


def test_the_worst_structures_are_named(potential, labeled):
    """By their forces and energies; one without labels of forces by its energy alone."""
    named = [dataclasses.replace(s, name=f"s{k}") for k, s in enumerate(labeled)]
    named[3] = dataclasses.replace(named[3], energy=named[3].energy - 5.0 * len(named[3]))
    named[7] = dataclasses.replace(named[7], forces=named[7].forces + 9.0)
    named[9] = dataclasses.replace(
        named[9], forces=None, has_forces=True, energy=named[9].energy - 2.0 * len(named[9])
    )
    result = evaluate(potential, named)
    first, second, third, *others = result.worst(12)
    assert [first["name"], second["name"], third["name"]] == ["s3", "s9", "s7"]
    assert first["subset"] == "A"
    assert first["energy_mae_per_atom"] == pytest.approx(5.0 + 0.3 / len(named[3]), rel=1e-4)
    assert math.isnan(second["forces_rmse"])
    assert third["forces_rmse"] == pytest.approx(9.2, rel=0.05)
    assert {row["name"] for row in others} == {f"s{k}" for k in range(12)} - {"s3", "s7", "s9"}
    assert len(result.worst()) == 5


def test_predictions_are_written_beside_labels(run_evaluate, potential, labeled, tmp_path):
    """In the order of the file, with totals, and with everything that has no label left out."""
    frames = [frame(s, config_type=s.subset) for s in labeled[:5]]
    del frames[2].calc.results["forces"]
    for k in (1, 3):
        frames[k].set_cell(6 * np.eye(3))
        frames[k].set_pbc(True)
    frames[3].calc.results["stress"] = np.arange(6) / 100
    write(tmp_path / "set.xyz", frames, format="extxyz")
    files = ("--extxyz", tmp_path / "out.xyz", "--plot", tmp_path / "out.png")
    result = run_evaluate(tmp_path / "set.xyz", *files, "--output", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    written = ase.io.read(tmp_path / "out.xyz", ":")
    engine = Engine(potential)
    for k, (before, after) in enumerate(zip(frames, written, strict=True)):
        here = engine.evaluate(before.positions, before.numbers, before.cell.array, before.pbc)
        assert after.info["REF_energy"] == pytest.approx(labeled[k].energy)
        assert after.info["mlip_md_energy"] == pytest.approx(here.energy, abs=1e-3)
        np.testing.assert_allclose(after.arrays["mlip_md_forces"], here.forces, atol=1e-4)
        assert ("REF_forces" in after.arrays) == (k != 2)
        assert ("REF_stress" in after.info) == (k == 3)
        assert ("mlip_md_stress" in after.info) == (k in (1, 3))
        assert after.info["subset"] == "A"
    stress = np.array([[0, 5, 4], [5, 1, 3], [4, 3, 2]]) / 100
    np.testing.assert_allclose(written[3].info["REF_stress"], stress, atol=1e-7)
    errors = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    gap = written[3].info["mlip_md_stress"] - stress
    assert errors["overall"]["stress_mae"] == pytest.approx(np.abs(gap).mean(), rel=1e-4)
    assert [row["name"].rpartition("[")[2] for row in errors["worst"]] != []
    [unlabeled] = [row for row in errors["worst"] if row["forces_rmse"] is None]
    assert unlabeled["name"].endswith("[2]")


def test_what_the_package_offers_is_what_its_modules_hold():
    """No name is that of a module, which an import would put in its place."""
    for name in trainer.__all__:
        offered = getattr(trainer, name)
        assert callable(offered)
        assert offered is getattr(sys.modules[offered.__module__], name)
        assert importlib.util.find_spec(f"mlip_md.trainer.{name}") is None
    assert trainer.evaluate is evaluate


def test_the_program_of_the_page_on_evaluation_runs(tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    [program] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    write_data_set(tmp_path / "test.hdf5", 20)
    (tmp_path / "train.yaml").write_text(json.dumps(small_recipe("test.hdf5").plain()))
    exec(program, {})
    assert 0.01 < float(capsys.readouterr().out) < 100.0


def test_errors_do_not_depend_on_the_batch_size(potential, labeled):
    few, many = evaluate(potential, labeled, batch_size=2), evaluate(potential, labeled, 12)
    for name, value in few.overall.items():
        assert many.overall[name] == pytest.approx(value, rel=1e-5)
    np.testing.assert_allclose(few.forces, many.forces, atol=1e-5)


def frame(structure, **others):
    atoms = ase.Atoms(structure.atomic_numbers, structure.positions)
    atoms.calc = SinglePointCalculator(atoms, energy=structure.energy, forces=structure.forces)
    atoms.info.update(others)
    return atoms


@pytest.fixture
def run_evaluate(potential, monkeypatch):
    """Call the command for the potential with a data file and options."""
    monkeypatch.setattr("mlip_md.load", lambda name, head=None: potential)
    app = typer.Typer()
    app.command()(cli.evaluate_command)
    return lambda *arguments: CliRunner().invoke(app, ["model", *map(str, arguments)])


def test_the_evaluate_command_prints_and_writes(run_evaluate, potential, labeled, tmp_path):
    write(tmp_path / "set.xyz", [frame(s) for s in labeled], format="extxyz")
    result = run_evaluate(tmp_path / "set.xyz", "--output", tmp_path / "errors.json")
    assert result.exit_code == 0, result.output
    errors = json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))
    expected = evaluate(potential, labeled).overall
    assert errors["overall"]["forces_rmse"] == pytest.approx(expected["forces_rmse"], rel=1e-4)
    assert result.output.count(f"{1000 * expected['forces_rmse']:.3f}") == 1
    assert "unnamed" not in result.output
    marked = [frame(s, config_type=s.subset) for s in labeled]
    write(tmp_path / "marked.xyz", marked, format="extxyz")
    lines = run_evaluate(tmp_path / "marked.xyz").output.splitlines()
    assert [line.split()[1] for line in lines[3:6]] == ["A", "B", "all"]


def test_an_output_that_cannot_be_written_is_found_before_the_work(
    run_evaluate, labeled, tmp_path, monkeypatch
):
    write(tmp_path / "set.xyz", [frame(s) for s in labeled[:2]], format="extxyz")
    for output, message in (
        ("none/errors.json", "there is no folder"),
        (".", "is a folder; name a file"),
    ):
        result = run_evaluate(tmp_path / "absent.xyz", "--output", tmp_path / output)
        assert isinstance(result.exception, ConfigError)
        assert message in str(result.exception)

    def full(evaluation, path, worst):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mlip_md.trainer.evaluation.write_errors", full)
    result = run_evaluate(tmp_path / "set.xyz", "--output", tmp_path / "errors.json")
    assert isinstance(result.exception, OSError)
    assert "F RMSE" in result.output


def test_a_potential_is_evaluated_on_what_a_recipe_can_read(run_evaluate, labeled, tmp_path):
    """Labels of other names, a structure without labels and one of an unknown element."""
    frames = [ase.Atoms(s.atomic_numbers, s.positions) for s in labeled]
    for atoms, structure in zip(frames, labeled, strict=True):
        atoms.info["dft_energy"] = structure.energy
        atoms.arrays["dft_forces"] = structure.forces
    del frames[3].info["dft_energy"]
    frames[5].numbers[0] = 9
    write(tmp_path / "set.xyz", frames, format="extxyz")
    keys = ("--energy-key", "dft_energy", "--forces-key", "dft_forces")
    assert "no energy under" in str(run_evaluate(tmp_path / "set.xyz").exception)
    assert r"[3]: no energy" in str(run_evaluate(tmp_path / "set.xyz", *keys).exception)
    result = run_evaluate(tmp_path / "set.xyz", *keys, "--on-bad", "skip")
    assert result.exit_code == 0, result.output
    assert "1 structures of other elements were left out" in result.output
    assert "Warning: " in result.output
    assert "all    │ 10 " in result.output
    write(tmp_path / "set.xyz", frames[5:], format="extxyz")
    result = run_evaluate(tmp_path / "set.xyz", *keys)
    assert "[0]: the potential was not made for F; leave" in str(result.exception)


def test_a_prepared_folder_is_evaluated(run_evaluate, potential, labeled, tmp_path):
    fluorine = LabeledStructure([1, 9], [[0.0, 0, 0], [0.9, 0, 0]], -1.0, np.zeros((2, 3)))
    frames = [*(frame(s, split="train") for s in labeled), frame(fluorine, split="train")]
    write(tmp_path / "set.xyz", frames, format="extxyz")
    folder = tmp_path / "prepared"
    rows = {"path": str(tmp_path / "set.xyz"), "curate": None}
    marked = DataConfig(**rows, cutoff=potential.cutoff, split=SplitConfig(from_file=True))
    prepare(marked, folder=folder)
    assert "not made for F" in str(run_evaluate(folder).exception)
    assert "no part test; it has train" in str(run_evaluate(folder, "--split", "test").exception)
    expected = f"{1000 * evaluate(potential, labeled).overall['forces_rmse']:.3f}"
    for part in ((), ("--split", "train")):
        result = run_evaluate(folder, "--on-bad", "skip", *part)
        assert result.exit_code == 0, result.output
        assert expected in result.output
        assert "1 structures of other elements were left out" in result.output
    prepare(DataConfig(**rows, cutoff=3.0), folder=tmp_path / "other")
    assert "with a cutoff of 3.0 Å" in str(run_evaluate(tmp_path / "other").exception)


def test_pictures_are_drawn_without_a_global_backend(potential, labeled, tmp_path, monkeypatch):
    # Other tests of this process may have loaded it.
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    rows = [
        {"epoch": e, "stage": 1 + (e > 2), "loss": 1.0 / (e + 1),
         "validation_energy_rmse_per_atom": 0.1, "validation_forces_rmse": 0.2}
        for e in range(5)
    ]  # fmt: skip
    draw_curves(rows, tmp_path / "curves.png")
    draw_curves([], tmp_path / "empty.png")  # after a loss of metrics.csv
    draw_parity(evaluate(potential, labeled), tmp_path / "parity.png", "test")
    for name in ("curves", "empty", "parity"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "matplotlib.pyplot" not in sys.modules
    write_errors(evaluate(potential, labeled), tmp_path / "errors.json")
    assert set(json.loads((tmp_path / "errors.json").read_text(encoding="utf-8"))["by_subset"]) == {
        "A",
        "B",
    }


def test_a_picture_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "curves.png").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"curves\.png could not be written \(No space left"):
        draw_curves([], tmp_path / "curves.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]


def test_commands_check_and_prepare(tmp_path):
    from mlip_md.cli import app

    recipe = tmp_path / "train.yaml"
    path = write_data_set(tmp_path / "set.hdf5")
    resolved = small_recipe(path).plain()
    recipe.write_text(json.dumps(resolved))
    result = CliRunner().invoke(app, ["check", str(recipe), "--deep"])
    assert result.exit_code == 0, result.output
    for part in (
        "48 train, 6 validation, 6 test",
        "E0 (",
        "neighbors per atom",
        "a step needs 0.0",
        " GB available",
        "6 steps per epoch",
        "4 epochs take ",
    ):
        assert part in result.output
    result = CliRunner().invoke(app, ["prepare", str(recipe), str(tmp_path / "prepared")])
    assert result.exit_code == 0, result.output
    assert "48 train, 6 validation, 6 test" in result.output
    mapped = load_recipe(str(recipe), [f"data.path={tmp_path / 'prepared'}"])[0]
    direct = load_recipe(str(recipe))[0]
    assert load_data(mapped).fingerprint == load_data(direct).fingerprint


def test_a_step_that_cannot_fit_is_refused_before_it_is_made(tmp_path, monkeypatch):
    recipe = small_recipe(write_data_set(tmp_path / "set.hdf5"))
    trainer = Trainer(recipe, load_data(recipe), tmp_path / "run")
    little = devices.DeviceMemory(1000, 1000, "a chip")
    monkeypatch.setattr(devices, "device_memory", lambda device: little)
    monkeypatch.setattr(costs, "time_steps", None)
    with pytest.raises(
        CapacityError, match=r"steps of 8 .* need about .* GiB of a chip.*batch_size"
    ):
        costs.judge_costs(trainer)


def test_hours_are_those_of_steps_and_validations():
    found = costs.Costs(
        needed=2e9, available=None, flops=np.nan, steps=100, seconds_per_step=0.5,
        validation_seconds=10.0, compile_seconds=50.0, epochs=60,
    )  # fmt: skip
    assert found.hours() == pytest.approx((50 + 10 + 60 * 60) / 3600)
    assert found.epochs_in(found.hours() + 1e-6) == 60
    assert found.epochs_in(0.0) == 1
    assert "60 epochs take 1.02 hours on cpu:0" in found.lines()[1]
    assert found.lines()[0] == "memory: a step needs 2 GB"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data file and the folder that it was prepared to."""
    folder = tmp_path_factory.mktemp("data")
    file = write_data_set(folder / "set.hdf5", 20)
    prepare(small_recipe(file).data, folder=folder / "prepared")
    return file, folder / "prepared"


@pytest.mark.parametrize(
    ("row", "changes"),
    [
        ("cutoff is 3.0, but .* with 4.0", {"cutoff": 3.0}),
        ("split.train is 0.9, but .* with 0.8", {"split": {"train": 0.9, "validation": 0.1}}),
        ("split.seed is 1, but .* with 0",
         {"split": {"train": 0.8, "validation": 0.1, "test": 0.1, "seed": 1}}),
        ("split.from_file is true", {"split": {"from_file": True}}),
        ("curate is {.*, but .* with null", {"curate": {}}),
        ("validation is .*other.xyz", {"validation": "other.xyz"}),
        ("on_bad is .skip., but .* with .error", {"on_bad": "skip"}),
    ],
)  # fmt: skip
def test_a_prepared_folder_and_a_recipe_that_says_otherwise(row, changes, prepared):
    assert load_data(small_recipe(prepared[1]))
    with pytest.raises(ConfigError, match=f"data.{row}.*change data.{row.split()[0]}"):
        load_data(small_recipe(prepared[1], data=changes))


def test_filters_of_a_prepared_folder_are_compared(prepared, tmp_path):
    curate = {"elements": ["H", "C", "O"], "one_bond_per_hydrogen": False, "max_net_force": None}
    recipe = small_recipe(prepared[0], data={"curate": curate})
    prepare(recipe.data, folder=tmp_path / "curated")
    assert load_data(small_recipe(tmp_path / "curated", data={"curate": curate}))
    for change, row in (
        ({"one_bond_per_hydrogen": True}, "curate.one_bond_per_hydrogen is true"),
        ({"max_force": 10.0}, "curate.max_force is 10.0"),
        ({"elements": None}, "curate.elements is null"),
    ):
        other = small_recipe(tmp_path / "curated", data={"curate": {**curate, **change}})
        with pytest.raises(ConfigError, match=f"data.{row}, but"):
            load_data(other)


def test_given_atomic_energies_hold_for_a_prepared_folder(prepared):
    file, folder = prepared
    for energies, source in ((E0, "given"), ("zero", "zero"), ("average", "fitted to the data")):
        model = {"kind": "mace", "atomic_energies": energies}
        mapped, direct = (load_data(small_recipe(p, model=model)) for p in (folder, file))
        assert mapped.statistics.atomic_energies_source == source
        assert mapped.fingerprint == direct.fingerprint
        np.testing.assert_array_equal(
            mapped.test.interaction_energy, direct.test.interaction_energy
        )


def test_folders_where_files_belong_are_named(prepared):
    file, folder = prepared
    cases = (
        ({"path": [str(file), str(folder)]}, f"{folder} is a folder of prepared data; it can only"),
        ({"path": str(file), "test": str(folder)}, f"{folder} is a folder of prepared data"),
        ({"path": str(folder / "graphs" / "none")}, "there is no data file .*none"),
    )
    for changes, message in cases:
        with pytest.raises(DataError, match=message):
            load_data(small_recipe(file, data=changes))


def test_a_shipped_recipe_can_be_printed():
    from mlip_md.cli import app

    result = CliRunner().invoke(app, ["check", "mace-spice2", "--print"])
    assert result.exit_code == 0
    assert result.output == (RECIPES / "mace_spice2.yaml").read_text(encoding="utf-8")


def test_labels_of_other_names_and_unusable_structures(tmp_path):
    """The recipe names the labels of an extxyz file and what to do with structures without them."""
    from ase.build import molecule

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
    ("status", "code", "problem"),
    [("done", 0, ""), ("done", 8, "nothing"), ("keyboard", 130, ""), ("time", 75, ""),
     ("terminated", 75, "")],
)  # fmt: skip
def test_exit_codes_of_the_train_command(status, code, problem, tmp_path, monkeypatch):
    class Instant:
        def __init__(self, recipe, data, folder, **_):
            self.folder = folder

        def run(self, resume, seconds):
            assert resume == "allow-changes"
            assert 0 < 3600 * 23 + 60 * 30 - seconds < 7200  # since the process began
            return Outcome(status, self.folder, 3, {}, problem)

    def load(recipe, keep, **_):
        assert keep == tmp_path / "prepared"
        logging.getLogger("mlip_md.trainer.data.readers").warning("skipped: %s", "x.xyz:[3]")
        energies = np.array([-13.6, -1030.5, -2043.9])
        statistics = Statistics(
            (1, 6, 8), energies, "given", ("1 E0(H) - 2 E0(O)",), 9.5, 1.0, 0.5, 7, 20, 190
        )
        warn_of_open_energies(statistics)
        notes = ("a.h5: kept 7 of 9 structures",)
        return SimpleNamespace(notes=notes, statistics=statistics, rejected=())

    monkeypatch.setattr("mlip_md.trainer.train.Trainer", Instant)
    monkeypatch.setattr("mlip_md.trainer.data.load_data", load)
    app = typer.Typer()
    app.command()(cli.train_command)
    options = ["--run", str(tmp_path), "--resume", "allow-changes", "--max-time", "23:30"]
    result = CliRunner().invoke(app, ["organics-gfn2", *options])
    if problem:
        assert EXIT_CODES[type(result.exception)] == code
        return
    assert result.exit_code == code
    lines = result.stdout.splitlines()
    assert lines[:2] == ["reading organics-gfn2.h5", "a.h5: kept 7 of 9 structures"]
    assert lines[2] == "E0 (given), eV: H -13.6000, C -1030.5000, O -2043.9000"
    assert lines[-1] == "compiling the network"
    skipped, energies = result.stderr.splitlines()
    assert skipped == "Warning: skipped: x.xyz:[3]"
    assert energies.startswith("Warning: the data leave E0 open by any multiple of 1 E0(H) - 2 E0")
    assert not logging.getLogger("mlip_md").handlers


@pytest.mark.parametrize(
    ("command", "before"), [(cli.train_command, ["--run"]), (cli.prepare_command, [])]
)
def test_a_file_where_a_folder_should_go_is_found_before_the_work(command, before, tmp_path):
    app = typer.Typer()
    app.command()(command)
    (tmp_path / "taken").write_text("")
    for folder in ("taken", "taken/run"):
        arguments = ["organics-gfn2", *before, str(tmp_path / folder)]  # and no data set is there
        error = CliRunner().invoke(app, arguments).exception
        assert isinstance(error, ConfigError)
        assert f"{tmp_path / 'taken'} is a file; name another folder" in str(error)


@pytest.mark.parametrize("text", ["5", "1:60", "a:b", ":", "-1:00"])
def test_odd_durations_are_refused(text):
    with pytest.raises(ConfigError, match="HH:MM"):
        cli.parse_duration(text)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mace", "nequip"])
def test_from_recipe_to_a_potential_that_loads(kind, tmp_path):
    """Whole way with real networks: train, best model, report, load, evaluate."""
    import mlip_md

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
