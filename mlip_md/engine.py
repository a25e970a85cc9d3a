"""The engine behind ASE and OpenMM: structures in, energies, forces and stresses out.

It knows no host library. Everything that float32 could spoil happens in float64 on the host:
checks, wrapping into the cell, centering, the exact neighbor list, the sum of energies and the
reference energies E0. The device gets one padded graph and gives back one array.

Shapes are chosen by ``neighbors.Capacities``, so that systems that grow, shrink or fluctuate are
compiled O(log n) times. Weights and compiled functions are shared by all engines of a process that
run the same potential in the same precision on the same device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlip_md.allocation import release_memory
from mlip_md.compiler import check_sums, jit
from mlip_md.devices import (
    Load,
    check_memory,
    check_process,
    device_name,
    find_device,
    message_memory,
    naming_out_of_memory,
    plan_memory,
    precision,
)
from mlip_md.elements import symbol
from mlip_md.errors import ConfigError, MLIPError, NonFiniteError
from mlip_md.graph import Graph
from mlip_md.neighbors import (
    Capacities,
    DeviceList,
    Kept,
    Needs,
    NeighborSpec,
    Shape,
    find_edges,
    has_volume,
)
from mlip_md.networks.gpu_convolution import runs_kernels
from mlip_md.networks.layers import bounding_turns
from mlip_md.networks.native_convolution import find_native
from mlip_md.networks.tabulate import tabulate_radial
from mlip_md.potential import Params, Potential, predict
from mlip_md.structure import (
    COINCIDENT,
    CheckedStructure,
    check_structure,
    list_edges,
    sort_in_space,
)

Float64 = NDArray[np.float64]

DTYPES = ("float32", "float64")
MAX_SYSTEMS = 8
"""Systems whose neighbor lists an engine keeps on the device."""
SORTED_FROM = 400
"""Atoms from which a structure no longer fits the caches, and is computed sorted in space."""
HESSIAN_ROWS = 24
"""Rows of a Hessian that are computed in one call."""
CPU_BATCH = (4096, 32768)
ACCELERATOR_BATCH = (32768, 524288)
"""Atoms and edges that are computed together in a batch."""


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What a potential says of one structure; NumPy float64 throughout.

    Attributes:
        energy: eV, reference energies included.
        interaction_energy: eV, without reference energies.
        energies: (n,) eV per atom, reference energies included.
        forces: (n, 3) eV/Å.
        stress: (3, 3) eV/Å³, positive under tension; None if the cell has no volume.
    """

    energy: float
    interaction_energy: float
    energies: Float64
    forces: Float64
    stress: Float64 | None


