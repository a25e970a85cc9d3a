"""What a run leaves behind: log, trajectories, plot, summary and restart file."""

from __future__ import annotations

import csv
import io
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units

from mlip_md.errors import CheckpointError

LOG = "log.csv"
TOPOLOGY = "topology.pdb"
TRAJECTORY = "trajectory.dcd"
TRAJECTORY_XTC = "trajectory.xtc"
TRAJECTORY_ASE = "trajectory.extxyz"
PLOT = "energies.png"
SUMMARY = "summary.json"
SETTINGS = "settings.json"
RESTART = "restart.npz"

BAR = 1e5 * units.Pascal
"""1 bar in eV/Å³."""

COLUMNS = (
    "step",
    "time_ps",
    "potential_eV",
    "kinetic_eV",
    "total_eV",
    "conserved_eV",
    "temperature_K",
    "pressure_bar",
    "volume_A3",
    "density_g_cm3",
)
"""Columns of the log; a quantity that a run does not have stays empty."""


DRIFT_PS = 1.0
"""Shortest log (ps) of which a drift is told; below, the slope is that of fluctuations."""


class Frame(NamedTuple):
    """The state of a run at one step.

    Attributes:
        step: number of steps done.
        time: ps.
        positions: (n, 3) Å, never wrapped.
        velocities: (n, 3) Å/fs.
        cell: (3, 3) Å, zeros without one.
        potential: eV.
        kinetic: eV.
        conserved: eV, the quantity that the equations of motion conserve, or None.
        temperature: K.
        pressure: eV/Å³ with its kinetic part, or None without a periodic cell.
    """

    step: int
    time: float
    positions: np.ndarray
    velocities: np.ndarray
    cell: np.ndarray
    potential: float
    kinetic: float
    conserved: float | None
    temperature: float
    pressure: float | None


def log_row(frame: Frame, mass: float) -> dict[str, float | int | None]:
    """One row of the log; ``mass`` in amu."""
    row: dict[str, float | int | None] = dict.fromkeys(COLUMNS)
    row |= {
        "step": frame.step,
        "time_ps": frame.time,
        "potential_eV": frame.potential,
        "kinetic_eV": frame.kinetic,
        "total_eV": frame.potential + frame.kinetic,
        "conserved_eV": frame.conserved,
        "temperature_K": frame.temperature,
    }
    if frame.pressure is not None:
        volume = abs(float(np.linalg.det(frame.cell)))
        row["pressure_bar"] = frame.pressure / BAR
        row["volume_A3"] = volume
        row["density_g_cm3"] = mass / volume * units._amu * 1e27
    return row


def trajectory_name(trajectory_format: str) -> str:
    """File of the trajectory for mdtraj in a format (dcd or xtc)."""
    return TRAJECTORY_XTC if trajectory_format == "xtc" else TRAJECTORY


def check_sizes(folder: Path, sizes: dict[str, int]) -> None:
    """Look whether a run's files can be cut back to a restart point.

    Raises:
        CheckpointError: if one is missing or too short.
    """
    for name, size in sizes.items():
        path = folder / name
        if not path.exists():
            raise CheckpointError(f"there is no {path}, to which the run would go on writing")
        if path.stat().st_size < size:
            raise CheckpointError(f"{path} is shorter than when the restart file was written")


