"""The engine behind ASE and OpenMM: structures in, energies, forces and stresses out.

It knows no host library. Everything that float32 could spoil happens in float64 on the host:
checks, wrapping into the cell, centering, the exact neighbour list, the sum of energies and the
reference energies E0. The device gets one padded graph and gives back one array.

Shapes are padded to the rungs of ``neighbors.ladder``, so that systems that grow, shrink or
fluctuate are compiled O(log n) times. Weights and compiled functions are shared by all engines of
a process that run the same potential in the same precision on the same device.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import math
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

from mlip_md.elements import symbol
from mlip_md.errors import (
    CapacityError,
    ConfigError,
    DeviceError,
    MLIPError,
    NonFiniteError,
    StructureError,
)
from mlip_md.graph import Graph
from mlip_md.neighbors.geometry import (
    Bool,
    Float64,
    check_cell,
    check_positions,
    close_gaps,
    dual_vectors,
    has_volume,
    wrap,
)
from mlip_md.neighbors.host import HostEdges, host_edges
from mlip_md.neighbors.lists import (
    LONGEST_SKIN,
    MOST_GROWTHS,
    NeighborSpec,
    Plan,
    check_size,
    choose_backend,
    grown,
    ladder,
    log_growth,
    plan,
    plan_images,
)
from mlip_md.neighbors.search import Search
from mlip_md.neighbors.skin import Edges, Kept, complete, find_edges, nothing_kept
from mlip_md.potential import Params, Potential, predict

Structure = tuple[ArrayLike, ArrayLike, ArrayLike | None, ArrayLike]

DTYPES = ("float32", "float64")
COINCIDENT = 0.05
"""Å; atoms closer than this are one atom written twice, or a structure in the wrong units."""
SMALLEST_ATOM = 1.0
"""Å³ of a periodic cell per atom; diamond has 5.7, hydrogen at 500 GPa more than 1."""
MOST_SYSTEMS = 8
"""Systems whose neighbour lists an engine keeps on the device."""
MOST_WASTE = 1.6
"""A compiled capacity is used again for up to this many times fewer edges."""
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


class Sizes(NamedTuple):
    """Static shape of a call: capacities in nodes, edges and structures."""

    nodes: int
    edges: int
    graphs: int


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A checked structure: wrapped and centered positions (Å, float64) and its species."""

    positions: Float64
    numbers: NDArray[np.int64]
    species: NDArray[np.int32]
    cell: Float64
    pbc: Bool
    edges: HostEdges | None


class _System(NamedTuple):
    """How a system is searched on the device, its edges last time, and its kept list."""

    search: Search
    edges: int
    kept: Kept | None


def find_device(device: str | jax.Device | None) -> jax.Device:
    """The JAX device that a name stands for.

    Args:
        device: None for JAX's default, a platform ("cpu", "gpu", "cuda", "tpu"), a platform with
            an index ("cuda:1"), or a device.

    Returns:
        The device.

    Raises:
        DeviceError: if there is none of that name.
        ConfigError: if it is no name.
    """
    if isinstance(device, jax.Device):
        return device
    if device is not None and not isinstance(device, str):
        raise ConfigError(f"device = {device!r} is no device; give None, a name or a jax.Device")
    if device is None:
        # The device of a new array is the default one, however it was set (argument, context).
        return next(iter(jnp.zeros(()).devices()))
    platform, colon, index = device.partition(":")
    try:
        found = jax.local_devices(backend=platform or "no name")
        if not colon:
            return found[0]
        if index.isdecimal() and int(index) < len(found):
            return found[int(index)]
    except RuntimeError:
        found = []
    present = ", ".join(f"{d.platform}:{d.id}" for d in found or jax.local_devices())
    raise DeviceError(
        f"there is no device {device!r}; JAX sees {present}",
        "Give None, 'cpu', 'gpu', 'cuda:1' or a jax.Device, and for a GPU install the extra: pip "
        "install 'mlip-md[cuda13]'",
    )


