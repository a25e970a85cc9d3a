"""Lists on the device: planned on the host, in fixed capacities, grown when those do not suffice.

``plan_search`` looks at a structure once and chooses capacities; ``DeviceList`` then runs whatever
compiled step finds the list (alone, or with energy and forces in the same call), looks at what the
step says it would have needed, and runs it again with larger capacities where that was more. No
step is used whose list did not fit: edges are missing from it.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import logging
import math
import numbers
import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from mlip_md.errors import CapacityError, ConfigError, NeighborError, StructureError
from mlip_md.neighbors import nvalchemi
from mlip_md.neighbors.cells import plan_grid, required_slots
from mlip_md.neighbors.dense import required_images
from mlip_md.neighbors.geometry import MAX_SKIN, Bool, Float64, check_cutoff, plane_spacings
from mlip_md.neighbors.host import MAX_EDGES, host_edges
from mlip_md.neighbors.kept import Kept, Needs, nothing_kept
from mlip_md.neighbors.search import LANES, Search, Three

T = TypeVar("T")

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "vesin", "dense", "cells", "nvalchemi")
DENSE_LIMIT = 4_000_000
"""Pairs times images up to which trying all of them is the fastest way on an accelerator."""
SHRINK_MARGIN = 0.92
"""A box may shrink to this part of its spacings before images or bins have to be added."""
SLOTS_MARGIN = 1.1
MAX_GROWTHS = 8
"""Times in a row that a list may grow for one structure."""
MAX_WASTE = 1.6
"""A compiled capacity is used again for up to this many times fewer edges."""
BAND = 1e-4
"""Part of the cutoff within which a pair at the cutoff may be listed or not, in float32."""
CELLS_SKIN = 1.0
"""Å, the skin of the device's cell list where none is asked for."""
_COARSE = 1024  # above, capacities are multiples of 128 instead of 8


def _ladder() -> list[int]:
    rungs = [8]
    while rungs[-1] <= MAX_EDGES:
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
    if n > MAX_EDGES:
        raise CapacityError(f"a capacity of {n} is more than the {MAX_EDGES} that can be counted")
    return _RUNGS[bisect.bisect_left(_RUNGS, n)]


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class NeighborSpec:
    """What a neighbor list has to find, and how; ``Engine`` has the defaults.

    Attributes:
        cutoff: Å.
        skin: Å, how far a list kept on the device reaches beyond the cutoff to live longer; edges
            are within the cutoff itself whatever the skin. None is 1 Å for "cells", else 0. The
            host's list is made anew in every step: that costs less than pruning a longer one.
        backend: "vesin" on the host, "dense", "cells" or "nvalchemi" on the device, "auto" by
            device and size.
        capacity_margin: 1 to 100, factor on the first number of edges.

    Raises:
        StructureError: if the cutoff is no positive number.
        ConfigError: if another value is not allowed.
    """

    cutoff: float
    skin: float | None
    backend: str
    capacity_margin: float

    def __post_init__(self) -> None:
        check_cutoff(self.cutoff)
        skin, margin = self.skin, self.capacity_margin
        if skin is not None and not (_is_number(skin) and 0.0 <= skin <= MAX_SKIN):
            raise ConfigError(
                f"skin = {skin!r} Å is not allowed; it must be 0 to {MAX_SKIN:.0f} Å, or None"
            )
        if self.backend not in BACKENDS:
            raise ConfigError(f"backend = {self.backend!r} is unknown; choose one of {BACKENDS}")
        if not (_is_number(margin) and 1.0 <= margin <= 100.0):
            raise ConfigError(f"capacity_margin = {margin!r} is not allowed; it must be 1 to 100")

    def skin_of(self, backend: str) -> float:
        """Å, the skin with which a backend on the device keeps its list."""
        if self.skin is None:
            return CELLS_SKIN if backend == "cells" else 0.0
        return float(self.skin)

    def backend_of(self, platform: str, n_atoms: int, cell: Float64, pbc: Bool) -> str:
        """Where a structure's list is made; what is asked for is taken, "auto" is as measured.

        Args:
            platform: of the JAX device, "cpu", "gpu" or "tpu".
            n_atoms: number of atoms.
            cell: (3, 3) Å, checked.
            pbc: (3,).

        Returns:
            "vesin" (the host), "dense", "cells" or "nvalchemi".
        """
        if self.backend != "auto":
            return self.backend
        if platform == "cpu":
            chosen, systems = "vesin", "all systems"
        elif _fits_dense(ladder(n_atoms + 1), plan_images(self.cutoff, cell, pbc)):
            chosen, systems = "dense", "small systems"
        else:
            chosen = "nvalchemi" if platform == "gpu" and nvalchemi.trusted() else "cells"
            systems = "large systems"
        _log_once(f"neighbor lists of {systems} on {platform} are made by backend {chosen!r}")
        return chosen


