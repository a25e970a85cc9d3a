"""The growing files of a run: its log, and its trajectories for mdtraj and for ASE."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from ase import Atoms, units

from mlip_md.errors import CheckpointError, OutputError
from mlip_md.files import replacing, sync
from mlip_md.integrations.md.backends.interface import BAR, Frame
from mlip_md.integrations.md.settings import MDSettings
from mlip_md.integrations.md.structures import (
    Structure,
    make_topology,
    reduce_lattice,
    reduce_structure,
)

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
    row: dict[str, float | int | None] = dict.fromkeys(COLUMNS) | {
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

    The trajectory for ASE is in the frame of the structure's file, with its cell vectors; the PDB
    and the trajectory for mdtraj, whose formats have no room for other cells, are turned into that
    of the reduced cell.

    DCD files know the time of their first frame and a constant interval; a last frame between two
    reports has its own time in the log, in the trajectory for ASE and in XTC files only.

    Args:
        folder: the run's folder.
        structure: for elements, periodicity and topology, and positions of the PDB.
        settings: of the run: time step, interval, format of the trajectory for mdtraj.
        sizes: None for a new run; else bytes of each file at the restart point, to which the files
            are cut, so that frames written after it do not appear twice.

    Raises:
        CheckpointError: as ``check_sizes``.
        OutputError: if a file cannot be made.
    """

    def __init__(
        self, folder: Path, structure: Structure, settings: MDSettings, sizes: dict[str, int] | None
    ) -> None:
        self.folder = folder
        reduced = reduce_structure(structure)
        topology = make_topology(reduced)
        trajectory = TRAJECTORIES[settings.trajectory_format]
        self._names = (LOG, trajectory, TRAJECTORY_ASE)
        self._atoms = structure.atoms.copy()
        self._mass = float(structure.atoms.get_masses().sum())
        check_sizes(folder, sizes or {})
        for name, size in (sizes or {}).items():
            os.truncate(folder / name, size)
        # Unbuffered: what a full disk refuses is not tried again when the files are closed.
        self._log = (folder / LOG).open("ab" if sizes else "wb", buffering=0)
        self._ase = (folder / TRAJECTORY_ASE).open("ab" if sizes else "wb", buffering=0)
        make = _XTC if settings.trajectory_format == "xtc" else _DCD
        with self._naming(trajectory):
            self._binary: _DCD | _XTC = make(
                folder / trajectory, topology, settings, append=sizes is not None
            )
        if not sizes:
            with self._naming(LOG):
                _append(self._log, _row(COLUMNS))
            _write_topology(folder / TOPOLOGY, topology, reduced.atoms.positions)

    @property
    def empty(self) -> bool:
        """Whether there is no frame yet."""
        return os.path.getsize(self.folder / TRAJECTORY_ASE) == 0

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Say which file could not be written, and how the run goes on."""
        try:
            yield
        except OSError as error:
            raise OutputError(
                f"{self.folder / name} could not be written ({error.strerror or error}). The "
                "frames before it are whole; make room, and continue with: mlip-md md --restart "
                f"{self.folder}"
            ) from error

    def write(self, frame: Frame) -> None:
        """Append one frame to the log and to both trajectories.

        Raises:
            OutputError: if it has no room; no file holds a part of it then, and all are closed.
        """
        values = make_row(frame, self._mass).values()
        cells = [f"{value:.10g}" if isinstance(value, float) else value for value in values]
        log, trajectory, ase = self._names
        sizes = self.sizes()
        try:
            with self._naming(trajectory):
                self._binary.write(frame)
            with self._naming(ase):
                _append(self._ase, _format_extxyz(self._atoms, frame))
            with self._naming(log):
                _append(self._log, _row(cells))
        except OutputError:
            self.close()
            for name, size in sizes.items():
                os.truncate(self.folder / name, size)
            self._binary.repair()
            raise

    def sizes(self) -> dict[str, int]:
        """Bytes of each growing file as they are now."""
        return {name: (self.folder / name).stat().st_size for name in self._names}

    def sync(self) -> None:
        """Put what has been written on the disk: a restart file must not outlive its frames.

        Raises:
            OutputError: if it cannot be done.
        """
        for name in self._names:
            with self._naming(name):
                sync(self.folder / name)

    def close(self) -> None:
        """Close all files."""
        for file in (self._log, self._ase, self._binary):
            with contextlib.suppress(OSError):  # of a full disk, which has been told
                file.close()


def _row(cells: Sequence[str | int | None]) -> str:
    """One line of the log."""
    text = io.StringIO()
    csv.writer(text).writerow(cells)
    return text.getvalue()


def _append(file: FileIO, text: str) -> None:
    """Write a text whole, or raise OSError."""
    content = text.encode()
    while content:
        content = content[file.write(content) :]


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

    def __init__(self, path: Path, topology: Any, settings: MDSettings, *, append: bool) -> None:
        from openmm.app import DCDFile

        self._path = path
        if append:
            self.repair()
        self._file = path.open("r+b" if append else "w+b")
        timestep = settings.timestep * 1e-3
        self._writer = DCDFile(self._file, topology, timestep, 0, settings.interval, append=append)
        self._file.flush()

    def repair(self) -> None:
        """Let the header count the frames that are there."""
        with self._path.open("r+b") as file:
            frames = _count_dcd_frames(file)
            file.seek(8)
            file.write(frames.to_bytes(4, "little"))

    def write(self, frame: Frame) -> None:
        positions, box = _for_openmm(frame)
        self._writer.writeModel(positions, periodicBoxVectors=box)
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _XTC:
    """A growing XTC file; OpenMM opens and closes it for every frame."""

    def __init__(self, path: Path, topology: Any, settings: MDSettings, *, append: bool) -> None:
        self._path = path
        self._arguments = (str(path), topology, settings.timestep * 1e-3)
        self._interval = settings.interval
        if not append:
            path.write_bytes(b"")
        self._writer = self._open(0, append and path.stat().st_size > 0)

    def _open(self, first: int, append: bool) -> Any:
        from openmm.app import XTCFile

        return XTCFile(*self._arguments, first, self._interval, append=append)

    def write(self, frame: Frame) -> None:
        positions, box = _for_openmm(frame)
        rest = frame.step % self._interval
        # The writer counts steps in intervals; one that starts elsewhere gives another step.
        writer = self._open(rest - self._interval, append=True) if rest else self._writer
        before = self._path.stat().st_size
        writer.writeModel(positions, periodicBoxVectors=box)
        if self._path.stat().st_size == before:  # the writer does not look
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        pass

    def repair(self) -> None:
        """Nothing in the file counts its frames."""


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
    """One extended-XYZ frame with momenta, energy and forces (ASE's names) and time."""
    from ase.calculators.singlepoint import SinglePointCalculator
    from ase.io import write

    atoms = frame.place(template)
    atoms.set_velocities(frame.velocities / units.fs)
    atoms.info = {
        "step": frame.step,
        "time_ps": frame.time,
        "potential_eV": frame.potential,
        "temperature_K": frame.temperature,
    }
    atoms.calc = SinglePointCalculator(atoms, energy=frame.potential, forces=frame.forces)
    text = io.StringIO()
    write(text, atoms, format="extxyz")
    return text.getvalue()


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of a log as float arrays; empty cells are NaN."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {c: np.array([float(row[c] or "nan") for row in rows]) for c in COLUMNS}
