"""Neighbor lists on the device by trying all pairs: the fastest way up to some 1,500 atoms.

Every pair is first brought to its nearest lattice translation along each axis, by rounding its
fractional difference; a window of images around that one then covers cells smaller than twice the
cutoff. The shifts found are those of the positions as given, wherever the atoms are.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from mlip_md.neighbors.search import (
    ROUNDING_SLACK,
    Pairs,
    Search,
    combine,
    dual,
    padded_pairs,
    project,
    true_entries,
)


def required_images(cutoff: float, spacings: np.ndarray | jax.Array) -> np.ndarray | jax.Array:
    """Images to search to either side of the nearest one, for planes ``spacings`` (Å) apart.

    A pair at fractional difference f, |f| <= 1/2 after rounding, is within the cutoff of its image
    S only if |f + S| < cutoff / spacing.

    Args:
        cutoff: Å.
        spacings: (p,) Å, of the p periodic axes.

    Returns:
        (p,) int32, of the kind of array that the spacings are.
    """
    xp = np if isinstance(spacings, np.ndarray) else jnp
    return xp.ceil(cutoff / spacings + ROUNDING_SLACK - 0.5).astype(np.int32)


def dense_pairs(
    positions: jax.Array,
    cell: jax.Array,
    n_atoms: jax.Array | int,
    search: Search,
    cutoff: float,
    capacity: int,
) -> Pairs:
    """All pairs, a ``search.Builder``; reads ``pbc``, ``reach``."""
    n_nodes = positions.shape[0]
    axes = search.axes
    sides = (range(-search.reach[axis], search.reach[axis] + 1) for axis in axes)
    windows = list(itertools.product(*sides))
    window = np.array(windows, np.int32).reshape(len(windows), len(axes))
    vectors = cell[axes]
    nearest, squares = _image_distances(positions, vectors, window)
    real = jnp.arange(n_nodes) < n_atoms
    itself = np.eye(n_nodes, dtype=bool)[:, :, None] & (window == 0).all(axis=1)
    near = (squares < cutoff**2) & ~itself & (real[:, None] & real[None, :])[:, :, None]
    chosen, valid, count = true_entries(near, capacity)
    pair, image = chosen // len(window), chosen % len(window)
    shifts = jnp.zeros((capacity, 3), jnp.int32)
    needed = jnp.zeros(3, jnp.int32)
    if len(axes):
        found = nearest.reshape(-1, len(axes))[pair] + jnp.asarray(window)[image]
        shifts = shifts.at[:, axes].set(found)
        spacings = 1.0 / jnp.sqrt(jnp.sum(dual(vectors) ** 2, axis=1))
        needed = needed.at[axes].set(required_images(cutoff, spacings))
    return padded_pairs(pair % n_nodes, pair // n_nodes, shifts, valid, count, n_nodes, needed)


def _image_distances(
    positions: jax.Array, vectors: jax.Array, window: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Nearest lattice shifts (receiver, sender, axis) and squared distances (…, image) there."""
    differences = positions[:, None] - positions[None, :]
    nearest = -jnp.round(project(differences, dual(vectors)))
    differences = differences + combine(nearest, vectors)
    offsets = combine(jnp.asarray(window, vectors.dtype), vectors)
    squares = jnp.sum((differences[:, :, None] + offsets[None, None]) ** 2, axis=-1)
    return nearest.astype(jnp.int32), squares
