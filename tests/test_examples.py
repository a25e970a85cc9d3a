"""Every example runs, in a tiny setting and with the bundled potential."""

import re
import runpy
from pathlib import Path

import pytest

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
    assert {path.stem for path in FOLDER.glob("*.py")} == {name.split()[0] for name in RUNS}


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
