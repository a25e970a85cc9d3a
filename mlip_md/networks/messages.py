"""Messages from edges to nodes: what they read, and their sums in bounded memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir, partial_eval

from mlip_md.graph import Graph
from mlip_md.networks import gpu_convolution, layers, native_convolution  # noqa: F401 (register)
from mlip_md.networks.convolution import Pairs, Plan, batch_in_turn, convolve
from mlip_md.networks.radial_tables import convolve_by_table

MEMORY = 32 * 2**20
"""Bytes that the messages of one turn may take before the edges are split further."""

Basis = Callable[[jax.Array, jax.Array], jax.Array]
"""Radial basis (n, num_bessel) of distances (n,) in Å and pairs of species (n,)."""


class Edges(NamedTuple):
    """What messages read of the edges.

    Attributes:
        pairs: who sends to whom.
        lengths: (n_edges,) Å.
        species: (n_edges,) int, species of the sender · number of species + that of the receiver.
        harmonics: (n_edges, (l_max+1)²) Y_l of the directions, those of l from l² on.
        basis: (n_edges, num_bessel) radial basis.
        cutoff: Å.
        basis_of: what the basis is computed by.
    """

    pairs: Pairs
    lengths: jax.Array
    species: jax.Array
    harmonics: jax.Array
    basis: jax.Array
    cutoff: float
    basis_of: Basis


Weigh = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Radial weights (n, columns) of basis, inside (n, 1) and pairs of species (n,)."""


Names = tuple[str, ...]


class RadialFunction(NamedTuple):
    """What a layer weighs its messages by, for ``radial_tables``.

    Attributes:
        plan: of its convolution.
        weights: radial weights (n, columns) of lengths (n,) and pairs of species (n,).
        by_species: whether they read the pairs of species.
    """

    plan: Plan
    weights: Callable[[jax.Array, jax.Array], jax.Array]
    by_species: bool = True


def read_edges(
    graph: Graph, directions: jax.Array, cutoff: float, basis: Basis, l_max: int, num_species: int
) -> Edges:
    """What messages read of a graph's edges.

    Args:
        graph: the graph.
        directions: (n_edges, 3) Å, that harmonics are of.
        cutoff: Å.
        basis: the radial basis.
        l_max: highest degree of the harmonics.
        num_species: number of elements.
    """
    senders, receivers = jnp.asarray(graph.senders), jnp.asarray(graph.receivers)
    species = jnp.asarray(graph.species)
    lengths = jnp.sqrt(jnp.sum(directions**2, axis=-1))
    harmonics = layers.spherical_harmonics(directions, range(l_max + 1))
    pairs = species[senders] * num_species + species[receivers]
    return Edges(
        Pairs(senders, receivers, lengths < cutoff),
        lengths,
        pairs,
        jnp.concatenate(list(harmonics.values()), axis=-1),
        basis(lengths, pairs),
        cutoff,
        basis,
    )


def sum_messages(
    module: nn.Module,
    plan: Plan,
    x: Sequence[jax.Array],
    edges: Edges,
    weigh: Weigh,
) -> list[jax.Array]:
    """Messages summed over the edges that arrive at each node.

    Args:
        module: the layer; where it is given a table in its collection "tables", the table takes
            the place of the radial network.
        plan: what couples to what.
        x: features, one array (n_nodes, 2l+1, channels) per source.
        edges: the edges.
        weigh: radial network.

    Returns:
        One array (n_nodes, 2l+1, channels) per target.
    """

    def weights(lengths: jax.Array, species: jax.Array) -> jax.Array:
        return weigh(edges.basis_of(lengths, species), (lengths < edges.cutoff)[:, None], species)

    if not module.is_initializing():
        module.sow("functions", "radial", RadialFunction(plan, weights))
    if module.has_variable("tables", "coefficients"):
        coefficients: jax.Array = module.get_variable("tables", "coefficients")
        index = edges.species if len(coefficients) > 1 else jnp.zeros_like(edges.species)
        return convolve_by_table(
            plan,
            edges.pairs,
            x,
            edges.harmonics,
            edges.lengths,
            coefficients,
            index,
            cutoff=edges.cutoff,
            rows=len(x[0]),
        )
    return _sum_in_turns(plan, x, edges, weigh)