def device_name(device: jax.Device) -> str:
    """A name by which ``find_device`` finds a device again, in this process or another."""
    return f"{device.platform}:{jax.local_devices(backend=device.platform).index(device)}"


def _pack(
    structures: Sequence[_Prepared], sizes: Sizes, dtype: np.dtype[Any]
) -> tuple[NDArray[Any], NDArray[np.int32]]:
    """Everything the device has to know, padded, in one array of floats and one of integers."""
    floats = np.zeros(3 * sizes.nodes + 9 * sizes.graphs, dtype)
    positions = floats[: 3 * sizes.nodes].reshape(-1, 3)
    cells = floats[3 * sizes.nodes :].reshape(-1, 3, 3)
    searched = structures[0].edges is None
    integers = np.zeros(3 + 2 * sizes.nodes + (0 if searched else 5 * sizes.edges), np.int32)
    species, node_graph, senders, receivers, shifts = _integer_parts(integers, sizes)
    node_graph[:] = sizes.graphs - 1
    senders[:] = receivers[:] = sizes.nodes - 1
    node = edge = 0
    for index, structure in enumerate(structures):
        nodes = slice(node, node + len(structure.species))
        positions[nodes], species[nodes] = structure.positions, structure.species
        node_graph[nodes], cells[index] = index, structure.cell
        if structure.edges is not None:
            edges = slice(edge, edge + len(structure.edges.senders))
            senders[edges] = structure.edges.senders + np.int32(node)
            receivers[edges] = structure.edges.receivers + np.int32(node)
            shifts[edges] = structure.edges.shifts
            edge = edges.stop
        node = nodes.stop
    integers[:3] = node, edge, len(structures)
    return floats, integers


def _integer_parts(integers: Any, sizes: Sizes) -> tuple[Any, Any, Any, Any, Any]:
    """Views of species, node_graph, senders, receivers and shifts in the packed integers."""
    first = 3 + 2 * sizes.nodes
    second = first + 2 * sizes.edges
    return (
        integers[3 : 3 + sizes.nodes],
        integers[3 + sizes.nodes : first],
        integers[first : first + sizes.edges],
        integers[first + sizes.edges : second],
        integers[second:].reshape(-1, 3),
    )


def _unpack(
    floats: jax.Array,
    integers: jax.Array,
    kept: Kept | None,
    sizes: Sizes,
    search: Search | None,
) -> tuple[Graph, Edges | None, Kept | None]:
    """The padded graph on the device; with ``search``, its edges are found there."""
    positions = floats[: 3 * sizes.nodes].reshape(-1, 3)
    cell = floats[3 * sizes.nodes :].reshape(-1, 3, 3)
    n_nodes, n_edges, n_graphs = integers[0], integers[1], integers[2]
    species, node_graph, senders, receivers, shifts = _integer_parts(integers, sizes)
    edge_mask, found = jnp.arange(sizes.edges) < n_edges, None
    if search is not None:
        found, kept = find_edges(positions, cell[0], n_nodes, kept, search, sizes.edges)
        senders, receivers, shifts = found.senders, found.receivers, found.shifts
        edge_mask = found.edge_mask
    graph = Graph(
        positions=positions,
        species=species,
        cell=cell,
        senders=senders,
        receivers=receivers,
        shifts=shifts,
        node_graph=node_graph,
        node_mask=jnp.arange(sizes.nodes) < n_nodes,
        edge_mask=edge_mask,
        graph_mask=jnp.arange(sizes.graphs) < n_graphs,
    )
    return graph, found, kept


class _Output(NamedTuple):
    """What comes back from the device: node energies, forces and stresses in one array.

    After a search also what it needed, as in ``Edges``.
    """

    values: Any
    required_edges: Any = None
    required_candidates: Any = None
    required_reach: Any = None
    required_slots: Any = None
    shortest: Any = None
    finite: Any = None


