"""Does a potential hold molecules together that it never saw? NVT, NVE and a water cluster.

    python benchmarks/bundled_stability.py --output stability.json [--data organics-gfn2.h5]

Needs the extra [data] (RDKit makes the structures). Molecules move side by side in batches:
Langevin dynamics (BAOAB) at 300 K, then NVE from where it ended, and a cluster of 30 waters. With
``--data``, every molecule is looked up in the training set and refused if it is there.
"""

import argparse
import json
import multiprocessing
import multiprocessing.sharedctypes
import os
import platform
import time
from pathlib import Path

import h5py
import jax
import numpy as np
from ase import Atoms, units
from ase.data import atomic_masses
from rdkit import Chem
from rdkit.Chem import AllChem

import mlip_md
from mlip_md.engine import Engine

UNSEEN = (
    "FC(Cl)Br",
    "FC(Br)=C",
    "O=CC(F)F",
    "C1OC1C#N",
    "FCOC",
    "CC(Cl)C#N",
    "CNC(F)=O",
    "OCC(F)Cl",
    "Brc1ncc[nH]1",
    "O=C1COC1",
    "CC(F)C=O",
    "CSCC#N",
    "CNC(=S)N",
    "CON=CC",
    "COc1ccon1",
    "Cc1nccs1",
    "CP(C)(=O)CF",
    "O=S1(=O)CCNC1",
    "CC(=O)Nc1cc(F)ccc1O",
    "CC(C)CC(NC(C)=O)C(=O)NC",
)
"""SMILES of 20 molecules of 5 to 31 atoms, written for this test."""


def conformer(smiles: str, seed: int) -> tuple[Atoms, np.ndarray]:
    """A force-field geometry and its bonds (n_bonds, 2)."""
    molecule = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(molecule, randomSeed=seed)
    AllChem.MMFFOptimizeMolecule(molecule)
    numbers = [atom.GetAtomicNum() for atom in molecule.GetAtoms()]
    bonds = [(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in molecule.GetBonds()]
    positions = molecule.GetConformer().GetPositions()
    return Atoms(numbers, positions, info={"smiles": smiles}), np.array(bonds)


def water_cluster(n: int, seed: int) -> tuple[Atoms, np.ndarray]:
    """n waters on a compact grid with random orientations, and their bonds."""
    rng = np.random.default_rng(seed)
    water = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])
    side = range(-3, 4)
    grid = np.array([(i, j, k) for i in side for j in side for k in side], float) * 3.1
    grid = grid[np.argsort(np.linalg.norm(grid + 0.1, axis=1))][:n]
    positions = [water @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + center for center in grid]
    bonds = np.array([(3 * i, 3 * i + h) for i in range(n) for h in (1, 2)])
    return Atoms("OHH" * n, np.concatenate(positions)), bonds


def refuse_seen(data: Path) -> None:
    """Stop if a molecule of the test is in the training part of the data set."""

    def plain(smiles: str) -> str:
        molecule = Chem.RemoveHs(Chem.MolFromSmiles(smiles))
        for atom in molecule.GetAtoms():
            atom.SetAtomMapNum(0)
        return Chem.MolToSmiles(molecule)

    with h5py.File(data) as file:
        seen = {
            plain(part) for group in file.values() for part in group["smiles"].asstr()[0].split(".")
        }
    for smiles in UNSEEN:
        if plain(smiles) in seen:
            raise SystemExit(f"{smiles} is in {data}: not an unseen molecule")


