"""One molecule is one group, whatever the order of its atoms and the name of its group."""

import re

import ase.io
import h5py
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import covalent_radii

from mlip_md.constants import BOHR
from mlip_md.trainer.data import prepare
from mlip_md.trainer.data.identity import (
    identify_geometry,
    identify_graph,
    identify_smiles,
    merge_groups,
    parse_smiles,
)
from mlip_md.trainer.recipe import DataConfig


@pytest.mark.parametrize(
    ("one", "other", "atoms"),
    [
        ("[H:1][C:2]([H:3])([H:4])[O:5][H:6]", "[O:2]([H:1])[C:3]([H:4])([H:5])[H:6]", 6),
        ("c1ccccc1O", "C1(O)=CC=CC=C1", 13),
        ("C[C@H](N)C(=O)O", "OC(=O)[C@@H](C)N", 13),
        ("[NH4+].[Cl-]", "[Cl-].[NH4+]", 6),
        ("C%12CCCCC%12", "C1CCCCC1", 18),
        ("C/C=C/Cl", "Cl/C=C/C", 9),
    ],
)
def test_spellings_of_one_molecule(one, other, atoms):
    assert identify_smiles(one, atoms) == identify_smiles(other, atoms) != ""


@pytest.mark.parametrize(
    ("one", "other", "atoms"),
    [
        ("CCO", "COC", 9),
        ("CCO", "CCO", None),
        ("[H]C([H])=C([H])O[H]", "[H]C([H])([H])C([H])=O", 7),  # enol and ketone
        ("CC.O", "CCO", 9),
    ],
)
def test_different_molecules(one, other, atoms):
    first = identify_smiles(one, atoms or 9)
    assert first != identify_smiles(other, atoms or 10)


@pytest.mark.parametrize("text", ["H2O", "CO2", "water 5", "C1CC", "C(C", "C)C", "", "[Xx]", "C|C"])
def test_what_is_no_smiles_has_no_key(text):
    assert identify_smiles(text, 3) == ""
    assert parse_smiles(text) is None


@pytest.mark.parametrize("name", ["CH3CH2OH", "C6H6", "CH3COCl", "C3H4_D2d"])
def test_the_order_of_atoms_does_not_count(name):
    atoms = molecule(name)
    atoms.rattle(0.03, seed=1)
    key = identify_geometry(atoms.numbers, atoms.positions)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(atoms))
        assert identify_geometry(atoms.numbers[order], atoms.positions[order]) == key


def test_a_drawing_and_a_geometry_agree():
    atoms = molecule("CH3OH")
    assert identify_geometry(atoms.numbers, atoms.positions) == identify_smiles(
        "[H]OC([H])([H])[H]", 6
    )


def test_rings_of_one_size_are_told_from_two():
    six = [(k, (k + 1) % 6) for k in range(6)]
    three = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3), (2, 3)]
    assert identify_graph([6] * 6, six) != identify_graph([6] * 6, three)


def test_groups_of_one_molecule_take_the_first_name():
    merged = merge_groups({"b": "x", "a": "x", "c": "", "d": "", "e": "y"})
    assert merged == {"a": "a", "b": "a", "c": "c", "d": "d", "e": "e"}


PAIRS = ("CH3OH", "C2H6", "CH3CHO", "H2CO", "CH3OCH3", "CH3CH2OH", "C2H4", "H2O")


def write_twins(path, smiles):
    """A SPICE-like file with every molecule under two names, in opposite orders of atoms."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for name in PAIRS:
            atoms = molecule(name)
            texts = {1: smiles_of(atoms), -1: smiles_of(atoms[::-1])}
            for group, order in (("pubchem", 1), ("des", -1)):
                size = (5, len(atoms), 3)
                positions = atoms.positions + random.normal(scale=0.03, size=size)
                target = file.create_group(f"{group}_{name}")
                target["atomic_numbers"] = atoms.numbers[::order]
                target["conformations"] = positions[:, ::order] / BOHR
                target["dft_total_energy"] = random.normal(size=5) - len(atoms)
                target["dft_total_gradient"] = random.normal(scale=0.01, size=size)
                if smiles:
                    target["smiles"] = [texts[order].encode()]


def smiles_of(atoms):
    """With all hydrogens and map numbers, of a molecule without rings."""
    radii = covalent_radii[atoms.numbers]
    near = atoms.get_all_distances() < 1.25 * (radii[:, None] + radii)
    seen: set[int] = set()

    def walk(k):
        seen.add(k)
        text = f"[{atoms.symbols[k]}:{k + 1}]"
        for j in np.flatnonzero(near[k]).tolist():
            if j not in seen:
                text += f"({walk(j)})"
        return text

    return walk(0)


def config(path, **rows):
    split = {"train": 0.5, "validation": 0.25, "test": 0.25}
    return DataConfig.model_validate({"path": str(path), "cutoff": 4.0, "split": split, **rows})


@pytest.mark.parametrize("smiles", [True, False], ids=["by SMILES", "by geometry"])
def test_no_molecule_is_in_two_parts(smiles, tmp_path):
    write_twins(tmp_path / "a.h5", smiles)
    for seed in range(6):
        split = {"train": 0.5, "validation": 0.25, "test": 0.25, "seed": seed}
        data = prepare(config(tmp_path / "a.h5", split=split))
        kinds = [
            {re.sub(r".*:[a-z]+_|\[.*", "", name) for name in part.names}
            for part in data.parts.values()
        ]
        assert sum(map(len, kinds)) == len(set.union(*kinds)) == len(PAIRS)
        assert list(data.overlap) == []


def test_overlap_of_files_and_marks_is_told(tmp_path, caplog):
    frames = {"a": [], "b": []}
    for k, name in enumerate(PAIRS[:4] * 4):
        atoms = molecule(name)
        atoms.rattle(0.03, seed=k)
        forces = np.random.default_rng(k).normal(size=(len(atoms), 3))
        atoms.calc = SinglePointCalculator(atoms, energy=-1.0 * k, forces=forces)
        atoms.info["smiles"] = smiles_of(atoms)
        frames["ab"[k % 3 == 0]].append(atoms)
    for name, some in frames.items():
        ase.io.write(tmp_path / f"{name}.xyz", some, format="extxyz")
    data = prepare(config(tmp_path / "a.xyz", split={}, validation=str(tmp_path / "b.xyz")))
    (line,) = data.overlap
    assert line.startswith("4 of 4 molecules in validation are also in train, e.g. [")
    assert f"{line}; errors there look better than they are" in caplog.text
