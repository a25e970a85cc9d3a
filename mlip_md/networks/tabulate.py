"""Tables of a network's radial functions, as variables beside its weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from mlip_md.graph import Graph
from mlip_md.networks.messages import RadialFunction, radial_functions
from mlip_md.networks.radial_tables import PIECE, compile_jets, fit_radial

MEMORY = 256 * 2**20
"""Bytes that the tables of one layer may take."""


def tabulate_radial(
    network: nn.Module, params: Any, num_species: int, cutoff: float, dtype: Any
) -> dict[str, Any]:
    """Tables for the layers that have good ones: the collection "tables" of the network.

    Args:
        network: the network.
        params: its weights.
        num_species: number of elements.
        cutoff: Å.
        dtype: of the tables, and of the computation that they are for.

    Returns:
        The collection; layers without a table go on evaluating their radial network.
    """
    network = _with_factor_of(network, dtype)
    on_cpu = jax.default_device(jax.local_devices(backend="cpu")[0])
    tables = {}
    with jax.enable_x64(True), on_cpu:
        weights = jax.tree_util.tree_map(lambda leaf: jnp.asarray(leaf, jnp.float64), dict(params))
        for names, function in radial_functions(network, weights, _one_atom(), PIECE).items():
            table = _tabulate(function, num_species**2, cutoff, dtype)
            if table is not None:
                tables[(*names, "coefficients")] = table
    return traverse_util.unflatten_dict(tables)


def _with_factor_of(network: nn.Module, dtype: Any) -> nn.Module:
    """The network that computes in float64 with the constants that it has in another precision."""
    scale = getattr(network, "radial_scale", None)
    if scale is None:
        return network
    factor = getattr(scale, np.dtype(dtype).name)
    return network.clone(radial_scale=type(scale)(factor, factor))


def _tabulate(
    function: RadialFunction, num_pairs: int, cutoff: float, dtype: Any
) -> np.ndarray | None:
    """Coefficients (n_tables, blocks, cells, degree+1, lanes): one for all pairs, or one each."""
    n_tables = num_pairs if function.by_species else 1
    compiled = compile_jets(functools.partial(_of_pair, function))  # once for all pairs
    cells = 0
    found: list[np.ndarray] = []
    while len(found) < n_tables:
        jets = functools.partial(_call_with, compiled, len(found))
        fit = fit_radial(jets, function.plan, cutoff, dtype, at_least=cells)
        if fit is None or fit.coefficients.nbytes * n_tables > MEMORY:
            return None
        if fit.coefficients.shape[1] > cells > 0:
            found = []  # start again: all are to have as many cells as the one that needs most
        else:
            found.append(fit.coefficients)
        cells = fit.coefficients.shape[1]
    return found[0][None] if n_tables == 1 else np.stack(found)


def _call_with(compiled: Callable[..., list[jax.Array]], pair: int, lengths: Any) -> Any:
    return compiled(lengths, pair)


def _of_pair(function: RadialFunction, lengths: jax.Array, pair: jax.Array) -> jax.Array:
    return function.weights(lengths, jnp.full(len(lengths), pair, jnp.int32))


def _one_atom() -> Graph:
    """Something to evaluate a network on."""
    return Graph(
        positions=np.zeros((1, 3)),
        species=np.zeros(1, np.int32),
        cell=np.zeros((1, 3, 3)),
        senders=np.zeros(1, np.int32),
        receivers=np.zeros(1, np.int32),
        shifts=np.zeros((1, 3), np.int32),
        node_graph=np.zeros(1, np.int32),
        node_mask=np.ones(1, bool),
        edge_mask=np.zeros(1, bool),
        graph_mask=np.ones(1, bool),
    )
