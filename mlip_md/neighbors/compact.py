"""From a mask over all candidates to the list of those that are true."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LANES = 32
"""Bits of a word; masks whose last axis is a multiple of it are packed without a copy."""


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
    words = _pack(mask)
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


def _pack(mask: jax.Array) -> jax.Array:
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
