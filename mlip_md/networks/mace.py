"""MACE: higher-order equivariant message passing (Batatia et al. 2022, arXiv:2206.07697).

Equation numbers are the paper's. Weights, their names and their order are those of the published
model files below ``MaceBlock_0``, so that weights pass in and out of such files as they are.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from e3nn_jax import Irrep, Irreps
from flax import linen as nn

from mlip_md.graph import Graph, edge_vectors
from mlip_md.networks import convolution, layers
from mlip_md.networks.config import MACEConfig
from mlip_md.networks.convolution import Block, Plan
from mlip_md.networks.layers import SCALAR, Features
from mlip_md.networks.messages import Edges, read_edges, sum_messages
from mlip_md.networks.product_basis import SymmetricContraction
from mlip_md.networks.radial_scale import RadialScale

RADIAL_WIDTHS = (64, 64, 64)
"""Hidden widths of the radial network; no card or file has others."""

Path = tuple[Irrep, int, Irrep]
"""Irrep of the sender's feature, degree of the harmonic (0: a copy) and irrep of the message."""


def natural_irreps(l_max: int) -> tuple[Irrep, ...]:
    """Irreps 0e, 1o, 2e, … of parity (-1)^l, which powers of a vector have."""
    return tuple(Irrep(l, (-1) ** l) for l in range(l_max + 1))


def message_irreps(config: MACEConfig) -> tuple[Irrep, ...]:
    """Irreps that messages may have: of natural parity, or all of them with pseudotensors."""
    if config.include_pseudotensors:
        return tuple(Irrep.iterator(config.l_max))
    return natural_irreps(config.l_max)


@functools.lru_cache
def message_paths(
    irreps_in: tuple[Irrep, ...], l_max: int, irreps_out: tuple[Irrep, ...]
) -> dict[Irrep, tuple[Path, ...]]:
    """Paths by irrep of the message, in the order of the published radial weights (Eq. 8).

    For each irrep the plain copy of the sender's feature comes first, then features and harmonics
    in ascending order. Irreps that nothing couples to are left out.
    """
    paths: dict[Irrep, tuple[Path, ...]] = {}
    for ir in irreps_out:
        copy = [(ir, 0, ir)] if ir in irreps_in else []
        coupled = [
            (ir_in, l, ir)
            for ir_in in irreps_in
            for l in range(1, l_max + 1)
            if ir in ir_in * Irrep(l, (-1) ** l)
        ]
        if copy or coupled:
            paths[ir] = tuple(copy + coupled)
    return paths


def message_plan(
    irreps_in: tuple[Irrep, ...], channels: int, l_max: int, irreps_out: tuple[Irrep, ...]
) -> Plan:
    """The convolution over ``message_paths``, all of one number of channels, side by side."""
    paths = message_paths(irreps_in, l_max, irreps_out)
    found: list[convolution.Path] = []
    for target, of_irrep in enumerate(paths.values()):
        for k, (ir, l, _) in enumerate(of_irrep):
            place = irreps_in.index(ir), 0, l, target, k * channels, len(found) * channels, channels
            found.append(convolution.Path(*place))
    return Plan(
        tuple(Block(ir.l, channels) for ir in irreps_in),
        tuple(Block(ir.l, len(of_irrep) * channels) for ir, of_irrep in paths.items()),
        tuple(found),
        (l_max + 1) ** 2,
        len(found) * channels,
    )


def linear(x: Features, irreps: tuple[Irrep, ...], channels: int, name: str) -> Features:
    """A ``Linear`` from all features of a layer to so many channels of each of some irreps."""
    entering = Irreps([(feature.shape[-1], ir) for ir, feature in x.items()])
    return layers.Linear(entering, Irreps([(channels, ir) for ir in irreps]), name=name)(x)


class SpeciesLinear(nn.Module):
    """Mixing of channels within each irrep with weights chosen by species, / √(fan-in · species).

    Attributes:
        irreps: irreps kept, in order.
        num_species: number of elements.
    """

    irreps: tuple[Irrep, ...]
    num_species: int

    @nn.compact
    def __call__(self, x: Features, species: jax.Array) -> Features:
        out = {}
        for i_in, ir in enumerate(x):
            if ir not in self.irreps:
                continue
            c, s, i_out = x[ir].shape[-1], self.num_species, self.irreps.index(ir)
            name = f"w[{i_in},0,{i_out}] {c}x{ir},{s}x0e,{c}x{ir}"
            w = self.param(name, nn.initializers.normal(1.0), (c, s, c))
            out[ir] = layers.species_linear(x[ir], w / math.sqrt(c * s), species)
        return out


