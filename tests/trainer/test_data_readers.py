"""Readers: units, sign of forces, charges, and refusal of every broken label by name."""

import gzip
import json
import logging

import ase
import ase.io
import h5py
import numpy as np
import pytest
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_md.constants import BOHR, HARTREE
from mlip_md.errors import DataError
from mlip_md.trainer.data import iterate, read, read_atomic_energies, readers
from mlip_md.trainer.data.readers import formal_charge, recognize

STIFFNESS, LENGTH = 0.35, 1.4  # hartree/bohr², bohr: a diatomic on a spring


def spring(distances):
    """Positions (bohr), energies (hartree) and gradients (hartree/bohr) along x."""
    distances = np.asarray(distances, float)
    positions = np.zeros((len(distances), 2, 3))
    positions[:, 1, 0] = distances
    energies = 0.5 * STIFFNESS * (distances - LENGTH) ** 2 - 1.0
    gradients = np.zeros_like(positions)
    gradients[:, 1, 0] = STIFFNESS * (distances - LENGTH)
    gradients[:, 0, 0] = -gradients[:, 1, 0]
    return positions, energies, gradients


def write_spice(path, groups):
    with h5py.File(path, "w") as file:
        for key, (fields, attributes) in groups.items():
            group = file.create_group(key)
            group.attrs.update(attributes)
            for name, value in fields.items():
                if value is not None:
                    group.create_dataset(name, data=value)


def spice_fields(distances=(1.2, 1.4, 1.6), smiles="[H:1][H:2]", **changes):
    positions, energies, gradients = spring(distances)
    fields = {
        "atomic_numbers": np.array([1, 1], np.int16),
        "conformations": positions.astype(np.float32),
        "dft_total_energy": energies,
        "dft_total_gradient": gradients.astype(np.float32),
        "smiles": [smiles.encode()],
        "subset": [b"Springs"],
    }
    return fields | changes


def write_curated(path, energy=-32.0, **changes):
    fields = {
        "elements": np.array([8, 1, 1]),
        "positions": np.eye(3),
        "forces": np.zeros((3, 3)),
    } | changes
    with h5py.File(path, "w") as file:
        group = file.create_group("set-1_0")
        if energy is not None:
            group.attrs["energy"] = energy
        for name, value in fields.items():
            if value is not None:
                group.create_dataset(name, data=value)


def frame(energy=-1.0, forces=((0.0, 0.1, 0.0), (0.0, -0.1, 0.0)), stress=None, **kwargs):
    atoms = ase.Atoms("H2", positions=[[0, 0, 0], [0, 0.74, 0]], **kwargs)
    results = {"energy": energy, "forces": forces, "stress": stress}
    results = {
        k: np.asarray(v) if k != "energy" else v for k, v in results.items() if v is not None
    }
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def test_spice_units_and_sign(tmp_path):
    write_spice(tmp_path / "a.h5", {"H2": (spice_fields(), {})})
    structures = read(tmp_path / "a.h5")
    assert len(structures) == 3
    stretched = structures[2]
    bond = stretched.positions[1, 0] - stretched.positions[0, 0]
    np.testing.assert_allclose(bond, 1.6 * 0.529177210903, rtol=1e-6)
    np.testing.assert_allclose(stretched.energy, (0.5 * 0.35 * 0.04 - 1) * 27.211386245988)
    pull = STIFFNESS * 0.2 * 27.211386245988 / 0.529177210903
    np.testing.assert_allclose(stretched.forces[:, 0], [pull, -pull], rtol=1e-6)  # contracts
    assert (stretched.subset, stretched.group) == ("Springs", "[H][H]")
    assert stretched.name.endswith("a.h5:H2[2]")
    assert stretched.forces.dtype == stretched.positions.dtype == np.float64


def test_spice_forces_are_minus_the_slope_of_the_energy(tmp_path):
    distances = 1.4 + 0.3 + np.array([-1e-3, 0.0, 1e-3])
    fields = spice_fields(distances)
    fields["conformations"] = spring(distances)[0]  # float64, for the difference quotient
    write_spice(tmp_path / "a.h5", {"H2": (fields, {})})
    below, middle, above = read(tmp_path / "a.h5")
    step = above.positions[1, 0] - below.positions[1, 0]
    slope = (above.energy - below.energy) / step
    np.testing.assert_allclose(middle.forces[1, 0], -slope, rtol=1e-6)


