"""How a training step scales over devices: as many structures for each, on one, two, four, …

    python benchmarks/devices.py [--devices 1 2 4 8] [--each 16] [--steps 20] [--virtual]

Weak scaling: 1 is a step on one device; the ideal is the same time for N times the structures. The
network of a shipped recipe (``--recipe``) with random weights on moved molecules of benzene, the
trainer's own step, parts and transfers. ``--virtual`` divides a processor, which shows the form and
no speed: its devices share the cores. Several processes: start it as ``mlip-md train`` is, with
srun or mpirun; then only the number of all devices is measured.
"""

import argparse
import functools
import os
import statistics
import sys
import time

import numpy as np

VIRTUAL = "--xla_force_host_platform_device_count="


def measure(name: str, devices: int | str, each: int, steps: int) -> tuple[int, int, float]:
    """Devices of the team, structures of a step, and the median time (s) of one."""
    import jax
    from ase.build import molecule

    from mlip_md.networks import build_network, draw_weights
    from mlip_md.trainer.data import BatchBudget, GraphStore, LabeledStructure, iterate_parts
    from mlip_md.trainer.loss import weights_at
    from mlip_md.trainer.parallel import gather
    from mlip_md.trainer.recipe import load_recipe
    from mlip_md.trainer.step import init_state, make_train_step

    team, recipe = gather(devices), load_recipe(name)[0]
    parts = team.mesh.size if team.mesh else 1
    rng, atoms = np.random.default_rng(0), molecule("C6H6")
    shape = atoms.positions.shape
    store = GraphStore.from_structures(
        [
            LabeledStructure(
                atoms.numbers, atoms.positions + rng.normal(scale=0.02, size=shape), 0.0,
                np.zeros(shape),
            )
            for _ in range(each * parts)
        ],
        recipe.data.cutoff, atomic_energies=np.zeros(2),
    )  # fmt: skip
    budget = BatchBudget.from_card(len(store), store=store)
    plan = [np.arange(len(store))] * (steps + 1)
    network = build_network(
        recipe.network, num_species=2, elements=store.elements, cutoff=recipe.data.cutoff,
        avg_num_neighbors=float(store.num_edges.sum() / store.num_atoms.sum()), avg_r_min=1.0,
    )  # fmt: skip
    step = make_train_step(network.apply, recipe, mesh=team.mesh)
    state, weights, times = None, weights_at(recipe.loss, 1), []
    for _, batches in iterate_parts(store, plan, budget, team.shares):
        if state is None:
            draw = jax.jit(functools.partial(draw_weights, network, recipe.network))
            params = draw(jax.random.key(0), batches[0].graph)
            state = team.everywhere(init_state(recipe, params))
        begun = time.perf_counter()
        state, log = step(state, team.spread(batches), weights)
        float(log.loss)
        times.append(time.perf_counter() - begun)
    return parts, len(store), statistics.median(times[1:])


def main() -> None:
    """Print a line for every number of devices."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--each", type=int, default=16, help="structures for each device")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--recipe", default="organics-gfn2")
    parser.add_argument("--virtual", action="store_true")
    options = parser.parse_args()
    if options.virtual:
        os.environ["XLA_FLAGS"] = f"{VIRTUAL}{max(options.devices)}"
    from mlip_md.trainer.parallel import find_place, joined

    place = find_place()
    with joined(place):
        numbers = ["all"] if place else options.devices
        found = [measure(options.recipe, number, options.each, options.steps) for number in numbers]
    if place is None or place.number == 0:
        print(f"{sys.argv[0]}: {options.each} structures for each device", flush=True)
        for parts, structures, seconds in found:
            print(
                f"{parts:4d} devices {structures:6d} structures {1e3 * seconds:9.1f} ms a step "
                f"{structures / seconds:9.0f} structures/s, {found[0][2] / seconds:.2f} of ideal"
            )


if __name__ == "__main__":
    main()
