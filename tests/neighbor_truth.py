"""Neighbors by brute force, independent of the package: every image of every pair, in float64."""

import itertools
from collections import Counter

import numpy as np


def brute_force(positions, cell, pbc, cutoff):
    """Rows (i, j, S0, S1, S2) of all pairs and their distances, in ASE's convention.

    The images are enumerated around each pair's own difference vector, whose fractions are
    rounded to within 1/2: along axis k a pair needs |fraction + S| < reach = cutoff * |dual k|, so
    |S| < reach + 1/2, and all |S| <= reach + 1 are walked.
    """
    positions = np.asarray(positions, float).reshape(-1, 3)
    n = len(positions)
    pbc = np.broadcast_to(np.asarray(pbc, bool), 3)
    axes = np.flatnonzero(pbc)
    if n == 0:
        return np.zeros((0, 5), int), np.zeros(0)
    vectors = np.asarray(cell, float)[axes] if len(axes) else np.zeros((0, 3))
    dual = np.linalg.pinv(vectors).T if len(axes) else np.zeros((0, 3))
    reach = cutoff * np.linalg.norm(dual, axis=1)
    difference = positions[None] - positions[:, None]
    fraction = difference @ dual.T
    middle = -np.rint(fraction)
    steps = [range(-int(r + 1), int(r + 1) + 1) for r in reach]
    rows, lengths = [], []
    for step in itertools.product(*steps):
        shift = middle + np.array(step, float)
        length = np.linalg.norm(difference + shift @ vectors, axis=-1)
        near = (length < cutoff) & ~(np.eye(n, dtype=bool) & (shift == 0).all(axis=-1))
        i, j = np.nonzero(near)
        full = np.zeros((len(i), 3), int)
        full[:, axes] = shift[i, j].astype(int)
        rows.append(np.column_stack([i, j, full]))
        lengths.append(length[i, j])
    return np.concatenate(rows), np.concatenate(lengths)


def compare(found, positions, cell, pbc, cutoff, band=1e-9):
    """Missing, extra and duplicate edges of ``found`` = (i, j, S); pairs in the band are free.

    A pair whose length is within ``band`` (relative) of the cutoff may be listed or not.
    """
    i, j, S = (np.asarray(part) for part in found)
    listed = Counter(map(tuple, np.column_stack([i, j, S]).astype(int).tolist()))
    inner = Counter(map(tuple, brute_force(positions, cell, pbc, cutoff * (1 - band))[0].tolist()))
    outer = Counter(map(tuple, brute_force(positions, cell, pbc, cutoff * (1 + band))[0].tolist()))
    missing = sum((inner - listed).values())
    extra = sum((listed - outer).values())
    duplicates = sum(count - 1 for count in listed.values())
    return missing, extra, duplicates
