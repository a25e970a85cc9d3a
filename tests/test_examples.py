"""Every example runs, in a tiny setting and with the bundled potential."""

import json
import re
import runpy
from pathlib import Path

import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from model_files import make_potential

from mlip_md.engine import Engine
from mlip_md.formats import own
from mlip_md.trainer.data import load_data
from mlip_md.trainer.lengths import find_unreached
from mlip_md.trainer.recipe import load_recipe

FOLDER = Path(__file__).parents[1] / "examples"

RUNS = {
    "ase_molecule": ("--steps 20", r"C=O distance: 1\.[12]\d\d ± 0\.\d+ Å"),
    "openmm_molecule": ("--steps 20", r"C=O distance: 1\.[12]\d\d ± 0\.\d+ Å"),
    "openmm_restart": ("--steps 15", r"going on at step 15\n.* not stopped: 0 nm"),
    "openmm_torsion": ("--points 3 --iterations 30", r"barrier: (1\d|2\d)\.\d\d kJ/mol"),
    "openmm_lambda": (
        "--states 3 --iterations 4 --steps 3",
        r"changes of state in 4 [^$]*λ = 1.00: dF/dλ = +-\d+\.\d\d kJ/mol",
    ),
    "openmm_mixed": ("--size 1.6 --steps 20", r"22 ML atoms, 340 [^$]*CA-CB distance: 1\.[45]\d\d"),
    "openmm_mixed side-chain": (
        "--part side-chain --size 1.6 --steps 20",
        r"4 ML atoms, 341 particles[^$]*CA-CB distance: 1\.[45]\d\d",
    ),
    "openmm_water": (
        "--size 0.9 --steps 60 --interval 10",
        r"23 waters[^$]*density: (0\.9|1\.0)[^$]*of O-O: \d+\.\d\d at [23]\.\d\d Å",
    ),
}


def test_every_example_is_run():
    tested = {name.split()[0] for name in RUNS} | {"fine_tuning"}
    assert {path.stem for path in FOLDER.glob("*.py")} == tested


@pytest.mark.parametrize("name", RUNS)
def test_example(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # OpenMM's minimizer crashes on the OpenCL of CPUs, whatever the force.
    monkeypatch.setenv("OPENMM_DEFAULT_PLATFORM", "CPU")
    arguments, expected = RUNS[name]
    script = FOLDER / f"{name.split()[0]}.py"
    monkeypatch.setattr("sys.argv", [str(script), *arguments.split()])
    runpy.run_path(str(script), run_name="__main__")
    output = capsys.readouterr().out
    assert re.search(expected, output), output


SHIFT = {1: 2.0, 8: -300.0}
"""eV, by which the energies of the atoms of one method differ from those of the other."""


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A potential, and molecules labelled by it with other energies of the atoms."""
    folder = tmp_path_factory.mktemp("labelled")
    parent = make_potential("mace", num_layers=1, correlation=1)
    own.save(parent, folder / "parent.safetensors")
    engine, generator, frames = Engine(parent), np.random.default_rng(0), []
    water = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]])
    for _ in range(9):
        atoms = Atoms("OHH", water + 0.05 * generator.normal(size=(3, 3)))
        found = engine.evaluate(atoms.positions, atoms.numbers)
        energy = found.energy + sum(SHIFT[z] for z in atoms.numbers)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=found.forces)
        frames.append(atoms)
    ase.io.write(folder / "set.xyz", frames, format="extxyz")
    return folder


@pytest.mark.slow
def test_fine_tuning_against_training_from_scratch(labelled, tmp_path, monkeypatch, capsys):
    """Of data that the parent labelled, nothing is left to learn; its E0 are matched."""
    script, parent = FOLDER / "fine_tuning.py", labelled / "parent.safetensors"
    arguments = f"{labelled / 'set.xyz'} --parent {parent} --count 4 --held 3 --epochs 2"
    arguments += f" --seeds 1 --rates 1 --output {tmp_path / 'out'}"
    monkeypatch.setattr("sys.argv", [str(script), *arguments.split()])
    monkeypatch.setattr("mlip_md.enable_cache", lambda: None)  # of the whole process
    module = runpy.run_path(str(script), run_name="__main__")
    output = capsys.readouterr().out
    assert re.search(r"from scratch at 0.002: \d+\.\d ± 0.0 meV/Å \(test\)\nratio: ", output), (
        output
    )
    results = json.loads((tmp_path / "out" / "fine_tuning.json").read_text())
    (tuned,), (scratch,) = results["fine-tuned"]["0.0005"], results["from scratch"]["0.002"]
    assert len(tuned["validation"]) == len(scratch["validation"]) == 3
    assert tuned["validation"][0] < 1e-4 * scratch["validation"][0]
    assert (tmp_path / "out" / "fine_tuning.png").stat().st_size > 1000
    files = [
        ase.io.read(tmp_path / "out" / f"{name}-0.xyz", ":")
        for name in ("path", "validation", "test")
    ]
    assert [len(frames) for frames in files] == [4, 3, 2]
    assert len({frame.get_potential_energy() for part in files for frame in part}) == 9
    energies = module["matching_energies"](own.load(parent), labelled / "set.xyz")
    hydrogen, carbon, oxygen = own.load(parent).atomic_energies
    found = energies["O"] + 2 * energies["H"] - oxygen - 2 * hydrogen
    assert found == pytest.approx(SHIFT[8] + 2 * SHIFT[1], abs=1e-3)
    assert energies["C"] == carbon
    monkeypatch.setattr("mlip_md.trainer.Trainer.run", None)  # nothing is trained again
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == output


def test_the_best_rate_is_that_of_the_mean_over_seeds():
    best_rate = runpy.run_path(str(FOLDER / "fine_tuning.py"))["best_rate"]
    runs = {0.1: [[5.0, 1.0], [9.0, 9.0]], 0.2: [[4.0, 6.0], [3.0, 5.0]], 0.3: [[4.0], [4.0]]}
    assert best_rate({r: [{"validation": c} for c in curves] for r, curves in runs.items()}) == 0.2


RECIPES = {
    "acac_300K": ("acac", "train_300K", "test_MD_300K", (500, 650)),
    "rmd17_ethanol": ("rmd17", "ethanol_train_01", "ethanol_test_01", (1000, 1000)),
    "rmd17_aspirin": ("rmd17", "aspirin_train_01", "aspirin_test_01", (1000, 1000)),
}


def test_every_recipe_is_read():
    """Every row of them, whatever data are here."""
    paths = sorted(FOLDER.glob("recipes/*.yaml"))
    assert {path.stem for path in paths} == set(RECIPES)
    for path in paths:
        recipe, _ = load_recipe(str(path))
        assert recipe.data.path
        assert find_unreached(recipe, 100) == []


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(name, reference_data):
    folder, train, test, (count, tested) = RECIPES[name]
    place = reference_data / "data" / folder
    files = {"path": place / f"{train}.xyz.gz", "test": place / f"{test}.xyz.gz"}
    sets = [f"data.{row}={file}" for row, file in files.items()]
    recipe, _ = load_recipe(str(FOLDER / "recipes" / f"{name}.yaml"), sets)
    data = load_data(recipe)
    assert len(data.train) + len(data.validation) == count
    assert len(data.validation) == pytest.approx(0.05 * count, abs=1)
    assert data.test is not None
    assert len(data.test) == tested
    assert find_unreached(recipe, len(data.plan(recipe.seed, 1))) == []
