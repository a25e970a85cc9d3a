"""Prepared data: files to parts, the same in memory and from a folder, no leaks between parts."""

import gzip
import json
import re
import shutil
import subprocess
import sys
import time

import ase
import ase.io
import h5py
import jax
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from training_cases import small_recipe
from typer.testing import CliRunner

import mlip_md
from mlip_md.cli import app
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer import cli
from mlip_md.trainer.data import (
    BatchBudget,
    is_prepared,
    load_data,
    make_batch,
    open_prepared,
    open_store,
    plan_epoch,
    prepare,
)
from mlip_md.trainer.data import blocks as blocks_module
from mlip_md.trainer.data import prepared as prepared_module
from mlip_md.trainer.data import sources as sources_module
from mlip_md.trainer.data.prepared import open_prepared_for, warn_of_energies
from mlip_md.trainer.data.readers import iterate
from mlip_md.trainer.data.sources import Reading
from mlip_md.trainer.recipe import DataConfig, Recipe

NAMES = ("H2O", "CH4", "CO2", "CH3OH", "C2H6", "H2", "C6H6", "CH3COOH")
SPLIT = {"train": 0.5, "validation": 0.25, "test": 0.25}


def prepared(path, folder=None, **rows):
    rows = {"cutoff": 4.0, "curate": None, **rows}
    path = path if isinstance(path, list) else str(path)
    return prepare(DataConfig.model_validate({"path": path, **rows}), folder=folder)


def frames(names=NAMES, copies=3, seed=0):
    generator = np.random.default_rng(seed)
    result = []
    for name in names:
        for _ in range(copies):
            atoms = molecule(name)
            atoms.rattle(0.03, seed=int(generator.integers(1e6)))
            energy = float(-100.0 * atoms.numbers.sum() + generator.normal())
            forces = generator.normal(scale=0.1, size=(len(atoms), 3))
            atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
            atoms.info["smiles"] = name
            result.append(atoms)
    return result


@pytest.fixture
def path(tmp_path):
    ase.io.write(tmp_path / "all.xyz", frames(), format="extxyz")
    return tmp_path / "all.xyz"


def test_the_folder_holds_the_same_as_the_memory(path, tmp_path):
    curate = {"max_net_force": None}
    ours = prepared(path, split=SPLIT, curate=curate)
    theirs = prepared(path, split=SPLIT, curate=curate, folder=tmp_path / "prepared")
    assert is_prepared(tmp_path / "prepared")
    assert list(ours.parts) == list(theirs.parts) == ["train", "validation", "test"]
    assert ours.statistics.to_dict() == theirs.statistics.to_dict()
    assert ours.config == theirs.config
    assert ours.curation[str(path)].total == theirs.curation[str(path)].total == 24
    budget = BatchBudget.from_card(4, store=ours.parts["train"])
    for name, store in ours.parts.items():
        other = theirs.parts[name]
        assert store.names == other.names
        assert isinstance(other.positions, np.memmap)
        budget = BatchBudget.from_card(4, store=store)
        for indices in plan_epoch(store, budget, 0, 0):
            batches = (make_batch(s, indices, budget) for s in (store, other))
            jax.tree.map(np.testing.assert_array_equal, *batches)


def test_nothing_is_lost_and_no_molecule_parted(path):
    data = prepared(path, split=SPLIT)
    names = [name for store in data.parts.values() for name in store.names]
    assert sorted(names) == sorted(f"{path}:[{k}]" for k in range(24))
    groups = [set(store.groups) for store in data.parts.values()]
    assert sum(len(g) for g in groups) == len(set.union(*groups)) == len(NAMES)


def test_energies_are_relative_to_the_training_part(path):
    data = prepared(path, split=SPLIT)
    train, validation = data.parts["train"], data.parts["validation"]
    np.testing.assert_allclose(train.interaction_energy.mean(), 0, atol=0.5)
    assert train.elements == validation.elements == data.statistics.elements
    species = {z: k for k, z in enumerate(train.elements)}
    for store in data.parts.values():
        batch = make_batch(store, np.array([0]), BatchBudget(50, 1000, 2))
        atoms = ase.io.read(store.names[0].split(":")[0], int(store.names[0].split("[")[1][:-1]))
        expected = [species[int(z)] for z in atoms.numbers]
        assert batch.graph.species[: len(atoms)].tolist() == expected
        reference = sum(data.statistics.atomic_energies[expected])
        np.testing.assert_allclose(
            batch.energy[0], atoms.get_potential_energy() - reference, atol=1e-4
        )


