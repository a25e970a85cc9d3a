"""The convolution's kernels against the definition, to second order; without a GPU interpreted."""

import functools
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from mlip_md import rows
from mlip_md.networks import convolution, gpu_convolution, radial_tables
from mlip_md.networks.convolution import Block, Form, Pairs, Path, Plan, in_order
from mlip_md.networks.gpu_kernels import sum_rows

pytestmark = pytest.mark.kernel
N_SENDERS, N_RECEIVERS, N_EDGES = 4, 6, 15
CUTOFF = 3.0
NAMES = ("x", "y", "r", "g")
INTERPRET = jax.devices()[0].platform != "gpu"

PLAN = Plan(
    (Block(0, 5), Block(1, 40)),
    (Block(1, 41), Block(0, 40)),
    (
        Path(0, 0, 1, 0, 38, 3, 3),  # columns 0-2 and channel 4 are read by nobody
        Path(1, 2, 1, 0, 0, 8, 38),
        Path(1, 0, 1, 1, 0, 46, 40),
    ),
    9,
    87,
)
"""More channels than a program has, few, and parts of them; harmonics that nobody reads."""


@pytest.fixture(autouse=True)
def two_blocks(monkeypatch):
    """Programs of few channels, so that several lie side by side, and few sums."""
    from mlip_md.networks import gpu_kernels

    monkeypatch.setattr(gpu_kernels, "CHANNELS", (32, 32))
    monkeypatch.setattr(gpu_kernels, "MOST_ROWS", 3)


def form() -> Form:
    """Receivers without edges, edges outside, and padding at the end."""
    rng = np.random.default_rng(0)
    receivers = np.sort(rng.choice([0, 1, 3, 4], N_EDGES - 3))
    receivers = np.append(receivers, [N_RECEIVERS - 1] * 3)
    inside = (rng.random(N_EDGES) < 0.8) & (receivers < N_RECEIVERS - 1)
    senders = np.where(inside, rng.integers(0, N_SENDERS - 1, N_EDGES), N_SENDERS - 1)
    arrays = (jnp.asarray(a) for a in (senders, receivers, inside))
    return Form(PLAN, Pairs(*arrays), (N_SENDERS, N_RECEIVERS))


def draw(form: Form, names, seed: int):
    rng = np.random.default_rng(seed)
    return {
        name: [jnp.asarray(rng.normal(size=s), jnp.float32) for s in form.shapes(name)]
        for name in names
    }


def check(kernels, definition, operands, params):
    """By kernels and by definition, each compiled."""
    options = {"xla_backend_optimization_level": 0} if INTERPRET else None  # compiles quickly
    by_kernels = functools.partial(kernels, interpret=INTERPRET, **params)
    with jax.default_matmul_precision("float32"):
        found = jax.jit(by_kernels, compiler_options=options)(*operands)
        expected = jax.jit(lambda *a: definition(*a, **params))(*operands)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * max(1.0, float(jnp.abs(b).max())))
    return expected


@pytest.mark.parametrize("wrt", [("g",), ("x",), ("y", "r"), NAMES])
def test_gradients_are_those_of_the_definition(wrt):
    at = draw(over := form(), NAMES, 1)
    names = convolution._needed(wrt)
    operands = [*over.pairs, *in_order(at, names)]
    params = {"plan": PLAN, "wrt": wrt, "sizes": over.sizes}
    check(gpu_convolution.gradient, convolution.define_gradient, operands, params)


@pytest.mark.parametrize(
    ("active", "wrt"),
    [(("x", "y", "r"), NAMES), (NAMES, ("x", "y", "r")), (("y",), ("g",)), (("x",), ("x",))],
)
def test_second_order_is_that_of_the_definition(active, wrt):
    at, along = draw(over := form(), NAMES, 1), draw(over, active, 2)
    names = convolution._needed(wrt, active)
    operands = [*over.pairs, *in_order(at, names), *in_order(along, active)]
    params = {"plan": PLAN, "wrt": wrt, "sizes": over.sizes, "active": active}
    check(gpu_convolution.tangent, convolution.define_tangent, operands, params)


