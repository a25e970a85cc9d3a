"""NequIP: an E(3)-equivariant interatomic potential (Batzner et al., Nat. Commun. 13, 2453, 2022).

Top to bottom in the order of the paper's Fig. 1: which irreps exist, self-interactions, the
convolution, the gate, the interaction layer and the network around it. Weights, their names and
their order are those of the published model files below ``NequipBlock_0``, so that weights pass in
and out of such files as they are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from e3nn_jax import Irrep, Irreps
from flax import linen as nn

from mlip_md.graph import Graph, edge_vectors
from mlip_md.networks import convolution, layers
from mlip_md.networks.config import NequIPConfig
from mlip_md.networks.convolution import Block, Plan
from mlip_md.networks.layers import SCALAR, Features
from mlip_md.networks.messages import Edges, read_edges, sum_messages

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


def message_plan(paths: list[Path], sources: Features, harmonics: int) -> Plan:
    """The convolution over some paths; messages to one irrep lie side by side, in order.

    Args:
        paths: what to compute.
        sources: features.
        harmonics: components of all harmonics.
    """
    irreps, targets = list(sources), list(dict.fromkeys(path.irrep for path in paths))
    used, column, found = dict.fromkeys(targets, 0), 0, []
    for path in paths:
        place = irreps.index(path.source), path.channels.start, path.degree
        target = targets.index(path.irrep), used[path.irrep], column
        found.append(convolution.Path(*place, *target, path.width))
        used[path.irrep] += path.width
        column += path.width
    return Plan(
        tuple(Block(ir.l, feature.shape[-1]) for ir, feature in sources.items()),
        tuple(Block(ir.l, used[ir]) for ir in targets),
        tuple(found),
        harmonics,
        column,
    )


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
    def __call__(self, x: Features, species: jax.Array, edges: Edges) -> Features:
        """Node features (``read_irreps`` of them) after this layer."""
        config, leaving = self.config, feature_blocks(self.config, self.index + 1)
        entering, hidden = existing_blocks(config, self.index), hidden_blocks(leaving)
        kept = read_irreps(config, self.index + 1)
        read = read_hidden(leaving, kept)
        residual = SpeciesLinear(
            entering, hidden, self.num_species, name="FullyConnectedTensorProduct_0"
        )(x, species, read)
        x = layers.Linear(entering, feature_blocks(config, self.index), name="Linear_0")(x)
        messages, sums = self._convolution(x, edges, kept)
        mixed = layers.Linear(messages, hidden, name="Linear_1")(sums, read)
        added = {ir: mixed[ir] + residual[ir] if ir in residual else mixed[ir] for ir in mixed}
        return gate(Irreps([block for block in leaving if block.ir in kept]), added)

    def _convolution(self, x: Features, edges: Edges, kept: set[Irrep]) -> tuple[Irreps, Features]:
        """Irreps of all messages that are not zero, and the mean of those that are kept."""
        config, paths = self.config, message_paths(self.config, self.index)
        hidden = (config.radial_net_n_hidden,) * config.radial_net_n_layers
        widths = (config.num_bessel, *hidden, paths[-1].columns.stop)
        variances = (config.scalar_mlp_std,) * len(hidden) + (1.0,)
        stds = tuple(math.sqrt(v / n) for v, n in zip(variances, widths[:-1], strict=True))
        kernels = layers.RadialKernels(widths, stds, scaled=False, name="MLP_0")()
        act = layers.ACTIVATIONS[config.radial_net_nonlinearity]
        computed = [path for path in paths if path.source in x and path.irrep in kept]
        *inner, last = [kernel.astype(edges.basis.dtype) for kernel in kernels]
        kernels = [*inner, last[:, np.concatenate([np.r_[path.columns] for path in computed])]]

        def weigh(basis: jax.Array, inside: jax.Array, _: jax.Array) -> jax.Array:
            return layers.radial_weights(kernels, act, basis, inside)

        plan = message_plan(computed, x, edges.harmonics.shape[1])
        sums = sum_messages(self, plan, list(x.values()), edges, weigh)
        irreps = dict.fromkeys(path.irrep for path in computed)
        means = {ir: s / self.avg_num_neighbors for ir, s in zip(irreps, sums, strict=True)}
        existing = reached_irreps(config, self.index)
        messages = [(path.width, path.irrep) for path in paths if path.source in existing]
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
            x = layer(x, species, edges)
        half = Irreps([([mul for mul, ir in blocks if ir == SCALAR][-1] // 2, SCALAR)])
        x = layers.Linear(existing_blocks(config, config.num_layers), half, name="Linear_1")(x)
        return layers.Linear(half, Irreps("0e"), name="Linear_2")(x)[SCALAR][:, 0, 0]

    def _edges(self, graph: Graph) -> Edges:
        config = self.config
        basis = self.cutoff, config.num_bessel, config.radial_envelope

        def radial_basis(lengths: jax.Array, _species: jax.Array) -> jax.Array:
            return layers.radial_basis(lengths, *basis)

        highest = max(path.degree for path in message_paths(config, 0))
        vectors = edge_vectors(graph)
        return read_edges(graph, vectors, self.cutoff, radial_basis, highest, self.num_species)
