"""NequIP by itself: which blocks, paths and weights exist, and what holds for all of them."""

import dataclasses
import functools

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from reference_library import jit

from mlip_md.errors import ConfigError
from mlip_md.graph import Graph
from mlip_md.networks import NequIPConfig, layers, messages
from mlip_md.networks.nequip import (
    NequIP,
    existing_blocks,
    message_paths,
    read_irreps,
)
from mlip_md.potential import predict

CUTOFF = 4.0
SMALL = NequIPConfig(
    num_layers=3,
    node_irreps="6x0e + 4x0o + 3x1e + 4x1o",
    l_max=1,
    num_bessel=4,
    radial_net_n_hidden=8,
    radial_net_n_layers=1,
)


def all_pairs(positions, species, dtype=np.float64):
    """Graph in which every atom is a neighbor of every other one."""
    n = len(positions)
    receivers, senders = np.nonzero(~np.eye(n, dtype=bool))
    return Graph(
        positions=np.asarray(positions, dtype),
        species=np.asarray(species, np.int32),
        cell=np.zeros((1, 3, 3), dtype),
        senders=senders.astype(np.int32),
        receivers=receivers.astype(np.int32),
        shifts=np.zeros((len(senders), 3), np.int32),
        node_graph=np.zeros(n, np.int32),
        node_mask=np.ones(n, bool),
        edge_mask=np.ones(len(senders), bool),
        graph_mask=np.ones(1, bool),
    )


def cluster(n, dtype=np.float64):
    rng = np.random.default_rng(1)
    lattice = 1.6 * np.array(list(np.ndindex(3, 3, 3)), float)[:n]
    return all_pairs(lattice + rng.uniform(-0.3, 0.3, (n, 3)), rng.integers(0, 3, n), dtype)


def random_params(network, graph, seed=0):
    """N(0, 1) weights, scaled down where the network does not do it itself."""
    shapes = jax.eval_shape(network.init, jax.random.key(0), graph)
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        kernel = "kernel" in jax.tree_util.keystr(path)
        return rng.standard_normal(leaf.shape) / (np.sqrt(leaf.shape[0]) if kernel else 1.0)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def network_of(config):
    return NequIP(config, 3, CUTOFF, 7.0)


@pytest.fixture(scope="module")
def small():
    """Network, weights, graph of more than 256 edges, its energies and forces."""
    network, graph = network_of(SMALL), cluster(18)
    params = random_params(network, graph)
    evaluate = jit(functools.partial(predict, network.apply))
    with jax.enable_x64(True):
        return network, params, graph, evaluate, jax.device_get(evaluate(params, graph))


def tree_lines(shapes):
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes["params"]):
        key = "#".join(entry.key for entry in path)
        yield f"params#mlip_network#NequipBlock_0#{key}\t{leaf.shape}\tfloat32"


@pytest.fixture(scope="module")
def card_shapes():
    network = NequIP(NequIPConfig(), 15, 5.0, 14.375)
    return jax.eval_shape(network.init, jax.random.key(0), cluster(3, np.float32))


def test_card_has_the_published_number_of_parameters(card_shapes):
    leaves = jax.tree_util.tree_leaves(card_shapes)
    assert len(leaves) == 111
    assert sum(leaf.size for leaf in leaves) == 1_327_792


def test_card_has_the_published_parameter_tree(card_shapes, reference_data):
    text = (reference_data / "golden" / "nequip_param_tree.txt").read_text(encoding="utf-8")
    published = {line for line in text.splitlines() if line.startswith("params#")}
    assert set(tree_lines(card_shapes)) == published


def test_initial_weights_have_the_published_spread():
    config = NequIPConfig(num_layers=1, node_irreps="64x0e + 64x1o", l_max=1)
    network = network_of(config)
    params = jit(network.init)(jax.random.key(3), cluster(3, np.float32))
    layer = params["params"]["NequipLayer_0"]
    spreads = [float(jnp.std(kernel["kernel"])) for kernel in layer["MLP_0"].values()]
    np.testing.assert_allclose(spreads, [2 / np.sqrt(8), 2 / np.sqrt(64), 1 / 8], rtol=0.07)
    for module in ("Linear_0", "Linear_1", "FullyConnectedTensorProduct_0"):
        for weights in layer[module].values():
            np.testing.assert_allclose(float(jnp.std(weights)), 1.0, rtol=0.07)


