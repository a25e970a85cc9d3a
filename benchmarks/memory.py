"""Memory that energy and forces take: peak of a process, and atoms per GiB from two sizes.

Liquid water (0.1 atoms/Å³), periodic, cutoff 5 Å (bundled: 4.5 Å), float32, on the default device
of JAX; the networks of both model cards with random weights, and the bundled one. Every run is a
process of its own, whose peak includes Python, JAX and the compilation.

Run:  python benchmarks/memory.py [--atoms 1500 3000] [--models mace-spice2 nequip-spice2 ...]
"""

import argparse
import dataclasses
import os
import subprocess
import sys

import numpy as np
from neighbors import water

import mlip_md
from mlip_md.engine import Engine
from mlip_md.formats.soundness import expected_shapes, unflatten
from mlip_md.potential import Potential
from mlip_md.trainer.recipe import load_recipe

MODELS = ("mace-spice2", "nequip-spice2", "organics-gfn2")
ELEMENTS = (1, 3, 5, 6, 7, 8, 9, 11, 14, 15, 16, 17, 19, 35, 53)


def potential(name: str) -> Potential:
    """The bundled potential, or random weights in the network of a recipe."""
    if name == "organics-gfn2":
        return mlip_md.load(name)
    recipe = load_recipe("mace-spice2" if name == "equal-mace" else name)[0]
    network, zeros = recipe.network, np.zeros(len(ELEMENTS))
    if name == "equal-mace":  # as equal_mace.py makes it
        network = dataclasses.replace(network, node_symmetry=1, correlation=3, num_bessel=8)
    bare = Potential(network, {}, ELEMENTS, zeros, recipe.data.cutoff, 50.0, 0.98)
    rng = np.random.default_rng(0)
    shapes = expected_shapes(bare)
    weights = {path: rng.standard_normal(shape, np.float32) for path, shape in shapes.items()}
    params = unflatten(weights)
    return Potential(network, params, ELEMENTS, zeros, recipe.data.cutoff, 50.0, 0.98)


def compute(name: str, n_atoms: int) -> None:
    """One call, in this process."""
    positions, cell, numbers = water(n_atoms)
    Engine(potential(name)).evaluate(positions, numbers, cell, True)


def peak(name: str, n_atoms: int) -> float:
    """Peak memory (GiB) of a process that computes one structure."""
    process = subprocess.Popen([sys.executable, __file__, "--one", name, str(n_atoms)])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name} with {n_atoms} atoms failed")
    return usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--atoms", type=int, nargs=2, default=[1500, 3000])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "N"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return compute(options.one[0], int(options.one[1]))
    print(f"{'model':>14} {'atoms':>7} {'GiB':>6} {'atoms':>7} {'GiB':>6} {'atoms per GiB':>14}")
    for name in options.models:
        few, many = options.atoms
        low, high = peak(name, few), peak(name, many)
        slope = (many - few) / (high - low)
        print(f"{name:>14} {few:7d} {low:6.2f} {many:7d} {high:6.2f} {slope:14.0f}", flush=True)


if __name__ == "__main__":
    main()