def plan_images(cutoff: float, cell: Float64, pbc: Bool, shrink: float = SHRINK_MARGIN) -> Three:
    """Images to search to either side of the nearest, enough also after shrinking by a factor.

    Args:
        cutoff: Å.
        cell: (3, 3) Å, checked.
        pbc: (3,).
        shrink: factor on the spacings of lattice planes for which they still suffice.

    Returns:
        Images along the three axes; 0 along open ones.
    """
    images = np.zeros(3, np.int32)
    if pbc.any():
        images[pbc] = required_images(cutoff, shrink * plane_spacings(cell, pbc))
    return int(images[0]), int(images[1]), int(images[2])


def _window(reach: Three, axes: int) -> int:
    return math.prod(2 * extent + 1 for extent in reach[:axes])


def _fits_dense(n_nodes: int, images: Three) -> bool:
    return n_nodes**2 * _window(images, 3) <= DENSE_LIMIT


@functools.cache
def _log_once(message: str) -> None:
    logger.info(message)


def _log_growth(what: str, before: object, after: object, needed: object) -> None:
    """Say that a capacity has grown, for each growth costs a compilation."""
    logger.info("neighbor list: %s grown from %s to %s (%s needed)", what, before, after, needed)


class Shape(NamedTuple):
    """Static shape of a call to the device; each is compiled once.

    Attributes:
        nodes: capacity in nodes; at least one is padding.
        edges: capacity in edges.
        graphs: capacity in structures.
        search: how the edges are found there, or None if they come from the host.
    """

    nodes: int
    edges: int
    graphs: int
    search: Search | None = None