def test_stated_units_are_followed(tmp_path):
    positions, energies, gradients = spring([1.5])
    write_spice(tmp_path / "a.h5", {"H2": (spice_fields([1.5]), {})})
    with h5py.File(tmp_path / "b.h5", "w") as file:
        group = file.create_group("H2")
        group["atomic_numbers"] = [1, 1]
        for name, values, unit in (
            ("conformations", positions * BOHR / 10, "nanometers"),
            ("dft_total_energy", energies * 2625.4996394799, "kJ/mol"),
            ("dft_total_gradient", gradients * 2625.4996394799 / BOHR, "kJ/mol/angstrom"),
        ):
            group.create_dataset(name, data=values).attrs["units"] = unit
    one, other = read(tmp_path / "a.h5")[0], read(tmp_path / "b.h5")[0]
    np.testing.assert_allclose(other.positions, one.positions, rtol=1e-6)
    np.testing.assert_allclose(other.energy, one.energy, rtol=1e-9)
    np.testing.assert_allclose(other.forces, one.forces, rtol=1e-6)
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file["H2/dft_total_energy"].attrs["units"] = "furlong"
    with pytest.raises(DataError, match=r"b\.h5:H2.*furlong"):
        read(tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file["H2/dft_total_energy"].attrs["units"] = h5py.Empty("S4")
    with pytest.raises(DataError, match=r"H2: the unit of dft_total_energy is Empty.*; text is ne"):
        read(tmp_path / "b.h5")


@pytest.mark.parametrize(
    ("smiles", "charge"),
    [
        ("[H:3][C:1]#[C:2][H:4].[Na+:5]", 1),
        ("[Ca+2:1]", 2),
        ("[Mg++]", 2),
        ("[O-:2][C:1]=O", -1),
        ("[NH3+]CC(=O)[O-]", 0),
        ("C[C@@H](N)C", 0),
        ("[O-2]", -2),
    ],
)
def test_formal_charge(smiles, charge):
    assert formal_charge(smiles) == charge


def test_charge_comes_from_the_attribute_or_the_smiles(tmp_path):
    write_spice(
        tmp_path / "a.h5",
        {
            "a": (spice_fields([1.1], "[H+:1].[H:2]"), {}),
            "b": (spice_fields([1.2], "[H+:1].[H:2]"), {"total_charge": -1}),
        },
    )
    assert [s.charge for s in read(tmp_path / "a.h5")] == [1, -1]
    write_spice(tmp_path / "a.h5", {"a": (spice_fields(), {"total_charge": 0.5})})
    with pytest.raises(DataError, match=r"a\.h5:a: total charge .*0\.5"):
        read(tmp_path / "a.h5")


def test_split_marks(tmp_path):
    groups = {
        "a": (spice_fields([1.1, 1.2]), {"split": "train"}),
        "b": (spice_fields([1.3], split=np.bytes_("validation")), {}),
    }
    write_spice(tmp_path / "a.h5", groups)
    assert len(read(tmp_path / "a.h5", split="train")) == 2
    assert len(read(tmp_path / "a.h5", split="validation")) == 1
    assert len(read(tmp_path / "a.h5")) == 3
    assert read(tmp_path / "a.h5", split="test") == []
    assert [s.mark for s in read(tmp_path / "a.h5")] == ["train", "train", "validation"]
    with pytest.raises(DataError, match="split = 'valid' is not known"):
        read(tmp_path / "a.h5", split="valid")
    for bad in ("valid", ["train", "test"]):
        write_spice(tmp_path / "b.h5", {"a": (spice_fields(), {"split": bad})})
        with pytest.raises(DataError, match=r"b\.h5:a: its split mark is"):
            read(tmp_path / "b.h5", split="train")
    write_spice(tmp_path / "b.h5", {"a": (spice_fields(), {})})
    with pytest.raises(DataError, match=r"b\.h5:a: no split is marked"):
        read(tmp_path / "b.h5", split="train")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("field", ["conformations", "dft_total_energy", "dft_total_gradient"])
def test_spice_not_finite(tmp_path, field, bad):
    fields = spice_fields()
    fields[field][1] = bad
    write_spice(tmp_path / "a.h5", {"H2": (fields, {})})
    with pytest.raises(DataError, match=r"a\.h5:H2\[1\].*NaN or infinity"):
        read(tmp_path / "a.h5")
    assert len(read(tmp_path / "a.h5", on_bad="skip")) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dft_total_gradient": None}, "dft_total_gradient missing"),
        ({"dft_total_gradient": np.zeros((3, 3, 3))}, r"\(3, 3, 3\); .*\(3, 2, 3\) are needed"),
        ({"conformations": np.zeros((2, 2, 3))}, r"conformations is numbers of shape \(2, 2, 3\)"),
        ({"conformations": [b"H", b"H"]}, r"conformations is text of shape \(2,\); numbers"),
        ({"dft_total_energy": -1.0}, r"dft_total_energy is numbers of shape \(\); .*\(any\)"),
        ({"dft_total_energy": h5py.Empty("f8")}, "dft_total_energy is empty"),
        ({"dft_total_energy": np.zeros(3, complex)}, "dft_total_energy is complex128 of shape"),
        ({"atomic_numbers": np.array([[1, 1]])}, r"atomic_numbers is numbers of shape \(1, 2\)"),
        ({"atomic_numbers": np.array([1.0, 8.5])}, r"atomic_numbers \[8\.5\] are no whole"),
        ({"atomic_numbers": np.array([1.0, np.nan])}, r"atomic_numbers \[nan\] are no whole"),
        ({"smiles": np.zeros(0)}, r"smiles is array\(\[\].*text is needed"),
        ({"smiles": [b"\xff\xfe"]}, "smiles is .*text is needed"),
        ({"subset": h5py.Empty("f8")}, "subset is empty"),
        ({"charge": [0.0, 1.0]}, "total charge .* is not a whole number"),
        ({"charge": np.zeros(0)}, "total charge .* is not a whole number"),
        ({"atomic_numbers": np.array([1, 0])}, r"\[0\]: atomic numbers run from 0 to 1"),
        ({"conformations": np.zeros((3, 2, 3))}, r"\[1\]: a duplicate.*H2\[0\]"),
    ],
)
def test_spice_broken_groups(tmp_path, changes, message):
    write_spice(tmp_path / "a.h5", {"H2": (spice_fields() | changes, {})})
    with pytest.raises(DataError, match=rf"a\.h5:H2.*{message}"):
        read(tmp_path / "a.h5")


