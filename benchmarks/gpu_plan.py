"""What a GPU would do in a step, from the compiler's own plan; no GPU is needed.

    python benchmarks/gpu_plan.py --model organics-gfn2 --atoms 1200 [--card H100] [--json OUT]
    python benchmarks/gpu_plan.py --recipe mace-spice2 [--nodes 32 --edges 288]

``--model`` plans the step that ASE and OpenMM take (list on the device, energy, forces, stress), of
a model file, of a bundled model, or of random weights in a recipe's network (mace-spice2,
nequip-spice2); ``--recipe`` plans a training step. It needs the extra [cuda12] or [cuda13], whose
wheels hold the compiler. See docs/gpu.md for what the numbers mean.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

CARDS = {
    # capability, processors, threads and bytes of shared memory of one, bytes shared by a block,
    # cache (MiB), memory (GiB), TB/s, GHz
    "H100": ((9, 0), 132, 2048, 233472, 232448, 50, 79.1, 3.352, 1.98),
    "A100": ((8, 0), 108, 2048, 167936, 166912, 40, 79.1, 2.039, 1.41),
    "RTX4090": ((8, 9), 128, 1536, 102400, 101376, 72, 23.6, 1.008, 2.52),
}
LAUNCH = 2e-6
"""s, that a kernel costs at least."""
SHARE = 0.1
"""Of the card's memory, for messages: the default of MLIP_MD_MEMORY_SHARE."""
OURS = "mlip_md_"
"""Names of our own kernels start so."""


def describe(card: str) -> str:
    """A card as XLA reads it."""
    (major, minor), cores, threads, shared, optin, cache, memory, bandwidth, clock = CARDS[card]
    info = f"""
      cuda_compute_capability {{ major: {major} minor: {minor} }}
      threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
      shared_memory_per_block: 49152 shared_memory_per_core: {shared}
      shared_memory_per_block_optin: {optin} core_count: {cores} fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      memory_bandwidth: {int(bandwidth * 1e12)} l2_cache_size: {cache * 2**20}
      clock_rate_ghz: {clock} device_memory_size: {int(memory * 2**30)}
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
    """
    return (
        f'gpu_device_info {{ {info} }} platform_name: "CUDA" '
        f'dnn_version_info {{ major: 9 minor: 8 patch: 0 }} device_description_str: "{card}"'
    )


# Reading the compiler's plan

SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
SIZES |= {"s64": 8, "u64": 8}
FREE = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "after-all",
    "partition-id",
}
"""Instructions that start no kernel."""


class Instruction(NamedTuple):
    """One line of a program."""

    kind: str
    result: str
    operands: list[str]
    line: str


class Counts(NamedTuple):
    """What a program does: kernels, turns of its loops, bytes by kernel."""

    kernels: int
    loop_turns: int
    traffic: Counter


def size(types: str) -> int:
    """Bytes of all arrays in a type."""
    found = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", types)
    return sum(SIZES.get(kind, 0) * product(dims) for kind, dims in found)


def product(dims: str) -> int:
    """Number of entries of an array."""
    total = 1
    for dim in filter(None, dims.split(",")):
        total *= int(dim)
    return total


