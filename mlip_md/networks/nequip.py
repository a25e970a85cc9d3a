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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from e3nn_jax import Irrep, Irreps
from flax import linen as nn

from mlip_md.errors import ConfigError
from mlip_md.graph import Graph, edge_vectors
from mlip_md.networks import layers
from mlip_md.networks.config import NequIPConfig

Blocks = list[jax.Array | None]
"""Features block by block: (n, 2l+1, multiplicity), or None where zero or not needed."""

SCALAR = Irrep("0e")


class Edges(NamedTuple):
    """What the convolutions read of the edges.

    Attributes:
        senders: (n_edges,) node from which the message comes.
        harmonics: per degree l, Y_l of the direction from sender to receiver (n_edges, 2l+1).
        basis: (n_edges, num_bessel) radial basis.
    """

    senders: jax.Array
    harmonics: tuple[jax.Array, ...]
    basis: jax.Array


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
        inputs: irreps of the node features that enter.
        live: per block of inputs, whether it is more than zeros.
        scalars: blocks of the output with l = 0.
        nonscalars: blocks of the output with l > 0, each with one 0e gate per channel.
        paths: products of live blocks, in the order of the radial network's columns.
        num_columns: all columns of the radial network, those of paths from zero blocks included.
        needed: per block of ``hidden``, whether anything that is read depends on it.
    """

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
    return LayerPlan(inputs, live, scalars, nonscalars, tuple(paths), column)


def plan_layers(config: NequIPConfig, *, everything: bool = False) -> tuple[LayerPlan, ...]:
    """What every layer computes.

    Args:
        config: hyperparameters.
        everything: compute also what does not reach the energy.

    Returns:
        One plan per layer.
    """
    inputs = parse_node_irreps(config.node_irreps)
    live = tuple(ir == SCALAR for _, ir in inputs)
    plans = []
    for _ in range(config.num_layers):
        plans.append(_plan_layer(inputs, live, config.l_max))
        inputs, live = plans[-1].outputs, plans[-1].outputs_live
    needed = tuple(
        alive and (everything or ir == SCALAR) for (_, ir), alive in zip(inputs, live, strict=True)
    )
    for i in reversed(range(config.num_layers)):
        plans[i] = plans[i].require(needed)
        needed = plans[i].live if everything else plans[i].inputs_needed
    return tuple(plans)


def parse_node_irreps(node_irreps: str) -> Irreps:
    """Irreps of the node features.

    Args:
        node_irreps: such as "64x0e + 32x1o".

    Returns:
        The irreps, in the order given.

    Raises:
        ConfigError: if they cannot be read, if a multiplicity is zero or if there is no 0e with at
            least two channels, from which the energy is read.
    """
    try:
        irreps = Irreps(node_irreps)
    except ValueError as error:
        raise ConfigError(
            f"node_irreps = {node_irreps!r} cannot be read; write multiplicity x degree parity, "
            "such as '64x0e + 32x1o + 4x2e'"
        ) from error
    if any(mul == 0 for mul, _ in irreps):
        raise ConfigError(
            f"node_irreps = {node_irreps!r} has a block without channels; leave that block out"
        )
    scalars = [mul for mul, ir in irreps if ir == SCALAR]
    if not scalars or scalars[-1] < 2:
        raise ConfigError(
            f"node_irreps = {node_irreps!r} is not allowed; energies are read from its (last) "
            "block of 0e, which must be there with at least 2 channels, such as '64x0e'"
        )
    return irreps


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


def _joined(blocks: Blocks, groups: list[_Group]) -> jax.Array:
    return jnp.concatenate([blocks[m] for group in groups for m in group.members], axis=-1)


class Linear(nn.Module):
    """Self-interaction: mixes the channels of each irrep (Batzner 2022, Eq. 9).

    Weights are drawn from N(0, 1) and divided by √(fan-in · number of groups that are summed).

    Attributes:
        irreps_in: blocks that enter.
        live: per block of irreps_in, whether it is more than zeros.
        irreps_out: blocks that leave, not merged.
    """

    irreps_in: Irreps
    live: tuple[bool, ...]
    irreps_out: Irreps

    @nn.compact
    def __call__(self, blocks: Blocks, needed: tuple[bool, ...]) -> Blocks:
        """Features (n, 2l+1, channels) by block of irreps_out; None where zero or not needed."""
        groups = _merge(self.irreps_in, self.live)
        weights = {}
        for i, (mul_in, ir, _) in enumerate(groups):
            for o, (mul_out, ir_out) in enumerate(self.irreps_out):
                if ir == ir_out:
                    name = f"w[{i},{o}] {mul_in}x{ir},{mul_out}x{ir}"
                    shape = (mul_in, mul_out)
                    weights[i, o] = self.param(name, nn.initializers.normal(1.0), shape)
        out: Blocks = [None] * len(self.irreps_out)
        for ir in _irreps_of(self.irreps_out, needed):
            rows = [i for i, group in enumerate(groups) if group.ir == ir]
            columns = [o for o, block in enumerate(self.irreps_out) if block.ir == ir and needed[o]]
            if not rows:
                continue
            matrix = jnp.concatenate(
                [_row(weights, i, columns) / np.sqrt(groups[i].mul * len(rows)) for i in rows]
            )
            x = _joined(blocks, [groups[i] for i in rows])
            mixed = jnp.einsum("nmc,cd->nmd", x, matrix.astype(x.dtype))
            widths = [self.irreps_out[o].mul for o in columns]
            for o, part in zip(columns, _split(mixed, widths), strict=True):
                out[o] = part
        return out


def _row(weights: dict[tuple[int, int], jax.Array], i: int, columns: list[int]) -> jax.Array:
    return jnp.concatenate([weights[i, o] for o in columns], axis=-1)


def _split(x: jax.Array, widths: list[int]) -> list[jax.Array]:
    return jnp.split(x, np.cumsum(widths)[:-1], axis=-1)


class SpeciesLinear(nn.Module):
    """Self-interaction with one set of weights per species (the residual path).

    Weights are drawn from N(0, 1) and divided by √(fan-in · species · groups that are summed).

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
        """Features (n, 2l+1, channels) by block of irreps_out; None where zero or not needed."""
        groups = _merge(self.irreps_in, self.live)
        groups_out = _merge(self.irreps_out, (True,) * len(self.irreps_out))
        weights: dict[tuple[int, int], jax.Array] = {}
        for i, (mul_in, ir, _) in enumerate(groups):
            for o, (mul_out, ir_out, members) in enumerate(groups_out):
                if ir == ir_out:
                    name = f"w[{i},0,{o}] {mul_in}x{ir},{self.num_species}x0e,{mul_out}x{ir}"
                    shape = (mul_in, self.num_species, mul_out)
                    array = self.param(name, nn.initializers.normal(1.0), shape)
                    parts = _split(array, [self.irreps_out[m].mul for m in members])
                    weights.update({(i, m): part for m, part in zip(members, parts, strict=True)})
        out: Blocks = [None] * len(self.irreps_out)
        for ir in _irreps_of(self.irreps_out, needed):
            rows = [i for i, group in enumerate(groups) if group.ir == ir]
            columns = [o for o, block in enumerate(self.irreps_out) if block.ir == ir and needed[o]]
            if not rows:
                continue
            scales = [1 / np.sqrt(groups[i].mul * self.num_species * len(rows)) for i in rows]
            matrix = jnp.concatenate(
                [_row(weights, i, columns) * s for i, s in zip(rows, scales, strict=True)]
            )
            x = _joined(blocks, [groups[i] for i in rows])
            mixed = layers.species_linear(x, matrix.astype(x.dtype), species)
            widths = [self.irreps_out[o].mul for o in columns]
            for o, part in zip(columns, _split(mixed, widths), strict=True):
                out[o] = part
        return out