def test_groups_and_types_for_data_sets(tmp_path):
    for key in ("dft_total_energy", "smiles"):
        write_spice(tmp_path / "a.h5", {"H2": (spice_fields() | {key: None}, {})})
        with h5py.File(tmp_path / "a.h5", "a") as file:
            file["H2"].create_group(key)
        with pytest.raises(DataError, match=rf"a\.h5:H2: {key} is a group"):
            read(tmp_path / "a.h5")
    write_spice(tmp_path / "a.h5", {"H2": (spice_fields(dft_total_gradient=None), {})})
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["H2/dft_total_gradient"] = h5py.SoftLink("/nowhere")
    with pytest.raises(DataError, match=r"a\.h5:H2: dft_total_gradient: damaged or not readable"):
        read(tmp_path / "a.h5")


def test_whole_atomic_numbers_may_be_floats(tmp_path):
    write_spice(tmp_path / "a.h5", {"H2": (spice_fields(atomic_numbers=[1.0, 8.0]), {})})
    numbers = read(tmp_path / "a.h5")[0].atomic_numbers
    assert (numbers.tolist(), numbers.dtype) == ([1, 8], np.int64)


def test_curated(tmp_path):
    write_curated(tmp_path / "a.h5")
    (structure,) = read(tmp_path / "a.h5")
    assert recognize(tmp_path / "a.h5") == "curated"
    assert (structure.energy, structure.group) == (-32.0, "set-1")
    np.testing.assert_array_equal(structure.positions, np.eye(3))
    assert structure.cell is None
    write_curated(tmp_path / "b.h5", cell=4 * np.eye(3), stress=0.1 * np.eye(3))
    (structure,) = read(tmp_path / "b.h5")
    assert structure.pbc.all()
    np.testing.assert_array_equal(structure.cell, 4 * np.eye(3))
    np.testing.assert_array_equal(structure.stress, 0.1 * np.eye(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": None}, "energy missing"),
        ({"energy": np.nan}, "energies hold NaN"),
        ({"forces": None}, "forces missing"),
        ({"elements": None}, "elements missing"),
        ({"forces": np.zeros((2, 3))}, r"forces is numbers of shape \(2, 3\); .*\(3, 3\) are"),
        ({"energy": [-1.0, -2.0]}, r"energy is numbers of shape \(2,\); .*\(\) are needed"),
        ({"energy": "low"}, "energy is text"),
        ({"elements": np.array([8.5, 1, 1])}, r"elements \[8\.5\] are no whole numbers"),
        ({"pbc": [True, False], "cell": np.eye(3)}, r"pbc is numbers of shape \(2,\)"),
        ({"pbc": [True, True, False]}, "periodic along a, b .* give a cell"),
        ({"stress": np.zeros(6)}, r"stress is numbers of shape \(6,\)"),
        ({"cell": np.ones((3, 3))}, "zero or linearly dependent"),
    ],
)
def test_curated_broken(tmp_path, changes, message):
    write_curated(tmp_path / "a.h5", **changes)
    with pytest.raises(DataError, match=rf"a\.h5:set-1_0: .*{message}"):
        read(tmp_path / "a.h5")


