"""What a training step costs: 16 molecules, gradient of the loss, update; against mlip 0.2.5.

    python benchmarks/training_steps.py --with mlip=PYTHON [--with mlip-md:before=…] [--batch 16]

The networks of both cards with random weights; energies and forces are to become 0, mean squares.
Every program runs in a process and an environment of its own and they take turns. The norm of the
first gradient must agree. Ours is the trainer's step (AMSGrad, averages, guards against NaN), that
of mlip its network's gradient and an update by Adam. Medians of CPU and wall time, peak memory.
"""

import argparse
import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ase.io
import numpy as np
from ase import Atoms

FOLDER = Path(__file__).with_name("systems")
ENERGY, FORCES = 40.0, 1000.0
TOLERANCE = 1e-4


def molecules(number: int) -> list[Atoms]:
    """Aspirin, its atoms moved at random."""
    atoms, rng = ase.io.read(FOLDER / "aspirin.xyz"), np.random.default_rng(0)
    shape = atoms.positions.shape
    return [
        Atoms(atoms.numbers, atoms.positions + rng.normal(scale=0.02, size=shape))
        for _ in range(number)
    ]


def mlip_md(model: str, structures: list[Atoms]) -> Callable[[], float]:
    """A step of this package's trainer."""
    import mlip_md
    from mlip_md.trainer.data.batching import BatchBudget, make_batch
    from mlip_md.trainer.data.store import GraphStore
    from mlip_md.trainer.data.structures import LabeledStructure
    from mlip_md.trainer.loss import weights_at
    from mlip_md.trainer.recipe import load_recipe
    from mlip_md.trainer.step import init_state, make_train_step

    kind = "nequip" if "nequip" in Path(model).name else "mace"
    recipe, potential = load_recipe(f"{kind}-spice2")[0], mlip_md.load(model)
    squares = load_recipe("mace-spice2")[0].loss  # NequIP's card has Huber's
    recipe = recipe.model_copy(update={"loss": squares})
    labeled = [
        LabeledStructure(a.numbers, a.positions, 0.0, np.zeros((len(a), 3))) for a in structures
    ]
    store = GraphStore.from_structures(
        labeled, potential.cutoff, elements=potential.elements, atomic_energies=np.zeros(15)
    )
    n = len(structures)
    budget = BatchBudget(int(store.num_atoms.sum()) + 1, int(store.num_edges.sum()) + 1, n + 1)
    batch = make_batch(store, np.arange(n), budget)
    step = make_train_step(
        potential.network.apply, recipe, potential.scaling_mean, potential.scaling_stdev
    )
    weights = weights_at(recipe.loss, 1)
    state = init_state(recipe, potential.params)
    with contextlib.suppress(ImportError):  # earlier versions began at once
        from mlip_md.devices import plan_memory

        plan_memory(step, state, batch, weights)

    def once() -> float:
        nonlocal state
        state, log = step(state, batch, weights)
        return float(log.gradient_norm)

    return once