def test_files_of_their_own(path, tmp_path):
    ase.io.write(tmp_path / "valid.xyz", frames(("H2O",), 2, seed=7), format="extxyz")
    data = prepared(path, validation=str(tmp_path / "valid.xyz"))
    assert {name: len(store) for name, store in data.parts.items()} == {
        "train": 24,
        "validation": 2,
    }
    data = prepared(path, validation=str(tmp_path / "valid.xyz"), split=SPLIT)
    assert {name: len(store) for name, store in data.parts.items()} == {
        "train": 18,
        "validation": 2,
        "test": 6,
    }


def test_leaks_between_files_are_refused(path, tmp_path):
    ase.io.write(tmp_path / "valid.xyz", frames()[3:5], format="extxyz")
    with pytest.raises(DataError, match=r"valid\.xyz:\[0\]: a duplicate.*all\.xyz:\[3\]"):
        prepared(path, validation=str(tmp_path / "valid.xyz"))


def test_elements_of_validation_only(path, tmp_path):
    ase.io.write(tmp_path / "valid.xyz", frames(("NH3",), 1), format="extxyz")
    with pytest.raises(DataError, match=r"valid\.xyz:\[0\]: N is not among the elements H, C, O"):
        prepared(path, validation=str(tmp_path / "valid.xyz"))


def test_marks_of_the_file(tmp_path):
    marked = frames()
    for k, atoms in enumerate(marked):
        atoms.info["split"] = ("train", "validation")[k % 4 == 0]
    ase.io.write(tmp_path / "a.xyz", marked, format="extxyz")
    data = prepared(tmp_path / "a.xyz", split={"from_file": True})
    assert data.parts["validation"].names == tuple(
        f"{tmp_path / 'a.xyz'}:[{k}]" for k in range(0, 24, 4)
    )
    assert len(data.parts["train"]) == 18
    ase.io.write(tmp_path / "b.xyz", frames(), format="extxyz")
    with pytest.raises(DataError, match="no split is marked"):
        prepared(tmp_path / "b.xyz", split={"from_file": True})


def test_a_failed_preparation_leaves_nothing(path, tmp_path):
    with open(path, "a") as stream:
        stream.write("1\nProperties=species:S:1:pos:R:3 energy=1 pbc=T\nH 0 0 0\n")
    with pytest.raises(DataError):
        prepared(path, folder=tmp_path / "prepared")
    assert not [p for p in tmp_path.iterdir() if "prepared" in p.name]