class RunFiles:
    """The growing files of a run: log and trajectories, for mdtraj (with the PDB) and for ASE.

    DCD files know the time of their first frame and a constant interval; a last frame between two
    reports has its own time in the log, in the trajectory for ASE and in XTC files only.

    Args:
        folder: the run's folder.
        atoms: the structure, for elements and periodicity.
        topology: its OpenMM topology.
        timestep: fs.
        interval: steps between frames.
        trajectory: name of the trajectory for mdtraj; its ending says whether it is DCD or XTC.
        sizes: None for a new run; else bytes of each file at the restart point, to which the files
            are cut, so that frames written after it do not appear twice.
    """

    def __init__(
        self,
        folder: Path,
        atoms: Atoms,
        topology: Any,
        *,
        timestep: float,
        interval: int,
        trajectory: str = TRAJECTORY,
        sizes: dict[str, int] | None = None,
    ) -> None:
        self.folder = folder
        self._names = (LOG, trajectory, TRAJECTORY_ASE)
        self._atoms = atoms.copy()
        self._mass = float(atoms.get_masses().sum())
        check_sizes(folder, sizes or {})
        for name, size in (sizes or {}).items():
            os.truncate(folder / name, size)
        self._log = (folder / LOG).open("a" if sizes else "w", newline="", encoding="utf-8")
        self._ase = (folder / TRAJECTORY_ASE).open("a" if sizes else "w", encoding="utf-8")
        make = _XTC if trajectory == TRAJECTORY_XTC else _DCD
        self._binary = make(folder / trajectory, topology, timestep, interval, sizes is not None)
        if not sizes:
            csv.DictWriter(self._log, COLUMNS).writeheader()
            _write_topology(folder / TOPOLOGY, topology, atoms)

    def write(self, frame: Frame) -> None:
        """Append one frame to the log and to both trajectories."""
        row = log_row(frame, self._mass)
        cells = {k: _number(v) for k, v in row.items()}
        csv.DictWriter(self._log, COLUMNS).writerow(cells)
        self._binary.write(frame)
        self._ase.write(_extxyz(self._atoms, frame))
        for file in (self._log, self._ase):
            file.flush()

    def sizes(self) -> dict[str, int]:
        """Bytes of each growing file as they are now."""
        return {n: (self.folder / n).stat().st_size for n in self._names}

    def close(self) -> None:
        """Close all files."""
        for file in (self._log, self._ase, self._binary):
            file.close()


def _number(value: float | int | None) -> str | int:
    if value is None:
        return ""
    return value if isinstance(value, int) else f"{value:.10g}"


def _for_openmm(frame: Frame) -> tuple[Any, Any]:
    """Positions and box vectors (or None) with OpenMM's units."""
    from openmm import Vec3, unit

    box = [Vec3(*v) for v in frame.cell] * unit.angstrom if frame.cell.any() else None
    return frame.positions * unit.angstrom, box


class _DCD:
    """A growing DCD file; after a cut the frame count in its header is put right."""

    def __init__(
        self, path: Path, topology: Any, timestep: float, interval: int, append: bool
    ) -> None:
        from openmm.app import DCDFile

        self._file = path.open("r+b" if append else "w+b")
        if append:
            frames = _dcd_frames(self._file)
            self._file.seek(8)
            self._file.write(frames.to_bytes(4, "little"))
            self._file.flush()
        self._writer = DCDFile(
            self._file, topology, timestep * 1e-3, interval, interval, append=append
        )

    def write(self, frame: Frame) -> None:
        positions, box = _for_openmm(frame)
        self._writer.writeModel(positions, periodicBoxVectors=box)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _XTC:
    """A growing XTC file; OpenMM opens and closes it for every frame."""

    def __init__(
        self, path: Path, topology: Any, timestep: float, interval: int, append: bool
    ) -> None:
        self._arguments = (str(path), topology, timestep * 1e-3)
        self._interval = interval
        if not append:
            path.write_bytes(b"")
        self._writer = self._open(0, append)

    def _open(self, first: int, append: bool) -> Any:
        from openmm.app import XTCFile

        return XTCFile(*self._arguments, first, self._interval, append=append)

    def write(self, frame: Frame) -> None:
        positions, box = _for_openmm(frame)
        rest = frame.step % self._interval
        # The writer counts steps in intervals; one that starts elsewhere gives another step.
        writer = self._open(rest - self._interval, append=True) if rest else self._writer
        writer.writeModel(positions, periodicBoxVectors=box)

    def close(self) -> None:
        pass


def _dcd_frames(file: Any) -> int:
    """Number of whole frames in a DCD file as OpenMM writes it."""
    header = file.seek(0) or file.read(276)
    n_atoms = int.from_bytes(header[268:272], "little")
    has_box = int.from_bytes(header[48:52], "little")
    frame = 3 * (4 * n_atoms + 8) + (56 if has_box else 0)
    return (file.seek(0, os.SEEK_END) - 276) // frame


