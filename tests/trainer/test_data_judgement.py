"""Labels are judged by physics: classic mistakes are named, right ones are not accused."""

import dataclasses
import json

import ase
import ase.io
import numpy as np
import pytest
from ase.build import add_adsorbate, bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from training_cases import small_recipe
from typer.testing import CliRunner

from mlip_md.cli import app
from mlip_md.constants import BOHR, HARTREE, KJ_PER_KCAL, KJ_PER_MOL_PER_EV
from mlip_md.errors import DataError
from mlip_md.trainer.data import LabeledStructure, open_prepared, prepare
from mlip_md.trainer.data.judgement import BLOCK, MAX_BLOCKS, Sample, judge
from mlip_md.trainer.recipe import DataConfig

E0 = {1: -13.6, 6: -1030.5, 8: -2043.9}


def springs(name, count, seed=0, width=0.035):
    """A molecule of springs in thermal motion: bonds of 33 eV/Å², angles by 1-3 distances."""
    atoms = molecule(name)
    start = atoms.get_all_distances()
    i, j = np.triu_indices(len(atoms), 1)
    kinds = np.digitize(start[i, j], [1.6, 2.6])  # bonds, angles, the rest
    stiffness = np.array([33.0, 6.0, 0.3])[kinds]
    random = np.random.default_rng(seed)
    for k in range(count):
        positions = atoms.positions + random.normal(scale=width, size=(len(atoms), 3))
        vectors = positions[j] - positions[i]
        lengths = np.linalg.norm(vectors, axis=1)
        stretch = lengths - start[i, j]
        energy = 0.5 * float(stiffness @ stretch**2) + sum(E0[z] for z in atoms.numbers)
        pull = (stiffness * stretch / lengths)[:, None] * vectors
        forces = np.zeros_like(positions)
        np.add.at(forces, i, pull)
        np.add.at(forces, j, -pull)
        yield {
            "atomic_numbers": atoms.numbers, "positions": positions, "energy": energy,
            "forces": forces, "name": f"{name}[{k}]",
        }  # fmt: skip


def scaled(positions=1.0, energy=1.0, forces=1.0):
    def change(frames):
        factors = {"positions": positions, "energy": energy, "forces": forces}
        return [f | {name: f[name] * factor for name, factor in factors.items()} for f in frames]

    return change


def constant(frames):
    return [frame | {"energy": 0.0} for frame in frames]


def of_the_next(frames):
    following = [*frames[1:], frames[0]]
    pairs = zip(frames, following, strict=True)
    return [a | {"forces": b["forces"]} for a, b in pairs if len(a["forces"]) == len(b["forces"])]


def outlier(frames):
    return [f | {"energy": f["energy"] + 50.0 * (k == 7)} for k, f in enumerate(frames)]


def two_methods(frames):
    half = len(frames) // 2
    return [f | {"energy": f["energy"] + 10.0 * (k < half)} for k, f in enumerate(frames)]


def per_atom(frames):
    return [f | {"energy": f["energy"] / len(f["forces"])} for f in frames]


KCAL = KJ_PER_MOL_PER_EV / KJ_PER_KCAL
MISTAKES = {
    "hartree": (
        scaled(energy=1 / HARTREE, forces=BOHR / HARTREE),
        "energies in hartree and forces in hartree/bohr",
    ),
    "kcal/mol": (scaled(energy=KCAL, forces=KCAL), "in kcal/mol and forces in kcal/mol/Å"),
    "kJ/mol": (
        scaled(energy=KJ_PER_MOL_PER_EV, forces=KJ_PER_MOL_PER_EV),
        "energies in kJ/mol and forces in kJ/mol/Å",
    ),
    "flipped sign": (scaled(forces=-1.0), "gradients with the sign of the energy"),
    "bohr": (scaled(positions=1 / BOHR), "positions in bohr"),
    "nm": (scaled(positions=0.1), "positions in nm"),
    "pm": (scaled(positions=100.0), "positions in pm"),
    "forces in hartree/bohr": (scaled(forces=BOHR / HARTREE), "forces in hartree/bohr?"),
    "energies in hartree": (scaled(energy=1 / HARTREE), "energies in hartree"),
    "forces of zero": (scaled(forces=0.0), "exactly zero"),
    "one energy": (constant, "have one energy"),
    "energy per atom": (per_atom, "energies in eV per atom"),
    "forces of the next frame": (of_the_next, "forces do not belong to these positions"),
    "an outlier": (outlier, "lie far from those .*[7] (+"),
    "two methods": (two_methods, "two clouds about 10 eV"),
}


def labeled(frames):
    return [LabeledStructure(**frame) for frame in frames]


def said(frames):
    return " ".join(finding.text for finding in judge(labeled(frames)))


SETS = {
    "one molecule": list(springs("CH3CH2OH", 200)),
    "molecules": [f for k, name in enumerate(("CH3OH", "C2H6", "CH3CHO", "H2CO", "CH3OCH3"))
                  for f in springs(name, 40, seed=k)],
}  # fmt: skip


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name, kind):
    change, words = MISTAKES[name]
    text = said(change(SETS[kind]))
    for part in words.split(" .*"):
        assert part in text


@pytest.mark.parametrize("kind", SETS)
def test_right_labels_are_not_accused(kind):
    assert judge(labeled(SETS[kind])) == []


