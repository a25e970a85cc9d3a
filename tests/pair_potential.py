"""A small smooth many-body potential as a test double: it compiles in a fraction of a second."""

import functools

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import ops

from mlip_md.graph import edge_vectors
from mlip_md.networks import MACEConfig
from mlip_md.potential import Potential


class PairNetwork(nn.Module):
    """ε_i = Σ_j a_i a_j φ(r_ij) - sqrt(1 + Σ_j b_j ρ(r_ij)), smooth at the cutoff."""

    num_species: int
    cutoff: float

    @nn.compact
    def __call__(self, graph):
        shape = (self.num_species,)
        amplitude = self.param("amplitude", nn.initializers.uniform(1.0), shape)
        density = self.param("density", nn.initializers.uniform(1.0), shape)
        vectors = edge_vectors(graph)
        lengths = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
        x = jnp.where(graph.edge_mask, lengths / self.cutoff, 1.0)
        envelope = jnp.where(x < 1.0, (1.0 - x**2) ** 3, 0.0)
        sender, receiver = graph.species[graph.senders], graph.species[graph.receivers]
        pair = amplitude[sender] * amplitude[receiver] * jnp.exp(-0.7 * lengths) * envelope
        embedding = density[sender] * jnp.exp(-0.4 * lengths) * envelope
        pairs = ops.segment_sum(4.0 * pair, graph.receivers, graph.n_nodes)
        embeddings = ops.segment_sum(embedding, graph.receivers, graph.n_nodes)
        return pairs - jnp.sqrt(1.0 + embeddings)


class PairPotential(Potential):
    """A potential whose network is the one above."""

    @functools.cached_property
    def network(self):
        return PairNetwork(len(self.elements), self.cutoff)


def pair_potential(cutoff=5.0, elements=(1, 6, 8), reference=(-13.6, -1035.2, -2043.9), **kwargs):
    """A potential with O(1) eV energies and forces and with the E0 of a DFT total energy."""
    rng = np.random.default_rng(0)
    params = {
        "params": {
            "amplitude": rng.uniform(1.0, 2.0, len(elements)).astype(np.float32),
            "density": rng.uniform(3.0, 5.0, len(elements)).astype(np.float32),
        }
    }
    return PairPotential(
        MACEConfig(num_channels=8),
        params,
        tuple(elements),
        np.array(reference),
        cutoff,
        20.0,
        **kwargs,
    )
