"""What a run leaves for people: averages, plot, summary, and a list of its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.files import replacing, write_text
from mlip_md.integrations.md.files import LOG, TOPOLOGY, TRAJECTORIES, TRAJECTORY_ASE
from mlip_md.integrations.md.restart import RESTART
from mlip_md.integrations.md.settings import SETTINGS

PLOT = "energies.png"
SUMMARY = "summary.json"
"""Names of the files in a run folder."""

DRIFT_PS = 1.0
"""Shortest log (ps) of which a drift is told; below, the slope is that of fluctuations."""

_ROWS = (
    ("pressure_bar", "pressure (bar)", "tab:purple"),
    ("density_g_cm3", "density (g/cm³)", "tab:green"),
)
_ENERGIES = (
    ("potential_eV", "potential", "tab:blue"),
    ("kinetic_eV", "kinetic", "tab:orange"),
    ("total_eV", "total", "black"),
    ("conserved_eV", "conserved", "tab:purple"),
)
"""Columns of the log in the plot, with label and color."""


def _slope(time: np.ndarray, values: np.ndarray) -> float | None:
    """Slope of a straight line through values over time, or None for fewer than three points."""
    good = np.isfinite(values)
    if good.sum() < 3 or np.ptp(time[good]) == 0:
        return None
    return float(np.polyfit(time[good], values[good], 1)[0])


def compute_averages(log: dict[str, np.ndarray], n_atoms: int) -> dict[str, float | None]:
    """Averages over the second half of a log, and the drift of what should be conserved.

    Args:
        log: columns as ``read_log`` gives them.
        n_atoms: number of atoms.

    Returns:
        mean_temperature_K and std_temperature_K; drift_meV_per_atom_ps (slope of the conserved
        quantity, None without one or below 1 ps); mean_pressure_bar and mean_density_g_cm3 of
        periodic runs.
    """
    half = slice(len(log["step"]) // 2, None)
    time = log["time_ps"]
    long = len(time) > 0 and np.ptp(time) > DRIFT_PS * (1 - 1e-9)
    drift = _slope(time, log["conserved_eV"]) if long else None

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


def draw_plot(log: dict[str, np.ndarray], path: Path, *, title: str, target: float | None) -> None:
    """Draw energies and temperature over time, and pressure and density where they vary.

    Args:
        log: columns as ``read_log`` gives them.
        path: PNG to write.
        title: heading.
        target: K, temperature of the thermostat, or None.

    Raises:
        OutputError: if the file cannot be written.
    """
    # The object-oriented interface leaves the user's matplotlib backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    more = [row for row in _ROWS if np.isfinite(log[row[0]]).any() and np.ptp(log[row[0]]) > 0]
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
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def _plot_energies(axis: Any, log: dict[str, np.ndarray], style: dict[str, Any]) -> None:
    """Energies relative to those of the first frame, so that all curves fit one axis."""
    for name, label, color in _ENERGIES:
        values = log[name] - log[name][0]
        same = name == "conserved_eV" and np.allclose(log[name], log["total_eV"], rtol=0, atol=1e-9)
        if np.isfinite(values).any() and not same:
            axis.plot(log["time_ps"], values, label=label, color=color, **style)
    axis.set_ylabel("energy change since\nthe first frame (eV)")
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)


def describe_summary(summary: dict[str, Any]) -> list[tuple[str, str]]:
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


def list_contents(folder: Path) -> list[tuple[str, str]]:
    """Files of a run folder and what they are for."""
    described = [
        (PLOT, "energies and temperature over time"),
        (LOG, "the same as numbers"),
        *((name, f"mdtraj.load('{name}', top='{TOPOLOGY}')") for name in TRAJECTORIES.values()),
        (TOPOLOGY, "atoms, residues and bonds"),
        (TRAJECTORY_ASE, f"ase.io.read('{TRAJECTORY_ASE}', ':')"),
        (SUMMARY, "speed, averages, versions"),
        (SETTINGS, "what was run"),
        (RESTART, "where to go on"),
    ]
    return [(name, text) for name, text in described if (folder / name).exists()]


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write the summary of a run, JSON values by name, into its folder.

    Raises:
        OutputError: if the file cannot be written.
    """
    write_text(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def read_summary(folder: Path) -> dict[str, Any]:
    """Read what ``write_summary`` wrote."""
    content: dict[str, Any] = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    return content