class _Runtime:
    """Weights on one device in one dtype, and the functions compiled for them."""

    def __init__(self, potential: Potential, dtype: str, device: jax.Device) -> None:
        self.dtype = np.dtype(dtype)
        self.platform = device.platform
        self._device = device
        self.num_compilations = 0
        self._network = potential.network
        self._scaling = (potential.scaling_mean, potential.scaling_stdev)
        self._lock = threading.Lock()
        self._capacities: dict[tuple[int, int, Search | None], list[int]] = {}
        self._compiled: set[tuple[Sizes, Search | None]] = set()
        self._run = jax.jit(
            self._predict, static_argnames=("sizes", "search"), donate_argnames="kept"
        )
        weights = jax.tree_util.tree_map(
            lambda leaf: np.asarray(leaf, self.dtype), dict(potential.params)
        )
        with self._precision():
            self._params: Params = jax.device_put(weights, device)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """Compute in this runtime's dtype and with all its bits, whatever the process's setting.

        Accelerators multiply float32 matrices with ten bits or fewer unless told otherwise; forces
        would carry noise of a thousandth, and images of a periodic cell be 0.01 Å off.
        """
        matmul = contextlib.nullcontext()
        if self.platform != "cpu":
            matmul = jax.default_matmul_precision("float32")
        with jax.enable_x64(self.dtype == np.float64), matmul:
            yield

    def sizes(
        self, n_nodes: int, n_edges: int, n_graphs: int, margin: float, search: Search | None
    ) -> Sizes:
        """Capacities for a graph: compiled ones if they fit well, else the next rungs."""
        nodes, graphs = ladder(n_nodes + 1), 1 << (n_graphs - 1).bit_length()
        with self._lock:
            known = self._capacities.setdefault((nodes, graphs, search), [])
            place = bisect.bisect_left(known, n_edges)
            if place < len(known) and known[place] <= max(MOST_WASTE * n_edges, ladder(n_edges)):
                return Sizes(nodes, known[place], graphs)
            edges = ladder(math.ceil(margin * n_edges))
            if known and edges > known[-1]:
                log_growth("edges", known[-1], edges, n_edges)
            bisect.insort(known, edges)
        return Sizes(nodes, edges, graphs)

    def run(
        self,
        floats: NDArray[Any],
        integers: NDArray[np.int32],
        sizes: Sizes,
        search: Search | None,
        kept: Kept | None = None,
    ) -> tuple[_Output, Kept | None]:
        """One transfer to the device, one computation, one transfer back; ``kept`` stays there."""
        arguments = self._params, floats, integers, kept, sizes, search
        with self._precision(), _out_of_memory(sizes):
            if (sizes, search) in self._compiled:
                output, kept = self._run(*arguments)
                return jax.device_get(output), kept
            with self._lock:  # two threads would compile the same function twice
                output, kept = self._run(*arguments)
                output = jax.device_get(output)
                self._compiled.add((sizes, search))
            return output, kept

    def nothing_kept(self, n_nodes: int, search: Search) -> Kept | None:
        """What a search with a skin starts from, on the device."""
        with self._precision(), jax.default_device(self._device):
            return jax.device_put(nothing_kept(n_nodes, search, self.dtype), self._device)

    def plan(self, structure: _Prepared, spec: NeighborSpec, backend: str) -> Plan:
        """How the device searches a structure, and how many edges it must find."""
        with self._precision(), jax.default_device(self._device):
            return plan(spec, backend, structure.positions, structure.cell, structure.pbc)

    def _apply(self, params: Params, graph: Graph) -> jax.Array:
        return jnp.asarray(self._network.apply(params, graph))

    def _predict(
        self,
        params: Params,
        floats: jax.Array,
        integers: jax.Array,
        kept: Kept | None,
        sizes: Sizes,
        search: Search | None,
    ) -> tuple[_Output, Kept | None]:
        self.num_compilations += 1  # runs when JAX traces: once per compilation
        graph, found, kept = _unpack(floats, integers, kept, sizes, search)
        mean, stdev = self._scaling
        prediction = predict(self._apply, params, graph, scaling_mean=mean, scaling_stdev=stdev)
        parts = (prediction.node_energies, prediction.forces, prediction.stress)
        values = jnp.concatenate([part.reshape(-1) for part in parts])
        if found is None or search is None:
            return _Output(values), None
        needs = {name: getattr(found, name) for name in _Output._fields[1:]}
        # Useless to whoever ignores what was needed.
        values = jnp.where(complete(found, search, sizes.edges), values, jnp.nan)
        return _Output(values, **needs), kept


