"""Building blocks shared by the networks.

Features of one irrep are arrays (n_nodes, 2l+1, channels) with channels last. Normalisations are
written out here; nothing depends on e3nn's process-wide configuration. Constants are computed in
float64 and take the dtype of the features they meet.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from e3nn_jax import Irrep, Irreps
from flax import linen as nn

SCALAR = Irrep("0e")

Features = dict[Irrep, jax.Array]
"""Node features by irrep: (n_nodes, 2l+1, channels), channels of equal irreps side by side in the
order of the configuration. In NequIP irreps that are zero, or that nothing reads, are left out."""

MATRIX_MEMORY = 32 * 2**20
"""Bytes that the matrices of one chunk of nodes may take before nodes are split further."""
_memory: contextvars.ContextVar[int | None] = contextvars.ContextVar("memory", default=None)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.swish,
    "elu": jax.nn.elu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "none": lambda x: x,
}


@contextlib.contextmanager
def bounding_turns(memory: int | None) -> Iterator[None]:
    """Bound by so many bytes, if given, what networks that are traced inside take in one turn."""
    token = _memory.set(memory or _memory.get())
    try:
        yield
    finally:
        _memory.reset(token)


def memory_of_turns(otherwise: int) -> int:
    """Bytes that a turn may take; ``otherwise`` is what suits processors."""
    return _memory.get() or otherwise


SECOND_MOMENTS = {
    "silu": 0.5964586854233045,
    "swish": 0.5964586854233045,
    "elu": 0.8030768955880002,
    "relu": 0.707097894018724,
    "tanh": 0.6279282481638501,
    "sigmoid": 0.5416445654162108,
    "none": 0.9999874316467328,
}
"""Roots of <act(x)²> over a standard normal x: means over its 1,000,001 quantiles k/1,000,002, as
e3nn normalises."""


def normalized_activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Nonlinearity divided by the root of its second moment under a standard normal."""
    scale = 1.0 / SECOND_MOMENTS[name]
    return lambda x: scale * ACTIVATIONS[name](x)


def bessel_basis(lengths: jax.Array, cutoff: float, number: int) -> jax.Array:
    """Radial Bessel functions √(2/rc)·sin(nπr/rc)/r, n = 1…number (Gasteiger 2020, Eq. 7).

    Args:
        lengths: (n,) Å, positive.
        cutoff: rc, Å.
        number: how many.

    Returns:
        (n, number) array.
    """
    n = jnp.arange(1, number + 1, dtype=lengths.dtype)[None, :]
    r = lengths[:, None]
    return jnp.sqrt(2.0 / cutoff) * (jnp.sin(n * jnp.pi / cutoff * r) / r)


def polynomial_envelope(
    lengths: jax.Array, cutoff: float | jax.Array, exponent: int = 5
) -> jax.Array:
    """Smooth cutoff u(x) = 1 - 21x⁵ + 35x⁶ - 15x⁷, x = r/rc (Gasteiger 2020, Eq. 8, p = 5).

    The function and its first two derivatives vanish at the cutoff. Another exponent p has
    coefficients (p+1)(p+2)/2, p(p+2) and p(p+1)/2.
    """
    p, x = exponent, jnp.minimum(lengths / cutoff, 1.0)
    a, b, c = (p + 1) * (p + 2) / 2, p * (p + 2.0), p * (p + 1) / 2
    envelope = 1.0 - a * x**p + b * x ** (p + 1) - c * x ** (p + 2)
    return jnp.where(lengths < cutoff, envelope, 0.0)


def soft_envelope(lengths: jax.Array, cutoff: float) -> jax.Array:
    """Infinitely smooth cutoff 1.2·s(2(1 - r/rc))/s(2) with s(x) = exp(-1/x) (e3nn)."""

    def soft_unit_step(x: jax.Array | float) -> jax.Array:
        inside = x > 0
        return jnp.where(inside, jnp.exp(-1.0 / jnp.where(inside, x, 1.0)), 0.0)

    x = 2.0 * (1.0 - jnp.minimum(lengths / cutoff, 1.0))
    return 1.2 / soft_unit_step(2.0) * soft_unit_step(x)


