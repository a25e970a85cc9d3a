"""What reading a data set costs: CPU, wall on one and two cores, peak memory; kills; the loader.

    python benchmarks/prepare.py [--structures 20000] [--workers 1 2] [--kills 5] [--loader]

Makes a file of so many structures in SPICE's layout, the same for the same number: sizes and
conformations per molecule as SPICE 2 has them by subset, 2 to 100 atoms, energies and forces of
springs along the bonds. Each ``mlip-md prepare`` on it, with the judgement of labels, is a process
on as many cores as it has workers. CPU seconds are the kernel's, of it and all processes that it
started. Memory is that of the whole tree of processes, proportional set sizes from
``/proc/PID/smaps_rollup`` added up every 0.1 s (pages in common count once), beside the largest
peak that the kernel notes for one process. ``--kills`` ends a preparation at random moments by
SIGKILL, its processes too, starts it again, and compares every byte. Linux only.
"""

import argparse
import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
from ase.data import covalent_radii

from mlip_md.constants import BOHR, HARTREE
from mlip_md.elements import symbol

# conformations, conformations per molecule, smallest and largest number of atoms: table in the
# README of SPICE 2.0.1, https://github.com/openmm/spice-dataset
SUBSETS = {
    "SPICE Dipeptides": (33_850, 50, 26, 60),
    "SPICE Solvated Amino Acids": (1_300, 50, 79, 96),
    "SPICE DES370K dimers": (345_676, 99, 2, 34),
    "SPICE DES Monomers": (18_700, 50, 3, 22),
    "SPICE PubChem": (1_398_566, 50, 3, 50),
    "SPICE Solvated PubChem": (13_934, 10, 63, 100),
    "SPICE Amino Acid Ligand": (194_174, 2, 24, 72),
    "SPICE Water Clusters": (1_000, 1000, 90, 90),
}
PAIRS = (
    "SPICE Solvated Amino Acids", "SPICE DES370K dimers", "SPICE Solvated PubChem",
    "SPICE Amino Acid Ligand",
)  # fmt: skip
HEAVY, SHARE, VALENCE = (6, 7, 8, 16, 17), (0.7, 0.12, 0.13, 0.03, 0.02), (4, 3, 2, 2, 1)
STIFFNESS = 33.0  # eV/Å², of all bonds
THERMAL = 0.05  # Å, along each direction
APART = 1.8  # Å, atoms that are not bonded
ENERGIES = {1: -13.6, 6: -1030.0, 7: -1485.0, 8: -2042.0, 16: -10830.0, 17: -12520.0}
Molecule = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Atomic numbers (n,), positions (n, 3) Å, bonds (m, 2)."""


def grow(size: int, rng: np.random.Generator) -> Molecule:
    """A molecule without rings: atoms with free valences get another one, hydrogens at the end."""
    numbers, bonds, free = [6], [], [4]
    while len(numbers) + sum(free) < size:
        parent = int(rng.choice(np.flatnonzero(free)))
        kind = int(rng.choice(len(HEAVY), p=SHARE))
        if sum(free) == 1 and VALENCE[kind] < 2:
            kind = 0
        bonds.append((parent, len(numbers)))
        numbers.append(HEAVY[kind])
        free[parent] -= 1
        free.append(VALENCE[kind] - 1)
    while len(numbers) < size:
        parent = int(rng.choice(np.flatnonzero(free)))
        bonds.append((parent, len(numbers)))
        numbers.append(1)
        free[parent] -= 1
        free.append(0)
    positions = np.zeros((size, 3))
    for parent, child in bonds:
        length = covalent_radii[numbers[parent]] + covalent_radii[numbers[child]]
        directions = rng.normal(size=(30, 3))
        places = directions * (length / np.linalg.norm(directions, axis=1))[:, None]
        places += positions[parent]
        others = np.delete(positions[:child], parent, axis=0)
        gaps = np.linalg.norm(places[:, None] - others, axis=2).min(axis=1, initial=np.inf)
        wide = np.flatnonzero(gaps > APART)
        positions[child] = places[wide[0] if len(wide) else gaps.argmax()]
    return np.array(numbers), positions, np.array(bonds).reshape(-1, 2)


def beside(one: Molecule, other: Molecule, rng: np.random.Generator) -> Molecule:
    """Two molecules, 3 Å apart along a random direction."""
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    shift = (one[1] @ direction).max() - (other[1] @ direction).min() + 3.0
    return (
        np.concatenate([one[0], other[0]]),
        np.concatenate([one[1], other[1] + shift * direction]),
        np.concatenate([one[2], other[2] + len(one[0])]),
    )


def label(molecule: Molecule, count: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Conformations (count, n, 3) Å, energies (count,) eV, forces (count, n, 3) eV/Å."""
    numbers, rest, bonds = molecule
    positions = rest + rng.normal(scale=THERMAL, size=(count, *rest.shape))
    one, two = bonds.T
    usual = covalent_radii[numbers[one]] + covalent_radii[numbers[two]]
    vectors = positions[:, two] - positions[:, one]
    lengths = np.linalg.norm(vectors, axis=2)
    pulls = (STIFFNESS * (lengths - usual) / lengths)[..., None] * vectors
    forces = np.zeros_like(positions)
    np.add.at(forces, (slice(None), one), pulls)
    np.add.at(forces, (slice(None), two), -pulls)
    energies = 0.5 * STIFFNESS * ((lengths - usual) ** 2).sum(axis=1)
    return positions, energies + sum(ENERGIES[z] for z in numbers.tolist()), forces


