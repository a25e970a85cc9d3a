"""Both networks against published numbers and, live, against the library that made them.

Everything here runs in float64 on raw node energies: in float32, or next to the reference energies
of the atoms, an error of one percent in a spherical harmonic would not be seen.
"""

import dataclasses

import e3nn_jax as e3nn
import jax
import numpy as np
import pytest
from reference_library import applied, graph_of, jit, joined, library_network, strong_weights

from mlip_md.formats.instadeep import load_zip
from mlip_md.graph import edge_vectors
from mlip_md.networks import MACEConfig, NequIPConfig, build_network, layers, messages
from mlip_md.networks.nequip import NequIP
from mlip_md.potential import predict

NETWORKS = ("mace", "nequip")
FILES = {
    "mace": ("mace_card_v012.zip", "mace_outputs_mlip0110_f64.npz"),
    "nequip": ("nequip_card_strong_v012.zip", "nequip_outputs_strong_f64.npz"),
}
SYSTEMS = (
    "aspirin",
    "h2_4999",
    "h_isolated",
    "mix15",
    "nacl8",
    "si2_triclinic",
    "slab_pbc_TTF",
    "water",
)
PERIODIC = ("nacl8", "si2_triclinic", "slab_pbc_TTF")

ENERGY_TOLERANCE = 1e-10
FORCE_TOLERANCE = 1e-9


def float64(tree):
    return jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.fixture(scope="module", params=NETWORKS)
