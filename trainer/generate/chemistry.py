"""Molecules as RDKit understands them: parsing, mapped SMILES, bonds and starting conformers."""

import re
from dataclasses import dataclass

import numpy as np

from mlip_md.errors import DataError

COVALENT_RADII = {
    1: 0.31,
    6: 0.76,
    7: 0.71,
    8: 0.66,
    9: 0.57,
    15: 1.07,
    16: 1.05,
    17: 1.02,
    35: 1.20,
}
VAN_DER_WAALS_RADII = {
    1: 1.20,
    6: 1.70,
    7: 1.55,
    8: 1.52,
    9: 1.47,
    15: 1.80,
    16: 1.80,
    17: 1.75,
    35: 1.85,
}
MASSES = {
    1: 1.008,
    6: 12.011,
    7: 14.007,
    8: 15.999,
    9: 18.998,
    15: 30.974,
    16: 32.06,
    17: 35.45,
    35: 79.904,
}


@dataclass(frozen=True)
class Molecule:
    """One molecule, or several side by side, with starting geometries.

    Attributes:
        smiles: canonical SMILES with explicit H and atom-map numbers 1..N in array order.
        atomic_numbers: (N,) int.
        charge: total charge in e.
        bonds: pairs of atom indices.
        ring_bonds: those of `bonds` that are in a ring.
        conformers: (N, 3) positions in Å each; at least one.
        fragments: (N,) int, which of the molecules side by side an atom belongs to.
    """

    smiles: str
    atomic_numbers: np.ndarray
    charge: int
    bonds: tuple[tuple[int, int], ...]
    ring_bonds: frozenset[tuple[int, int]]
    conformers: tuple[np.ndarray, ...]
    fragments: np.ndarray

    @property
    def masses(self) -> np.ndarray:
        """(N,) masses in u."""
        return np.array([MASSES[int(z)] for z in self.atomic_numbers])

    def neighbors(self) -> list[list[int]]:
        """Bonded atoms of each atom."""
        bonded: list[list[int]] = [[] for _ in self.atomic_numbers]
        for first, second in self.bonds:
            bonded[first].append(second)
            bonded[second].append(first)
        return bonded


def require_rdkit() -> None:
    """Check that RDKit is there and quiet its log.

    Raises:
        DataError: RDKit is not installed.
    """
    try:
        from rdkit import rdBase
    except ImportError as error:
        raise DataError(
            "making a data set needs RDKit, which is not installed; "
            "install the extra: pip install 'mlip-md[data]'"
        ) from error
    rdBase.DisableLog("rdApp.*")


def canonical(smiles: str, *, stereo: bool = True) -> str:
    """Canonical SMILES with implicit hydrogens; `stereo=False` drops stereochemistry.

    Raises:
        DataError: not a valid SMILES string.
    """
    from rdkit import Chem

    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None:
        raise DataError(f"{smiles!r} is not a valid SMILES string; correct it in the list")
    return Chem.MolToSmiles(parsed, isomericSmiles=stereo)


def size(smiles: str) -> tuple[int, int]:
    """Number of atoms with hydrogens, and of heavy atoms."""
    from rdkit import Chem

    parsed = Chem.MolFromSmiles(smiles)
    full = Chem.AddHs(parsed)
    heavy = sum(atom.GetAtomicNum() > 1 for atom in full.GetAtoms())
    return full.GetNumAtoms(), heavy


def is_supported(smiles: str) -> bool:
    """Whether a SMILES is valid, of our elements and without unpaired electrons."""
    from rdkit import Chem

    parsed = Chem.MolFromSmiles(smiles)
    if parsed is None:
        return False
    atoms = Chem.AddHs(parsed).GetAtoms()
    return all(a.GetAtomicNum() in MASSES and a.GetNumRadicalElectrons() == 0 for a in atoms)


def build(smiles: str, num_conformers: int, rng: np.random.Generator) -> Molecule:
    """Parse one connected molecule and embed conformers (ETKDG, then MMFF94 or UFF).

    Args:
        smiles: one molecule; hydrogens are added.
        num_conformers: how many starting geometries to try for.
        rng: gives the embedding seed.

    Raises:
        DataError: no conformer could be embedded.
    """
    from rdkit import Chem
    from rdkit.Chem import rdDistGeom, rdForceFieldHelpers

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    seed = int(rng.integers(2**31 - 1))
    ids = list(rdDistGeom.EmbedMultipleConfs(mol, num_conformers, randomSeed=seed))
    if not ids:
        ids = list(
            rdDistGeom.EmbedMultipleConfs(
                mol, num_conformers, randomSeed=seed, useRandomCoords=True
            )
        )
    if not ids:
        raise DataError(f"no conformer of {smiles!r} could be embedded")
    if rdForceFieldHelpers.MMFFHasAllMoleculeParams(mol):
        rdForceFieldHelpers.MMFFOptimizeMoleculeConfs(mol)
    elif rdForceFieldHelpers.UFFHasAllMoleculeParams(mol):
        rdForceFieldHelpers.UFFOptimizeMoleculeConfs(mol)
    bonds = [(bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()) for bond in mol.GetBonds()]
    rings = [pair for pair, bond in zip(bonds, mol.GetBonds(), strict=True) if bond.IsInRing()]
    return Molecule(
        smiles=_mapped_smiles(mol, 0),
        atomic_numbers=np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()]),
        charge=Chem.GetFormalCharge(mol),
        bonds=tuple(bonds),
        ring_bonds=frozenset(rings),
        conformers=tuple(np.array(mol.GetConformer(i).GetPositions()) for i in ids),
        fragments=np.zeros(mol.GetNumAtoms(), dtype=int),
    )


def combine(molecules: list[Molecule]) -> Molecule:
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
        fragments=np.repeat(np.arange(len(molecules)), [len(m.atomic_numbers) for m in molecules]),
    )


def _mapped_smiles(mol, offset: int) -> str:
    from rdkit import Chem

    mapped = Chem.Mol(mol)
    for atom in mapped.GetAtoms():
        atom.SetAtomMapNum(atom.GetIdx() + 1 + offset)
    return Chem.MolToSmiles(mapped)


def _shift_map_numbers(smiles: str, offset: int) -> str:
    return re.sub(r":(\d+)\]", lambda match: f":{int(match.group(1)) + offset}]", smiles)