def smiles(molecule: Molecule) -> str:
    """The molecule, every atom in brackets with its number, as SPICE has them."""
    numbers, _, bonds = molecule
    children: dict[int, list[int]] = {}
    for parent, child in bonds.tolist():
        children.setdefault(parent, []).append(child)

    def write(atom: int) -> str:
        sides = "".join(f"({write(child)})" for child in children.get(atom, []))
        return f"[{symbol(int(numbers[atom]))}:{atom + 1}]{sides}"

    roots = sorted({*range(len(numbers))} - {*bonds[:, 1].tolist()})
    return ".".join(map(write, roots))


def molecules(structures: int) -> Iterator[tuple[str, Molecule, int]]:
    """Subset, molecule and number of conformations, in the shares of SPICE."""
    rng = np.random.default_rng(0)
    whole = sum(row[0] for row in SUBSETS.values())
    left = structures
    for k, (name, (share, each, least, most)) in enumerate(SUBSETS.items()):
        last = k == len(SUBSETS) - 1
        here = left if last else min(left, round(structures * share / whole))
        left -= here
        while here:
            size = int(np.clip(rng.normal((least + most) / 2, (most - least) / 6), least, most))
            parts = size // 2 if name in PAIRS and size > 3 else 0
            molecule = grow(size - parts, rng)
            if parts:
                molecule = beside(molecule, grow(parts, rng), rng)
            yield name, molecule, min(each, here)
            here -= min(each, here)


def write_file(path: Path, structures: int) -> None:
    """A file in SPICE's layout: bohr, hartree, float32."""
    rng, atoms = np.random.default_rng(1), 0
    with h5py.File(path, "w") as file:
        for number, (subset, molecule, count) in enumerate(molecules(structures)):
            positions, energies, forces = label(molecule, count, rng)
            atoms += positions.size // 3
            group = file.create_group(f"{number:08d}")
            group["subset"], group["smiles"] = [subset], [smiles(molecule)]
            group["atomic_numbers"] = molecule[0].astype(np.int16)
            rows = {
                "conformations": (positions / BOHR, "bohr"),
                "dft_total_energy": (energies / HARTREE, "hartree"),
                "dft_total_gradient": (-forces * BOHR / HARTREE, "hartree/bohr"),
            }
            for name, (values, unit) in rows.items():
                kind = np.float64 if name == "dft_total_energy" else np.float32
                group.create_dataset(name, data=values.astype(kind)).attrs["units"] = unit
    size = path.stat().st_size / 1e6
    print(f"{structures} structures, {number + 1} molecules, {atoms / structures:.1f} atoms on "
          f"average, {size:.0f} MB", flush=True)  # fmt: skip


def tree(root: int) -> list[int]:
    """A process and all below it."""
    found = [root]
    for process in found:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{process}/task/{process}/children").read_text()
            found += [int(child) for child in text.split()]
    return found