def published(request, reference_data):
    """Published numbers and ours, of all systems in one padded batch (one compilation)."""
    golden = reference_data / "golden"
    model, outputs = (golden / name for name in FILES[request.param])
    potential, numbers = load_zip(model), np.load(outputs)
    graphs = []
    for name in SYSTEMS:
        system = np.load(golden / "inputs" / f"{name}.npz")
        edges = [numbers[f"{name}/{key}"] for key in ("senders", "receivers", "shifts")]
        species = potential.species(system["numbers"])
        graphs.append(graph_of(system["positions"], system["cell"], species, *edges))
    sizes = [graph.n_nodes for graph in graphs]
    n_edges = sum(graph.n_edges for graph in graphs) + 5
    batch = joined(graphs, sum(sizes) + 2, n_edges, len(graphs) + 1)
    with jax.enable_x64(True):
        evaluate = jit(lambda params, graph: predict(potential.network.apply, params, graph))
        ours = jax.device_get(evaluate(float64(potential.params), batch))
    starts = np.cumsum([0, *sizes])
    rows = {name: slice(*starts[i : i + 2]) for i, name in enumerate(SYSTEMS)}
    reference_energies = {
        name: potential.reference_energies(batch.species[rows[name]]) for name in SYSTEMS
    }
    return numbers, ours, rows, reference_energies


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_energies(published, system):
    numbers, ours, rows, reference_energies = published
    expected = numbers[f"{system}/node_energies"]
    # Where the published numbers contain E0, its last digits are all that can be asked for.
    lost = np.abs(reference_energies[system]).max() * 1e-15
    raw = expected - reference_energies[system]
    tolerance = ENERGY_TOLERANCE * np.abs(raw).max() + lost
    np.testing.assert_allclose(ours.node_energies[rows[system]], raw, rtol=0, atol=tolerance)


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_forces(published, system):
    numbers, ours, rows, _ = published
    expected = numbers[f"{system}/forces"]
    # An almost broken bond (h2_4999) leaves forces of 1e-11, known to 1e-15 eV/Å.
    tolerance = FORCE_TOLERANCE * np.abs(expected).max() + 1e-15
    np.testing.assert_allclose(ours.forces[rows[system]], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("system", PERIODIC)
def test_published_stress(published, system):
    numbers, ours, _, _ = published
    expected = numbers[f"{system}/stress"]
    tolerance = FORCE_TOLERANCE * np.abs(expected).max()
    stress = ours.stress[SYSTEMS.index(system)]
    np.testing.assert_allclose(stress, expected, rtol=0, atol=tolerance)


def aspirin_features(golden, name, network, params):
    """Published features of aspirin by module, and ours as captured by flax."""
    numbers = np.load(golden / f"{name}_intermediates_aspirin_f64.npz")
    system = np.load(golden / "inputs" / "aspirin.npz")
    graph = graph_of(
        system["positions"],
        np.zeros((3, 3)),
        numbers["species"],
        numbers["senders"],
        numbers["receivers"],
        np.zeros((len(numbers["senders"]), 3)),
    )
    with jax.enable_x64(True):
        np.testing.assert_array_equal(
            edge_vectors(graph),
            numbers["vectors"][np.argsort(numbers["receivers"], kind="stable")],
        )
        apply = jit(lambda params: network.apply(params, graph, capture_intermediates=True))
        _, captured = jax.device_get(apply(params))
    return numbers, captured["intermediates"]


def by_irrep(array, irreps):
    """Split (n, dim) in e3nn's layout into (n, 2l+1, channels) per irrep."""
    start = 0
    for mul, ir in e3nn.Irreps(irreps):
        block = array[:, start : start + mul * ir.dim].reshape(-1, mul, ir.dim)
        start += mul * ir.dim
        yield ir, np.swapaxes(block, 1, 2)


DEEP = 8


def deepened(config):
    """NequIP with layers on top of the five that read all their features, odd scalars too."""
    return dataclasses.replace(config, num_layers=DEEP)


def test_nequip_features_are_the_published_ones(reference_data):
    """Odd features know the sign of the edge vectors and the nonlinearity of 0o; energies don't."""
    golden = reference_data / "golden"
    potential = load_zip(golden / FILES["nequip"][0])
    params = float64(potential.params)
    block = params["params"]
    for i in range(5):
        # The features were written with these kernels before they were made 30 times stronger.
        block[f"NequipLayer_{i}"]["MLP_0"]["Dense_2"]["kernel"] /= 30
    for i in range(5, DEEP):
        block[f"NequipLayer_{i}"] = block["NequipLayer_4"]
    network = NequIP(deepened(potential.config), 15, 5.0, potential.avg_num_neighbors)
    numbers, captured = aspirin_features(golden, "nequip", network, params)
    irreps, seen = "64x0e + 64x0o + 32x1e + 32x1o + 4x2e + 4x2o", set()
    for i in range(5):
        [blocks] = captured[f"NequipLayer_{i}"]["__call__"]
        expected = numbers[f"NequipBlock_0/NequipLayer_{i}/__call__"]
        for ir, array in by_irrep(expected, irreps):
            if ir not in blocks:
                assert not array.any()
                continue
            seen.add(str(ir))
            np.testing.assert_allclose(blocks[ir], array, rtol=0, atol=1e-6 * np.abs(array).max())
    assert seen == {"0e", "0o", "1e", "1o", "2e", "2o"}


def test_mace_features_are_the_published_ones(reference_data):
    """Odd features know the sign of the edge vectors; energies do not."""
    golden = reference_data / "golden"
    potential = load_zip(golden / FILES["mace"][0])
    params = float64(potential.params)
    numbers, captured = aspirin_features(golden, "mace", potential.network, params)
    raw = numbers["MaceBlock_0/__call__"].reshape(21, -1).sum(axis=1)
    np.testing.assert_allclose(captured["__call__"][0], raw, rtol=ENERGY_TOLERANCE)
    [(_, features)] = captured["layer_0"]["__call__"]
    expected = numbers["MaceBlock_0/layer_0/__call__#1"]
    irreps = "128x0e + 128x1o + 128x2e + 128x3o"
    for ir, array in by_irrep(expected, irreps):
        tolerance = 1e-6 * np.abs(array).max()
        np.testing.assert_allclose(features[ir], array, rtol=0, atol=tolerance)


SLIM = {
    "mace": MACEConfig(num_channels=4),
    "nequip": NequIPConfig(node_irreps="6x0e + 5x0o + 4x1e + 4x1o + 2x2e + 2x2o"),
}
CARD = {"mace": MACEConfig(), "nequip": NequIPConfig()}
NUM_SPECIES, CUTOFF, AVG_NUM_NEIGHBORS, AVG_R_MIN = 5, 5.0, 14.375, 0.984375


def random_periodic(seed=0):
    """Nine atoms of five elements in a skew cell smaller than the cutoff, with its own edges."""
    rng = np.random.default_rng(seed)
    cell = np.array([[3.9, 0, 0], [0.7, 4.2, 0], [-0.5, 0.9, 4.4]])
    fractions = np.array(list(np.ndindex(3, 3, 1)), float)[:9] / 3
    positions = fractions @ cell + rng.uniform(-0.15, 0.15, (9, 3))
    images = np.array(list(np.ndindex(5, 5, 5))) - 2
    vectors = positions[None, :, None] - positions[:, None, None] + (images @ cell)[None, None]
    lengths = np.linalg.norm(vectors, axis=-1)
    senders, receivers, image = np.nonzero((lengths < CUTOFF) & (lengths > 0))
    species = rng.integers(0, NUM_SPECIES, 9)
    return graph_of(positions, cell, species, senders, receivers, images[image])


def random_weights(network, graph):
    return float64(strong_weights(jax.eval_shape(network.init, jax.random.key(0), graph)))


def reference(config, **options):
    """The network of the library with our face: apply(params, graph)."""
    values = dict(vars(config))
    info = {
        "atomic_energies_map": {1: 0.0, 6: 0.0, 7: 0.0, 8: 0.0, 17: 0.0},
        "graph_cutoff_angstrom": CUTOFF,
        "avg_num_neighbors": AVG_NUM_NEIGHBORS,
        "avg_r_min_angstrom": AVG_R_MIN,
    }
    library = applied(library_network(config.architecture, values, info), **options)
    block = config.published_block
    return lambda params, graph: library({"params": {block: params["params"]}}, graph)


def our_network(config):
    return build_network(
        config,
        num_species=NUM_SPECIES,
        cutoff=CUTOFF,
        avg_num_neighbors=AVG_NUM_NEIGHBORS,
        avg_r_min=AVG_R_MIN,
    )


def test_mace_card_has_the_published_number_of_parameters():
    network = build_network(
        CARD["mace"], num_species=15, cutoff=5.0, avg_num_neighbors=14.375, avg_r_min=0.984375
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), random_periodic())
    assert sum(leaf.size for leaf in jax.tree_util.tree_leaves(shapes)) == 2_139_152