class Capacities:
    """Shapes that have been compiled: one that fits well is taken again, so that few are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[tuple[int, int, Search | None], list[int]] = {}

    def choose(
        self, n_nodes: int, n_edges: int, n_graphs: int, margin: float, search: Search | None = None
    ) -> Shape:
        """A shape for so many nodes, edges and structures: a known one, or the next rungs.

        Args:
            n_nodes: nodes without padding.
            n_edges: edges that there are, or are expected.
            n_graphs: structures.
            margin: factor on the edges where no known capacity fits.
            search: how edges are found on the device, or None.

        Raises:
            CapacityError: if int32 could not count that far.
        """
        nodes, graphs = ladder(n_nodes + 1), 1 << (n_graphs - 1).bit_length()
        with self._lock:
            known = self._known.setdefault((nodes, graphs, search), [])
            place = bisect.bisect_left(known, n_edges)
            if place < len(known) and known[place] <= max(MAX_WASTE * n_edges, ladder(n_edges)):
                return Shape(nodes, known[place], graphs, search)
            edges = ladder(math.ceil(margin * n_edges))
            if known and edges > known[-1]:
                _log_growth("edges", known[-1], edges, n_edges)
            bisect.insort(known, edges)
        return Shape(nodes, edges, graphs, search)


class SearchPlan(NamedTuple):
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


def plan_search(
    spec: NeighborSpec, backend: str, positions: Float64, cell: Float64, pbc: Bool
) -> SearchPlan:
    """How a device searches a structure, with a list of the host to compare with.

    Args:
        spec: what to find.
        backend: "dense", "cells" or "nvalchemi".
        positions: (n, 3) Å, placed (``geometry.place``).
        cell: (3, 3) Å, checked.
        pbc: (3,).

    Returns:
        What the device is told, with room for what the host's list has, and that list's counts.

    Raises:
        CapacityError: if the search would be too large.
        ConfigError: if the backend is not installed.
    """
    skin = spec.skin_of(backend)
    outer = spec.cutoff + skin
    edges = host_edges(positions, cell, pbc, max(outer, spec.cutoff * (1.0 + BAND)), closed=True)
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
        search = search._replace(slots=_whole_words(math.ceil(SLOTS_MARGIN * needed)))
    check_size(search, len(positions))
    if skin:
        room = ladder(math.ceil(spec.capacity_margin * len(receivers)))
        search = search._replace(candidates=room)
    if backend == "nvalchemi":
        most = int(np.bincount(receivers, minlength=1).max())
        slots = _whole_words(math.ceil(spec.capacity_margin * most))
        search = nvalchemi.plan_bins(search._replace(slots=slots), outer, positions, cell)
    fewest, most = (
        int(np.count_nonzero(edges.lengths < spec.cutoff * (1.0 + sign * BAND)))
        for sign in (-1.0, 1.0)
    )
    return SearchPlan(search, fewest, most)


def _whole_words(slots: int) -> int:
    return max(1, -(-slots // LANES)) * LANES


def check_size(search: Search, n_nodes: int) -> None:
    """Refuse a search that int32 could not index.

    Args:
        search: of which ``backend``, ``reach`` and ``slots`` are read.
        n_nodes: atoms, or nodes where padding is searched too.

    Raises:
        CapacityError: if there are too many candidates.
    """
    if search.backend == "dense":
        size = n_nodes**2 * _window(search.reach, 3)
    else:
        size = n_nodes * _window(search.reach, 2) * max(search.slots, 1)
    if size > MAX_EDGES:
        raise CapacityError(
            f"{n_nodes} atoms have {size} candidates to try (backend {search.backend!r}, reach "
            f"{search.reach}, {search.slots} slots), more than {MAX_EDGES}; use a smaller system, "
            "or backend='vesin'"
        )


def grow_search(search: Search, needs: Needs) -> Search:
    """A search with the capacities that are needed; each growth is logged.

    Args:
        search: whose ``reach``, ``slots`` and ``candidates`` grow; none ever shrinks.
        needs: of a list, on the host.

    Raises:
        CapacityError: if int32 could not count them.
    """
    slots, candidates = int(needs.slots), int(needs.candidates)
    needed = np.asarray(needs.reach, np.int64)
    # In steps of a quarter: a few thin bins more are cheaper than to compile for each.
    reach = np.where(needed > search.reach, needed + needed // 4, search.reach)
    new = search._replace(
        reach=(int(reach[0]), int(reach[1]), int(reach[2])),
        slots=_whole_words(ladder(slots)) if slots > search.slots else search.slots,
        candidates=ladder(candidates) if candidates > search.candidates else search.candidates,
    )
    needed_by = {"reach": needed.tolist(), "slots": slots, "candidates": candidates}
    for what, need in needed_by.items():
        if getattr(new, what) != getattr(search, what):
            _log_growth(what, getattr(search, what), getattr(new, what), need)
    return new


class DeviceList:
    """The list of one system on one device: how it is searched, what it needed, what is kept.

    Everything is used within the context of the precision that is computed in. One thread at a
    time may use a list: what is kept of a step is taken over by the next.

    Attributes:
        search: how the device searches.
        edges: edges to make room for.
        kept: the longer list of a skin, on the device, or None to start anew.

    Args:
        spec, backend, positions, cell, pbc: as for ``plan_search``, whose errors are raised.
        capacities: shapes that are compiled, shared by all that run the same step.
        dtype: of the positions on the device.
        device: where the list is made.
    """

    def __init__(
        self,
        spec: NeighborSpec,
        backend: str,
        positions: Float64,
        cell: Float64,
        pbc: Bool,
        *,
        capacities: Capacities,
        dtype: np.dtype[Any],
        device: jax.Device,
    ) -> None:
        with jax.default_device(device):
            plan = plan_search(spec, backend, positions, cell, pbc)
        self.search, self.edges = plan.search, plan.most
        self.kept: Kept | None = None
        self._plan: SearchPlan | None = plan
        self._n_atoms, self._margin = len(positions), spec.capacity_margin
        self._capacities, self._dtype, self._device = capacities, dtype, device

    def find(
        self, step: Callable[[Shape, Kept | None], tuple[T, Needs, Kept | None]]
    ) -> tuple[T, Shape]:
        """Run a step until its list fits.

        Args:
            step: makes the list of the present positions in a shape, from what the step before
                kept, and gives back its result, the list's needs on the host, and what to keep.

        Returns:
            The result of the step whose list was complete, and the shape that it ran in.

        Raises:
            StructureError: if positions or cell are not finite there, or span no volume.
            NeighborError: if the first list contradicts the host's.
            CapacityError: if the list is too large.
        """
        for _ in range(MAX_GROWTHS):
            search = self.search
            check_size(search, ladder(self._n_atoms + 1))
            shape = self._capacities.choose(self._n_atoms, self.edges, 1, self._margin, search)
            kept, self.kept = self.kept, None
            if kept is None:
                kept = nothing_kept(shape.nodes, search, self._dtype, self._device)
            result, needs, kept = step(shape, kept)
            self._learn(needs)
            self.kept = kept if self.search == search else None
            if needs.fit(search, shape.edges):
                if self._plan is not None:
                    self._plan.check(int(needs.edges))
                    self._plan = None
                return result, shape
        raise CapacityError(
            f"the neighbor list did not fit after {MAX_GROWTHS} growths; it needs "
            f"{self.edges} edges and {self.search}; use backend='vesin'"
        )

    def _learn(self, needs: Needs) -> None:
        """Make room for what a step needed."""
        if not needs.finite:
            raise StructureError(
                f"positions or cell are not finite in {self._dtype}, or the cell has no volume "
                "there; an earlier step blew up, or the units are not Å"
            )
        self.search, needed = grow_search(self.search, needs), int(needs.edges)
        if not needed <= self.edges <= MAX_WASTE * needed:
            self.edges = needed  # else the capacity stays: a number that breathes fits again
