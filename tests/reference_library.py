"""The networks of the library that the published models come from, with our face."""

import functools
import re

import jax
import numpy as np
import pytest

from mlip_md.graph import Graph, edge_vectors


@functools.cache
def _compiler_options():
    """Little optimization: what is tested with these compiles far longer than it runs."""
    options = {"xla_backend_optimization_level": 0}
    quicker = {**options, "xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda x: x + 1, compiler_options=quicker)(1.0)
    except jax.errors.JaxRuntimeError:  # an option of this version of XLA only
        return options
    return quicker


def jit(function):
    """Compiled quickly, to run once."""
    return jax.jit(function, compiler_options=_compiler_options())


def graph_of(positions, cell, species, senders, receivers, shifts):
    """One structure as a graph in float64, edges in any order."""
    order = np.argsort(receivers, kind="stable")
    return Graph(
        positions=np.asarray(positions, np.float64),
        species=np.asarray(species, np.int32),
        cell=np.asarray(cell, np.float64).reshape(1, 3, 3),
        senders=np.asarray(senders, np.int32)[order],
        receivers=np.asarray(receivers, np.int32)[order],
        shifts=np.asarray(shifts, np.int32).reshape(-1, 3)[order],
        node_graph=np.zeros(len(positions), np.int32),
        node_mask=np.ones(len(positions), bool),
        edge_mask=np.ones(len(senders), bool),
        graph_mask=np.ones(1, bool),
    )


def joined(graphs, n_nodes, n_edges, n_graphs):
    """Graphs of ``graph_of`` as one, padded to these capacities as every network may expect it."""
    sizes = np.array([graph.n_nodes for graph in graphs])
    starts = np.cumsum(sizes) - sizes

    def padded(name, capacity, fill, add=None):
        parts = [getattr(graph, name) for graph in graphs]
        if add is not None:
            parts = [part + part.dtype.type(more) for part, more in zip(parts, add, strict=True)]
        stacked = np.concatenate(parts)
        assert len(stacked) <= capacity
        room = np.full((capacity, *stacked.shape[1:]), fill, stacked.dtype)
        room[: len(stacked)] = stacked
        return room

    assert sizes.sum() < n_nodes
    return Graph(
        positions=padded("positions", n_nodes, 0.0),
        species=padded("species", n_nodes, 0),
        cell=padded("cell", n_graphs, 0.0),
        senders=padded("senders", n_edges, n_nodes - 1, starts),
        receivers=padded("receivers", n_edges, n_nodes - 1, starts),
        shifts=padded("shifts", n_edges, 0),
        node_graph=padded("node_graph", n_nodes, n_graphs - 1, range(len(graphs))),
        node_mask=padded("node_mask", n_nodes, False),
        edge_mask=padded("edge_mask", n_edges, False),
        graph_mask=padded("graph_mask", n_graphs, False),
    )


def library_network(architecture, hyperparameters, statistics):
    """Network of the library (its own hyperparameters, fields of its DatasetInfo)."""
    models_v1 = pytest.importorskip("mlip.models_v1")
    from mlip.data.dataset_info import DatasetInfo

    network = {"mace": models_v1.Mace, "nequip": models_v1.Nequip}[architecture]
    return network(network.Config(**hyperparameters), DatasetInfo(**statistics))


def applied(network, **options):
    """Node energies ``apply(params, graph)`` of a network of the library; options are flax's."""

    def apply(params, graph):
        with jax.numpy_rank_promotion("allow"):  # it multiplies vectors with matrices
            return network.apply(params, *inputs(graph), **options)

    return apply


def inputs(graph):
    """What networks of the library read of a graph."""
    return edge_vectors(graph), graph.species, graph.senders, graph.receivers


def strong_weights(shapes, seed=0):
    """Random weights (float32) under which features and forces of every layer are of order one.

    They have the spread that networks draw, NequIP's radial networks are as strong as trained ones,
    and what is drawn small or as zero (gates, biases) is not.
    """
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        weights = rng.standard_normal(leaf.shape)
        if "MLP_0" in name:  # used without division by the root of the fan-in
            weights *= 2.0 / np.sqrt(leaf.shape[0])
            weights *= 10.0 if "Dense_2" in name else 1.0
        elif re.search("SymmetricContraction|gate_weights", name):
            weights *= leaf.shape[1] ** -0.5
        return weights.astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)
