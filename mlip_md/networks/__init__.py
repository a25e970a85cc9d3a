"""The networks: graphs of atoms in, one raw energy per atom out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from mlip_md.elements import COVALENT_RADII
from mlip_md.errors import ConfigError
from mlip_md.graph import Graph
from mlip_md.networks.config import CONFIGS
from mlip_md.networks.config import Hyperparameters as Hyperparameters
from mlip_md.networks.config import MACEConfig as MACEConfig
from mlip_md.networks.config import NequIPConfig as NequIPConfig
from mlip_md.networks.config import NetworkConfig as NetworkConfig
from mlip_md.networks.config import TorchMACEConfig as TorchMACEConfig
from mlip_md.networks.radial_scale import RadialScale, radial_scales

MAX_R_MIN = 0.98
"""Part of the cutoff; beyond it the envelope leaves float32 no digits of the radial basis."""

SCALE_TOLERANCE = 1e-5
"""Relative; as far as rounding may take a stored factor on the radial basis from the rule's."""


def build_network(
    config: NetworkConfig,
    *,
    num_species: int,
    cutoff: float,
    avg_num_neighbors: float,
    avg_r_min: float | None,
    radial_scale: RadialScale | None = None,
    elements: Sequence[int] | None = None,
) -> nn.Module:
    """The flax module of a configuration.

    Args:
        config: hyperparameters; their avg_num_neighbors and avg_r_min win over the arguments.
        num_species: number of elements.
        cutoff: Å, radius of the neighborhoods.
        avg_num_neighbors: mean number of neighbors in the training set.
        avg_r_min: Å, mean shortest distance in the training set; None leaves the radial basis
            unscaled. Read by MACE only.
        radial_scale: factor on the radial basis that a file states; None for ``scale_basis``.
        elements: atomic numbers by species, for what reads covalent radii or nuclear charges.

    Returns:
        A module with ``init(key, graph)`` and ``apply(params, graph) -> (n_nodes,)``: node
        energies before scaling and without E0.

    Raises:
        ConfigError: if avg_r_min is too near to the cutoff or beyond it, radial_scale contradicts
            them, or there is no network for such a configuration.
    """
    neighbors = config.avg_num_neighbors or avg_num_neighbors
    if isinstance(config, MACEConfig):
        from mlip_md.networks.mace import MACE

        scale = _checked_scale(radial_scale, scale_basis(config, cutoff, avg_r_min))
        return MACE(config, num_species, cutoff, neighbors, scale)
    if isinstance(config, NequIPConfig):
        from mlip_md.networks.nequip import NequIP

        return NequIP(config, num_species, cutoff, neighbors)
    if isinstance(config, TorchMACEConfig):
        from mlip_md.networks.torch_mace import TorchMACE

        numbers = tuple(elements or ())
        chemical = config.pair_repulsion or config.distance_transform != "none"
        if chemical and (len(numbers) != num_species or max(numbers) > len(COVALENT_RADII)):
            raise ConfigError(
                f"elements = {numbers}; pair_repulsion and distance_transform need the atomic "
                f"numbers of {num_species} elements, up to {len(COVALENT_RADII)} (curium)"
            )
        return TorchMACE(config, num_species, cutoff, neighbors, numbers)
    raise ConfigError(
        f"there is no network for {type(config).__name__}; there are: {', '.join(CONFIGS)}"
    )


def scale_basis(config: MACEConfig, cutoff: float, avg_r_min: float | None) -> RadialScale:
    """The factor on the radial basis by our rule, see ``networks.radial_scale``.

    Args:
        config: hyperparameters; its avg_r_min wins over the argument.
        cutoff: Å.
        avg_r_min: Å, mean shortest distance in the training set, or None.

    Raises:
        ConfigError: if avg_r_min is too near to the cutoff or beyond it.
    """
    r_min = config.avg_r_min if config.avg_r_min is not None else avg_r_min
    if r_min is not None and r_min > MAX_R_MIN * cutoff:
        raise ConfigError(
            f"avg_r_min = {r_min} Å is beyond {MAX_R_MIN:.0%} of the cutoff of {cutoff} Å: "
            "the radial basis cannot be normalised between them; take a larger cutoff"
        )
    return radial_scales(r_min, cutoff, config.num_bessel, config.radial_envelope)


def _checked_scale(given: RadialScale | None, rule: RadialScale) -> RadialScale:
    """The factor that a file states, or else the rule's."""
    for stated, expected in zip(given or rule, rule, strict=True):
        if not math.isclose(stated, expected, rel_tol=SCALE_TOLERANCE):
            raise ConfigError(
                f"radial_scale = {stated} is not the factor that avg_r_min and the cutoff give, "
                f"{expected}: what states it is damaged, or was changed after it was computed; "
                "take the original, or leave radial_scale out"
            )
    return given or rule


class _Published(nn.Module):
    """A network below the name that its published module has."""

    network: nn.Module
    block: str

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        """Raw node energies (n_nodes,) of a graph."""
        return jnp.asarray(self.network.clone(name=self.block, parent=self)(graph))


def draw_weights(
    network: nn.Module, config: NetworkConfig, key: jax.Array, graph: Graph
) -> Mapping[str, Any]:
    """Initial weights of a network; works under ``jit``.

    flax mixes the names of modules into the random numbers. They are drawn as below the published
    block, so that a seed means the same weights in every version.

    Args:
        network: from ``build_network``.
        config: its hyperparameters.
        key: random key.
        graph: any graph, for shapes and types.

    Returns:
        What ``network.init`` returns, with those values.
    """
    drawn = _Published(network, config.published_block).init(key, graph)
    return {name: tree[config.published_block] for name, tree in drawn.items()}