class NequIPLayer(nn.Module):
    """One interaction block (Batzner 2022, Fig. 1d and Eq. 8-10)."""

    plan: LayerPlan
    config: NequIPConfig
    num_species: int
    avg_num_neighbors: float

    @nn.compact
    def __call__(
        self,
        blocks: Blocks,
        species: jax.Array,
        edges: Edges,
        receivers: jax.Array,
    ) -> Blocks:
        """Node features after the layer, by block of the plan's outputs."""
        plan, n_nodes = self.plan, species.shape[0]
        residual = SpeciesLinear(
            plan.inputs,
            plan.live,
            plan.hidden,
            self.num_species,
            name="FullyConnectedTensorProduct_0",
        )(blocks, species, plan.needed)
        sources = {path.source for path in plan.computed_paths}
        wanted = tuple(i in sources for i in range(len(plan.inputs)))
        blocks = Linear(plan.inputs, plan.live, plan.inputs, name="Linear_0")(blocks, wanted)
        kernels = self._radial_kernels()
        summed = _convolve(plan, blocks, kernels, self._act, edges, receivers, n_nodes)
        summed = [None if x is None else x / self.avg_num_neighbors for x in summed]
        messages = plan.messages
        hidden = Linear(messages, (True,) * len(messages), plan.hidden, name="Linear_1")(
            summed, plan.needed
        )
        return _gate(plan, [_add(a, b) for a, b in zip(hidden, residual, strict=True)])

    @property
    def _act(self):
        return layers.activation(self.config.radial_net_nonlinearity)

    def _radial_kernels(self) -> list[jax.Array]:
        config = self.config
        hidden = (config.radial_net_n_hidden,) * config.radial_net_n_layers
        widths = (config.num_bessel, *hidden, self.plan.num_columns)
        variances = (config.scalar_mlp_std,) * len(hidden) + (1.0,)
        stds = tuple(float(np.sqrt(v / n)) for v, n in zip(variances, widths, strict=False))
        return layers.RadialKernels(widths, stds, scaled=False, name="MLP_0")()


