"""`mlip-md make-dataset`: seeded, resumable, split by molecule, labels that are what they say."""

import ast
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mlip_md.constants import BOHR, HARTREE, SPLITS
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.generate import dissociation, labels, molecules, sampling, spice_file
from mlip_md.trainer.generate.command import parse_shares
from mlip_md.trainer.generate.plan import (
    DISSOCIATION,
    SUBSETS,
    assign_split,
    make_generator,
    plan_tasks,
)

pytest.importorskip("rdkit")
pytest.importorskip("tblite")

from mlip_md.trainer.generate import make_dataset as module
from mlip_md.trainer.generate.chemistry import (
    ELEMENTS,
    Conformation,
    build_molecule,
    canonicalize,
    count_atoms,
    is_supported,
)
from mlip_md.trainer.generate.distortions import rotate_beyond, stretch_bond
from mlip_md.trainer.generate.dynamics import KB, run_langevin, spc_fw_forces
from mlip_md.trainer.generate.make_dataset import make_dataset
from mlip_md.trainer.generate.placement import (
    place_in_contact,
    place_in_hydrogen_bond,
    surround,
)

TINY: dict[str, Any] = {
    "scale": 0.003,
    "max_atoms": 9,
    "subsets": ["Small organics", "Dimers", "Ions"],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # read when tblite is loaded; small systems
        import tblite.interface  # noqa: F401

        yield


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("data") / "tiny.h5", workers=2, **TINY)


@functools.cache
def full_plan(seed):
    return plan_tasks(seed)


def content(path: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}

    def visit(name, item):
        if isinstance(item, h5py.Dataset):
            raw = item.asstr()[()] if h5py.check_string_dtype(item.dtype) else item[()]
            found[name] = repr(raw).encode() if raw.dtype == object else raw.tobytes()
        for key, value in item.attrs.items():
            found[f"{name}@{key}"] = str(value).encode()

    with h5py.File(path) as file:
        file.visititems(visit)
        for key, value in file.attrs.items():
            found[f"@{key}"] = str(value).encode()
    return found


# the molecules and the plan


def test_molecules_are_valid_closed_shell_and_of_our_elements():
    neutral = [*molecules.small_organics(), *molecules.drug_like(), *molecules.unusual()]
    neutral += [molecules.capped_peptide(letter) for letter in molecules.RESIDUES]
    assert all(is_supported(s) for s in [*neutral, *molecules.ions(), *molecules.salt_bridges()])
    assert len({canonicalize(s) for s in molecules.small_organics()}) > 400
    from rdkit import Chem

    elements: set[int] = set()
    for smiles in neutral:
        mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
        assert Chem.GetFormalCharge(mol) == 0, smiles
        elements |= {atom.GetAtomicNum() for atom in mol.GetAtoms()}
    assert elements == set(ELEMENTS)
    for smiles in molecules.salt_bridges():
        assert Chem.GetFormalCharge(Chem.MolFromSmiles(smiles)) == 0


def test_plan_is_seeded_and_named_uniquely():
    tasks = full_plan(0)
    assert tasks == plan_tasks(0)
    assert tasks != full_plan(7)
    assert len({t.name for t in tasks}) == len(tasks)
    assert {t.subset for t in tasks} == set(SUBSETS)
    assert not any("/" in t.name for t in tasks)
    large = sum(t.num_starts for t in tasks if t.kind == "water" and t.num_waters >= 20)
    assert large >= 60


@pytest.mark.parametrize("seed", [0, 7])
def test_no_held_out_molecule_leaks_into_another_split(seed):
    found: dict[str, set[str]] = {name: set() for name in SPLITS}
    tasks = full_plan(seed)
    for task in tasks:
        for smiles in task.smiles:
            key = canonicalize(smiles, stereo=False)
            if count_atoms(key)[1] > 2:  # building blocks are in every split
                found[task.split].add(key)
    held_out = {
        name: {
            canonicalize(t.smiles[0], stereo=False)
            for t in tasks
            if t.kind == "molecule" and t.split == name
        }
        for name in ("validation", "test")
    }
    assert not found["train"] & held_out["validation"]
    assert not found["train"] & held_out["test"]
    assert not held_out["test"] & found["validation"]
    assert not held_out["validation"] & found["test"]
    dimers = [t.split for t in tasks if t.subset == "Dimers"]
    assert set(dimers) == set(SPLITS)
    singles = [t.split for t in tasks if t.kind == "molecule"]
    assert 0.86 < singles.count("train") / len(singles) < 0.94
    assert 0.03 < singles.count("test") / len(singles) < 0.08


