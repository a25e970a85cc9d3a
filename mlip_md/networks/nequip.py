"""NequIP: an E(3)-equivariant interatomic potential (Batzner et al., Nat. Commun. 13, 2453, 2022).

Node features are direct sums of irreps. Each layer (their Fig. 1) is a self-interaction, a
convolution of neighbours' features with Y(r)·R(r), a second self-interaction, a residual path that
knows the atom's species, and a gate. Not every block of the features exists in every layer: after
the embedding only 0e does, and what the last layers make beside scalars never reaches the energy.
Which blocks, paths and weights exist is settled here first, before anything is computed: blocks
that are zero have no weights, blocks that cannot reach the energy have weights but no work.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import typing
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from e3nn_jax import Irrep, Irreps
from flax import linen as nn

from mlip_md.graph import Graph, edge_vectors
from mlip_md.networks import layers
from mlip_md.networks.config import NequIPConfig

Activation = Callable[[jax.Array], jax.Array]

Blocks = list[jax.Array | None]
"""Features block by block: (n, 2l+1, multiplicity), or None where zero or not needed."""

SCALAR = Irrep("0e")


class Edges(NamedTuple):
    """What messages read of the edges.

    Attributes:
        senders: (n_edges,) int, nodes that the messages come from.
        harmonics: (n_edges, (l_max+1)²) Y_l of the directions from sender to receiver, up to the
            highest degree that couples to anything.
        basis: (n_edges, num_bessel) radial basis.
        inside: (n_edges, 1) bool, shorter than the cutoff.
    """

    senders: jax.Array
    harmonics: jax.Array
    basis: jax.Array
    inside: jax.Array


class Path(NamedTuple):
    """One product of a block of node features with Y_l.

    Attributes:
        source: index of the block of node features.
        degree: l of the spherical harmonics.
        irrep: irrep of the product.
        first_column: where its weights, one per channel, start in the radial network's output.
        channels: number of channels.
    """

    source: int
    degree: int
    irrep: Irrep
    first_column: int
    channels: int


@dataclasses.dataclass(frozen=True)
class LayerPlan:
    """What exists in one layer and what of it is computed.

    Attributes:
        l_max: highest degree of the harmonics that couples to anything.
        inputs: irreps of the node features that enter.
        live: per block of inputs, whether it is more than zeros.
        scalars: blocks of the output with l = 0.
        nonscalars: blocks of the output with l > 0, each with one 0e gate per channel.
        paths: products of live blocks, in the order of the radial network's columns.
        num_columns: all columns of the radial network, those of paths from zero blocks included.
        needed: per block of ``hidden``, whether anything that is read depends on it.
    """

    l_max: int
    inputs: Irreps
    live: tuple[bool, ...]
    scalars: Irreps
    nonscalars: Irreps
    paths: tuple[Path, ...]
    num_columns: int
    needed: tuple[bool, ...] = ()

    @property
    def hidden(self) -> Irreps:
        """Irreps before the gate: scalars, gates, non-scalars."""
        return (
            self.scalars + Irreps([(mul, SCALAR) for mul, _ in self.nonscalars]) + self.nonscalars
        )

    @property
    def outputs(self) -> Irreps:
        """Irreps after the gate."""
        return self.scalars + self.nonscalars

    @property
    def outputs_live(self) -> tuple[bool, ...]:
        """Per block of outputs, whether a message or the residual path fills it."""
        filled = {path.irrep for path in self.paths} | _irreps_of(self.inputs, self.live)
        return tuple(ir in filled for _, ir in self.outputs)

    @property
    def inputs_needed(self) -> tuple[bool, ...]:
        """Per block of inputs, whether a needed message or residual depends on it."""
        sources = {path.source for path in self.computed_paths}
        residual = _irreps_of(self.hidden, self.needed)
        return tuple(
            alive and (i in sources or ir in residual)
            for i, ((_, ir), alive) in enumerate(zip(self.inputs, self.live, strict=True))
        )

    @property
    def computed_paths(self) -> tuple[Path, ...]:
        """The paths whose products are needed."""
        needed = _irreps_of(self.hidden, self.needed)
        return tuple(path for path in self.paths if path.irrep in needed)

    @property
    def messages(self) -> Irreps:
        """Irreps of all live products, sorted, equal ones merged."""
        return Irreps([(path.channels, path.irrep) for path in self.paths]).regroup()

    def require(self, outputs_needed: tuple[bool, ...]) -> LayerPlan:
        """This plan, given which blocks of its output are read."""
        scalars = outputs_needed[: len(self.scalars)]
        nonscalars = outputs_needed[len(self.scalars) :]
        return dataclasses.replace(self, needed=scalars + nonscalars + nonscalars)


def _irreps_of(irreps: Irreps, chosen: tuple[bool, ...]) -> set[Irrep]:
    return {ir for (_, ir), keep in zip(irreps, chosen, strict=True) if keep}


def _plan_layer(inputs: Irreps, live: tuple[bool, ...], l_max: int) -> LayerPlan:
    """Everything but ``needed`` of a layer that keeps the irreps of its input."""
    l_max = min(l_max, 2 * max(ir.l for _, ir in inputs))
    scalars = Irreps([block for block in inputs if block.ir.l == 0])
    nonscalars = Irreps([block for block in inputs if block.ir.l > 0])
    wanted = {ir for _, ir in inputs}
    paths, column = [], 0
    for source, (channels, ir) in enumerate(inputs):
        for degree in range(l_max + 1):
            for product in ir * Irrep(degree, (-1) ** degree):
                if product in wanted:
                    if live[source]:
                        paths.append(Path(source, degree, product, column, channels))
                    column += channels
    return LayerPlan(l_max, inputs, live, scalars, nonscalars, tuple(paths), column)


def plan_layers(config: NequIPConfig, *, all_features: bool = False) -> tuple[LayerPlan, ...]:
    """What every layer computes.

    Args:
        config: hyperparameters.
        all_features: compute also what does not reach the energy.

    Returns:
        One plan per layer.
    """
    inputs = Irreps(config.node_irreps)
    live = tuple(ir == SCALAR for _, ir in inputs)
    plans = []
    for _ in range(config.num_layers):
        plans.append(_plan_layer(inputs, live, config.l_max))
        inputs, live = plans[-1].outputs, plans[-1].outputs_live
    needed = tuple(
        alive and (all_features or ir == SCALAR)
        for (_, ir), alive in zip(inputs, live, strict=True)
    )
    for i in reversed(range(config.num_layers)):
        plans[i] = plans[i].require(needed)
        needed = plans[i].live if all_features else plans[i].inputs_needed
    return tuple(plans)


class _Group(NamedTuple):
    """Adjacent live blocks of one irrep, merged."""

    mul: int
    ir: Irrep
    members: list[int]


def _merge(irreps: Irreps, live: tuple[bool, ...]) -> list[_Group]:
    """Drop zero blocks, then merge neighbours of equal irrep: how weights see a list of blocks."""
    groups: list[_Group] = []
    for index, ((mul, ir), alive) in enumerate(zip(irreps, live, strict=True)):
        if not alive:
            continue
        if groups and groups[-1].ir == ir:
            last = groups.pop()
            groups.append(_Group(last.mul + mul, ir, [*last.members, index]))
        else:
            groups.append(_Group(mul, ir, [index]))
    return groups


def _mix(
    blocks: Blocks,
    groups: list[_Group],
    irreps_out: Irreps,
    needed: tuple[bool, ...],
    weights: dict[tuple[int, int], jax.Array],
    product: Callable[[jax.Array, jax.Array], jax.Array],
) -> Blocks:
    """Mix the channels of each irrep: all groups of it into all blocks of it, as one product.

    Args:
        blocks: features that enter.
        groups: how they are merged.
        irreps_out: blocks that leave.
        needed: per block of irreps_out, whether to compute it.
        weights: by (group, block of irreps_out): (channels in, ..., channels out).
        product: of features (n, 2l+1, channels) and such weights.

    Returns:
        Features by block of irreps_out; None where nothing feeds it or where it is not needed.
    """
    out: Blocks = [None] * len(irreps_out)
    for ir in sorted(_irreps_of(irreps_out, needed)):
        rows = [i for i, group in enumerate(groups) if group.ir == ir]
        columns = [o for o, block in enumerate(irreps_out) if block.ir == ir and needed[o]]
        if not rows:
            continue
        x = jnp.concatenate([_present(blocks, m) for i in rows for m in groups[i].members], axis=-1)
        matrix = jnp.concatenate(
            [jnp.concatenate([weights[i, o] for o in columns], axis=-1) for i in rows]
        )
        fan_in = np.concatenate(
            [np.full(groups[i].mul, groups[i].mul * len(rows), float) for i in rows]
        )
        scale = jnp.asarray(1.0 / np.sqrt(fan_in), x.dtype)
        mixed = product(x * scale, matrix.astype(x.dtype))
        widths = [irreps_out[o].mul for o in columns]
        for o, part in zip(columns, _split(mixed, widths), strict=True):
            out[o] = part
    return out


def _present(blocks: Blocks, index: int) -> jax.Array:
    """A block that the plan computes."""
    return typing.cast(jax.Array, blocks[index])


def _split(x: jax.Array, widths: list[int]) -> list[jax.Array]:
    return jnp.split(x, np.cumsum(widths)[:-1], axis=-1)


class Linear(nn.Module):
    """Self-interaction: mixes the channels of each irrep (Batzner 2022, Methods).

    Weights are drawn from N(0, 1); sums are divided by √(channels · groups) that they run over.

    Attributes:
        irreps_in: blocks that enter.
        live: per block of irreps_in, whether it is more than zeros.
        irreps_out: blocks that leave, each with weights of its own.
    """

    irreps_in: Irreps
    live: tuple[bool, ...]
    irreps_out: Irreps

    @nn.compact
    def __call__(self, blocks: Blocks, needed: tuple[bool, ...]) -> Blocks:
        """Features by block of irreps_out; None where zero or not needed."""
        groups, weights = _merge(self.irreps_in, self.live), {}
        for i, (mul_in, ir, _) in enumerate(groups):
            for o, (mul_out, ir_out) in enumerate(self.irreps_out):
                if ir == ir_out:
                    name = f"w[{i},{o}] {mul_in}x{ir},{mul_out}x{ir}"
                    shape = (mul_in, mul_out)
                    weights[i, o] = self.param(name, nn.initializers.normal(1.0), shape)
        return _mix(blocks, groups, self.irreps_out, needed, weights, jnp.matmul)


class SpeciesLinear(nn.Module):
    """Self-interaction with weights for each species: the residual path (Batzner 2022, Methods).

    Weights are drawn from N(0, 1); sums are divided by √(channels · groups · species).

    Attributes:
        irreps_in: blocks that enter.
        live: per block of irreps_in, whether it is more than zeros.
        irreps_out: blocks that leave; adjacent equal ones share one array of weights.
        num_species: number of elements.
    """

    irreps_in: Irreps
    live: tuple[bool, ...]
    irreps_out: Irreps
    num_species: int

    @nn.compact
    def __call__(self, blocks: Blocks, species: jax.Array, needed: tuple[bool, ...]) -> Blocks:
        """Features by block of irreps_out; None where zero or not needed."""
        groups, weights = _merge(self.irreps_in, self.live), {}
        groups_out = _merge(self.irreps_out, (True,) * len(self.irreps_out))
        for i, (mul_in, ir, _) in enumerate(groups):
            for o, (mul_out, ir_out, members) in enumerate(groups_out):
                if ir == ir_out:
                    name = f"w[{i},0,{o}] {mul_in}x{ir},{self.num_species}x0e,{mul_out}x{ir}"
                    shape = (mul_in, self.num_species, mul_out)
                    array = self.param(name, nn.initializers.normal(1.0), shape)
                    parts = _split(array, [self.irreps_out[m].mul for m in members])
                    weights.update({(i, m): part for m, part in zip(members, parts, strict=True)})

        def product(x: jax.Array, matrix: jax.Array) -> jax.Array:
            return layers.species_linear(x * self.num_species**-0.5, matrix, species)

        return _mix(blocks, groups, self.irreps_out, needed, weights, product)


class NequIPLayer(nn.Module):
    """One interaction block (Batzner 2022, Fig. 1d): what a layer computes is its plan.

    Attributes:
        plan: what exists and what is needed.
        config: hyperparameters.
        num_species: number of elements.
        avg_num_neighbors: divisor of the summed messages.
    """

    plan: LayerPlan
    config: NequIPConfig
    num_species: int
    avg_num_neighbors: float

    @nn.compact
    def __call__(
        self, blocks: Blocks, species: jax.Array, edges: Edges, receivers: jax.Array
    ) -> Blocks:
        """Node features by block of the plan's outputs.

        Args:
            blocks: node features by block of the plan's inputs.
            species: (n_nodes,) int.
            edges: what messages read.
            receivers: (n_edges,) int, ascending.
        """
        plan, config = self.plan, self.config
        species_linear = SpeciesLinear(
            plan.inputs,
            plan.live,
            plan.hidden,
            self.num_species,
            name="FullyConnectedTensorProduct_0",
        )
        residual = species_linear(blocks, species, plan.needed)
        sources = {path.source for path in plan.computed_paths}
        wanted = tuple(i in sources for i in range(len(plan.inputs)))
        blocks = Linear(plan.inputs, plan.live, plan.inputs, name="Linear_0")(blocks, wanted)
        hidden = (config.radial_net_n_hidden,) * config.radial_net_n_layers
        widths = (config.num_bessel, *hidden, plan.num_columns)
        variances = (config.scalar_mlp_std,) * len(hidden) + (1.0,)
        stds = tuple(float(np.sqrt(v / n)) for v, n in zip(variances, widths[:-1], strict=True))
        kernels = layers.RadialKernels(widths, stds, scaled=False, name="MLP_0")()
        act = layers.activation(config.radial_net_nonlinearity)
        summed = convolve(plan, blocks, kernels, act, edges, receivers)
        summed = [None if x is None else x / self.avg_num_neighbors for x in summed]
        messages = plan.messages
        mixed = Linear(messages, (True,) * len(messages), plan.hidden, name="Linear_1")(
            summed, plan.needed
        )
        return gate(plan, [_add(a, b) for a, b in zip(mixed, residual, strict=True)])


def _add(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def convolve(
    plan: LayerPlan,
    blocks: Blocks,
    kernels: list[jax.Array],
    act: Activation,
    edges: Edges,
    receivers: jax.Array,
) -> Blocks:
    """Sum over neighbours of features times R(r) Y(r) (Batzner 2022, Eq. 7).

    Paths from one block to messages of one degree are computed side by side.

    Args:
        plan: paths and their columns in the radial network.
        blocks: node features by block of the plan's inputs.
        kernels: of the radial network.
        act: its nonlinearity.
        edges: what messages read.
        receivers: (n_edges,) int, ascending.

    Returns:
        Sums by block of ``plan.messages``: (n_nodes, 2l+1, channels of all paths).
    """
    bundles = _bundles(plan.computed_paths)
    dtype = edges.basis.dtype
    kernels = [kernel.astype(dtype) for kernel in kernels]
    columns = [p.first_column + np.arange(p.channels) for bundle in bundles for p in bundle]
    kernels[-1] = kernels[-1][:, np.concatenate(columns)]
    couplings = [jnp.asarray(_coupling(plan, bundle), dtype) for bundle in bundles]
    n_nodes = next(x.shape[0] for x in blocks if x is not None)

    def messages(edges: Edges) -> list[jax.Array]:
        weights = layers.radial_weights(kernels, act, edges.basis, edges.inside)
        gathered = {
            i: _present(blocks, i)[edges.senders] for i in {bundle[0].source for bundle in bundles}
        }
        widths = [sum(p.channels for p in bundle) for bundle in bundles]
        return [
            _weighted(
                contract(jnp.einsum("ey,yma->ema", edges.harmonics, c), gathered[b[0].source]),
                w.reshape(-1, len(b), b[0].channels),
            )
            for b, c, w in zip(bundles, couplings, _split(weights, widths), strict=True)
        ]

    floats = sum(path.channels * path.irrep.dim for path in plan.computed_paths)
    sums = layers.sum_messages(messages, edges, receivers, n_nodes, floats)
    return [_collect(ir, bundles, sums) for _, ir in plan.messages]


def _bundles(paths: tuple[Path, ...]) -> list[list[Path]]:
    """Paths grouped by source and degree of the message, in order."""

    def key(path: Path) -> tuple[int, int]:
        return path.source, path.irrep.l

    return [list(bundle) for _, bundle in itertools.groupby(sorted(paths, key=key), key)]


def _coupling(plan: LayerPlan, bundle: list[Path]) -> np.ndarray:
    """Couplings of a bundle: (harmonics of all degrees, (2l_out+1) · paths, 2l_in+1)."""
    l_in, l_out = plan.inputs[bundle[0].source].ir.l, bundle[0].irrep.l
    harmonics = (plan.l_max + 1) ** 2
    matrix = np.zeros((harmonics, 2 * l_out + 1, len(bundle), 2 * l_in + 1))
    for k, path in enumerate(bundle):
        l = path.degree
        matrix[l**2 : (l + 1) ** 2, :, k] = np.einsum("abm->bma", layers.coupling(l_in, l, l_out))
    return matrix.reshape(harmonics, -1, 2 * l_in + 1)


@jax.custom_jvp
def contract(rotations: jax.Array, features: jax.Array) -> jax.Array:
    """Product of small matrices with features: (n, m, a), (n, a, channels) -> (n, m, channels).

    Written as a sum over a, which compilers fuse, with matrix products for its derivatives, whose
    long sums they do not: together twice as fast on CPUs as either.
    """
    n = features.shape[1]
    return sum(
        (a * b for a, b in zip(jnp.split(rotations, n, 2), jnp.split(features, n, 1), strict=True)),
        start=jnp.zeros((), features.dtype),
    )


@contract.defjvp
def _contract_jvp(
    primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    rotations, features = primals
    d_rotations, d_features = tangents
    product = functools.partial(jnp.einsum, "nma,nac->nmc")
    return contract(*primals), product(d_rotations, features) + product(rotations, d_features)


def _weighted(products: jax.Array, weights: jax.Array) -> jax.Array:
    """Multiply (n, (2l+1) · paths, channels) by weights (n, paths, channels)."""
    rows = jnp.split(products, products.shape[1] // weights.shape[1], axis=1)
    return jnp.concatenate([row * weights for row in rows], axis=1)


def _collect(ir: Irrep, bundles: list[list[Path]], sums: list[jax.Array]) -> jax.Array | None:
    """Messages of one irrep (n, 2l+1, channels of all its paths), in the order of the paths."""
    parts = []
    for bundle, total in zip(bundles, sums, strict=True):
        chosen = [k for k, path in enumerate(bundle) if path.irrep == ir]
        if chosen:
            by_path = total.reshape(total.shape[0], ir.dim, len(bundle), -1)
            parts.append(by_path[:, :, np.array(chosen)].reshape(total.shape[0], ir.dim, -1))
    return jnp.concatenate(parts, axis=-1) if parts else None


def gate(plan: LayerPlan, hidden: Blocks) -> Blocks:
    """Nonlinearity: silu (0e) or tanh (0o) of scalars, silu(gate) times what has l > 0.

    Both are normalised to a second moment of 1; all gates are 0e (Batzner 2022, Methods).

    Args:
        plan: irreps.
        hidden: by block of the plan's ``hidden``: scalars, gates, non-scalars.

    Returns:
        By block of the plan's ``outputs``.
    """
    even, odd = layers.normalized_activation("silu"), layers.normalized_activation("tanh")
    n, m = len(plan.scalars), len(plan.nonscalars)
    scalars: Blocks = [
        None if x is None else (even if ir.p == 1 else odd)(x)
        for (_, ir), x in zip(plan.scalars, hidden[:n], strict=True)
    ]
    nonscalars: Blocks = [
        None if x is None or g is None else even(g) * x
        for g, x in zip(hidden[n : n + m], hidden[n + m :], strict=True)
    ]
    return scalars + nonscalars


class NequIP(nn.Module):
    """NequIP as in the published models: ``init(key, graph)``, ``apply(params, graph)``.

    An atom without neighbours has an energy of its own, which the residual path makes of its
    species. Messages vanish smoothly at the cutoff (with sigmoid as the radial network's
    nonlinearity, which is not 0 at 0, they end there abruptly).

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        cutoff: Å.
        avg_num_neighbors: divisor of the summed messages.
        all_features: compute also the features that do not reach the energy (to look at them).
    """

    config: NequIPConfig
    num_species: int
    cutoff: float
    avg_num_neighbors: float
    all_features: bool = False

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        """Raw node energies (n_nodes,) of a graph: before scaling and without E0."""
        config, species = self.config, jnp.asarray(graph.species)
        plans = plan_layers(config, all_features=self.all_features)
        edges = self._edges(graph, plans[0].l_max)
        one_hot = jax.nn.one_hot(species, self.num_species, dtype=edges.basis.dtype)[:, None, :]
        kinds, first, last = Irreps([(self.num_species, SCALAR)]), plans[0], plans[-1]
        blocks = Linear(kinds, (True,), first.inputs, name="Linear_0")([one_hot], first.live)
        for i, plan in enumerate(plans):
            layer = NequIPLayer(
                plan, config, self.num_species, self.avg_num_neighbors, name=f"NequipLayer_{i}"
            )
            blocks = layer(blocks, species, edges, jnp.asarray(graph.receivers))
        half = Irreps([([mul for mul, ir in last.outputs if ir == SCALAR][-1] // 2, SCALAR)])
        inner = Linear(last.outputs, last.outputs_live, half, name="Linear_1")(blocks, (True,))
        energies = Linear(half, (True,), Irreps("0e"), name="Linear_2")(inner, (True,))
        return _present(energies, 0)[:, 0, 0]

    def _edges(self, graph: Graph, l_max: int) -> Edges:
        config, vectors = self.config, edge_vectors(graph)
        lengths = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
        harmonics = layers.spherical_harmonics(vectors, range(l_max + 1))
        return Edges(
            jnp.asarray(graph.senders),
            jnp.concatenate(list(harmonics.values()), axis=-1),
            layers.radial_basis(lengths, self.cutoff, config.num_bessel, config.radial_envelope),
            (lengths < self.cutoff)[:, None],
        )