def test_damaged_folders(path, tmp_path):
    folder = tmp_path / "prepared"
    prepared(path, folder=folder)
    with pytest.raises(DataError, match="exists already"):
        prepared(path, folder=folder)
    with open(folder / "graphs" / "positions.bin", "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(DataError, match="has 100 bytes"):
        open_prepared(folder)
    with pytest.raises(DataError, match="not a folder of prepared data"):
        open_prepared(tmp_path)


@pytest.mark.parametrize(
    ("file", "opened"), [("prepared.json", open_prepared), ("graphs/index.json", open_store)]
)
def test_a_folder_of_a_newer_version_says_who_reads_it(file, opened, path, tmp_path):
    prepared(path, tmp_path / "prepared")
    file = tmp_path / "prepared" / file
    index = json.loads(file.read_text(encoding="utf-8"))
    assert index["written_by"] == f"mlip-md {mlip_md.__version__}"
    newer = index | {"format_version": 99, "written_by": "mlip-md 9.1"}
    for content, reader in (
        (newer, r"mlip-md 9\.1"),
        ({name: value for name, value in newer.items() if name != "written_by"}, "a newer mlip-md"),
    ):
        file.write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(DataError, match=rf"version is 99, .* read by {reader}.* Upgrade mlip"):
            opened(file.parent)


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_every_structure_is_in_one_part_once(part, path, tmp_path):
    folder = tmp_path / "prepared"
    prepared(path, folder, split=SPLIT)
    file = folder / f"{part}.npy"
    rows = np.load(file)
    other = np.load(folder / ("test.npy" if part == "train" else "train.npy"))
    damaged = (0 * rows, rows[:-1], rows - rows.max() - 1, rows + 0.5, other[: len(rows)])
    for wrong in damaged:
        np.save(file, wrong)
        with pytest.raises(DataError, match=r"prepared is damaged: .* each of its 24 .* once"):
            open_prepared(folder)
    np.save(file, rows[:, None])
    with pytest.raises(DataError, match="prepared: not a folder of prepared data"):
        open_prepared(folder)
    np.save(file, rows)
    assert len(open_prepared(folder).parts[part]) == len(rows)


def refusal(folder):
    """Why a folder does not open; empty if it does."""
    try:
        open_prepared(folder)
    except DataError as error:
        return str(error)
    return ""


def test_every_file_has_the_name_that_it_was_written_with(path, tmp_path):
    """Others of the same shape, of this folder or another one, give other labels or a leak."""
    folder, other = tmp_path / "prepared", tmp_path / "other"
    data = prepared(path, folder, split=SPLIT)
    prepared(path, other, split={**SPLIT, "seed": 7}, cutoff=4.5)
    assert len(data.parts["validation"]) == len(data.parts["test"])
    first, second = folder / "validation.npy", folder / "test.npy"
    contents = first.read_bytes(), second.read_bytes()
    for one, two in (contents[::-1], contents[:1] * 2):
        first.write_bytes(one)
        second.write_bytes(two)
        assert "is damaged" in refusal(folder)
    first.write_bytes(contents[0])
    second.write_bytes(contents[1])
    assert open_prepared(folder).parts.keys() == data.parts.keys()
    for part in ("train", "validation", "test"):
        shutil.copy(other / f"{part}.npy", folder)
    assert "train.npy is damaged (checksum)" in refusal(folder)
    shutil.rmtree(folder)
    prepared(path, folder, split=SPLIT)
    shutil.rmtree(folder / "graphs")
    shutil.copytree(other / "graphs", folder / "graphs")
    assert "index.json is damaged (checksum)" in refusal(folder)


def test_folders_of_before_there_were_checksums_of_rows_open(path, tmp_path):
    folder = tmp_path / "prepared"
    prepared(path, folder, split=SPLIT)
    index = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    del index["sha256"]
    (folder / "prepared.json").write_text(json.dumps(index), encoding="utf-8")
    assert len(open_prepared(folder).parts) == 3


def test_all_charged(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("ion_0")
        group.attrs.update(energy=-1.0, charge=1)
        group["elements"], group["positions"] = [1, 1], np.eye(3)[:2]
        group["forces"] = np.zeros((2, 3))
    with pytest.raises(DataError, match=r"no structure is left .*removed .*neutral_only: 1"):
        prepared(tmp_path / "a.h5", curate={"one_bond_per_hydrogen": False})


def test_a_folder_of_format_version_1_says_the_same_in_words_of_the_recipe(path, tmp_path):
    ase.io.write(tmp_path / "valid.xyz", frames(("H2O",), 2, seed=7), format="extxyz")
    rows = {
        "validation": [str(tmp_path / "valid.xyz")],
        "split": {**SPLIT, "by": "structure", "seed": 5},
        "curate": {"elements": ["H", "C", "O"], "max_net_force": None},
    }
    folder = tmp_path / "prepared"
    new = prepared([str(path)], folder, **rows)
    index = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    assert index.pop("data") == new.config.model_dump(mode="json")
    index["format_version"] = 1
    index["settings"] = {
        "on_bad": "error",
        "energy_key": None,
        "forces_key": None,
        "files": {"train": [str(path)], "validation": rows["validation"], "test": []},
        "cutoff": 4.0,
        "split": {"marks": False, "fractions": [0.5, 0.25, 0.25], "seed": 5, "by": "structure"},
        "curate": {"elements": [1, 6, 8], "neutral_only": True, "hydrogen_bonds": True,
                   "max_force": 15.0, "max_net_force": None},
    }  # fmt: skip
    (folder / "prepared.json").write_text(json.dumps(index), encoding="utf-8")
    old = open_prepared(folder)
    assert old.config == new.config
    assert {n: p.names for n, p in old.parts.items()} == {n: p.names for n, p in new.parts.items()}
    other = new.config.model_copy(update={"path": str(folder), "on_bad": "skip"})
    with pytest.raises(ConfigError, match=r"data\.on_bad is .skip., but .* with .error"):
        open_prepared_for(other, "average")
    index["settings"]["split"]["fractions"] = [0.5, 0.5, 0.5]
    (folder / "prepared.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(DataError, match="not a folder of prepared data"):
        open_prepared(folder)


def test_what_a_recipe_leaves_to_the_folder_is_not_compared(path, tmp_path):
    valid, folder = str(tmp_path / "valid.xyz"), str(tmp_path / "prepared")
    ase.io.write(valid, frames(("H2O",), 2, seed=7), format="extxyz")
    rows = {"path": folder, "cutoff": 4.0, "curate": None, "split": SPLIT}
    prepared(path, folder, validation=valid, split=SPLIT)
    run = {**rows, "batch_size": 3, "max_n_node": 9, "max_n_edge": 50, "on_oversize": "drop"}
    for own in ({}, {"validation": valid}, {"validation": [valid]}, {"test": []}):
        config = DataConfig.model_validate({**run, **own})
        assert len(open_prepared_for(config, "average").parts["validation"]) == 2
    for own in ({"validation": [valid, valid]}, {"test": valid}):
        with pytest.raises(ConfigError, match=rf"data\.{next(iter(own))} is \["):
            open_prepared_for(DataConfig.model_validate({**run, **own}), "average")


def test_validation_sets_keep_their_names_in_a_folder(path, tmp_path):
    """Those that marks in the training file put there form a set of their own."""
    sets = {}
    for name, seed in (("wet", 7), ("dry", 8)):
        sets[name] = str(tmp_path / f"{name}.xyz")
        ase.io.write(sets[name], frames(("H2O",), 2, seed=seed), format="extxyz")
    marked = frames()
    for k, atoms in enumerate(marked):
        atoms.info["split"] = ("train", "validation")[k == 5]
    ase.io.write(tmp_path / "marked.xyz", marked, format="extxyz")
    folder, split = str(tmp_path / "prepared"), {"from_file": True}
    for data in (
        prepared(tmp_path / "marked.xyz", folder, validation=sets, split=split),
        open_prepared(folder),
    ):
        found = {name: [data.parts["validation"].names[k] for k in rows]
                 for name, rows in data.validation_sets.items()}  # fmt: skip
        assert {name: len(names) for name, names in found.items()} == {
            "split": 1, "wet": 2, "dry": 2
        }  # fmt: skip
        assert all(f"{name}.xyz" in text for name in sets for text in found[name])
    rows = {"path": folder, "cutoff": 4.0, "split": split}
    for own, same in ((None, True), (sets, True), (list(sets.values()), False),
                      ({"rain": sets["wet"], "dry": sets["dry"]}, False)):  # fmt: skip
        config = DataConfig.model_validate({**rows, "validation": own})
        if same:
            assert len(open_prepared_for(config, "average").validation_sets) == 3
            continue
        with pytest.raises(ConfigError, match=r"data\.validation"):
            open_prepared_for(config, "average")
    with pytest.raises(DataError, match=r"is in two sets of data\.validation, wet and damp"):
        prepared(tmp_path / "marked.xyz", validation={"wet": sets["wet"], "damp": sets["wet"]})


def test_a_run_reads_again_where_sets_have_other_names(path, tmp_path):
    one = str(tmp_path / "one.xyz")
    ase.io.write(one, frames(("H2O",), 2, seed=7), format="extxyz")
    for name in ("a", "b", "b"):
        rows = {"path": str(path), "cutoff": 4.0, "validation": {name: one}}
        config = DataConfig.model_validate(rows)
        data = prepared_module.prepare_once(config, "average", tmp_path / "kept")
        assert list(data.validation_sets) == [name]


def test_fractions_mean_nothing_beside_marks(tmp_path):
    marked = frames()
    for k, atoms in enumerate(marked):
        atoms.info["split"] = ("train", "validation")[k % 4 == 0]
    ase.io.write(tmp_path / "a.xyz", marked, format="extxyz")
    folder = tmp_path / "prepared"
    prepared(tmp_path / "a.xyz", folder, split={"from_file": True})
    rows = {"path": str(folder), "cutoff": 4.0, "curate": None}
    other = {"from_file": True, **SPLIT, "seed": 9, "by": "structure"}
    assert open_prepared_for(DataConfig.model_validate({**rows, "split": other}), "average")
    with pytest.raises(ConfigError, match=r"data\.split\.from_file is false, but .* with true"):
        open_prepared_for(DataConfig.model_validate(rows), "average")


def test_a_warning_says_what_the_data_leave_open(tmp_path, caplog):
    ase.io.write(tmp_path / "a.xyz", frames(("CH3OH", "CH4"), 4), format="extxyz")
    rows = {"split": {"by": "structure"}, "curate": None}
    warn_of_energies(prepared(tmp_path / "a.xyz", tmp_path / "prepared", **rows))
    folder = DataConfig.model_validate({"path": str(tmp_path / "prepared"), "cutoff": 4.0, **rows})
    warn_of_energies(open_prepared_for(folder, "average"))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all("any multiple of 1 E0(H) - 4 E0(C)" in text for text in said)
    warn_of_energies(open_prepared_for(folder, {1: -13.6, 6: -1030.5, 8: -2043.9}))
    assert len(caplog.records) == 2


@pytest.mark.parametrize(
    ("start", "warnings"),
    [(None, 1), ({"potential": "p"}, 0), ({"potential": "p", "atomic_energies": "refit"}, 1)],
)
def test_e0_that_a_parent_gives_are_not_warned_of(start, warnings, tmp_path, caplog):
    ase.io.write(tmp_path / "a.xyz", frames(("CH3OH", "CH4"), 4), format="extxyz")
    values = small_recipe(tmp_path / "a.xyz").plain() | {"start": start}
    values["data"] |= {"split": {"by": "structure"}, "curate": None, "cutoff": 4.0}
    load_data(Recipe.model_validate(values))
    assert len([r for r in caplog.records if "leave E0 open" in r.getMessage()]) == warnings


CHILD = """
import sys, time
from mlip_md.trainer.data import blocks, prepare
from mlip_md.trainer.recipe import DataConfig
blocks.CHUNK = 3
if __name__ == "__main__":
    path, folder, cutoff, pause, workers = sys.argv[1:]
    rows = {"path": path, "cutoff": float(cutoff), "curate": None}
    print("ready", flush=True)
    prepare(DataConfig.model_validate(rows), folder=folder, workers=int(workers),
            tell=lambda *_: time.sleep(float(pause)))
"""


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def in_a_child(tmp_path, path, cutoff=4.0, pause=0.0, workers=1):
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    command = [sys.executable, script, path, tmp_path / "prepared", cutoff, pause, workers]
    return subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE)


def kill_with_blocks(tmp_path, path, least, **options):
    """Start a preparation and kill it when so many blocks are there."""
    child = in_a_child(tmp_path, path, pause=0.3, **options)
    blocks = tmp_path / "prepared.partial" / "blocks"
    end = time.monotonic() + 120
    while len(list(blocks.glob("[0-9]*.npz"))) < least and time.monotonic() < end:
        assert child.poll() is None
        time.sleep(0.01)
    child.kill()
    child.communicate()


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_work_goes_on_to_the_same_bytes(workers, path, tmp_path, monkeypatch):
    monkeypatch.setattr("mlip_md.trainer.data.blocks.CHUNK", 3)
    expected = contents(prepared_folder(path, tmp_path / "whole"))
    for least in (1, 4):
        kill_with_blocks(tmp_path, path, least, workers=workers)
    partial, made = tmp_path / "prepared.partial", []
    assert not (tmp_path / "prepared").exists()
    assert not is_prepared(partial)
    with pytest.raises(DataError, match="unfinished work of mlip-md prepare"):
        prepared(partial)
    compute = blocks_module._compute
    monkeypatch.setattr(blocks_module, "_compute", lambda *a: made.append(1) or compute(*a))
    assert contents(prepared_folder(path, tmp_path / "prepared")) == expected
    assert 0 < len(made) <= 4  # of eight
    assert not partial.exists()
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize("change", ["cutoff", "content", "damage"])
def test_unfinished_work_of_other_data_is_begun_anew(change, path, tmp_path, monkeypatch):
    monkeypatch.setattr("mlip_md.trainer.data.blocks.CHUNK", 3)
    kill_with_blocks(tmp_path, path, 2)
    rows = {"cutoff": 1.5} if change == "cutoff" else {}  # fewer edges in the first blocks
    if change == "content":
        ase.io.write(path, frames(seed=5), format="extxyz")
    if change == "damage":
        block = tmp_path / "prepared.partial" / "blocks" / "000000.npz"
        block.write_bytes(block.read_bytes()[:-100])
    found = contents(prepared_folder(path, tmp_path / "prepared", **rows))
    assert found == contents(prepared_folder(path, tmp_path / "whole", **rows))


def prepared_folder(path, folder, **rows):
    prepared(path, folder, **rows)
    return folder


def test_bytes_do_not_depend_on_the_number_of_workers(path, tmp_path, monkeypatch):
    monkeypatch.setattr("mlip_md.trainer.data.blocks.CHUNK", 3)
    whole = contents(prepared_folder(path, tmp_path / "whole"))
    assert in_a_child(tmp_path, path, workers=2).wait(120) == 0
    assert contents(tmp_path / "prepared") == whole


def test_a_folder_of_somebody_else_is_not_taken_for_unfinished_work(path, tmp_path):
    (tmp_path / "prepared.partial").mkdir()
    (tmp_path / "prepared.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="is something else; move it"):
        prepared(path, tmp_path / "prepared")
    assert (tmp_path / "prepared.partial" / "thesis.txt").read_text() == "mine"


def test_the_command_takes_workers_and_tells_how_far_it_is(path, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "TELL_SECONDS", 0.0)
    monkeypatch.setattr("mlip_md.trainer.data.blocks.CHUNK", 6)
    recipe = small_recipe(path, data={"max_n_node": None, "max_n_edge": None, "split": SPLIT})
    (tmp_path / "train.yaml").write_text(json.dumps(recipe.plain()))
    command = ["prepare", str(tmp_path / "train.yaml"), str(tmp_path / "prepared")]
    result = CliRunner().invoke(app, [*command, "--workers", "1"])
    assert result.exit_code == 0, result.exception
    said = re.findall(
        r"(\d+) structures done, .* a second, (\d+) % read, 0:00:0\d to", result.stdout
    )
    assert [int(count) for count, _ in said] == [6, 12, 18, 24]
    assert 0 < int(said[0][1]) <= int(said[1][1]) <= int(said[3][1]) == 100


def test_every_format_that_can_tells_how_much_of_it_is_read(path, tmp_path):
    """A file packed, an HDF5 file, folders of DeePMD-kit and npz, in one data set."""
    told = []
    with gzip.open(tmp_path / "packed", "wb") as file:
        file.write(path.read_bytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for k, atoms in enumerate(frames(("CO2",), 4, seed=1)):
            group = file.create_group(f"CO2_{k}")
            group["elements"], group["positions"] = atoms.numbers, atoms.positions
            group["forces"] = atoms.get_forces()
            group.attrs["energy"] = atoms.get_potential_energy()
    water = frames(("H2O",), 4, seed=2)
    labels = [a.get_potential_energy() for a in water], [a.get_forces() for a in water]
    np.savez(tmp_path / "b.npz", nuclear_charges=water[0].numbers, energies=labels[0],
             coords=[a.positions for a in water], forces=labels[1])  # fmt: skip
    for name in ("packed", "a.h5", "b.npz"):
        reading = Reading(DataConfig.model_validate({"path": str(tmp_path / name)}))
        parts = [reading.read for _ in reading.structures()]
        assert parts == sorted(parts)
        told.append((parts[0], parts[-1]))
        assert reading.read <= 1.0
    assert told[1:] == [(0.0, 0.75)] * 2
    assert told[0][1] == 1.0
    reading = Reading(DataConfig.model_validate({"path": [str(tmp_path / "a.h5"), str(path)]}))
    sizes = [(tmp_path / "a.h5").stat().st_size, path.stat().st_size]
    parts = [reading.read for _ in reading.structures()]
    assert parts == sorted(parts)
    assert parts[3] == pytest.approx(0.75 * sizes[0] / sum(sizes))
    assert parts[-1] == 1.0


def test_a_training_reads_its_files_once(path, tmp_path, monkeypatch):
    """What is kept in a run's folder is the same data, and is not taken for other files."""
    recipe = small_recipe(path, data={"max_n_node": None, "max_n_edge": None, "split": SPLIT})
    keep = tmp_path / "run" / "prepared"
    first, direct = load_data(recipe, keep), load_data(recipe)
    assert first.fingerprint == direct.fingerprint
    with monkeypatch.context() as patch:
        patch.setattr(prepared_module, "Reading", None)  # nobody reads
        again = load_data(recipe, keep)
    assert again.fingerprint == first.fingerprint
    assert again.notes == first.notes
    path.rename(tmp_path / "away.xyz")  # and nobody needs the file
    assert load_data(recipe, keep).fingerprint == first.fingerprint
    (tmp_path / "away.xyz").rename(path)


@pytest.mark.parametrize("change", ["row", "file", "content", "damage", "validation"])
def test_what_is_kept_of_other_data_is_made_anew(change, path, tmp_path):
    rows = {"max_n_node": None, "max_n_edge": None, "split": SPLIT}
    valid = str(tmp_path / "valid.xyz")
    ase.io.write(valid, frames(("H2O",), 2, seed=7), format="extxyz")
    keep = tmp_path / "run" / "prepared"
    old = {**rows, "validation": valid} if change == "validation" else rows
    load_data(small_recipe(path, data=old), keep)
    if change == "row":
        rows["cutoff"] = 3.0
    if change == "file":
        path = shutil.copy(path, tmp_path / "copy.xyz")
    if change == "content":
        ase.io.write(path, frames(seed=5), format="extxyz")
    if change == "damage":
        (keep / "train.npy").write_bytes(b"")
    recipe = small_recipe(path, data=rows)
    data = load_data(recipe, keep)
    assert data.fingerprint == load_data(recipe).fingerprint
    assert data.train.names == load_data(recipe).train.names
    assert load_data(recipe, keep).fingerprint == data.fingerprint
    assert [p.name for p in keep.parent.iterdir()] == ["prepared"]


def test_the_train_command_keeps_its_data(path, tmp_path, monkeypatch):
    recipe = small_recipe(path, data={"max_n_node": None, "max_n_edge": None, "split": SPLIT})
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    (tmp_path / "train.yaml").write_text(json.dumps(recipe.plain()))
    command = ["train", str(tmp_path / "train.yaml"), "--run", str(tmp_path / "run")]
    result = CliRunner().invoke(app, [*command, "--dry-run", "1"])
    assert not (tmp_path / "run").exists()
    read = []
    monkeypatch.setattr(
        sources_module, "iterate", lambda *a, **k: read.append(a) or iterate(*a, **k)
    )
    for _ in range(2):
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, (result.output, result.exception)
        assert len(read) == 1  # by the first; what continues takes what is kept
        assert f"MB in {tmp_path / 'run' / 'prepared'}, for the next start" in result.stdout
    assert is_prepared(tmp_path / "run" / "prepared")
