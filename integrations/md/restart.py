"""The restart file of a run, from which it continues exactly: npz without pickles."""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from mlip_md.errors import CheckpointError
from mlip_md.files import write_bytes
from mlip_md.integrations.md.files import TOPOLOGY
from mlip_md.integrations.md.held import hold
from mlip_md.integrations.md.structures import Structure, fixed_axes, read_structure
from mlip_md.integrations.versions import find_version_problem

RESTART = "restart.npz"
"""Name of the file in a run folder."""
VERSION = 2
"""Of that file; 1 stated none, and had neither masses nor constraints."""

_ARRAYS = ("numbers", "positions", "cell", "pbc")
_VALUES = {"step": int, "sizes": dict, "name": str, "sha256": str}
"""What the restart file of every run has, beside the state of its engine."""


def write_restart(path: Path, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
    """Write a restart file, whole or not at all.

    Args:
        path: the file.
        arrays: arrays by name.
        values: JSON values (step, random state, sizes of the growing files).

    Raises:
        OutputError: if it cannot be written; the old file is untouched then.
    """
    buffer, text = io.BytesIO(), json.dumps(values | {"version": VERSION})
    np.savez(buffer, json=np.array(text), **arrays)  # type: ignore[arg-type]  # stubs lack **kwargs of arrays
    write_bytes(path, buffer.getvalue())


def read_restart(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read what ``write_restart`` wrote; of its content, what every run has is checked.

    Returns:
        Arrays and JSON values.

    Raises:
        CheckpointError: if there is none, or it is damaged or of a newer version.
    """
    if not path.exists():
        raise CheckpointError(
            f"there is no {path}: this folder holds no run that can go on, only one that ended "
            "before its first step; start it again in another folder"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
            values = json.loads(str(arrays.pop("json")))
    except (ValueError, OSError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise CheckpointError(f"{path} is damaged ({error}); start a new run") from error
    if not isinstance(values, dict):
        values = {}
    if problem := find_version_problem(values.pop("version", 1), VERSION):
        raise CheckpointError(f"{path} {problem}")
    wrong = [name for name, kind in _VALUES.items() if not isinstance(values.get(name), kind)]
    wrong += sorted(set(_ARRAYS) - arrays.keys())
    if wrong:
        raise CheckpointError(
            f"{path} is damaged ({', '.join(wrong)} missing or wrong); start a new run"
        )
    return arrays, values


def describe_atoms(atoms: Atoms) -> dict[str, np.ndarray]:
    """What a run must know of its atoms beside their motion, as arrays of the restart file."""
    own = {"masses": atoms.arrays["masses"]} if "masses" in atoms.arrays else {}
    return {"numbers": atoms.numbers, "pbc": atoms.pbc, "fixed": fixed_axes(atoms), **own}


def read_saved_structure(folder: Path, arrays: dict[str, np.ndarray], name: str) -> Structure:
    """The structure at the restart point; the file it first came from is not needed.

    Args:
        folder: the run's, with its topology.
        arrays: of the restart file; without masses they are the elements', or those of the
            topology's isotopes. Those of version 0.1.0 held nothing.
        name: the structure's.

    Raises:
        CheckpointError: if the topology is missing or of another structure.
    """
    path = folder / TOPOLOGY
    if not path.exists():
        raise CheckpointError(f"there is no {path}, without which the run cannot go on")
    saved = read_structure(path)
    topology = saved.topology
    numbers = [atom.element.atomic_number for atom in topology.atoms()]
    if numbers != arrays["numbers"].tolist():
        raise CheckpointError(f"{path} has other atoms than {RESTART}")
    atoms = Atoms(
        numbers,
        arrays["positions"],
        cell=arrays["cell"],
        pbc=arrays["pbc"],
        masses=arrays.get("masses", saved.atoms.arrays.get("masses")),
    )
    hold(atoms, arrays.get("fixed", np.zeros((len(atoms), 3), bool)))
    return Structure(name, atoms, topology)