def deviations(result, expected):
    """Largest deviations of energies, forces and stress, in units of their tolerances."""

    def worst(a, b, tolerance):
        return float(np.abs(a - b).max() / np.abs(b).max() / tolerance)

    return {
        "energies": worst(result.node_energies, expected.node_energies, ENERGY_TOLERANCE),
        "forces": worst(result.forces, expected.forces, FORCE_TOLERANCE),
        "stress": worst(result.stress, expected.stress, FORCE_TOLERANCE),
    }


# Paths (l1, l2, l3) that reach the energy of the cards' networks.
PATHS = {"mace": ((1, 1, 0), (1, 2, 1), (2, 3, 3)), "nequip": ((1, 1, 0), (1, 2, 1), (2, 2, 1))}


@pytest.fixture(scope="module", params=NETWORKS)
def live(request):
    """Our network with adjustable harmonics and paths, and the reference library's numbers."""
    name, config, graph = request.param, SLIM[request.param], random_periodic()
    network = our_network(config)
    params = random_weights(network, graph)
    harmonics, convolve = layers.spherical_harmonics, messages.convolve

    def adjustable(params, degree_factors, path_factors):
        factors = dict(zip(PATHS[name], path_factors, strict=True))

        def scaled_harmonics(vectors, degrees):
            return {l: degree_factors[l] * y for l, y in harmonics(vectors, degrees).items()}

        def scaled_paths(plan, pairs, x, y, weights, rows):
            for path in plan.paths:
                blocks = plan.sources[path.source], plan.targets[path.target]
                factor = factors.get((blocks[0].degree, path.degree, blocks[1].degree), 1.0)
                columns = slice(path.column, path.column + path.width)
                weights = weights.at[:, columns].multiply(factor)
            return convolve(plan, pairs, x, y, weights, rows)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layers, "spherical_harmonics", scaled_harmonics)
            patch.setattr(messages, "convolve", scaled_paths)
            return predict(network.apply, params, graph)

    library = reference(config)
    with jax.enable_x64(True):
        expected = jit(lambda params: predict(library, params, graph))(params)
    return name, params, jit(adjustable), jax.device_get(expected)


