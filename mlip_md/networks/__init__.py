"""The networks: graphs of atoms in, one raw energy per atom out."""

from __future__ import annotations

from flax import linen as nn

from mlip_md.errors import ConfigError
from mlip_md.networks.config import MACEConfig as MACEConfig
from mlip_md.networks.config import NequIPConfig as NequIPConfig
from mlip_md.networks.config import NetworkConfig as NetworkConfig


def build_network(
    config: NetworkConfig,
    *,
    num_species: int,
    cutoff: float,
    avg_num_neighbors: float,
    avg_r_min: float | None,
) -> nn.Module:
    """The flax module of a configuration.

    Args:
        config: hyperparameters; their avg_num_neighbors and avg_r_min win over the arguments.
        num_species: number of elements.
        cutoff: Å, radius of the neighbourhoods.
        avg_num_neighbors: mean number of neighbours in the training set.
        avg_r_min: Å, mean shortest distance in the training set; None leaves the radial basis
            unscaled. Read by MACE only.

    Returns:
        A module with ``init(key, graph)`` and ``apply(params, graph) -> (n_nodes,)``: node
        energies before scaling and without E0.

    Raises:
        ConfigError: if avg_r_min is not below the cutoff.
    """
    neighbors = config.avg_num_neighbors or avg_num_neighbors
    if isinstance(config, MACEConfig):
        from mlip_md.networks.mace import MACE

        r_min = config.avg_r_min if config.avg_r_min is not None else avg_r_min
        if r_min is not None and r_min >= cutoff:
            raise ConfigError(
                f"avg_r_min = {r_min} Å is not below the cutoff of {cutoff} Å: the radial basis "
                "cannot be normalised between them"
            )
        return MACE(config, num_species, cutoff, neighbors, r_min)
    from mlip_md.networks.nequip import NequIP

    return NequIP(config, num_species, cutoff, neighbors)
