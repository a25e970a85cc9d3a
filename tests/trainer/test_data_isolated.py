"""Isolated atoms: they give E0 exactly and are no frames of any part."""

import json
import logging

import ase
import ase.io
import h5py
import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from training_cases import small_recipe
from typer.testing import CliRunner

from mlip_md.cli import app
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.data import load_data, open_prepared, prepare, warn_of_energies
from mlip_md.trainer.data.readers import read_energy_file
from mlip_md.trainer.recipe import DataConfig, load_recipe

E0 = {"H": -13.568, "C": -1026.854, "O": -2037.797}


def atom(symbol, energy, **info):
    atoms = ase.Atoms(symbol)
    atoms.info.update(energy=energy, **info)
    return atoms


def frames(count=12):
    result = []
    for k in range(count):
        atoms = molecule("CH3OH" if k % 2 else "H2CO")
        atoms.rattle(0.03, seed=k)
        energy = sum(E0[s] for s in atoms.get_chemical_symbols()) - 3.0 * len(atoms) + 0.01 * k
        forces = np.random.default_rng(k).normal(size=(len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
        result.append(atoms)
    return result


@pytest.fixture
def path(tmp_path):
    atoms = [atom(s, e, config_type="IsolatedAtom") for s, e in E0.items()]
    ase.io.write(tmp_path / "train.xyz", atoms + frames(), format="extxyz")
    return tmp_path / "train.xyz"


def prepared(path, energies="average", folder=None, **rows):
    rows = {"cutoff": 4.0, "curate": None, "split": {"by": "structure"}, **rows}
    rows["path"] = [str(p) for p in path] if isinstance(path, list) else str(path)
    return prepare(DataConfig.model_validate(rows), energies, folder)


def test_they_give_e0_exactly_and_are_in_no_part(path, tmp_path):
    for folder in (None, tmp_path / "prepared"):
        data = prepared(path, "isolated", folder)
        assert data.statistics.atomic_energies.tolist() == list(E0.values())
        assert data.statistics.atomic_energies_source == "isolated atoms"
        names = [name for part in data.parts.values() for name in part.names]
        assert sorted(names) == sorted(f"{path}:[{k}]" for k in range(3, 15))
        assert data.curation[str(path)].total == 12
        assert f"H -13.568 eV ({path}:[0])" in data.isolated.sources()
    assert open_prepared(tmp_path / "prepared").isolated == data.isolated


def test_they_are_not_fitted(path):
    parts = prepared(path, "zero").parts.values()
    assert min(min(part.num_atoms) for part in parts) > 1


def test_a_prepared_folder_remembers_them(path, tmp_path):
    prepared(path, "average", tmp_path / "prepared")
    rows = {"cutoff": 4.0, "curate": None, "split": {"by": "structure"}, "max_n_node": None,
            "max_n_edge": None}  # fmt: skip
    model = {"kind": "mace", "atomic_energies": "isolated"}
    recipe = small_recipe(tmp_path / "prepared", data=rows, model=model)
    data = load_data(recipe)
    assert data.statistics.atomic_energies.tolist() == list(E0.values())
    assert any("isolated atoms, in no part: H -13.568 eV" in note for note in data.notes)


@pytest.mark.parametrize("energies", ["average", None])
def test_fitted_energies_are_those_without_them_and_a_warning_says_so(
    energies, path, tmp_path, caplog
):
    ase.io.write(tmp_path / "plain.xyz", frames(), format="extxyz")
    plain = prepared(tmp_path / "plain.xyz", energies).statistics
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        data = prepared(path, energies)
        warn_of_energies(data)
    np.testing.assert_array_equal(data.statistics.atomic_energies, plain.atomic_energies)
    (said,) = [m for m in caplog.messages if "isolated" in m and "any multiple" not in m]
    assert "of H, C, O, which are no training structures, but E0 are fitted" in said
    assert "atomic_energies: isolated" in said


def test_single_atoms_without_a_mark_and_ions(tmp_path):
    box = atom("C", E0["C"])
    box.cell, box.pbc = 15 * np.eye(3), True
    ion = atom("O", -2050.0, charge=-1)
    others = [atom("H", E0["H"]), box, atom("O", E0["O"]), ion]
    ase.io.write(tmp_path / "a.xyz", others + frames(), format="extxyz")
    data = prepared(tmp_path / "a.xyz")
    found = {z: energy for z, [(energy, _)] in data.isolated.found.items()}
    assert found == {1: E0["H"], 6: E0["C"], 8: E0["O"]}
    assert data.isolated.ions == [f"{tmp_path / 'a.xyz'}:[3]"]
    assert sum(map(len, data.parts.values())) == 12


def test_a_crystal_of_one_atom_per_cell_is_a_frame(tmp_path):
    crystals = []
    for k in range(6):
        atoms = bulk("Cu", "fcc", a=3.5 + 0.05 * k)
        atoms.info["energy"], atoms.arrays["forces"] = -3.0 + k, np.zeros((1, 3))
        crystals.append(atoms)
    ase.io.write(tmp_path / "a.xyz", crystals, format="extxyz")
    data = prepared(tmp_path / "a.xyz")
    assert sum(map(len, data.parts.values())) == 6
    crystals[0].info["config_type"] = "IsolatedAtom"
    ase.io.write(tmp_path / "a.xyz", crystals, format="extxyz")
    with pytest.raises(DataError, match=r"\[0\]: its config_type is IsolatedAtom, but it has 1 at"):
        prepared(tmp_path / "a.xyz")


def test_what_is_missing_or_contradicts_itself_is_named(path, tmp_path):
    ase.io.write(tmp_path / "a.xyz", [atom("H", -13.5), *frames()], format="extxyz")
    with pytest.raises(DataError, match="no isolated atom of C, O in the data; add it"):
        prepared(tmp_path / "a.xyz", "isolated")
    with pytest.raises(DataError, match=r"isolated atoms of H have different energies, eV: -13\.5"):
        prepared([tmp_path / "a.xyz", path], "isolated", on_bad="skip")


def test_energies_stated_in_an_hdf5_file(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        numbers = {"H": 1, "C": 6, "O": 8}
        file.attrs["atomic_energies"] = json.dumps({str(numbers[s]): e for s, e in E0.items()})
        for k, atoms in enumerate(frames()):
            group = file.create_group(f"m{k}_0")
            group["elements"], group["positions"] = atoms.numbers, atoms.positions
            group["forces"], group.attrs["energy"] = (
                atoms.get_forces(),
                atoms.get_potential_energy(),
            )
    data = prepared(tmp_path / "a.h5", "isolated")
    assert data.statistics.atomic_energies.tolist() == list(E0.values())
    assert f"(stated in {tmp_path / 'a.h5'})" in data.isolated.sources()


def test_energies_of_a_file(path, tmp_path):
    (tmp_path / "e0.json").write_text(json.dumps({**E0, "17": -12000.0}))
    assert read_energy_file(tmp_path / "e0.json")[17] == -12000.0
    ase.io.write(tmp_path / "plain.xyz", frames(), format="extxyz")
    for file in (tmp_path / "e0.json", path):
        statistics = prepared(tmp_path / "plain.xyz", str(file)).statistics
        assert statistics.atomic_energies.tolist() == list(E0.values())
        assert statistics.atomic_energies_source == f"of {file}"
    with pytest.raises(DataError, match=r"plain\.xyz: it holds no isolated atoms; write a JSON"):
        read_energy_file(tmp_path / "plain.xyz")
    (tmp_path / "bad.json").write_text('{"Hx": 1.0}')
    with pytest.raises(DataError, match=r"bad\.json: not a map"):
        read_energy_file(tmp_path / "bad.json")


def test_words_of_a_recipe(tmp_path):
    recipe = tmp_path / "train.yaml"
    for word in ("average", "isolated", "zero", "null", "e0.json"):
        recipe.write_text(f"model: {{kind: mace, atomic_energies: {word}}}\n")
        assert load_recipe(str(recipe))
    recipe.write_text("model: {kind: mace, atomic_energies: isolatd}\n")
    with pytest.raises(ConfigError, match="null, average, isolated, zero, a file or a map"):
        load_recipe(str(recipe))


def test_commands_print_the_sources(path, tmp_path):
    recipe = tmp_path / "train.yaml"
    values = small_recipe(path, model={"kind": "mace", "atomic_energies": "isolated"}).plain()
    values["data"] |= {"max_n_node": None, "max_n_edge": None, "split": {"by": "structure"}}
    recipe.write_text(json.dumps(values))
    result = CliRunner().invoke(app, ["prepare", str(recipe), str(tmp_path / "prepared")])
    assert result.exit_code == 0, result.output
    assert f"isolated atoms, in no part: H -13.568 eV ({path}:[0]), C -1026.85" in result.output
    assert "E0 (isolated atoms), eV: H -13.5680, C -1026.8540" in result.output