def test_units_stated_in_curated_files(tmp_path):
    cell, stress = 4 * np.eye(3), 0.01 * np.eye(3)
    forces = np.arange(9.0).reshape(3, 3)
    write_curated(tmp_path / "a.h5", cell=cell, stress=stress, forces=forces)
    write_curated(
        tmp_path / "b.h5",
        energy=-32.0 / HARTREE,
        positions=np.eye(3) / BOHR,
        forces=forces / HARTREE * BOHR,
        cell=cell / 10,
        stress=stress * 160.21766208,
    )
    units = {
        "positions": "Bohr", "forces": "Eh/bohr", "cell": "nm", "stress": "GPa",
    }  # fmt: skip
    with h5py.File(tmp_path / "b.h5", "a") as file:
        file["set-1_0"].attrs["energy_units"] = "hartree"
        for key, unit in units.items():
            file["set-1_0"][key].attrs["units"] = unit
    (one,), (other,) = read(tmp_path / "a.h5"), read(tmp_path / "b.h5")
    for what in ("energy", "positions", "forces", "cell", "stress"):
        np.testing.assert_allclose(getattr(other, what), getattr(one, what), rtol=1e-6)
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["set-1_0/positions"].attrs["units"] = "Å"
        file["set-1_0/forces"].attrs["units"] = "eV/Å"
    np.testing.assert_array_equal(read(tmp_path / "a.h5")[0].positions, np.eye(3))
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["set-1_0/forces"].attrs["units"] = "dyn"
    with pytest.raises(DataError, match=r"a\.h5:set-1_0: unit 'dyn' of forces is not known"):
        read(tmp_path / "a.h5")


@pytest.mark.parametrize(
    "keys", [("energy", "forces"), ("Energy", "forces"), ("REF_energy", "REF_forces")]
)
def test_extxyz_keys(tmp_path, keys):
    path = tmp_path / "a.xyz.gz"
    with gzip.open(path, "wt") as file:
        file.write(
            f"1\nProperties=species:S:1:pos:R:3:{keys[1]}:R:3 {keys[0]}=-3.5 charge=1 "
            'smiles="[H+:1]"\nH 0 0 1 0.1 0.2 0.3\n'
        )
    (structure,) = read(path)
    assert (structure.energy, structure.charge, structure.group) == (-3.5, 1, "[H+]")
    np.testing.assert_array_equal(structure.forces, [[0.1, 0.2, 0.3]])


