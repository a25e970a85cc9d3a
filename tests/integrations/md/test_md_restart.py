"""Continuing a run: exactly, elsewhere, or not at all, and then it says why."""

import json
import resource
import sys

import ase
import ase.io
import mdtraj
import numpy as np
import pytest
from md_cases import ENGINES, settings
from typer.testing import CliRunner

from mlip_md.cli import app
from mlip_md.errors import CheckpointError, ConfigError, OutputError, OwnershipError
from mlip_md.integrations.md import files, report, restart, run
from mlip_md.integrations.md.observers import RunObserver
from mlip_md.integrations.md.run import restart_md, run_md
from mlip_md.integrations.md.settings import SETTINGS, read_settings


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ensemble", ["nve", "nvt", "npt"])
def test_restart_continues_exactly(cluster, crystal, tmp_path, engine, ensemble):
    structure = crystal if ensemble == "npt" else cluster
    # Long enough for the barostat of OpenMM to change the size of its moves before the restart.
    first, total = (433, 800) if (engine, ensemble) == ("openmm", "npt") else (33, 60)
    common = {"engine": engine, "ensemble": ensemble, "pressure": 60_000.0}
    whole = run_md(settings(structure, steps=total, **common), tmp_path / "1")
    half = run_md(settings(structure, steps=first, **common), tmp_path / "2")
    restart_md(half, steps=total - first)
    for name in (files.LOG, files.TRAJECTORY_ASE):
        assert (whole / name).read_text(encoding="utf-8") == (half / name).read_text(
            encoding="utf-8"
        )
    first, second = (
        mdtraj.load(f / files.TRAJECTORIES["dcd"], top=f / files.TOPOLOGY) for f in (whole, half)
    )
    np.testing.assert_array_equal(first.xyz, second.xyz)
    assert json.loads((half / report.SUMMARY).read_text(encoding="utf-8"))["step"] == total


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("velocities", ["draw", "file"])
def test_temperatures_of_a_chain_that_bends_do_not_jump_at_a_restart(tmp_path, engine, velocities):
    """It starts straight, with one momentum more that is free; a run counts them once."""
    atoms = ase.Atoms("C3", [[0, 0, 0], [2.2, 0, 0], [4.4, 0, 0]])
    atoms.set_velocities([[0.01, 0, 0], [-0.02, 0.002, 0], [0.01, 0.03, 0]])
    path = str(tmp_path / "chain.extxyz")
    atoms.write(path)
    common = {"engine": engine, "ensemble": "nve", "velocities": velocities, "report_interval": 5}
    whole = run_md(settings(path, **common), tmp_path / "whole")
    half = run_md(settings(path, **common | {"steps": 17}), tmp_path / "half")
    restart_md(half, steps=23)
    assert (half / files.LOG).read_text() == (whole / files.LOG).read_text()
    log = files.read_log(whole / files.LOG)
    free = 2 * log["kinetic_eV"] / (ase.units.kB * log["temperature_K"])
    np.testing.assert_allclose(free, free[0], rtol=1e-6)


def test_restart_drops_what_was_written_after_the_restart_point(cluster, tmp_path):
    folder = run_md(settings(cluster), tmp_path / "run")
    whole = {name: (folder / name).read_bytes() for name in (files.LOG, files.TRAJECTORY_ASE)}
    saved = (folder / restart.RESTART).read_bytes()
    restart_md(folder, steps=20)
    (folder / restart.RESTART).write_bytes(saved)  # as if the machine had died before saving
    restart_md(folder, steps=20)
    log = files.read_log(folder / files.LOG)
    np.testing.assert_array_equal(log["step"], [0, 10, 20, 30, 40, 50, 60])
    trajectory = mdtraj.load(folder / files.TRAJECTORIES["dcd"], top=folder / files.TOPOLOGY)
    assert trajectory.n_frames == 7
    assert (folder / files.LOG).read_bytes().startswith(whole[files.LOG])
    header = (folder / files.TRAJECTORIES["dcd"]).read_bytes()[8:12]
    assert int.from_bytes(header, "little") == 7


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("ensemble", ["nve", "nvt"])
def test_a_run_that_died_while_it_ended_is_ended(cluster, tmp_path, engine, ensemble):
    """After the restart file of its last step come the last frame, the plot and the summary."""
    told = settings(cluster, engine=engine, ensemble=ensemble, steps=37)
    folder = run_md(told, tmp_path / "run")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, size in restart.read_restart(folder / restart.RESTART)[1]["sizes"].items():
        assert size < len(whole[name])
        (folder / name).write_bytes(whole[name][: size + 5])
    (folder / report.PLOT).unlink()
    (folder / report.SUMMARY).write_text(json.dumps({"status": "interrupted", "step": 20}))
    restart_md(folder)
    for name in (files.LOG, files.TRAJECTORY_ASE, files.TRAJECTORIES["dcd"], report.PLOT):
        assert (folder / name).read_bytes() == whole[name], name
    summary = report.read_summary(folder)
    assert (summary["status"], summary["step"]) == ("finished", 37)
    with pytest.raises(CheckpointError, match="has all its 37 steps"):
        restart_md(folder)