def test_split_ignores_stereochemistry_and_order_but_not_the_seed():
    names = [molecules.capped_peptide(letter) for letter in molecules.RESIDUES]
    for smiles in names:
        assert assign_split([smiles], 0) == assign_split([smiles.replace("@@", "@")], 0)
        assert (
            assign_split([smiles, "O"], 0)
            == assign_split(["O", smiles], 0)
            == assign_split([smiles], 0)
        )
    assert [assign_split([s], 0) for s in names] != [assign_split([s], 1) for s in names]
    assert {assign_split([s], 0) for s in ("O", "C", "[H][H]", "CO", "N#N")} == {"train"}


def test_shares_change_single_subsets_only():
    def count(shares):
        return Counter(task.subset for task in plan_tasks(0, shares=shares))

    whole = count({})
    assert whole["Atom pairs"] == 45
    assert whole["Isolated atoms"] == 9
    assert whole["Dissociation"] > 800
    parts = count({"Dissociation": 0.5, "Atom pairs": 0.0})
    assert parts.pop("Dissociation") == whole.pop("Dissociation") / 2
    assert whole.pop("Atom pairs")
    assert parts == whole


def test_a_subset_named_twice_is_planned_once():
    assert plan_tasks(0, subsets=["Ions", "Ions"]) == plan_tasks(0, subsets=["Ions"])


# the file


def test_layout_units_and_order_of_atoms(tiny):
    from rdkit import Chem

    parameters = Chem.SmilesParserParams()
    parameters.removeHs = False
    with h5py.File(tiny) as file:
        assert file.attrs["level_of_theory"] == "GFN2-xTB"
        assert file.attrs["program"] == "tblite"
        assert file.attrs["seed"] == 0
        assert file.attrs["complete"]
        energies = {int(z): e for z, e in json.loads(file.attrs["atomic_energies_hartree"]).items()}
        assert energies[1] == pytest.approx(-0.3934827640, abs=1e-8)  # tblite, isolated H
        for name, group in file.items():
            numbers = group["atomic_numbers"][()]
            mol = Chem.MolFromSmiles(group["smiles"].asstr()[0], parameters)
            mapped = {atom.GetAtomMapNum(): atom.GetAtomicNum() for atom in mol.GetAtoms()}
            assert [mapped[i + 1] for i in range(len(numbers))] == numbers.tolist(), name
            assert Chem.GetFormalCharge(mol) == group.attrs["total_charge"]
            assert group.attrs["split"] in SPLITS
            count = len(group["dft_total_energy"])
            shape = (count, len(numbers), 3)
            for key, (kind, expected) in {
                "conformations": ("f4", shape),
                "dft_total_gradient": ("f4", shape),
                "dft_total_energy": ("f8", (count,)),
                "formation_energy": ("f8", (count,)),
            }.items():
                assert group[key].dtype == kind
                assert group[key].shape == expected
                assert group[key].attrs["units"] == spice_file.UNITS[key]
                assert group[key].compression == "gzip"
                assert group[key].shuffle
            assert numbers.dtype == np.int16
            formation = group["dft_total_energy"][()] - sum(energies[int(z)] for z in numbers)
            np.testing.assert_allclose(group["formation_energy"], formation, rtol=0, atol=1e-12)
            norms = np.linalg.norm(group["dft_total_gradient"], axis=-1) * 51.422067
            assert norms.max() <= 30.0


def test_labels_are_those_of_the_stored_geometry(tiny):
    label = labels.METHODS["gfn2"].label
    with h5py.File(tiny) as file:
        for group in file.values():
            numbers, charge = group["atomic_numbers"][()].astype(int), group.attrs["total_charge"]
            energy, gradient, _ = label(numbers, group["conformations"][-1], charge, 0)
            assert energy == pytest.approx(group["dft_total_energy"][-1], abs=1e-9)
            np.testing.assert_allclose(group["dft_total_gradient"][-1], gradient, atol=1e-6)


