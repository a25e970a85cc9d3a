"""MACE: higher-order equivariant message passing (Batatia et al. 2022, arXiv:2206.07697).

Equation numbers are the paper's. Weights, their names and their order are those of the published
model files, so that weights pass in and out of such files as they are.
"""

from __future__ import annotations

import functools

import e3nn_jax as e3nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mlip_md.errors import ConfigError
from mlip_md.graph import Graph, edge_vectors
from mlip_md.networks import layers
from mlip_md.networks.config import MACEConfig
from mlip_md.networks.product_basis import SymmetricContraction

RADIAL_WIDTHS = (64, 64, 64)
"""Hidden widths of the radial network; no card or file has others."""

Features = dict[int, jax.Array]
"""Node features by degree l: (n_nodes, 2l+1, channels), parity (-1)^l."""

Path = tuple[int, int, int]
"""Degrees (l1, l2, l3) of sender feature, spherical harmonic and message; l2 = 0 is a copy."""


def irrep(degree: int) -> str:
    """Name of the irrep of a degree with parity (-1)^l, such as "1o"."""
    return f"{degree}{'eo'[degree % 2]}"


@functools.lru_cache
def message_paths(degrees_in: tuple[int, ...], l_max: int) -> dict[int, tuple[Path, ...]]:
    """Paths by degree of the message, in the order of the published radial weights (Eq. 8).

    Within a degree the plain copy of the sender's feature comes first, then (l1, l2) ascending.
    """
    paths: dict[int, tuple[Path, ...]] = {}
    for l3 in range(l_max + 1):
        copy = [(l3, 0, l3)] if l3 in degrees_in else []
        coupled = [
            (l1, l2, l3)
            for l1 in degrees_in
            for l2 in range(1, l_max + 1)
            if abs(l1 - l2) <= l3 <= l1 + l2 and (l1 + l2 + l3) % 2 == 0
        ]
        if copy or coupled:
            paths[l3] = tuple(copy + coupled)
    return paths


class Linear(nn.Module):
    """Mixing of channels within each degree, divided by √fan-in.

    Attributes:
        degrees: degrees kept, in order.
        channels: channels of the result.
    """

    degrees: tuple[int, ...]
    channels: int

    @nn.compact
    def __call__(self, x: Features) -> Features:
        out = {}
        for i_in, l in enumerate(x):
            if l not in self.degrees:
                continue
            fan_in, i_out = x[l].shape[-1], self.degrees.index(l)
            name = f"w[{i_in},{i_out}] {fan_in}x{irrep(l)},{self.channels}x{irrep(l)}"
            w = self.param(name, nn.initializers.normal(1.0), (fan_in, self.channels))
            out[l] = x[l] @ (w / np.sqrt(fan_in))
        return out


class SpeciesLinear(nn.Module):
    """Mixing of channels within each degree with weights chosen by species, / √(fan-in · species).

    Attributes:
        degrees: degrees kept, in order.
        num_species: number of elements.
    """

    degrees: tuple[int, ...]
    num_species: int

    @nn.compact
    def __call__(self, x: Features, species: jax.Array) -> Features:
        out = {}
        for i_in, l in enumerate(x):
            if l not in self.degrees:
                continue
            c, s, i_out = x[l].shape[-1], self.num_species, self.degrees.index(l)
            name = f"w[{i_in},0,{i_out}] {c}x{irrep(l)},{s}x0e,{c}x{irrep(l)}"
            w = self.param(name, nn.initializers.normal(1.0), (c, s, c))
            out[l] = layers.species_linear(x[l], w / np.sqrt(c * s), species)
        return out


class MessagePassingConvolution(nn.Module):
    """Sum over neighbours of sender features coupled to edge directions (Eq. 8).

    Attributes:
        l_max: highest degree of spherical harmonics and messages.
        avg_num_neighbors: divisor of the sums.
        activation: nonlinearity of the radial network.
    """

    l_max: int
    avg_num_neighbors: float
    activation: str

    @nn.compact
    def __call__(
        self,
        x: Features,
        harmonics: Features,
        radial: jax.Array,
        senders: jax.Array,
        receivers: jax.Array,
    ) -> Features:
        """Messages summed at the receivers, paths side by side as channels.

        Args:
            x: sender features.
            harmonics: Y_l of the edges, {l: (n_edges, 2l+1)}, l = 1…l_max.
            radial: (n_edges, num_bessel) radial basis.
            senders: (n_edges,) int.
            receivers: (n_edges,) int, ascending.

        Returns:
            {l: (n_nodes, 2l+1, n_paths(l) · channels)}.
        """
        n_nodes, _, channels = x[0].shape
        paths = message_paths(tuple(x), self.l_max)
        n_paths = sum(len(p) for p in paths.values())
        widths = (radial.shape[-1], *RADIAL_WIDTHS, n_paths * channels)
        kernels = layers.RadialKernels(
            widths, (1.0,) * 4, scaled=True, name="MultiLayerPerceptron_0"
        )()
        act = layers.normalized_activation(self.activation)

        def messages(edges: tuple[jax.Array, jax.Array, Features]) -> Features:
            senders, radial, harmonics = edges
            weights = layers.perceptron(kernels, act, radial).reshape(-1, n_paths, channels)
            gathered = {l: feature[senders] for l, feature in x.items()}
            return couple(gathered, harmonics, weights, paths)

        floats = sum((2 * l + 1) * len(p) * channels for l, p in paths.items())
        edges = (senders, radial, harmonics)
        summed = layers.sum_messages(messages, edges, receivers, n_nodes, floats)
        return {l: total / self.avg_num_neighbors for l, total in summed.items()}


