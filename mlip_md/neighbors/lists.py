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

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from numpy.typing import ArrayLike

from mlip_md.errors import CapacityError, ConfigError, StructureError
from mlip_md.neighbors.dense import Images, dense_edges_jit, required_images
from mlip_md.neighbors.geometry import (
    Bool,
    Float64,
    check_cell,
    check_cutoff,
    check_positions,
    plane_spacings,
)
from mlip_md.neighbors.host import MOST_EDGES, host_edges

Array = jax.Array | np.ndarray

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "vesin", "dense")
DENSE_LIMIT = 4_000_000
"""Pairs times images up to which trying all of them is the fastest way on an accelerator."""
SHRINK_MARGIN = 0.9
"""A box may shrink to this part of its spacings before more images have to be searched."""
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
        skin: Å, how far a list may reach beyond the cutoff to live longer. The edges of an updated
            list are within the cutoff itself whatever the skin; both present backends search
            anew in every update, which costs less than keeping and pruning a longer list.
        backend: "vesin" on the host, "dense" on the device, "auto" by device and size.
        capacity_margin: factor on the first number of edges.
    """

    cutoff: float
    skin: float = 0.0
    backend: str = "auto"
    capacity_margin: float = 1.2

    def __post_init__(self) -> None:
        check_cutoff(self.cutoff)
        if not 0.0 <= self.skin < float("inf"):
            raise ConfigError(f"skin = {self.skin} Å is not allowed; it must be zero or positive")
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend = {self.backend!r} is unknown; choose one of {BACKENDS}")
        if not 1.0 <= self.capacity_margin < float("inf"):
            raise ConfigError(f"capacity_margin = {self.capacity_margin} must be at least 1")


@struct.dataclass
class NeighborStatus:
    """What an update needed.

    Attributes:
        required_edges: () int32, edges that exist.
        required_images: (3,) int32, images that have to be searched to either side.
        finite: () bool, False if positions or cell were not finite or spanned no lattice.
        overflow: () bool, True if the list is incomplete and must not be used.
    """

    required_edges: Array
    required_images: Array
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
        spec: what the list finds.
        pbc: periodicity.
        backend: "vesin" or "dense".
        images: images that the dense backend searches to either side.
    """

    senders: Array
    receivers: Array
    shifts: Array
    edge_mask: Array
    n_edges: Array
    status: NeighborStatus
    spec: NeighborSpec = struct.field(pytree_node=False)
    pbc: tuple[bool, bool, bool] = struct.field(pytree_node=False)
    backend: str = struct.field(pytree_node=False)
    images: Images = struct.field(pytree_node=False)

    @property
    def capacity(self) -> int:
        """Number of edges that fit."""
        return self.senders.shape[0]


def plan_images(cutoff: float, cell: Float64, pbc: Bool, shrink: float = SHRINK_MARGIN) -> Images:
    """Images to search to either side of the nearest, enough also after shrinking by a factor."""
    images = np.zeros(3, np.int32)
    if pbc.any():
        spacings = plane_spacings(cell, pbc)
        images[pbc] = required_images(cutoff, shrink * spacings)
    return int(images[0]), int(images[1]), int(images[2])


def dense_size(n_nodes: int, images: Images) -> int:
    """Candidates that the dense backend tries."""
    return n_nodes**2 * (2 * images[0] + 1) * (2 * images[1] + 1) * (2 * images[2] + 1)


def choose_backend(backend: str, platform: str, n_nodes: int, images: Images) -> str:
    """The backend that "auto" stands for on a JAX platform; other names are returned as given."""
    if backend != "auto":
        return backend
    if platform == "cpu":
        return "vesin"
    if dense_size(n_nodes, images) <= DENSE_LIMIT:
        return "dense"
    _log_once(
        f"neighbour lists of {n_nodes} atoms on {platform} are made on the host; the device's own "
        f"search serves up to {DENSE_LIMIT} pairs times images"
    )
    return "vesin"


_logged: set[str] = set()


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        logger.info(message)


def log_growth(what: str, before: int | Images, after: int | Images, needed: object) -> None:
    """Say that a capacity has grown, for each growth costs a compilation."""
    logger.info("neighbour list: %s grown from %s to %s (%s needed)", what, before, after, needed)


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
    if backend == "dense":
        check_dense_size(len(checked), images)
    count = len(host_edges(checked, checked_cell, periodic, spec.cutoff).senders)
    capacity = ladder(int(np.ceil(spec.capacity_margin * count)))
    axes = (bool(periodic[0]), bool(periodic[1]), bool(periodic[2]))
    neighbors = _empty(spec, axes, backend, images, capacity)
    neighbors = update(neighbors, positions, checked_cell)
    while bool(neighbors.status.overflow):  # in float32 pairs at the cutoff can count otherwise
        neighbors = update(grow(neighbors, neighbors.status), positions, checked_cell)
    return neighbors