@contextlib.contextmanager
def _out_of_memory(sizes: Sizes) -> Iterator[None]:
    """Say what did not fit into a device's memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise CapacityError(
            f"{sizes.nodes} atoms with {sizes.edges} edges do not fit into the device's memory; "
            "use fewer atoms, a smaller model, dtype='float32' or another device. JAX says: "
            + str(error).splitlines()[0][:200]
        ) from error


_runtimes: weakref.WeakValueDictionary[tuple[str, str, jax.Device], _Runtime] = (
    weakref.WeakValueDictionary()
)
_runtimes_lock = threading.Lock()


def _shared_runtime(potential: Potential, dtype: str, device: jax.Device) -> _Runtime:
    """The process's one runtime of a potential, dtype and device."""
    key = (potential.sha256, dtype, device)
    with _runtimes_lock:
        runtime = _runtimes.get(key)
        if runtime is None:
            runtime = _runtimes[key] = _Runtime(potential, dtype, device)
    return runtime


class Engine:
    """Evaluates a potential on structures; safe to share between threads, to copy and to pickle.

    Args:
        potential: the potential.
        dtype: precision of the network, "float32" or "float64".
        device: None for JAX's default, "cpu", "gpu", "cuda:1" or a ``jax.Device``.
        skin: Å, see ``NeighborSpec``; results never depend on it.
        backend: of the neighbour search: "auto", "vesin" (host), "dense", "cells" or "nvalchemi"
            (device).
        capacity_margin: factor on the first number of edges.

    Raises:
        ConfigError: if dtype, device, skin, backend or margin are not allowed.
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
        self._runtime = _shared_runtime(potential, dtype, self.device)
        self._systems: dict[tuple[Any, ...], _System] = {}
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "potential": self.potential,
            "dtype": self.dtype,
            "spec": self.spec,
            "device": device_name(self.device),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        spec = state["spec"]
        self.__init__(  # type: ignore[misc]  # nothing but the arguments is kept
            state["potential"],
            state["dtype"],
            state["device"],
            skin=spec.skin,
            backend=spec.backend,
            capacity_margin=spec.capacity_margin,
        )

    @property
    def num_compilations(self) -> int:
        """Compilations so far, of all engines that share this potential, dtype and device."""
        return self._runtime.num_compilations

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
            CapacityError: if there are too many neighbours.
        """
        structure = _check(self.potential, positions, atomic_numbers, cell, pbc)
        backend = self._search_backend(structure)
        if backend != "vesin":
            return self._evaluate_searching(structure, backend)
        return self._evaluate_listed([self._with_edges(structure)])[0]

    def evaluate_batch(self, structures: Sequence[Structure]) -> list[Result]:
        """Results of many structures, computed together in few large graphs.

        Args:
            structures: tuples (positions, atomic_numbers, cell, pbc) as for ``evaluate``.

        Returns:
            One result per structure, in order.

        Raises:
            The errors of ``evaluate``; the message starts with the structure's index.
        """
        prepared = []
        for index, structure in enumerate(structures):
            try:
                prepared.append(self._with_edges(_check(self.potential, *structure)))
            except MLIPError as error:
                raise type(error)(f"structure {index}: {error}") from error
        limits = CPU_BATCH if self.device.platform == "cpu" else ACCELERATOR_BATCH
        groups = _groups(prepared, *limits)
        totals = np.array([_totals(group) for group in groups], int).reshape(-1, 3)
        shared = totals.max(axis=0, initial=0).tolist()  # one shape: one compilation
        return [result for group in groups for result in self._evaluate_listed(group, shared)]

    def _search_backend(self, structure: _Prepared) -> str:
        """Where the structure's edges are found: "vesin" is the host."""
        backend, platform = self.spec.backend, self.device.platform
        if backend == "vesin" or (backend == "auto" and platform == "cpu"):
            return "vesin"
        images = plan_images(self.spec.cutoff, structure.cell, structure.pbc)
        return choose_backend(backend, platform, ladder(len(structure.species) + 1), images)

    def _with_edges(self, structure: _Prepared) -> _Prepared:
        """The structure with its exact list; refuses coincident atoms by name."""
        edges = host_edges(structure.positions, structure.cell, structure.pbc, self.spec.cutoff)
        if len(edges.lengths) and edges.lengths.min() < COINCIDENT:
            raise _coincidence(structure, edges)
        return dataclasses.replace(structure, edges=edges)

    def _evaluate_listed(
        self, structures: Sequence[_Prepared], at_least: Sequence[int] = (0, 0, 0)
    ) -> list[Result]:
        """Results of structures that come with their edges."""
        needed = _totals(structures)
        nodes, edges, graphs = (max(pair) for pair in zip(needed, at_least, strict=True))
        sizes = self._runtime.sizes(nodes, edges, graphs, self.spec.capacity_margin, None)
        floats, integers = _pack(structures, sizes, self._runtime.dtype)
        output, _ = self._runtime.run(floats, integers, sizes, None)
        return _results(self.potential, structures, output.values, sizes)

    def _evaluate_searching(self, structure: _Prepared, backend: str) -> Result:
        """Result of a structure whose edges are searched on the device, in the same call.

        What a search has learnt of a system is taken out while it is used: two threads with the
        same system never share a kept list.
        """
        key = (backend, structure.pbc.tobytes(), structure.species.tobytes())
        with self._lock:
            system = self._systems.pop(key, None)
        planned = None
        if system is None:
            planned = self._runtime.plan(structure, self.spec, backend)
            system = _System(planned.search, planned.most, None)
        n_atoms = len(structure.species)
        for _ in range(MOST_GROWTHS):
            search, edges, kept = system
            check_size(search, ladder(n_atoms + 1))
            sizes = self._runtime.sizes(n_atoms, edges, 1, self.spec.capacity_margin, search)
            if kept is None:
                kept = self._runtime.nothing_kept(sizes.nodes, search)
            floats, integers = _pack([structure], sizes, self._runtime.dtype)
            output, kept = self._runtime.run(floats, integers, sizes, search, kept)
            if output.shortest < COINCIDENT:
                self._with_edges(structure)  # names the pair
            wider, needed = grown(search, output), int(output.required_edges)
            if not needed <= edges <= MOST_WASTE * needed:
                edges = needed  # else the capacity stays: a number that breathes fits again
            system = _System(wider, edges, kept if wider == search else None)
            if not output.finite:
                raise StructureError(
                    f"positions or cell are not finite in {self.dtype}, or the cell has no volume "
                    "there; an earlier step blew up, or the units are not Å"
                )
            if complete(output, search, sizes.edges):
                if planned is not None:
                    planned.check(needed)
                with self._lock:
                    if len(self._systems) >= MOST_SYSTEMS:
                        del self._systems[next(iter(self._systems))]
                    self._systems[key] = system
                return _results(self.potential, [structure], output.values, sizes)[0]
        raise CapacityError(
            f"the neighbour list did not fit after {MOST_GROWTHS} growths; it needs "
            f"{system.edges} edges and {system.search}; use backend='vesin'"
        )