def test_gradient_is_the_derivative_of_the_energy_in_the_stored_units(tiny):
    label = labels.METHODS["gfn2"].label
    with h5py.File(tiny) as file:
        group = next(iter(file.values()))
        numbers, charge = group["atomic_numbers"][()].astype(int), group.attrs["total_charge"]
        positions = group["conformations"][0].astype(float)
        stored = group["dft_total_gradient"][0]
    step = 1e-3
    for atom, axis in [(0, 0), (1, 2)]:
        moved = [positions.copy(), positions.copy()]
        moved[0][atom, axis] += step
        moved[1][atom, axis] -= step
        high, low = (label(numbers, x, charge, 0).energy for x in moved)
        assert stored[atom, axis] == pytest.approx((high - low) / (2 * step), abs=2e-6)


@pytest.mark.slow
def test_wb97m_d3bj_is_that_of_the_published_data():
    pytest.importorskip("pyscf.dispersion")
    label = labels.find_method("wb97m-d3bj").label
    # hartree, published with SPICE 2 (another program, without density fitting)
    for number, unpaired, published in [(1, 1, -0.49876051), (8, 2, -75.11317840)]:
        energy, gradient, _ = label(np.array([number]), np.zeros((1, 3)), 0, unpaired)
        assert energy == pytest.approx(published, abs=2e-4)
        assert np.abs(gradient).max() < 1e-6
    numbers = np.array([8, 1, 1])
    water = np.array([[0.0, 0.0, 0.0], [0.0, 1.5, 1.1], [0.0, -1.45, 1.15]])
    energy, gradient, _ = label(numbers, water, 0, 0)
    assert energy == pytest.approx(-76.478750, abs=1e-5)
    step = 1e-3
    for atom, axis in [(0, 2), (1, 1)]:
        moved = [water.copy(), water.copy()]
        moved[0][atom, axis] += step
        moved[1][atom, axis] -= step
        high, low = (label(numbers, x, 0, 0).energy for x in moved)
        # the gradient leaves out how the grid moves with the atoms
        assert gradient[atom, axis] == pytest.approx((high - low) / (2 * step), abs=1e-5)


def test_the_trainer_reads_it(tiny):
    from mlip_md.trainer.data.readers import read, read_atomic_energies

    structures = list(read(tiny))
    with h5py.File(tiny) as file:
        assert len(structures) == sum(len(g["dft_total_energy"]) for g in file.values())
    assert {s.subset for s in structures} == set(TINY["subsets"])
    assert any(s.charge for s in structures)
    energies = read_atomic_energies(tiny)
    assert energies is not None
    assert energies[1] == pytest.approx(-10.70721147, abs=1e-6)  # eV


def test_statistics_count_every_conformation(tiny):
    table = spice_file.count_subsets(tiny)
    with h5py.File(tiny) as file:
        total = sum(len(g["dft_total_energy"]) for g in file.values())
        splits = json.loads(file.attrs["splits"])
    assert sum(row["conformations"] for row in table.values()) == total
    assert sum(row[s] for row in table.values() for s in SPLITS) == total
    assert sum(entry["conformations"] for entry in splits.values()) == total
    assert table["Ions"]["charged"] == table["Ions"]["conformations"] > 0
    assert all(0 < row["rms_force"] < row["max_force"] <= 30 for row in table.values())


# running it


def test_same_seed_same_file_whatever_the_number_of_workers(tiny, tmp_path):
    environment = dict(os.environ)
    again = make_dataset(tmp_path / "again.h5", workers=1, **TINY)
    assert content(again) == content(tiny)
    assert dict(os.environ) == environment
    assert not list(tmp_path.glob("*.parts"))