def test_blocks_come_to_life_layer_by_layer():
    config = NequIPConfig()
    existing = [{str(ir) for _, ir in existing_blocks(config, i)} for i in range(6)]
    assert existing[0] == {"0e"}
    assert existing[1] == {"0e", "1o", "2e"}
    assert existing[2] == {"0e", "1e", "1o", "2e", "2o"}
    assert existing[3] == existing[4] == existing[5] == {"0e", "0o", "1e", "1o", "2e", "2o"}


def test_only_what_the_energy_reads_is_computed():
    config = NequIPConfig()
    paths, read = message_paths(config, 1), [read_irreps(config, i) for i in range(6)]
    assert [{str(ir) for ir in irreps} for irreps in read] == [
        {"0e"},
        {"0e", "1o", "2e"},
        {"0e", "1e", "1o", "2e", "2o"},
        {"0e", "1e", "1o", "2e", "2o"},
        {"0e", "1o", "2e"},
        {"0e"},
    ]
    # Weights of all paths exist in every layer; only needed ones are evaluated.
    assert sum(path.width for path in paths) == paths[-1].columns.stop == 816
    computed = [
        sum(p.width for p in paths if p.source in read[i] and p.irrep in read[i + 1])
        for i in range(5)
    ]
    assert computed == [192, 408, 588, 408, 100]


def features(network, params, graph):
    """Features after each layer, as flax captures them."""
    apply = jit(lambda params: network.apply(params, graph, capture_intermediates=True))
    block = apply(params)[1]["intermediates"]
    return [block[f"NequipLayer_{i}"]["__call__"][0] for i in range(network.config.num_layers)]


def test_what_is_left_out_does_not_reach_the_energy(small):
    """More layers on top read more of the features below, and leave the others as they are."""
    network, _, graph, _, _ = small
    deep = network_of(dataclasses.replace(SMALL, num_layers=6))
    params = random_params(deep, graph)
    with jax.enable_x64(True):
        ours, all_of_them = features(network, params, graph), features(deep, params, graph)
    counts = []
    for some, more in zip(ours, all_of_them, strict=False):
        counts.append((len(some), len(more)))
        for ir, feature in some.items():
            scale = np.abs(feature).max()
            np.testing.assert_allclose(feature, more[ir], rtol=0, atol=1e-12 * scale)
    assert counts == [(2, 2), (2, 3), (1, 4)]


def test_chunks_of_edges_sum_to_the_whole(small, monkeypatch):
    network, params, graph, _, expected = small
    assert graph.n_edges > 256
    monkeypatch.setattr(messages, "MEMORY", 1)
    chunked = jit(lambda params, graph: predict(network.apply, params, graph))
    with jax.enable_x64(True):
        lowered = chunked.lower(params, graph)
        result = lowered.compile()(params, graph)
    assert "while" in lowered.as_text()
    np.testing.assert_allclose(result.node_energies, expected.node_energies, rtol=1e-12)
    scale = np.abs(expected.forces).max()
    np.testing.assert_allclose(result.forces, expected.forces, atol=1e-12 * scale)


@pytest.mark.parametrize("parity", [1, -1])
def test_energies_are_invariant_and_forces_turn_along(small, parity):
    _, params, graph, evaluate, expected = small
    rotation = parity * np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    with jax.enable_x64(True):
        result = evaluate(params, graph.replace(positions=graph.positions @ rotation.T + 1.7))
    np.testing.assert_allclose(result.node_energies, expected.node_energies, rtol=1e-10)
    scale = np.abs(expected.forces).max()
    np.testing.assert_allclose(result.forces, expected.forces @ rotation.T, atol=1e-10 * scale)


ONE_LAYER = dataclasses.replace(SMALL, num_layers=1, node_irreps="6x0e + 4x1o + 2x2e", l_max=2)


