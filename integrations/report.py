"""What a run leaves behind: log, trajectories, plot, summary and restart file."""

from __future__ import annotations

import csv
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms, units

from mlip_md.errors import CheckpointError

LOG = "log.csv"
TOPOLOGY = "topology.pdb"
TRAJECTORY = "trajectory.dcd"
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


class RunFiles:
    """The growing files of a run: log and trajectories, for mdtraj (DCD + PDB) and for ASE.

    Args:
        folder: the run's folder.
        atoms: the structure, for elements and periodicity.
        topology: its OpenMM topology.
        timestep: fs.
        interval: steps between frames.
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
        sizes: dict[str, int] | None = None,
    ) -> None:
        self.folder = folder
        self.frames = 0
        self._atoms = atoms.copy()
        self._mass = float(atoms.get_masses().sum())
        for name, size in (sizes or {}).items():
            _cut(folder / name, size)
        self._log = (folder / LOG).open("a" if sizes else "w", newline="", encoding="utf-8")
        self._ase = (folder / TRAJECTORY_ASE).open("a" if sizes else "w", encoding="utf-8")
        self._binary = (folder / TRAJECTORY).open("r+b" if sizes else "w+b")
        self._dcd = _dcd(self._binary, topology, timestep, interval, sizes is not None)
        if not sizes:
            csv.DictWriter(self._log, COLUMNS).writeheader()
            _write_topology(folder / TOPOLOGY, topology, atoms)

    def write(self, frame: Frame) -> None:
        """Append one frame to the log and to both trajectories."""
        row = log_row(frame, self._mass)
        cells = {k: _number(v) for k, v in row.items()}
        csv.DictWriter(self._log, COLUMNS).writerow(cells)
        from openmm import Vec3, unit

        box = [Vec3(*v) for v in frame.cell] * unit.angstrom if frame.cell.any() else None
        self._dcd.writeModel(frame.positions * unit.angstrom, periodicBoxVectors=box)
        self._ase.write(_extxyz(self._atoms, frame))
        for file in (self._log, self._ase, self._binary):
            file.flush()
        self.frames += 1

    def sizes(self) -> dict[str, int]:
        """Bytes of each growing file as they are now."""
        return {n: (self.folder / n).stat().st_size for n in (LOG, TRAJECTORY, TRAJECTORY_ASE)}

    def close(self) -> None:
        """Close all files."""
        for file in (self._log, self._ase, self._binary):
            file.close()


def _number(value: float | int | None) -> str | int:
    if value is None:
        return ""
    return value if isinstance(value, int) else f"{value:.10g}"


def _cut(path: Path, size: int) -> None:
    if not path.exists() or path.stat().st_size < size:
        raise CheckpointError(f"{path} is shorter than when the restart file was written")
    os.truncate(path, size)


def _dcd(file: Any, topology: Any, timestep: float, interval: int, append: bool) -> Any:
    """OpenMM's DCD writer; after a cut the frame count in the header is put right."""
    from openmm.app import DCDFile

    if append:
        frames = _dcd_frames(file)
        file.seek(8)
        file.write(frames.to_bytes(4, "little"))
        file.flush()
    return DCDFile(file, topology, timestep * 1e-3, interval, interval, append=append)


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
    """Read what ``write_restart`` wrote.

    Raises:
        CheckpointError: if there is none or it is damaged.
    """
    if not path.exists():
        raise CheckpointError(f"there is no {path}: this folder holds no run that can go on")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            values = json.loads(str(arrays.pop("json")))
    except (ValueError, OSError, KeyError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); start a new run") from error
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
        quantity, None without one); mean_pressure_bar and mean_density_g_cm3 of periodic runs.
    """
    half = slice(len(log["step"]) // 2, None)
    drift = slope(log["time_ps"], log["conserved_eV"])

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
    """Draw energies and temperature (and density, where there is one) over time.

    Args:
        log: columns as ``read_log`` gives them.
        path: PNG to write.
        title: heading.
        target: K, temperature of the thermostat, or None.
    """
    # The object-oriented interface leaves the user's matplotlib backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    periodic = bool(np.isfinite(log["density_g_cm3"]).any())
    rows = 3 if periodic else 2
    figure = Figure(figsize=(8, 2.6 * rows + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True)
    time = log["time_ps"]
    _plot_energies(axes[0], log)
    axes[1].plot(time, log["temperature_K"], color="tab:red", linewidth=1)
    if target is not None:
        axes[1].axhline(target, color="black", linestyle="--", linewidth=1, label=f"{target:g} K")
        axes[1].legend(loc="lower right", fontsize=8)
    axes[1].set_ylabel("temperature (K)")
    if periodic:
        axes[2].plot(time, log["density_g_cm3"], color="tab:green", linewidth=1)
        axes[2].set_ylabel("density (g/cm³)")
    axes[-1].set_xlabel("time (ps)")
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.ticklabel_format(axis="y", useOffset=False)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=130)


def _plot_energies(axis: Any, log: dict[str, np.ndarray]) -> None:
    """Energies relative to the first total energy, so that all curves fit one axis."""
    time, origin = log["time_ps"], log["potential_eV"][0]
    for name, label, color in (
        ("potential_eV", "potential", "tab:blue"),
        ("kinetic_eV", "kinetic", "tab:orange"),
        ("total_eV", "total", "black"),
        ("conserved_eV", "conserved", "tab:purple"),
    ):
        values = log[name] - (0.0 if name == "kinetic_eV" else origin)
        same = name == "conserved_eV" and np.allclose(log[name], log["total_eV"], rtol=0, atol=1e-9)
        if np.isfinite(values).any() and not same:
            axis.plot(time, values, label=label, color=color, linewidth=1)
    axis.set_ylabel(f"energy (eV)\nzero: potential {origin:.3f} eV")
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
        (PLOT, "energies and temperature"),
        (LOG, "the same as numbers"),
        (TRAJECTORY, f"for mdtraj: mdtraj.load('{TRAJECTORY}', top='{TOPOLOGY}')"),
        (TOPOLOGY, "atoms, residues and bonds"),
        (TRAJECTORY_ASE, f"for ASE: ase.io.read('{TRAJECTORY_ASE}', ':')"),
        (SUMMARY, "settings, speed, averages"),
        (RESTART, "where to go on"),
    ]
    return [(name, text) for name, text in described if (folder / name).exists()]
