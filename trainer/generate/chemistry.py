"""Molecules as RDKit understands them: parsing, mapped SMILES, bonds and starting conformers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mlip_md.errors import DataError

if TYPE_CHECKING:
    from rdkit.Chem import Mol


class ElementFacts(NamedTuple):
    """Radii in Å, mass in u, and the unpaired electrons of the neutral atom's ground state.

    Covalent radii: Cordero et al., Dalton Trans. 2008, 2832; van der Waals: Bondi (1964).
    """

    covalent_radius: float
    van_der_waals_radius: float
    mass: float
    unpaired_electrons: int


ELEMENTS = {
    1: ElementFacts(0.31, 1.20, 1.008, 1),
    6: ElementFacts(0.76, 1.70, 12.011, 2),
    7: ElementFacts(0.71, 1.55, 14.007, 3),
    8: ElementFacts(0.66, 1.52, 15.999, 2),
    9: ElementFacts(0.57, 1.47, 18.998, 1),
    15: ElementFacts(1.07, 1.80, 30.974, 3),
    16: ElementFacts(1.05, 1.80, 32.06, 2),
    17: ElementFacts(1.02, 1.75, 35.45, 1),
    35: ElementFacts(1.20, 1.85, 79.904, 1),
}
"""What the data set is made of, by atomic number."""

ORIGINS = (
    "md",
    "quench",
    "stretch",
    "angle",
    "twist",
    "rattle",
    "contact",
    "hydrogen bond",
    "water model",
    "expansion",
    "trial step",
    "clash",
    "separation",
    "pressed",
)
"""Ways in which a conformation is made; files keep the index."""


@dataclass(frozen=True)
class Conformation:
    """One sampled geometry: positions (N, 3) in Å, and which of `ORIGINS` made it."""

    positions: np.ndarray
    origin: str


@dataclass(frozen=True)
class Molecule:
    """One molecule, or several side by side, with starting geometries.

    Attributes:
        smiles: canonical SMILES with explicit H and atom-map numbers 1..N in array order.
        atomic_numbers: (N,) int.
        charge: total charge in e.
        bonds: pairs of atom indices.
        ring_bonds: those of `bonds` that are in a ring.
        conformers: (N, 3) positions in Å each; none for molecules side by side.
    """

    smiles: str
    atomic_numbers: np.ndarray
    charge: int
    bonds: tuple[tuple[int, int], ...]
    ring_bonds: frozenset[tuple[int, int]]
    conformers: tuple[np.ndarray, ...]

    @property
    def masses(self) -> np.ndarray:
        """(N,) in u."""
        return np.array([ELEMENTS[int(z)].mass for z in self.atomic_numbers])

    @property
    def radii(self) -> np.ndarray:
        """(N,) van der Waals radii in Å."""
        return np.array([ELEMENTS[int(z)].van_der_waals_radius for z in self.atomic_numbers])

    @property
    def covalent_radii(self) -> np.ndarray:
        """(N,) in Å."""
        return np.array([ELEMENTS[int(z)].covalent_radius for z in self.atomic_numbers])

    @property
    def bonded(self) -> list[list[int]]:
        """Indices of the atoms that are bonded to each atom."""
        partners: list[list[int]] = [[] for _ in self.atomic_numbers]
        for first, second in self.bonds:
            partners[first].append(second)
            partners[second].append(first)
        return partners


Sample = tuple[Molecule, list[Conformation]]
"""What a task gives: a molecule and its conformations."""


def canonicalize(smiles: str, *, stereo: bool = True) -> str:
    """Canonical SMILES with implicit hydrogens; `stereo=False` drops stereochemistry.

    Raises:
        DataError: not a valid SMILES string.
    """
    from rdkit import Chem

    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None:
        raise DataError(f"{smiles!r} is not a valid SMILES string; correct it in the list")
    return Chem.MolToSmiles(parsed, isomericSmiles=stereo)


def count_atoms(smiles: str) -> tuple[int, int]:
    """Number of atoms of a valid SMILES with hydrogens, and of heavy atoms."""
    from rdkit import Chem

    full = Chem.AddHs(Chem.MolFromSmiles(smiles))
    return full.GetNumAtoms(), full.GetNumHeavyAtoms()


def is_supported(smiles: str) -> bool:
    """Whether a SMILES is valid, of our elements and without unpaired electrons."""
    from rdkit import Chem

    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None:
        return False
    atoms = Chem.AddHs(parsed).GetAtoms()
    return all(a.GetAtomicNum() in ELEMENTS and a.GetNumRadicalElectrons() == 0 for a in atoms)


def build_molecule(smiles: str, num_conformers: int, rng: np.random.Generator) -> Molecule:
    """Parse one connected molecule and embed conformers (ETKDG, then MMFF94 or UFF).

    Args:
        smiles: one molecule; hydrogens are added.
        num_conformers: how many starting geometries to try for.
        rng: gives the embedding seed.

    Raises:
        DataError: no conformer could be embedded.
    """
    from rdkit import Chem

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    conformers = _embed(mol, num_conformers, seed=int(rng.integers(2**31 - 1)))
    if not conformers:
        raise DataError(f"no conformer of {smiles!r} could be embedded")
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()]
    rings = [pair for pair, bond in zip(bonds, mol.GetBonds(), strict=True) if bond.IsInRing()]
    for atom in mol.GetAtoms():
        atom.SetAtomMapNum(atom.GetIdx() + 1)
    return Molecule(
        smiles=Chem.MolToSmiles(mol),
        atomic_numbers=np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()]),
        charge=Chem.GetFormalCharge(mol),
        bonds=tuple(bonds),
        ring_bonds=frozenset(rings),
        conformers=conformers,
    )


def _embed(mol: Mol, count: int, seed: int) -> tuple[np.ndarray, ...]:
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    for random_start in (False, True):
        ids = rdDistGeom.EmbedMultipleConfs(
            mol, count, randomSeed=seed, useRandomCoords=random_start
        )
        if len(ids):
            break
    else:
        return ()
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
        rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(mol)
    elif rdForceFieldHelpers.UFFHasAllMoleculeParams(mol):
        rdForceFieldHelpers.UFFOptimizeMoleculeConfs(mol)
    return tuple(np.array(conformer.GetPositions()) for conformer in mol.GetConformers())


def count_unpaired(atomic_numbers: np.ndarray, charge: int = 0) -> int:
    """Unpaired electrons of a structure: of an atom its ground state's, else as few as can be.

    GFN2-xTB has no term for the spin: its energy does not tell multiplicities apart, but for how
    many orbitals they fill. The fewest unpaired electrons fill the lowest ones.
    """
    if len(atomic_numbers) == 1 and charge == 0:
        return ELEMENTS[int(atomic_numbers[0])].unpaired_electrons
    return int(atomic_numbers.sum() - charge) % 2


def join_molecules(molecules: list[Molecule]) -> Molecule:
    """Several molecules as one, without conformers: their placement is up to the caller."""
    bonds: list[tuple[int, int]] = []
    rings: list[tuple[int, int]] = []
    smiles, offset = [], 0
    for molecule in molecules:
        smiles.append(_shift_map_numbers(molecule.smiles, offset))
        bonds += [(a + offset, b + offset) for a, b in molecule.bonds]
        rings += [(a + offset, b + offset) for a, b in molecule.ring_bonds]
        offset += len(molecule.atomic_numbers)
    return Molecule(
        smiles=".".join(smiles),
        atomic_numbers=np.concatenate([m.atomic_numbers for m in molecules]),
        charge=sum(m.charge for m in molecules),
        bonds=tuple(bonds),
        ring_bonds=frozenset(rings),
        conformers=(),
    )


def _shift_map_numbers(smiles: str, offset: int) -> str:
    return re.sub(r":(\d+)\]", lambda match: f":{int(match.group(1)) + offset}]", smiles)
