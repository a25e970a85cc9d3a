"""NequIP: an E(3)-equivariant interatomic potential (Batzner et al., Nat. Commun. 13, 2453, 2022).

Top to bottom in the order of the paper's Fig. 1: which irreps exist, self-interactions, the
convolution, the gate, the interaction layer and the network around it. Weights, their names and
their order are those of the published model files below ``NequipBlock_0``, so that weights pass in
and out of such files as they are.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from e3nn_jax import Irrep, Irreps
from flax import linen as nn

from mlip_md.graph import Graph, edge_vectors
from mlip_md.networks import layers
from mlip_md.networks.config import NequIPConfig
from mlip_md.networks.layers import SCALAR, Features


class Edges(NamedTuple):
    """What messages read of the edges.

    Attributes:
        senders: (n_edges,) int, nodes that the messages come from.
        harmonics: (n_edges, (l_max+1)²) Y_l of the directions from sender to receiver.
        basis: (n_edges, num_bessel) radial basis.
        inside: (n_edges, 1) bool, shorter than the cutoff.
    """

    senders: jax.Array
    harmonics: jax.Array
    basis: jax.Array
    inside: jax.Array


# Which irreps exist


def _harmonic(l: int) -> Irrep:
    return Irrep(l, (-1) ** l)


def reached_irreps(config: NequIPConfig, steps: int) -> set[Irrep]:
    """Irreps of the configuration that at most ``steps`` products with harmonics make of 0e.

    Products couple both ways: 0e is made of exactly these irreps, in as many steps.
    """
    allowed = {ir for _, ir in Irreps(config.node_irreps)}
    reached = {SCALAR}
    for _ in range(steps):
        products = (ir * _harmonic(l) for ir in reached for l in range(config.l_max + 1))
        reached = {ir for product in products for ir in product if ir in allowed}
    return reached


def feature_blocks(config: NequIPConfig, layer: int) -> Irreps:
    """Blocks of the features after so many layers: the configuration's, scalars first after one."""
    scalars, gated = _parted(irreps := Irreps(config.node_irreps))
    return scalars + gated if layer else irreps


def _parted(blocks: Irreps) -> tuple[Irreps, Irreps]:
    """Blocks of scalars, and the others."""
    scalars, gated = ([b for b in blocks if (b.ir.l == 0) == scalar] for scalar in (True, False))
    return Irreps(scalars), Irreps(gated)


def existing_blocks(config: NequIPConfig, layer: int) -> Irreps:
    """Those that are not zero, because messages have come that far from 0e; they have weights."""
    reached = reached_irreps(config, layer)
    return Irreps([block for block in feature_blocks(config, layer) if block.ir in reached])


def read_irreps(config: NequIPConfig, layer: int) -> set[Irrep]:
    """Irreps that are not zero after so many layers and that the energy depends on."""
    return reached_irreps(config, min(layer, config.num_layers - layer))


def hidden_blocks(blocks: Irreps) -> Irreps:
    """Features before the gate: scalars, a 0e gate for each channel of the others, the others."""
    scalars, gated = _parted(blocks)
    return scalars + Irreps([(mul, SCALAR) for mul, _ in gated]) + gated


def read_hidden(blocks: Irreps, kept: set[Irrep]) -> tuple[bool, ...]:
    """Which of ``hidden_blocks(blocks)`` the kept irreps after the gate are made of."""
    scalars, gated = _parted(blocks)
    return tuple(ir in kept for _, ir in (*scalars, *gated, *gated))


class Path(NamedTuple):
    """The product of a block of features with Y_l, projected on one irrep.

    Attributes:
        block: index of the block among ``feature_blocks``.
        source: its irrep.
        channels: which channels of that irrep it is.
        degree: l of the harmonic.
        irrep: of the product.
        columns: outputs of the radial network that weigh it, one per channel.
    """

    block: int
    source: Irrep
    channels: slice
    degree: int
    irrep: Irrep
    columns: slice

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.columns.stop - self.columns.start