_ENVELOPES = {"polynomial_envelope": polynomial_envelope, "soft_envelope": soft_envelope}


def radial_basis(
    lengths: jax.Array, cutoff: float, number: int, envelope: str, scale: float = 1.0
) -> jax.Array:
    """Bessel basis under its envelope: (n_edges, number); zero at and beyond the cutoff."""
    basis = bessel_basis(lengths, cutoff, number)
    return scale * basis * _ENVELOPES[envelope](lengths, cutoff)[:, None]


def spherical_harmonics(vectors: jax.Array, degrees: range) -> dict[int, jax.Array]:
    """Real spherical harmonics of directions, component normalised: |Y_l|² = 2l+1.

    Args:
        vectors: (n, 3) of any non-zero length; l = 1 is ordered x, y, z.
        degrees: degrees l wanted.

    Returns:
        {l: (n, 2l+1)}.
    """
    if len(degrees) == 0:
        return {}
    irreps = Irreps([(1, (l, (-1) ** l)) for l in degrees])
    array = e3nn.spherical_harmonics(irreps, vectors, normalize=True, normalization="component")
    return {l: chunk[:, 0, :] for l, chunk in zip(degrees, array.chunks, strict=True)}


def coupling(l1: int, l2: int, l3: int) -> np.ndarray:
    """Clebsch-Gordan coefficients √(2l3+1)·C, float64 (2l1+1, 2l2+1, 2l3+1)."""
    return np.sqrt(2 * l3 + 1) * np.asarray(e3nn.clebsch_gordan(l1, l2, l3), np.float64)


def couplings_side_by_side(l1: int, degrees: Sequence[int], l3: int, harmonics: int) -> np.ndarray:
    """Couplings of l1 with several harmonics to l3, on all components of the harmonics.

    Args:
        l1: degree of the features.
        degrees: l of the harmonics.
        l3: degree of the messages.
        harmonics: components of all harmonics, those of l from l² on.

    Returns:
        (harmonics, (2l3+1) · degrees, 2l1+1), degrees fastest in the middle.
    """
    stacked = np.zeros((harmonics, 2 * l3 + 1, len(degrees), 2 * l1 + 1))
    for k, l in enumerate(degrees):
        stacked[l**2 : (l + 1) ** 2, :, k] = np.einsum("aym->yma", coupling(l1, l, l3))
    return stacked.reshape(harmonics, -1, 2 * l1 + 1)


@jax.custom_jvp
def contract(rotations: jax.Array, features: jax.Array) -> jax.Array:
    """Product of small matrices with features: (n, m, a), (n, a, channels) -> (n, m, channels).

    Written as a sum over a, which compilers fuse, with matrix products for its derivatives, whose
    long sums they do not: together twice as fast on CPUs as either.
    """
    terms = zip(
        jnp.split(rotations, features.shape[1], axis=2),
        jnp.split(features, features.shape[1], axis=1),
        strict=True,
    )
    return functools.reduce(jnp.add, (a * b for a, b in terms))


@contract.defjvp
def _contract_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    rotations, features = primals
    d_rotations, d_features = tangents
    product = functools.partial(jnp.einsum, "nma,nac->nmc")
    return contract(*primals), product(d_rotations, features) + product(rotations, d_features)


