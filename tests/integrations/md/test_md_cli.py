"""The commands ``md`` and ``minimize``: what they print, refuse and write."""

import json
import re
import signal
import sys
from pathlib import Path

import ase.io
import numpy as np
import pytest
from md_cases import ENGINES, set_engine, settings
from pair_engine import PairEngine
from typer.testing import CliRunner

from mlip_md import cli
from mlip_md.cli import app
from mlip_md.errors import ConfigError
from mlip_md.integrations.md import files, report, restart
from mlip_md.integrations.md.backends.interface import Frame
from mlip_md.integrations.md.observers import TerminalObserver
from mlip_md.integrations.md.run import restart_md, run_md
from mlip_md.integrations.md.settings import MDSettings


def test_command_line(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runner = CliRunner()
    short = ["--steps", "20", "--report-interval", "10", "--no-minimize"]
    result = runner.invoke(app, ["md", cluster, *short], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "md-cluster-1" in result.output
    speeds = r"[\d.]+ steps/s  [\d.e-]+ ns/day"
    line = r"step {0}/20 +{1}%  0\.0{2} ps +\d+ K  " + speeds + r"  \d:\d\d:\d\d left\n"
    assert re.search(line.format(20, 100, "10"), result.output)
    assert re.search(line.format(10, 50, "05"), result.output)
    result = runner.invoke(app, ["md", "--restart", "md-cluster-1", "--length", "0.01"])
    assert result.exit_code == 0, result.output
    assert files.read_log(tmp_path / "md-cluster-1" / files.LOG)["step"][-1] == 40
    with pytest.raises(ConfigError, match="--temperature"):
        runner.invoke(app, ["md", "--restart", "md-cluster-1", "-T", "10"], catch_exceptions=False)
    with pytest.raises(ConfigError, match="--length and --steps"):
        runner.invoke(app, ["md", "--length", "1", "--steps", "1"], catch_exceptions=False)
    result = runner.invoke(app, ["minimize", cluster, "--fmax", "0.05"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    relaxed = ase.io.read("cluster-minimized.extxyz")
    assert np.linalg.norm(relaxed.get_forces(), axis=1).max() < 0.05
    with pytest.raises(ConfigError, match="exists"):
        runner.invoke(app, ["minimize", cluster], catch_exceptions=False)


@pytest.mark.parametrize(
    ("speed", "text"),
    [
        (0.0, "0"),
        (0.01234, "0.0123"),
        (9.876, "9.88"),
        (123.4, "123"),
        (999.4, "999"),
        (1234.5, "1234"),
        (1.2e6, "1200000"),
    ],
)
def test_speeds_are_written_without_exponents(capsys, speed, text):
    nothing = np.zeros((1, 3))
    cell = np.zeros((3, 3))
    frame = Frame(1, 0.0005, nothing, nothing, cell, 0.0, 0.0, None, 300.0, None, nothing)
    with TerminalObserver(MDSettings(), "one atom") as observer:
        observer.begin(Path("folder"), 0, 1)
        observer.update(frame, speed)
    assert f" {text} steps/s " in capsys.readouterr().out


def test_options_that_do_nothing_are_refused(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, text in (
        (["--ensemble", "nve", "--friction", "5"], "--friction"),
        (["--ensemble", "npt", "--friction", "5"], "--friction"),
        (["--pressure", "3"], "--pressure"),
        (["--platform", "CPU"], "--platform"),
        (
            ["--device", "tpu"],
            r"^--device: there is no device 'tpu'; JAX sees .*\d\. Write --device cpu",
        ),
        (["--engine", "openmm", "--platform", "Cpu"], r"did you mean CPU\?"),
        (["--length", "inf"], "--length inf"),
        (["--length", "nan"], "--length nan"),
        (["--length", "-1"], "--length -1"),
        (["--length", "1", "--timestep", "nan"], "--timestep nan"),
    ):
        with pytest.raises(ConfigError, match=text):
            CliRunner().invoke(app, ["md", cluster, *options], catch_exceptions=False)
    for options, text in (
        (["--engine", "openm"], "did you mean openmm?"),
        (["--ensemble", "NVT"], "did you mean nvt?"),
        (["--steps", "0"], "--steps"),
        (["--report-interval", "0"], "--report-interval"),
        (["--seed", "-1"], "--seed"),
    ):
        result = CliRunner().invoke(app, ["md", cluster, *options])
        assert result.exit_code == 2
        assert text in " ".join(result.output.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_minimize_looks_at_its_options_first(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def never(*_, **__):
        raise AssertionError("a calculator was made")

    monkeypatch.setattr("mlip_md.integrations.ase.MLIPCalculator", never)
    for options, text in (
        (["-o", "out.foo"], "out.foo"),
        (["-o", "nodir/out.xyz"], "no folder nodir"),
        (["-o", "."], "exists"),
        (["--fmax", "-1"], "--fmax"),
        (["--fmax", "nan"], "--fmax"),
    ):
        with pytest.raises(ConfigError, match=text):
            CliRunner().invoke(app, ["minimize", cluster, *options], catch_exceptions=False)
    assert CliRunner().invoke(app, ["minimize", cluster, "--steps", "-3"]).exit_code == 2


def test_minimize_relaxes_the_cell(crystal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        app, ["minimize", crystal, "--relax-cell", "-o", "out.extxyz"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert np.abs(ase.io.read("out.extxyz").get_stress()).max() < 1e-3


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("presses", [1, 2])
@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_ends_the_step(
    cluster, tmp_path, engine, presses, monkeypatch, capfd, interruptible
):
    class Pressed(PairEngine):
        def evaluate(self, *structure):
            if self.calls == 17:
                for _ in range(presses):
                    signal.raise_signal(signal.SIGINT)
            return super().evaluate(*structure)

    whole = run_md(settings(cluster, engine=engine, platform=None), tmp_path / "whole")
    set_engine(monkeypatch, Pressed)
    options = ["--engine", engine, "--steps", "40", "--report-interval", "10", "--no-minimize"]
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["mlip-md", "md", cluster, *options, "-o", str(folder)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    told = capfd.readouterr().err
    assert told.count("Stopping after this step") == told.count("Interrupted") == 1
    assert f"mlip-md md --restart {folder}" in told.replace("\n", "")
    step = restart.read_restart(folder / restart.RESTART)[1]["step"]
    assert (10 < step < 20) if presses == 1 else step == 10
    assert files.read_log(folder / files.LOG)["step"][-1] == step
    assert json.loads((folder / report.SUMMARY).read_text())["status"] == "interrupted"
    set_engine(monkeypatch, PairEngine)
    restart_md(folder)
    assert (folder / files.LOG).read_text() == (whole / files.LOG).read_text()


class Pressing:
    """Ctrl-C comes while something is cleared away, where Python prints and drops it."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_before_the_run_is_not_swallowed(
    cluster, tmp_path, engine, monkeypatch, interruptible
):
    class Made(PairEngine):
        def __init__(self, *arguments, **options):
            Pressing()
            super().__init__(*arguments, **options)

    set_engine(monkeypatch, Made)
    options = ["--engine", engine, "--steps", "40", "-o", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["mlip-md", "md", cluster, *options])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(("name", "status"), [("SIGTERM", "terminated"), ("SIGHUP", "hangup")])
@pytest.mark.parametrize("engine", ENGINES)
def test_signals_of_the_system_save_the_run(
    cluster, tmp_path, engine, name, status, monkeypatch, capfd, interruptible
):
    class Ended(PairEngine):
        def evaluate(self, *structure):
            if self.calls == 17:
                for _ in range(2):  # shell and system may both send one
                    signal.raise_signal(signal.Signals[name])
            return super().evaluate(*structure)

    whole = run_md(settings(cluster, engine=engine, platform=None), tmp_path / "whole")
    set_engine(monkeypatch, Ended)
    options = ["--engine", engine, "--steps", "40", "--report-interval", "10", "--no-minimize"]
    folder = tmp_path / "run"
    monkeypatch.setattr(sys, "argv", ["mlip-md", "md", cluster, *options, "-o", str(folder)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 75
    told = capfd.readouterr().err.replace("\n", "")
    assert told.count("Stopping after this step") == told.count(name) == 1
    assert f"mlip-md md --restart {folder}" in told
    assert 10 < restart.read_restart(folder / restart.RESTART)[1]["step"] < 20
    assert json.loads((folder / report.SUMMARY).read_text())["status"] == status
    set_engine(monkeypatch, PairEngine)
    restart_md(folder)
    assert (folder / files.LOG).read_text() == (whole / files.LOG).read_text()
