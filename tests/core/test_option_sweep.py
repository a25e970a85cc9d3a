"""Every option of both networks against the library that the published models come from.

Files are written by the library with random weights, and read and evaluated here: in float64
every number is the library's, in float32 it is that number to within rounding. What the library
itself cannot do is judged by what must hold.
"""

import collections
import dataclasses
import functools
import itertools
import os
import re

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from option_cases import OPTIONS, SHORT, SYSTEMS, Case, random_case
from reference_library import applied, inputs, jit, library_network, strong_weights

from mlip_md.errors import ConfigError
from mlip_md.formats.instadeep import load_zip
from mlip_md.networks import (
    Hyperparameters,
    MACEConfig,
    NequIPConfig,
    build_network,
    layers,
)
from mlip_md.networks.config import ACTIVATIONS, RADIAL_ENVELOPES
from mlip_md.networks.product_basis import monomial_indices, reduced_couplings
from mlip_md.networks.radial_scale import radial_scale
from mlip_md.potential import Prediction, predict

TOLERANCE = {"float64": 1e-9, "float32": 2e-5}
CEILING = 1e-4
"""What float32 may deviate by where the library's own float32 misses the tolerance too."""
SKIN = 0.5
"""Å by which our neighbor lists reach beyond the cutoff, to no effect."""
RANDOM_CASES = int(os.environ.get("MLIP_MD_SWEEP_CASES", "60"))
"""Number of random cases per network in the long run."""


@pytest.fixture
def library(monkeypatch, loose_ranks):
    """The library, whose pseudotensors are mended: one module expects irreps that never come."""
    pytest.importorskip("mlip.models_v1")
    from mlip.models_v1.mace import models

    tensor_product = models.FullyConnectedTensorProduct

    def mended(irreps_in1, **options):
        return tensor_product(**options)

    monkeypatch.setattr(models, "FullyConnectedTensorProduct", mended)


def written(case, path):
    """A network of the library, and its random weights as in the file that it writes."""
    from mlip.models import ForceField
    from mlip.models.model_io import save_model_to_zip
    from mlip.models_v1.predictor_v1 import ForceFieldPredictorV1
    from mlip.typing.properties import Properties

    network = library_network(case.architecture, case.fields, case.statistics)
    graph, _ = case.graphs()
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs(graph))
    params = strong_weights(shapes, case.seed)
    predictor = ForceFieldPredictorV1(mlip_network=network, required_properties=Properties())
    nested = {"params": {"mlip_network": params["params"]}}
    save_model_to_zip(path, ForceField(predictor, nested))
    return network, params


def in_precision(tree, dtype):
    def convert(leaf):
        leaf = np.asarray(leaf)
        return leaf.astype(dtype) if leaf.dtype.kind == "f" else leaf

    return jax.tree_util.tree_map(convert, tree)


def evaluated(function, params, graph, dtype):
    """What a function ``(params, graph)`` predicts in a precision, as float64."""
    with jax.enable_x64(dtype == "float64"):
        result = jit(function)(in_precision(params, dtype), in_precision(graph, dtype))
        return in_precision(jax.device_get(result), np.float64)


def loaded(path):
    """A potential from a file and its prediction ``(params, graph)``."""
    potential = load_zip(path)
    scaling = {"scaling_mean": potential.scaling_mean, "scaling_stdev": potential.scaling_stdev}
    return potential, functools.partial(predict, potential.network.apply, **scaling)


def assert_single_precision(function, params, graph):
    """A float32 potential computes in float32 where somebody else has enabled float64."""
    with jax.enable_x64(True):
        single = in_precision(params, np.float32), in_precision(graph, np.float32)
        text = str(jax.make_jaxpr(function)(*single))
    assert "f32[" in text
    assert not re.findall(r"f64\[\d+.*", text)


def relative(difference, scale):
    """Largest difference in units of the largest component of what it is a difference of."""
    largest, scale = np.abs(difference).max(), np.abs(scale).max()
    return 0.0 if largest == 0.0 else float(largest / scale) if scale > 0 else np.inf


