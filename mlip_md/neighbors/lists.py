"""Neighbour lists in fixed capacities: allocate on the host, update anywhere, grow when too small.

``allocate`` looks at a structure and chooses a backend and capacities; ``update`` finds the edges
of new positions within them and reports in its status what it would have needed; after an
overflow, ``grow`` enlarges the list and ``update`` has to be called again. No list whose status
says overflow may be used: edges are missing from it.
"""

from __future__ import annotations

import bisect
import dataclasses
import logging
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from mlip_md.errors import CapacityError, ConfigError, NeighborError, StructureError
from mlip_md.neighbors import nvalchemi
from mlip_md.neighbors.cells import plan_grid, required_slots
from mlip_md.neighbors.compact import LANES
from mlip_md.neighbors.dense import required_images
from mlip_md.neighbors.geometry import (
    Bool,
    Float64,
    check_cell,
    check_cutoff,
    check_positions,
    plane_spacings,
    wrap,
)
from mlip_md.neighbors.host import MOST_EDGES, check_offsets, host_edges
from mlip_md.neighbors.search import Search, Three
from mlip_md.neighbors.skin import Kept, complete, find_edges, nothing_kept

Array = jax.Array | np.ndarray

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "vesin", "dense", "cells", "nvalchemi")
DENSE_LIMIT = 4_000_000
"""Pairs times images up to which trying all of them is the fastest way on an accelerator."""
SHRINK_MARGIN = 0.92
"""A box may shrink to this part of its spacings before images or bins have to be added."""
SLOTS_MARGIN = 1.1
MOST_GROWTHS = 8
"""Times in a row that a list may grow for one structure."""
BAND = 1e-4
"""Part of the cutoff within which a pair at the cutoff may be listed or not, in float32."""
LONGEST_SKIN = 10.0
"""Å; longer ones only cost time."""
CELLS_SKIN = 1.0
"""Å, the skin of the device's cell list where none is asked for."""
_COARSE = 1024  # above, capacities are multiples of 128 instead of 8