@pytest.mark.parametrize("engine", ENGINES)
def test_interrupted_run_can_go_on(cluster, tmp_path, engine):
    class Interrupt(RunObserver):
        def update(self, frame, steps_per_second):
            if frame.step == 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_md(settings(cluster, engine=engine), tmp_path / "run", progress=Interrupt())
    assert (
        json.loads((tmp_path / "run" / report.SUMMARY).read_text(encoding="utf-8"))["status"]
        == "interrupted"
    )
    restart_md(tmp_path / "run")
    log = files.read_log(tmp_path / "run" / files.LOG)
    np.testing.assert_array_equal(log["step"], [0, 10, 20, 30, 40])


def test_damaged_folders_cannot_go_on(cluster, tmp_path):
    folder = run_md(settings(cluster), tmp_path / "run")
    file = folder / restart.RESTART
    good = file.read_bytes()
    arrays, values = restart.read_restart(file)
    damaged = [good[:-100], good[: len(good) // 2], b"", b"nonsense"]
    for step in ("five", None):
        restart.write_restart(file, arrays, values | {"step": step})
        damaged.append(file.read_bytes())
    restart.write_restart(file, arrays, {})
    damaged.append(file.read_bytes())
    restart.write_restart(file, {}, values)
    damaged.append(file.read_bytes())
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"restart\.npz is damaged"):
            restart_md(folder, steps=10)
    del arrays["momenta"]
    restart.write_restart(file, arrays, values)
    with pytest.raises(CheckpointError, match="momenta"):
        restart_md(folder, steps=10)
    file.write_bytes(good)
    for name in (files.TOPOLOGY, files.TRAJECTORIES["dcd"], SETTINGS):
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"there is no .*{name}"):
            restart_md(folder, steps=10)
        (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="--steps or --length"):
        restart_md(folder)
    with pytest.raises(ConfigError, match="there is no folder"):
        restart_md(tmp_path / "nosuch")
    restart_md(folder, steps=10)


