"""Files that people have: read with the same numbers, or one sentence on what they are."""

import bz2
import gzip
import lzma
import shutil
from pathlib import Path
from xml.etree import ElementTree

import ase
import ase.db
import ase.io
import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator

from mlip_md.constants import KJ_PER_KCAL, KJ_PER_MOL_PER_EV
from mlip_md.errors import DataError
from mlip_md.trainer.data import prepare, read
from mlip_md.trainer.data.readers import recognize
from mlip_md.trainer.data.sources import find_files
from mlip_md.trainer.recipe import DataConfig, load_recipe

KCAL = KJ_PER_KCAL / KJ_PER_MOL_PER_EV


def frames(count=6, periodic=False):
    result = []
    for k in range(count):
        atoms = molecule("H2CO", cell=[9, 9, 9] if periodic else None, pbc=periodic)
        atoms.rattle(0.03, seed=k)
        forces = np.random.default_rng(k).normal(size=(4, 3))
        atoms.calc = SinglePointCalculator(atoms, energy=-100.0 + k, forces=forces)
        result.append(atoms)
    return result


def same(structures, atoms_list, tolerance=1e-6):
    assert len(structures) == len(atoms_list)
    for found, atoms in zip(structures, atoms_list, strict=True):
        np.testing.assert_array_equal(found.atomic_numbers, atoms.numbers)
        np.testing.assert_allclose(found.positions, atoms.positions, atol=tolerance)
        np.testing.assert_allclose(found.energy, atoms.get_potential_energy(), atol=tolerance)
        np.testing.assert_allclose(found.forces, atoms.get_forces(), atol=tolerance)
        assert (found.cell is None) == (not atoms.pbc.any())


def write_extxyz(path, atoms_list):
    ase.io.write(path, atoms_list, format="extxyz")
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("a.xyz.gz", lambda text: gzip.compress(text.encode())),
        ("gz_without_a_name.xyz", lambda text: gzip.compress(text.encode())),
        ("a.xyz.bz2", lambda text: bz2.compress(text.encode())),
        ("a.xyz.xz", lambda text: lzma.compress(text.encode())),
        ("bom.xyz", lambda text: text.encode("utf-8-sig")),
        ("crlf.xyz", lambda text: text.replace("\n", "\r\n").encode()),
        ("blank.xyz", lambda text: ("\n\n" + text + "\n\n").encode()),
    ],
)
def test_text_however_it_is_packed(name, pack, tmp_path):
    text = write_extxyz(tmp_path / "plain.xyz", frames())
    (tmp_path / name).write_bytes(pack(text))
    assert recognize(tmp_path / name) == "extxyz"
    same(read(tmp_path / name), frames())


@pytest.mark.parametrize("name", ["a.traj", "a.db", "a.json", "odd_name"])
@pytest.mark.parametrize("periodic", [False, True])
def test_files_of_ase(name, periodic, tmp_path):
    atoms_list = frames(periodic=periodic)
    if name in ("a.traj", "odd_name"):
        ase.io.write(tmp_path / name, atoms_list, format="traj")
    else:
        with ase.db.connect(tmp_path / name) as database:
            for atoms in atoms_list:
                database.write(atoms, config_weight=2.0)
    same(read(tmp_path / name), atoms_list)
    if name == "a.db":
        assert read(tmp_path / name)[0].weights == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("layout", ["rMD17", "MD17", "3BPA", "3BPA periodic"])
