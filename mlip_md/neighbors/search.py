"""What every search on the device is told, what it gives back, and the lattice it works on."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Three = tuple[int, int, int]

LANES = 32
"""Bits of a word; masks whose last axis is a multiple of it are packed without a copy."""
ROUNDING_SLACK = 1e-4
"""Fractional coordinates may be rounded to the wrong side by this much in float32."""


class Search(NamedTuple):
    """Static part of a search on the device: what to find, and in which capacities.

    Attributes:
        backend: "dense", "cells" or "nvalchemi".
        cutoff: Å.
        pbc: periodicity of the axes.
        reach: images ("dense") or bins ("cells") searched to either side; zero if not needed.
        grid: bins per axis ("cells").
        slots: candidates of an atom in one column of bins ("cells"), neighbors of an atom
            ("nvalchemi").
        skin: Å, candidates are kept up to cutoff + skin; 0 keeps none.
        candidates: capacity of that longer list.
        atoms: number of atoms, without padding ("nvalchemi").
        bins: capacity in bins ("nvalchemi").
    """

    backend: str
    cutoff: float
    pbc: tuple[bool, bool, bool]
    reach: Three = (0, 0, 0)
    grid: Three = (1, 1, 1)
    slots: int = 0
    skin: float = 0.0
    candidates: int = 0
    atoms: int = 0
    bins: int = 0

    @property
    def axes(self) -> np.ndarray:
        """Indices of the periodic axes."""
        return np.flatnonzero(np.array(self.pbc))


class Pairs(NamedTuple):
    """Pairs in a fixed capacity, sorted by receiver, and what a complete list would have needed.

    Attributes:
        senders: (capacity,) int32; padding is the last node.
        receivers: (capacity,) int32, ascending; padding is the last node.
        shifts: (capacity, 3) int32, of the positions as given; padding is zero.
        mask: (capacity,) bool, False on padding.
        n_pairs: () int32, pairs that exist.
        reach: (3,) int32, the reach that the search needs.
        slots: () int32, the slots that it needs.
    """

    senders: jax.Array
    receivers: jax.Array
    shifts: jax.Array
    mask: jax.Array
    n_pairs: jax.Array
    reach: jax.Array
    slots: jax.Array


Builder = Callable[[jax.Array, jax.Array, jax.Array | int, Search, float, int], Pairs]
"""A backend, ``build(positions, cell, n_atoms, search, cutoff, capacity)``: finds all pairs.

It is pure, for use under ``jit`` with static search, cutoff and capacity.

Args:
    positions: (n_nodes, 3) Å, rows from ``n_atoms`` on are padding and get no pair.
    cell: (3, 3) Å, rows are lattice vectors; those of open axes are not read.
    n_atoms: number of atoms.
    search: of which each backend says what it reads.
    cutoff: Å.
    capacity: pairs to make room for.

Returns:
    The pairs; complete only if ``n_pairs`` is within ``capacity``, and ``reach`` and ``slots``
    within those of the search.
"""


def padded_pairs(
    senders: jax.Array,
    receivers: jax.Array,
    shifts: jax.Array,
    valid: jax.Array,
    count: jax.Array,
    n_nodes: int,
    reach: jax.Array | Three = (0, 0, 0),
    slots: jax.Array | int = 0,
) -> Pairs:
    """Pairs whose invalid rows are made padding.

    Args:
        senders: (capacity,) int32, of what the search found, in the order of the receivers.
        receivers: (capacity,) int32.
        shifts: (capacity, 3) int32.
        valid: (capacity,) bool, which rows are pairs.
        count: () int32, pairs that exist, whatever the capacity.
        n_nodes: nodes, padding included; the last one is padding.
        reach: (3,), what the search needs.
        slots: (), what the search needs.

    Returns:
        The same, as ``Pairs``.
    """
    return Pairs(
        jnp.where(valid, senders, n_nodes - 1),
        jnp.where(valid, receivers, n_nodes - 1),
        jnp.where(valid[:, None], shifts, 0),
        valid,
        count,
        jnp.asarray(reach, jnp.int32),
        jnp.asarray(slots, jnp.int32),
    )


def true_entries(mask: jax.Array, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Flat indices of a mask's true entries, in order.

    The mask is packed into words of bits inside the loop that computes it, so that it never exists
    in memory, and every entry then looks up its own word and bit: no scatter over the candidates.

    Args:
        mask: bool, any shape of fewer than 2³¹ entries.
        capacity: indices to return.

    Returns:
        Indices (capacity,) int32, which of them are valid (capacity,), and () the number of true
        entries, whatever the capacity.
    """
    words = _to_words(mask)
    counts = jax.lax.population_count(words).astype(jnp.int32)
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    entry = jnp.arange(capacity, dtype=jnp.int32)
    numbers = jnp.arange(words.size, dtype=jnp.int32)
    word = jnp.repeat(numbers, counts, total_repeat_length=capacity)
    bit = _nth_bit(words[word], entry - (ends - counts)[word])
    # Without a barrier XLA repeats all of this in each use of the indices.
    found = word * LANES + bit, entry < ends[-1], ends[-1]
    index, valid, count = jax.lax.optimization_barrier(found)
    return index, valid, count