def _check(
    potential: Potential,
    positions: ArrayLike,
    atomic_numbers: ArrayLike,
    cell: ArrayLike | None,
    pbc: ArrayLike,
) -> _Prepared:
    """Check a structure in float64, wrap it into its cell, close its gaps and center it.

    Coordinates are then as small as they can be and lose least when cast to float32; where
    the structure lies in space cannot matter. The center is that of the cell along periodic
    axes, and of the atoms along open ones: neither jumps when an atom is wrapped.
    """
    checked = check_positions(positions)
    numbers = np.asarray(atomic_numbers)
    if len(checked) == 0:
        raise StructureError("the structure has no atoms; there is nothing to compute")
    if numbers.shape != (len(checked),):
        raise StructureError(
            f"there are {len(checked)} positions but atomic numbers of shape {numbers.shape}"
        )
    species = potential.species(numbers)
    checked_cell, periodic = check_cell(cell, pbc)
    if periodic.all():
        _check_volume(len(checked), checked_cell)
    wrapped, _ = wrap(checked, checked_cell, periodic)
    closed = close_gaps(wrapped, checked_cell, periodic, 2.0 * (potential.cutoff + LONGEST_SKIN))
    middle, vectors = closed.mean(axis=0), checked_cell[periodic]
    middle = middle + (0.5 - dual_vectors(vectors) @ middle) @ vectors
    return _Prepared(closed - middle, numbers, species, checked_cell, periodic, None)