def deviations(ours, theirs, rows):
    """Worst relative deviation of any system, by quantity."""
    worst = collections.defaultdict(float)
    for index, system in enumerate(SYSTEMS):
        for name, place in (
            ("node_energies", rows[system]),
            ("forces", rows[system]),
            ("stress", index),
        ):
            expected = getattr(theirs, name)[place]
            deviation = relative(getattr(ours, name)[place] - expected, expected)
            worst[name] = float(np.maximum(worst[name], deviation))  # NaN stays
    return dict(worst)


def worst_of(found):
    """The worst of all quantities; NaN if one is."""
    return float(np.max(list(found.values())))


def assert_sound(result, rows, tolerance):
    """All systems are seen, and a crystal is the same in a left-handed cell."""
    for system in SYSTEMS:
        moving = np.abs(result.forces[rows[system]]).max()
        assert moving == 0.0 if system == "isolated atom" else moving > 1e-7, system
    mirrored, crystal = (SYSTEMS.index(name) for name in ("left-handed", "triclinic"))
    difference = result.stress[mirrored] - result.stress[crystal]
    assert relative(difference, result.stress[crystal]) < tolerance


def compared(case, path):
    """Deviations from the library by precision and quantity, all within their tolerances."""
    network, params = written(case, path)
    strict, rows = case.graphs()
    library = functools.partial(predict, applied(network))
    theirs = evaluated(library, params, strict, "float64")
    potential, function = loaded(path)
    graph, _ = case.graphs(SKIN)
    energies = potential.reference_energies(graph.species)
    found = {}
    for dtype, tolerance in TOLERANCE.items():
        ours = evaluated(function, potential.params, graph, dtype)
        ours = ours._replace(node_energies=ours.node_energies + energies)
        found[dtype] = deviations(ours, theirs, rows)
        if dtype == "float32" and not worst_of(found[dtype]) < tolerance:
            # Contributions cancel, more than its digits, in the library too, but not to the same
            # last one.
            single = deviations(evaluated(library, params, strict, dtype), theirs, rows)
            found["library in float32"] = single
            if worst_of(single) > tolerance:
                tolerance = min(2 * worst_of(single), CEILING)
        assert worst_of(found[dtype]) < tolerance, found
        assert_sound(ours, rows, tolerance)
    assert_single_precision(function, potential.params, graph)
    return found


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("name", ["node_energies", "forces", "stress"])
def test_one_number_that_is_none_fails_the_comparison(name, place):
    _, rows = Case("mace", {}).graphs()
    nodes = max(where.stop for where in rows.values())
    exact = Prediction(
        energy=np.ones(len(SYSTEMS)),
        node_energies=np.ones(nodes),
        forces=np.ones((nodes, 3)),
        stress=np.ones((len(SYSTEMS), 3, 3)),
    )
    assert worst_of(deviations(exact, exact, rows)) == 0.0
    for wrong in (np.nan, np.inf, 1.1):
        spoiled = getattr(exact, name).copy()
        spoiled[place] = wrong
        found = deviations(exact._replace(**{name: spoiled}), exact, rows)
        assert not worst_of(found) < 0.05
        assert not found[name] < 0.05


@pytest.mark.parametrize("name", SHORT)
def test_options(library, tmp_path, name):
    compared(SHORT[name], tmp_path / "model.zip")


@pytest.mark.parametrize("architecture", OPTIONS)
def test_selection_takes_every_value_of_every_option(architecture):
    config = {"mace": MACEConfig, "nequip": NequIPConfig}[architecture]
    assert set(OPTIONS[architecture]) == {field.name for field in dataclasses.fields(config)}
    taken = collections.defaultdict(set)
    for case in SHORT.values():
        if case.architecture == architecture:
            for name, value in case.hyperparameters.items():
                taken[name].add(value)
    for name, values in OPTIONS[architecture].items():
        assert set(values) <= taken[name], name