class SpeciesPerceptron(nn.Module):
    """Factors on the radial weights for every pair of species (not in the original MACE).

    Attributes:
        widths: outputs of every layer.
        activation: nonlinearity between them.
    """

    widths: tuple[int, ...]
    activation: str

    @nn.compact
    def __call__(self, embedding: jax.Array) -> jax.Array:
        """Factors (species of the sender · species of the receiver, n_out).

        Args:
            embedding: (num_species, width) learned vector of each species.
        """
        sender, receiver = jnp.broadcast_arrays(embedding[:, None], embedding[None, :])
        x = jnp.concatenate([sender, receiver, sender * receiver], axis=-1)
        x = x.reshape(len(embedding) ** 2, -1)
        act = layers.normalized_activation(self.activation)
        for i, width in enumerate(self.widths):
            dense = nn.Dense(width, kernel_init=nn.initializers.normal(1.0), name=f"Dense_{i}")
            x = dense(x) / math.sqrt(x.shape[-1])
            x = act(x) if i < len(self.widths) - 1 else x
        return x


class MessagePassingConvolution(nn.Module):
    """Sum over neighbors of sender features coupled to edge directions (Eq. 8).

    Attributes:
        config: hyperparameters.
        avg_num_neighbors: divisor of the sums.
    """

    config: MACEConfig
    avg_num_neighbors: float

    @nn.compact
    def __call__(self, x: Features, edges: Edges, embedding: jax.Array | None) -> Features:
        """Messages summed at the receivers, paths side by side as channels.

        Args:
            x: sender features.
            edges: what messages read.
            embedding: (num_species, width) embedding of species, if there is one.

        Returns:
            {irrep: (n_nodes, 2l+1, paths to it · channels)}.
        """
        config, channels = self.config, x[SCALAR].shape[-1]
        plan = message_plan(tuple(x), channels, config.l_max, message_irreps(config))
        widths = (*RADIAL_WIDTHS, plan.columns)
        kernels = layers.RadialKernels(
            (config.num_bessel, *widths), (1.0,) * 4, scaled=True, name="MultiLayerPerceptron_0"
        )()
        act = layers.normalized_activation(config.activation)
        factors = None
        if embedding is not None:
            perceptron = SpeciesPerceptron(widths, config.activation, name="MultiLayerPerceptron_1")
            factors = perceptron(embedding)

        def weigh(basis: jax.Array, inside: jax.Array, species: jax.Array) -> jax.Array:
            weights = layers.radial_weights(kernels, act, basis, inside)
            return weights if factors is None else weights * factors[species]

        # before the sums, which are linear in x and have several times its channels
        averaged = [feature / self.avg_num_neighbors for feature in x.values()]
        sums = sum_messages(self, plan, averaged, edges, weigh)
        paths = message_paths(tuple(x), config.l_max, message_irreps(config))
        return dict(zip(paths, sums, strict=True))


class InteractionBlock(nn.Module):
    """Linear, convolution, linear: the one-particle basis A (Eq. 9).

    Attributes:
        config: hyperparameters.
        avg_num_neighbors: divisor of the summed messages.
    """

    config: MACEConfig
    avg_num_neighbors: float

    @nn.compact
    def __call__(self, x: Features, edges: Edges, embedding: jax.Array | None) -> Features:
        channels = self.config.num_channels
        x = linear(x, tuple(x), channels, "linear_up")
        convolution = MessagePassingConvolution(
            self.config, self.avg_num_neighbors, name="MessagePassingConvolution_0"
        )
        x = convolution(x, edges, embedding)
        return linear(x, tuple(x), channels, "linear_down")


class EquivariantProductBasisBlock(nn.Module):
    """Powers of A contracted to the node features of the next layer (Eq. 10-11).

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        irreps: irreps of the result.
    """

    config: MACEConfig
    num_species: int
    irreps: tuple[Irrep, ...]

    @nn.compact
    def __call__(self, a: Features, species: jax.Array) -> Features:
        contraction = SymmetricContraction(
            tuple(a),
            self.irreps,
            self.config.correlation,
            self.num_species,
            self.config.symmetric_tensor_product_basis,
            name="SymmetricContraction_0",
        )
        features = contraction(jnp.concatenate(list(a.values()), axis=1), species)
        if self.config.gate_nodes:
            features = self._gated(features, species)
        return linear(features, self.irreps, self.config.num_channels, "Linear_0")

    def _gated(self, features: Features, species: jax.Array) -> Features:
        """Features times linear functions of the scalars (not in the original MACE)."""
        scalars = features[SCALAR]
        channels = scalars.shape[-1]
        shape = (self.num_species, channels, len(features) * channels)
        w = self.param("species_wise_gate_weights", nn.initializers.normal(channels**-0.5), shape)
        b = self.param("species_wise_gate_bias", nn.initializers.normal(), (shape[0], shape[2]))
        gates = layers.species_linear(scalars, jnp.swapaxes(w, 0, 1), species) + b[species][:, None]
        parts = jnp.split(gates, len(features), axis=-1)
        return {ir: features[ir] * gate for ir, gate in zip(features, parts, strict=True)}


class LinearReadoutBlock(nn.Module):
    """Energy contribution of an inner layer: a linear map of its scalars."""

    @nn.compact
    def __call__(self, x: Features) -> jax.Array:
        return linear({SCALAR: x[SCALAR]}, (SCALAR,), 1, "Linear_0")[SCALAR][:, 0, 0]