class Batch:
    """Molecules that move side by side; arrays are their atoms one after the other."""

    def __init__(self, engine: Engine, molecules: list[tuple[Atoms, np.ndarray]], seed: int):
        self.engine, self.rng = engine, np.random.default_rng(seed)
        self.molecules = [atoms for atoms, _ in molecules]
        sizes = [len(atoms) for atoms in self.molecules]
        self.owner = np.repeat(np.arange(len(sizes)), sizes)
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self.bonds = np.concatenate([b + s for (_, b), s in zip(molecules, starts, strict=True)])
        self.splits = np.cumsum(sizes)[:-1]
        self.numbers = np.concatenate([a.numbers for a in self.molecules])
        self.masses = atomic_masses[self.numbers][:, None]
        self.positions = np.concatenate([a.positions for a in self.molecules])
        self.velocities = np.zeros_like(self.positions)
        self.update()

    def update(self) -> None:
        """Energies per molecule and forces at the present positions."""
        parts = zip(
            np.split(self.positions, self.splits), np.split(self.numbers, self.splits), strict=True
        )
        results = self.engine.evaluate_batch([(x, z, None, (False,) * 3) for x, z in parts])
        self.energies = np.array([r.interaction_energy for r in results])
        self.forces = np.concatenate([r.forces for r in results])

    def relax(self, steps: int = 300) -> None:
        """Damped steepest descent: removes the strain of the force field's geometry."""
        for _ in range(steps):
            self.positions += np.clip(0.02 * self.forces, -0.02, 0.02)
            self.update()
        self.lengths = self.bond_lengths()

    def bond_lengths(self) -> np.ndarray:
        """Å, of all bonds."""
        return np.linalg.norm(np.subtract(*self.positions[self.bonds.T]), axis=1)

    def thermalize(self, temperature: float) -> None:
        """Draw velocities from the Maxwell-Boltzmann distribution."""
        scale = np.sqrt(units.kB * temperature / self.masses)
        self.velocities = scale * self.rng.normal(size=self.positions.shape)

    def step(self, dt: float, temperature: float | None, friction: float = 0.01 / units.fs) -> None:
        """One BAOAB step (Leimkuhler & Matthews 2013); velocity Verlet without temperature."""
        self.velocities += 0.5 * dt * self.forces / self.masses
        self.positions += 0.5 * dt * self.velocities
        if temperature is not None:
            keep = np.exp(-friction * dt)
            scale = np.sqrt((1 - keep**2) * units.kB * temperature / self.masses)
            self.velocities *= keep
            self.velocities += scale * self.rng.normal(size=self.positions.shape)
        self.positions += 0.5 * dt * self.velocities
        self.update()
        self.velocities += 0.5 * dt * self.forces / self.masses

    def kinetic(self) -> np.ndarray:
        """eV, per molecule."""
        per_atom = 0.5 * (self.masses * self.velocities**2).sum(axis=1)
        return np.bincount(self.owner, per_atom)

    def temperatures(self) -> np.ndarray:
        """K, per molecule, over all 3n degrees of freedom (Langevin fixes none)."""
        return 2 * self.kinetic() / (3 * np.bincount(self.owner) * units.kB)


def nvt(batch: Batch, picoseconds: float, dt_fs: float, temperature: float = 300.0) -> dict:
    """Langevin dynamics; the first tenth is not counted in the temperatures."""
    steps = round(picoseconds * 1000 / dt_fs)
    batch.thermalize(temperature)
    stretch, temperatures, start = np.ones(len(batch.bonds)), [], time.time()
    for step in range(steps):
        batch.step(dt_fs * units.fs, temperature)
        if step % 5 == 0:
            stretch = np.maximum(stretch, batch.bond_lengths() / batch.lengths)
        if step > steps // 10 and step % 5 == 0:
            temperatures.append(batch.temperatures())
    molecule = batch.owner[batch.bonds[:, 0]]
    longest = [stretch[molecule == m].max() for m in range(len(batch.molecules))]
    sizes = np.bincount(batch.owner)
    mean = np.mean(temperatures, axis=0)
    return {
        "picoseconds": picoseconds,
        "timestep_fs": dt_fs,
        "broken_bonds": int(np.sum(stretch > 1.5)),
        "largest_bond_stretch": float(max(longest)),
        "mean_temperature": float(np.average(mean, weights=sizes)),
        "temperatures": [round(float(t), 1) for t in mean],
        "stretches": [round(float(s), 3) for s in longest],
        "seconds": round(time.time() - start, 1),
    }