def by_table(n_tables: int):
    """Operands of the table's primitives, and what multiplies the sums."""
    over, rng = form(), np.random.default_rng(3)
    blocks = sum(-(-path.width // radial_tables.LANES) for path in PLAN.paths)
    table = rng.normal(size=(n_tables, blocks, 4, radial_tables.DEGREE + 1, radial_tables.LANES))
    lengths = np.where(over.pairs.inside, rng.uniform(0.1, CUTOFF, N_EDGES), CUTOFF + 1e-3)
    index = jnp.asarray(rng.integers(0, n_tables, N_EDGES))
    at = draw(over, NAMES, 1)
    factors = [*at["x"], *at["y"], jnp.asarray(lengths, jnp.float32)]
    return [*over.pairs, index, jnp.asarray(table, jnp.float32), *factors], at["g"]


@pytest.mark.parametrize("n_tables", [1, 3])
def test_sums_by_tables_are_those_of_the_definition(n_tables):
    operands, _ = by_table(n_tables)
    params = {"plan": PLAN, "cutoff": CUTOFF, "rows": N_RECEIVERS}
    check(gpu_convolution.table_sums, radial_tables.define_sums, operands, params)


@pytest.mark.parametrize("wrt", [("x", "y", "lengths"), ("lengths",)])
def test_gradients_by_tables_are_those_of_the_definition(wrt):
    operands, g = by_table(2)
    params = {"plan": PLAN, "cutoff": CUTOFF, "rows": N_RECEIVERS, "wrt": wrt}
    check(gpu_convolution.table_pull, radial_tables.define_pull, [*operands, *g], params)


def test_edges_outside_are_not_read():
    """Whatever stands there, also what is not a number."""
    at = draw(over := form(), NAMES, 1)
    outside = ~over.pairs.inside[:, None]
    params = {"plan": PLAN, "wrt": NAMES, "sizes": over.sizes}

    @jax.jit
    def found(y, r):
        operands = [*over.pairs, *at["x"], y, r, *at["g"]]
        return gpu_convolution.gradient(*operands, interpret=INTERPRET, **params)

    plain = found(at["y"][0], at["r"][0])
    dirty = found(*(jnp.where(outside, jnp.nan, at[k][0]) for k in ("y", "r")))
    for a, b in zip(plain, dirty, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("number", "shape"), [(7, (3,)), (3, (40, 4)), (1, (3, 3)), (300, (1,))])
def test_sums_of_rows_in_a_fixed_order(number, shape):
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.normal(size=(500, *shape)), jnp.float32)
    index = jnp.asarray(rng.integers(0, max(1, number - 1), 500))  # nothing for the last
    found = jax.jit(lambda v, i: sum_rows(v, i, number, interpret=INTERPRET))(values, index)
    expected = np.zeros((number, *shape))
    np.add.at(expected, np.asarray(index), np.asarray(values, np.float64))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_sums_and_rows_are_each_other_s_transpose():
    index = jnp.array([2, 0, 2, 1])
    values, weights = jnp.arange(6.0).reshape(3, 2) + 1, jnp.arange(8.0).reshape(4, 2) - 3

    def energy(values):
        return jnp.sum(weights * jnp.sin(rows.take_rows(values, index)))

    def plain(values):
        return jnp.sum(weights * jnp.sin(values[index]))

    np.testing.assert_array_equal(jax.grad(energy)(values), jax.grad(plain)(values))
    for derive in (jax.jacfwd, jax.jacrev):
        found = derive(jax.grad(energy))(values)
        np.testing.assert_allclose(found, derive(jax.grad(plain))(values), rtol=1e-6)


def exported(dtype) -> str:
    """The convolution and its gradient as compiled for CUDA devices."""
    at = draw(over := form(), ("x", "y", "r"), 1)
    x, y, r = ([a.astype(dtype) for a in at[k]] for k in ("x", "y", "r"))

    def energy(x, y, r):
        sums = convolution.convolve(PLAN, over.pairs, x, y, r, N_RECEIVERS)
        return sum(jnp.sum(jnp.sin(s)) for s in sums)

    allowed = [export.DisabledSafetyCheck.custom_call(KERNEL)]
    step = jax.jit(jax.grad(energy, (0, 1, 2)))
    return export.export(step, platforms=["cuda"], disabled_checks=allowed)(
        x, y[0], r[0]
    ).mlir_module()


KERNEL = "__gpu$xla.gpu.triton"


def test_kernels_are_chosen_by_platform_and_precision():
    assert set(re.findall(r'name = "mlip_md_(\w+)"', exported(jnp.float32))) == {
        "sum_messages",
        "pull_to_edges",
        "pull_to_senders",
        "find_starts",
    }
    with jax.enable_x64(True):
        assert KERNEL not in exported(jnp.float64)


def test_pallas_makes_programs_for_a_card_whatever_the_default_device(monkeypatch):
    """JAX 0.12 looks at that; where there is no card, at one that need not be there."""
    monkeypatch.setattr(gpu_convolution, "_cards", list)
    with gpu_convolution._for_a_card():
        assert jax.sharding.get_abstract_mesh().abstract_device.device_kind == gpu_convolution.CARD
    device = jax.devices("cpu")[0]
    monkeypatch.setattr(gpu_convolution, "_cards", lambda: [device])
    with gpu_convolution._for_a_card():
        assert jax.config.jax_default_device is device
    assert jax.config.jax_default_device is not device


def refuse(*_args, **_params):
    raise NotImplementedError("nothing for you")


OLD = SimpleNamespace(
    platform="gpu",
    client=SimpleNamespace(platform_version="cuda"),
    compute_capability="7.5",
    device_kind="An old card",
)


@pytest.mark.parametrize(
    ("where", "name", "instead", "reason"),
    [
        (gpu_convolution, "derivatives", refuse, "nothing for you"),
        (jax, "local_devices", lambda *_args, **_params: [OLD], "An old card is older"),
    ],
)
def test_where_there_are_no_kernels_it_is_said_once(monkeypatch, where, name, instead, reason):
    monkeypatch.setattr(where, name, instead)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert KERNEL not in exported(jnp.float32)
        exported(jnp.float32)
    assert len([w for w in said if reason in str(w.message)]) == 1


def test_importing_networks_does_not_import_pallas():
    code = (
        "import sys, mlip_md.engine; sys.exit(any('pallas.triton' in name for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