def couple(
    x: Features, harmonics: Features, weights: jax.Array, paths: dict[int, tuple[Path, ...]]
) -> Features:
    """Messages of edges: R_p · √(2l3+1) Σ C(l1 m1, l2 m2; l3 m3) x_{l1 m1} Y_{l2 m2}.

    Args:
        x: sender features of the edges, {l: (n_edges, 2l+1, channels)}.
        harmonics: {l: (n_edges, 2l+1)}.
        weights: (n_edges, n_paths, channels) radial weights.
        paths: paths by degree of the message.

    Returns:
        {l3: (n_edges, 2·l3+1, n_paths(l3) · channels)}.
    """
    out, column = {}, 0
    for l3, degree_paths in paths.items():
        parts = []
        for l1, l2, _ in degree_paths:
            weighted = x[l1] * weights[:, column, None, :]
            column += 1
            if l2 == 0:
                parts.append(weighted)
                continue
            coefficients = jnp.asarray(layers.coupling(l1, l2, l3), weighted.dtype)
            rotation = jnp.einsum("eb,abm->ema", harmonics[l2], coefficients)
            parts.append(jnp.einsum("ema,eac->emc", rotation, weighted))
        out[l3] = jnp.concatenate(parts, axis=-1)
    return out


class InteractionBlock(nn.Module):
    """Linear, convolution, linear: the one-particle basis A (Eq. 9).

    Attributes:
        config: hyperparameters.
        avg_num_neighbors: divisor of the summed messages.
    """

    config: MACEConfig
    avg_num_neighbors: float

    @nn.compact
    def __call__(
        self,
        x: Features,
        harmonics: Features,
        radial: jax.Array,
        senders: jax.Array,
        receivers: jax.Array,
    ) -> Features:
        channels, l_max = self.config.num_channels, self.config.l_max
        x = Linear(tuple(x), channels, name="linear_up")(x)
        convolution = MessagePassingConvolution(
            l_max,
            self.avg_num_neighbors,
            self.config.activation,
            name="MessagePassingConvolution_0",
        )
        x = convolution(x, harmonics, radial, senders, receivers)
        return Linear(tuple(range(l_max + 1)), channels, name="linear_down")(x)


class EquivariantProductBasisBlock(nn.Module):
    """Powers of A contracted to the node features of the next layer (Eq. 10-11).

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        degrees: degrees of the result.
    """

    config: MACEConfig
    num_species: int
    degrees: tuple[int, ...]

    @nn.compact
    def __call__(self, a: Features, species: jax.Array) -> Features:
        contraction = SymmetricContraction(
            tuple(irrep(l) for l in a),
            tuple(irrep(l) for l in self.degrees),
            self.config.correlation,
            self.num_species,
            self.config.symmetric_tensor_product_basis,
            name="SymmetricContraction_0",
        )
        b = contraction(jnp.concatenate(list(a.values()), axis=1), species)
        features = {l: b[irrep(l)] for l in self.degrees}
        return Linear(self.degrees, self.config.num_channels, name="Linear_0")(features)


