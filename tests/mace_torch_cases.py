"""Models of mace-torch and what it computes, made by ``make_mace_torch_models.py``."""

import functools
import json
import lzma
from pathlib import Path
from typing import NamedTuple

import ase.io
import numpy as np

FOLDER = Path(__file__).parent / "data" / "mace_torch"
NAMES = sorted(path.name.removesuffix(".model.xz") for path in FOLDER.glob("*.model.xz"))


class Numbers(NamedTuple):
    """Energy (eV), forces (eV/Å) and stress (eV/Å³)."""

    energy: float
    forces: np.ndarray
    stress: np.ndarray | None


def content(name: str, kind: str = "model") -> bytes:
    """The file of a model: saved whole, or its state dict with the configuration (``state``)."""
    return lzma.decompress((FOLDER / f"{name}.{kind}.xz").read_bytes())


def write_torch_model(folder: Path, name: str) -> Path:
    """The file of a model, in a folder."""
    path = folder / f"{name}.model"
    path.write_bytes(content(name))
    return path


def expected(name: str) -> dict[str, list[Numbers]]:
    """By head, what mace-torch says of the structures: interaction energies, forces, stresses."""
    numbers: dict[str, list[Numbers]] = {}
    for result in json.loads((FOLDER / f"{name}.json").read_text())["results"]:
        stress = None if result["stress"] is None else np.array(result["stress"])
        row = Numbers(result["energy"], np.array(result["forces"]), stress)
        numbers.setdefault(result["head"], []).append(row)
    return numbers


@functools.cache
def structures():
    """The structures."""
    return ase.io.read(FOLDER / "structures.extxyz", ":")


def of_calculator(name: str, head: str) -> list[tuple[ase.Atoms, Numbers]]:
    """Structures and what mace-torch's ASE calculator says of them: total energies, forces."""
    found = ase.io.read(FOLDER / "calculator.extxyz", ":")
    results = json.loads((FOLDER / "calculator.json").read_text())[f"{name} {head}"]
    rows = [Numbers(r["energy"], np.array(r["forces"]), None) for r in results]
    return list(zip(found, rows, strict=True))