def emt(atoms, random):
    atoms.positions += random.normal(0, 0.06, atoms.positions.shape)
    atoms.calc = EMT()
    cell = {"cell": atoms.cell.array, "pbc": atoms.pbc} if atoms.pbc.any() else {}
    return LabeledStructure(
        atoms.numbers, atoms.positions, atoms.get_potential_energy(), atoms.get_forces(), **cell
    )


def metals(random):
    for _ in range(40):
        surface = fcc111("Pt", (2, 2, 3), vacuum=8, periodic=True)
        add_adsorbate(surface, "H", 0.95, "fcc")
        yield emt(surface, random)
        yield emt(bulk("Cu", "fcc", a=3.6, cubic=True), random)
        yield emt(ase.Atoms("Cu3", [[0, 0, 0], [2.5, 0, 0], [1.25, 2.2, 0]]), random)


def test_metals_surfaces_and_clusters_are_not_accused_and_their_mistakes_are_named():
    right = list(metals(np.random.default_rng(0)))
    assert judge(right) == []
    flipped = [dataclasses.replace(frame, forces=-frame.forces) for frame in right]
    assert [finding.cause for finding in judge(flipped)] == ["sign of forces"]
    hartree = [dataclasses.replace(frame, energy=frame.energy / HARTREE) for frame in right]
    assert "energies in hartree" in " ".join(finding.text for finding in judge(hartree))
    volumes = [dataclasses.replace(f, cell=f.cell * (1 + 0.01 * k), forces=0 * f.forces)
               for k, f in enumerate([bulk_of_one()] * 20)]  # fmt: skip
    assert judge(volumes) == []  # zero by symmetry


def bulk_of_one():
    atoms = bulk("Cu")
    return LabeledStructure([29], atoms.positions, -3.0, np.zeros((1, 3)), cell=atoms.cell.array,
                            pbc=[True] * 3)  # fmt: skip


def test_broken_bonds_and_atoms_apart_are_no_outliers():
    frames = SETS["one molecule"]
    far = dict(frames[0])
    far["positions"] = far["positions"] + 10.0 * np.arange(9)[:, None]
    far["energy"], far["forces"] = far["energy"] + 33.0, np.zeros((9, 3))
    assert said([*frames, far]) == ""


def test_odd_sets_are_judged_without_a_fall():
    one = SETS["one molecule"][:1]
    assert judge([]) == []
    assert judge(labeled(one)) == []
    assert judge(labeled(SETS["one molecule"][:3])) == []
    argon = [LabeledStructure([18, 18], np.eye(3)[:2] * (3.7 + 0.1 * k), 0.01 * k, np.eye(3)[:2])
             for k in range(40)]  # fmt: skip
    assert judge(argon[:5]) == []


def test_a_sample_is_bounded_and_holds_whole_runs():
    frame = labeled(SETS["one molecule"][:1])[0]
    count = BLOCK * (MAX_BLOCKS + 60)
    sample, again = Sample(), Sample()
    frames = [dataclasses.replace(frame, name=str(k)) for k in range(BLOCK * 3 + 5)]
    assert list(sample.watch(frames)) == frames
    assert sample.frames() == frames  # a small set whole
    many = (frames[k % len(frames)] for k in range(count))
    for _ in again.watch(many):
        pass
    assert len(again.frames()) == BLOCK * MAX_BLOCKS


def write(path, frames):
    result = []
    for frame in frames:
        atoms = ase.Atoms(frame["atomic_numbers"], frame["positions"])
        atoms.calc = SinglePointCalculator(atoms, energy=frame["energy"], forces=frame["forces"])
        result.append(atoms)
    ase.io.write(path, result, format="extxyz")


def config(path, **rows):
    rows = {"path": str(path), "cutoff": 4.0, "split": {"by": "structure"}, "curate": None, **rows}
    return DataConfig.model_validate(rows)


@pytest.mark.parametrize("curate", [None, {}], ids=["unfiltered", "filtered"])
@pytest.mark.parametrize("name", ["nm", "pm", "bohr"])
def test_what_leaves_no_structure_is_still_named(name, curate, tmp_path, caplog):
    change, words = MISTAKES[name]
    write(tmp_path / "a.xyz", change(SETS["one molecule"]))
    said = ""
    try:
        prepare(config(tmp_path / "a.xyz", curate=curate))
    except DataError as error:
        said = str(error)
    assert words in said + caplog.text


def test_commands_warn_and_stop_if_told_to(tmp_path):
    write(tmp_path / "a.xyz", MISTAKES["flipped sign"][0](SETS["one molecule"]))
    recipe = tmp_path / "train.yaml"
    values = small_recipe(tmp_path / "a.xyz").plain()
    values["data"] |= {"max_n_node": None, "max_n_edge": None, "split": {"by": "structure"}}
    recipe.write_text(json.dumps(values))
    folder = tmp_path / "prepared"
    result = CliRunner().invoke(app, ["prepare", str(recipe), str(folder)])
    assert result.exit_code == 0
    assert "Warning: forces push bonds apart that are too long" in result.stderr
    assert "energies beyond E0, eV/atom: " in result.stdout
    assert open_prepared(folder).findings[0].cause == "sign of forces"
    for command in (["check"], ["train", "--run", str(tmp_path / "run")]):
        for path in (tmp_path / "a.xyz", folder):
            given = [command[0], str(recipe), "--set", f"data.path={path}", "--strict"]
            error = CliRunner().invoke(app, [*given, *command[1:]]).exception
            assert isinstance(error, DataError), error
            assert "--strict: " in str(error)
    assert not (tmp_path / "run" / "log.txt").exists()
