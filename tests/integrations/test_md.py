"""Molecular dynamics runs: what is integrated, what is left behind, what happens when it fails."""

import dataclasses
import json
import re
import signal
import sys

import ase.io
import jax
import mdtraj
import numpy as np
import openmm
import pytest
from ase import Atoms
from ase.build import bulk
from pair_engine import PairEngine
from small_models import random_mace
from typer.testing import CliRunner

import mlip_md
from mlip_md import cli
from mlip_md.cli import app
from mlip_md.errors import (
    CheckpointError,
    ConfigError,
    SimulationError,
    StructureError,
    UnsupportedElementError,
)
from mlip_md.integrations.md import cli as md_cli
from mlip_md.integrations.md import report
from mlip_md.integrations.md import run as md
from mlip_md.integrations.md.run import MDSettings, restart_md, run_md

ENGINES = ["ase", "openmm"]


@pytest.fixture(scope="module")
def potential():
    return random_mace()


@pytest.fixture(autouse=True)
def pair_engine(monkeypatch, potential):
    monkeypatch.setattr(mlip_md, "load", lambda name: potential)
    monkeypatch.setattr(PairEngine, "device", jax.devices()[0], raising=False)
    for module in ("ase", "openmm_force"):
        monkeypatch.setattr(f"mlip_md.integrations.{module}.Engine", PairEngine)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """27 carbon atoms near the minimum of the pair potential."""
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3)
    path = tmp_path_factory.mktemp("structures") / "cluster.xyz"
    Atoms("C27", positions=grid * 2.2).write(path)
    return str(path)


@pytest.fixture(scope="module")
def crystal(tmp_path_factory):
    """A face-centred cubic crystal of 32 carbon atoms near zero pressure."""
    path = tmp_path_factory.mktemp("structures") / "crystal.extxyz"
    atoms = bulk("C", "fcc", a=2.95, cubic=True).repeat(2)
    atoms.write(path)
    return str(path)


def settings(structure, **changes):
    common = {"steps": 40, "report_interval": 10, "minimize": False, "platform": "Reference"}
    return MDSettings(structure=structure, **(common | changes))


@pytest.mark.parametrize("engine", ENGINES)
def test_folder_opens_in_mdtraj_and_ase(cluster, tmp_path, engine):
    folder = run_md(settings(cluster, engine=engine), tmp_path / "run")
    trajectory = mdtraj.load(folder / report.TRAJECTORY, top=folder / report.TOPOLOGY)
    frames = ase.io.read(folder / report.TRAJECTORY_ASE, ":")
    log = report.read_log(folder / report.LOG)
    assert trajectory.n_frames == len(frames) == len(log["step"]) == 5
    np.testing.assert_allclose(trajectory.xyz[-1] * 10, frames[-1].positions, atol=1e-4)
    assert np.ptp(trajectory.xyz, axis=0).max() > 1e-4
    np.testing.assert_array_equal(log["step"], [0, 10, 20, 30, 40])
    np.testing.assert_allclose(log["time_ps"][-1], 0.02)
    # The log, the ASE frames and the velocities tell the same kinetic energy.
    np.testing.assert_allclose(
        [f.get_kinetic_energy() for f in frames], log["kinetic_eV"], rtol=1e-4
    )
    energy = PairEngine(None).evaluate(frames[-1].positions, frames[-1].numbers).energy
    np.testing.assert_allclose(log["potential_eV"][-1], energy, atol=1e-5)
    summary = json.loads((folder / report.SUMMARY).read_text(encoding="utf-8"))
    assert summary["status"] == "finished"
    assert summary["step"] == 40
    assert summary["ns_per_day"] > 0
    assert (folder / report.PLOT).stat().st_size > 10_000