def test_second_derivatives_are_right_along_the_axes():
    steps = np.vstack([np.zeros(3), np.eye(3), -1.1 * np.eye(3)])
    network, graph = network_of(ONE_LAYER), all_pairs(1.3 * steps, [0, 1, 2, 0, 1, 2, 0])
    params = random_params(network, graph)
    direction = np.random.default_rng(4).normal(size=steps.shape)

    @jit
    def forces_and_curvature(positions):
        def forces(positions):
            return predict(network.apply, params, graph.replace(positions=positions)).forces

        return forces(positions), jax.grad(lambda x: jnp.sum(forces(x) * direction))(positions)

    with jax.enable_x64(True):
        _, curvature = forces_and_curvature(graph.positions)
        step = 1e-4
        plus = forces_and_curvature(graph.positions + step * direction)[0]
        minus = forces_and_curvature(graph.positions - step * direction)[0]
    # The Hessian is symmetric: its product with a direction is the change of forces along it.
    numeric = (plus - minus) / (2 * step)
    np.testing.assert_allclose(curvature, numeric, atol=1e-6 * np.abs(numeric).max())


@pytest.mark.parametrize("nonlinearity", ["swish", "sigmoid"])
def test_edges_beyond_the_cutoff_do_nothing(nonlinearity):
    config = dataclasses.replace(ONE_LAYER, radial_net_nonlinearity=nonlinearity)
    positions = [[0, 0, 0], [1.5, 0, 0], [1.4 + CUTOFF, 1.0, 0]]
    network, graph = network_of(config), all_pairs(positions, [0, 1, 2])
    params = random_params(network, graph)
    long = np.linalg.norm(graph.positions[graph.senders] - graph.positions[graph.receivers], axis=1)
    with jax.enable_x64(True):
        apply = jit(network.apply)
        energies = apply(params, graph)
        without = apply(params, graph.replace(edge_mask=long < CUTOFF))
    assert (long > CUTOFF).sum() == 4
    np.testing.assert_array_equal(energies, without)


def test_atoms_without_neighbors_have_an_energy_of_their_species():
    network = network_of(ONE_LAYER)
    graph = all_pairs([[0, 0, 0]], [0])
    assert graph.n_edges == 0
    params = random_params(network, graph)
    with jax.enable_x64(True):
        apply = jit(network.apply)
        alone = [apply(params, graph.replace(species=np.array([s], np.int32))) for s in range(3)]
        far = apply(params, all_pairs(np.diag([0.0, 50.0, 90.0]), [0, 1, 2]))
    np.testing.assert_allclose(far, np.concatenate(alone), rtol=1e-12)
    assert np.all(np.abs(far) > 1e-6)
    assert len(np.unique(np.round(far, 9))) == 3


def test_working_precision_follows_positions():
    network, graph = network_of(ONE_LAYER), cluster(4, np.float32)
    with jax.enable_x64(True):
        params = jax.tree_util.tree_map(np.float32, random_params(network, graph))
        assert jax.eval_shape(network.apply, params, graph).dtype == np.float32
        assert jax.eval_shape(network.apply, params, cluster(4)).dtype == np.float64


def test_process_wide_settings_of_e3nn_do_not_matter():
    network, graph = network_of(ONE_LAYER), cluster(4)
    params = random_params(network, graph)
    names = ("path_normalization", "gradient_normalization", "irrep_normalization")
    before = {name: e3nn.config(name) for name in names}
    with jax.enable_x64(True):
        expected = jit(network.apply)(params, graph)
        try:
            for name, value in zip(names, ("element", "element", "norm"), strict=True):
                e3nn.config(name, value)
            jax.clear_caches()
            result = jit(network.apply)(params, graph)
        finally:
            for name, value in before.items():
                e3nn.config(name, value)
    np.testing.assert_array_equal(result, expected)


def test_contract_is_a_matrix_product_to_every_order():
    rng = np.random.default_rng(5)
    rotations, features = rng.normal(size=(4, 5, 3)), rng.normal(size=(4, 3, 2))
    with jax.enable_x64(True):
        np.testing.assert_allclose(layers.contract(rotations, features), rotations @ features)
        check_grads(layers.contract, (rotations, features), order=2, modes=("fwd", "rev"))


@pytest.mark.parametrize(
    ("node_irreps", "message"),
    [
        ("8x0o + 4x1o", "0e"),
        ("8x1o", "0e"),
        ("1x0e + 4x1o", "at least 2"),
        ("0x1o + 4x0e", "without empty blocks"),
        ("64", "cannot be read"),
    ],
)
def test_irreps_without_energies_are_refused(node_irreps, message):
    with pytest.raises(ConfigError, match="node_irreps") as error:
        NequIPConfig(node_irreps=node_irreps)
    assert message in str(error.value)