def _add(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _convolve(plan, blocks, kernels, act, edges, receivers, n_nodes) -> Blocks:
    order = [ir for _, ir in plan.messages]
    paths = sorted(plan.computed_paths, key=lambda path: order.index(path.irrep))
    columns = np.concatenate(
        [np.arange(p.first_column, p.first_column + p.channels) for p in paths]
    )
    dtype = edges.basis.dtype
    kernels = [k.astype(dtype) for k in kernels]
    kernels[-1] = kernels[-1][:, columns]
    used = sorted({p.irrep for p in paths}, key=order.index)

    def messages(e):
        weights = layers.perceptron(kernels, act, e.basis)
        x = {i: blocks[i][e.senders] for i in {p.source for p in paths}}
        out = {ir: [] for ir in used}
        start = 0
        for path in paths:
            l_in = plan.inputs[path.source].ir.l
            c = layers.coupling(l_in, path.degree, path.irrep.l)
            w = weights[:, start : start + path.channels]
            start += path.channels
            t = jnp.einsum("eb,abm->eam", e.harmonics[path.degree], jnp.asarray(c, dtype))
            out[path.irrep].append(jnp.einsum("eam,eac->emc", t, x[path.source]) * w[:, None])
        return [jnp.concatenate(out[ir], -1) for ir in used]

    size = sum(p.channels * p.irrep.dim for p in paths)
    sums = layers.sum_messages(messages, edges, receivers, n_nodes, size)
    sums = dict(zip(used, sums, strict=True))
    return [sums.get(ir) for ir in order]


def _gate(plan: LayerPlan, hidden: Blocks) -> Blocks:
    """Gate (Batzner 2022, Eq. 10 ff.): scalars through silu (0e) or tanh (0o), l > 0 times gates.

    Activations are normalised; the gates are 0e scalars through silu.
    """
    even, odd = layers.normalized_activation("silu"), layers.normalized_activation("tanh")
    n, m = len(plan.scalars), len(plan.nonscalars)
    scalars: Blocks = [
        None if x is None else (even if ir.p == 1 else odd)(x)
        for (_, ir), x in zip(plan.scalars, hidden[:n], strict=True)
    ]
    nonscalars: Blocks = [
        None if x is None or gate is None else even(gate) * x
        for gate, x in zip(hidden[n : n + m], hidden[n + m :], strict=True)
    ]
    return scalars + nonscalars


class NequIPBlock(nn.Module):
    """The network below its outermost name."""

    config: NequIPConfig
    num_species: int
    cutoff: float
    avg_num_neighbors: float
    everything: bool = False

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        """Raw node energies (n_nodes,)."""
        config = self.config
        plans = plan_layers(config, everything=self.everything)
        species = jnp.asarray(graph.species)
        senders, receivers = jnp.asarray(graph.senders), jnp.asarray(graph.receivers)
        vectors = edge_vectors(graph)
        lengths = jnp.sqrt(jnp.sum(vectors**2, axis=-1))
        harmonics = layers.spherical_harmonics(vectors, range(config.l_max + 1))
        basis = layers.radial_basis(lengths, self.cutoff, config.num_bessel, config.radial_envelope)
        edges = Edges(senders, tuple(harmonics.values()), basis)
        one_hot = jax.nn.one_hot(species, self.num_species, dtype=vectors.dtype)[:, None, :]
        irreps, live = plans[0].inputs, plans[0].live
        blocks = Linear(Irreps([(self.num_species, SCALAR)]), (True,), irreps, name="Linear_0")(
            [one_hot], live
        )
        for i, plan in enumerate(plans):
            blocks = NequIPLayer(
                plan, config, self.num_species, self.avg_num_neighbors, name=f"NequipLayer_{i}"
            )(blocks, species, edges, receivers)
        irreps, live = plans[-1].outputs, plans[-1].outputs_live
        half = Irreps([([mul for mul, ir in irreps if ir == SCALAR][-1] // 2, SCALAR)])
        blocks = Linear(irreps, live, half, name="Linear_1")(blocks, (True,))
        blocks = Linear(half, (True,), Irreps("0e"), name="Linear_2")(blocks, (True,))
        return blocks[0][:, 0, 0]


class NequIP(nn.Module):
    """NequIP.

    Attributes:
        config: hyperparameters.
        num_species: number of elements.
        cutoff: Å.
        avg_num_neighbors: divisor of summed messages.
        everything: compute also the features that do not reach the energy.
    """

    config: NequIPConfig
    num_species: int
    cutoff: float
    avg_num_neighbors: float
    everything: bool = False

    @nn.compact
    def __call__(self, graph: Graph) -> jax.Array:
        """Raw node energies (n_nodes,) of a graph."""
        return NequIPBlock(
            self.config,
            self.num_species,
            self.cutoff,
            self.avg_num_neighbors,
            self.everything,
            name="NequipBlock_0",
        )(graph)