@pytest.mark.parametrize("engine", ENGINES)
def test_nve_conserves_energy(cluster, tmp_path, engine):
    folder = run_md(
        settings(cluster, engine=engine, ensemble="nve", steps=400, timestep=1.0), tmp_path / "run"
    )
    log = report.read_log(folder / report.LOG)
    assert np.ptp(log["kinetic_eV"]) > 0.1  # energy flows...
    assert np.ptp(log["conserved_eV"]) < 0.01 * np.ptp(log["kinetic_eV"])  # ...and is kept
    np.testing.assert_allclose(log["temperature_K"][0], 300.0, rtol=0.02)
    free = 3 * 27 - 6  # momentum and angular momentum are zero and stay so
    temperatures = 2 * log["kinetic_eV"] / (free * ase.units.kB)
    np.testing.assert_allclose(log["temperature_K"], temperatures, rtol=1e-6)
    frames = ase.io.read(folder / report.TRAJECTORY_ASE, ":")
    momentum = frames[-1].get_momenta()
    assert np.abs(momentum.sum(axis=0)).max() < 1e-3 * np.abs(momentum).max()


@pytest.mark.parametrize("engine", ENGINES)
def test_nvt_reaches_the_temperature(cluster, tmp_path, engine):
    folder = run_md(
        settings(cluster, engine=engine, steps=1500, timestep=4.0, temperature=150.0),
        tmp_path / "run",
    )
    log = report.read_log(folder / report.LOG)
    # 81 momenta, correlated over about 0.1 ps: the mean of 5 ps is known to about 2 %.
    assert abs(log["temperature_K"][25:].mean() - 150.0) < 12.0
    assert np.isnan(log["conserved_eV"]).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_npt_relaxes_the_volume(crystal, tmp_path, engine):
    atoms = ase.io.read(crystal)
    pressure = 60_000.0
    folder = run_md(
        settings(crystal, engine=engine, ensemble="npt", steps=1000, timestep=2.0,
                 pressure=pressure, temperature=100.0),
        tmp_path / "run",
    )  # fmt: skip
    log = report.read_log(folder / report.LOG)
    half = len(log["step"]) // 2
    # A static compression curve says which volume belongs to this pressure.
    scales = np.linspace(0.94, 1.02, 33)
    pressures = []
    for scale in scales:
        box = atoms.copy()
        box.set_cell(atoms.cell * scale, scale_atoms=True)
        stress = PairEngine(None).evaluate(box.positions, box.numbers, box.cell.array, True).stress
        pressures.append(-np.trace(stress) / 3 / report.BAR)
    scale = np.interp(-pressure, -np.array(pressures), scales)
    expected = atoms.get_volume() * scale**3
    assert abs(log["volume_A3"][half:].mean() / expected - 1) < 0.02
    assert abs(atoms.get_volume() / expected - 1) > 0.03
    assert abs(log["pressure_bar"][half:].mean() - pressure) < 0.3 * pressure
    trajectory = mdtraj.load(folder / report.TRAJECTORY, top=folder / report.TOPOLOGY)
    np.testing.assert_allclose(
        trajectory.unitcell_volumes[-1] * 1e3, log["volume_A3"][-1], rtol=1e-5
    )
    if engine == "ase":
        assert np.ptp(log["conserved_eV"]) < 0.02 * np.ptp(log["potential_eV"])


@pytest.mark.parametrize("steps", [3, 10, 25])
@pytest.mark.parametrize("trajectory_format", ["dcd", "xtc"])
def test_the_last_step_is_always_a_frame(crystal, tmp_path, steps, trajectory_format):
    folder = run_md(
        settings(crystal, steps=steps, trajectory_format=trajectory_format), tmp_path / "run"
    )
    wanted = sorted({*range(0, steps + 1, 10), steps})
    file = folder / report.trajectory_name(trajectory_format)
    for more in (0, 18):
        if more:
            restart_md(folder, steps=more)  # and then it is none any more
            wanted = sorted({*range(0, steps + more + 1, 10), steps + more})
        log = report.read_log(folder / report.LOG)
        frames = ase.io.read(folder / report.TRAJECTORY_ASE, ":")
        trajectory = mdtraj.load(file, top=folder / report.TOPOLOGY)
        np.testing.assert_array_equal(log["step"], wanted)
        assert [f.info["step"] for f in frames] == wanted
        np.testing.assert_allclose(
            trajectory.xyz * 10, [f.positions for f in frames], atol=0.0051, rtol=0
        )
        np.testing.assert_allclose(trajectory.unitcell_lengths, 0.59, atol=1e-5)
        if trajectory_format == "xtc":
            np.testing.assert_allclose(trajectory.time, log["time_ps"], atol=1e-6)
        assert (folder / report.PLOT).stat().st_size > 10_000


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
    for name in (report.LOG, report.TRAJECTORY_ASE):
        assert (whole / name).read_text(encoding="utf-8") == (half / name).read_text(
            encoding="utf-8"
        )
    first, second = (
        mdtraj.load(f / report.TRAJECTORY, top=f / report.TOPOLOGY) for f in (whole, half)
    )
    np.testing.assert_array_equal(first.xyz, second.xyz)
    assert json.loads((half / report.SUMMARY).read_text(encoding="utf-8"))["step"] == total


