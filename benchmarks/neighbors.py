"""Neighbor lists against ASE, matscipy, vesin and jax-md, in one run: process-CPU time, ratios.

    python benchmarks/neighbors.py [--atoms 1000 10000] [--cutoff 5] [--step] [--large]

Liquid water (0.1 atoms/Å³), periodic. Process-CPU time adds up all threads and does not count what
other processes take; the minimum of several repeats is printed. Peers that are not installed are
left out. ``--step`` adds the share of lists in a step of dynamics in ASE, ``--large`` 100,000 atoms
in one call of a small MACE with its peak memory.
"""

import argparse
import importlib
import resource
import time
from functools import partial

import jax
import numpy as np

from mlip_md.neighbors import (
    Capacities,
    DeviceList,
    NeighborSpec,
    find_edges,
    neighbor_list,
    place,
)


def water(n_atoms, seed=0):
    """Rigid water molecules on a jittered lattice: positions (n, 3), cell (3, 3), numbers (n,)."""
    rng = np.random.default_rng(seed)
    n_molecules = -(-n_atoms // 3)
    length = (n_molecules / 0.0334) ** (1 / 3)
    side = int(np.ceil(n_molecules ** (1 / 3)))
    sites = np.stack(np.meshgrid(*[range(side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    sites = sites[rng.permutation(len(sites))[:n_molecules]]
    oxygen = (sites + 0.5) * length / side + rng.normal(scale=0.15, size=sites.shape)
    first = rng.normal(size=(n_molecules, 3))
    second = np.cross(first, rng.normal(size=(n_molecules, 3)))
    first, second = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (first, second))
    half = np.radians(104.52) / 2
    bonds = (np.cos(half) * first + sign * np.sin(half) * second for sign in (1, -1))
    positions = np.stack([oxygen, *(oxygen + 0.9572 * bond for bond in bonds)], 1)
    numbers = np.tile([8, 1, 1], n_molecules)
    return positions.reshape(-1, 3)[:n_atoms], np.eye(3) * length, numbers[:n_atoms]


def cpu_time(function, repeats):
    """Smallest process-CPU time (ms) of a call; the first call, which may compile, is not counted.

    The function is given the number of the call, so that it can move the atoms.
    """
    jax.block_until_ready(function(0))
    times = []
    for repeat in range(1, repeats + 1):
        start = time.process_time()
        jax.block_until_ready(function(repeat))
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def ours(positions, cell, cutoff, backend, skin):
    """Lists of a backend on the device; with a skin also what a call costs that keeps its list.

    The driver is that of engines, its step a list without a network.
    """
    spec, pbc = NeighborSpec(cutoff, skin, backend, capacity_margin=1.05), np.ones(3, bool)
    placed = place(positions, cell, pbc, cutoff)
    device = jax.devices()[0]
    found = DeviceList(
        spec, backend, placed, cell, pbc,
        capacities=Capacities(), dtype=np.dtype("float32"), device=device,
    )  # fmt: skip

    @partial(jax.jit, static_argnames="shape", donate_argnames="kept")
    def search(where, box, kept, shape):
        n_atoms = len(positions)
        return find_edges(where, box, n_atoms, kept, shape.search, shape.edges)

    def call(repeat):
        def step(shape, kept):
            where = np.zeros((shape.nodes, 3), np.float32)
            where[: len(placed)] = placed + 0.01 * (repeat % 2)
            pairs, needs, kept = search(where, np.asarray(cell, np.float32), kept, shape)
            return pairs, jax.device_get(needs), kept

        return found.find(step)[0]

    return call


def of_jax_md(positions, cell, cutoff, layout):
    """Its cell list; atoms move between calls, because it looks whether they did."""
    from jax_md import partition, space

    box = np.diag(cell).astype(np.float32)
    displacement, _ = space.periodic(box)
    functions = partition.neighbor_list(
        displacement,
        box,
        cutoff,
        dr_threshold=0.0,
        capacity_multiplier=1.05,
        format=getattr(partition, layout),
    )
    where = [np.asarray((positions + s) % box, np.float32) for s in (0.0, 0.01)]
    neighbors = functions.allocate(where[0])
    step = jax.jit(lambda neighbors, where: neighbors.update(where))
    return lambda repeat: step(neighbors, where[repeat % 2]).idx


def of_ase(positions, cell, cutoff):
    from ase.neighborlist import primitive_neighbor_list

    return lambda _: primitive_neighbor_list("ijS", [True] * 3, cell, positions, cutoff)


def of_matscipy(positions, cell, cutoff):
    from matscipy.neighbours import neighbour_list

    return lambda _: neighbour_list(
        "ijS", positions=positions, cell=cell, pbc=[True] * 3, cutoff=cutoff
    )


def of_vesin(positions, cell, cutoff):
    import vesin

    calculator = vesin.NeighborList(cutoff=cutoff, full_list=True)
    return lambda _: calculator.compute(positions, cell, True, "ijS")


LISTS = {
    "host (default on a CPU)": lambda *args: lambda _: neighbor_list(*args[:2], True, args[2]),
    "cells": partial(ours, backend="cells", skin=0.0),
    "cells, kept with 0.5 Å": partial(ours, backend="cells", skin=0.5),
    "cells, kept with 1 Å": partial(ours, backend="cells", skin=1.0),
    "dense": partial(ours, backend="dense", skin=0.0),
    "nvalchemi": partial(ours, backend="nvalchemi", skin=0.0),
    "vesin": of_vesin,
    "matscipy": of_matscipy,
    "ASE": of_ase,
    "jax-md, Dense": partial(of_jax_md, layout="Dense"),
    "jax-md, Sparse": partial(of_jax_md, layout="Sparse"),
}
NEEDS = {"nvalchemi": "nvalchemiops", "matscipy": "matscipy", "jax-md": "jax_md"}
DENSE_UP_TO = 2000


def compare_lists(n_atoms, cutoff):
    """Print the times of all lists for one size, and the ratios that are promised."""
    positions, cell, _ = water(n_atoms)
    count = len(neighbor_list(positions, cell, True, cutoff)[0])
    print(f"\n{n_atoms} atoms, {count} edges within {cutoff} Å: process-CPU ms per list")
    times = {}
    for name, make in LISTS.items():
        needed = NEEDS.get(name.split(",")[0])
        if (name == "dense" and n_atoms > DENSE_UP_TO) or (needed and not importable(needed)):
            continue
        times[name] = cpu_time(make(positions, cell, cutoff), 3 if name == "ASE" else 9)
        print(f"  {name:26s}{times[name]:10.2f}", flush=True)
    cells, host = times["cells"], times["host (default on a CPU)"]
    peers = [times[name] for name in times if name.startswith("jax-md")]
    if peers:
        print(f"  cells / jax-md (its faster layout)  {cells / min(peers):.2f}  (at most 0.60)")
    print(f"  ASE / cells                         {times['ASE'] / cells:.1f}  (at least 5)")
    if "matscipy" in times:
        print(f"  host / matscipy                     {host / times['matscipy']:.2f}  (at most 1)")


def importable(name):
    try:
        importlib.import_module(name)
    except ImportError:
        print(f"  ({name} is not installed)")
        return False
    return True


def share_of_a_step(n_molecules=564):
    """Print the part of a step of dynamics in ASE that goes into neighbor lists."""
    from ase import Atoms, units
    from ase.md.verlet import VelocityVerlet

    from mlip_md import structure
    from mlip_md.integrations.ase import MLIPCalculator

    positions, cell, numbers = water(3 * n_molecules)
    atoms = Atoms(numbers, positions, cell=cell, pbc=True, calculator=MLIPCalculator())
    dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
    spent, original = [], structure.host_edges

    def timed(*arguments, **options):
        start = time.process_time()
        edges = original(*arguments, **options)
        spent.append(time.process_time() - start)
        return edges

    dynamics.run(2)
    structure.host_edges = timed
    start = time.process_time()
    dynamics.run(5)
    step = (time.process_time() - start) / 5
    structure.host_edges = original
    lists = sum(spent) / 5
    print(
        f"\n{len(atoms)} atoms of flexible water in ASE, bundled potential: {1e3 * step:.0f} ms of "
        f"CPU per step, {1e3 * lists:.1f} ms of it ({100 * lists / step:.1f} %) for lists (at most "
        "10 %)"
    )


def hundred_thousand_atoms(n_atoms=100_000):
    """Print time and peak memory of energy and forces of 100,000 atoms with the bundled MACE."""
    import mlip_md
    from mlip_md.engine import Engine

    positions, cell, numbers = water(n_atoms)
    engine = Engine(mlip_md.load("organics-gfn2"))
    start = time.process_time()
    result = engine.evaluate(positions, numbers, cell, True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"\n{n_atoms} atoms, list + energy and forces once (compilation included): "
        f"{time.process_time() - start:.0f} s of CPU, peak memory {peak:.1f} GiB, largest force "
        f"{np.abs(result.forces).max():.3g} eV/Å"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atoms", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--cutoff", type=float, default=5.0)
    parser.add_argument("--step", action="store_true")
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}")
    if options.large:
        hundred_thousand_atoms()
    for n_atoms in options.atoms:
        compare_lists(n_atoms, options.cutoff)
    if options.step:
        share_of_a_step()


if __name__ == "__main__":
    main()
