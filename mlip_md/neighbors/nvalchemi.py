"""Neighbor lists on a GPU by NVIDIA's nvalchemi-toolkit-ops, the extra ``nvalchemi``.

Its cell list is a few times faster than ours on a GPU. It has shipped wrong lists more than once,
so it is trusted only after it has reproduced lists of the dense search in this process, and its
rows report how many neighbors they needed like every other capacity here.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlip_md.compiler import jit
from mlip_md.errors import ConfigError
from mlip_md.neighbors.dense import dense_pairs
from mlip_md.neighbors.geometry import Bool, Float64
from mlip_md.neighbors.search import Pairs, Search, axes_frame, padded_pairs, project, true_entries

logger = logging.getLogger(__name__)

MODULE = "nvalchemiops"


def plan_bins(search: Search, cutoff: float, positions: Float64, cell: Float64) -> Search:
    """A search with the capacities that the package needs, besides ``slots``.

    Raises:
        ConfigError: if it is not installed.
    """
    if importlib.util.find_spec(MODULE) is None:
        raise ConfigError(
            "backend='nvalchemi' needs nvalchemi-toolkit-ops; pip install 'mlip-md[nvalchemi]', or "
            "take backend='cells'"
        )
    volume = abs(float(np.linalg.det(cell))) if all(search.pbc) else float(len(positions))
    bins = 64 + min(2 * math.ceil(volume / cutoff**3), 8 * len(positions))
    return search._replace(atoms=len(positions), bins=bins)


def nvalchemi_pairs(
    positions: jax.Array,
    cell: jax.Array,
    n_atoms: jax.Array | int,  # noqa: ARG001 (as every backend has it)
    search: Search,
    cutoff: float,
    capacity: int,
) -> Pairs:
    """All pairs, a ``search.Builder``; reads ``pbc``, ``atoms``, ``slots``, ``bins``.

    ``search.atoms`` is the static number of atoms, the same as ``n_atoms``.
    """
    from nvalchemiops.jax.neighbors.cell_list import cell_list

    atoms, box = _boxed(positions[: search.atoms], cell, search, cutoff)
    neighbors, counts, shifts = cell_list(
        atoms,
        cutoff,
        cell=box[None],
        pbc=jnp.array([search.pbc]),
        max_neighbors=search.slots,
        max_total_cells=search.bins,
        strategy="atom_centric",  # the other needs a GPU, and is chosen under vmap on a CPU too
    )
    filled = jnp.arange(search.slots)[None] < counts[:, None]
    index, valid, count = true_entries(filled, capacity)
    receivers, senders = index // search.slots, neighbors.reshape(-1)[index]
    shifts = jnp.where(jnp.array([search.pbc]), -shifts.reshape(-1, 3)[index], 0)
    needed = jnp.max(counts, initial=0)
    count = jnp.where(needed > search.slots, jnp.sum(counts), count)
    return padded_pairs(senders, receivers, shifts, valid, count, len(positions), slots=needed)


def _boxed(
    positions: jax.Array, cell: jax.Array, search: Search, cutoff: float
) -> tuple[jax.Array, jax.Array]:
    """Positions and a cell around them: open axes get a vector as long as the structure."""
    if all(search.pbc):
        return positions, cell
    rows = axes_frame(cell, search.pbc)
    places = project(positions, rows)
    low, high = jnp.min(places, axis=0), jnp.max(places, axis=0)
    periodic = jnp.array(search.pbc)[:, None]
    box = jnp.where(periodic, cell, rows * (high - low + cutoff)[:, None])
    corner = jnp.sum(jnp.where(periodic, 0, low[:, None] * rows), axis=0, keepdims=True)
    return positions - corner, box


@functools.cache
def trusted() -> bool:
    """Whether the package is there and has just given the same lists as the dense search."""
    if importlib.util.find_spec(MODULE) is None:
        return False
    try:
        wrong: list[Any] = [p for p in (np.ones(3, bool), np.arange(3) < 2) if not _agrees(p)]
    except Exception as error:  # whatever a foreign extension does, we can do without it
        wrong = [error]
    if wrong:
        logger.warning("nvalchemi-toolkit-ops fails its self-check and is not used: %s", wrong)
    return not wrong


def _agrees(pbc: Bool) -> bool:
    """Compare the two on 200 atoms in and around a triclinic cell."""
    cell = np.array([[13.0, 0.0, 0.0], [4.0, 12.0, 0.0], [-3.0, 5.0, 14.0]], np.float32)
    rng = np.random.default_rng(0)
    positions = (rng.uniform(-1.5, 2.5, (200, 3)) @ cell).astype(np.float32)
    axes = (bool(pbc[0]), bool(pbc[1]), bool(pbc[2]))
    search = Search("", 5.0, axes, reach=(1, 1, 1), slots=256, atoms=200, bins=512)
    found = []
    for build in (dense_pairs, nvalchemi_pairs):
        function = jit(build, static_argnums=(3, 4, 5))
        pairs = jax.device_get(function(positions, cell, 200, search, 5.0, 20_000))
        columns = pairs.senders, pairs.receivers, *pairs.shifts.T
        edges = np.column_stack(columns)[pairs.mask].astype(np.int64)
        vectors = positions[edges[:, 1]] - positions[edges[:, 0]] + edges[:, 2:] @ cell
        inside = np.linalg.norm(vectors, axis=1) < 5.0 * (1 - 1e-4)  # at the cutoff both are right
        found.append({tuple(edge) for edge in edges[inside].tolist()})
        if pairs.n_pairs > 20_000 or len(found[-1]) < inside.sum():
            return False
    return found[0] == found[1]