def test_volume_moves_of_an_ideal_gas():
    """<V> = (N + 1) kT / P for N molecules without forces, var V = (N + 1) (kT / P)²."""
    from mlip_md.integrations.md.backends.openmm import VolumeMoves

    system = openmm.System()
    for _ in range(8):
        system.addParticle(1.0)
    system.setDefaultPeriodicBoxVectors([2, 0, 0], [0.3, 2, 0], [0, 0.4, 2])
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, 0.5, 1e6)  # a molecule that does not change its shape
    bond.setUsesPeriodicBoundaryConditions(True)
    system.addForce(bond)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    positions = np.random.default_rng(2).uniform(0, 2, (8, 3))
    positions[1] = positions[0] + [0.5, 0, 0]
    context.setPositions(positions)
    labels = np.array([3, 3, 9, 1, 5, 7, 8, 8])
    moves = VolumeMoves(context, labels, pressure=30.0, temperature=300.0, seed=1)
    volumes = []
    for _ in range(8000):
        moves.attempt()
        volumes.append(context.getState().getPeriodicBoxVolume()._value)
    unit_volume = 8.314462618e-3 * 300.0 / (30.0 * 0.0602214076)  # kT / P in nm³
    assert moves.scale > 0.2
    assert abs(np.mean(volumes[500:]) / (7 * unit_volume) - 1) < 0.05
    assert abs(np.std(volumes[500:]) / (7**0.5 * unit_volume) - 1) < 0.12
    state = context.getState(positions=True, energy=True)
    assert state.getPotentialEnergy()._value < 1e-10
    end = state.getPositions(asNumpy=True)._value
    np.testing.assert_allclose(end[7] - end[6], positions[7] - positions[6], atol=1e-9)


def test_molecules_cut_by_the_boundary_are_made_whole():
    from ase.build import molecule

    from mlip_md.integrations.md.structures import bonds, molecules, whole_molecules

    one = molecule("CH3CH2OH")
    rng = np.random.default_rng(0)
    cell = np.array([[9.0, 0, 0], [2.0, 8.0, 0], [-1.0, 1.5, 7.0]])
    atoms = one.copy()
    atoms.translate([0.2, 0.1, 6.9])
    other = one.copy()
    other.translate([4.0, 4.0, 3.0])
    atoms += other
    atoms.set_cell(cell)
    atoms.pbc = True
    atoms.positions += rng.integers(-2, 3, (18, 3)) @ cell
    positions, labels = whole_molecules(atoms)
    assert sorted(np.bincount(labels)) == [9, 9]
    cells = (positions - atoms.positions) @ np.linalg.inv(cell)
    np.testing.assert_allclose(cells, cells.round(), atol=1e-9)
    for start in (0, 9):
        np.testing.assert_allclose(
            Atoms("H9", positions[start : start + 9]).get_all_distances(),
            one.get_all_distances(),
            atol=1e-9,
        )
    diamond = bulk("C", "diamond", a=3.57)
    positions, labels = whole_molecules(diamond)  # two atoms, bonded to their own images
    np.testing.assert_array_equal(positions, diamond.positions)
    assert len(set(labels)) == 2
    assert set(molecules(2, bonds(diamond))) == {0}


