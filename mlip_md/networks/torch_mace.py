"""MACE as the package mace-torch has it (Batatia et al. 2022, arXiv:2206.07697; MIT licence).

The mathematics is that of ``networks.mace``, of which it takes what is the same: the couplings of
messages, the product basis and the readouts. Its own are the choice of interaction blocks (of
mace-torch 0.3.16, ``mace/modules/blocks.py``), the radial basis and the repulsion of nuclei (both
``mace/modules/radial.py``). Edge vectors, and so the signs of odd harmonics, are as in
``networks.mace``; who reads mace-torch's weights turns these.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mlip_md.elements import COVALENT_RADII
from mlip_md.graph import Graph, edge_vectors
from mlip_md.networks import layers
from mlip_md.networks.config import TorchMACEConfig
from mlip_md.networks.convolution import Block, Path, Plan
from mlip_md.networks.layers import SCALAR, Features
from mlip_md.networks.mace import (
    LinearNodeEmbeddingBlock,
    LinearReadoutBlock,
    NonLinearReadoutBlock,
    SpeciesLinear,
    linear,
    message_paths,
    message_plan,
    natural_irreps,
)
from mlip_md.networks.messages import Basis, Edges, read_edges, sum_messages
from mlip_md.networks.product_basis import SymmetricContraction
from mlip_md.rows import sum_rows

RADIAL_ACTIVATION = "silu"


def sums_of_radii(elements: tuple[int, ...]) -> np.ndarray:
    """Sums of covalent radii (Å) of every pair of species, (number of species²,)."""
    radii = np.array([COVALENT_RADII[z - 1] for z in elements])
    return (radii[:, None] + radii).ravel()


def agnesi_transform(lengths: jax.Array, radii: jax.Array) -> jax.Array:
    """Distances mapped to 1 … 0, 1/(1 + a·u^q/(1 + u^(q-p))) (Witt et al. 2023, Eq. 9).

    Args:
        lengths: (n,) Å, positive.
        radii: (n,) Å, sums of covalent radii; u is the distance over half of them.
    """
    a, q, p = 1.0805, 0.9183, 4.5791
    u = lengths / (0.5 * radii)
    return 1.0 / (1.0 + a * u**q / (1.0 + u ** (q - p)))


def soft_transform(lengths: jax.Array, radii: jax.Array) -> jax.Array:
    """Distances that pass over into 3/4 of the sum of covalent radii where they are shorter.

    Args:
        lengths: (n,) Å.
        radii: (n,) Å, sums of covalent radii.
    """
    start, end = 3 / 4 * radii, 4 / 3 * radii
    step = 0.5 * (1.0 + jnp.tanh(4.0 / (end - start) * (lengths - 0.5 * (start + end))))
    return start + (lengths - start) * step


_TRANSFORMS = {"agnesi": agnesi_transform, "soft": soft_transform}


def gaussian_basis(x: jax.Array, cutoff: float, number: int) -> jax.Array:
    """Gaussians (n, number) of x (n,) about points from 0 to the cutoff, as wide as these lie."""
    points, width = np.linspace(0.0, cutoff, number), cutoff / (number - 1)
    return jnp.exp(-0.5 * ((x[:, None] - points[None].astype(x.dtype)) / width) ** 2)


_BASES = {"bessel": layers.bessel_basis, "gaussian": gaussian_basis}


def radial_basis(config: TorchMACEConfig, cutoff: float, elements: tuple[int, ...]) -> Basis:
    """The radial basis under the polynomial cutoff, or beside it as one more column.

    Args:
        config: hyperparameters.
        cutoff: Å.
        elements: atomic numbers by species; read where distances are transformed.
    """

    def basis(lengths: jax.Array, species: jax.Array) -> jax.Array:
        envelope = layers.polynomial_envelope(lengths, cutoff, config.cutoff_exponent)[:, None]
        x = lengths
        if config.distance_transform != "none":
            radii = jnp.asarray(sums_of_radii(elements), x.dtype)[species]
            x = _TRANSFORMS[config.distance_transform](x, radii)
        functions = _BASES[config.radial_basis](x, cutoff, config.num_basis)
        if config.cutoff_on_weights:
            return jnp.concatenate([functions, envelope], axis=1)
        return functions * envelope

    return basis


def repulsion(
    lengths: jax.Array, species: jax.Array, elements: tuple[int, ...], exponent: int
) -> jax.Array:
    """Half the energy of pairs by the universal potential of Ziegler, Biersack and Littmark (eV).

    It ends at the sum of the covalent radii, under a polynomial cutoff.

    Args:
        lengths: (n,) Å.
        species: (n,) int, pairs of species.
        elements: atomic numbers by species.
        exponent: of the cutoff.
    """
    dtype, z = lengths.dtype, np.array(elements, float)
    ends = jnp.asarray(sums_of_radii(elements), dtype)[species]
    screening = 0.4543 * 0.529 / (z[:, None] ** 0.3 + z**0.3)
    charges = 14.3996 * z[:, None] * z
    x = lengths / jnp.asarray(screening.ravel(), dtype)[species]
    terms = ((0.1818, 3.2), (0.5099, 0.9423), (0.2802, 0.4028), (0.02817, 0.2016))
    screened = sum((c * jnp.exp(-k * x) for c, k in terms), start=jnp.zeros_like(x))
    energies = jnp.asarray(charges.ravel(), dtype)[species] / lengths * screened
    return 0.5 * energies * layers.polynomial_envelope(lengths, ends, exponent)


def _perceptron(widths: tuple[int, ...], name: str) -> list[jax.Array]:
    """Kernels of a perceptron without biases, each divided by the root of its fan-in."""
    return layers.RadialKernels(widths, (1.0,) * (len(widths) - 1), scaled=True, name=name)()


def _split_cutoff(basis: jax.Array, config: TorchMACEConfig) -> tuple[jax.Array, jax.Array | float]:
    """The radial basis, and what multiplies the radial weights."""
    if config.cutoff_on_weights:
        return basis[:, :-1], basis[:, -1:]
    return basis, 1.0


class Density(nn.Module):
    """Density of neighbors of each node: the sum over edges of tanh(f(r)²), f linear in the basis.

    Attributes:
        config: hyperparameters.
    """

    config: TorchMACEConfig

    @nn.compact
    def __call__(self, edges: Edges, ones: jax.Array) -> jax.Array:
        """Densities (n_nodes, 1, 1); ``ones`` are of that shape."""
        config = self.config
        (kernel,) = _perceptron((config.num_basis, 1), "perceptron")
        harmonics = (config.l_max + 1) ** 2
        plan = Plan((Block(0, 1),), (Block(0, 1),), (Path(0, 0, 0, 0, 0, 0, 1),), harmonics, 1)

        def weigh(basis: jax.Array, inside: jax.Array, _species: jax.Array) -> jax.Array:
            basis, cutoff = _split_cutoff(basis, config)
            return jnp.where(inside, jnp.tanh((basis @ kernel) ** 2) * cutoff, 0.0)

        return sum_messages(self, plan, [ones], edges, weigh)[0]


class Convolution(nn.Module):
    """Sum over neighbors of sender features coupled to edge directions (Eq. 8).

    Attributes:
        config: hyperparameters.
    """

    config: TorchMACEConfig

    @nn.compact
    def __call__(self, x: Features, edges: Edges) -> Features:
        """Messages summed at the receivers, {irrep: (n_nodes, 2l+1, paths to it · channels)}."""
        config, irreps = self.config, natural_irreps(self.config.l_max)
        plan = message_plan(tuple(x), x[SCALAR].shape[-1], config.l_max, irreps)
        widths = (config.num_basis, *config.radial_widths, plan.columns)
        kernels = _perceptron(widths, "perceptron")
        act = layers.normalized_activation(RADIAL_ACTIVATION)

        def weigh(basis: jax.Array, inside: jax.Array, _species: jax.Array) -> jax.Array:
            basis, cutoff = _split_cutoff(basis, config)
            return layers.radial_weights(kernels, act, basis, inside) * cutoff

        sums = sum_messages(self, plan, list(x.values()), edges, weigh)
        return dict(zip(message_paths(tuple(x), config.l_max, irreps), sums, strict=True))


class Layer(nn.Module):
    """One interaction: messages, product basis and residual (Eq. 8-12).

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        avg_num_neighbors: divisor of the summed messages, where no density is.
        index: which layer; the last keeps scalars only.
    """

    config: TorchMACEConfig
    num_species: int
    avg_num_neighbors: float
    index: int

    @nn.compact
    def __call__(self, x: Features, species: jax.Array, edges: Edges) -> Features:
        config, channels = self.config, self.config.num_channels
        block = config.interaction if self.index else config.first_interaction
        last = self.index == config.num_layers - 1
        irreps = natural_irreps(0 if last else config.node_symmetry)
        residual: Features = {}
        if "Residual" in block:
            residual = SpeciesLinear(irreps, self.num_species, name="skip")(x, species)
        up = linear(x, tuple(x), channels, "linear_up")
        divisor: jax.Array | float = self.avg_num_neighbors
        if "Density" in block:
            ones = jnp.ones_like(up[SCALAR][:, :, :1])
            divisor = 1.0 + Density(config, name="density")(edges, ones)
        sums = Convolution(config, name="convolution")(up, edges)
        a = linear(sums, tuple(sums), channels, "linear_down")
        a = {ir: feature / divisor for ir, feature in a.items()}
        if "Residual" not in block:
            a = SpeciesLinear(tuple(a), self.num_species, name="skip")(a, species)
        contraction = SymmetricContraction(
            tuple(a),
            irreps,
            config.correlation,
            self.num_species,
            False,
            name="SymmetricContraction",
        )
        features = contraction(jnp.concatenate(list(a.values()), axis=1), species)
        features = linear(features, irreps, channels, "linear_out")
        return {ir: f + residual[ir] if ir in residual else f for ir, f in features.items()}


class TorchMACE(nn.Module):
    """The network of mace-torch: graphs in, raw node energies (n_nodes,) out.

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        cutoff: Å.
        avg_num_neighbors: divisor of the summed messages.
        elements: atomic numbers by species, where distances are transformed or nuclei repel.
    """

    config: TorchMACEConfig
    num_species: int
    cutoff: float
    avg_num_neighbors: float
    elements: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        config, species = self.config, jnp.asarray(graph.species)
        basis = radial_basis(config, self.cutoff, self.elements)
        directions = -edge_vectors(graph)
        edges = read_edges(graph, directions, self.cutoff, basis, config.l_max, self.num_species)
        embedding = LinearNodeEmbeddingBlock(
            self.num_species, config.num_channels, name="embedding"
        )
        dtype = edges.lengths.dtype
        x = {SCALAR: embedding(species)[:, None, :].astype(dtype)}
        energies = jnp.zeros(graph.n_nodes, dtype)
        if config.pair_repulsion:
            pairs = repulsion(edges.lengths, edges.species, self.elements, config.cutoff_exponent)
            pairs = jnp.where(edges.pairs.inside, pairs, 0.0)
            energies = energies + sum_rows(pairs, edges.pairs.receivers, graph.n_nodes)
        for i in range(config.num_layers):
            layer = Layer(config, self.num_species, self.avg_num_neighbors, i, name=f"layer_{i}")
            x = layer(x, species, edges)
            last = i == config.num_layers - 1
            if last or not config.last_readout_only:
                energies = energies + self._readout(i)(x)
        return energies

    def _readout(self, index: int) -> Callable[[Features], jax.Array]:
        """What reads energies from a layer: a linear map, but in the last of several."""
        config = self.config
        if config.num_layers > 1 and index == config.num_layers - 1:
            return NonLinearReadoutBlock(
                config.readout_width, config.activation, name=f"readout_{index}"
            )
        return LinearReadoutBlock(name=f"readout_{index}")
