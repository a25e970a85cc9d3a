"""What is compiled for GPUs: an engine's step and a training step, exported without one."""

import contextlib
import re
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import export
from small_models import random_mace
from training_cases import small_recipe

from mlip_md.devices import SHARE_VARIABLE, message_memory
from mlip_md.engine import Engine
from mlip_md.errors import ConfigError
from mlip_md.graph import Graph
from mlip_md.networks import messages
from mlip_md.networks.gpu_convolution import runs_kernels
from mlip_md.networks.layers import bounding_turns
from mlip_md.networks.tabulate import tabulate_radial
from mlip_md.trainer.data.batching import Batch
from mlip_md.trainer.loss import LossWeights
from mlip_md.trainer.step import init_state, make_train_step

KERNEL = "__gpu$xla.gpu.triton"
MOST_TURNS = 32
"""Of a loop, such as the halvings of a search; those over edges would have thousands."""


class FoundError(Exception):
    """Stops an engine where its step would begin."""


@pytest.fixture(scope="module")
def potential():
    return random_mace()


def step_of(potential, backend: str, skin: float, n_atoms: int, dtype: str = "float32"):
    """What an engine compiles for a cubic crystal, and the arguments that it calls it with."""
    side = round(n_atoms ** (1 / 3))
    engine = Engine(potential, dtype, "cpu", backend=backend, skin=skin)
    positions = 2.3 * np.stack(np.meshgrid(*[np.arange(side)] * 3), -1).reshape(-1, 3)
    arguments = []

    def capture(*given):
        arguments.extend(given)
        raise FoundError

    step, engine.runtime.step = engine.runtime.step, capture
    with contextlib.suppress(FoundError):
        engine.evaluate(positions, [6] * side**3, 2.3 * side * np.eye(3), True)
    engine.runtime.step = step  # shared by all engines of the potential
    return engine.runtime, arguments


@pytest.fixture(scope="module")
def tables(potential):
    weights = {"params": potential.params["params"]}
    return tabulate_radial(potential.network, weights, 4, potential.cutoff, np.float32)


def for_cuda(step, *arguments, **static) -> str:
    allowed = [export.DisabledSafetyCheck.custom_call(KERNEL)]
    exported = export.export(step, platforms=["cuda"], disabled_checks=allowed)
    return exported(*arguments, **static).mlir_module()


def turns(program: str) -> list[int]:
    """What the counters of loops are compared with, where it is known."""
    found = []
    for bound in re.finditer(r"cond \{[^{}]*compare +LT, %\w+, (%\w+)", program):
        defined = rf"{bound[1]} = stablehlo.constant dense<(\d+)>"
        found += [int(n) for n in re.findall(defined, program[: bound.end()])[-1:]]
    return found


def kernels(program: str) -> Counter:
    """Our kernels by name."""
    assert re.findall(r"custom_call @\S*callback", program) == []
    return Counter(re.findall(r'name = "mlip_md_(\w+)"', program))


MODES = [("vesin", 0.0), ("dense", 0.0), ("dense", 0.5), ("cells", 0.0), ("cells", 0.5)]


@pytest.mark.parametrize(("backend", "skin"), MODES)
def test_the_step_of_an_engine_in_every_mode_of_lists(potential, tables, backend, skin):
    runtime, (_, *arguments, shape) = step_of(potential, backend, skin, 125)
    params = {**potential.params, "tables": tables}
    program = for_cuda(runtime.step, params, *arguments, shape=shape)
    # features do not depend on positions; gradients of vectors go to senders and to receivers
    found = kernels(program)
    assert found.pop("find_starts") >= 3
    assert found == {"sum_messages": 1, "pull_to_edges": 1, "sum_rows": 2}
    assert max(turns(program), default=0) <= MOST_TURNS


def test_the_step_in_float64_has_no_kernels(potential):
    runtime, (params, *arguments, shape) = step_of(potential, "vesin", 0.0, 8, "float64")
    with runtime.precision():
        assert KERNEL not in for_cuda(runtime.step, params, *arguments, shape=shape)