def test_restart_drops_what_was_written_after_the_restart_point(cluster, tmp_path):
    folder = run_md(settings(cluster), tmp_path / "run")
    whole = {name: (folder / name).read_bytes() for name in (report.LOG, report.TRAJECTORY_ASE)}
    saved = (folder / report.RESTART).read_bytes()
    restart_md(folder, steps=20)
    (folder / report.RESTART).write_bytes(saved)  # as if the machine had died before saving
    restart_md(folder, steps=20)
    log = report.read_log(folder / report.LOG)
    np.testing.assert_array_equal(log["step"], [0, 10, 20, 30, 40, 50, 60])
    trajectory = mdtraj.load(folder / report.TRAJECTORY, top=folder / report.TOPOLOGY)
    assert trajectory.n_frames == 7
    assert (folder / report.LOG).read_bytes().startswith(whole[report.LOG])
    header = (folder / report.TRAJECTORY).read_bytes()[8:12]
    assert int.from_bytes(header, "little") == 7


def test_seeds(cluster, tmp_path):
    one, same, other = (
        run_md(settings(cluster, seed=seed, steps=10), tmp_path / str(i))
        for i, seed in enumerate((1, 1, 2))
    )
    assert (one / report.LOG).read_text(encoding="utf-8") == (same / report.LOG).read_text(
        encoding="utf-8"
    )
    assert (one / report.LOG).read_text(encoding="utf-8") != (other / report.LOG).read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("factor", [np.nan, 1e4])
def test_unstable_run_keeps_its_good_frames(cluster, tmp_path, engine, factor, monkeypatch):
    class Breaking(PairEngine):
        def evaluate(self, *structure):
            result = super().evaluate(*structure)
            return dataclasses.replace(
                result, forces=result.forces * (factor if self.calls > 25 else 1.0)
            )

    for module in ("ase", "openmm_force"):
        monkeypatch.setattr(f"mlip_md.integrations.{module}.Engine", Breaking)
    folder = tmp_path / "run"
    with pytest.raises(SimulationError, match="smaller time step"):
        run_md(settings(cluster, engine=engine), folder)
    frames = ase.io.read(folder / report.TRAJECTORY_ASE, ":")
    assert len(frames) in (2, 3)
    assert all(np.isfinite(f.positions).all() for f in frames)
    assert max(f.get_temperature() for f in frames) < 1000
    assert json.loads((folder / report.SUMMARY).read_text(encoding="utf-8"))["status"] == "failed"
    arrays, values = report.read_restart(folder / report.RESTART)
    assert values["step"] == frames[-1].info["step"]
    np.testing.assert_allclose(arrays["positions"], frames[-1].positions, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
def test_interrupted_run_can_go_on(cluster, tmp_path, engine):
    class Interrupt(md.Silent):
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
    log = report.read_log(tmp_path / "run" / report.LOG)
    np.testing.assert_array_equal(log["step"], [0, 10, 20, 30, 40])


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
    for module in ("ase", "openmm_force"):
        monkeypatch.setattr(f"mlip_md.integrations.{module}.Engine", Pressed)
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
    step = report.read_restart(folder / report.RESTART)[1]["step"]
    assert (10 < step < 20) if presses == 1 else step == 10
    assert report.read_log(folder / report.LOG)["step"][-1] == step
    assert json.loads((folder / report.SUMMARY).read_text())["status"] == "interrupted"
    for module in ("ase", "openmm_force"):
        monkeypatch.setattr(f"mlip_md.integrations.{module}.Engine", PairEngine)
    restart_md(folder)
    assert (folder / report.LOG).read_text() == (whole / report.LOG).read_text()


def test_ctrl_c_is_left_alone_where_it_is_ignored():
    from mlip_md.signals import Interruptions

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Interruptions(signal.SIGINT) as interruptions:
            signal.raise_signal(signal.SIGINT)
        assert interruptions.reason is None
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_openmm_says_null_for_ctrl_c():
    from mlip_md.integrations.md.backends.openmm import _as_simulation_error

    with pytest.raises(KeyboardInterrupt), _as_simulation_error():
        raise openmm.OpenMMException("<NULL>")


@pytest.mark.parametrize("engine", ENGINES)
def test_molecules_that_fly_apart_are_no_success(tmp_path, engine):
    """Carbon atoms in bonding distance, where the pair potential repels them strongly."""
    positions = 1.7 * np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0.2]])
    Atoms("C4", positions=positions).write(tmp_path / "square.xyz")
    folder = tmp_path / "run"
    with pytest.raises(SimulationError, match="fell apart") as caught:
        run_md(
            settings(str(tmp_path / "square.xyz"), engine=engine, ensemble="nve", steps=2000),
            folder,
        )
    assert str(caught.value).count("smaller time step") == 1
    frames = ase.io.read(folder / report.TRAJECTORY_ASE, ":")
    nearest = np.min(frames[-1].get_all_distances() + 100 * np.eye(4), axis=1)
    assert 2.2 < nearest.min() < 2.5 * 1.7
    assert report.read_restart(folder / report.RESTART)[1]["step"] == frames[-1].info["step"]