@pytest.mark.parametrize("version", [3, 0, "2", True, None])
def test_runs_of_another_version_are_refused_with_it(cluster, tmp_path, version):
    """Before anything else is looked at, for a newer one may hold anything else."""
    folder = run_md(settings(cluster), tmp_path / "run")
    path, saved = folder / SETTINGS, (folder / SETTINGS).read_text(encoding="utf-8")
    told = rf"is of format version {version!r}, and mlip-md .* reads 1 to 2; upgrade mlip-md"
    path.write_text(json.dumps({"version": version, "future": 1}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=rf"settings\.json {told}"):
        restart_md(folder, steps=10)
    path.write_text(saved, encoding="utf-8")
    np.savez(folder / restart.RESTART, json=np.array(json.dumps({"version": version})))
    with pytest.raises(CheckpointError, match=rf"restart\.npz {told}"):
        restart_md(folder, steps=10)


@pytest.mark.parametrize("ensemble", ["nvt", "npt"])
def test_restart_on_another_platform(crystal, tmp_path, ensemble):
    folder = run_md(settings(crystal, engine="openmm", ensemble=ensemble), tmp_path / "run")
    result = CliRunner().invoke(
        app, ["md", "--restart", str(folder), "--steps", "10", "--platform", "CPU"]
    )
    assert result.exit_code == 0, result.output
    assert "not exactly as it would have" in " ".join(result.output.split())
    assert json.loads((folder / report.SUMMARY).read_text())["platform"] == "CPU"
    assert read_settings(folder).platform == "CPU"
    frames = ase.io.read(folder / files.TRAJECTORY_ASE, ":")
    assert frames[-1].info["step"] == 50
    # 5 fs at the velocities that were saved.
    moved = frames[-1].positions - frames[-2].positions
    expected = frames[-2].get_velocities() * 5.0 * ase.units.fs
    assert np.abs(moved - expected).max() < 0.5 * np.abs(expected).max()
    ase_run = run_md(settings(crystal), tmp_path / "ase")
    with pytest.raises(ConfigError, match="--platform would change nothing"):
        CliRunner().invoke(
            app, ["md", "--restart", str(ase_run), "--platform", "CPU"], catch_exceptions=False
        )


def test_checkpoint_of_another_machine(cluster, tmp_path, caplog):
    folder = run_md(settings(cluster, engine="openmm"), tmp_path / "run")
    arrays, values = restart.read_restart(folder / restart.RESTART)
    arrays["checkpoint"] = np.frombuffer(b"made elsewhere", np.uint8)
    restart.write_restart(folder / restart.RESTART, arrays, values)
    restart_md(folder, steps=10)
    assert "new random numbers" in caplog.text
    frames = ase.io.read(folder / files.TRAJECTORY_ASE, ":")
    assert frames[-1].info["step"] == 50
    # 5 fs at the velocities that were saved, not at others.
    moved = frames[-1].positions - frames[-2].positions
    expected = frames[-2].get_velocities() * 5.0 * ase.units.fs
    assert np.abs(moved - expected).max() < 0.3 * np.abs(expected).max()


def test_a_folder_has_one_run_at_a_time(cluster, tmp_path):
    refused = []

    class Second(RunObserver):
        """Starts another run in the folder of the first, while that one steps."""

        def update(self, frame, steps_per_second):
            if frame.step == 20:
                with pytest.raises(OwnershipError, match="in use by process") as caught:
                    restart_md(tmp_path / "run")
                refused.append(caught.value)

    folder = run_md(settings(cluster), tmp_path / "run", progress=Second())
    assert len(refused) == 1
    restart_md(folder, steps=10, progress=Second())
    assert len(refused) == 1
    log = files.read_log(folder / files.LOG)
    np.testing.assert_array_equal(log["step"], [0, 10, 20, 30, 40, 50])
    assert not list(folder.glob(".owner*"))


def test_two_new_runs_do_not_write_into_one_folder(cluster, tmp_path):
    class Other(RunObserver):
        """Another run takes the folder while the first compiles."""

        def stage(self, text):
            run_md(settings(cluster), tmp_path / "run")

    with pytest.raises(ConfigError, match="not empty"):
        run_md(settings(cluster), tmp_path / "run", progress=Other())
    assert len(files.read_log(tmp_path / "run" / files.LOG)["step"]) == 5


@pytest.mark.parametrize("engine", ENGINES)
def test_the_restart_file_is_there_from_the_start_and_kept_fresh(
    cluster, tmp_path, engine, monkeypatch
):
    """As if the machine died: between two frames, and before the first."""

    class Begins(RunObserver):
        def begin(self, folder, done, total):
            assert len(kept) == 1

    kept = []
    whole = run_md(settings(cluster, engine=engine), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(run, "RESTART_SECONDS", 0.0)
        patch.setattr(restart, "write_restart", lambda path, *state: kept.append(state))
        folder = run_md(settings(cluster, engine=engine), tmp_path / "run", progress=Begins())
    assert [values["step"] for _, values in kept] == [*range(41), 40]
    for point in (0, 17):
        restart.write_restart(folder / restart.RESTART, *kept[point])
        restart_md(folder)
        for name in (files.LOG, files.TRAJECTORY_ASE):
            assert (folder / name).read_text() == (whole / name).read_text(), point
        first, second = (
            mdtraj.load(f / files.TRAJECTORIES["dcd"], top=f / files.TOPOLOGY)
            for f in (whole, folder)
        )
        np.testing.assert_array_equal(first.xyz, second.xyz)


def test_frames_are_on_the_disk_before_the_restart_file_counts_them(cluster, tmp_path, monkeypatch):
    synced, kept = {}, []

    def sync(path):
        synced[path.name] = path.stat().st_size

    def write(path, arrays, values):
        assert all(synced[name] >= size for name, size in values["sizes"].items())
        kept.append(values["sizes"])

    monkeypatch.setattr(files, "sync", sync)
    monkeypatch.setattr(run, "RESTART_SECONDS", 0.0)
    monkeypatch.setattr(restart, "write_restart", write)
    run_md(settings(cluster), tmp_path / "run")
    assert len(kept) == 42
    assert kept[-1].keys() == synced.keys()


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
@pytest.mark.parametrize("trajectory_format", ["dcd", "xtc"])
def test_a_full_disk_is_told_and_tears_no_frame(cluster, tmp_path, trajectory_format):
    """A limit on the size of a file stands for the end of the disk."""
    common = {"trajectory_format": trajectory_format}
    whole = run_md(settings(cluster, **common), tmp_path / "whole")
    folder, before = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (whole / files.TRAJECTORY_ASE).stat().st_size - 100
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OutputError) as caught:
            run_md(settings(cluster, **common), folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert str(folder / files.TRAJECTORY_ASE) in str(caught.value)
    assert f"mlip-md md --restart {folder}" in str(caught.value)
    file = files.TRAJECTORIES[trajectory_format]

    def count():
        frames = ase.io.read(folder / files.TRAJECTORY_ASE, ":")
        trajectory = mdtraj.load(folder / file, top=folder / files.TOPOLOGY)
        return len(frames), trajectory.n_frames, len(files.read_log(folder / files.LOG)["step"])

    assert count() == (4, 4, 4)
    restart_md(folder)
    assert count() == (5, 5, 5)
    for name in (files.LOG, files.TRAJECTORY_ASE):
        assert (folder / name).read_text() == (whole / name).read_text()