def test_a_killed_run_continues_and_gives_the_same_file(tiny, tmp_path):
    output = tmp_path / "killed.h5"
    code = (
        "from mlip_md.trainer.generate.make_dataset import make_dataset\n"
        f"make_dataset({str(output)!r}, workers=1, **{TINY!r})"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    parts = output.with_name("killed.h5.parts")
    deadline = time.monotonic() + 120
    while not (finished := list(parts.glob("[0-9a-f]*.h5"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with h5py.File(finished[0], "a") as shard:
        (name,) = shard
        shard[name].attrs["marker"] = 1
    make_dataset(output, workers=1, **TINY)
    with h5py.File(output, "a") as file:
        assert file[name].attrs["marker"] == 1  # finished groups are not made again
        del file[name].attrs["marker"]
    assert content(output) == content(tiny)


def test_an_interrupted_run_leaves_a_usable_file(tiny, tmp_path, monkeypatch):
    def interrupt(progress):
        raise KeyboardInterrupt

    output = tmp_path / "partial.h5"
    monkeypatch.setattr(module._GroupCounter, "__call__", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_dataset(output, workers=1, **TINY)
    with h5py.File(output) as file, h5py.File(tiny) as whole:
        assert not file.attrs["complete"]
        assert 0 < len(file) < len(whole)
        assert set(file) < set(whole)
        assert file.attrs["atomic_energies_hartree"] == whole.attrs["atomic_energies_hartree"]


def test_a_finished_file_is_kept_and_another_one_is_refused(tiny):
    before = tiny.stat().st_mtime_ns
    assert make_dataset(tiny, **TINY) == tiny
    assert tiny.stat().st_mtime_ns == before
    with pytest.raises(DataError, match=r"seed = .*0.*this run has 3.*--no-resume"):
        make_dataset(tiny, seed=3, **TINY)


def test_an_unfinished_run_with_other_options_is_refused(tmp_path):
    parts = tmp_path / "a.h5.parts"
    parts.mkdir()
    settings = module._settings(5, "gfn2", 1.0, SUBSETS, None, None)
    (parts / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(DataError, match="seed"):
        make_dataset(tmp_path / "a.h5", seed=6)


@pytest.mark.parametrize(
    ("method", "missing", "extra"),
    [("gfn2", "tblite", "data"), ("gfn2", "rdkit", "data"), ("wb97m-d3bj", "pyscf", "data,wb97m")],
)
def test_a_missing_program_is_named_with_its_extra(tmp_path, monkeypatch, method, missing, extra):
    monkeypatch.setattr(labels, "_installed", lambda name: name != missing)
    with pytest.raises(DataError, match=rf"{missing}.*is not installed.*mlip-md\[{extra}\]"):
        make_dataset(tmp_path / "a.h5", method=method)


def test_bad_options_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"'gfn1' is not known; choose one of gfn2, wb97m-d3bj"):
        make_dataset(tmp_path / "a.h5", method="gfn1")
    with pytest.raises(ConfigError, match="workers must be at least 1"):
        make_dataset(tmp_path / "a.h5", workers=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale must be a finite number larger than 0, received 0.0"),
        ({"scale": np.nan}, "scale must be .* received nan"),
        ({"scale": np.inf}, "scale must be .* received inf"),
        ({"subsets": ["Water"]}, "unknown subsets.*Water clusters"),
        ({"shares": {"Ions": -1.0}}, "share of 'Ions' must be .* not -1.0"),
        ({"shares": {"Water": 1.0}}, "unknown subsets.*Water clusters"),
        ({"max_atoms": 0}, "max_atoms must be .* received 0"),
        ({"seed": -1}, "seed must be .* received -1"),
        ({"seed": 2**63}, "seed must be"),
        ({"subsets": ["Dimers"], "max_atoms": 1}, "nothing to make: .*at most 1 atoms"),
    ],
)
def test_bad_options_touch_no_file(tmp_path, monkeypatch, options, message):
    monkeypatch.setattr(module._Run, "execute", lambda *_: pytest.fail("it was started"))
    output = tmp_path / "a.h5"
    output.touch()
    with pytest.raises((ConfigError, DataError), match=message):
        make_dataset(output, resume=False, **options)
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize("resume", [True, False])
def test_an_output_that_cannot_be_made_is_found_before_the_work(tmp_path, monkeypatch, resume):
    monkeypatch.setattr(module._Run, "execute", lambda *_: pytest.fail("it was started"))
    (tmp_path / "a.h5.parts").touch()
    if not resume:
        (tmp_path / "a.h5").touch()  # it must survive
    before = sorted(tmp_path.iterdir())
    for output, message in (
        (tmp_path, "is a folder; name a file"),
        (tmp_path / "a.h5", r"a\.h5\.parts is a file"),
        (tmp_path / "a.h5.parts" / "b.h5", r"a\.h5\.parts is a file"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_dataset(output, subsets=["Water clusters"], scale=0.01, resume=resume)
    assert sorted(tmp_path.iterdir()) == before


def test_a_share_on_the_command_line_is_a_subset_and_a_number():
    shares = {"Dissociation": 0.5, "Atom pairs": 0.0}
    assert parse_shares(["Dissociation=0.5", "Atom pairs=0"]) == shares
    with pytest.raises(ConfigError, match=r"--share 'Ions' is not a subset and a number"):
        parse_shares(["Ions"])


def test_a_method_that_breaks_no_bonds_is_not_asked_to(tmp_path, monkeypatch):
    monkeypatch.setattr(labels, "_installed", lambda name: True)
    monkeypatch.setattr(module._Run, "execute", lambda *_: pytest.fail("it was started"))
    with pytest.raises(ConfigError, match="leave out Dissociation, or use the method gfn2"):
        make_dataset(tmp_path / "a.h5", method="wb97m-d3bj", subsets=["Ions", "Dissociation"])
    planned = []
    monkeypatch.setattr(module, "plan_tasks", lambda *options: planned.append(options[2]) or 1 / 0)
    for method in ("gfn2", "wb97m-d3bj"):
        with pytest.raises(ZeroDivisionError):
            make_dataset(tmp_path / "a.h5", method=method)
    assert set(planned[0]) - set(planned[1]) == set(DISSOCIATION)
    assert set(planned[0]) == set(SUBSETS)


def test_importing_the_command_loads_no_chemistry():
    code = (
        "import sys, mlip_md.trainer.generate.command; "
        "assert not {'rdkit', 'tblite', 'pyscf', 'jax', 'h5py'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)


def test_it_imports_the_ground_floor_and_chemistry_only():
    """The generator can be run, moved or replaced without the potentials that learn from it."""
    ground = {"errors", "elements", "constants", "files", "hints", "signals"}
    outside = {"h5py", "numpy", "rdkit", "rich", "tblite", "pyscf", "typer"}
    files = list(Path(module.__file__).parent.glob("*.py"))
    assert len(files) > 5
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in getattr(node, "names", ())]
            if isinstance(node, ast.ImportFrom):
                assert not node.level
                joined = [f"{node.module}.{name}" for name in names]
                names = joined if node.module == "mlip_md" else [node.module or ""]
            elif not isinstance(node, ast.Import):
                continue
            for name in names:
                first, *rest = name.split(".")
                if first == "mlip_md":
                    own = rest[:2] == ["trainer", "generate"]
                    assert own or (rest and rest[0] in ground), f"{file.name} imports {name}"
                else:
                    known = first in sys.stdlib_module_names or first in outside
                    assert known, f"{file.name} imports {name}"


# what is dropped


def test_hard_and_non_finite_structures_are_dropped_and_counted(monkeypatch):
    task = next(t for t in full_plan(0) if t.name == "C#N")
    frames = [Conformation(np.zeros((3, 3)), "md")] * 4
    molecule = build_molecule("C#N", 1, np.random.default_rng(0))
    monkeypatch.setattr(module, "sample_task", lambda task, seed: (molecule, frames))
    strong = np.full((3, 3), 31.0 / 51.422067 / np.sqrt(3))
    answers = iter([(-1.0, 0.96 * strong), (-1.0, strong), (np.nan, 0 * strong), None])

    def label(numbers, positions, charge, unpaired_electrons):
        answer = next(answers)
        if answer is None:
            raise labels.LabelError("the iterations did not converge")
        return labels.Labels(*answer)

    group = module.label_task(task, 0, label)
    assert len(group.conformations) == 1
    assert group.dropped == {"force too large": 1, "not finite": 1, "not converged": 1}


@pytest.mark.parametrize("smiles", ["CCO", "BrBr"])  # with parameters of MMFF94, of UFF only
def test_a_molecule_without_a_conformer_is_counted(monkeypatch, smiles):
    from rdkit.Chem import rdDistGeom

    seen = []
    monkeypatch.setattr(
        rdDistGeom, "EmbedMultipleConfs", lambda *_, **options: seen.append(options) or []
    )
    task = dataclasses.replace(full_plan(0)[0], kind="molecule", smiles=(smiles,))
    group = module.label_task(task, 0, labels.METHODS["gfn2"].label)
    assert group.dropped == {"not embedded": 1}
    assert not group.conformations
    assert [options["useRandomCoords"] for options in seen] == [False, True]


# geometries


@pytest.fixture(scope="module")
def ethanol():
    return build_molecule("CCO", 1, np.random.default_rng(0))


def test_stretch_changes_one_bond_only(ethanol):
    positions = ethanol.conformers[0]
    moved = stretch_bond(ethanol, positions, ethanol.bonds[1], 1.4)
    for bond in ethanol.bonds:
        before, after = (np.linalg.norm(x[bond[0]] - x[bond[1]]) for x in (positions, moved))
        assert after / before == pytest.approx(1.4 if bond == ethanol.bonds[1] else 1.0)


def test_rotation_beyond_a_bond_keeps_bond_lengths(ethanol):
    positions = ethanol.conformers[0]
    axis = np.array([1.0, 2.0, 3.0])
    moved = rotate_beyond(ethanol, positions, ethanol.bonds[0], axis, 0.5)
    lengths = [[np.linalg.norm(x[a] - x[b]) for a, b in ethanol.bonds] for x in (positions, moved)]
    np.testing.assert_allclose(lengths[0], lengths[1])
    assert np.abs(moved - positions).max() > 0.1


@pytest.mark.parametrize("ratio", [0.55, 1.0, 2.4])
def test_contact_has_the_distance_asked_for(ethanol, ratio):
    water = build_molecule("O", 1, np.random.default_rng(1))
    rng = np.random.default_rng(2)
    both = place_in_contact(ethanol, ethanol.conformers[0], water, water.conformers[0], ratio, rng)
    gap = np.linalg.norm(both[:9, None] - both[None, 9:], axis=-1)
    radii = ethanol.radii[:, None] + water.radii[None]
    assert (gap / radii).min() == pytest.approx(ratio, abs=1e-6)


def test_hydrogen_bond_has_the_length_asked_for_and_is_straight():
    water = build_molecule("O", 1, np.random.default_rng(1))
    x = water.conformers[0]
    both = place_in_hydrogen_bond(water, x, water, x, 1.8, np.random.default_rng(0))
    gap = np.linalg.norm(both[:3, None] - both[None, 3:], axis=-1)
    assert gap.min() == pytest.approx(1.8)
    assert np.min([gap[0, 0]]) == pytest.approx(1.8 + 0.97, abs=0.03)
    methane = build_molecule("C", 1, np.random.default_rng(1))
    args = (methane, methane.conformers[0]) * 2
    assert place_in_hydrogen_bond(*args, 1.8, np.random.default_rng(0)) is None


def test_langevin_samples_the_harmonic_distribution():
    def spring(x):
        return 0.5 * 10.0 * float((x**2).sum()), -10.0 * x

    masses, rng = np.full(400, 1.0), np.random.default_rng(0)
    path = run_langevin(spring, masses, np.zeros((400, 3)), 500.0, 800, 20, rng)
    variance = np.mean([np.mean(x**2) for x in list(path)[10:]])
    assert variance == pytest.approx(KB * 500.0 / 10.0, rel=0.04)


def test_water_model_forces_are_the_derivative_of_its_energy():
    water = build_molecule("O", 1, np.random.default_rng(1))
    _, positions = surround([water] * 3, np.random.default_rng(0))
    positions = positions + 0.05 * np.random.default_rng(1).normal(size=positions.shape)
    model = spc_fw_forces(3)
    _, forces = model(positions)
    for atom, axis in [(0, 0), (1, 1), (8, 2)]:
        moved = [positions.copy(), positions.copy()]
        moved[0][atom, axis] += 1e-5
        moved[1][atom, axis] -= 1e-5
        slope = (model(moved[0])[0] - model(moved[1])[0]) / 2e-5
        assert forces[atom, axis] == pytest.approx(-slope, abs=1e-6)


def test_water_clusters_hold_together_and_stay_molecules():
    molecule, frames = sampling.sample_water(5, 1, make_generator(0, "test"), per_start=3)
    assert len(frames) == 3
    for frame in frames:
        bonds = [np.linalg.norm(frame.positions[a] - frame.positions[b]) for a, b in molecule.bonds]
        assert 0.8 < min(bonds) < max(bonds) < 1.3
        oxygens = frame.positions[::3]
        gap = np.linalg.norm(oxygens[:, None] - oxygens[None], axis=-1) + 9 * np.eye(5)
        assert 2.2 < gap.min(1).min() < gap.min(1).max() < 4.5


def test_pressed_molecules_come_closer_than_any_liquid_and_stay_molecules():
    molecule, frames = sampling.sample_pressed(["C"], 6, make_generator(0, "test"), count=4)
    members = np.array([0] * 5 + [1 + k // 3 for k in range(18)])
    between = members[:, None] != members[None]

    def shortest(positions):
        distances = np.linalg.norm(positions[:, None] - positions[None], axis=-1)
        return distances[between].min(), distances[~between & (distances > 0)].min()

    relaxed, *others = frames
    assert relaxed.origin == "quench"
    assert shortest(relaxed.positions)[0] > 1.6
    pressed = [one.positions for one in others if one.origin == "pressed"]
    assert len(pressed) == 4
    assert min(shortest(positions)[0] for positions in pressed) < 1.4
    for positions in pressed:
        lengths = [np.linalg.norm(positions[a] - positions[b]) for a, b in molecule.bonds]
        assert 0.6 < min(lengths) < max(lengths) < 1.6  # rattled by up to 0.08 Å
    eased = [one.positions for one in others if one.origin == "quench"]
    assert len(eased) >= 3


def test_pressed_clusters_are_planned_in_every_split_and_kept_when_hard(monkeypatch):
    tasks = [t for t in full_plan(0) if t.subset == "Pressed clusters"]
    assert {t.split for t in tasks} == set(SPLITS)
    assert {t.num_waters for t in tasks if not t.smiles} == set(range(3, 18))
    frames = [Conformation(np.zeros((3, 3)), "pressed")] * 2
    molecule = build_molecule("O", 1, np.random.default_rng(0))
    monkeypatch.setattr(module, "sample_task", lambda task, seed: (molecule, frames))
    strong = np.full((3, 3), 50.0 / 51.422067 / np.sqrt(3))
    answers = iter([labels.Labels(-1.0, strong), labels.Labels(-1.0, 1.25 * strong)])
    group = module.label_task(tasks[0], 0, lambda *_: next(answers))
    assert len(group.conformations) == 1
    assert group.dropped == {"force too large": 1}


# bonds that break


def test_separate_fragments_are_labeled_one_by_one():
    numbers = np.array([1, 6, 1, 1])
    line = np.array([0.0, 6.1, 1.0, 12.0])[:, None] * np.array([1.0, 0.0, 0.0]) / BOHR
    seen = []

    def label(numbers, positions, charge, unpaired_electrons):
        seen.append((numbers.tolist(), unpaired_electrons))
        return labels.Labels(1.0, positions, np.zeros(len(numbers)))

    found = dissociation.label_fragments(label, numbers, line, 0)
    assert seen == [([1, 1], 0), ([6], 2), ([1], 1)]
    assert found.energy == 3.0
    np.testing.assert_array_equal(found.gradient, line)


@pytest.mark.parametrize(("distance", "usable"), [(2.7, True), (2.9, False), (5.1, True)])
def test_charge_between_fragments_that_are_apart_is_refused(distance, usable):
    def label(numbers, positions, charge, unpaired_electrons):
        charges = np.array([0.2, -0.2]) if len(numbers) == 2 else np.zeros(1)
        return labels.Labels(0.0, 0.0 * positions, charges)

    positions = np.array([[0.0, 0.0, 0.0], [0.0, 0.0, distance / BOHR]])
    if usable:
        dissociation.label_fragments(label, np.array([6, 9]), positions, 0)
    else:
        with pytest.raises(labels.LabelError) as caught:
            dissociation.label_fragments(label, np.array([6, 9]), positions, 0)
        assert caught.value.reason == "charge transfer"


def test_molecules_are_bound_about_as_strongly_as_measured():
    """Against sums of measured bond energies, kcal/mol; the atoms of GFN2-xTB know no spin."""
    measured = {
        "[H][H]": 103.3, "C": 392.5, "N": 276.7, "O": 219.3, "F": 135.2, "Cl": 102.2,
        "N#N": 225.1, "FF": 36.9, "ClCl": 57.2, "P": 227.4, "S": 173.2, "CCl": 371.0,
    }  # fmt: skip
    label = labels.METHODS["gfn2"].label
    atoms = labels.compute_atomic_energies(label)
    for smiles, energy in measured.items():
        molecule = build_molecule(smiles, 1, np.random.default_rng(0))
        bound = -label(molecule.atomic_numbers, molecule.conformers[0] / BOHR, 0, 0).energy
        bound += sum(atoms[int(z)] for z in molecule.atomic_numbers)
        assert 0.9 < bound * HARTREE * 23.0605 / energy < 1.6, smiles


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> Path:
    return make_dataset(
        tmp_path_factory.mktemp("data") / "apart.h5",
        workers=2,
        scale=0.003,
        max_atoms=7,
        subsets=list(DISSOCIATION),
        shares={"Dissociation": 10.0, "Atom pairs": 20.0},
    )


def test_atoms_are_data_and_separated_atoms_are_their_sum(apart):
    found: Counter[str] = Counter()
    with h5py.File(apart) as file:
        for group in file.values():
            subset = group["subset"].asstr()[0]
            found[subset] += 1
            energies, positions = group["formation_energy"][()], group["conformations"][()]
            if subset == "Isolated atoms":
                assert positions.shape == (1, 1, 3)
                assert energies[0] == 0.0
                continue
            gaps = np.linalg.norm(positions[:, :, None] - positions[:, None], axis=-1) * BOHR
            gaps += 99.0 * np.eye(gaps.shape[1])
            exploded = gaps.min((1, 2)) > 5.0
            np.testing.assert_allclose(energies[exploded], 0.0, atol=1e-9)
            np.testing.assert_array_equal(group["dft_total_gradient"][exploded], 0.0)
            if subset == "Dissociation":
                assert exploded.sum() >= 1
                names = list(group["origin"].attrs["names"])
                (relaxed,) = energies[group["origin"][()] == names.index("quench")]
                assert relaxed < -0.05
                assert relaxed < energies.min() + 0.01  # nothing far away lies lower
    assert found["Isolated atoms"] == len(ELEMENTS)
    assert set(found) == set(DISSOCIATION)


def test_labels_of_broken_bonds_are_small_enough_and_derivatives_of_their_energy(apart):
    label = labels.METHODS["gfn2"].label
    checked = 0
    with h5py.File(apart) as file:
        for group in file.values():
            numbers = group["atomic_numbers"][()].astype(int)
            for one in range(0, len(group["conformations"]), 4):
                positions = group["conformations"][one].astype(float)
                stored = group["dft_total_gradient"][one]
                assert np.linalg.norm(stored, axis=-1).max() * labels.FORCE_UNIT < 60.0
                moved = [positions.copy(), positions.copy()]
                moved[0][-1, 0] += 1e-3
                moved[1][-1, 0] -= 1e-3
                high, low = (
                    dissociation.label_fragments(label, numbers, x, 0).energy for x in moved
                )
                slope = (high - low) / 2e-3
                assert stored[-1, 0] == pytest.approx(slope, abs=2e-5, rel=2e-4)
                checked += 1
    assert checked > 20
