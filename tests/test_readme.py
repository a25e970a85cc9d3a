"""What the README tells newcomers to type works."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ase.build import molecule

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
PROGRAMS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_is_an_example_for_each_host():
    assert [("ase" in p, "openmm" in p) for p in PROGRAMS] == [(True, False), (False, True)]


@pytest.mark.parametrize("program", PROGRAMS, ids=["ase", "openmm"])
def test_python_examples_run_as_they_are(program, tmp_path):
    molecule("CH3CH2OH").write(tmp_path / "molecule.pdb")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning:mlip_md", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    if "print" in program:
        energy, temperature = map(float, done.stdout.split())
        assert energy < -100.0  # eV, reference energies included
        assert 20.0 < temperature < 2000.0


def test_every_command_it_names_exists():
    from typer.testing import CliRunner

    from mlip_md.cli import app

    commands = set(re.findall(r"^mlip-md ([a-z-]+)", README, re.MULTILINE))
    assert {"md", "train", "make-dataset", "evaluate", "show", "convert", "minimize"} <= commands
    for command in commands:
        result = CliRunner().invoke(app, [command, "--help"])
        assert result.exit_code == 0, (command, result.output)


def test_options_it_names_exist():
    from typer.testing import CliRunner

    from mlip_md.cli import app

    for line in re.findall(r"^mlip-md (.*)$", README, re.MULTILINE):
        command, *words = line.split("#")[0].split()
        text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200"}).output
        for option in (w for w in words if w.startswith("--")):
            assert option in text, (command, option)
