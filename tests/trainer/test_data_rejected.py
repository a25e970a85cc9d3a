"""Bad records: all of them in one pass, listed with their reasons, left out where told to."""

import csv
import json

import ase
import ase.io
import h5py
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from training_cases import small_recipe
from typer.testing import CliRunner

from mlip_md.cli import app
from mlip_md.errors import RejectedError
from mlip_md.trainer.data import open_prepared, prepare
from mlip_md.trainer.recipe import DataConfig


def frames(count=40):
    result = []
    for k in range(count):
        atoms = molecule("CH3OH" if k % 2 else "H2CO")
        atoms.rattle(0.03, seed=k)
        force = np.random.default_rng(k).normal(size=(len(atoms), 3))
        atoms.calc = SinglePointCalculator(
            atoms, energy=-10.0 * len(atoms) + 0.01 * k, forces=force
        )
        result.append(atoms)
    return result


BAD = {3: "NaN", 11: "NaN", 17: "a duplicate", 30: "Å apart", 38: "no energy"}


@pytest.fixture
def path(tmp_path):
    some = frames()
    for k in (3, 11):
        some[k].calc.results["forces"][1, 2] = np.nan
    some[17] = some[16].copy()
    some[17].calc = some[16].calc
    some[30].positions[1] = some[30].positions[0] + [0.01, 0, 0]
    some[38].calc.results.pop("energy")
    ase.io.write(tmp_path / "a.xyz", some, format="extxyz")
    return tmp_path / "a.xyz"


def config(path, **rows):
    rows = {"path": str(path), "cutoff": 4.0, "split": {"by": "structure"}, **rows}
    return DataConfig.model_validate(rows)


def test_all_bad_records_are_found_in_one_pass(path, tmp_path):
    with pytest.raises(
        RejectedError, match=r"5 of 40 records are bad: .*data\.on_bad: skip"
    ) as caught:
        prepare(config(path), folder=tmp_path / "prepared")
    assert not (tmp_path / "prepared").exists()
    found = dict(caught.value.records)
    assert set(found) == {f"{path}:[{k}]" for k in BAD}
    for k, words in BAD.items():
        assert words in found[f"{path}:[{k}]"]
    assert "[3]: forces hold NaN or infinity (2 such)" in str(caught.value)


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_skipping_leaves_out_them_and_nothing_else(where, path, tmp_path, caplog):
    folder = tmp_path / "prepared" if where == "folder" else None
    data = prepare(config(path, on_bad="skip"), folder=folder)
    names = {name for part in data.parts.values() for name in part.names}
    assert names == {f"{path}:[{k}]" for k in range(40) if k not in BAD}
    assert {name for name, _ in data.rejected} == {f"{path}:[{k}]" for k in BAD}
    assert caplog.text.count("left out (data.on_bad: skip): 5 of 40 records are bad") == 1
    for part in data.parts.values():  # labels belong to their structures still
        for k, name in enumerate(part.names):
            number = int(name.split("[")[1][:-1])
            assert part.energy[k] == pytest.approx(-10.0 * part.num_atoms[k] + 0.01 * number)
    if folder:
        assert len(open_prepared(folder).parts["train"]) == len(data.parts["train"])


def test_marks_belong_to_their_structures_beside_bad_ones(tmp_path):
    some = frames(20)
    for k, atoms in enumerate(some):
        atoms.info["split"] = "validation" if k % 4 == 1 else "train"
    some[2].positions[1] = some[2].positions[0]
    some[2].positions[1, 0] += 0.05
    ase.io.write(tmp_path / "a.xyz", some, format="extxyz")
    rows = {"split": {"from_file": True}, "on_bad": "skip"}
    data = prepare(config(tmp_path / "a.xyz", **rows))
    numbers = [int(name.split("[")[1][:-1]) for name in data.parts["validation"].names]
    assert numbers == [1, 5, 9, 13, 17]


def test_a_bad_record_late_in_a_large_file_does_not_hide_the_first(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        for k, atoms in enumerate(frames(30)):
            group = file.create_group(f"m{k:02d}")
            group["atomic_numbers"] = atoms.numbers
            group["conformations"] = atoms.positions[None] * (1.89, 1.9, 1.91)[k % 3]
            group["dft_total_energy"] = [np.nan if k in (2, 29) else -1.0 * k]
            group["dft_total_gradient"] = -atoms.get_forces()[None] / 51.4
    with pytest.raises(RejectedError) as caught:
        prepare(config(tmp_path / "a.h5"))
    assert [name for name, _ in caught.value.records] == [
        f"{tmp_path / 'a.h5'}:m{k}[0]" for k in ("02", "29")
    ]


def test_a_file_that_breaks_off_is_read_up_to_there(tmp_path):
    ase.io.write(tmp_path / "a.xyz", frames(), format="extxyz")
    text = (tmp_path / "a.xyz").read_text(encoding="utf-8")
    (tmp_path / "a.xyz").write_text(text[: len(text) // 2] + "\nno number\n" + text)
    with pytest.raises(RejectedError) as caught:
        prepare(config(tmp_path / "a.xyz"))
    assert len(caught.value.records) == 2 or "not a number of atoms" in str(caught.value)
    data = prepare(config(tmp_path / "a.xyz", on_bad="skip"))
    assert sum(map(len, data.parts.values())) >= 19


def test_commands_write_the_list(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "train.yaml"
    values = small_recipe(path).plain()
    values["data"] |= {"max_n_node": None, "max_n_edge": None, "split": {"by": "structure"}}
    recipe.write_text(json.dumps(values))
    commands = {
        "rejected.csv": ["check", str(recipe)],
        "run/rejected.csv": ["train", str(recipe), "--run", "run"],
        "sub/rejected.csv": ["prepare", str(recipe), "sub/prepared"],
    }
    for file, command in commands.items():
        result = CliRunner().invoke(app, command)
        assert isinstance(result.exception, RejectedError)
        assert f"5 bad records are listed in {file}" in result.stderr
        header, *rows = csv.reader((tmp_path / file).open(encoding="utf-8"))
        assert header == ["record", "reason"]
        assert {name for name, _ in rows} == {f"{path}:[{k}]" for k in BAD}
    command = [*commands["sub/rejected.csv"], "--set", "data.on_bad=skip"]
    (tmp_path / "sub/rejected.csv").unlink()
    assert CliRunner().invoke(app, command).exit_code == 0
    assert len((tmp_path / "sub/rejected.csv").read_text(encoding="utf-8").splitlines()) == 6
