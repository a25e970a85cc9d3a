"""The bundled potential does what its card says, on structures made here."""

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import BFGS

import mlip_md
from mlip_md import bundled
from mlip_md.integrations.ase import MLIPCalculator

NAME = "organics-gfn2"
UNSEEN = ("CC(C)CC(NC(C)=O)C(=O)NC", "O=S1(=O)CCNC1", "CC(=O)Nc1cc(F)ccc1O", "CP(C)(=O)CF")


@pytest.fixture(scope="module")
def calculator() -> Calculator:
    return MLIPCalculator(NAME)


def test_file_is_small_and_describes_itself():
    potential = mlip_md.load(NAME)
    assert NAME in bundled.names()
    assert bundled.path(NAME).stat().st_size <= 3_000_000
    assert [int(z) for z in potential.elements] == [1, 6, 7, 8, 9, 15, 16, 17, 35]
    card = bundled.path(NAME).with_suffix(".md").read_text(encoding="utf-8")
    for fact in ("GFN2-xTB", "not DFT", "mlip-md make-dataset", "seed", "held-out", "Not for"):
        assert fact in card
    assert potential.sha256 in card  # the numbers in the card are of this very file


def strained_conformer(smiles: str, seed: int) -> Atoms:
    chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem import AllChem

    mol = chem.AddHs(chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(mol, randomSeed=seed)
    AllChem.MMFFOptimizeMolecule(mol)
    positions = mol.GetConformer().GetPositions()
    positions += 0.03 * np.random.default_rng(seed).normal(size=positions.shape)
    return Atoms([a.GetAtomicNum() for a in mol.GetAtoms()], positions)


def gfn2(atoms: Atoms) -> tuple[float, np.ndarray]:
    interface = pytest.importorskip("tblite.interface")
    xtb = interface.Calculator("GFN2-xTB", atoms.numbers, atoms.positions / units.Bohr)
    xtb.set("verbosity", 0)
    result = xtb.singlepoint()
    return result["energy"] * units.Hartree, -result["gradient"] * units.Hartree / units.Bohr


@pytest.mark.parametrize("smiles", UNSEEN)
def test_imitates_its_teacher_on_unseen_molecules(calculator, smiles):
    atoms = strained_conformer(smiles, seed=3)
    atoms.calc = calculator
    energy, forces = gfn2(atoms)
    assert np.abs(forces).mean() > 0.5  # eV/Å: something to imitate
    assert np.abs(atoms.get_forces() - forces).mean() < 0.15 * np.abs(forces).mean()
    assert abs(atoms.get_potential_energy() - energy) / len(atoms) < 0.03


def test_water_has_its_shape(calculator):
    from ase.optimize import BFGS

    water = molecule("H2O")
    water.calc = calculator
    BFGS(water, logfile=None).run(fmax=0.01, steps=50)
    assert water.get_distance(0, 1) == pytest.approx(0.96, abs=0.02)  # GFN2-xTB: 0.959 Å
    assert water.get_angle(1, 0, 2) == pytest.approx(107.0, abs=4.0)  # GFN2-xTB: 107°


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_a_drop_of_water_stays_water(calculator, seed):
    """5 ps: a potential with better errors than this one let 30 waters fall into each other."""
    rng, one = np.random.default_rng(seed), molecule("H2O")
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3, indexing="ij"), -1).reshape(-1, 3)
    drop = Atoms(calculator=calculator)
    for place in np.concatenate([grid, [[3, 0, 1], [-1, 1, 2], [1, 3, 0]]]):
        turned = one.copy()
        turned.rotate(rng.uniform(0, 360), rng.normal(size=3), center="COM")
        turned.positions += 3.1 * place - turned.get_center_of_mass()
        drop += turned
    drop.calc = calculator
    BFGS(drop, logfile=None).run(steps=50)
    thermalize_momenta(drop, temperature_K=300, rng=rng)
    dynamics = Langevin(
        drop, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, fixcm=False, rng=rng
    )
    for _ in range(500):
        dynamics.run(20)
        water = drop.positions.reshape(-1, 3, 3)
        bonds = np.linalg.norm(water[:, 1:] - water[:, :1], axis=-1)
        assert bonds.max() < 1.4, f"{dynamics.nsteps} steps"
        assert drop.get_temperature() < 500, f"{dynamics.nsteps} steps"