def _ladder() -> list[int]:
    rungs = [8]
    while rungs[-1] <= MOST_EDGES:
        target = max(rungs[-1] * 5 // 4, rungs[-1] + 8)
        unit = 8 if target <= _COARSE else 128
        rungs.append(-(-target // unit) * unit)
    return rungs


_RUNGS = _ladder()


def ladder(n: int) -> int:
    """Smallest capacity of at least n: each about 1.25 times the one before, multiples of 8 or 128.

    Shapes taken from it are few, so that a growing system is compiled O(log n) times.

    Raises:
        CapacityError: if int32 could not count that far.
    """
    if n > MOST_EDGES:
        raise CapacityError(f"a capacity of {n} is more than the {MOST_EDGES} that can be counted")
    return _RUNGS[bisect.bisect_left(_RUNGS, n)]


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class NeighborSpec:
    """What a neighbour list has to find, and how.

    Attributes:
        cutoff: Å.
        skin: Å, how far a list kept on the device reaches beyond the cutoff to live longer; edges
            are within the cutoff itself whatever the skin. None is 1 Å for "cells", else 0. The
            host's list is made anew in every update: that costs less than pruning a longer one.
        backend: "vesin" on the host, "dense", "cells" or "nvalchemi" on the device, "auto" by
            device and size.
        capacity_margin: factor on the first number of edges.
    """

    cutoff: float
    skin: float | None = None
    backend: str = "auto"
    capacity_margin: float = 1.2

    def __post_init__(self) -> None:
        check_cutoff(self.cutoff)
        if self.skin is not None and not (_is_number(self.skin) and 0.0 <= self.skin <= 10.0):
            raise ConfigError(
                f"skin = {self.skin!r} Å is not allowed; it must be 0 to 10 Å, or None"
            )
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend = {self.backend!r} is unknown; choose one of {BACKENDS}")
        margin = self.capacity_margin
        if not (_is_number(margin) and 1.0 <= margin <= 100.0):
            raise ConfigError(f"capacity_margin = {margin!r} is not allowed; it must be 1 to 100")

    def skin_of(self, backend: str) -> float:
        """Å, the skin with which a backend on the device keeps its list."""
        if self.skin is None:
            return CELLS_SKIN if backend == "cells" else 0.0
        return float(self.skin)


@struct.dataclass
class NeighborStatus:
    """What an update needed.

    Attributes:
        required_edges: () int32, edges that exist.
        required_candidates: () int32, pairs within cutoff + skin, if they are kept.
        required_reach: (3,) int32, images or bins that have to be searched to either side.
        required_slots: () int32, candidates of an atom in a column of bins, or neighbours.
        finite: () bool, False if positions or cell were not finite or spanned no lattice.
        overflow: () bool, True if the list is incomplete and must not be used.
    """

    required_edges: Array
    required_candidates: Array
    required_reach: Array
    required_slots: Array
    finite: Array
    overflow: Array


@struct.dataclass
class NeighborList:
    """Edges of a structure in a fixed capacity, sorted by receiver, padding last.

    Attributes:
        senders: (capacity,) int32; padding is the last atom.
        receivers: (capacity,) int32, ascending; padding is the last atom.
        shifts: (capacity, 3) int32.
        edge_mask: (capacity,) bool, False on padding.
        n_edges: () int32, edges in the list.
        status: what the last update needed; with its overflow set, nothing else may be used.
        kept: the longer list of a skin, or None.
        spec: what the list finds.
        search: how the device finds it; of the host's list only ``backend`` and ``pbc`` count.
    """

    senders: Array
    receivers: Array
    shifts: Array
    edge_mask: Array
    n_edges: Array
    status: NeighborStatus
    kept: Kept | None
    spec: NeighborSpec = struct.field(pytree_node=False)
    search: Search = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        """Number of edges that fit."""
        return self.senders.shape[0]

    @property
    def backend(self) -> str:
        """Which search makes the list."""
        return self.search.backend


def plan_images(cutoff: float, cell: Float64, pbc: Bool, shrink: float = SHRINK_MARGIN) -> Three:
    """Images to search to either side of the nearest, enough also after shrinking by a factor."""
    images = np.zeros(3, np.int32)
    if pbc.any():
        spacings = plane_spacings(cell, pbc)
        images[pbc] = required_images(cutoff, shrink * spacings)
    return int(images[0]), int(images[1]), int(images[2])


def _window(reach: Three, axes: int) -> int:
    return math.prod(2 * extent + 1 for extent in reach[:axes])


def choose_backend(backend: str, platform: str, n_nodes: int, images: Three) -> str:
    """The backend that "auto" stands for on a JAX platform; other names are returned as given."""
    if backend != "auto":
        return backend
    if platform == "cpu":
        chosen, systems = "vesin", "all systems"
    elif n_nodes**2 * _window(images, 3) <= DENSE_LIMIT:
        chosen, systems = "dense", "small systems"
    else:
        chosen = "nvalchemi" if platform == "gpu" and nvalchemi.trusted() else "cells"
        systems = "large systems"
    _log_once(f"neighbour lists of {systems} on {platform} are made by backend {chosen!r}")
    return chosen


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


def log_growth(what: str, before: object, after: object, needed: object) -> None:
    """Say that a capacity has grown, for each growth costs a compilation."""
    logger.info("neighbour list: %s grown from %s to %s (%s needed)", what, before, after, needed)


class Plan(NamedTuple):
    """How a device searches a structure, and between which numbers of edges it must find.

    Attributes:
        search: what the device is told.
        fewest: edges clearly within the cutoff, by the host's list.
        most: edges that may be within it.
    """

    search: Search
    fewest: int
    most: int

    def check(self, found: int) -> None:
        """Compare the device's first list with the host's.

        Raises:
            NeighborError: if edges are missing or too many.
        """
        if not self.fewest <= found <= self.most:
            raise NeighborError(
                f"backend {self.search.backend!r} finds {found} edges where the host's list has "
                f"{self.fewest} to {self.most}: one of them is wrong here. Use backend='vesin', "
                "and report the structure"
            )


def plan(spec: NeighborSpec, backend: str, positions: Float64, cell: Float64, pbc: Bool) -> Plan:
    """How a device searches a structure, with a list of the host to compare with.

    Args:
        spec: what to find.
        backend: "dense", "cells" or "nvalchemi".
        positions: (n, 3) Å, checked and wrapped.
        cell: (3, 3) Å, checked.
        pbc: (3,).

    Raises:
        CapacityError: if the search would be too large.
    """
    skin = spec.skin_of(backend)
    outer = spec.cutoff + skin
    edges = host_edges(positions, cell, pbc, max(outer, spec.cutoff * (1.0 + BAND)))
    receivers = edges.receivers[edges.lengths < outer]
    axes = (bool(pbc[0]), bool(pbc[1]), bool(pbc[2]))
    search = Search(backend, spec.cutoff, axes, skin=skin)
    if backend == "dense":
        search = search._replace(reach=plan_images(outer, cell, pbc))
    elif backend == "cells":
        grid, reach = plan_grid(outer, positions, cell, pbc, SHRINK_MARGIN)
        search = search._replace(grid=grid, reach=reach)
        check_size(search, len(positions))  # before that many columns are looked at
        needed = required_slots(positions, cell, search, outer)
        search = search._replace(slots=_slots(math.ceil(SLOTS_MARGIN * needed)))
    check_size(search, len(positions))
    if skin:
        room = ladder(math.ceil(spec.capacity_margin * len(receivers)))
        search = search._replace(candidates=room)
    if backend == "nvalchemi":
        most = int(np.bincount(receivers, minlength=1).max())
        slots = _slots(math.ceil(spec.capacity_margin * most))
        search = nvalchemi.plan(search._replace(slots=slots), outer, positions, cell)
    fewest, most = (
        int(np.count_nonzero(edges.lengths < spec.cutoff * (1.0 + sign * BAND)))
        for sign in (-1.0, 1.0)
    )
    return Plan(search, fewest, most)


def _slots(n: int) -> int:
    return max(1, -(-n // LANES)) * LANES


def check_size(search: Search, n_nodes: int) -> None:
    """Refuse a search that int32 could not index.

    Raises:
        CapacityError: if there are too many candidates.
    """
    if search.backend == "dense":
        size = n_nodes**2 * _window(search.reach, 3)
    else:
        size = n_nodes * _window(search.reach, 2) * max(search.slots, 1)
    if size > MOST_EDGES:
        raise CapacityError(
            f"{n_nodes} atoms have {size} candidates to try (backend {search.backend!r}, reach "
            f"{search.reach}, {search.slots} slots), more than {MOST_EDGES}; use a smaller system, "
            "or backend='vesin'"
        )


def grown(search: Search, status: Any) -> Search:
    """A search with the capacities that a status says are needed; each growth is logged.

    Args:
        search: the search that did not suffice.
        status: a ``NeighborStatus``, or anything else with its ``required_…`` fields.
    """
    slots, candidates = int(status.required_slots), int(status.required_candidates)
    needed = np.asarray(status.required_reach, np.int64)
    # In steps of a quarter: a few thin bins more are cheaper than to compile for each.
    reach = np.where(needed > search.reach, needed + needed // 4, search.reach)
    new = search._replace(
        reach=(int(reach[0]), int(reach[1]), int(reach[2])),
        slots=_slots(ladder(slots)) if slots > search.slots else search.slots,
        candidates=max(search.candidates, ladder(candidates) if search.skin else 0),
    )
    needs = {"reach": needed.tolist(), "slots": slots, "candidates": candidates}
    for what, need in needs.items():
        if getattr(new, what) != getattr(search, what):
            log_growth(what, getattr(search, what), getattr(new, what), need)
    return new


def allocate(
    spec: NeighborSpec, positions: ArrayLike, cell: ArrayLike | None, pbc: ArrayLike
) -> NeighborList:
    """Make a list for a structure, with room to grow.

    Args:
        spec: what to find.
        positions: (n, 3) Å, host or device; the device's list is in their precision.
        cell: (3, 3) Å, rows are lattice vectors, or None.
        pbc: one bool, or three.

    Returns:
        The list, updated with these positions.

    Raises:
        StructureError: if positions or cell are unusable.
        CapacityError: if the list would be too large.
    """
    checked = check_positions(positions)
    checked_cell, periodic = check_cell(cell, pbc)
    images = plan_images(spec.cutoff, checked_cell, periodic)
    backend = choose_backend(spec.backend, jax.default_backend(), len(checked), images)
    wrapped, _ = wrap(checked, checked_cell, periodic)
    if backend == "vesin":
        axes = (bool(periodic[0]), bool(periodic[1]), bool(periodic[2]))
        count = len(host_edges(wrapped, checked_cell, periodic, spec.cutoff).senders)
        planned = Plan(Search(backend, spec.cutoff, axes), count, count)
    else:
        planned = plan(spec, backend, wrapped, checked_cell, periodic)
    capacity = ladder(math.ceil(spec.capacity_margin * planned.most))
    dtype = np.dtype(_floating(positions))
    neighbors = _empty(spec, planned.search, capacity, len(checked), dtype)
    for _ in range(MOST_GROWTHS):
        neighbors = update(neighbors, positions, checked_cell)
        if not bool(neighbors.status.overflow):
            planned.check(int(neighbors.n_edges))
            return neighbors
        neighbors = grow(neighbors, neighbors.status)
    raise CapacityError(f"the neighbour list did not fit after {MOST_GROWTHS} growths")


def _floating(positions: ArrayLike) -> Any:
    """The floating dtype in which the device works on positions: theirs, or JAX's own."""
    dtype = getattr(positions, "dtype", np.dtype(np.float64))
    return jax.dtypes.canonicalize_dtype(np.promote_types(dtype, np.float32))


def _empty(
    spec: NeighborSpec, search: Search, capacity: int, n_atoms: int, dtype: np.dtype
) -> NeighborList:
    """A list without edges whose status forbids its use."""
    zero, none = np.zeros((), np.int32), np.zeros(3, np.int32)
    status = NeighborStatus(zero, zero, none, zero, np.asarray(True), np.asarray(True))
    index, mask = np.zeros(capacity, np.int32), np.zeros(capacity, bool)
    shifts = np.zeros((capacity, 3), np.int32)
    kept = nothing_kept(n_atoms, search, dtype)
    return NeighborList(index, index, shifts, mask, zero, status, kept, spec, search)


def update(neighbors: NeighborList, positions: ArrayLike, cell: ArrayLike | None) -> NeighborList:
    """Find the edges of new positions in a list's capacities.

    The caller has to look at ``status.overflow`` before using the edges. Of JAX arrays, traced ones
    included, this is a pure function of pytrees (with vesin it is not: that runs on the host).
    Positions on the host are wrapped in float64 before the device gets them in their dtype, so
    that atoms thousands of cells away lose nothing; positions in JAX arrays are what they are.

    Args:
        neighbors: a list from ``allocate``, ``grow`` or ``update``.
        positions: (n, 3) Å, of as many atoms as the list was made for.
        cell: (3, 3) Å, or None for a list without periodicity.

    Returns:
        The new list.

    Raises:
        StructureError: if positions or cell on the host are unusable; for JAX arrays the same is
            reported as ``status.finite`` being false, with overflow set.
    """
    if neighbors.backend != "vesin" and isinstance(positions, jax.Array):
        cell = jnp.zeros((3, 3)) if cell is None else jnp.asarray(cell)
        return _update_on_device(neighbors, positions.astype(_floating(positions)), cell)
    checked = check_positions(positions)
    checked_cell, periodic = check_cell(cell, np.array(neighbors.search.pbc))
    wrapped, offsets = wrap(checked, checked_cell, periodic)
    if neighbors.backend == "vesin":
        listed = _update_on_host(neighbors, wrapped, checked_cell, periodic)
    else:
        where = jnp.asarray(wrapped, _floating(positions))
        listed = _update_on_device(neighbors, where, jnp.asarray(checked_cell))
    if not offsets.any():
        return listed
    check_offsets(offsets)
    moves = offsets.astype(np.int32)
    shifts = listed.shifts + moves[listed.senders] - moves[listed.receivers]
    return dataclasses.replace(listed, shifts=shifts)


def _update_on_host(
    neighbors: NeighborList, positions: Float64, cell: Float64, pbc: Bool
) -> NeighborList:
    edges = host_edges(positions, cell, pbc, neighbors.spec.cutoff)
    capacity, count = neighbors.capacity, len(edges.senders)
    kept = min(count, capacity)
    status = dataclasses.replace(
        neighbors.status,
        required_edges=np.asarray(count, np.int32),
        overflow=np.asarray(count > capacity),
    )
    last = max(len(positions) - 1, 0)
    return dataclasses.replace(
        neighbors,
        senders=_padded(edges.senders[:kept], capacity, last),
        receivers=_padded(edges.receivers[:kept], capacity, last),
        shifts=_padded(edges.shifts[:kept], capacity, 0),
        edge_mask=np.arange(capacity) < kept,
        n_edges=np.asarray(kept, np.int32),
        status=status,
    )


def _padded(values: np.ndarray, capacity: int, fill: int) -> np.ndarray:
    out = np.full((capacity, *values.shape[1:]), fill, values.dtype)
    out[: len(values)] = values
    return out


find_edges_jit = jax.jit(find_edges, static_argnames=("search", "capacity"))
"""``find_edges``, compiled once per shape and static argument for the whole process."""


def _update_on_device(
    neighbors: NeighborList, positions: jax.Array, cell: jax.Array
) -> NeighborList:
    kept = neighbors.kept
    if kept is not None and kept.positions.shape != positions.shape:
        raise StructureError(
            f"this list keeps pairs of {len(kept.positions)} atoms, but there are positions of "
            f"{len(positions)}; allocate another list for them"
        )
    if positions.shape[0] == 0:
        status = dataclasses.replace(neighbors.status, overflow=np.asarray(False))
        return dataclasses.replace(neighbors, status=status)
    search, capacity = neighbors.search, neighbors.capacity
    check_size(search, positions.shape[0])
    edges, kept = find_edges_jit(
        positions,
        cell.astype(positions.dtype),
        positions.shape[0],
        kept,
        search=search,
        capacity=capacity,
    )
    status = NeighborStatus(
        edges.required_edges,
        edges.required_candidates,
        edges.required_reach,
        edges.required_slots,
        edges.finite,
        ~complete(edges, search, capacity),
    )
    return dataclasses.replace(
        neighbors,
        senders=edges.senders,
        receivers=edges.receivers,
        shifts=edges.shifts,
        edge_mask=edges.edge_mask,
        n_edges=jnp.minimum(edges.required_edges, capacity),
        status=status,
        kept=kept,
    )


def grow(neighbors: NeighborList, status: NeighborStatus) -> NeighborList:
    """Enlarge a list to what a status says was needed; host only.

    Args:
        neighbors: the list that overflowed.
        status: its status.

    Returns:
        An empty list of the next sufficient capacities; ``update`` fills it. Unchanged if the
        status reports no overflow.

    Raises:
        StructureError: if the overflow came of positions or a cell that no capacity cures.
        CapacityError: if the list would be too large.
    """
    if not bool(status.overflow):
        return neighbors
    if not bool(status.finite):
        raise StructureError(
            "positions or cell are not finite, or the cell has no volume: there are no neighbours"
        )
    capacity, required = neighbors.capacity, int(status.required_edges)
    if required > capacity:
        capacity = ladder(required)
        log_growth("edges", neighbors.capacity, capacity, required)
    search = grown(neighbors.search, status)
    n_atoms, dtype = 0, np.dtype(np.float32)
    if neighbors.kept is not None:
        n_atoms, dtype = len(neighbors.kept.positions), np.dtype(neighbors.kept.positions.dtype)
    return _empty(neighbors.spec, search, capacity, n_atoms, dtype)
