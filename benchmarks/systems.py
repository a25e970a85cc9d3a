"""The structures that steps are timed on, and the script that made their files.

    python benchmarks/systems.py

Packings are as close as molecules and proteins are (0.1 atoms/Å³, no two atoms within 1.2 Å), in a
ball, of the elements of proteins; waters are rigid molecules in a periodic cube, turned at random,
at 0.997 g/cm³. The files in ``systems/`` are what is timed: runs of different days compare.
"""

from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms
from ase.build import molecule

FOLDER = Path(__file__).with_name("systems")
PROTEIN = {"H": 0.50, "C": 0.32, "N": 0.085, "O": 0.09, "S": 0.005}
"""Shares of elements."""
DENSITY = 0.1
"""Atoms/Å³ of packings."""
CLOSEST = 1.2
"""Å, between atoms of a packing."""
WATERS = 0.03333
"""Molecules/Å³."""

ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
"""SMILES."""


def pack(n_atoms: int, seed: int) -> Atoms:
    """Atoms at random in a ball, one after the other, none close to those before."""
    rng = np.random.default_rng(seed)
    radius = (n_atoms / DENSITY * 3 / (4 * np.pi)) ** (1 / 3)
    placed = np.empty((0, 3))
    while len(placed) < n_atoms:
        point = rng.uniform(-radius, radius, 3)
        if np.linalg.norm(point) < radius and (
            np.linalg.norm(placed - point, axis=1).min(initial=CLOSEST + 1) > CLOSEST
        ):
            placed = np.vstack([placed, point])
    return Atoms(rng.choice(list(PROTEIN), n_atoms, p=list(PROTEIN.values())), placed)


def water_box(n_atoms: int, seed: int) -> Atoms:
    """Waters on a cubic grid that fills a periodic cube, turned at random."""
    rng = np.random.default_rng(seed)
    n = n_atoms // 3
    length, side = (n / WATERS) ** (1 / 3), int(np.ceil(n ** (1 / 3)))
    places = np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)[:n] + 0.5
    box = Atoms(cell=np.eye(3) * length, pbc=True)
    for place in places:
        one = molecule("H2O")
        one.rotate(rng.uniform(0, 360), rng.normal(size=3), center="COM")
        one.translate(place * length / side - one.get_center_of_mass())
        box += one
    return box


def aspirin(seed: int) -> Atoms:
    """Aspirin by RDKit's force field (extra [data])."""
    from rdkit import Chem
    from rdkit.Chem import AllChem

    mol = Chem.AddHs(Chem.MolFromSmiles(ASPIRIN))
    AllChem.EmbedMolecule(mol, randomSeed=seed)
    AllChem.MMFFOptimizeMolecule(mol)
    numbers = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    return Atoms(numbers, mol.GetConformer().GetPositions())


SYSTEMS = {
    "aspirin": lambda: aspirin(1),
    "packing138": lambda: pack(138, 2),
    "packing1205": lambda: pack(1205, 3),
    "water192": lambda: water_box(192, 4),
    "water648": lambda: water_box(648, 5),
    "water3000": lambda: water_box(3000, 6),
}


def read(name: str) -> Atoms:
    """One of the structures."""
    return ase.io.read(FOLDER / f"{name}.xyz")


def main() -> None:
    """Write all files."""
    FOLDER.mkdir(exist_ok=True)
    for name, make in SYSTEMS.items():
        atoms = make()
        atoms.positions = atoms.positions.round(4)
        atoms.info, atoms.arrays = {}, {k: atoms.arrays[k] for k in ("numbers", "positions")}
        ase.io.write(
            FOLDER / f"{name}.xyz", atoms, format="extxyz", columns=["symbols", "positions"]
        )
        print(name, len(atoms))


if __name__ == "__main__":
    main()
