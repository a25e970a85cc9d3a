"""Small random potentials with strong forces, for tests that need a potential but no chemistry."""

import jax
import numpy as np

from mlip_md.graph import Graph
from mlip_md.networks import MACEConfig, build_network
from mlip_md.potential import Potential

ELEMENTS = (1, 6, 7, 8)


def random_mace(seed: int = 0, strength: float = 1.0, cutoff: float = 4.0) -> Potential:
    """A MACE of one layer for H, C, N, O with random weights; ``strength`` scales its energies."""
    config = MACEConfig(
        num_layers=1,
        num_channels=4,
        l_max=1,
        node_symmetry=1,
        correlation=2,
        readout_irreps=("4x0e", "0e"),
        num_bessel=6,
    )
    network = build_network(
        config, num_species=len(ELEMENTS), cutoff=cutoff, avg_num_neighbors=10.0, avg_r_min=0.9
    )
    graph = Graph(
        positions=np.array([[0.0, 0, 0], [1.1, 0, 0], [0, 1.2, 0]], np.float32),
        species=np.array([0, 1, 2], np.int32),
        cell=np.zeros((1, 3, 3), np.float32),
        senders=np.array([1, 2, 0, 2, 0, 1], np.int32),
        receivers=np.array([0, 0, 1, 1, 2, 2], np.int32),
        shifts=np.zeros((6, 3), np.int32),
        node_graph=np.zeros(3, np.int32),
        node_mask=np.ones(3, bool),
        edge_mask=np.ones(6, bool),
        graph_mask=np.ones(1, bool),
    )
    # Drawn by shape: running the network's own initializers compiles hundreds of small kernels.
    shapes = jax.eval_shape(network.init, jax.random.key(0), graph)
    rng = np.random.default_rng(seed)
    params = jax.tree_util.tree_map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes
    )
    return Potential(
        config=config,
        params=params,
        elements=ELEMENTS,
        atomic_energies=np.array([-13.6, -1029.0, -1485.0, -2042.0]),
        cutoff=cutoff,
        avg_num_neighbors=10.0,
        avg_r_min=0.9,
        scaling_stdev=strength,
        info={"name": "random-mace"},
    )