def _fill_buffers(
    structures: Sequence[CheckedStructure], shape: Shape, dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Everything the device has to know, padded, in one array of floats and one of integers."""
    floats = np.zeros(3 * shape.nodes + 9 * shape.graphs, dtype)
    positions = floats[: 3 * shape.nodes].reshape(-1, 3)
    cells = floats[3 * shape.nodes :].reshape(-1, 3, 3)
    listed = 5 * shape.edges if shape.search is None else 0
    integers = np.zeros(3 + 2 * shape.nodes + listed, np.int32)
    species, node_graph, senders, receivers, shifts = _integer_parts(integers, shape)
    node_graph[:] = shape.graphs - 1
    senders[:] = receivers[:] = shape.nodes - 1
    node = edge = 0
    for index, structure in enumerate(structures):
        nodes = slice(node, node + len(structure))
        positions[nodes], species[nodes] = structure.positions, structure.species
        node_graph[nodes], cells[index] = index, structure.cell
        if structure.edges is not None:
            edges = slice(edge, edge + structure.n_edges)
            senders[edges] = structure.edges.senders + np.int32(node)
            receivers[edges] = structure.edges.receivers + np.int32(node)
            shifts[edges] = structure.edges.shifts
            edge = edges.stop
        node = nodes.stop
    integers[:3] = node, edge, len(structures)
    return floats, integers


def _integer_parts(integers: Any, shape: Shape) -> tuple[Any, Any, Any, Any, Any]:
    """Views of species, node_graph, senders, receivers and shifts in the buffer of integers."""
    first = 3 + 2 * shape.nodes
    second = first + 2 * shape.edges
    return (
        integers[3 : 3 + shape.nodes],
        integers[3 + shape.nodes : first],
        integers[first : first + shape.edges],
        integers[first + shape.edges : second],
        integers[second:].reshape(-1, 3),
    )


def _graph_of_buffers(
    floats: jax.Array, integers: jax.Array, kept: Kept | None, shape: Shape
) -> tuple[Graph, Needs | None, Kept | None]:
    """The padded graph on the device; with a search in its shape, its edges are found there."""
    positions = floats[: 3 * shape.nodes].reshape(-1, 3)
    cell = floats[3 * shape.nodes :].reshape(-1, 3, 3)
    n_nodes, n_edges, n_graphs = integers[0], integers[1], integers[2]
    species, node_graph, senders, receivers, shifts = _integer_parts(integers, shape)
    edge_mask, needs = jnp.arange(shape.edges) < n_edges, None
    if shape.search is not None:
        pairs, needs, kept = find_edges(
            positions, cell[0], n_nodes, kept, shape.search, shape.edges
        )
        senders, receivers, shifts, edge_mask = pairs[:4]
    graph = Graph(
        positions=positions,
        species=species,
        cell=cell,
        senders=senders,
        receivers=receivers,
        shifts=shifts,
        node_graph=node_graph,
        node_mask=jnp.arange(shape.nodes) < n_nodes,
        edge_mask=edge_mask,
        graph_mask=jnp.arange(shape.graphs) < n_graphs,
    )
    return graph, needs, kept


class Output(NamedTuple):
    """What comes back from the device in one transfer.

    Attributes:
        values: (nodes + 3 nodes + 9 graphs,) energies of nodes (eV), forces (eV/Å) and stresses
            (eV/Å³); all NaN if the edges were searched and did not fit.
        needs: of the search, or None.
    """

    values: Any
    needs: Needs | None


class Runtime:
    """Weights on one device in one dtype, and the step compiled for them; engines share it.

    Attributes:
        params: the weights.
        capacities: shapes that the step is compiled for.
        step: ``evaluate_buffers``, compiled once a shape.
        num_compilations: so far.
    """

    def __init__(self, potential: Potential, dtype: str, device: jax.Device) -> None:
        self.dtype, self.device = np.dtype(dtype), device
        self.num_compilations = 0
        self.capacities = Capacities()
        self._network = potential.network
        self._scaling = (potential.scaling_mean, potential.scaling_stdev)
        self._lock = threading.Lock()
        self._planned: dict[tuple[Any, Shape], int | None] = {}
        self.step = jit(self.evaluate_buffers, static_argnames="shape", donate_argnames="kept")
        self._multiply = jit(self._multiply_hessian, static_argnames="shape")
        self._radial = len(potential.elements), potential.cutoff
        self.params = self.place(potential.params)

    def place(self, params: Params) -> Params:
        """Weights in the runtime's precision on its device, beside tables made of them."""
        weights = jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, self.dtype), dict(params))
        weights.pop("tables", None)
        on_cpu = self.device.platform == "cpu"
        compiled = find_native().available if on_cpu else runs_kernels(self.device)
        if self.dtype == np.float32 and compiled:
            weights["tables"] = tabulate_radial(self._network, weights, *self._radial, self.dtype)
            release_memory()
        with self.precision():
            placed: Params = jax.device_put(weights, self.device)
        return placed

    def precision(self) -> contextlib.AbstractContextManager[None]:
        """The context in which this runtime computes."""
        return precision(self.dtype.name, self.device.platform)

    def compute(
        self, structures: Sequence[CheckedStructure], shape: Shape, kept: Kept | None = None
    ) -> tuple[Output, Kept | None]:
        """One transfer to the device, one computation, one transfer back; ``kept`` stays there.

        Args:
            structures: with their edges, or a single one if the shape has a search.
            shape: in which they fit.
            kept: what a search kept of the step before; it is used up.

        Returns:
            The output on the host, and what to keep.

        Raises:
            CapacityError: if the device's memory does not suffice.
        """
        arguments = self.params, *_fill_buffers(structures, shape, self.dtype), kept, shape
        n_atoms = sum(len(structure) for structure in structures)
        what = f"{n_atoms} atoms with room for {shape.edges} edges"
        with self.precision(), self._in_memory("step", arguments, what, n_atoms):
            output, kept = self.step(*arguments)
            output = jax.device_get(output)
        return output, kept

    @contextlib.contextmanager
    def _in_memory(
        self, name: str, arguments: tuple[Any, ...], what: str, n_atoms: int
    ) -> Iterator[None]:
        """Compile a method for new shapes and look whether it fits; name what does not after all.

        Raises:
            CapacityError: if the device's memory does not suffice.
        """
        weights = sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(self.params))
        load, key = Load(what, n_atoms, fixed=weights), (name, arguments[-1])
        if key not in self._planned:
            # Two threads would compile the same function twice.
            with self._lock, naming_out_of_memory(load, self.device):
                needed = plan_memory(getattr(self, name), *arguments)
            check_memory(load, self.device, needed)
            self._planned[key] = needed
        with naming_out_of_memory(load, self.device, self._planned[key]):
            yield

    def _apply(self, params: Params, graph: Graph) -> jax.Array:
        with bounding_turns(message_memory(self.device)):
            return jnp.asarray(self._network.apply(params, graph))

    def evaluate_buffers(
        self,
        params: Params,
        floats: jax.Array,
        integers: jax.Array,
        kept: Kept | None,
        shape: Shape,
    ) -> tuple[Output, Kept | None]:
        """What is compiled: from buffers to energies, forces and stresses."""
        self.num_compilations += 1  # runs when JAX traces: once per compilation
        graph, needs, kept = _graph_of_buffers(floats, integers, kept, shape)
        mean, stdev = self._scaling
        prediction = predict(self._apply, params, graph, scaling_mean=mean, scaling_stdev=stdev)
        parts = (prediction.node_energies, prediction.forces, prediction.stress)
        values = jnp.concatenate([part.reshape(-1) for part in parts])
        if needs is None or shape.search is None:
            return Output(values, None), None
        # Useless to whoever ignores what was needed.
        values = jnp.where(needs.fit(shape.search, shape.edges), values, jnp.nan)
        return Output(values, needs), kept

    def multiply_hessian(
        self, structure: CheckedStructure, vectors: NDArray[Any], shape: Shape
    ) -> NDArray[np.float64]:
        """Second derivatives of the energy times vectors: (k, n, 3) eV/Å² · Å.

        Args:
            structure: with its edges.
            vectors: (k, n, 3).
            shape: in which the structure fits.

        Raises:
            CapacityError: if the device's memory does not suffice.
        """
        n, found = len(structure), []
        buffers = _fill_buffers([structure], shape, self.dtype)
        filled = np.zeros((-(-len(vectors) // HESSIAN_ROWS) * HESSIAN_ROWS, shape.nodes, 3))
        filled[: len(vectors), :n] = vectors
        for piece in np.split(filled.astype(self.dtype), len(filled) // HESSIAN_ROWS):
            arguments = self.params, *buffers, piece, shape
            what = f"second derivatives of {n} atoms"
            with self.precision(), self._in_memory("_multiply", arguments, what, n):
                products = np.asarray(self._multiply(*arguments), np.float64)
            found.append(products[:, :n])
        return np.concatenate(found)[: len(vectors)]

    def _multiply_hessian(
        self,
        params: Params,
        floats: jax.Array,
        integers: jax.Array,
        vectors: jax.Array,
        shape: Shape,
    ) -> jax.Array:
        """What is compiled for it: forward over reverse, one vector after the other."""
        graph, _, _ = _graph_of_buffers(floats, integers, None, shape)

        def energy(positions: jax.Array) -> jax.Array:
            moved = dataclasses.replace(graph, positions=positions)
            energies = self._scaling[1] * self._apply(params, moved)
            return jnp.sum(jnp.where(graph.node_mask, energies, 0.0))

        def product(vector: jax.Array) -> jax.Array:
            return jax.jvp(jax.grad(energy), (graph.positions,), (vector,))[1]

        return jax.lax.map(product, vectors)


_runtimes: weakref.WeakValueDictionary[tuple[object, ...], Runtime] = weakref.WeakValueDictionary()
_runtimes_lock = threading.Lock()


def _shared_runtime(potential: Potential, dtype: str, device: jax.Device) -> Runtime:
    """The process's one runtime of a potential, dtype and device."""
    key = (potential.sha256, potential.used_radial_scale, dtype, device)
    with _runtimes_lock:
        runtime = _runtimes.get(key)
        if runtime is None:
            runtime = _runtimes[key] = Runtime(potential, dtype, device)
    return runtime


class Engine:
    """Evaluates a potential on structures; safe to share between threads, to copy and to pickle.

    Args:
        potential: the potential.
        dtype: precision of the network, "float32" or "float64".
        device: None for JAX's default, "cpu", "gpu", "cuda:1" or a ``jax.Device``.
        skin: Å, see ``NeighborSpec``; results never depend on it.
        backend: of the neighbor search: "auto", "vesin" (host), "dense", "cells" or "nvalchemi"
            (device).
        capacity_margin: factor on the first number of edges.

    Attributes:
        spec: what the neighbor lists find, and how.
        runtime: weights and compiled step, shared with other engines.

    Raises:
        ConfigError: if dtype, device, skin, backend or margin are not allowed.
        CompilerError: if the installed compiler adds up wrongly in this dtype on this device.
    """

    def __init__(
        self,
        potential: Potential,
        dtype: str = "float32",
        device: str | jax.Device | None = None,
        *,
        skin: float | None = None,
        backend: str = "auto",
        capacity_margin: float = 1.05,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"dtype = {dtype!r} is not allowed; it must be one of {DTYPES}")
        self.potential = potential
        self.dtype = dtype
        self.spec = NeighborSpec(potential.cutoff, skin, backend, capacity_margin)
        self.device = find_device(device)
        check_sums(dtype, self.device)
        self.runtime = _shared_runtime(potential, dtype, self.device)
        self._lists: dict[tuple[Any, ...], DeviceList] = {}
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are made from the arguments anew."""
        options = dataclasses.asdict(self.spec)
        options.pop("cutoff")  # the potential's
        arguments = self.potential, self.dtype, device_name(self.device)
        return functools.partial(type(self), **options), arguments

    @property
    def num_compilations(self) -> int:
        """Compilations so far, of all engines that share this potential, dtype and device."""
        return self.runtime.num_compilations

    @property
    def device_lists(self) -> tuple[DeviceList, ...]:
        """Lists that are kept on the device, of the system used last at the end."""
        with self._lock:
            return tuple(self._lists.values())

    def evaluate(
        self,
        positions: ArrayLike,
        atomic_numbers: ArrayLike,
        cell: ArrayLike | None = None,
        pbc: ArrayLike = False,
    ) -> Result:
        """Energy, forces and stress of one structure.

        Args:
            positions: (n, 3) Å, anywhere in space.
            atomic_numbers: (n,).
            cell: (3, 3) Å, rows are lattice vectors, or None.
            pbc: one bool, or three.

        Returns:
            The result.

        Raises:
            StructureError: if there are no atoms, values are not finite, shapes do not fit, the
                periodic vectors span no volume, or two atoms coincide.
            UnsupportedElementError: if the potential does not know an element.
            NonFiniteError: if the potential gives NaN or infinity.
            CapacityError: if there are too many neighbors, or the device has too little memory.
            ForkError: in a forked process of the one that computed first.
        """
        check_process()
        structure = check_structure(self.potential, positions, atomic_numbers, cell, pbc)
        platform = self.device.platform
        backend = self.spec.backend_of(platform, len(structure), structure.cell, structure.pbc)
        if backend != "vesin":
            return self._evaluate_searching(structure, backend)
        if len(structure) >= SORTED_FROM:
            structure = sort_in_space(structure)
        return self._evaluate_listed([list_edges(structure, self.spec.cutoff)])[0]

    def evaluate_batch(
        self, structures: Sequence[tuple[ArrayLike, ArrayLike, ArrayLike | None, ArrayLike]]
    ) -> list[Result]:
        """Results of many structures, computed together in few large graphs.

        Args:
            structures: tuples (positions, atomic_numbers, cell, pbc) as for ``evaluate``.

        Returns:
            One result per structure, in order.

        Raises:
            The errors of ``evaluate``; the message starts with the structure's index.
        """
        check_process()
        listed = []
        for index, arrays in enumerate(structures):
            try:
                structure = check_structure(self.potential, *arrays)
                listed.append(list_edges(structure, self.spec.cutoff))
            except MLIPError as error:
                raise error.locate(f"structure {index}") from error
        limits = CPU_BATCH if self.device.platform == "cpu" else ACCELERATOR_BATCH
        groups = _groups(listed, *limits)
        totals = np.array([_totals(group) for group in groups], int).reshape(-1, 3)
        shared = totals.max(axis=0, initial=0).tolist()  # one shape: one compilation
        return [result for group in groups for result in self._evaluate_listed(group, shared)]

    def hessian(
        self,
        positions: ArrayLike,
        atomic_numbers: ArrayLike,
        cell: ArrayLike | None = None,
        pbc: ArrayLike = False,
    ) -> Float64:
        """Second derivatives of the energy by all coordinates, for vibrations and saddle points.

        Args:
            positions: (n, 3) Å.
            atomic_numbers: (n,).
            cell: (3, 3) Å, or None.
            pbc: one bool, or three.

        Returns:
            (3n, 3n) eV/Å², symmetric; atom by atom, x, y, z.

        Raises:
            The errors of ``evaluate``.
        """
        size = 3 * len(np.asarray(positions))
        vectors = np.eye(size).reshape(size, -1, 3)
        rows = self.hessian_vector_products(positions, atomic_numbers, vectors, cell, pbc)
        return 0.5 * (rows.reshape(size, size) + rows.reshape(size, size).T)

    def hessian_vector_products(
        self,
        positions: ArrayLike,
        atomic_numbers: ArrayLike,
        vectors: ArrayLike,
        cell: ArrayLike | None = None,
        pbc: ArrayLike = False,
    ) -> Float64:
        """The Hessian times vectors, without the Hessian.

        Args:
            positions: (n, 3) Å.
            atomic_numbers: (n,).
            vectors: (k, n, 3) displacements.
            cell: (3, 3) Å, or None.
            pbc: one bool, or three.

        Returns:
            (k, n, 3) eV/Å² times the vectors' unit.

        Raises:
            ConfigError: if the vectors have another shape.
            The errors of ``evaluate``.
        """
        check_process()
        structure = check_structure(self.potential, positions, atomic_numbers, cell, pbc)
        along = np.asarray(vectors, np.float64)
        if along.ndim != 3 or along.shape[1:] != (len(structure), 3):
            raise ConfigError(
                f"vectors have shape {along.shape}; (k, {len(structure)}, 3) is needed, one "
                "displacement of every atom each"
            )
        structure = list_edges(structure, self.spec.cutoff)
        nodes, edges, graphs = _totals([structure])
        margin = self.spec.capacity_margin
        shape = self.runtime.capacities.choose(nodes, edges, graphs, margin)
        products = self.runtime.multiply_hessian(structure, along, shape)
        if not np.isfinite(products).all():
            raise NonFiniteError("the potential gives second derivatives that are not finite")
        return products

    def _evaluate_listed(
        self, structures: Sequence[CheckedStructure], at_least: Sequence[int] = (0, 0, 0)
    ) -> list[Result]:
        """Results of structures that come with their edges."""
        needed = _totals(structures)
        nodes, edges, graphs = (max(pair) for pair in zip(needed, at_least, strict=True))
        margin = self.spec.capacity_margin
        shape = self.runtime.capacities.choose(nodes, edges, graphs, margin)
        output, _ = self.runtime.compute(structures, shape)
        return _results(self.potential, structures, output.values, shape)

    def _evaluate_searching(self, structure: CheckedStructure, backend: str) -> Result:
        """Result of a structure whose edges are searched on the device, in the same call.

        A system's list is taken out while it is used: two threads with the same system never share
        what it keeps.
        """
        key = (backend, structure.pbc.tobytes(), structure.species.tobytes())
        with self._lock:
            device_list = self._lists.pop(key, None)

        def step(shape: Shape, kept: Kept | None) -> tuple[NDArray[Any], Needs, Kept | None]:
            (values, needs), kept = self.runtime.compute([structure], shape, kept)
            assert needs is not None
            if needs.shortest < COINCIDENT:
                list_edges(structure, self.spec.cutoff)  # names the pair
            return values, needs, kept

        with self.runtime.precision():
            if device_list is None:
                device_list = self._new_list(structure, backend)
            values, shape = device_list.find(step)
        with self._lock:
            if len(self._lists) >= MAX_SYSTEMS:
                del self._lists[next(iter(self._lists))]
            self._lists[key] = device_list
        return _results(self.potential, [structure], values, shape)[0]

    def _new_list(self, structure: CheckedStructure, backend: str) -> DeviceList:
        return DeviceList(
            self.spec,
            backend,
            structure.positions,
            structure.cell,
            structure.pbc,
            capacities=self.runtime.capacities,
            dtype=self.runtime.dtype,
            device=self.device,
        )


def _totals(structures: Sequence[CheckedStructure]) -> tuple[int, int, int]:
    """Nodes, edges and structures of a group."""
    edges = sum(structure.n_edges for structure in structures)
    return sum(len(structure) for structure in structures), edges, len(structures)


def _groups(
    structures: Sequence[CheckedStructure], most_nodes: int, most_edges: int
) -> list[list[CheckedStructure]]:
    """Split structures, in order, into groups within limits; a larger one is alone."""
    groups: list[list[CheckedStructure]] = []
    for structure in structures:
        nodes, edges, _ = _totals([*groups[-1], structure] if groups else [structure])
        if groups and nodes <= most_nodes and edges <= most_edges:
            groups[-1].append(structure)
        else:
            groups.append([structure])
    return groups


def _results(
    potential: Potential,
    structures: Sequence[CheckedStructure],
    values: NDArray[Any],
    shape: Shape,
) -> list[Result]:
    """Cut the device's array into results, and add reference energies."""
    values = values.astype(np.float64)
    energies = values[: shape.nodes]
    forces = values[shape.nodes : 4 * shape.nodes].reshape(-1, 3)
    stress = values[4 * shape.nodes :].reshape(-1, 3, 3)
    finite = bool(np.isfinite(values).all())
    results, start = [], 0
    for index, structure in enumerate(structures):
        nodes = slice(start, start + len(structure))
        start = nodes.stop
        if not finite:
            _check_finite(structure, energies[nodes], forces[nodes], stress[index])
        reference = potential.reference_energies(structure.species)
        interaction = float(energies[nodes].sum())
        with np.errstate(over="ignore"):
            energy = interaction + float(reference.sum())
        if not math.isfinite(energy):
            raise NonFiniteError(
                f"the energies of the atoms add up to {energy} eV; look at the potential's "
                "reference energies: mlip-md show"
            )
        results.append(
            Result(
                energy=energy,
                interaction_energy=interaction,
                energies=structure.restore(energies[nodes] + reference),
                forces=structure.restore(forces[nodes]),
                stress=stress[index] if has_volume(structure.cell) else None,
            )
        )
    return results


def _check_finite(
    structure: CheckedStructure, energies: Float64, forces: Float64, stress: Float64
) -> None:
    """Refuse NaN and infinity, naming the atoms they are at."""
    bad = np.flatnonzero(~(np.isfinite(energies) & np.isfinite(forces).all(axis=1)))
    if len(bad) == 0 and np.isfinite(stress).all():
        return
    numbers = structure.numbers[bad[:8]].tolist()
    named = zip(structure.label(bad[:8]).tolist(), numbers, strict=True)
    atoms = ", ".join(f"{i} ({symbol(number)})" for i, number in named)
    more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
    where = f"energies or forces of atoms {atoms}{more}" if len(bad) else "stress"
    edges = structure.edges
    shortest = (
        f"; the shortest distance is {edges.lengths.min():.3g} Å"
        if edges is not None and len(edges.lengths)
        else ""
    )
    raise NonFiniteError(
        f"the potential gives {where} that are not finite{shortest}. The structure is far from "
        "what the potential was made for, or the simulation blew up: check it, shorten the time "
        "step, or try dtype='float64'"
    )