def test_extxyz_prefers_the_reference_and_takes_named_keys(tmp_path):
    atoms = frame(energy=-1.0)
    atoms.info["REF_energy"] = -2.0
    atoms.arrays["REF_forces"] = np.full((2, 3), 0.5)
    atoms.info["dft"] = -3.0
    ase.io.write(tmp_path / "a.xyz", atoms, format="extxyz")
    (reference,) = read(tmp_path / "a.xyz")
    assert (reference.energy, reference.forces[0, 0]) == (-2.0, 0.5)
    assert read(tmp_path / "a.xyz", energy_key="dft")[0].energy == -3.0
    with pytest.raises(DataError, match="no energy under absent"):
        read(tmp_path / "a.xyz", energy_key="absent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"energy": None}, "no energy under REF_energy or energy or Energy"),
        ({"forces": None, "info": {"dft_forces": 1.0}}, "forces only under dft_forces"),
        ({"energy": np.nan}, "energies hold NaN"),
        ({"forces": np.full((2, 3), np.inf)}, "forces hold NaN or infinity"),
        (
            {"pbc": True, "cell": [4, 4, 4],
             "info": {"REF_energy": -1.0, "REF_forces": 0, "REF_stress": "low"}},
            "stress label is no array",
        ),
        ({}, "a duplicate"),
    ],
)  # fmt: skip
def test_extxyz_broken_frames(tmp_path, changes, message):
    frames = [frame(), frame(**changes)]
    if changes:
        frames[1].positions *= 1.1
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    with pytest.raises(DataError, match=rf"a\.xyz:\[1\]: .*{message}"):
        read(tmp_path / "a.xyz")
    assert len(read(tmp_path / "a.xyz", on_bad="skip")) == 1


def test_extxyz_cell_and_stress(tmp_path):
    cell = np.diag([4.0, 5.0, 6.0])
    voigt = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    full = np.array([[1, 6, 5], [6, 2, 4], [5, 4, 3]], float)
    virial = frame(cell=cell, pbc=True)
    virial.positions += 0.01
    virial.info["virial"] = -full * 120.0
    open_boundaries = frame(cell=cell, pbc=False)
    frames = [frame(cell=cell, pbc=True, stress=voigt), virial, open_boundaries]
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    one, two, three = read(tmp_path / "a.xyz")
    np.testing.assert_allclose(one.stress, full)
    np.testing.assert_allclose(two.stress, full)
    np.testing.assert_array_equal(one.cell, cell)
    assert three.stress is None
    assert three.cell is None


@pytest.mark.parametrize(
    ("vectors", "pbc", "message"),
    [
        ([[4, 0, 0], [4, 0, 0], [0, 0, 9]], "T T F", "periodic along a, b .* linearly dependent"),
        ([[4, 0, 0], [0, 0, 0], [0, 0, 9]], "F T F", "periodic along b .* zero"),
        (1e13 * np.eye(3), "T T T", "too large"),
    ],
)
def test_unsound_cells_are_refused_by_name_or_skipped(tmp_path, vectors, pbc, message):
    lattice = " ".join(str(x) for x in np.ravel(vectors))
    good = '1\nLattice="4 0 0 0 4 0 0 0 4" pbc="T T T" energy=-1.0\nH 0 0 0 0 0 0\n'
    bad = f'1\nLattice="{lattice}" pbc="{pbc}" energy=-1.0\nH 0 0 0 0 0 0\n'
    columns = "Properties=species:S:1:pos:R:3:forces:R:3"
    (tmp_path / "a.xyz").write_text((good + bad).replace("energy", f"{columns} energy"))
    with pytest.raises(DataError, match=rf"a\.xyz:\[1\]: .*{message}"):
        read(tmp_path / "a.xyz")
    assert len(read(tmp_path / "a.xyz", on_bad="skip")) == 1