def adjusted(live, degree=None, path=None):
    name, params, evaluate, expected = live
    degree_factors, path_factors = np.ones(4), np.ones(len(PATHS[name]))
    if degree is not None:
        degree_factors[degree] = 1.01
    if path is not None:
        path_factors[path] = 1.01
    with jax.enable_x64(True):
        return deviations(evaluate(params, degree_factors, path_factors), expected)


def test_live_reference_library(live):
    assert max(adjusted(live).values()) < 1.0


def layer_features(name, captured):
    """Features after each layer, of either implementation, as flax captured them."""
    if name == "mace":
        [(_, features)] = captured["layer_0"]["__call__"]
        return [features]
    return [captured[f"NequipLayer_{i}"]["__call__"][0] for i in range(SLIM[name].num_layers)]


@pytest.mark.parametrize("name", NETWORKS)
def test_live_features(name):
    """Features after every layer: unlike energies, odd ones know the sign of the edge vectors."""
    config, graph = SLIM[name], random_periodic()
    network = our_network(deepened(config) if name == "nequip" else config)
    params = random_weights(network, graph)
    library = reference(config, capture_intermediates=True)
    with jax.enable_x64(True):
        _, theirs = jit(lambda params: library(params, graph))(params)
        ours = jit(lambda params: network.apply(params, graph, capture_intermediates=True))
        _, captured = ours(params)
    pairs = zip(
        layer_features(name, captured["intermediates"]),
        layer_features(name, theirs["intermediates"][config.published_block]),
        strict=True,
    )
    seen = set()
    for features, expected in pairs:
        for ir, array in by_irrep(np.asarray(expected.array), expected.irreps):
            if ir not in features:
                assert not array.any()
                continue
            seen.add(str(ir))
            tolerance = ENERGY_TOLERANCE * np.abs(array).max()
            np.testing.assert_allclose(features[ir], array, rtol=0, atol=tolerance)
    odd = {"mace": {"0e", "1o", "2e", "3o"}, "nequip": {"0e", "0o", "1e", "1o", "2e", "2o"}}
    assert seen == odd[name]


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_one_percent_in_one_harmonic_would_be_seen(live, degree):
    if degree > SLIM[live[0]].l_max:
        pytest.skip("the network has no harmonics of this degree")
    assert min(adjusted(live, degree=degree).values()) > 100


@pytest.mark.parametrize("path", [0, 1, 2])
def test_one_percent_in_one_path_would_be_seen(live, path):
    assert min(adjusted(live, path=path).values()) > 100


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_live_reference_library_at_card_size(name):
    graph, network = random_periodic(), our_network(CARD[name])
    params = random_weights(network, graph)
    library = reference(CARD[name])
    with jax.enable_x64(True):
        expected = jit(lambda params: predict(library, params, graph))(params)
        result = jit(lambda params: predict(network.apply, params, graph))(params)
    assert max(deviations(result, expected).values()) < 1.0
    assert np.abs(expected.forces).max() > 1e-3
