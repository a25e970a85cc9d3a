"""Radial weights by tables: as good as float32, one function with their slopes, and only if so."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_files import make_potential
from test_convolution import N_EDGES, N_NODES, PLAN, close, inputs

import mlip_md
from mlip_md.graph import Graph
from mlip_md.networks import tabulate
from mlip_md.networks.convolution import convolve
from mlip_md.networks.radial_tables import (
    ERROR,
    SLOPE_ERROR,
    compile_jets,
    convolve_by_table,
    evaluate_table,
    fit_radial,
)
from mlip_md.networks.tabulate import tabulate_radial
from mlip_md.potential import predict

pytestmark = pytest.mark.kernel
CUTOFF = 4.0


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def radial(lengths: jax.Array, scale: float = 1.0) -> jax.Array:
    mixing = np.random.default_rng(1).normal(size=(3, PLAN.columns))
    waves = jnp.stack([jnp.sin(3 * lengths), jnp.cos(2 * lengths), jnp.exp(-lengths)], axis=1)
    ended = jnp.maximum(1 - lengths / CUTOFF, 0)[:, None] ** 5
    return scale * (waves @ mixing) * ended


def test_a_fit_is_as_good_as_it_says_and_joins_smoothly():
    fit = fit_radial(compile_jets(radial), PLAN, CUTOFF, np.float64)
    assert fit.error <= ERROR
    assert fit.slope_error <= SLOPE_ERROR
    table, zeros = jnp.asarray(fit.coefficients[None]), jnp.zeros(997, int)
    lengths = jnp.linspace(0.05, CUTOFF * 1.1, 997)
    weights = partial(evaluate_table, table, PLAN, index=zeros, cutoff=CUTOFF)
    read = [c for p in PLAN.paths for c in range(p.column, p.column + p.width)]
    direct, tabled = radial(lengths)[:, read], weights(lengths)[:, read]
    assert np.abs(direct - tabled).max() <= ERROR * np.abs(direct).max()
    cells = fit.coefficients.shape[1]
    knots = np.arange(1, cells) * (CUTOFF / cells)
    for order in range(3):  # one derivative less than is matched, by differences
        below, above = (_nth_slope(weights, knots + side * 1e-9, order) for side in (-1.0, 1.0))
        scale = max(1.0, np.abs(above).max())
        assert np.abs(below - above).max() < 1e-6 * scale


def _nth_slope(weights, lengths, order):
    function = partial(weights, index=jnp.zeros(len(lengths), int))
    for _ in range(order):
        function = partial(lambda inner, r: jax.jvp(inner, (r,), (jnp.ones_like(r),))[1], function)
    return np.asarray(function(jnp.asarray(lengths)))


def test_a_kink_has_no_table():
    def kinked(lengths):
        return jnp.abs(lengths - 2.0)[:, None] * radial(lengths)

    assert fit_radial(compile_jets(kinked), PLAN, CUTOFF, np.float64) is None


def test_sums_and_derivatives_are_those_of_the_function():
    """Energies, gradients, second derivatives in both modes; two tables, chosen by edge."""
    compiled = compile_jets(radial)
    fits = [
        fit_radial(lambda r, s=s: compiled(r, s), PLAN, CUTOFF, np.float64) for s in (1.0, -2.0)
    ]
    table = jnp.asarray(np.stack([fit.coefficients for fit in fits]))
    pairs, x, y, _ = inputs()
    pairs = pairs._replace(inside=jnp.ones(N_EDGES, bool))
    rng = np.random.default_rng(2)
    lengths = jnp.asarray(rng.uniform(0.5, 1.1 * CUTOFF, N_EDGES))
    index = jnp.asarray(rng.integers(0, 2, N_EDGES))

    def by_table(x, y, lengths):
        sums = convolve_by_table(
            PLAN, pairs, x, y, lengths, table, index, cutoff=CUTOFF, rows=N_NODES
        )
        return sum(jnp.sum(jnp.sin(s)) for s in sums)

    def by_function(x, y, lengths):
        weights = jnp.where(index[:, None] == 0, 1.0, -2.0) * radial(lengths)
        sums = convolve(PLAN, pairs, x, y, weights, N_NODES)
        return sum(jnp.sum(jnp.sin(s)) for s in sums)

    def derivatives(function):
        first = jax.grad(function, argnums=(0, 1, 2))

        def loss(*factors):
            return sum(jnp.sum(jnp.cos(g)) for g in jax.tree.leaves(first(*factors)))

        second = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, y, lengths)
        curved = jax.jit(jax.jacfwd(jax.grad(lambda t: function(x, y * t, lengths * t))))(1.01)
        return function(x, y, lengths), jax.jit(first)(x, y, lengths), second, curved

    for found, expected in zip(*map(derivatives, (by_table, by_function)), strict=True):
        close(
            jax.tree.map(lambda a: a * 1e-5, found), jax.tree.map(lambda a: a * 1e-5, expected)
        )  # the error of the table, amplified by curvature, is far below 1e-6


@pytest.mark.parametrize(
    ("architecture", "options", "tables"),
    [
        ("mace", {}, {1}),
        ("mace", {"species_embedding_dim": 3}, {9}),
        ("nequip", {}, {1}),
        ("nequip", {"radial_net_nonlinearity": "relu"}, set()),
    ],
)
def test_forces_of_networks_by_tables(architecture, options, tables, monkeypatch):
    """In float64, over the largest component; with a table for each pair where it matters."""
    potential = make_potential(architecture, **options)
    weights = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(potential.params))
    compiled = []
    monkeypatch.setattr(
        tabulate,
        "compile_jets",
        lambda radial: compiled.append(compile_jets(radial)) or compiled[-1],
    )
    made = tabulate_radial(
        potential.network, weights, len(potential.elements), potential.cutoff, np.float64
    )
    assert [jets._cache_size() for jets in compiled] == [1] * potential.config.num_layers
    assert {len(leaf) for leaf in jax.tree.leaves(made)} == tables
    graph = _cluster(potential)
    apply = jax.jit(lambda params: predict(potential.network.apply, params, graph))
    direct, tabled = apply(weights), apply({**weights, "tables": made})
    assert np.abs(direct.forces).max() > 1e-6
    error = np.abs(direct.forces - tabled.forces).max()
    assert error <= 1e-6 * np.abs(direct.forces).max()
    assert (error > 0) == bool(tables)  # the tables were read, or there were none


def _cluster(potential) -> Graph:
    rng = np.random.default_rng(5)
    n = 7
    positions = rng.normal(size=(n, 3)) * 0.45 * potential.cutoff / 2
    receivers, senders = np.nonzero(~np.eye(n, dtype=bool))
    return Graph(
        positions=positions,
        species=rng.integers(0, len(potential.elements), n).astype(np.int32),
        cell=np.zeros((1, 3, 3)),
        senders=senders.astype(np.int32),
        receivers=receivers.astype(np.int32),
        shifts=np.zeros((len(senders), 3), np.int32),
        node_graph=np.zeros(n, np.int32),
        node_mask=np.ones(n, bool),
        edge_mask=np.ones(len(senders), bool),
        graph_mask=np.ones(1, bool),
    )


def test_tables_that_would_be_too_large_are_not_made(monkeypatch):
    potential = make_potential("mace")
    arguments = potential.network, dict(potential.params), 3, potential.cutoff, np.float32
    assert tabulate_radial(*arguments)
    monkeypatch.setattr(tabulate, "MEMORY", 1000)
    assert tabulate_radial(*arguments) == {}


def test_the_bundled_potential_has_tables_for_all_layers():
    potential = mlip_md.load("organics-gfn2")
    made = tabulate_radial(
        potential.network, potential.params, len(potential.elements), potential.cutoff, np.float32
    )
    assert len(jax.tree.leaves(made)) == potential.config.num_layers
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(made))