def weighted(products: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply (n, (2l+1) · paths, channels) by weights (n, paths, channels)."""
    rows = jnp.split(products, products.shape[1] // weights.shape[1], axis=1)
    return jnp.concatenate([row * weights for row in rows], axis=1)


class RadialKernels(nn.Module):
    """Kernels of the perceptron without biases that turns the radial basis into message weights.

    They are returned as a list, each divided by the root of its fan-in if ``scaled``, so that
    ``radial_weights`` can evaluate them chunk by chunk of the edges.

    Attributes:
        widths: number of inputs, then outputs of every layer.
        stds: standard deviation at which each kernel is drawn.
        scaled: divide by √fan-in in the forward pass.
    """

    widths: tuple[int, ...]
    stds: tuple[float, ...]
    scaled: bool

    @nn.compact
    def __call__(self) -> list[jax.Array]:
        kernels = []
        shapes = zip(self.widths[:-1], self.widths[1:], self.stds, strict=True)
        for i, (fan_in, fan_out, std) in enumerate(shapes):
            kernel = _Kernel((fan_in, fan_out), std, name=f"Dense_{i}")()
            kernels.append(kernel / math.sqrt(fan_in) if self.scaled else kernel)
        return kernels


class _Kernel(nn.Module):
    shape: tuple[int, int]
    std: float

    @nn.compact
    def __call__(self) -> jax.Array:
        return self.param("kernel", nn.initializers.normal(self.std), self.shape)


def radial_weights(
    kernels: list[jax.Array],
    act: Callable[[jax.Array], jax.Array],
    basis: jax.Array,
    inside: jax.Array,
) -> jax.Array:
    """Weights of messages: the radial network of a basis, zero beyond the cutoff.

    Args:
        kernels: (n_in, n_out) of every layer.
        act: nonlinearity between them; not every one is 0 at 0, as the basis is at the cutoff.
        basis: (n_edges, num_bessel) radial basis.
        inside: (n_edges, 1) bool, shorter than the cutoff; neighbor lists may reach farther.

    Returns:
        (n_edges, n_out of the last kernel).
    """
    x = basis
    for kernel in kernels[:-1]:
        x = act(x @ kernel)
    return jnp.where(inside, x, 0.0) @ kernels[-1]


class Linear(nn.Module):
    """Mixes the channels of each irrep, divided by √fan-in.

    Attributes:
        irreps_in: blocks that enter; adjacent ones of equal irrep share weights.
        irreps_out: blocks that leave, each with weights of its own.
    """

    irreps_in: Irreps
    irreps_out: Irreps

    @nn.compact
    def __call__(self, x: Features, read: tuple[bool, ...] | None = None) -> Features:
        """Mixed features; ``read`` says which blocks of irreps_out to compute (None: all)."""
        entering, leaving = Irreps(self.irreps_in).simplify(), Irreps(self.irreps_out)
        weights = {}
        for i, o in mixing_blocks(entering, leaving):
            shape = entering[i].mul, leaving[o].mul
            name = f"w[{i},{o}] {entering[i]},{leaving[o]}"
            weights[i, o] = self.param(name, nn.initializers.normal(1.0), shape)
        matrices = mixing_matrices(weights, entering, leaving, read, x[SCALAR].dtype)
        return {ir: x[ir] @ w for ir, w in matrices.items() if ir in x}


def mixing_blocks(irreps_in: Irreps, irreps_out: Irreps) -> list[tuple[int, int]]:
    """Blocks that mix: those of equal irrep."""
    pairs = itertools.product(range(len(irreps_in)), range(len(irreps_out)))
    return [(i, o) for i, o in pairs if irreps_in[i].ir == irreps_out[o].ir]


def mixing_matrices(
    weights: dict[tuple[int, int], jax.Array],
    irreps_in: Irreps,
    irreps_out: Irreps,
    read: tuple[bool, ...] | None,
    dtype: jnp.dtype,
) -> dict[Irrep, jax.Array]:
    """One matrix per irrep, divided by √fan-in, of the published weights between its blocks.

    Args:
        weights: (channels in, ..., channels out) by blocks, row by row.
        irreps_in: blocks that enter.
        irreps_out: blocks that leave.
        read: which of them to keep (None: all).
        dtype: of the result.
    """
    rows: dict[Irrep, dict[int, list[jax.Array]]] = {}
    for (i, _), w in weights.items():
        rows.setdefault(irreps_in[i].ir, {}).setdefault(i, []).append(w.astype(dtype))
    matrices = {}
    for ir, by_block in rows.items():
        matrix = jnp.concatenate(
            [
                jnp.concatenate(row, axis=-1) / math.sqrt(irreps_in[i].mul * len(by_block))
                for i, row in by_block.items()
            ]
        )
        blocks = [(o, mul) for o, (mul, other) in enumerate(irreps_out) if other == ir]
        parts = split(matrix, [mul for _, mul in blocks])
        kept = [part for part, (o, _) in zip(parts, blocks, strict=True) if not read or read[o]]
        if kept:
            matrices[ir] = jnp.concatenate(kept, axis=-1)
    return matrices


def split(x: jax.Array, widths: list[int]) -> list[jax.Array]:
    """Parts of the given widths of an array's last axis."""
    return jnp.split(x, np.cumsum(widths)[:-1], axis=-1)


def species_linear(x: jax.Array, weights: jax.Array, species: jax.Array) -> jax.Array:
    """Linear maps chosen by the species of each node.

    Nodes are put into blocks of one species, so that a matrix serves a block and not a node; many
    blocks are taken in turns of bounded memory.

    Args:
        x: (n_nodes, 2l+1, channels).
        weights: (channels, n_species, channels_out), normalisation included.
        species: (n_nodes,) int.

    Returns:
        (n_nodes, 2l+1, channels_out).
    """
    n_nodes, by_species = x.shape[0], jnp.swapaxes(weights, 0, 1)
    blocks = block_by_species(species, by_species.shape[0])
    padded = jnp.concatenate([x, jnp.zeros((1, *x.shape[1:]), x.dtype)])
    blocked = padded[blocks.nodes].reshape(len(blocks.species), -1, x.shape[2])

    @jax.checkpoint
    def mapped(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, species = piece
        return x @ by_species[species]

    memory = memory_of_turns(MATRIX_MEMORY)
    turn = max(4, memory // (by_species[0].size * x.dtype.itemsize))
    n_turns = -(-len(blocked) // turn)
    if n_turns == 1:
        out = mapped((blocked, blocks.species))
    else:
        pieces = tuple(_in_turns(array, n_turns, turn) for array in (blocked, blocks.species))
        out = jax.lax.map(mapped, pieces)
    return out.reshape(-1, x.shape[1], weights.shape[-1])[blocks.places[:n_nodes]]


class Blocks(NamedTuple):
    """Nodes in blocks of one species each.

    Attributes:
        nodes: (n_blocks · size,) int, node at each place; the number of nodes where none is.
        species: (n_blocks,) int.
        places: (n_nodes,) int, place of each node.
    """

    nodes: jax.Array
    species: jax.Array
    places: jax.Array


def block_by_species(species: jax.Array, num_species: int) -> Blocks:
    """Sort nodes into blocks; their size keeps what is filled up to a fraction of the nodes."""
    n_nodes = len(species)
    size = 2 ** int(np.clip(math.log2(max(n_nodes, 1) / (4 * num_species)), 2, 6))
    n_blocks = n_nodes // size + min(num_species, n_nodes)
    counts = jnp.zeros(num_species, jnp.int32).at[species].add(1)
    ends = jnp.cumsum(-(-counts // size))
    order = jnp.argsort(species)
    ordered = species[order]
    rank = jnp.arange(n_nodes) - (jnp.cumsum(counts) - counts)[ordered]
    starts = (ends + counts // -size)[ordered]
    places = jnp.zeros(n_nodes, jnp.int32).at[order].set((starts * size + rank).astype(jnp.int32))
    nodes = jnp.full(n_blocks * size, n_nodes).at[places].set(jnp.arange(n_nodes))
    of_block = jnp.searchsorted(ends, jnp.arange(n_blocks), side="right")
    return Blocks(nodes, jnp.minimum(of_block, num_species - 1), places)


def _in_turns(array: jax.Array, n_turns: int, turn: int) -> jax.Array:
    padding = ((0, n_turns * turn - array.shape[0]),) + ((0, 0),) * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(n_turns, turn, *array.shape[1:])