@pytest.fixture(scope="module")
def record(request):
    """Collects deviations of random cases; at the end shows the worst by option and value."""
    rows = []
    yield rows
    worst = collections.defaultdict(lambda: collections.defaultdict(lambda: (0.0, -1)))
    for case, found in rows:
        for option, value in (*case.hyperparameters.items(), ("any", "")):
            for dtype, quantities in found.items():
                for quantity, deviation in quantities.items():
                    key = case.architecture, option, str(value)
                    column = f"{quantity} {dtype}"
                    worst[key][column] = max(worst[key][column], (deviation, case.seed))
    lines = [f"{len(rows)} random cases; worst relative deviation (seed)"]
    for key, columns in worst.items():
        cells = (f"{name} {worst:.1e} ({seed})" for name, (worst, seed) in columns.items())
        lines.append(" | ".join([" ".join(key), *cells]))
    if rows:
        capture = request.config.pluginmanager.getplugin("capturemanager")
        with capture.global_and_fixture_disabled():
            print("", *lines, sep="\n")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(RANDOM_CASES))
@pytest.mark.parametrize("architecture", OPTIONS)
def test_random_options(library, record, tmp_path, architecture, seed):
    case = random_case(architecture, seed)
    print(case)
    found = compared(case, tmp_path / "model.zip")
    print(found)
    record.append((case, found))


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [False, True])
def test_fourth_order_of_third_degree(library, tmp_path, symmetric):
    values = {
        "num_layers": 1,
        "num_channels": 1,
        "l_max": 3,
        "correlation": 4,
        "symmetric_tensor_product_basis": symmetric,
    }
    compared(Case("mace", values), tmp_path / "model.zip")


# Constants


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("envelope", RADIAL_ENVELOPES)
def test_factor_on_the_radial_basis_is_the_library_s(envelope, double):
    options = pytest.importorskip("mlip.models_v1.options")
    basis, smooth = options.parse_radial_basis("bessel"), options.parse_radial_envelope(envelope)
    rng = np.random.default_rng(4)
    for number in (1, 5, 8, 8, 8, 8, 8, 8):
        r_min, cutoff = rng.uniform((0.5, 3.0), (1.8, 7.0)).tolist()
        unfused = jax.ensure_compile_time_eval(), jax.numpy_rank_promotion("allow")  # as it does
        with unfused[0], unfused[1], jax.enable_x64(double):
            r = jnp.linspace(r_min, cutoff, 1000, dtype=jnp.float32)
            products = basis(r, cutoff, number) * smooth(r, cutoff)[:, None]
            expected = jnp.mean(products**2).item() ** -0.5
        assert radial_scale(r_min, cutoff, number, envelope, double) == expected


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_normalized_activations_are_the_library_s(name):
    options = pytest.importorskip("mlip.models_v1.options")
    x = np.linspace(-3, 3, 13)
    with jax.enable_x64(True):
        expected = e3nn.normalize_function(options.parse_activation(name))(x)
        result = layers.normalized_activation(name)(x)
    np.testing.assert_allclose(result, expected, rtol=1e-13)


# Pseudotensors


def natural_irreps(l_max):
    return [(l, (-1) ** l) for l in range(l_max + 1)]


def powers(factors, order):
    """Number of ways in which ``order`` factors couple to an irrep (l, parity)."""
    counts = collections.Counter({(0, 1): 1})
    for _ in range(order):
        products = collections.Counter()
        for (l1, p1), n in counts.items():
            for l2, p2 in factors:
                products.update({(l, p1 * p2): n for l in range(abs(l1 - l2), l1 + l2 + 1)})
        counts = products
    return counts