def message_paths(config: NequIPConfig, layer: int) -> list[Path]:
    """All paths between the configuration's irreps, in the order of the published weights.

    Args:
        config: hyperparameters.
        layer: whose features are the sources.
    """
    irreps = feature_blocks(config, layer)
    paths: list[Path] = []
    column = 0
    for block, (mul, source) in enumerate(irreps):
        first = sum(m for m, ir in irreps[:block] if ir == source)
        for l in range(config.l_max + 1):
            for ir in source * _harmonic(l):
                if any(ir == other for _, other in irreps):
                    columns = slice(column, column + mul)
                    paths.append(Path(block, source, slice(first, first + mul), l, ir, columns))
                    column += mul
    return paths


# Self-interactions


class SpeciesLinear(nn.Module):
    """Self-interaction with weights for each species, divided by √(fan-in · species).

    Attributes:
        irreps_in: blocks that enter; adjacent ones of equal irrep share weights.
        irreps_out: blocks that leave, likewise.
        num_species: number of elements.
    """

    irreps_in: Irreps
    irreps_out: Irreps
    num_species: int

    @nn.compact
    def __call__(self, x: Features, species: jax.Array, read: tuple[bool, ...]) -> Features:
        """Mixed features; ``read`` says which blocks of irreps_out to compute."""
        entering, leaving = Irreps(self.irreps_in).simplify(), Irreps(self.irreps_out)
        s, joint, weights = self.num_species, leaving.simplify(), {}
        for i, o in layers.mixing_blocks(entering, joint):
            shape = entering[i].mul, s, joint[o].mul
            name = f"w[{i},0,{o}] {entering[i]},{s}x0e,{joint[o]}"
            weights[i, o] = self.param(name, nn.initializers.normal(1.0), shape)
        matrices = layers.mixing_matrices(weights, entering, leaving, read, x[SCALAR].dtype)
        return {
            ir: layers.species_linear(x[ir], w / math.sqrt(s), species)
            for ir, w in matrices.items()
            if ir in x
        }


# Convolution


def convolve(
    paths: list[Path],
    x: Features,
    kernels: list[jax.Array],
    act: Callable[[jax.Array], jax.Array],
    edges: Edges,
    receivers: jax.Array,
) -> Features:
    """Sum over neighbors b of R(r_ab) · √(2l3+1) Σ C(l1 m1, l2 m2; l3 m3) x_b,{l1 m1} Y_{l2 m2}.

    Paths from one block to messages of one degree are computed side by side.

    Args:
        paths: what to compute.
        x: node features.
        kernels: of the radial network.
        act: its nonlinearity.
        edges: what messages read.
        receivers: (n_edges,) int, ascending.

    Returns:
        Sums by irrep: (n_nodes, 2l+1, channels of all paths to it, in order).
    """
    bundles = _bundles(paths)
    dtype = edges.basis.dtype
    columns = [np.r_[path.columns] for bundle in bundles for path in bundle]
    *inner, last = [kernel.astype(dtype) for kernel in kernels]
    kernels = [*inner, last[:, np.concatenate(columns)]]
    couplings = [_couplings(bundle, edges.harmonics.shape[1], dtype) for bundle in bundles]
    widths = [sum(path.width for path in bundle) for bundle in bundles]

    def messages(edges: Edges) -> list[jax.Array]:
        weights = layers.radial_weights(kernels, act, edges.basis, edges.inside)
        gathered = {ir: feature[edges.senders] for ir, feature in x.items()}
        products = []
        for bundle, c, w in zip(bundles, couplings, layers.split(weights, widths), strict=True):
            rotations = jnp.einsum("ey,yma->ema", edges.harmonics, c)
            senders = gathered[bundle[0].source][..., bundle[0].channels]
            w = w.reshape(-1, len(bundle), bundle[0].width)
            products.append(_weighted(contract(rotations, senders), w))
        return products

    floats = sum(path.irrep.dim * path.width for path in paths)
    sums = layers.sum_messages(messages, edges, receivers, len(x[SCALAR]), floats)
    return _by_irrep(bundles, sums)


