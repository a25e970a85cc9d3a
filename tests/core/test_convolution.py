"""The convolution and its derivatives: against its formula, finite differences and each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlip_md.networks import layers, messages
from mlip_md.networks.convolution import Block, Pairs, Path, Plan, convolve
from mlip_md.networks.messages import Edges, _sum_in_turns

pytestmark = pytest.mark.kernel
N_NODES, N_EDGES = 5, 17


PLAN = Plan(
    (Block(0, 5), Block(1, 3), Block(2, 2)),
    (Block(1, 7), Block(0, 6), Block(1, 3)),
    (
        Path(0, 0, 1, 0, 0, 3, 3),  # columns 0-2, l = 3 and channel 4 are read by nobody
        Path(1, 0, 0, 0, 3, 20, 3),
        Path(2, 1, 1, 0, 6, 19, 1),
        Path(0, 3, 0, 1, 0, 6, 1),
        Path(1, 0, 1, 1, 1, 7, 3),
        Path(2, 0, 2, 1, 4, 10, 2),
        Path(1, 0, 1, 2, 0, 16, 3),  # an axial vector
    ),
    16,
    23,
)
"""Several widths, blocks of one degree twice, parts of blocks, things that nobody reads."""


def inputs(dtype=np.float64):
    plan, rng = PLAN, np.random.default_rng(0)
    receivers = np.sort(rng.integers(0, N_NODES - 1, N_EDGES))  # the last node has no edge
    senders = rng.integers(0, N_NODES, N_EDGES)
    inside = rng.random(N_EDGES) < 0.8
    pairs = Pairs(*(jnp.asarray(a) for a in (senders, receivers, inside)))
    x = [rng.normal(size=(N_NODES, 2 * b.degree + 1, b.channels)) for b in plan.sources]
    y = rng.normal(size=(N_EDGES, plan.harmonics))
    r = rng.normal(size=(N_EDGES, plan.columns))
    return pairs, [jnp.asarray(a, dtype) for a in x], jnp.asarray(y, dtype), jnp.asarray(r, dtype)


def by_formula(plan: Plan, pairs: Pairs, x, y, r, rows: int) -> list[np.ndarray]:
    sums = [np.zeros((rows, 2 * b.degree + 1, b.channels)) for b in plan.targets]
    for s, p in itertools.product(range(N_EDGES), plan.paths):
        if not pairs.inside[s]:
            continue
        couplings = layers.coupling(
            plan.sources[p.source].degree, p.degree, plan.targets[p.target].degree
        )
        feature = x[p.source][pairs.senders[s]][:, p.channel : p.channel + p.width]
        harmonic = y[s, p.degree**2 : (p.degree + 1) ** 2]
        message = np.einsum(
            "abm,ac,b,c->mc", couplings, feature, harmonic, r[s, p.column :][: p.width]
        )
        sums[p.target][pairs.receivers[s], :, p.position : p.position + p.width] += message
    return sums


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def energy(plan: Plan, pairs: Pairs, x, y, r):
    """A scalar that is not linear in the sums."""
    sums = convolve(PLAN, pairs, x, y, r, N_NODES)
    return sum(jnp.sum(jnp.sin(s) * (1 + k)) for k, s in enumerate(sums))


def plain_energy(plan: Plan, pairs: Pairs, x, y, r):
    """The same in plain JAX, differentiated by JAX."""
    total = 0.0
    for t, block in enumerate(plan.targets):
        sums = jnp.zeros((N_NODES, 2 * block.degree + 1, block.channels))
        for p in (p for p in plan.paths if p.target == t):
            couplings = layers.coupling(plan.sources[p.source].degree, p.degree, block.degree)
            messages = jnp.einsum(
                "abm,eac,eb,ec->emc",
                couplings,
                x[p.source][pairs.senders][..., p.channel : p.channel + p.width],
                jnp.where(pairs.inside[:, None], y, 0)[:, p.degree**2 : (p.degree + 1) ** 2],
                r[:, p.column : p.column + p.width],
            )
            sums = sums.at[pairs.receivers, :, p.position : p.position + p.width].add(messages)
        total = total + jnp.sum(jnp.sin(sums) * (1 + t))
    return total


def close(found, expected):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_sums_are_those_of_the_formula():
    pairs, x, y, r = inputs()
    for rows in (N_NODES, N_NODES + 2):
        close(convolve(PLAN, pairs, x, y, r, rows), by_formula(PLAN, pairs, x, y, r, rows))


def test_gradients_are_those_of_plain_jax():
    pairs, *factors = inputs()
    derived = [jax.grad(f, argnums=(2, 3, 4)) for f in (energy, plain_energy)]
    close(*(jax.jit(f, static_argnums=0)(PLAN, pairs, *factors) for f in derived))


@pytest.mark.parametrize("argnums", [(0,), (1, 2), (0, 1, 2)])
def test_second_derivatives_are_those_of_plain_jax(argnums):
    """As training on forces has them: the gradient of a function of a gradient."""
    pairs, *factors = inputs()

    def found(function):
        def loss(*factors):
            gradient = jax.grad(lambda *f: function(PLAN, pairs, *f), argnums=argnums)(*factors)
            return sum(jnp.sum(jnp.cos(g)) for g in jax.tree.leaves(gradient))

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*factors)

    close(found(energy), found(plain_energy))


@pytest.mark.parametrize(
    "derive",
    [
        lambda f: jax.jacfwd(jax.grad(f)),
        lambda f: jax.jacfwd(jax.jacfwd(f)),
        lambda f: jax.jacrev(jax.jacfwd(f)),
    ],
    ids=["forward over reverse", "forward twice", "reverse over forward"],
)
def test_hessians_in_every_mode(derive):
    pairs, x, y, r = inputs()
    point = jnp.linspace(0.5, 1.5, 3)

    def found(function):
        def along(t):
            return function(PLAN, pairs, [a * t[0] for a in x], jnp.sin(y * t[1]), r * t[2])

        return jax.jit(derive(along))(point)

    close(found(energy), found(plain_energy))


def test_third_derivatives():
    pairs, x, y, r = inputs()

    def found(function):
        def along(t):
            return function(PLAN, pairs, [jnp.cos(a * t) for a in x], jnp.sin(y * t), r * t**2)

        first = jax.grad(along)
        return [
            jax.jit(derived)(jnp.array(0.7))
            for derived in (
                jax.grad(jax.grad(first)),
                jax.jacfwd(jax.jacfwd(first)),
            )
        ]

    close(found(energy), found(plain_energy))


def test_a_batch_is_its_members():
    pairs, x, y, r = inputs()
    factors = jnp.array([0.3, 1.0, 2.0])
    together = jax.vmap(lambda f: convolve(PLAN, pairs, [a * f for a in x], y, r, N_NODES))(factors)
    for k, factor in enumerate(factors):
        close(
            [s[k] for s in together], convolve(PLAN, pairs, [a * factor for a in x], y, r, N_NODES)
        )


def test_edges_outside_carry_nothing_back():
    pairs, x, y, r = inputs()
    _, gy, gr = jax.grad(energy, argnums=(2, 3, 4))(PLAN, pairs, x, y, r)
    assert np.all(np.asarray(gy)[~pairs.inside] == 0)
    assert np.all(np.asarray(gr)[~pairs.inside] == 0)
    assert np.all(np.any(np.asarray(gr)[pairs.inside] != 0, axis=1))


def test_no_edges_give_zeros():
    _, x, y, r = inputs()
    none = Pairs(*(jnp.zeros(0, t) for t in (jnp.int32, jnp.int32, bool)))
    sums = convolve(PLAN, none, x, y[:0], r[:0], N_NODES)
    assert all(s.shape[0] == N_NODES and not np.any(s) for s in sums)


@pytest.mark.parametrize("memory", [1, 2000])
def test_turns_of_bounded_memory_change_nothing(monkeypatch, memory):
    """Sums, forces and second derivatives, forward and backward, with empty and full rows."""
    pairs, x, y, _ = inputs()
    rng = np.random.default_rng(3)
    many = 900
    receivers = jnp.asarray(np.sort(rng.choice([0, 1, 2, 3, 40, 41, 99], many)))
    pairs = Pairs(
        jnp.asarray(rng.integers(0, 5, many)), receivers, jnp.asarray(rng.random(many) < 0.9)
    )
    x = [jnp.concatenate([a] * 20) for a in x]
    y = jnp.asarray(rng.normal(size=(many, PLAN.harmonics)))
    basis = jnp.asarray(rng.normal(size=(many, 3)))
    kernel = jnp.asarray(rng.normal(size=(3, PLAN.columns)))

    def found():
        def total(scale):
            edges = Edges(
                pairs, basis[:, 0], receivers, jnp.sin(y * scale), basis * scale, 1.0, abs
            )
            sums = _sum_in_turns(
                PLAN, [a * scale for a in x], edges, lambda b, i, _: b @ kernel * i
            )
            return sum(jnp.sum(jnp.sin(s)) for s in sums), sums

        def value(scale):
            return total(scale)[0]

        return jax.jit(lambda s: (total(s)[1], jax.grad(value)(s), jax.jacfwd(jax.grad(value))(s)))(
            jnp.array(0.8)
        )

    whole = found()
    monkeypatch.setattr(messages, "MEMORY", memory)
    text = str(jax.make_jaxpr(lambda: found()[1])())
    assert "scan" in text
    close(found(), whole)
