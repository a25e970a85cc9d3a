"""Prepared data: files to parts, the same in memory and from a folder, no leaks between parts."""

import json

import ase
import ase.io
import h5py
import jax
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_md.errors import DataError
from mlip_md.trainer.data import (
    BatchBudget,
    SplitRule,
    is_prepared,
    make_batch,
    open_prepared,
    plan_epoch,
    prepare,
)

NAMES = ("H2O", "CH4", "CO2", "CH3OH", "C2H6", "H2", "C6H6", "CH3COOH")
RULE = SplitRule(fractions=(0.5, 0.25, 0.25))


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
    ours = prepare(path, 4.0, split=RULE, curate=curate)
    theirs = prepare(path, 4.0, split=RULE, curate=curate, folder=tmp_path / "prepared")
    assert is_prepared(tmp_path / "prepared")
    assert list(ours.parts) == list(theirs.parts) == ["train", "validation", "test"]
    assert ours.statistics.to_dict() == theirs.statistics.to_dict()
    assert ours.settings == theirs.settings
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
    assert theirs.settings["on_bad"] == "error"


def test_nothing_is_lost_and_no_molecule_parted(path):
    data = prepare(path, 4.0, split=RULE)
    names = [name for store in data.parts.values() for name in store.names]
    assert sorted(names) == sorted(f"{path}:[{k}]" for k in range(24))
    groups = [set(store.groups) for store in data.parts.values()]
    assert sum(len(g) for g in groups) == len(set.union(*groups)) == len(NAMES)


def test_energies_are_relative_to_the_training_part(path):
    data = prepare(path, 4.0, split=RULE)
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
    data = prepare(path, 4.0, validation=tmp_path / "valid.xyz")
    assert {name: len(store) for name, store in data.parts.items()} == {
        "train": 24,
        "validation": 2,
    }
    rule = SplitRule(fractions=(0.5, 0.25, 0.25))
    data = prepare(path, 4.0, validation=tmp_path / "valid.xyz", split=rule)
    assert {name: len(store) for name, store in data.parts.items()} == {
        "train": 18,
        "validation": 2,
        "test": 6,
    }


def test_leaks_between_files_are_refused(path, tmp_path):
    ase.io.write(tmp_path / "valid.xyz", frames()[3:5], format="extxyz")
    with pytest.raises(DataError, match=r"valid\.xyz:\[0\]: a duplicate.*all\.xyz:\[3\]"):
        prepare(path, 4.0, validation=tmp_path / "valid.xyz")


def test_elements_of_validation_only(path, tmp_path):
    ase.io.write(tmp_path / "valid.xyz", frames(("NH3",), 1), format="extxyz")
    with pytest.raises(DataError, match=r"valid\.xyz:\[0\]: N is not among the elements H, C, O"):
        prepare(path, 4.0, validation=tmp_path / "valid.xyz")


def test_marks_of_the_file(tmp_path):
    marked = frames()
    for k, atoms in enumerate(marked):
        atoms.info["split"] = ("train", "validation")[k % 4 == 0]
    ase.io.write(tmp_path / "a.xyz", marked, format="extxyz")
    data = prepare(tmp_path / "a.xyz", 4.0, split=SplitRule(marks=True))
    assert data.parts["validation"].names == tuple(
        f"{tmp_path / 'a.xyz'}:[{k}]" for k in range(0, 24, 4)
    )
    assert len(data.parts["train"]) == 18
    ase.io.write(tmp_path / "b.xyz", frames(), format="extxyz")
    with pytest.raises(DataError, match="no split is marked"):
        prepare(tmp_path / "b.xyz", 4.0, split=SplitRule(marks=True))


def test_a_failed_preparation_leaves_nothing(path, tmp_path):
    with open(path, "a") as stream:
        stream.write("1\nProperties=species:S:1:pos:R:3 energy=1 pbc=T\nH 0 0 0\n")
    with pytest.raises(DataError):
        prepare(path, 4.0, folder=tmp_path / "prepared")
    assert not [p for p in tmp_path.iterdir() if "prepared" in p.name]


def test_damaged_folders(path, tmp_path):
    folder = tmp_path / "prepared"
    prepare(path, 4.0, folder=folder)
    with pytest.raises(DataError, match="exists already"):
        prepare(path, 4.0, folder=folder)
    rows = np.load(folder / "train.npy")
    np.save(folder / "train.npy", rows[:-1])
    with pytest.raises(DataError, match="do not make up the whole"):
        open_prepared(folder)
    np.save(folder / "train.npy", rows)
    with open(folder / "graphs" / "positions.bin", "r+b") as stream:
        stream.truncate(100)
    with pytest.raises(DataError, match="has 100 bytes"):
        open_prepared(folder)
    index = json.loads((folder / "prepared.json").read_text(encoding="utf-8"))
    (folder / "prepared.json").write_text(json.dumps(index | {"format_version": 99}))
    with pytest.raises(DataError, match="format version 99"):
        open_prepared(folder)
    with pytest.raises(DataError, match="not a folder of prepared data"):
        open_prepared(tmp_path)


def test_all_charged(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        group = file.create_group("ion_0")
        group.attrs.update(energy=-1.0, charge=1)
        group["elements"], group["positions"] = [1, 1], np.eye(3)[:2]
        group["forces"] = np.zeros((2, 3))
    with pytest.raises(DataError, match=r"no structure is left .*removed .*neutral_only: 1"):
        prepare(tmp_path / "a.h5", 4.0, curate={"hydrogen_bonds": False})