class NonLinearReadoutBlock(nn.Module):
    """Energy contribution of the last layer: a perceptron of its scalars.

    Attributes:
        hidden: width of its hidden layer.
        activation: its nonlinearity.
    """

    hidden: int
    activation: str

    @nn.compact
    def __call__(self, x: Features) -> jax.Array:
        hidden = linear({SCALAR: x[SCALAR]}, (SCALAR,), self.hidden, "Linear_0")[SCALAR]
        hidden = layers.normalized_activation(self.activation)(hidden)
        return linear({SCALAR: hidden}, (SCALAR,), 1, "Linear_1")[SCALAR][:, 0, 0]


class MACELayer(nn.Module):
    """One interaction: messages, product basis, residual, readout (Eq. 8-13).

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        avg_num_neighbors: divisor of the summed messages.
        index: which layer; the first has no residual, the last keeps scalars only.
    """

    config: MACEConfig
    num_species: int
    avg_num_neighbors: float
    index: int

    @nn.compact
    def __call__(
        self,
        x: Features,
        species: jax.Array,
        edges: Edges,
        embedding: jax.Array | None,
    ) -> tuple[jax.Array, Features]:
        config = self.config
        first, last = self.index == 0, self.index == config.num_layers - 1
        node_symmetry = config.l_max if config.node_symmetry is None else config.node_symmetry
        irreps = natural_irreps(0 if last else node_symmetry)

        # The first species-indexed product is the selector of the first layer, later the residual.
        name = "FullyConnectedTensorProduct_0"
        residual: Features = {}
        if not first:
            residual = SpeciesLinear(irreps, self.num_species, name=name)(x, species)
        interaction = InteractionBlock(config, self.avg_num_neighbors, name="InteractionBlock_0")
        a = interaction(x, edges, embedding)
        if first:
            a = SpeciesLinear(message_irreps(config), self.num_species, name=name)(a, species)
        product = EquivariantProductBasisBlock(
            config, self.num_species, irreps, name="EquivariantProductBasisBlock_0"
        )
        x = product(a, species)
        if residual:
            x = {ir: feature + residual[ir] for ir, feature in x.items()}
        return self._readout(x, last), x

    def _readout(self, x: Features, last: bool) -> jax.Array:
        energies = jnp.zeros(len(x[SCALAR]), x[SCALAR].dtype)
        for head in range(self.config.num_readout_heads):
            if last:
                hidden = Irreps(self.config.readout_irreps[0]).dim
                block = NonLinearReadoutBlock(
                    hidden, self.config.activation, name=f"NonLinearReadoutBlock_{head}"
                )
                energies += block(x)
            else:
                energies += LinearReadoutBlock(name=f"LinearReadoutBlock_{head}")(x)
        return energies


class LinearNodeEmbeddingBlock(nn.Module):
    """Initial scalars of every species (Eq. 7), / √species.

    Attributes:
        num_species: number of elements.
        channels: width.
    """

    num_species: int
    channels: int

    @nn.compact
    def __call__(self, species: jax.Array) -> jax.Array:
        shape = (self.num_species, self.channels)
        embeddings = self.param("embeddings", nn.initializers.normal(1.0), shape)
        return embeddings[species] / math.sqrt(self.num_species)


class MACE(nn.Module):
    """The MACE network: graphs in, raw node energies (n_nodes,) out.

    Messages vanish smoothly at the cutoff (with sigmoid as nonlinearity, which is not 0 at 0, they
    end there abruptly).

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        cutoff: Å.
        avg_num_neighbors: divisor of the summed messages.
        radial_scale: factor on the radial basis.
    """

    config: MACEConfig
    num_species: int
    cutoff: float
    avg_num_neighbors: float
    radial_scale: RadialScale

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        config, species = self.config, jnp.asarray(graph.species)
        edges = self._edges(graph)
        embedding = None
        if config.species_embedding_dim is not None:
            table = nn.Embed(
                self.num_species, config.species_embedding_dim, name="species_embedding"
            )
            embedding = table(jnp.arange(self.num_species))
        node_embedding = LinearNodeEmbeddingBlock(
            self.num_species, config.num_channels, name="LinearNodeEmbeddingBlock_0"
        )
        dtype = edges.basis.dtype
        x = {SCALAR: node_embedding(species)[:, None, :].astype(dtype)}
        energies = jnp.zeros(graph.n_nodes, dtype)
        for i in range(config.num_layers):
            layer = MACELayer(
                config, self.num_species, self.avg_num_neighbors, i, name=f"layer_{i}"
            )
            contribution, x = layer(x, species, edges, embedding)
            energies = energies + contribution
        return energies

    def _edges(self, graph: Graph) -> Edges:
        config, vectors = self.config, edge_vectors(graph)
        basis = self.cutoff, config.num_bessel, config.radial_envelope
        single, double = self.radial_scale
        scale = double if vectors.dtype == jnp.float64 else single

        def radial_basis(lengths: jax.Array, _species: jax.Array) -> jax.Array:
            return layers.radial_basis(lengths, *basis, scale)

        # The published weights belong to harmonics of the vector from receiver to sender.
        return read_edges(
            graph, -vectors, self.cutoff, radial_basis, config.l_max, self.num_species
        )