def test_a_format_is_an_entry_of_the_table(tmp_path, monkeypatch):
    def fields(path, split, keys):
        numbers, zeros = [1], np.zeros((1, 3))
        yield {"atomic_numbers": numbers, "positions": zeros, "energy": 2.0, "forces": zeros}

    (tmp_path / "a.own").touch()
    monkeypatch.setattr(readers, "recognize", lambda _: "own")
    monkeypatch.setitem(readers.FORMATS, "own", readers.Format(fields, lambda _: {1: 2.0}))
    assert [structure.energy for structure in read(tmp_path / "a.own")] == [2.0]
    assert read_atomic_energies(tmp_path / "a.own") == {1: 2.0}


def test_isolated_atoms(tmp_path):
    atom = ase.Atoms("O")
    atom.info["energy"] = -2041.9
    ase.io.write(tmp_path / "a.xyz", [atom, frame()], format="extxyz")
    assert read(tmp_path / "a.xyz")[0].forces.tolist() == [[0, 0, 0]]
    assert read_atomic_energies(tmp_path / "a.xyz") == {8: -2041.9}
    write_spice(tmp_path / "a.h5", {"H2": (spice_fields(), {})})
    assert read_atomic_energies(tmp_path / "a.h5") is None
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["atomic_energies_hartree"] = json.dumps({"1": -0.5})
    assert read_atomic_energies(tmp_path / "a.h5") == {1: -0.5 * HARTREE}
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["atomic_energies_hartree"] = "nonsense"
    with pytest.raises(DataError, match="not a map"):
        read_atomic_energies(tmp_path / "a.h5")