def _empty(
    spec: NeighborSpec,
    pbc: tuple[bool, bool, bool],
    backend: str,
    images: Images,
    capacity: int,
) -> NeighborList:
    """A list without edges whose status forbids its use."""
    status = NeighborStatus(
        np.zeros((), np.int32), np.zeros(3, np.int32), np.asarray(True), np.asarray(True)
    )
    index, mask = np.zeros(capacity, np.int32), np.zeros(capacity, bool)
    shifts = np.zeros((capacity, 3), np.int32)
    return NeighborList(
        index, index, shifts, mask, np.zeros((), np.int32), status, spec, pbc, backend, images
    )


def check_dense_size(n_nodes: int, images: Images) -> None:
    """Refuse a dense search that int32 could not index.

    Raises:
        CapacityError: if there are too many pairs times images.
    """
    if dense_size(n_nodes, images) > MOST_EDGES:
        raise CapacityError(
            f"{n_nodes} atoms with {images} images to either side are {dense_size(n_nodes, images)}"
            f" candidates, too many to try one by one (at most {MOST_EDGES}); use backend='vesin'"
        )


def update(neighbors: NeighborList, positions: ArrayLike, cell: ArrayLike | None) -> NeighborList:
    """Find the edges of new positions in a list's capacities.

    With the dense backend a pure function of pytrees that may be jitted; with vesin it runs on the
    host. The caller has to look at ``status.overflow`` before using the edges.

    Args:
        neighbors: a list from ``allocate``, ``grow`` or ``update``.
        positions: (n, 3) Å, of as many atoms as the list was made for.
        cell: (3, 3) Å, or None for a list without periodicity.

    Returns:
        The new list.

    Raises:
        StructureError: from vesin's backend, if positions or cell are unusable; the dense backend
            reports the same as ``status.finite`` being false, with overflow set.
    """
    if neighbors.backend == "dense":
        return _update_dense(neighbors, positions, np.zeros((3, 3)) if cell is None else cell)
    checked = check_positions(positions)
    checked_cell, periodic = check_cell(cell, np.array(neighbors.pbc))
    edges = host_edges(checked, checked_cell, periodic, neighbors.spec.cutoff)
    capacity, count = neighbors.capacity, len(edges.senders)
    kept = min(count, capacity)
    status = NeighborStatus(
        np.asarray(count, np.int32),
        np.zeros(3, np.int32),
        np.asarray(True),
        np.asarray(count > capacity),
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


def _update_dense(neighbors: NeighborList, positions: ArrayLike, cell: ArrayLike) -> NeighborList:
    device_positions = jnp.asarray(positions)
    n_atoms = device_positions.shape[0]
    if n_atoms == 0:
        status = dataclasses.replace(neighbors.status, overflow=np.asarray(False))
        return dataclasses.replace(neighbors, status=status)
    edges = dense_edges_jit(
        device_positions,
        jnp.asarray(cell, device_positions.dtype),
        n_atoms,
        cutoff=neighbors.spec.cutoff,
        pbc=neighbors.pbc,
        images=neighbors.images,
        capacity=neighbors.capacity,
    )
    overflow = (
        (edges.required_edges > neighbors.capacity)
        | jnp.any(edges.required_images > jnp.asarray(neighbors.images))
        | ~edges.finite
    )
    return dataclasses.replace(
        neighbors,
        senders=edges.senders,
        receivers=edges.receivers,
        shifts=edges.shifts,
        edge_mask=edges.edge_mask,
        n_edges=jnp.minimum(edges.required_edges, neighbors.capacity),
        status=NeighborStatus(edges.required_edges, edges.required_images, edges.finite, overflow),
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
    capacity, images = neighbors.capacity, neighbors.images
    required, wanted = int(status.required_edges), np.asarray(status.required_images)
    if required > capacity:
        capacity = ladder(required)
        log_growth("edges", neighbors.capacity, capacity, required)
    if (wanted > np.asarray(images)).any():
        grown = np.maximum(wanted, images)
        images = (int(grown[0]), int(grown[1]), int(grown[2]))
        log_growth("images", neighbors.images, images, wanted.tolist())
    return _empty(neighbors.spec, neighbors.pbc, neighbors.backend, images, capacity)
