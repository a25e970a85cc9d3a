"""The growing files of a run: its log, and its trajectories for mdtraj and for ASE."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ase import Atoms, units

from mlip_md.errors import CheckpointError
from mlip_md.files import replacing
from mlip_md.integrations.md.backends.interface import BAR, Frame
from mlip_md.integrations.md.structures import reduce_lattice

LOG = "log.csv"
TOPOLOGY = "topology.pdb"
TRAJECTORY_ASE = "trajectory.extxyz"
TRAJECTORIES = {"dcd": "trajectory.dcd", "xtc": "trajectory.xtc"}
"""Names of the files in a run folder; the trajectory for mdtraj by its format."""

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


def make_row(frame: Frame, mass: float) -> dict[str, float | int | None]:
    """One row of the log, by column; ``mass`` of all atoms in amu, for the density."""
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

    The log and the trajectory for ASE are in the frame of the run; the PDB and the trajectory for
    mdtraj, whose formats have no room for other cells, are turned into that of the reduced cell.

    DCD files know the time of their first frame and a constant interval; a last frame between two
    reports has its own time in the log, in the trajectory for ASE and in XTC files only.

    Args:
        folder: the run's folder.
        atoms: the structure, for elements and periodicity.
        topology: its OpenMM topology, in the frame of its reduced cell.
        timestep: fs.
        interval: steps between frames.
        trajectory_format: of the trajectory for mdtraj, "dcd" or "xtc".
        sizes: None for a new run; else bytes of each file at the restart point, to which the files
            are cut, so that frames written after it do not appear twice.

    Raises:
        CheckpointError: as ``check_sizes``.
    """

    def __init__(
        self,
        folder: Path,
        atoms: Atoms,
        topology: Any,
        *,
        timestep: float,
        interval: int,
        trajectory_format: str = "dcd",
        sizes: dict[str, int] | None = None,
    ) -> None:
        self.folder = folder
        trajectory = TRAJECTORIES[trajectory_format]
        self._names = (LOG, trajectory, TRAJECTORY_ASE)
        self._atoms = atoms.copy()
        self._mass = float(atoms.get_masses().sum())
        check_sizes(folder, sizes or {})
        for name, size in (sizes or {}).items():
            os.truncate(folder / name, size)
        self._log = (folder / LOG).open("a" if sizes else "w", newline="", encoding="utf-8")
        self._ase = (folder / TRAJECTORY_ASE).open("a" if sizes else "w", encoding="utf-8")
        make = _XTC if trajectory_format == "xtc" else _DCD
        self._binary: _DCD | _XTC = make(
            folder / trajectory, topology, timestep, interval, sizes is not None
        )
        if not sizes:
            csv.DictWriter(self._log, COLUMNS).writeheader()
            positions = atoms.positions
            if topology.getPeriodicBoxVectors() is not None:
                positions = positions @ reduce_lattice(atoms.cell.array)[1].T
            _write_topology(folder / TOPOLOGY, topology, positions)

    def write(self, frame: Frame) -> None:
        """Append one frame to the log and to both trajectories."""
        cells = {name: _cell(value) for name, value in make_row(frame, self._mass).items()}
        csv.DictWriter(self._log, COLUMNS).writerow(cells)
        self._binary.write(frame)
        self._ase.write(_format_extxyz(self._atoms, frame))
        for file in (self._log, self._ase):
            file.flush()

    def sizes(self) -> dict[str, int]:
        """Bytes of each growing file as they are now."""
        return {name: (self.folder / name).stat().st_size for name in self._names}

    def close(self) -> None:
        """Close all files."""
        for file in (self._log, self._ase, self._binary):
            file.close()


def _cell(value: float | int | None) -> str | int:
    if value is None:
        return ""
    return value if isinstance(value, int) else f"{value:.10g}"


def _for_openmm(frame: Frame) -> tuple[Any, Any]:
    """Positions and box vectors (or None) with OpenMM's units, turned together into its frame."""
    from openmm import Vec3, unit

    if not frame.cell.any():
        return frame.positions * unit.angstrom, None
    reduced, rotation = reduce_lattice(frame.cell)
    box = [Vec3(*v) for v in reduced] * unit.angstrom
    return frame.positions @ rotation.T * unit.angstrom, box


class _DCD:
    """A growing DCD file; after a cut the frame count in its header is put right."""

    def __init__(
        self, path: Path, topology: Any, timestep: float, interval: int, append: bool
    ) -> None:
        from openmm.app import DCDFile

        self._file = path.open("r+b" if append else "w+b")
        if append:
            frames = _count_dcd_frames(self._file)
            self._file.seek(8)
            self._file.write(frames.to_bytes(4, "little"))
            self._file.flush()
        self._writer = DCDFile(self._file, topology, timestep * 1e-3, 0, interval, append=append)

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


def _count_dcd_frames(file: BinaryIO) -> int:
    """Number of whole frames in a DCD file as OpenMM writes it."""
    file.seek(0)
    header = file.read(276)
    n_atoms = int.from_bytes(header[268:272], "little")
    has_box = int.from_bytes(header[48:52], "little")
    frame = 3 * (4 * n_atoms + 8) + (56 if has_box else 0)
    return (file.seek(0, os.SEEK_END) - 276) // frame


def _write_topology(path: Path, topology: Any, positions: np.ndarray) -> None:
    from openmm import unit
    from openmm.app import PDBFile

    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        PDBFile.writeFile(topology, positions * unit.angstrom, file, keepIds=True)


def _format_extxyz(template: Atoms, frame: Frame) -> str:
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


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of a log as float arrays; empty cells are NaN."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {c: np.array([float(row[c] or "nan") for row in rows]) for c in COLUMNS}