def _entry(process: int, file: str, key: str) -> int:
    """Bytes of an entry under ``/proc``; 0 if the process is gone."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path(f"/proc/{process}/{file}").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])
    return 0


def command(file: Path, folder: Path, workers: int) -> list[str]:
    """A preparation."""
    rows = [f"data.path={file}", "data.curate=null", "data.max_n_node=null", "data.max_n_edge=null"]
    options = [part for row in rows for part in ("--set", row)]
    program = [sys.executable, "-c", "from mlip_md.cli import main; main()", "prepare"]
    return [*program, "mace-spice2", str(folder), "--workers", str(workers), *options]


def start(file: Path, folder: Path, workers: int, cores: set[int]) -> subprocess.Popen[str]:
    """The preparation on these cores, in a group of processes of its own."""
    return subprocess.Popen(
        command(file, folder, workers), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip


def measure(file: Path, folder: Path, workers: int) -> dict[str, float]:
    """CPU and wall seconds, peak memory (GB) of the tree and of a process in it."""
    cores = set(sorted(os.sched_getaffinity(0))[:workers])
    began = time.monotonic()
    process = start(file, folder, workers, cores)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stdout))
    reader.start()
    most = single = 0
    while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
        there = tree(process.pid)
        most = max(most, sum(_entry(p, "smaps_rollup", "Pss:") for p in there))
        single = max(single, *(_entry(p, "status", "VmHWM:") for p in there))
        time.sleep(0.1)
    wall = time.monotonic() - began
    reader.join()
    if ended[1]:
        raise SystemExit("".join(said))
    warned = [line for line in said if "Warning" in line]
    if warned:
        print("".join(warned))
    usage = ended[2]
    single = max(single, usage.ru_maxrss * 1024)
    cpu = usage.ru_utime + usage.ru_stime
    return {"cpu": cpu, "wall": wall, "tree": most / 1e9, "process": single / 1e9}


def sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def kill(file: Path, folder: Path, workers: int, kills: int, wall: float) -> None:
    """Kill a preparation at random moments, let it end, say what it did."""
    rng = np.random.default_rng(kills)
    cores = set(sorted(os.sched_getaffinity(0))[:workers])
    for _ in range(kills):
        process = start(file, folder, workers, cores)
        seconds = float(rng.uniform(0.1, 0.9)) * wall
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=seconds)
            raise SystemExit("it ended before it was killed")
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        blocks = len(list(folder.with_name(f"{folder.name}.partial").rglob("*.npz")))
        print(f"  killed after {seconds:.1f} s, {blocks} blocks are kept", flush=True)
    print(f"  the rest: {measure(file, folder, workers)['wall']:.1f} s", flush=True)


def load(folder: Path) -> float:
    """Structures that are made into batches in a CPU second."""
    from mlip_md.trainer.data import BatchBudget, iterate_batches, open_prepared, plan_epoch

    store = open_prepared(folder).parts["train"]
    budget = BatchBudget.from_card(64, store=store)
    plans = [plan_epoch(store, budget, 0, epoch) for epoch in (1, 2)]
    for _ in iterate_batches(store, plans[0], budget):  # from the disk
        pass
    began = time.process_time()
    for _ in iterate_batches(store, plans[1], budget):
        pass
    return len(store) / (time.process_time() - began)


def main() -> None:
    """Print a line for each measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--structures", type=int, default=20_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--loader", action="store_true", help="also measure the loader")
    parser.add_argument("--file", type=Path, help="keep the file here, or take it from here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        file = options.file or Path(temporary) / "spice.hdf5"
        if not file.exists():
            write_file(file, options.structures)
        folders, walls = [], []
        for workers in options.workers:
            folder = Path(temporary) / f"by-{workers}"
            found = measure(file, folder, workers)
            folders.append(folder)
            walls.append(found["wall"])
            each = 1e5 * found["cpu"] / options.structures
            print(
                f"{workers} workers: {found['cpu']:.1f} s CPU, {each:.1f} s per 100,000; "
                f"{found['wall']:.1f} s wall, {walls[0] / found['wall']:.2f} times the speed; "
                f"{found['tree']:.2f} GB, largest process {found['process']:.2f} GB",
                flush=True,
            )
        if options.loader:
            print(f"loader: {load(folders[0]):,.0f} structures per CPU second", flush=True)
        whole = sums(folders[0])
        if options.kills:
            folders.append(Path(temporary) / "killed")
            kill(file, folders[-1], options.workers[-1], options.kills, walls[-1])
        different = [folder.name for folder in folders[1:] if sums(folder) != whole]
        size = sum((folders[0] / name).stat().st_size for name in whole) / 1e6
        print(f"folder of {size:.0f} MB; bytes differ: {', '.join(different) or 'nowhere'}")
        if different:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