def test_what_is_no_falling_apart(crystal):
    from ase.build import molecule

    from mlip_md.integrations.md.structures import BondWatch

    def moved(atoms, vectors):
        return BondWatch(atoms).broken(atoms.positions + vectors, atoms.cell.array)

    water = molecule("H2O")
    apart = 9.0 * np.arange(3)[:, None]
    assert moved(water, apart) == 3
    assert moved(water, apart * [[0], [0], [1]]) == 0  # one hydrogen atom goes its way
    assert moved(molecule("H2"), 9.0 * np.arange(2)[:, None]) == 0  # so does a dissociating dimer
    pair = water + water
    pair.positions[3:] += 3.0
    assert moved(pair, 20.0 * (np.arange(6) > 2)[:, None]) == 0  # whole molecules evaporate
    box = water.copy()
    box.set_cell([9, 9, 9])
    box.pbc = True
    assert moved(box, np.zeros((3, 3))) == 0
    assert moved(box, 3.0 * np.arange(3)[:, None]) == 3
    # A melt: all atoms have exchanged their neighbors.
    copper = bulk("Cu", cubic=True).repeat(3)
    order = np.random.default_rng(0).permutation(len(copper))
    assert moved(copper, copper.positions[order] - copper.positions) == 0


def test_openmm_evaluates_no_frame_twice(crystal, tmp_path, monkeypatch):
    calls = []

    class Counting(PairEngine):
        def evaluate(self, *structure):
            calls.append(1)
            return super().evaluate(*structure)

    monkeypatch.setattr("mlip_md.integrations.openmm_force.Engine", Counting)
    run_md(settings(crystal, engine="openmm", steps=50), tmp_path / "run")
    assert 50 <= len(calls) <= 52


@pytest.mark.parametrize("engine", ENGINES)
def test_a_minimization_that_does_not_end_is_told(cluster, tmp_path, engine, monkeypatch):
    class Notes(md.Silent):
        def note(self, text):
            notes.append(text)

    for steps in (300, 3):
        notes = []
        for module in ("md_ase", "md_openmm"):
            monkeypatch.setattr(f"mlip_md.integrations.{module}.MINIMIZE_STEPS", steps)
        run_md(
            settings(cluster, engine=engine, minimize=True, steps=10),
            tmp_path / str(steps),
            progress=Notes(),
        )
        assert [n for n in notes if "used up its iterations" in n] == notes
        assert len(notes) == (steps == 3)


@pytest.mark.parametrize("engine", ENGINES)
def test_minimization_lowers_the_energy(cluster, tmp_path, engine):
    folder = run_md(settings(cluster, engine=engine, minimize=True, steps=10), tmp_path / "run")
    start = ase.io.read(cluster)
    before = PairEngine(None).evaluate(start.positions, start.numbers).energy
    assert report.read_log(folder / report.LOG)["potential_eV"][0] < before - 0.3


def test_left_handed_cell_is_not_mirrored(tmp_path):
    from mlip_md.integrations.md.backends.openmm import openmm_cell
    from mlip_md.integrations.md.structures import Structure

    rng = np.random.default_rng(0)
    cell = np.array([[0.5, 7.0, 1.0], [8.0, 0.3, -1.0], [1.0, 2.0, 9.0]])
    atoms = Atoms("C5", positions=rng.uniform(0, 9, (5, 3)), cell=cell, pbc=True)
    assert np.linalg.det(cell) < 0
    ready = openmm_cell(Structure("x", atoms)).atoms
    ax, by, cz = np.diag(ready.cell.array)
    assert min(ax, by, cz) > 0
    assert np.abs(np.triu(ready.cell.array, 1)).max() < 1e-12
    assert abs(ready.cell[2, 1]) <= by / 2
    np.testing.assert_allclose(ready.get_all_distances(mic=True), atoms.get_all_distances(mic=True))
    vectors = [a.get_distance(0, i, vector=True) for a in (atoms, ready) for i in (1, 2, 3)]
    handedness = np.linalg.det(vectors[:3]), np.linalg.det(vectors[3:])
    np.testing.assert_allclose(*handedness)