class LinearReadoutBlock(nn.Module):
    """Energy contribution of an inner layer: a linear map of its scalars."""

    @nn.compact
    def __call__(self, x: Features) -> jax.Array:
        return Linear((0,), 1, name="Linear_0")({0: x[0]})[0][:, 0, 0]


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
        hidden = Linear((0,), self.hidden, name="Linear_0")({0: x[0]})
        hidden = {0: layers.normalized_activation(self.activation)(hidden[0])}
        return Linear((0,), 1, name="Linear_1")(hidden)[0][:, 0, 0]


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
        harmonics: Features,
        radial: jax.Array,
        senders: jax.Array,
        receivers: jax.Array,
    ) -> tuple[jax.Array, Features]:
        first, last = self.index == 0, self.index == self.config.num_layers - 1
        node_symmetry = self.config.node_symmetry
        node_symmetry = self.config.l_max if node_symmetry is None else node_symmetry
        degrees = (0,) if last else tuple(range(node_symmetry + 1))

        # The first species-indexed product is the selector of the first layer, later the residual.
        name = "FullyConnectedTensorProduct_0"
        residual: Features = {}
        if not first:
            residual = SpeciesLinear(degrees, self.num_species, name=name)(x, species)
        interaction = InteractionBlock(
            self.config, self.avg_num_neighbors, name="InteractionBlock_0"
        )
        a = interaction(x, harmonics, radial, senders, receivers)
        if first:
            a = SpeciesLinear(tuple(a), self.num_species, name=name)(a, species)
        product = EquivariantProductBasisBlock(
            self.config, self.num_species, degrees, name="EquivariantProductBasisBlock_0"
        )
        x = product(a, species)
        x = {l: feature + residual[l] if l in residual else feature for l, feature in x.items()}
        return self._readout(x, last), x

    def _readout(self, x: Features, last: bool) -> jax.Array:
        energies = jnp.zeros(x[0].shape[0], x[0].dtype)
        for head in range(self.config.num_readout_heads):
            if last:
                hidden = readout_width(self.config)
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
        return embeddings[species] / np.sqrt(self.num_species)


class MACEBlock(nn.Module):
    """Embeddings and interactions.

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        cutoff: Å.
        avg_num_neighbors: divisor of the summed messages.
        avg_r_min: Å, or None; start of the interval on which the radial basis is normalised.
    """

    config: MACEConfig
    num_species: int
    cutoff: float
    avg_num_neighbors: float
    avg_r_min: float | None

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        config, species = self.config, jnp.asarray(graph.species)
        vectors = edge_vectors(graph)
        lengths = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
        envelope = config.radial_envelope
        scale = layers.radial_scale(self.avg_r_min, self.cutoff, config.num_bessel, envelope)
        radial = layers.radial_basis(lengths, self.cutoff, config.num_bessel, envelope, scale)
        # The published weights belong to harmonics of the vector from receiver to sender.
        harmonics = layers.spherical_harmonics(-vectors, range(1, config.l_max + 1))
        embedding = LinearNodeEmbeddingBlock(
            self.num_species, config.num_channels, name="LinearNodeEmbeddingBlock_0"
        )
        x = {0: embedding(species)[:, None, :].astype(vectors.dtype)}
        energies = jnp.zeros(graph.n_nodes, vectors.dtype)
        for i in range(config.num_layers):
            layer = MACELayer(
                config, self.num_species, self.avg_num_neighbors, i, name=f"layer_{i}"
            )
            contribution, x = layer(
                x,
                species,
                harmonics,
                radial,
                jnp.asarray(graph.senders),
                jnp.asarray(graph.receivers),
            )
            energies = energies + contribution
        return energies


class MACE(nn.Module):
    """The MACE network: graphs in, raw node energies (n_nodes,) out.

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        cutoff: Å.
        avg_num_neighbors: divisor of the summed messages.
        avg_r_min: Å, or None; start of the interval on which the radial basis is normalised.
    """

    config: MACEConfig
    num_species: int
    cutoff: float
    avg_num_neighbors: float
    avg_r_min: float | None

    def __post_init__(self) -> None:
        refuse_unsupported(self.config)
        super().__post_init__()

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        block = MACEBlock(
            self.config,
            self.num_species,
            self.cutoff,
            self.avg_num_neighbors,
            self.avg_r_min,
            name="MaceBlock_0",
        )
        return block(graph)


def refuse_unsupported(config: MACEConfig) -> None:
    """Refuse, by name, options that this version of the network does not have.

    Raises:
        ConfigError: if one of them is set.
    """
    unsupported = {
        "include_pseudotensors": config.include_pseudotensors,
        "gate_nodes": config.gate_nodes,
        "species_embedding_dim": config.species_embedding_dim is not None,
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise ConfigError(f"MACE with {name} = {getattr(config, name)!r} is not supported yet")
    readout_width(config)


def readout_width(config: MACEConfig) -> int:
    """Hidden width of the last readout.

    Raises:
        ConfigError: if the readout irreps are not scalars, of which the last is a single one.
    """
    hidden, output = (e3nn.Irreps(r) for r in config.readout_irreps)
    if output != e3nn.Irreps("0e") or {str(ir) for _, ir in hidden} != {"0e"}:
        raise ConfigError(
            f"readout_irreps = {config.readout_irreps!r} is not supported: the hidden layer must "
            "be scalars such as 16x0e, the output 0e"
        )
    return hidden.dim