def _sum_in_turns(
    plan: Plan, x: Sequence[jax.Array], edges: Edges, weigh: Weigh
) -> list[jax.Array]:
    """Beyond the bound in turns over ranges of edges that arrive at a range of nodes.

    Each turn writes its own rows only, and its radial weights are computed again in the backward
    pass. Ranges end at multiples of a number of edges and at multiples of a number of nodes, so
    that both are bounded and their number is known beforehand.
    """
    (_, receivers, inside), n_nodes = edges.pairs, len(x[0])
    n_edges, itemsize = len(receivers), edges.basis.dtype.itemsize
    memory = layers.memory_of_turns(MEMORY)
    most_edges = max(256, memory // (plan.message_size * itemsize))
    most_edges = -(-n_edges // max(1, -(-n_edges // most_edges)))  # turns of equal size
    if n_edges == most_edges:
        weights = weigh(edges.basis, inside[:, None], edges.species)
        return convolve(plan, edges.pairs, x, edges.harmonics, weights, n_nodes)
    most_rows = min(n_nodes, most_edges // 4)
    by_edges = jnp.arange(0, n_edges, most_edges)
    by_rows = jnp.searchsorted(receivers, jnp.arange(most_rows, n_nodes, most_rows))
    starts = jnp.sort(jnp.concatenate([by_edges, by_rows.astype(by_edges.dtype)]))
    stops = jnp.append(starts[1:], n_edges)
    filled = [
        jnp.concatenate([array, jnp.zeros((most_edges, *array.shape[1:]), array.dtype)])
        for array in (*edges.pairs, edges.harmonics, edges.basis, edges.species)
    ]

    @jax.checkpoint
    def sums_of(start: jax.Array, stop: jax.Array, first: jax.Array) -> list[jax.Array]:
        senders, receivers, inside, harmonics, basis, species = (
            jax.lax.dynamic_slice_in_dim(array, start, most_edges) for array in filled
        )
        here = jnp.arange(most_edges) < stop - start
        rows = jnp.where(here, receivers - first, most_rows - 1)
        pairs = Pairs(senders, rows, inside & here)
        weights = weigh(basis, pairs.inside[:, None], species)
        return convolve(plan, pairs, x, harmonics, weights, most_rows)

    def add(
        totals: list[jax.Array], piece: tuple[jax.Array, jax.Array]
    ) -> tuple[list[jax.Array], None]:
        start, stop = piece
        first = receivers[jnp.minimum(start, n_edges - 1)] // most_rows * most_rows
        first = jnp.minimum(first, n_nodes - most_rows)
        sums = sums_of(start, stop, first)
        return [add_rows(t, more, first) for t, more in zip(totals, sums, strict=True)], None

    zeros = [
        jnp.zeros((n_nodes, 2 * block.degree + 1, block.channels), edges.basis.dtype)
        for block in plan.targets
    ]
    return jax.lax.scan(add, zeros, (starts, stops))[0]


def add_rows(total: jax.Array, more: jax.Array, first: jax.Array) -> jax.Array:
    """Add rows to those of an array from ``first`` on, in place where the compiler can.

    A primitive, because its derivative in ``total`` is nothing at all, which JAX would not find out
    of the slices that it is made of.
    """
    return add_rows_p.bind(total, more, first)[0]


def _define_add_rows(total: jax.Array, more: jax.Array, first: jax.Array) -> list[jax.Array]:
    here = jax.lax.dynamic_slice_in_dim(total, first, len(more))
    return [jax.lax.dynamic_update_slice_in_dim(total, here + more, first, axis=0)]


def _add_rows_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    first, directions = primals[2], [ad.instantiate_zeros(t) for t in tangents[:2]]
    return add_rows_p.bind(*primals), add_rows_p.bind(*directions, first)


def _add_rows_transpose(cotangents: Sequence[Any], _total: Any, more: Any, first: Any) -> list[Any]:
    cotangent = ad.instantiate_zeros(cotangents[0])
    rows = more.aval.shape[0] if ad.is_undefined_primal(more) else len(more)
    return [cotangent, jax.lax.dynamic_slice_in_dim(cotangent, first, rows), None]


add_rows_p = Primitive("mlip_md_add_rows")
add_rows_p.multiple_results = True
add_rows_p.def_abstract_eval(lambda total, _more, _first: [total])
add_rows_p.def_impl(_define_add_rows)
mlir.register_lowering(add_rows_p, mlir.lower_fun(_define_add_rows, multiple_results=True))
ad.primitive_jvps[add_rows_p] = _add_rows_jvp
ad.primitive_transposes[add_rows_p] = _add_rows_transpose
batching.primitive_batchers[add_rows_p] = functools.partial(batch_in_turn, add_rows_p)


def radial_functions(
    network: nn.Module, variables: Any, graph: Graph, piece: int
) -> dict[Names, RadialFunction]:
    """The radial function of every layer, by the names of its modules.

    The network is traced once and never run: what does not belong to a radial function is nowhere
    computed.

    Args:
        network: the network.
        variables: its weights; the functions compute in their dtype.
        graph: any; the network is traced with it.
        piece: number of distances that the functions take.
    """
    plans: dict[Names, Plan] = {}

    def weights(lengths: jax.Array, species: jax.Array) -> list[jax.Array]:
        _, found = network.apply(variables, graph, mutable=["functions"])
        sown = traverse_util.flatten_dict(found.get("functions", {}))
        plans.update({names[:-1]: functions[0].plan for names, functions in sown.items()})
        return [functions[0].weights(lengths, species) for functions in sown.values()]

    traced = jax.make_jaxpr(weights)(jnp.ones(piece), jnp.zeros(piece, jnp.int32))
    return {
        names: RadialFunction(plan, *_output(traced, index))
        for index, (names, plan) in enumerate(plans.items())
    }


def _output(
    traced: ClosedJaxpr, index: int
) -> tuple[Callable[[jax.Array, jax.Array], jax.Array], bool]:
    """One output of what was traced, as a function of its own without the rest.

    Beside it: whether it depends on the second argument.
    """
    wanted = [i == index for i in range(len(traced.jaxpr.outvars))]
    _, (_, by_species) = partial_eval.dce_jaxpr(traced.jaxpr, wanted)
    jaxpr, _ = partial_eval.dce_jaxpr(traced.jaxpr, wanted, instantiate=True)
    compute = jaxpr_as_fun(ClosedJaxpr(jaxpr, traced.consts))
    return lambda lengths, species: compute(lengths, species)[0], by_species