def _to_words(mask: jax.Array) -> jax.Array:
    flat = mask.reshape(-1)
    lanes = jnp.pad(flat, (0, -flat.size % LANES)).reshape(-1, LANES)
    values = jnp.uint32(1) << jnp.arange(LANES, dtype=jnp.uint32)
    return jnp.sum(jnp.where(lanes, values, jnp.uint32(0)), axis=1, dtype=jnp.uint32)


def _nth_bit(words: jax.Array, n: jax.Array) -> jax.Array:
    """Position of the n-th (from 0) set bit, halving the search range in every round."""
    position = jnp.zeros_like(n)
    width = LANES // 2
    while width:
        below = jax.lax.population_count(words & jnp.uint32((1 << width) - 1)).astype(jnp.int32)
        higher = n >= below
        n = jnp.where(higher, n - below, n)
        words = jnp.where(higher, words >> width, words)
        position = jnp.where(higher, position + width, position)
        width //= 2
    return position


def cross(u: jax.Array, v: jax.Array) -> jax.Array:
    """Cross product (3,) of two vectors (3,), in the product of their units."""
    return jnp.stack(
        [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]
    )


def dual(vectors: jax.Array) -> jax.Array:
    """Dual basis of up to three lattice vectors, without a factorisation.

    Args:
        vectors: (p, 3) Å, rows, p from 0 to 3.

    Returns:
        (p, 3) 1/Å, rows b_k with a_j · b_k = δ_jk in the span of the vectors; not finite if they
        are linearly dependent.
    """
    if len(vectors) == 0:
        return vectors
    if len(vectors) == 1:
        return vectors / jnp.sum(vectors**2)
    a, b = vectors[0], vectors[1]
    normal = cross(a, b)
    if len(vectors) == 2:
        return jnp.stack([cross(b, normal), cross(normal, a)]) / jnp.sum(normal**2)
    c = vectors[2]
    return jnp.stack([cross(b, c), cross(c, a), normal]) / jnp.sum(normal * c)


def axes_frame(cell: jax.Array, pbc: tuple[bool, bool, bool]) -> jax.Array:
    """Rows that project positions on axes: dual vectors of periodic, unit normals of open ones.

    Args:
        cell: (3, 3) Å, rows are lattice vectors; those of open axes are not read.
        pbc: periodicity of the axes.

    Returns:
        (3, 3), in the order of the axes: 1/Å in rows of periodic axes (a projection is a fraction),
        without unit in rows of open ones (a projection is in Å).
    """
    periodic = np.array(pbc)
    vectors = cell[np.flatnonzero(periodic)]
    if periodic.all():
        return dual(vectors)
    if not periodic.any():
        return jnp.eye(3, dtype=cell.dtype)
    if len(vectors) == 2:
        normals = cross(vectors[0], vectors[1])[None]
    else:
        least = jnp.eye(3, dtype=cell.dtype)[jnp.argmin(jnp.abs(vectors[0]))]
        normal = cross(vectors[0], least)
        normals = jnp.stack([normal, cross(vectors[0], normal)])
    normals = normals / jnp.linalg.norm(normals, axis=1, keepdims=True)
    order = np.argsort(np.argsort(~periodic, kind="stable"))
    return jnp.concatenate([dual(vectors), normals])[order]


def project(positions: jax.Array, rows: jax.Array) -> jax.Array:
    """``positions @ rows.T`` as sums: matrix units would round it to ten bits.

    Args:
        positions: (…, 3) Å.
        rows: (p, 3), any unit.

    Returns:
        (…, p), Å times that unit.
    """
    return jnp.sum(positions[..., None, :] * jnp.expand_dims(rows, range(positions.ndim - 1)), -1)


def combine(counts: jax.Array, vectors: jax.Array) -> jax.Array:
    """Σ_k counts[..., k] vectors[k], as sums for the same reason.

    Args:
        counts: (…, p), without unit, of the type of the vectors.
        vectors: (p, 3) Å.

    Returns:
        (…, 3) Å; zeros (1, …, 3) that broadcast where p is 0.
    """
    shape = (1,) * (counts.ndim - 1) + (3,)
    return sum(
        (counts[..., k, None] * vectors[k].reshape(shape) for k in range(len(vectors))),
        start=jnp.zeros(shape, vectors.dtype),
    )