def instadeep(model: str, structures: list[Atoms]) -> Callable[[], float]:
    """InstaDeep's mlip, generation 1: the gradient of its predictor and a step of Adam."""
    import jax
    import jax.numpy as jnp
    import mlip.models_v1 as models
    import optax
    from mlip.data.chemical_system import ChemicalSystem
    from mlip.data.helpers.dynamically_batch import dynamically_batch
    from mlip.graph import Graph
    from mlip.graph.edge_ordering import DEFAULT_EDGE_ORDERING
    from mlip.models.model_io import load_model_from_zip

    init = models.ForceFieldPredictorV1.init
    models.ForceFieldPredictorV1.init = lambda *a: jax.eval_shape(lambda: init(*a))
    network = models.Nequip if "nequip" in Path(model).name else models.Mace
    field = load_model_from_zip(network, model)
    systems = [ChemicalSystem.from_ase_atoms(a, get_property_fields=False) for a in structures]
    graphs = [
        Graph.from_chemical_system(s, field.cutoff_distance, ordering=DEFAULT_EDGE_ORDERING)
        for s in systems
    ]
    n = len(structures)
    n_node = sum(len(a) for a in structures) + 1
    n_edge = sum(len(g.senders) for g in graphs) + 1
    graph = next(dynamically_batch(graphs, n_node=n_node, n_edge=n_edge, n_graph=n + 1))
    graph = jax.tree.map(jnp.asarray, graph)
    sizes = jnp.array([len(a) for a in structures])
    owner = jnp.repeat(jnp.arange(n), sizes, total_repeat_length=n_node - 1)
    optimizer = optax.adam(1e-6)

    def loss(params: object) -> jax.Array:
        found = field.predictor.apply(params, graph).to_prediction()
        squares = jnp.mean(found.forces[: n_node - 1] ** 2, axis=1) / sizes[owner]
        return ENERGY * jnp.mean((found.energy[:n] / sizes) ** 2) + FORCES * squares.sum() / n

    @jax.jit
    def step(params: object, state: object) -> tuple[object, object, jax.Array]:
        gradient = jax.grad(loss)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, optax.tree.norm(gradient)

    params, state = field.params, optimizer.init(field.params)

    def once() -> float:
        nonlocal params, state
        params, state, norm = step(params, state)
        return float(norm)

    return once


CONTESTANTS = {"mlip-md": mlip_md, "mlip": instadeep}


def compete(program: str, model: str, number: str) -> None:
    """Make steps as they are asked for by lines of standard input."""
    out, sys.stdout = sys.stdout, sys.stderr
    before = time.process_time()
    step = CONTESTANTS[program](model, molecules(int(number)))
    norm = step()
    said = {"norm": norm, "first": time.process_time() - before}
    print(json.dumps(said), file=out, flush=True)
    for line in sys.stdin:
        steps = []
        for _ in range(int(line)):
            cpu, wall = time.process_time(), time.perf_counter()
            step()
            steps.append((time.process_time() - cpu, time.perf_counter() - wall))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps({"steps": steps, "peak_gb": peak}), file=out, flush=True)


def main() -> None:
    """Race on both cards."""
    import subprocess

    from steps import MODELS, write_model

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with", dest="programs", action="append", default=[])
    parser.add_argument("--models", nargs="+", default=["mace-card", "nequip-card"], choices=MODELS)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    named = [("mlip-md", sys.executable)]
    named += [tuple(text.split("=", 1)) for text in options.programs]
    for model in options.models:
        print(f"{model}, batch of {options.batch}", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            file = write_model(Path(folder), model)
            running = {}
            for name, python in named:
                command = [python, __file__, "--compete", name.partition(":")[0], str(file)]
                running[name] = subprocess.Popen(
                    [*command, str(options.batch)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            said = {
                name: json.loads(process.stdout.readline()) for name, process in running.items()
            }
            norms = {name: one["norm"] for name, one in said.items()}
            reference = norms["mlip-md"]
            if any(abs(norm / reference - 1) > TOLERANCE for norm in norms.values()):
                raise SystemExit(f"gradients differ, no times: {norms}")
            steps: dict[str, list] = {name: [] for name in running}
            for _ in range(options.rounds):
                for name, process in running.items():
                    process.stdin.write("2\n")
                    process.stdin.flush()
                    answer = json.loads(process.stdout.readline())
                    steps[name] += answer["steps"]
                    said[name]["peak_gb"] = answer["peak_gb"]
            own = np.median(steps["mlip-md"], axis=0)[0]
            for name, process in running.items():
                process.stdin.close()
                process.wait()
                cpu, wall = np.median(steps[name], axis=0)
                print(
                    f"  {name:20s} {1000 * cpu:9.1f} ms CPU {1000 * wall:9.1f} ms wall"
                    f" {said[name]['peak_gb']:6.2f} GB  first {said[name]['first']:6.1f} s CPU"
                    f" {cpu / own:6.2f} x"
                )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compete"]:
        compete(*sys.argv[2:])
    else:
        main()