def _write_topology(path: Path, topology: Any, atoms: Atoms) -> None:
    from openmm import unit
    from openmm.app import PDBFile

    with path.open("w", encoding="utf-8") as file:
        PDBFile.writeFile(topology, atoms.get_positions() * unit.angstrom, file, keepIds=True)


def _extxyz(template: Atoms, frame: Frame) -> str:
    """One extended-XYZ frame with momenta, energies and time."""
    from ase.io import write

    atoms = template.copy()
    atoms.positions = frame.positions
    if frame.cell.any():
        atoms.cell = frame.cell
    atoms.set_velocities(frame.velocities / units.fs)
    atoms.info = {
        "step": frame.step,
        "time_ps": frame.time,
        "potential_eV": frame.potential,
        "temperature_K": frame.temperature,
    }
    text = io.StringIO()
    write(text, atoms, format="extxyz")
    return text.getvalue()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a crash leaves the old file or the new one, never half of it."""
    _replace(path, (json.dumps(content, indent=2) + "\n").encode())


def write_restart(path: Path, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
    """Write a restart file (npz without pickles), whole or not at all.

    Args:
        path: the file.
        arrays: arrays by name.
        values: JSON values (step, random state, sizes of the growing files).
    """
    buffer = io.BytesIO()
    np.savez(buffer, json=np.array(json.dumps(values)), **arrays)  # type: ignore[arg-type]  # stubs lack **kwargs of arrays
    _replace(path, buffer.getvalue())


def read_restart(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what ``write_restart`` wrote; of its content, what every run has is checked.

    Raises:
        CheckpointError: if there is none or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"there is no {path}: this folder holds no run that can go on")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            values = json.loads(str(arrays.pop("json")))
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is damaged ({error}); start a new run") from error
    kinds = {"step": int, "sizes": dict, "name": str, "sha256": str}
    if not isinstance(values, dict):
        values = {}
    wrong = [name for name, kind in kinds.items() if not isinstance(values.get(name), kind)]
    wrong += sorted({"numbers", "positions", "cell", "pbc"} - arrays.keys())
    if wrong:
        raise CheckpointError(
            f"{path} is damaged ({', '.join(wrong)} missing or wrong); start a new run"
        )
    return arrays, values


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of a log as float arrays; empty cells are NaN."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {c: np.array([float(row[c] or "nan") for row in rows]) for c in COLUMNS}


def slope(time: np.ndarray, values: np.ndarray) -> float | None:
    """Slope of a straight line through values over time, or None for fewer than three points."""
    good = np.isfinite(values)
    if good.sum() < 3 or np.ptp(time[good]) == 0:
        return None
    return float(np.polyfit(time[good], values[good], 1)[0])


def statistics(log: dict[str, np.ndarray], n_atoms: int) -> dict[str, float | None]:
    """Averages over the second half of a log, and the drift of what should be conserved.

    Returns:
        mean_temperature_K and std_temperature_K; drift_meV_per_atom_ps (slope of the conserved
        quantity, None without one or below 1 ps); mean_pressure_bar and mean_density_g_cm3 of
        periodic runs.
    """
    half = slice(len(log["step"]) // 2, None)
    time = log["time_ps"]
    long = len(time) > 0 and np.ptp(time) > DRIFT_PS * (1 - 1e-9)
    drift = slope(time, log["conserved_eV"]) if long else None

    def mean(name: str) -> float | None:
        values = log[name][half]
        return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None

    temperatures = log["temperature_K"][half]
    return {
        "mean_temperature_K": mean("temperature_K"),
        "std_temperature_K": float(np.std(temperatures)) if len(temperatures) else None,
        "drift_meV_per_atom_ps": None if drift is None else 1e3 * drift / n_atoms,
        "mean_pressure_bar": mean("pressure_bar"),
        "mean_density_g_cm3": mean("density_g_cm3"),
    }


def plot(log: dict[str, np.ndarray], path: Path, *, title: str, target: float | None) -> None:
    """Draw energies and temperature over time, and pressure and density where they vary.

    Args:
        log: columns as ``read_log`` gives them.
        path: PNG to write.
        title: heading.
        target: K, temperature of the thermostat, or None.
    """
    # The object-oriented interface leaves the user's matplotlib backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    more = [
        (name, label, color)
        for name, label, color in (
            ("pressure_bar", "pressure (bar)", "tab:purple"),
            ("density_g_cm3", "density (g/cm³)", "tab:green"),
        )
        if np.isfinite(log[name]).any() and np.ptp(log[name]) > 0
    ]
    rows = 2 + len(more)
    figure = Figure(figsize=(8, 2.4 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True)
    time = log["time_ps"]
    style: dict[str, Any] = {"linewidth": 1, "marker": "." if len(time) < 20 else None}
    _plot_energies(axes[0], log, style)
    axes[1].plot(time, log["temperature_K"], color="tab:red", **style)
    if target is not None:
        axes[1].axhline(target, color="black", linestyle="--", linewidth=1, label=f"{target:g} K")
        axes[1].legend(loc="best", fontsize=8)
    axes[1].set_ylabel("temperature (K)")
    for axis, (name, label, color) in zip(axes[2:], more, strict=True):
        axis.plot(time, log[name], color=color, **style)
        axis.set_ylabel(label)
    axes[-1].set_xlabel("time (ps)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.ticklabel_format(axis="y", useOffset=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _plot_energies(axis: Any, log: dict[str, np.ndarray], style: dict[str, Any]) -> None:
    """Energies relative to those of the first frame, so that all curves fit one axis."""
    for name, label, color in (
        ("potential_eV", "potential", "tab:blue"),
        ("kinetic_eV", "kinetic", "tab:orange"),
        ("total_eV", "total", "black"),
        ("conserved_eV", "conserved", "tab:purple"),
    ):
        values = log[name] - log[name][0]
        same = name == "conserved_eV" and np.allclose(log[name], log["total_eV"], rtol=0, atol=1e-9)
        if np.isfinite(values).any() and not same:
            axis.plot(log["time_ps"], values, label=label, color=color, **style)
    axis.set_ylabel("energy change since\nthe first frame (eV)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def summary_lines(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and texts of a summary, for people."""
    lines = [
        ("structure", f"{summary['structure']}, {summary['formula']}, {summary['n_atoms']} atoms"),
        ("model", f"{summary['model']} (sha256 {summary['model_sha256'][:12]}…)"),
        ("engine", f"{summary['engine']}, {summary['integrator']}, {summary['precision']}"),
        ("simulated", f"{summary['time_ps']:.3f} ps, {summary['step']} steps"),
        (
            "speed",
            f"{summary['steps_per_second']:.1f} steps/s, {summary['ns_per_day']:.3g} ns/day "
            f"(compiling took {summary['compile_seconds']:.1f} s more)",
        ),
    ]
    if summary["mean_temperature_K"] is not None:
        mean, spread = summary["mean_temperature_K"], summary["std_temperature_K"]
        lines.append(("temperature", f"{mean:.1f} ± {spread:.1f} K (second half)"))
    if summary["drift_meV_per_atom_ps"] is not None:
        lines.append(("drift", f"{summary['drift_meV_per_atom_ps']:.3g} meV/atom/ps"))
    if summary["mean_pressure_bar"] is not None:
        lines.append(("pressure", f"{summary['mean_pressure_bar']:.0f} bar (second half)"))
        lines.append(("density", f"{summary['mean_density_g_cm3']:.3f} g/cm³ (second half)"))
    return lines


def contents(folder: Path) -> list[tuple[str, str]]:
    """Files of a run folder and what they are for."""
    described = [
        (PLOT, "energies and temperature over time"),
        (LOG, "the same as numbers"),
        *(
            (name, f"mdtraj.load('{name}', top='{TOPOLOGY}')")
            for name in (TRAJECTORY, TRAJECTORY_XTC)
        ),
        (TOPOLOGY, "atoms, residues and bonds"),
        (TRAJECTORY_ASE, f"ase.io.read('{TRAJECTORY_ASE}', ':')"),
        (SUMMARY, "speed, averages, versions"),
        (SETTINGS, "what was run"),
        (RESTART, "where to go on"),
    ]
    return [(name, text) for name, text in described if (folder / name).exists()]