def training_step(potential, n_edges: int):
    recipe = small_recipe("nothing.hdf5")
    rng = np.random.default_rng(0)
    n, g = 64, 3
    graph = Graph(
        positions=rng.normal(size=(n, 3)).astype(np.float32),
        species=np.zeros(n, np.int32),
        cell=np.zeros((g, 3, 3), np.float32),
        senders=np.zeros(n_edges, np.int32),
        receivers=np.zeros(n_edges, np.int32),
        shifts=np.zeros((n_edges, 3), np.int32),
        node_graph=np.zeros(n, np.int32),
        node_mask=np.ones(n, bool),
        edge_mask=np.ones(n_edges, bool),
        graph_mask=np.ones(g, bool),
    )
    batch = Batch(graph, np.zeros(g, np.float32), np.zeros((n, 3), np.float32))
    step = make_train_step(potential.network.apply, recipe)
    weights = LossWeights(*(np.float32(1) for _ in range(3)))
    return step, (init_state(recipe, potential.params), batch, weights)


@pytest.mark.parametrize(("memory", "fits"), [(2**30, True), (None, False)])
def test_a_training_step_takes_no_turns_where_memory_suffices(monkeypatch, potential, memory, fits):
    monkeypatch.setattr(messages, "MEMORY", 2**14)
    monkeypatch.setattr("mlip_md.trainer.step.TURN_MEMORY", None)  # of processors
    step, arguments = training_step(potential, 20000)
    with bounding_turns(memory):
        program = for_cuda(step, *arguments)
    assert (max(turns(program), default=0) <= MOST_TURNS) == fits
    if fits:
        # sums and forces; their changes by all factors; sums back to features and edges
        found = kernels(program)
        assert (found["sum_messages"], found["pull_to_edges"]) == (1 + 1, 1 + 1 + 1)
        assert found["pull_to_senders"] == 1 + 1


@pytest.mark.parametrize("compiled", [True, False])
def test_training_takes_few_turns_on_processors_where_the_convolution_is_compiled(
    monkeypatch, potential, compiled
):
    monkeypatch.setattr(messages, "MEMORY", 2**14)
    monkeypatch.setattr(
        "mlip_md.trainer.step.find_native", lambda: SimpleNamespace(available=compiled)
    )
    step, arguments = training_step(potential, 20000)
    program = step.lower(*arguments).as_text()
    assert (max(turns(program), default=0) <= MOST_TURNS) == compiled


def test_loops_are_seen():
    step = jax.jit(lambda x: jax.lax.fori_loop(0, 1234, lambda _, y: y * 2, x))
    assert turns(for_cuda(step, 1.0)) == [1234]


def card(platform="gpu", version="PJRT C API cuda 12090", capability="9.0", memory=80 * 2**30):
    """What is asked of a device."""
    return SimpleNamespace(
        platform=platform,
        client=SimpleNamespace(platform_version=version),
        compute_capability=capability,
        memory_stats=lambda: {"bytes_limit": memory} if memory else None,
    )


@pytest.mark.parametrize(
    ("device", "runs"),
    [
        (card(), True),
        (card(capability="7.5"), False),
        (card(version="PJRT C API rocm 60000", capability="gfx942"), False),
        (card("cpu", "cpu"), False),
        (card("tpu", "tpu"), False),
    ],
)
def test_which_devices_have_kernels(device, runs):
    assert runs_kernels(device) == runs


def test_the_share_of_memory_that_a_turn_takes(monkeypatch):
    monkeypatch.delenv(SHARE_VARIABLE, raising=False)
    assert message_memory(card()) == 8 * 2**30
    assert message_memory(card(memory=None)) is None
    assert message_memory(card("cpu")) is None
    monkeypatch.setenv(SHARE_VARIABLE, "0.5")
    assert message_memory(card()) == 40 * 2**30
    for wrong in ("0", "1.5", "half", "nan"):
        monkeypatch.setenv(SHARE_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"{SHARE_VARIABLE} = '{wrong}'.*above 0"):
            message_memory(card())