def test_foreign_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read(tmp_path / "absent.h5")
    (tmp_path / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="not a known format"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.bin").write_bytes(bytes(range(128, 256)))
    with pytest.raises(DataError, match="neither HDF5 nor text"):
        read(tmp_path / "a.bin")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x/y"] = [1.0]
    with pytest.raises(DataError, match=r"not a known HDF5 layout.*y"):
        read(tmp_path / "a.h5")
    (tmp_path / "a.xyz").write_text("2\nenergy=1\nH 0 0 0\n")
    with pytest.raises(DataError, match=r"a\.xyz:\[0\]: not readable"):
        read(tmp_path / "a.xyz")


def content_of(kind, folder):
    """Suffix and bytes of a small file of a kind."""
    if kind == "spice":
        fields = spice_fields()
        groups = {"H2": (fields, {"split": "train"}), "D2": (spice_fields([1.1]), {})}
        write_spice(folder / "whole", groups)
        return ".h5", (folder / "whole").read_bytes()
    if kind == "curated":
        write_curated(folder / "whole", cell=4 * np.eye(3))
        with h5py.File(folder / "whole", "a") as file:
            file["set-1_0/positions"].attrs["units"] = "angstrom"
        return ".h5", (folder / "whole").read_bytes()
    frames = [frame(), frame(energy=-2.0, cell=[4, 4, 4], pbc=True)]
    frames[1].positions *= 1.1
    ase.io.write(folder / "whole", frames, format="extxyz")
    content = (folder / "whole").read_bytes()
    return (".xyz", content) if kind == "text" else (".xyz.gz", gzip.compress(content))


def damaged(content, generator):
    """Cut somewhere, or with some bytes changed, mostly near the beginning."""
    if generator.random() < 0.3:
        return content[: generator.integers(len(content))]
    changed = bytearray(content)
    for place in generator.integers(min(len(changed), 4096), size=generator.integers(1, 20)):
        changed[place] = generator.integers(256)
    return bytes(changed)


@pytest.mark.parametrize("kind", ["spice", "curated", "text", "gzip"])
def test_damaged_files_are_read_or_refused_by_name(kind, tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)
    generator = np.random.default_rng(0)
    suffix, content = content_of(kind, tmp_path)
    refused = 0
    for k in range(100):
        path = tmp_path / f"{k}{suffix}"
        path.write_bytes(damaged(content, generator))
        for use in (read, read_atomic_energies, lambda path: read(path, on_bad="skip")):
            try:
                use(path)
            except DataError as error:
                assert str(path) in str(error)  # noqa: PT017 - most files are refused, not all
                refused += 1
        path.unlink()
    assert refused > 50


def test_a_truncated_file_is_named(tmp_path):
    for kind in ("spice", "gzip"):
        suffix, content = content_of(kind, tmp_path)
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(content[: len(content) - 10])
        with pytest.raises(DataError, match=rf"cut{suffix}: damaged or not readable"):
            read(path, on_bad="skip")


def test_text_that_ends_as_binary(tmp_path):
    frames = [frame(energy=float(k)) for k in range(100)]  # more than is decoded at a time
    for k, atoms in enumerate(frames):
        atoms.positions *= 1 + 0.01 * k
    ase.io.write(tmp_path / "a.xyz", frames, format="extxyz")
    with open(tmp_path / "a.xyz", "ab") as file:
        file.write(b"\xff\xfe")
    with pytest.raises(DataError, match=r"a\.xyz: damaged or not readable .*utf-8"):
        read(tmp_path / "a.xyz")


def test_a_refused_file_is_closed(tmp_path):
    fields = spice_fields(dft_total_energy=np.zeros(7))
    write_spice(tmp_path / "a.h5", {"H2": (fields, {})})
    with pytest.raises(DataError) as kept:
        read(tmp_path / "a.h5")
    write_spice(tmp_path / "a.h5", {"H2": (spice_fields(), {})})  # fails where it is still open
    assert len(read(tmp_path / "a.h5")) == 3
    assert "a.h5" in str(kept.value)


def test_real_spice_file(reference_data):
    path = reference_data / "data" / "spice_sample" / "SPICE-1.1.4_n2.hdf5"
    structures = read(path)
    assert len(structures) == 55
    assert {s.charge for s in structures} == {1}
    assert len({s.group for s in structures}) == 2
    for structure in structures:  # labels of one calculation: no net force, bonds of about 1 Å
        assert np.linalg.norm(structure.forces.sum(0)) < 0.01
        distances = np.linalg.norm(structure.positions[:, None] - structure.positions, axis=-1)
        assert 0.9 < distances[distances > 0].min() < 1.2
    with h5py.File(path) as file:
        gradient = file["C#C.[Na+]/dft_total_gradient"][3]
    sodium = next(s for s in structures if s.name.endswith("C#C.[Na+][3]"))
    np.testing.assert_allclose(sodium.forces, -gradient * 51.42206747, rtol=1e-6)


def test_real_conformers_climb_against_their_forces(reference_data):
    """Between near conformers of one ion pair, energy falls along the forces."""
    path = reference_data / "data" / "spice_sample" / "SPICE-1.1.4_n2.hdf5"
    structures = [s for s in read(path) if "C#C.[Na+]" in s.name]
    signs = []
    for one in structures:
        for other in structures:
            step = other.positions - one.positions
            expected = -0.5 * np.sum((one.forces + other.forces) * step)
            if one is not other and abs(expected) > 0.02:
                signs.append((other.energy - one.energy) / expected > 0)
    assert len(signs) >= 4
    assert np.mean(signs) > 0.9


def first(path):
    return next(iterate(path))


def test_real_curated_and_extxyz_files(reference_data):
    data = reference_data / "data"
    curated = read(data / "misc" / "spice2-1000_429_md_0-1.hdf5")
    assert [s.charge for s in curated] == [-2, -2]
    assert len({s.group for s in curated}) == 1
    np.testing.assert_allclose(curated[0].energy, -33533.58818835873)
    np.testing.assert_allclose(curated[0].forces.sum(0), 0, atol=0.05)
    omol = read(data / "misc" / "SPICE_small_with_charges.xyz")
    assert {5, 14} & set(np.concatenate([s.atomic_numbers for s in omol]).tolist())
    ethanol = first(data / "rmd17" / "ethanol_train_01.xyz.gz")
    np.testing.assert_allclose(ethanol.energy, -4209.783455217897)
    assert ethanol.pbc.all()  # a lattice without pbc is periodic, as ASE reads it
    assert first(data / "acac" / "train_300K.xyz.gz").cell is None
    atoms = read_atomic_energies(data / "3bpa" / "iso_atoms.xyz")
    np.testing.assert_allclose(atoms[1], -13.587222780835477)
    with pytest.raises(DataError, match=r"atomic_numbers.*missing"):
        read(data / "spice_geometries" / "water.hdf5")
