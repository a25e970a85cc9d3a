"""How a step grows: CPU time from 200 to 20,000 atoms, two threads against one, ASE around it.

    python benchmarks/scaling.py [--model mace-spice2] [--atoms 200 648 2001 6000 20001]

Liquid water (0.1 atoms/Å³), periodic, float32, moving atoms, random weights in the card's network.
Times are medians. The exponent is the slope of log time over log atoms, between neighbors and over
all. Threads are taken away by the affinity of a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import time

import numpy as np
from memory import potential
from neighbors import water

ONE, STEPS = "--one-core", 5


def steps(model: str, n_atoms: int, number: int) -> list[float]:
    """Median CPU and wall time (s) of a step through ASE, and of the network's evaluation in it."""
    from ase import Atoms

    import mlip_md
    from mlip_md.integrations.ase import MLIPCalculator

    mlip_md.keep_memory()
    positions, cell, numbers = water(n_atoms)
    atoms = Atoms(numbers, positions, cell=cell, pbc=True)
    atoms.calc = calculator = MLIPCalculator(potential(model))
    runtime = calculator.engine.runtime
    compute, inside = runtime.compute, []

    def timed(*arguments: object) -> object:
        before = time.process_time()
        output = compute(*arguments)
        inside.append(time.process_time() - before)
        return output

    runtime.compute = timed
    rng, found = np.random.default_rng(0), []
    for _ in range(number + 2):
        atoms.positions = positions + rng.normal(scale=0.005, size=positions.shape)
        inside.clear()
        cpu, wall = time.process_time(), time.perf_counter()
        atoms.get_forces()
        found.append((time.process_time() - cpu, time.perf_counter() - wall, sum(inside)))
    return np.median(found[2:], axis=0).tolist()


def on_one_core(options: argparse.Namespace) -> list[float]:
    """The same in a process that may use one core only."""
    command = [sys.executable, __file__, ONE, options.model, str(options.threads_at)]
    return json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mace-spice2")
    parser.add_argument("--atoms", type=int, nargs="+", default=[200, 648, 2001, 6000, 20001])
    parser.add_argument("--threads-at", type=int, default=1206)
    options = parser.parse_args()
    times = []
    for n_atoms in options.atoms:
        cpu, wall, inside = steps(options.model, n_atoms, STEPS if n_atoms < 5000 else 2)
        times.append(cpu)
        print(
            f"{n_atoms:7d} atoms {1000 * cpu:10.1f} ms CPU {1000 * wall:10.1f} ms wall"
            f"   {1e6 * cpu / n_atoms:8.1f} us an atom   step / evaluation {cpu / inside:.3f}",
            flush=True,
        )
    slopes = np.diff(np.log(times)) / np.diff(np.log(options.atoms))
    whole = np.polyfit(np.log(options.atoms), np.log(times), 1)[0]
    print("exponents", *(f"{slope:.2f}" for slope in slopes), f"over all {whole:.2f}")
    walls = steps(options.model, options.threads_at, STEPS)[1], *on_one_core(options)[1:2]
    every, one = (1000 * wall for wall in walls)
    cores = len(os.sched_getaffinity(0))
    print(f"{options.threads_at} atoms, wall: one core {one:.0f} ms,", end=" ")
    print(f"{cores} cores {every:.0f} ms: {one / every:.2f} x")


if __name__ == "__main__":
    if sys.argv[1:2] == [ONE]:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps(steps(sys.argv[2], int(sys.argv[3]), STEPS)))
    else:
        main()
