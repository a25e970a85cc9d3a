"""Building blocks shared by the networks.

Features of one irrep are arrays (n_nodes, 2l+1, channels) with channels last. Normalisations are
written out here; nothing depends on e3nn's process-wide configuration. Constants are computed in
float64 and take the dtype of the features they meet.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import TypeVar

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from e3nn_jax import Irrep, Irreps
from flax import linen as nn

Edges = TypeVar("Edges")
Messages = TypeVar("Messages")

SCALAR = Irrep("0e")

Features = dict[Irrep, jax.Array]
"""Node features by irrep: (n_nodes, 2l+1, channels), channels of equal irreps side by side in the
order of the configuration. In NequIP irreps that are zero, or that nothing reads, are left out."""

MESSAGE_MEMORY = 32 * 2**20
"""Bytes that the messages of one chunk of edges may take before edges are split further."""

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.swish,
    "elu": jax.nn.elu,
    "relu": jax.nn.relu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "none": lambda x: x,
}


@functools.lru_cache
def _second_moment(name: str) -> float:
    """Root of <act(x)²> over a standard normal x, by its quantiles (as e3nn normalises)."""
    on_cpu = jax.default_device(jax.local_devices(backend="cpu")[0])
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), on_cpu:
        quantiles = jnp.linspace(0.0, 1.0, 1_000_001 + 2, dtype=jnp.float64)[1:-1]
        samples = jnp.sqrt(2.0) * jax.scipy.special.erfinv(2.0 * quantiles - 1.0)
        return float(jnp.sqrt(jnp.mean(ACTIVATIONS[name](samples) ** 2)))


def normalized_activation(name: str) -> Callable[[jax.Array], jax.Array]:
    """Nonlinearity divided by the root of its second moment under a standard normal."""
    scale = 1.0 / _second_moment(name)
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


def polynomial_envelope(lengths: jax.Array, cutoff: float) -> jax.Array:
    """Smooth cutoff u(x) = 1 - 21x⁵ + 35x⁶ - 15x⁷, x = r/rc (Gasteiger 2020, Eq. 8, p = 5).

    The function and its first two derivatives vanish at the cutoff.
    """
    x = jnp.minimum(lengths / cutoff, 1.0)
    envelope = 1.0 - 21.0 * x**5 + 35.0 * x**6 - 15.0 * x**7
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

    Nodes are taken in chunks, because every one of them needs a matrix of its own.

    Args:
        x: (n_nodes, 2l+1, channels).
        weights: (channels, n_species, channels_out), normalisation included.
        species: (n_nodes,) int.

    Returns:
        (n_nodes, 2l+1, channels_out).
    """
    by_species = jnp.swapaxes(weights, 0, 1)

    @jax.checkpoint
    def mapped(piece: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, species = piece
        return x @ by_species[species]

    n_nodes = x.shape[0]
    chunk = max(64, MESSAGE_MEMORY // (by_species[0].size * x.dtype.itemsize))
    if n_nodes <= chunk:
        return mapped((x, species))
    n_chunks = -(-n_nodes // chunk)
    pieces = tuple(_chunked(array, n_chunks, chunk, 0) for array in (x, species))
    return jax.lax.map(mapped, pieces).reshape(-1, *x.shape[1:-1], weights.shape[-1])[:n_nodes]


def _chunked(array: jax.Array, n_chunks: int, chunk: int, fill: int) -> jax.Array:
    padding = ((0, n_chunks * chunk - array.shape[0]),) + ((0, 0),) * (array.ndim - 1)
    padded = jnp.pad(array, padding, constant_values=fill)
    return padded.reshape(n_chunks, chunk, *array.shape[1:])


def sum_messages(
    messages: Callable[[Edges], Messages],
    edges: Edges,
    receivers: jax.Array,
    n_nodes: int,
    floats_per_edge: int,
) -> Messages:
    """Sum messages over the edges that arrive at each node, in chunks of bounded memory.

    Beyond ``MESSAGE_MEMORY`` the edges are taken in chunks whose messages are computed again in
    the backward pass, so that they never exist all at once.

    Args:
        messages: maps edge arrays (n, ...) to message arrays (n, ...); may close over nodes.
        edges: pytree of edge arrays (n_edges, ...).
        receivers: (n_edges,) int, ascending.
        n_nodes: number of nodes.
        floats_per_edge: size of one edge's messages.

    Returns:
        Pytree of (n_nodes, ...): sums at the receivers.
    """
    n_edges = receivers.shape[0]
    itemsize = jax.tree_util.tree_leaves(edges)[0].dtype.itemsize
    chunk = max(256, MESSAGE_MEMORY // (floats_per_edge * itemsize))

    def summed(edges: Edges, receivers: jax.Array) -> Messages:
        add = functools.partial(
            jax.ops.segment_sum,
            segment_ids=receivers,
            num_segments=n_nodes,
            indices_are_sorted=True,
        )
        return jax.tree_util.tree_map(add, messages(edges))

    if n_edges <= chunk:
        return summed(edges, receivers)
    n_chunks = -(-n_edges // chunk)
    # Filled edges arrive at node n_nodes, which does not exist: the sum drops them.
    chunked = functools.partial(_chunked, n_chunks=n_chunks, chunk=chunk)
    pieces = (
        jax.tree_util.tree_map(lambda array: chunked(array, fill=0), edges),
        chunked(receivers, fill=n_nodes),
    )
    shapes = jax.eval_shape(lambda: summed(*jax.tree_util.tree_map(lambda a: a[0], pieces)))
    zeros = jax.tree_util.tree_map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    summed = jax.checkpoint(summed)

    def add_chunk(total: Messages, piece: tuple[Edges, jax.Array]) -> tuple[Messages, None]:
        return jax.tree_util.tree_map(jnp.add, total, summed(*piece)), None

    return jax.lax.scan(add_chunk, zeros, pieces)[0]