def test_npz(layout, tmp_path):
    atoms_list = frames(periodic="periodic" in layout)
    numbers = atoms_list[0].numbers
    positions, forces = (np.array([f(a) for a in atoms_list]) for f in
                         (lambda a: a.positions, lambda a: a.get_forces()))  # fmt: skip
    energies = np.array([a.get_potential_energy() for a in atoms_list])
    arrays = {
        "rMD17": {"nuclear_charges": numbers, "coords": positions, "energies": energies / KCAL,
                  "forces": forces / KCAL, "old_indices": np.arange(6)},
        "MD17": {"z": numbers, "R": positions, "E": energies[:, None] / KCAL, "F": forces / KCAL},
        "3BPA": {"atomic_numbers": numbers, "pos": positions, "energy": energies[:, None],
                 "forces": forces, "pbc": np.zeros(3, bool), "cell": np.zeros((3, 3))},
    }[layout.split()[0]]  # fmt: skip
    if "periodic" in layout:
        arrays |= {"pbc": np.ones(3, bool), "cell": 9 * np.eye(3)}
    np.savez(tmp_path / "a.npz", **arrays)
    same(read(tmp_path / "a.npz"), atoms_list)
    with pytest.raises(DataError, match="no split is marked"):
        read(tmp_path / "a.npz", split="test")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros(3)}, "the arrays in it are X; known layouts are nuclear_charges, coords"),
        ({"z": [1, 1], "R": np.zeros((3, 3, 3)), "E": np.zeros(3), "F": np.zeros((3, 3, 3))},
         r"a\.npz: z is of .* shape \(2,\); numbers of shape \(3\)"),
        ({"z": [1, 1], "R": np.zeros((3, 2, 3)), "E": np.zeros(2), "F": np.zeros((3, 2, 3))},
         r"a\.npz: E is"),
    ],
)  # fmt: skip
def test_npz_of_other_shapes(arrays, message, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.npz")


def write_deepmd(folder, atoms_list, virial=None, mixed=False, periodic=True):
    for number, part in enumerate((atoms_list[:4], atoms_list[4:])):
        place = folder / f"set.{number:03d}"
        place.mkdir(parents=True)
        count = len(part)
        np.save(place / "coord.npy", np.array([a.positions.ravel() for a in part], np.float32))
        np.save(place / "energy.npy", np.array([a.get_potential_energy() for a in part]))
        np.save(place / "force.npy", np.array([a.get_forces().ravel() for a in part]))
        if periodic:
            np.save(place / "box.npy", np.array([a.cell.array.ravel() for a in part]))
        if virial is not None:
            np.save(place / "virial.npy", np.tile(virial.ravel(), (count, 1)))
        if mixed:
            np.save(place / "real_atom_types.npy", np.tile([1, 2, 0, 0], (count, 1)))
    types = [0] * 4 if mixed else [1, 2, 0, 0]
    (folder / "type.raw").write_text("\n".join(map(str, types)))
    (folder / "type_map.raw").write_text("H\nO\nC\n")
    if not periodic:
        (folder / "nopbc").touch()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("periodic", [False, True])
def test_folders_of_deepmd(mixed, periodic, tmp_path):
    atoms_list = frames(periodic=periodic)
    virial = np.arange(9.0).reshape(3, 3)
    write_deepmd(tmp_path / "a", atoms_list, virial, mixed, periodic)
    structures = read(tmp_path / "a")
    same(structures, atoms_list, 1e-5)
    assert structures[5].name == f"{tmp_path / 'a' / 'set.001'}[1]"
    if periodic:
        np.testing.assert_allclose(structures[0].stress, -virial / 729)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert find_files(str(tmp_path)) == [str(tmp_path / "a"), str(tmp_path / "b")]


def test_what_a_folder_of_deepmd_lacks_is_named(tmp_path):
    write_deepmd(tmp_path / "a", frames(periodic=True))
    (tmp_path / "a/set.001/box.npy").unlink()
    with pytest.raises(DataError, match=r"set\.001: box\.npy missing"):
        read(tmp_path / "a")
    (tmp_path / "a/type_map.raw").write_text("H\nO_w\nC\n")
    with pytest.raises(DataError, match="O_w are no symbols"):
        read(tmp_path / "a")
    (tmp_path / "a/type_map.raw").unlink()
    with pytest.raises(DataError, match=r"no type_map\.raw, which says what elements"):
        read(tmp_path / "a")


VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <generator><i name="program" type="string">vasp </i></generator>
 <kpoints><varray name="kpointlist"><v>0 0 0</v></varray>
  <varray name="weights"><v>1</v></varray></kpoints>
 <atominfo><atoms>2</atoms><array name="atoms"><set>
  <rc><c>Cu</c><c>1</c></rc><rc><c>Al</c><c>2</c></rc></set></array></atominfo>
 <structure name="initialpos"><crystal><varray name="basis">
  <v>4 0 0</v><v>0 4 0</v><v>0 0 4</v></varray></crystal>
  <varray name="positions"><v>0 0 0</v><v>0.5 0.5 0.5</v></varray></structure>
 {steps}
</modeling>
"""
STEP = """<calculation>
 <scstep><energy><i name="e_fr_energy">{free}</i><i name="e_wo_entrp">-1.0</i>
  <i name="e_0_energy">-2.0</i></energy></scstep>
 <structure><crystal><varray name="basis"><v>4 0 0</v><v>0 4 0</v><v>0 0 4</v></varray></crystal>
  <varray name="positions"><v>{x} 0 0</v><v>0.5 0.5 0.5</v></varray></structure>
 <varray name="forces"><v>0.1 0 {x}</v><v>-0.1 0 0</v></varray>
 <varray name="stress"><v>1 0 0</v><v>0 2 0</v><v>0 0 3</v></varray>
 <energy><i name="e_fr_energy">{free}</i><i name="e_wo_entrp">-1.0</i>
  <i name="e_0_energy">-2.0</i></energy>
</calculation>"""


def test_vasprun_gives_free_energies_forces_and_stress(tmp_path):
    steps = "\n".join(STEP.format(free=-7.0 - k, x=0.01 * (k + 1)) for k in range(3))
    (tmp_path / "vasprun.xml").write_text(VASPRUN.format(steps=steps))
    assert recognize(tmp_path / "vasprun.xml") == "vasprun"
    structures = read(tmp_path / "vasprun.xml")
    assert [s.energy for s in structures] == [-7.0, -8.0, -9.0]
    np.testing.assert_allclose(structures[2].forces, [[0.1, 0, 0.03], [-0.1, 0, 0]])
    np.testing.assert_allclose(structures[2].positions[0], [0.12, 0, 0])
    np.testing.assert_allclose(
        np.diag(structures[0].stress), -np.arange(1, 4) * 6.241509e-4, rtol=1e-5
    )
    (tmp_path / "vasprun.xml").write_text(VASPRUN.format(steps="").replace("</modeling>", ""))
    with pytest.raises(DataError, match=r"vasprun\.xml: "):
        read(tmp_path / "vasprun.xml")


REAL = Path(ase.__file__).parent / "test" / "testdata" / "vasp"
"""Output of VASP itself, which ASE tests its readers with."""


def numbers_after(lines, key, count, skip):
    """Rows of numbers that begin some lines after the last one with a key."""
    at = max(k for k, line in enumerate(lines) if key in line) + skip
    return np.array([line.split() for line in lines[at : at + count]], float)


def test_an_outcar_of_vasp_is_read_as_it_is_written():
    path = REAL / "OUTCAR_example_1"
    lines = path.read_text().splitlines()
    (found,) = read(path)
    table = numbers_after(lines, "TOTAL-FORCE", 18, 2)
    assert found.positions.tolist() == table[:, :3].tolist()
    assert found.forces.tolist() == table[:, 3:].tolist()
    assert found.energy == -68.22868532  # "free  energy   TOTEN", not that of sigma -> 0
    # kB as xx yy zz xy yz zx; a cell under tension has a negative pressure there
    xx, yy, zz, xy, yz, zx = (float(x) for x in next(x for x in lines if "in kB" in x).split()[2:])
    kilobar = 6.241509e-4
    stress = -kilobar * np.array([[xx, xy, zx], [xy, yy, yz], [zx, yz, zz]])
    np.testing.assert_allclose(found.stress, stress, rtol=1e-5)
    np.testing.assert_allclose(abs(np.linalg.det(found.cell)), 5768.42, rtol=1e-5)


def test_a_vasprun_of_vasp_is_read_as_it_is_written():
    """One that was relaxed under pressure, whose last energies are enthalpies."""
    path = REAL / "vasprun_pstress.xml"
    step = ElementTree.parse(path).getroot().findall("calculation")[-1]
    cell, places, forces = (
        np.array([row.text.split() for row in step.find(f".//varray[@name='{name}']")], float)
        for name in ("basis", "positions", "forces")
    )
    found = read(path)[-1]
    np.testing.assert_allclose(found.positions, places @ cell, atol=1e-12)
    assert found.forces.tolist() == forces.tolist()
    assert found.energy == pytest.approx(-20.24695937, abs=1e-7)  # the enthalpy is -20.23985977


def test_an_unfinished_outcar_says_what_it_is(tmp_path):
    (tmp_path / "OUTCAR").write_text(" vasp.6.3.0 20Jan22 (build) complex\n executed on LinuxIFC\n")
    assert recognize(tmp_path / "OUTCAR") == "outcar"
    with pytest.raises(
        DataError, match=r"OUTCAR: (not readable as outcar by ASE|it holds no usable)"
    ):
        read(tmp_path / "OUTCAR")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\x00" * 16 + b"\xde\xc0\xef\xbe" + b"\x00" * 100, "an LMDB database"),
        (b"\x80\x04\x95", "a pickle of Python; reading one runs what is in it"),
        (b"\x93NUMPY\x01", "a single array of NumPy"),
        (b"PK\x03\x04nonsense", "damaged or not readable"),
        (b"Cu\n1.0\n4 0 0\n", "not a known format; its first line 'Cu' is no number of atoms"),
        ("3\ncomment=Å\n".encode("latin-1"), "not readable|neither"),
    ],
)
def test_other_files_get_a_sentence(content, message, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path / "file")
    assert str(caught.value).startswith(str(tmp_path / "file"))


def config(path):
    return DataConfig.model_validate({"path": path, "cutoff": 4.0, "split": {"by": "structure"}})


def test_folders_and_patterns(tmp_path):
    (tmp_path / "some").mkdir()
    for k in range(3):
        write_extxyz(tmp_path / "some" / f"{k}.xyz", frames()[2 * k : 2 * k + 2])
    for path in ("some", "some/*.xyz", ["some/0.xyz", "some/[12].xyz"]):
        paths = (
            [f"{tmp_path}/{p}" for p in path] if isinstance(path, list) else f"{tmp_path}/{path}"
        )
        data = prepare(config(paths))
        assert sum(map(len, data.parts.values())) == 6
        assert [name.rsplit("/")[-1] for name in data.curation] == ["0.xyz", "1.xyz", "2.xyz"]
    with pytest.raises(DataError, match=r"there is no data file .*none"):
        prepare(config(f"{tmp_path}/none*"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty is a folder without data files"):
        prepare(config(f"{tmp_path}/empty"))


def test_paths_from_the_folder_of_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "project").mkdir()
    write_extxyz(tmp_path / "project" / "a.xyz", frames())
    (tmp_path / "project" / "train.yaml").write_text("data: {path: a.xyz, test: [a*.xyz, b.xyz]}\n")
    monkeypatch.chdir(tmp_path)
    data = load_recipe("project/train.yaml")[0].data
    assert (data.path, data.test) == ("project/a.xyz", ["project/a*.xyz", "b.xyz"])
    write_extxyz(tmp_path / "a.xyz", frames())  # what is here comes first, as ever
    assert load_recipe("project/train.yaml")[0].data.path == "a.xyz"
    assert load_recipe("project/train.yaml", ["data.path=b.xyz"])[0].data.path == "b.xyz"
    monkeypatch.chdir(tmp_path / "project")
    assert load_recipe("train.yaml")[0].data.path == "a.xyz"