@pytest.mark.parametrize("l_max", [1, 2, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_pseudotensors_have_all_their_paths(l_max, symmetric):
    config = MACEConfig(
        num_channels=2,
        l_max=l_max,
        node_symmetry=l_max - 1,
        correlation=2,
        include_pseudotensors=True,
        symmetric_tensor_product_basis=symmetric,
    )
    network = build_network(
        config, num_species=2, cutoff=4.0, avg_num_neighbors=5.0, avg_r_min=None
    )
    graph, _ = Case("mace", {}).graphs()
    shapes = jax.eval_shape(network.init, jax.random.key(0), graph)["params"]
    harmonics = [(l, (-1) ** l) for l in range(1, l_max + 1)]
    senders = natural_irreps(l_max - 1)
    messages = collections.Counter(senders)
    for (l1, p1), (l2, p2) in itertools.product(senders, harmonics):
        messages.update((l, p1 * p2) for l in range(abs(l1 - l2), min(l1 + l2, l_max) + 1))
    layer = shapes["layer_1"]
    interaction = layer["InteractionBlock_0"]
    columns = interaction["MessagePassingConvolution_0"]["MultiLayerPerceptron_0"]["Dense_3"]
    assert columns["kernel"].shape == (64, 2 * messages.total())
    fan_in = {name.split(" ")[1]: w.shape[0] for name, w in interaction["linear_down"].items()}
    named = {(l, p): f"{2 * n}x{l}{'oe'[p > 0]}" for (l, p), n in messages.items()}
    assert fan_in == {f"{named[l, p]},2x{l}{'oe'[p > 0]}": 2 * n for (l, p), n in messages.items()}
    weights = layer["EquivariantProductBasisBlock_0"]["SymmetricContraction_0"]
    pairs = powers(list(messages), 2)[0, 1]  # squares of every irrep: all of them symmetric
    assert {name: w.shape[1] for name, w in weights.items()} == {"w1_0e": 1, "w2_0e": pairs}


@pytest.fixture(scope="module")
def pseudotensors():
    """Predictions of a MACE with pseudotensors for a molecule at any positions."""
    config = MACEConfig(
        num_channels=2, l_max=2, node_symmetry=1, correlation=3, include_pseudotensors=True
    )
    network = build_network(
        config, num_species=15, cutoff=4.25, avg_num_neighbors=5.0, avg_r_min=0.9
    )
    graph, rows = Case("mace", {}).graphs()
    shapes = jax.eval_shape(network.init, jax.random.key(0), graph)
    params = in_precision(strong_weights(shapes), np.float64)
    function = jit(functools.partial(predict, network.apply))

    def evaluate(positions):
        with jax.enable_x64(True):
            result = jax.device_get(function(params, graph.replace(positions=positions)))
        return result.node_energies[rows["molecule"]], result.forces[rows["molecule"]]

    return evaluate, graph.positions


@pytest.mark.parametrize("parity", [1, -1])
def test_pseudotensors_turn_along(pseudotensors, parity):
    evaluate, positions = pseudotensors
    turn = parity * np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
    energies, forces = evaluate(positions)
    turned_energies, turned_forces = evaluate(positions @ turn.T)
    np.testing.assert_allclose(turned_energies, energies, rtol=1e-11)
    assert relative(turned_forces - forces @ turn.T, forces) < 1e-11
    assert np.ptp(energies) > 1e-2


def test_forces_of_pseudotensors_are_minus_the_gradient(pseudotensors):
    evaluate, positions = pseudotensors
    direction = np.zeros_like(positions)
    direction[:6] = np.random.default_rng(3).normal(size=(6, 3))
    _, forces = evaluate(positions)

    def energy(step):
        return evaluate(positions + step * direction)[0].sum()

    near, far = (energy(h) - energy(-h) for h in (2e-4, 4e-4))
    slope = (8 * near - far) / 24e-4
    np.testing.assert_allclose(-np.sum(forces * direction[:6]), slope, rtol=1e-7)


# The product basis


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("irreps", ["0e", "0e+1o", "0e+1o+1e", "0e+1o+2e"])
def test_reduced_couplings_are_those_of_all_factors(irreps, order):
    factors = e3nn.Irreps(irreps)
    x = np.random.default_rng(order).normal(size=factors.dim)
    monomials = [np.prod(x[list(index)]) for index in monomial_indices(factors.dim, order)]
    counts = powers([(ir.l, ir.p) for _, ir in factors], order)
    separate = tuple(ir for _, ir in factors)
    for _, ir in factors:
        basis = e3nn.reduced_tensor_product_basis([factors] * order, keep_ir=[ir])
        expected = np.asarray(basis.chunks[0])
        for _ in range(order):
            expected = np.tensordot(x, expected, axes=(0, 0))
        reduced, merge = reduced_couplings(separate, order, ir, False)
        result = np.einsum("p,prm,rk->km", monomials, reduced, merge)
        np.testing.assert_allclose(result, expected, atol=1e-12 * np.abs(expected).max())
        assert merge.shape == (reduced.shape[1], counts[ir.l, ir.p])
        symmetric, identity = reduced_couplings(separate, order, ir, True)
        assert symmetric.shape == reduced.shape
        np.testing.assert_array_equal(identity, np.eye(reduced.shape[1]))


# What is refused


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (MACEConfig, {"correlation": 5}, "correlation = 5"),
        (MACEConfig, {"correlation": 0}, "correlation = 0"),
        (MACEConfig, {"l_max": -1}, "l_max = -1"),
        (MACEConfig, {"l_max": 4, "correlation": 4}, "correlation = 4 with l_max = 4"),
        (MACEConfig, {"correlation": 4, "include_pseudotensors": True}, "46376 products"),
        (MACEConfig, {"l_max": 1, "node_symmetry": 2}, "node_symmetry = 2"),
        (MACEConfig, {"num_layers": 0}, "num_layers = 0"),
        (MACEConfig, {"num_readout_heads": 0}, "num_readout_heads = 0"),
        (MACEConfig, {"num_bessel": 2.5}, "num_bessel = 2.5"),
        (MACEConfig, {"readout_irreps": ("16x0e",)}, "readout_irreps = .* two entries"),
        (MACEConfig, {"readout_irreps": ("4x0e + 2x1o", "0e")}, "readout_irreps = .* scalars"),
        (MACEConfig, {"readout_irreps": ("", "0e")}, "readout_irreps = .* scalars"),
        (MACEConfig, {"readout_irreps": ("4x0e", "2x0e")}, "readout_irreps = .* one energy"),
        (MACEConfig, {"readout_irreps": ("sixteen", "0e")}, "readout_irreps.* cannot be read"),
        (MACEConfig, {"activation": "gelu"}, "activation = 'gelu'"),
        (MACEConfig, {"radial_envelope": "cosine"}, "radial_envelope = 'cosine'"),
        (MACEConfig, {"gate_nodes": "yes"}, "gate_nodes = 'yes'"),
        (MACEConfig, {"include_pseudotensors": None}, "include_pseudotensors = None"),
        (MACEConfig, {"species_embedding_dim": 0}, "species_embedding_dim = 0"),
        (MACEConfig, {"avg_num_neighbors": 0.0}, "avg_num_neighbors = 0"),
        (MACEConfig, {"avg_r_min": -1.0}, "avg_r_min = -1"),
        (MACEConfig, {"atomic_energies": "median"}, "atomic_energies = 'median'"),
        (NequIPConfig, {"radial_net_nonlinearity": "beta_swish"}, "radial_net_nonlinearity"),
        (NequIPConfig, {"radial_net_n_layers": 0}, "radial_net_n_layers = 0"),
        (NequIPConfig, {"scalar_mlp_std": 0.0}, "scalar_mlp_std = 0"),
        (NequIPConfig, {"scalar_mlp_std": "wide"}, "scalar_mlp_std = 'wide'"),
    ],
)
def test_values_that_are_not_supported_are_refused_by_name(config, values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)


