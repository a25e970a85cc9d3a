"""Molecular dynamics runs: what is integrated, what is left behind, what happens when it fails."""

import dataclasses
import json

import ase.io
import mdtraj
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.cell import Cell
from md_cases import ENGINES, set_engine, settings
from pair_engine import PairEngine

from mlip_md.errors import (
    CheckpointError,
    ConfigError,
    SimulationError,
    StructureError,
    UnsupportedElementError,
)
from mlip_md.integrations.md import files, report, restart, run
from mlip_md.integrations.md.backends.interface import BAR
from mlip_md.integrations.md.observers import RunObserver
from mlip_md.integrations.md.run import restart_md, run_md
from mlip_md.integrations.md.settings import MDSettings
from mlip_md.integrations.md.structures import bonds, compare_bonds, describe_contact


@pytest.mark.parametrize("engine", ENGINES)
def test_folder_opens_in_mdtraj_and_ase(cluster, tmp_path, engine):
    folder = run_md(settings(cluster, engine=engine), tmp_path / "run")
    trajectory = mdtraj.load(folder / files.TRAJECTORIES["dcd"], top=folder / files.TOPOLOGY)
    frames = ase.io.read(folder / files.TRAJECTORY_ASE, ":")
    log = files.read_log(folder / files.LOG)
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
    log = files.read_log(folder / files.LOG)
    assert np.ptp(log["kinetic_eV"]) > 0.1  # energy flows...
    assert np.ptp(log["conserved_eV"]) < 0.01 * np.ptp(log["kinetic_eV"])  # ...and is kept
    np.testing.assert_allclose(log["temperature_K"][0], 300.0, rtol=0.02)
    free = 3 * 27 - 6  # momentum and angular momentum are zero and stay so
    temperatures = 2 * log["kinetic_eV"] / (free * ase.units.kB)
    np.testing.assert_allclose(log["temperature_K"], temperatures, rtol=1e-6)
    frames = ase.io.read(folder / files.TRAJECTORY_ASE, ":")
    momentum = frames[-1].get_momenta()
    assert np.abs(momentum.sum(axis=0)).max() < 1e-3 * np.abs(momentum).max()


@pytest.mark.parametrize("engine", ENGINES)
def test_nvt_reaches_the_temperature(cluster, tmp_path, engine):
    folder = run_md(
        settings(cluster, engine=engine, steps=1500, timestep=4.0, temperature=150.0),
        tmp_path / "run",
    )
    log = files.read_log(folder / files.LOG)
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
    log = files.read_log(folder / files.LOG)
    volumes = [frame.get_volume() for frame in ase.io.read(folder / files.TRAJECTORY_ASE, ":")]
    np.testing.assert_allclose(volumes, log["volume_A3"], rtol=1e-6)
    half = len(log["step"]) // 2
    # A static compression curve says which volume belongs to this pressure.
    scales = np.linspace(0.94, 1.02, 33)
    pressures = []
    for scale in scales:
        box = atoms.copy()
        box.set_cell(atoms.cell * scale, scale_atoms=True)
        stress = PairEngine(None).evaluate(box.positions, box.numbers, box.cell.array, True).stress
        pressures.append(-np.trace(stress) / 3 / BAR)
    scale = np.interp(-pressure, -np.array(pressures), scales)
    expected = atoms.get_volume() * scale**3
    assert abs(log["volume_A3"][half:].mean() / expected - 1) < 0.02
    assert abs(atoms.get_volume() / expected - 1) > 0.03
    assert abs(log["pressure_bar"][half:].mean() - pressure) < 0.3 * pressure
    trajectory = mdtraj.load(folder / files.TRAJECTORIES["dcd"], top=folder / files.TOPOLOGY)
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
    file = folder / files.TRAJECTORIES[trajectory_format]
    for more in (0, 18):
        if more:
            restart_md(folder, steps=more)  # and then it is none any more
            wanted = sorted({*range(0, steps + more + 1, 10), steps + more})
        log = files.read_log(folder / files.LOG)
        frames = ase.io.read(folder / files.TRAJECTORY_ASE, ":")
        trajectory = mdtraj.load(file, top=folder / files.TOPOLOGY)
        np.testing.assert_array_equal(log["step"], wanted)
        assert [f.info["step"] for f in frames] == wanted
        np.testing.assert_allclose(
            trajectory.xyz * 10, [f.positions for f in frames], atol=0.0051, rtol=0
        )
        np.testing.assert_allclose(trajectory.unitcell_lengths, 0.59, atol=1e-5)
        if trajectory_format == "xtc":
            np.testing.assert_allclose(trajectory.time, log["time_ps"], atol=1e-6)
        assert (folder / report.PLOT).stat().st_size > 10_000