def nve(batch: Batch, picoseconds: float, dt_fs: float) -> dict:
    """Constant energy; the drift is the slope of a line through the total energies."""
    steps = round(picoseconds * 1000 / dt_fs)
    sizes = np.bincount(batch.owner)
    total = np.empty((steps, len(sizes)))
    for step in range(steps):
        batch.step(dt_fs * units.fs, None)
        total[step] = (batch.energies + batch.kinetic()) / sizes
    times = np.arange(steps) * dt_fs / 1000
    slopes = 1000 * np.polyfit(times, total, 1)[0]
    return {
        "picoseconds": picoseconds,
        "timestep_fs": dt_fs,
        "mean_drift_mev_per_atom_ps": float(np.average(slopes, weights=sizes)),
        "largest_drift_mev_per_atom_ps": float(np.abs(slopes).max()),
        "drifts": [round(float(s), 4) for s in slopes],
    }


def cluster_of_waters(engine: Engine, picoseconds: float, dt_fs: float) -> dict:
    """30 waters at 300 K: do they stay one cluster of whole molecules?"""
    batch = Batch(engine, [water_cluster(30, seed=1)], seed=2)
    batch.relax()
    result = nvt(batch, picoseconds, dt_fs)
    oxygen = batch.positions[::3]
    near = np.linalg.norm(oxygen[:, None] - oxygen, axis=-1) < 4.0
    reached = np.linalg.matrix_power(near.astype(float), 30)[0] > 0
    return {**result, "waters_in_cluster": int(reached.sum())}


def run(task: tuple[str, list[str], str, argparse.Namespace]) -> dict:
    """One worker's share, on one core: some of the molecules, or the water cluster."""
    kind, smiles, model, arguments = task
    engine = Engine(mlip_md.load(model), dtype="float32")
    if kind == "water":
        return {"water": cluster_of_waters(engine, arguments.water, arguments.timestep)}
    batch = Batch(engine, [conformer(s, seed=11) for s in smiles], seed=1)
    batch.relax()
    return {
        "molecules": smiles,
        "atoms": [len(a) for a in batch.molecules],
        "nvt": nvt(batch, arguments.nvt, arguments.timestep),
        "nve": nve(batch, arguments.nve, arguments.timestep),
    }


def one_core(counter: multiprocessing.sharedctypes.Synchronized) -> None:
    """Bind a worker to a core of its own: several on all cores only wait for each other."""
    with counter.get_lock():
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[counter.value % len(cores)]})
        counter.value += 1


def main() -> None:
    """Read the options, share the molecules out and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="organics-gfn2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--nvt", type=float, default=20.0, help="ps")
    parser.add_argument("--nve", type=float, default=5.0, help="ps")
    parser.add_argument("--water", type=float, default=5.0, help="ps")
    parser.add_argument("--timestep", type=float, default=0.5, help="fs")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("stability.json"))
    arguments = parser.parse_args()
    if arguments.data is not None:
        refuse_seen(arguments.data)
    shares = 2 * arguments.workers
    tasks = [("water", [], arguments.model, arguments)] if arguments.water else []
    tasks += [
        ("molecules", list(UNSEEN[k::shares]), arguments.model, arguments) for k in range(shares)
    ]
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    results = []
    with context.Pool(arguments.workers, one_core, (counter,)) as pool:
        for result in pool.imap_unordered(run, tasks, chunksize=1):
            results.append(result)
            print(json.dumps(result), flush=True)
            summary = {
                "model_sha256": mlip_md.load(arguments.model).sha256,
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, jax {jax.__version__}",
                "results": results,
            }
            arguments.output.write_text(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
