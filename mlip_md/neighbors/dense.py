"""Neighbour lists on the device by trying all pairs: the fastest way up to some 1,500 atoms.

Every pair is first brought to its nearest lattice translation along each axis, by rounding its
fractional difference; a window of images around that one then covers cells smaller than twice the
cutoff. The shifts found are those of the positions as given, wherever the atoms are.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Images = tuple[int, int, int]

ROUNDING_SLACK = 1e-4
"""Fractional differences may round to the wrong side by this much in float32."""


class DenseEdges(NamedTuple):
    """Edges in a fixed capacity, sorted by receiver, and what an exact list would have needed.

    Attributes:
        senders: (capacity,) int32; padding is the last node.
        receivers: (capacity,) int32, ascending; padding is the last node.
        shifts: (capacity, 3) int32; padding is zero.
        edge_mask: (capacity,) bool.
        required_edges: () int32, edges that exist.
        required_images: (3,) int32, images that must be searched to either side.
        shortest: () Å, length of the shortest edge; infinite without edges.
        finite: () bool, whether positions and cell are finite and span a lattice.
    """

    senders: jax.Array
    receivers: jax.Array
    shifts: jax.Array
    edge_mask: jax.Array
    required_edges: jax.Array
    required_images: jax.Array
    shortest: jax.Array
    finite: jax.Array


def required_images(cutoff: float, spacings: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Images to search to either side of the nearest one, for planes ``spacings`` (Å) apart.

    A pair at fractional difference f, |f| <= 1/2 after rounding, is within the cutoff of its image
    S only if |f + S| < cutoff / spacing.
    """
    xp = np if isinstance(spacings, np.ndarray) else jnp
    return xp.ceil(cutoff / spacings + ROUNDING_SLACK - 0.5).astype(np.int32)


def _cross(u: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.stack(
        [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]
    )


def _dual(vectors: jax.Array) -> jax.Array:
    """Dual basis of one, two or three lattice vectors, without a factorisation."""
    if len(vectors) == 1:
        return vectors / jnp.sum(vectors**2)
    a, b = vectors[0], vectors[1]
    normal = _cross(a, b)
    if len(vectors) == 2:
        return jnp.stack([_cross(b, normal), _cross(normal, a)]) / jnp.sum(normal**2)
    c = vectors[2]
    return jnp.stack([_cross(b, c), _cross(c, a), normal]) / jnp.sum(normal * c)


def _combine(counts: jax.Array, vectors: jax.Array) -> jax.Array:
    """Σ_k counts[..., k] vectors[k], as sums: matrix units would round the cell to ten bits."""
    return sum(
        (counts[..., k, None] * vectors[k] for k in range(len(vectors))),
        start=jnp.zeros(3, vectors.dtype),
    )


def dense_edges(
    positions: jax.Array,
    cell: jax.Array,
    n_atoms: jax.Array | int,
    *,
    cutoff: float,
    pbc: tuple[bool, bool, bool],
    images: Images,
    capacity: int,
) -> DenseEdges:
    """Find all edges; pure, for use under ``jit`` with static keyword arguments.

    Args:
        positions: (n_nodes, 3) Å, rows from ``n_atoms`` on are padding and get no edge.
        cell: (3, 3) Å, rows are lattice vectors; those of open axes are not read.
        n_atoms: number of atoms.
        cutoff: Å.
        pbc: periodicity of the axes.
        images: images searched to either side of the nearest one; zero along open axes.
        capacity: edges to make room for.

    Returns:
        The edges. They are complete only if ``required_edges`` and ``required_images`` are within
        ``capacity`` and ``images``, and ``finite`` is true.
    """
    n_nodes = positions.shape[0]
    axes = [axis for axis in range(3) if pbc[axis]]
    windows = list(itertools.product(*(range(-images[axis], images[axis] + 1) for axis in axes)))
    window = np.array(windows, np.int32).reshape(len(windows), len(axes))
    nearest, squares = _image_distances(positions, cell[np.array(axes, int)], window)
    real = jnp.arange(n_nodes) < n_atoms
    itself = np.eye(n_nodes, dtype=bool)[:, :, None] & (window == 0).all(axis=1)
    near = (squares < cutoff**2) & ~itself & (real[:, None] & real[None, :])[:, :, None]
    chosen, valid, count = _compact(near, capacity)
    pair, image = chosen // len(window), chosen % len(window)
    shifts = jnp.zeros((capacity, 3), jnp.int32)
    if axes:
        found = nearest.reshape(-1, len(axes))[pair] + jnp.asarray(window)[image]
        shifts = shifts.at[:, np.array(axes)].set(jnp.where(valid[:, None], found, 0))
    needed = jnp.zeros(3, jnp.int32)
    spans = jnp.asarray(True)
    if axes:
        dual = _dual(cell[np.array(axes)])
        spacings = 1.0 / jnp.sqrt(jnp.sum(dual**2, axis=1))
        spans = jnp.isfinite(spacings).all() & (spacings > 0).all()
        needed = needed.at[np.array(axes)].set(required_images(cutoff, spacings))
    return DenseEdges(
        jnp.where(valid, pair % n_nodes, n_nodes - 1),
        jnp.where(valid, pair // n_nodes, n_nodes - 1),
        shifts,
        valid,
        count,
        needed,
        jnp.sqrt(jnp.min(jnp.where(near, squares, jnp.inf))),
        spans & jnp.isfinite(positions).all(),
    )


def _image_distances(
    positions: jax.Array, vectors: jax.Array, window: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Nearest lattice shifts (receiver, sender, axis) and squared distances (…, image) there."""
    differences = positions[:, None] - positions[None, :]
    if len(vectors) == 0:
        return jnp.zeros((*differences.shape[:2], 0), jnp.int32), jnp.sum(
            differences**2, axis=-1, keepdims=True
        )
    dual = _dual(vectors)
    fractions = jnp.sum(differences[:, :, None] * dual, axis=-1)
    nearest = -jnp.round(fractions)
    differences = differences + _combine(nearest, vectors)
    offsets = _combine(jnp.asarray(window, vectors.dtype), vectors)
    squares = jnp.sum((differences[:, :, None] + offsets) ** 2, axis=-1)
    return nearest.astype(jnp.int32), squares


def _compact(mask: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Flat indices (capacity,) of the true entries in order, which of them are valid, how many."""
    flat = mask.reshape(-1)
    running = jnp.cumsum(flat, dtype=jnp.int32)
    target = jnp.where(flat, running - 1, capacity)  # out of range is dropped
    index = (
        jnp.zeros(capacity, jnp.int32)
        .at[target]
        .set(jnp.arange(flat.size, dtype=jnp.int32), mode="drop")
    )
    return index, jnp.arange(capacity) < running[-1], running[-1]


dense_edges_jit = jax.jit(dense_edges, static_argnames=("cutoff", "pbc", "images", "capacity"))
"""``dense_edges``, compiled once per shape and static argument for the whole process."""