def test_fresh_folders_are_never_used_again(tmp_path):
    names = [md.fresh_folder("a b/c", tmp_path).name for _ in range(3)]
    assert names == ["md-a_b_c-1", "md-a_b_c-2", "md-a_b_c-3"]


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"engine": "gromacs"}, ConfigError, "ase, openmm"),
        ({"ensemble": "npt"}, StructureError, "periodic"),
        ({"timestep": 0.0}, ConfigError, "timestep"),
        ({"steps": 0}, ConfigError, "steps"),
        ({"temperature": -1.0}, ConfigError, "temperature"),
        ({"structure": "nowhere.xyz"}, StructureError, "paracetamol"),
        ({"engine": "openmm", "platform": "Abacus"}, ConfigError, "Reference"),
    ],
)
def test_bad_settings(cluster, tmp_path, changes, error, text):
    with pytest.raises(error, match=text):
        run_md(dataclasses.replace(settings(cluster), **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["temperature", "friction", "pressure", "timestep"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} = {value} .*finite$") as caught:
        MDSettings(**{name: value})
    assert "-inf" not in str(caught.value)


def test_output_is_looked_at_before_anything_is_computed(cluster, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a backend was built")

    monkeypatch.setattr(md, "make_backend", never)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for name, text in (("file", "is a file"), ("file/x", "is a file"), ("full", "not empty")):
        with pytest.raises(ConfigError, match=text):
            run_md(settings(cluster), tmp_path / name)


def test_damaged_folders_cannot_go_on(cluster, tmp_path):
    folder = run_md(settings(cluster), tmp_path / "run")
    file = folder / report.RESTART
    good = file.read_bytes()
    arrays, values = report.read_restart(file)
    damaged = [good[:-100], good[: len(good) // 2], b"", b"nonsense"]
    for step in ("five", None):
        report.write_restart(file, arrays, values | {"step": step})
        damaged.append(file.read_bytes())
    report.write_restart(file, arrays, {})
    damaged.append(file.read_bytes())
    report.write_restart(file, {}, values)
    damaged.append(file.read_bytes())
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"restart\.npz is damaged"):
            restart_md(folder, steps=10)
    del arrays["momenta"]
    report.write_restart(file, arrays, values)
    with pytest.raises(CheckpointError, match="momenta"):
        restart_md(folder, steps=10)
    file.write_bytes(good)
    for name in (report.TOPOLOGY, report.TRAJECTORY, report.SETTINGS):
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


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.pdb", "hello\nEND\n", "ATOM or HETATM"),
        ("b.pdb", "ATOM      1  C   MOL A   1       0.0\n", "b.pdb, line 1, is damaged"),
        ("c.xyz", "what is this\n", "c.xyz"),
        (
            "d.pdb",
            "CRYST1    1.100    1.000    1.000  90.00  90.00  90.00 P 1           1\n"
            "HETATM    1  C1  MOL A   1       0.000   0.000   0.000  1.00  0.00           C\n"
            "HETATM    2  C2  MOL A   1       1.500   0.000   0.000  1.00  0.00           C\n",
            "CRYST1",
        ),
        ("e.xyz", '1\nLattice="1 0 0 0 0.5 0 0 0 1"\nC 0 0 0\n', "too small for 1 atoms"),
    ],
)
def test_files_that_are_no_structures(tmp_path, name, content, text):
    from mlip_md.integrations.md.structures import read_structure

    (tmp_path / name).write_text(content)
    with pytest.raises(StructureError, match=text):
        read_structure(tmp_path / name)


def test_unknown_element_and_used_folder(cluster, tmp_path):
    Atoms("Au", positions=[[0, 0, 0]]).write(tmp_path / "gold.xyz")
    with pytest.raises(UnsupportedElementError, match="Au"):
        run_md(settings(str(tmp_path / "gold.xyz")), tmp_path / "run")
    with pytest.raises(ConfigError, match="not empty"):
        run_md(settings(cluster), tmp_path)
    with pytest.raises(CheckpointError, match="settings"):
        restart_md(tmp_path)


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
    assert report.read_log(tmp_path / "md-cluster-1" / report.LOG)["step"][-1] == 40
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


def test_speeds_are_written_without_exponents():
    values = (0.0, 0.01234, 9.876, 123.4, 999.4, 1234.5, 1.2e6)
    texts = ["0", "0.0123", "9.88", "123", "999", "1234", "1200000"]
    assert [md_cli._short(value) for value in values] == texts


def test_options_that_do_nothing_are_refused(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for options, text in (
        (["--ensemble", "nve", "--friction", "5"], "--friction"),
        (["--ensemble", "npt", "--friction", "5"], "--friction"),
        (["--pressure", "3"], "--pressure"),
        (["--platform", "CPU"], "--platform"),
        (["--device", "tpu"], "--device tpu|--device cpu"),
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


@pytest.mark.parametrize("ensemble", ["nvt", "npt"])
def test_restart_on_another_platform(crystal, tmp_path, ensemble):
    folder = run_md(settings(crystal, engine="openmm", ensemble=ensemble), tmp_path / "run")
    result = CliRunner().invoke(
        app, ["md", "--restart", str(folder), "--steps", "10", "--platform", "CPU"]
    )
    assert result.exit_code == 0, result.output
    assert "not exactly as it would have" in " ".join(result.output.split())
    assert json.loads((folder / report.SUMMARY).read_text())["platform"] == "CPU"
    assert md.read_settings(folder).platform == "CPU"
    frames = ase.io.read(folder / report.TRAJECTORY_ASE, ":")
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


def test_no_drift_is_told_of_a_short_log():
    time = np.linspace(0, 1, 11)
    log = {name: np.full(11, np.nan) for name in report.COLUMNS}
    log |= {"step": np.arange(11), "time_ps": time, "temperature_K": time + 300}
    log["conserved_eV"] = 0.02 * time
    assert report.statistics(log, 4)["drift_meV_per_atom_ps"] == pytest.approx(5.0)
    log["time_ps"] = time * 0.5
    assert report.statistics(log, 4)["drift_meV_per_atom_ps"] is None


def test_minimize_relaxes_the_cell(crystal, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(
        app, ["minimize", crystal, "--relax-cell", "-o", "out.extxyz"], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    assert np.abs(ase.io.read("out.extxyz").get_stress()).max() < 1e-3


def test_bundled_molecule_is_whole():
    from mlip_md.integrations.md.structures import (
        bonds,
        bundled_molecules,
        make_topology,
        molecules,
        read_structure,
    )

    assert bundled_molecules() == ["paracetamol"]
    structure = read_structure()
    assert structure.atoms.get_chemical_formula() == "C8H9NO2"
    pairs = bonds(structure.atoms)
    assert len(pairs) == 20  # 19 bonds and one ring
    assert set(molecules(20, pairs)) == {0}
    assert make_topology(structure).getNumBonds() == 20


def test_checkpoint_of_another_machine(cluster, tmp_path, caplog):
    folder = run_md(settings(cluster, engine="openmm"), tmp_path / "run")
    arrays, values = report.read_restart(folder / report.RESTART)
    arrays["checkpoint"] = np.frombuffer(b"made elsewhere", np.uint8)
    report.write_restart(folder / report.RESTART, arrays, values)
    restart_md(folder, steps=10)
    assert "new random numbers" in caplog.text
    frames = ase.io.read(folder / report.TRAJECTORY_ASE, ":")
    assert frames[-1].info["step"] == 50
    # 5 fs at the velocities that were saved, not at others.
    moved = frames[-1].positions - frames[-2].positions
    expected = frames[-2].get_velocities() * 5.0 * ase.units.fs
    assert np.abs(moved - expected).max() < 0.3 * np.abs(expected).max()