@pytest.mark.parametrize("r_min", [4.0, 3.9999, 3.93])
def test_the_radial_basis_cannot_be_normalised_almost_at_the_cutoff(r_min):
    sizes = {"num_species": 2, "cutoff": 4.0, "avg_num_neighbors": 5.0}
    soft = MACEConfig(radial_envelope="soft_envelope")
    with pytest.raises(ConfigError, match=rf"avg_r_min = {r_min} Å is beyond 98% of the cutoff"):
        build_network(soft, **sizes, avg_r_min=r_min)
    with pytest.raises(ConfigError, match=f"avg_r_min = {r_min}"):
        build_network(MACEConfig(avg_r_min=r_min), **sizes, avg_r_min=1.0)
    build_network(MACEConfig(avg_r_min=1.0), **sizes, avg_r_min=r_min)  # the configuration wins
    build_network(NequIPConfig(), **sizes, avg_r_min=r_min)  # does not read it


def test_a_configuration_without_a_network_is_refused_by_name():
    @dataclasses.dataclass(frozen=True)
    class OtherConfig(Hyperparameters):
        architecture = "other"
        atomic_energies: None = None
        avg_num_neighbors: float = 5.0

    sizes = {"num_species": 2, "cutoff": 4.0, "avg_num_neighbors": 5.0}
    with pytest.raises(ConfigError, match="no network for OtherConfig; there are: mace, nequip"):
        build_network(OtherConfig(), **sizes, avg_r_min=1.0)