def _check_volume(n_atoms: int, cell: Float64) -> None:
    """Refuse cells that atoms do not fit into: placeholders (CRYST1 1 1 1) and wrong units."""
    volume = abs(float(np.linalg.det(cell)))
    if volume < SMALLEST_ATOM * n_atoms:
        raise StructureError(
            f"{n_atoms} atoms do not fit into a cell of {volume:.3g} Å³; if it is a placeholder, "
            "remove it and the periodicity, else check that it is in Å"
        )


def _coincidence(structure: _Prepared, edges: HostEdges) -> StructureError:
    """An error that names the closest pair."""
    edge = int(np.argmin(edges.lengths))
    i, j, shift = int(edges.senders[edge]), int(edges.receivers[edge]), edges.shifts[edge]
    image = f" (its image {shift.tolist()} by whole lattice vectors)" if shift.any() else ""
    return StructureError(
        f"atoms {i} ({symbol(int(structure.numbers[i]))}) and {j} "
        f"({symbol(int(structure.numbers[j]))}){image} are {edges.lengths[edge]:.3g} Å apart, less "
        f"than {COINCIDENT} Å; remove the duplicate, or check that the units are Å"
    )


def _totals(structures: Sequence[_Prepared]) -> tuple[int, int, int]:
    """Nodes, edges and structures of a group."""
    edges = sum(len(s.edges.senders) for s in structures if s.edges is not None)
    return sum(len(s.species) for s in structures), edges, len(structures)


def _groups(
    structures: Sequence[_Prepared], most_nodes: int, most_edges: int
) -> list[list[_Prepared]]:
    """Split structures, in order, into groups within limits; a larger one is alone."""
    groups: list[list[_Prepared]] = []
    for structure in structures:
        nodes, edges, _ = _totals([*groups[-1], structure] if groups else [structure])
        if groups and nodes <= most_nodes and edges <= most_edges:
            groups[-1].append(structure)
        else:
            groups.append([structure])
    return groups


def _results(
    potential: Potential,
    structures: Sequence[_Prepared],
    values: NDArray[Any],
    sizes: Sizes,
) -> list[Result]:
    """Cut the device's array into results, and add reference energies."""
    values = values.astype(np.float64)
    energies = values[: sizes.nodes]
    forces = values[sizes.nodes : 4 * sizes.nodes].reshape(-1, 3)
    stress = values[4 * sizes.nodes :].reshape(-1, 3, 3)
    finite = bool(np.isfinite(values).all())
    results, start = [], 0
    for index, structure in enumerate(structures):
        nodes = slice(start, start + len(structure.species))
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
                energies=energies[nodes] + reference,
                forces=forces[nodes],
                stress=stress[index] if has_volume(structure.cell) else None,
            )
        )
    return results


def _check_finite(
    structure: _Prepared, energies: Float64, forces: Float64, stress: Float64
) -> None:
    """Refuse NaN and infinity, naming the atoms they are at."""
    bad = np.flatnonzero(~(np.isfinite(energies) & np.isfinite(forces).all(axis=1)))
    if len(bad) == 0 and np.isfinite(stress).all():
        return
    atoms = ", ".join(f"{i} ({symbol(int(structure.numbers[i]))})" for i in bad[:8])
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