def read_program(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Instructions by computation and name, and the name of the computation that is run."""
    programs: dict[str, dict[str, Instruction]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            current = head[2]
            programs[current] = {}
            entry = current if head[1] else entry
        elif found := re.match(
            r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)", line
        ):
            name, result, kind, operands = found.groups()
            names = re.findall(r"%([\w.\-]+)", operands)
            programs[current][name] = Instruction(kind, result, names, line)
    return programs, entry


def traffic(instruction: Instruction, others: dict[str, Instruction]) -> int:
    """Bytes of operands and results; what is written in place counts once, workspaces do not."""
    aliased = {int(k) for k in re.findall(r"\{\d*\}: \((\d+), \{\}", instruction.line)}
    result = instruction.result
    if instruction.kind == "custom-call":
        result = re.sub(r"\bs8\[\d+\]", "", result)
    read = [
        size(others[name].result)
        for k, name in enumerate(instruction.operands)
        if name in others and k not in aliased
    ]
    return size(result) + sum(read)


def inner(line: str) -> list[str]:
    """Computations that an instruction runs."""
    named = re.findall(r"(?:to_apply|body|true_computation|false_computation)=%?([\w.\-]+)", line)
    listed = re.findall(r"branch_computations=\{([^}]*)\}", line)
    return named + [name.strip(" %") for names in listed for name in names.split(",")]


def count(text: str) -> Counts:
    """Count an optimised program."""
    programs, entry = read_program(text)
    total, turns = Counter(), 0
    kernels = 0

    def walk(name: str, times: int) -> None:
        nonlocal kernels, turns
        for key, instruction in programs[name].items():
            if instruction.kind in ("while", "call", "conditional"):
                known = re.search(r'known_trip_count":\{"n":"(\d+)"', instruction.line)
                here = times * (int(known[1]) if known else 1)
                turns += here if instruction.kind == "while" else 0
                for called in inner(instruction.line):
                    walk(called, here)
            elif instruction.kind not in FREE and not instruction.kind.endswith("-done"):
                kernels += times
                total[key] += times * traffic(instruction, programs[name])

    walk(entry, 1)
    return Counts(kernels, turns, total)


def registers(folder: Path) -> dict[str, dict[str, int]]:
    """Registers of a thread and bytes spilled, of our kernels in what the compiler left behind."""
    package = importlib.util.find_spec("nvidia")
    roots = list(package.submodule_search_locations or ()) if package else []
    ptxas = next((p for root in roots for p in Path(root).rglob("bin/ptxas")), None)
    found: dict[str, dict[str, int]] = {}
    for file in folder.glob("*.ptx") if ptxas else ():
        text = file.read_text()
        if f".entry {OURS}" not in text:
            continue
        target = re.search(r"\.target (\w+)", text)[1]
        command = [str(ptxas), "-v", f"-arch={target}", str(file), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        for name, rest in re.findall(r"Compiling entry function '(\w+)'(.*?registers)", said, re.S):
            if name.startswith(OURS):
                spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", rest))
                used = int(re.search(r"Used (\d+) registers", rest)[1])
                found[name] = {"registers": used, "spills": spilled}
    return found


# Steps


class FoundError(Exception):
    """Stops an engine where its step would begin."""


def engine_step(model: str, atoms: int) -> Any:
    """The function that an engine would call on a GPU, and its arguments: 0.1 atoms/Å³."""
    import memory
    import numpy as np

    import mlip_md
    from mlip_md.engine import Engine
    from mlip_md.networks.tabulate import tabulate_radial

    potential = memory.potential(model) if model in memory.MODELS else mlip_md.load(model)
    rng = np.random.default_rng(0)
    side, edge = (atoms / 0.1) ** (1 / 3), int(np.ceil(atoms ** (1 / 3)))
    grid = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), -1).reshape(-1, 3)[:atoms]
    positions = grid * (side / edge) + rng.normal(scale=0.1, size=grid.shape)
    numbers = rng.choice([z for z in (1, 1, 6, 8) if z in potential.elements], atoms)
    cell = np.eye(3) * side
    there = Engine(potential, device="cpu").spec.backend_of("gpu", atoms, cell, np.ones(3, bool))
    engine = Engine(potential, device="cpu", backend=there)
    arguments: list[Any] = []

    def capture(*given: Any) -> Any:
        arguments.extend(given)
        raise FoundError

    step, engine.runtime.step = engine.runtime.step, capture
    with contextlib.suppress(FoundError):
        engine.evaluate(positions, numbers, cell, True)
    params, *rest = arguments
    if "tables" not in params:
        options = len(potential.elements), potential.cutoff, np.float32
        params = {**params, "tables": tabulate_radial(potential.network, params, *options)}
    return step, (params, *rest)


def training_step(name: str, nodes: int, edges: int) -> Any:
    """A recipe's training step, and its arguments; sizes are those a structure has on average."""
    import memory
    import numpy as np

    from mlip_md.graph import Graph
    from mlip_md.trainer.data.batching import Batch, BatchBudget
    from mlip_md.trainer.loss import LossWeights
    from mlip_md.trainer.recipe import load_recipe
    from mlip_md.trainer.step import init_state, make_train_step

    recipe, potential = load_recipe(name)[0], memory.potential(name)
    budget = BatchBudget.from_card(recipe.data.batch_size, nodes, edges)
    n, e, g = budget.n_node, budget.n_edge, budget.n_graph
    real, whole, flag = (lambda *shape, d=d: np.zeros(shape, d) for d in ("f4", "i4", bool))
    graph = Graph(
        positions=real(n, 3),
        species=whole(n),
        cell=real(g, 3, 3),
        senders=whole(e),
        receivers=whole(e),
        shifts=whole(e, 3),
        node_graph=whole(n),
        node_mask=flag(n),
        edge_mask=flag(e),
        graph_mask=flag(g),
    )
    batch = Batch(graph=graph, energy=real(g), forces=real(n, 3))
    step = make_train_step(potential.network.apply, recipe)
    return step, (init_state(recipe, potential.params), batch, LossWeights(*[real()] * 3))


def plan(step: Any, arguments: Any, card: str, folder: Path) -> dict[str, Any]:
    """Compile a step for a card and count it."""
    import jax
    from jax.experimental import topologies

    from mlip_md.devices import precision
    from mlip_md.networks.layers import bounding_turns

    topology = topologies.get_topology_desc(
        "", platform="cuda", target_config=describe(card), topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def shape_of(leaf: Any) -> Any:
        if not hasattr(leaf, "dtype"):
            return leaf
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    *_, capacity, bandwidth, _ = CARDS[card]
    with precision("float32", "gpu"), bounding_turns(int(SHARE * capacity * 2**30)):
        shapes = [
            a if type(a).__name__ == "Shape" else jax.tree_util.tree_map(shape_of, a)
            for a in arguments
        ]
        compiled = step.lower(*shapes).compile()
    counts, used = count(text := compiled.as_text()), compiled.memory_analysis()
    (folder / "program.txt").write_text(text)
    gigabytes = sum(counts.traffic.values()) / 1e9
    kernels = registers(folder)
    return {
        "card": card,
        "kernels": counts.kernels,
        "loop_turns": counts.loop_turns,
        "gigabytes": gigabytes,
        "traffic_ms": gigabytes / bandwidth,
        "launch_ms": counts.kernels * LAUNCH * 1e3,
        "temp_mib": used.temp_size_in_bytes / 2**20,
        "argument_mib": used.argument_size_in_bytes / 2**20,
        "registers": max((k["registers"] for k in kernels.values()), default=None),
        "spills": sum(k["spills"] for k in kernels.values()) if kernels else None,
        "our_kernels": kernels,
        "largest": [[name, n / 1e9] for name, n in counts.traffic.most_common(12)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model file, bundled model, or recipe with random weights")
    what.add_argument("--recipe", help="recipe, for its training step")
    parser.add_argument("--atoms", type=int, default=1200)
    parser.add_argument("--nodes", type=int, default=32, help="atoms of a structure, on average")
    parser.add_argument("--edges", type=int, default=288, help="undirected edges of it, on average")
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for what the compiler writes")
    options = parser.parse_args()
    if importlib.util.find_spec("jax_plugins") is None:
        sys.exit("there is no CUDA compiler here: pip install 'mlip-md[cuda12]'")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        os.environ.update(JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1")
        # Without a card the search for the best tiles of a matrix product fails in some programs.
        flags = f"--xla_gpu_enable_triton_gemm=false --xla_dump_to={folder}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
        if options.model:
            step = engine_step(options.model, options.atoms)
        else:
            step = training_step(options.recipe, options.nodes, options.edges)
        found = plan(*step, options.card, folder)
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
