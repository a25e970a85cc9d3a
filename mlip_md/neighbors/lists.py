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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from mlip_md.errors import CapacityError, ConfigError, StructureError
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
)
from mlip_md.neighbors.host import MOST_EDGES, host_edges
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
    """
    return _RUNGS[bisect.bisect_left(_RUNGS, n)]


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
        if self.skin is not None and not 0.0 <= self.skin < float("inf"):
            raise ConfigError(f"skin = {self.skin} Å is not allowed; it must be zero or positive")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend = {self.backend!r} is unknown; choose one of {BACKENDS}")
        if not 1.0 <= self.capacity_margin < float("inf"):
            raise ConfigError(f"capacity_margin = {self.capacity_margin} must be at least 1")

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
        return "vesin"
    if n_nodes**2 * _window(images, 3) <= DENSE_LIMIT:
        return "dense"
    chosen = "nvalchemi" if platform == "gpu" and nvalchemi.trusted() else "cells"
    _log_once(f"neighbour lists of large systems on {platform} are made by backend {chosen!r}")
    return chosen


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


def log_growth(what: str, before: object, after: object, needed: object) -> None:
    """Say that a capacity has grown, for each growth costs a compilation."""
    logger.info("neighbour list: %s grown from %s to %s (%s needed)", what, before, after, needed)


def plan(
    spec: NeighborSpec, backend: str, positions: Float64, cell: Float64, pbc: Bool
) -> tuple[Search, int]:
    """How a device searches a structure, and the number of edges it will find.

    Args:
        spec: what to find.
        backend: "dense", "cells" or "nvalchemi".
        positions: (n, 3) Å, checked.
        cell: (3, 3) Å, checked.
        pbc: (3,).

    Raises:
        CapacityError: if the search would be too large.
    """
    skin = spec.skin_of(backend)
    outer = spec.cutoff + skin
    axes = (bool(pbc[0]), bool(pbc[1]), bool(pbc[2]))
    search = Search(backend, spec.cutoff, axes, skin=skin)
    if backend == "dense":
        search = search._replace(reach=plan_images(outer, cell, pbc))
    elif backend == "cells":
        grid, reach = plan_grid(outer, positions, cell, pbc, SHRINK_MARGIN)
        search = search._replace(grid=grid, reach=reach)
        needed = required_slots(positions, cell, search, outer)
        search = search._replace(slots=_slots(math.ceil(SLOTS_MARGIN * needed)))
    check_size(search, len(positions))
    count = len(host_edges(positions, cell, pbc, spec.cutoff).senders)
    receivers = host_edges(positions, cell, pbc, outer).receivers
    if skin:
        room = ladder(math.ceil(spec.capacity_margin * len(receivers)))
        search = search._replace(candidates=room)
    if backend == "nvalchemi":
        most = int(np.bincount(receivers, minlength=1).max())
        slots = _slots(math.ceil(spec.capacity_margin * most))
        search = nvalchemi.plan(search._replace(slots=slots), outer, positions, cell)
    return search, count


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
        size = n_nodes * _window(search.reach, 2) * search.slots
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
    needed = np.asarray(status.required_reach)
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
    if backend == "vesin":
        axes = (bool(periodic[0]), bool(periodic[1]), bool(periodic[2]))
        search = Search(backend, spec.cutoff, axes)
        count = len(host_edges(checked, checked_cell, periodic, spec.cutoff).senders)
    else:
        search, count = plan(spec, backend, checked, checked_cell, periodic)
    capacity = ladder(math.ceil(spec.capacity_margin * count))
    where = np.asarray(positions) if backend == "vesin" else jnp.asarray(positions)
    neighbors = _empty(spec, search, capacity, len(checked), np.dtype(where.dtype))
    neighbors = update(neighbors, where, checked_cell)
    while bool(neighbors.status.overflow):  # in float32 pairs at the cutoff can count otherwise
        neighbors = update(grow(neighbors, neighbors.status), where, checked_cell)
    return neighbors


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

    On the device a pure function of pytrees that may be jitted; with vesin it runs on the host.
    The caller has to look at ``status.overflow`` before using the edges.

    Args:
        neighbors: a list from ``allocate``, ``grow`` or ``update``.
        positions: (n, 3) Å, of as many atoms as the list was made for.
        cell: (3, 3) Å, or None for a list without periodicity.

    Returns:
        The new list.

    Raises:
        StructureError: from vesin's backend, if positions or cell are unusable; the others report
            the same as ``status.finite`` being false, with overflow set.
    """
    if neighbors.backend != "vesin":
        return _update_on_device(neighbors, positions, np.zeros((3, 3)) if cell is None else cell)
    checked = check_positions(positions)
    checked_cell, periodic = check_cell(cell, np.array(neighbors.search.pbc))
    edges = host_edges(checked, checked_cell, periodic, neighbors.spec.cutoff)
    capacity, count = neighbors.capacity, len(edges.senders)
    kept = min(count, capacity)
    status = dataclasses.replace(
        neighbors.status,
        required_edges=np.asarray(count, np.int32),
        overflow=np.asarray(count > capacity),
    )
    last = max(len(checked) - 1, 0)
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
    neighbors: NeighborList, positions: ArrayLike, cell: ArrayLike
) -> NeighborList:
    positions = jnp.asarray(positions)
    if positions.shape[0] == 0:
        status = dataclasses.replace(neighbors.status, overflow=np.asarray(False))
        return dataclasses.replace(neighbors, status=status)
    search, capacity = neighbors.search, neighbors.capacity
    check_size(search, positions.shape[0])
    cell = jnp.asarray(cell, positions.dtype)
    edges, kept = find_edges_jit(
        positions, cell, positions.shape[0], neighbors.kept, search=search, capacity=capacity
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