def _bundles(paths: list[Path]) -> list[list[Path]]:
    """Paths grouped by source and degree of the message, in order."""

    def key(path: Path) -> tuple[int, int]:
        return path.block, path.irrep.l

    return [list(bundle) for _, bundle in itertools.groupby(sorted(paths, key=key), key)]


def _couplings(bundle: list[Path], harmonics: int, dtype: jnp.dtype) -> jax.Array:
    """Couplings of a bundle: (harmonics of all degrees, (2l3+1) · paths, 2l1+1)."""
    stacked = []
    for path in bundle:
        c = jnp.asarray(layers.coupling(path.source.l, path.degree, path.irrep.l), dtype)
        l = path.degree
        stacked.append(jnp.pad(c, ((0, 0), (l**2, harmonics - (l + 1) ** 2), (0, 0))))
    return jnp.einsum("kaym->ymka", jnp.stack(stacked)).reshape(harmonics, -1, len(c))


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


def _weighted(products: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply (n, (2l+1) · paths, channels) by weights (n, paths, channels)."""
    rows = jnp.split(products, products.shape[1] // weights.shape[1], axis=1)
    return jnp.concatenate([row * weights for row in rows], axis=1)


def _by_irrep(bundles: list[list[Path]], sums: list[jax.Array]) -> Features:
    """Sums of bundles (n_nodes, (2l+1) · paths, channels) as features, path after path."""
    parts: dict[Irrep, list[jax.Array]] = {}
    for bundle, total in zip(bundles, sums, strict=True):
        by_path = total.reshape(len(total), bundle[0].irrep.dim, len(bundle), -1)
        for k, path in enumerate(bundle):
            parts.setdefault(path.irrep, []).append(by_path[:, :, k])
    return {ir: jnp.concatenate(parts[ir], axis=-1) for ir in parts}


# Gate, layer, network


def gate(blocks: Irreps, hidden: Features) -> Features:
    """Nonlinearity: silu (0e) or tanh (0o) of scalars, silu of its gate times what has l > 0.

    Both are normalised to a second moment of 1; all gates are 0e.

    Args:
        blocks: of the result.
        hidden: features of ``hidden_blocks(blocks)``.
    """
    even, odd = layers.normalized_activation("silu"), layers.normalized_activation("tanh")
    _, gated = _parted(blocks)
    n_scalars = sum(mul for mul, ir in blocks if ir == SCALAR)
    activated = even(hidden[SCALAR])
    gates = layers.split(activated[..., n_scalars:], [mul for mul, _ in gated])
    out = {SCALAR: activated[..., :n_scalars]}
    for ir in hidden.keys() - {SCALAR}:
        if ir.l == 0:
            out[ir] = odd(hidden[ir])
        else:
            own = [g for g, (_, other) in zip(gates, gated, strict=True) if other == ir]
            out[ir] = jnp.concatenate(own, axis=-1) * hidden[ir]
    return out


class NequIPLayer(nn.Module):
    """Interaction block: self-interactions around a convolution, residual path and gate (Fig. 1).

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        avg_num_neighbors: divisor of the summed messages.
        index: which layer.
    """

    config: NequIPConfig
    num_species: int
    avg_num_neighbors: float
    index: int

    @nn.compact
    def __call__(
        self, x: Features, species: jax.Array, edges: Edges, receivers: jax.Array
    ) -> Features:
        """Node features (``read_irreps`` of them) after this layer."""
        config, leaving = self.config, feature_blocks(self.config, self.index + 1)
        entering, hidden = existing_blocks(config, self.index), hidden_blocks(leaving)
        kept = read_irreps(config, self.index + 1)
        read = read_hidden(leaving, kept)
        residual = SpeciesLinear(
            entering, hidden, self.num_species, name="FullyConnectedTensorProduct_0"
        )(x, species, read)
        x = layers.Linear(entering, feature_blocks(config, self.index), name="Linear_0")(x)
        messages, sums = self._convolution(x, edges, receivers, kept)
        mixed = layers.Linear(messages, hidden, name="Linear_1")(sums, read)
        added = {ir: mixed[ir] + residual[ir] if ir in residual else mixed[ir] for ir in mixed}
        return gate(Irreps([block for block in leaving if block.ir in kept]), added)

    def _convolution(
        self, x: Features, edges: Edges, receivers: jax.Array, kept: set[Irrep]
    ) -> tuple[Irreps, Features]:
        """Irreps of all messages that are not zero, and the mean of those that are kept."""
        config, paths = self.config, message_paths(self.config, self.index)
        hidden = (config.radial_net_n_hidden,) * config.radial_net_n_layers
        widths = (config.num_bessel, *hidden, paths[-1].columns.stop)
        variances = (config.scalar_mlp_std,) * len(hidden) + (1.0,)
        stds = tuple(math.sqrt(v / n) for v, n in zip(variances, widths[:-1], strict=True))
        kernels = layers.RadialKernels(widths, stds, scaled=False, name="MLP_0")()
        act = layers.ACTIVATIONS[config.radial_net_nonlinearity]
        computed = [path for path in paths if path.source in x and path.irrep in kept]
        sums = convolve(computed, x, kernels, act, edges, receivers)
        existing = reached_irreps(config, self.index)
        messages = [(path.width, path.irrep) for path in paths if path.source in existing]
        means = {ir: total / self.avg_num_neighbors for ir, total in sums.items()}
        return Irreps(messages).regroup(), means


class NequIP(nn.Module):
    """NequIP as in the published models: ``init(key, graph)``, ``apply(params, graph)``.

    An atom without neighbors has an energy of its own, which the residual path makes of its
    species. Messages vanish smoothly at the cutoff (with sigmoid as the radial network's
    nonlinearity, which is not 0 at 0, they end there abruptly).

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        cutoff: Å.
        avg_num_neighbors: divisor of the summed messages.
    """

    config: NequIPConfig
    num_species: int
    cutoff: float
    avg_num_neighbors: float

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        """Raw node energies (n_nodes,) of a graph: before scaling and without E0."""
        config, species = self.config, jnp.asarray(graph.species)
        blocks, edges = feature_blocks(config, 0), self._edges(graph)
        one_hot = jax.nn.one_hot(species, self.num_species, dtype=edges.basis.dtype)[:, None, :]
        elements = Irreps([(self.num_species, SCALAR)])
        x = layers.Linear(elements, blocks, name="Linear_0")({SCALAR: one_hot})
        for i in range(config.num_layers):
            layer = NequIPLayer(
                config, self.num_species, self.avg_num_neighbors, i, name=f"NequipLayer_{i}"
            )
            x = layer(x, species, edges, jnp.asarray(graph.receivers))
        half = Irreps([([mul for mul, ir in blocks if ir == SCALAR][-1] // 2, SCALAR)])
        x = layers.Linear(existing_blocks(config, config.num_layers), half, name="Linear_1")(x)
        return layers.Linear(half, Irreps("0e"), name="Linear_2")(x)[SCALAR][:, 0, 0]

    def _edges(self, graph: Graph) -> Edges:
        config, vectors = self.config, edge_vectors(graph)
        lengths = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
        degrees = range(1 + max(path.degree for path in message_paths(config, 0)))
        harmonics = layers.spherical_harmonics(vectors, degrees)
        return Edges(
            jnp.asarray(graph.senders),
            jnp.concatenate(list(harmonics.values()), axis=-1),
            layers.radial_basis(lengths, self.cutoff, config.num_bessel, config.radial_envelope),
            (lengths < self.cutoff)[:, None],
        )