def test_seeds(cluster, tmp_path):
    one, same, other = (
        run_md(settings(cluster, seed=seed, steps=10), tmp_path / str(i))
        for i, seed in enumerate((1, 1, 2))
    )
    assert (one / files.LOG).read_text(encoding="utf-8") == (same / files.LOG).read_text(
        encoding="utf-8"
    )
    assert (one / files.LOG).read_text(encoding="utf-8") != (other / files.LOG).read_text(
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

    set_engine(monkeypatch, Breaking)
    folder = tmp_path / "run"
    with pytest.raises(SimulationError, match="smaller time step"):
        run_md(settings(cluster, engine=engine), folder)
    frames = ase.io.read(folder / files.TRAJECTORY_ASE, ":")
    assert len(frames) in (2, 3)
    assert all(np.isfinite(f.positions).all() for f in frames)
    assert max(f.get_temperature() for f in frames) < 1000
    assert json.loads((folder / report.SUMMARY).read_text(encoding="utf-8"))["status"] == "failed"
    arrays, values = restart.read_restart(folder / restart.RESTART)
    assert values["step"] == frames[-1].info["step"]
    np.testing.assert_allclose(arrays["positions"], frames[-1].positions, atol=1e-6)


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
    frames = ase.io.read(folder / files.TRAJECTORY_ASE, ":")
    nearest = np.min(frames[-1].get_all_distances() + 100 * np.eye(4), axis=1)
    assert 2.2 < nearest.min() < 2.5 * 1.7
    assert restart.read_restart(folder / restart.RESTART)[1]["step"] == frames[-1].info["step"]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_minimization_that_does_not_end_is_told(cluster, tmp_path, engine, monkeypatch):
    class Notes(RunObserver):
        def note(self, text):
            notes.append(text)

    for steps in (300, 1):
        notes = []
        monkeypatch.setattr(run, "MINIMIZE_STEPS", steps)
        run_md(
            settings(cluster, engine=engine, minimize=True, steps=10),
            tmp_path / str(steps),
            progress=Notes(),
        )
        assert [n for n in notes if "used up its iterations" in n] == notes
        assert len(notes) == (steps == 1)


@pytest.mark.parametrize("engine", ENGINES)
def test_minimization_lowers_the_energy(cluster, tmp_path, engine):
    folder = run_md(settings(cluster, engine=engine, minimize=True, steps=10), tmp_path / "run")
    start = ase.io.read(cluster)
    before = PairEngine(None).evaluate(start.positions, start.numbers).energy
    assert files.read_log(folder / files.LOG)["potential_eV"][0] < before - 0.3


def test_fresh_folders_are_never_used_again(tmp_path):
    names = [run.make_fresh_folder("a b/c", tmp_path).name for _ in range(3)]
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

    monkeypatch.setattr(run, "make_backend", never)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    for name, text in (("file", "is a file"), ("file/x", "is a file"), ("full", "not empty")):
        with pytest.raises(ConfigError, match=text):
            run_md(settings(cluster), tmp_path / name)


def test_unknown_element_and_used_folder(cluster, tmp_path):
    Atoms("Au", positions=[[0, 0, 0]]).write(tmp_path / "gold.xyz")
    with pytest.raises(UnsupportedElementError, match="Au"):
        run_md(settings(str(tmp_path / "gold.xyz")), tmp_path / "run")
    with pytest.raises(ConfigError, match="not empty"):
        run_md(settings(cluster), tmp_path)
    with pytest.raises(CheckpointError, match="settings"):
        restart_md(tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_bonds_that_a_minimization_changes_are_told(tmp_path, engine):
    """The pair potential draws C2 with bonds of 1.4 Å out to 2.2 Å; C and C at 2.6 Å stay apart."""

    class Notes(RunObserver):
        def note(self, text):
            notes.append(text)

    path = tmp_path / "pairs.xyz"
    Atoms("C4", [[0, 0, 0], [1.4, 0, 0], [0, 9, 0], [2.6, 9, 0]]).write(path)
    notes = []
    given = settings(str(path), engine=engine, minimize=True, steps=20)
    folder = run_md(given, tmp_path / "run", progress=Notes())
    assert notes == ["The minimization broke C0-C1 (bonds by distance)"]
    told = {"bonds_broken": [[0, 1]], "bonds_formed": []}
    assert report.read_summary(folder)["minimization"] == told
    restart_md(folder, steps=10)
    assert report.read_summary(folder)["minimization"] == told


def test_bonds_are_compared_with_a_margin():
    at = [Atoms("CH", [[0, 0, 0], [length, 0, 0]]) for length in (1.1, 1.27, 1.33, 1.45)]
    sum_of_radii = 0.76 + 0.31
    assert [len(bonds(atoms)) for atoms in at] == [1, 1, 0, 0]
    assert compare_bonds(at[1], at[2]).describe(at[1]) == ""  # 1.24 of the sum
    assert compare_bonds(at[0], at[3]).describe(at[0]) == "broke C0-H1"
    assert compare_bonds(at[3], at[0]).describe(at[0]) == "formed C0-H1"
    assert at[2].positions[1, 0] < 1.3 * sum_of_radii < at[3].positions[1, 0]


def test_contacts_are_far_below_bonds():
    """Short bonds and hot ones are none; two nuclei in one electron shell are one."""

    def contact(symbols, length, **more):
        return describe_contact(Atoms(symbols, [[0, 0, 0], [length, 0, 0]], **more))

    for symbols, length in (("H2", 0.55), ("N2", 0.95), ("OH", 0.8), ("CC", 1.0), ("Cr2", 1.5)):
        assert contact(symbols, length) == "", symbols
    assert contact("H2", 0.25).startswith("atoms 0 (H) and 1 (H) are 0.25 Å apart")
    assert contact("CH", 0.5)
    assert contact("C2", 0.7)
    assert contact("C2", 9.5, cell=[10, 10, 10], pbc=True), "across the boundary"
    assert not contact("C2", 9.5, cell=[10, 10, 10], pbc=False)


class CollapsingEngine(PairEngine):
    """Atoms attract each other at any distance."""

    def evaluate(self, positions, *structure):
        result = super().evaluate(positions, *structure)
        pull = 0.25 * np.sign(positions - np.mean(positions, axis=0))
        energy = -float(np.sum(pull * positions))
        forces = np.where(np.abs(positions - np.mean(positions, axis=0)) > 0.05, -pull, 0.0)
        return dataclasses.replace(
            result, interaction_energy=-energy, energy=-energy, forces=forces
        )


@pytest.mark.parametrize("engine", ENGINES)
def test_a_collapse_stops_the_run(tmp_path, engine, monkeypatch):
    set_engine(monkeypatch, CollapsingEngine)
    path = tmp_path / "pair.xyz"
    Atoms("C2", [[-0.7, 0, 0], [0.7, 0, 0]]).write(path)
    changes = {"timestep": 1.0, "steps": 150, "report_interval": 5, "ensemble": "nve"}
    given = settings(str(path), engine=engine, **changes)
    with pytest.raises(SimulationError, match=r"collapsed: atoms 0 \(C\) and 1 \(C\)"):
        run_md(given, tmp_path / "run")
    with pytest.raises(SimulationError, match=r"minimization ended .* atoms 0 \(C\) and 1"):
        run_md(dataclasses.replace(given, minimize=True), tmp_path / "minimized")
    assert not (tmp_path / "minimized").exists()


FCC = 1.5 * np.array([[0, 3.6, 3.6], [3.6, 0, 3.6], [3.6, 3.6, 0]])
CELLS = {
    "fcc": FCC,
    "monoclinic": Cell.fromcellpar([7, 8, 14, 90, 122.9, 90]).array,
    "turned": np.array([[0, 0, 8.0], [7.0, 0, 0], [0, 9.0, 1.5]]),
    "left-handed": np.array([[0, 8.0, 0], [7.0, 0, 0], [0, 0, 9.0]]),
}


def image_distances(positions, cell):
    """The shortest distances between all atoms and all images, sorted."""
    images = np.stack(np.meshgrid(*[np.arange(-3, 4)] * 3), axis=-1).reshape(-1, 3) @ cell
    vectors = positions[None, :, None] - positions[:, None, None] + images
    lengths = np.sort(np.linalg.norm(vectors, axis=-1).ravel())
    return lengths[lengths > 1e-3][:60]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("kind", ["dcd", "xtc"])
def test_any_cell_in_any_engine(tmp_path, engine, cell, kind):
    path = tmp_path / "cell.extxyz"
    places = [[0.3, 0.2, 0.1], [2.4, 0.4, 0.2], [0.8, 2.3, 0.3], [-9.0, 14.0, 5.0]]
    given = Atoms("C4", places, cell=CELLS[cell], pbc=True)
    given.write(path)
    changes = {"engine": engine, "steps": 10, "report_interval": 5, "trajectory_format": kind}
    folder = run_md(settings(str(path), **changes), tmp_path / "run")
    restart_md(folder, steps=5)
    frames = ase.io.read(folder / files.TRAJECTORY_ASE, ":")
    top = mdtraj.load_pdb(str(folder / files.TOPOLOGY), standard_names=False)
    trajectory = mdtraj.load(folder / files.TRAJECTORIES[kind], top=top.topology)
    assert trajectory.n_frames == len(frames) == 4
    for place, box, frame in zip(trajectory.xyz, trajectory.unitcell_vectors, frames, strict=True):
        here = image_distances(frame.positions, frame.cell.array)
        np.testing.assert_allclose(
            10 * np.linalg.norm(place[1:] - place[:-1], axis=1),
            np.linalg.norm(np.diff(frame.positions, axis=0), axis=1),
            atol=0.02,
        )
        np.testing.assert_allclose(image_distances(10 * place, 10 * box), here, atol=0.02)
    start = image_distances(given.positions, given.cell.array)
    np.testing.assert_allclose(
        image_distances(10 * top.xyz[0], 10 * top.unitcell_vectors[0]), start, atol=0.02
    )
    np.testing.assert_allclose(frames[0].positions, places, atol=1e-5)
    for frame in frames:
        np.testing.assert_allclose(frame.cell.array, CELLS[cell], atol=1e-6)


@pytest.mark.parametrize("cell", CELLS)
def test_the_ase_trajectory_is_in_the_frame_of_the_file(tmp_path, cell):
    path = tmp_path / "cell.extxyz"
    places = [[0.3, 0.2, 0.1], [2.4, 0.4, 0.2], [0.8, 2.3, 0.3], [-9.0, 14.0, 5.0]]
    given = Atoms("C4", places, cell=CELLS[cell], pbc=True)
    given.set_velocities(0.01 * np.arange(12).reshape(4, 3))
    given.write(path)
    runs = []
    for engine in ENGINES:
        changes = {"velocities": "file", "ensemble": "nve", "timestep": 0.05}
        folder = run_md(settings(str(path), engine=engine, **changes), tmp_path / engine)
        restart_md(folder, steps=10)
        runs.append(ase.io.read(folder / files.TRAJECTORY_ASE, ":"))
    for frame, other in zip(*runs, strict=True):
        for array in ("positions", "momenta"):
            np.testing.assert_allclose(frame.arrays[array], other.arrays[array], atol=2e-3)
        np.testing.assert_allclose(frame.get_forces(), other.get_forces(), atol=2e-2)
    np.testing.assert_allclose(runs[1][0].get_velocities(), given.get_velocities(), atol=1e-6)


def test_a_volume_that_moves_keeps_the_shape_of_the_cell_in_the_file(tmp_path):
    path = tmp_path / "cell.extxyz"
    atoms = bulk("C", "fcc", a=2.95).repeat(3)  # primitive: no vector along x
    atoms.write(path)
    changes = {"engine": "openmm", "ensemble": "npt", "pressure": 1e4, "steps": 60}
    folder = run_md(settings(str(path), **changes), tmp_path / "run")
    cells = [frame.cell.array for frame in ase.io.read(folder / files.TRAJECTORY_ASE, ":")]
    scales = [(abs(np.linalg.det(cell)) / atoms.get_volume()) ** (1 / 3) for cell in cells]
    assert len(set(scales)) > 1
    for cell, scale in zip(cells, scales, strict=True):
        np.testing.assert_allclose(cell, scale * atoms.cell.array, atol=1e-5)


def test_dcd_starts_when_the_log_does(cluster, tmp_path):
    folder = run_md(settings(cluster), tmp_path / "run")
    header = (folder / files.TRAJECTORIES["dcd"]).read_bytes()[8:20]
    frames, first, interval = np.frombuffer(header, "<i4")
    assert [frames, first, interval] == [5, 0, 10]
