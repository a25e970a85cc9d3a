"""Part a data set into training, validation and test structures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mlip_md.errors import DataError

PARTS = ("train", "validation", "test")


def split_groups(
    groups: Sequence[str], fractions: Sequence[float], seed: int, by: str = "group"
) -> np.ndarray:
    """Part structures at random into training, validation and test sets.

    Args:
        groups: (n,) name of each structure's molecule.
        fractions: of structures in training, validation and (0 if left out) test set; their sum
            is 1 up to rounding. By structure, sizes are exact to the nearest whole number; by
            group they are as near as whole groups allow.
        seed: the split depends on it and on the groups' names only, not on the order of groups.
        by: "group" keeps all structures of a molecule in one part, so that validation and test
            errors are about molecules never seen; "structure" parts single structures.

    Returns:
        (n,) int64, the part of each structure: 0 train, 1 validation, 2 test.

    Raises:
        DataError: if fractions are impossible, or there are fewer groups than parts to fill.
    """
    shares = _check_fractions(fractions)
    if by not in ("group", "structure"):
        raise DataError(f"by = {by!r} is not known; split by 'group' or by 'structure'")
    group = np.arange(len(groups))
    if by == "group":
        _, group = np.unique(groups, return_inverse=True)
    return _assign(group, shares, seed, by)


def _check_fractions(fractions: Sequence[float]) -> np.ndarray:
    shares = np.asarray(fractions, np.float64)
    if shares.shape not in ((2,), (3,)) or not np.isfinite(shares).all() or (shares < 0).any():
        raise DataError(
            f"fractions = {list(fractions)} must be two or three numbers of at least 0: "
            f"{', '.join(PARTS)}"
        )
    if abs(shares.sum() - 1.0) > 1e-6:
        raise DataError(
            f"fractions = {list(fractions)} sum to {shares.sum():g}; they must sum to 1"
        )
    return np.append(shares, 0.0)[:3]


def _assign(group: np.ndarray, shares: np.ndarray, seed: int, by: str) -> np.ndarray:
    """Part index of every structure from its group index."""
    sizes = np.bincount(group)
    filled = np.flatnonzero(shares > 0)
    if len(sizes) < len(filled):
        hint = "; split by 'structure' (data.split.by) to part conformers" * (by == "group")
        raise DataError(
            f"{len(sizes)} {by}s cannot fill {len(filled)} parts ("
            f"{', '.join(PARTS[p] for p in filled)}){hint}"
        )
    order = np.random.default_rng(seed).permutation(len(sizes))
    counts = np.concatenate([[0], np.cumsum(sizes[order])])
    targets = np.cumsum(shares[filled])[:-1] * counts[-1]
    cuts = [0]
    for done, target in enumerate(targets):
        lowest = cuts[-1] + 1
        highest = len(sizes) - (len(filled) - done - 1)
        nearest = int(np.argmin(np.abs(counts - target)))
        cuts.append(min(max(nearest, lowest), highest))
    part_of_group = np.empty(len(sizes), np.int64)
    for p, start, stop in zip(filled, cuts, [*cuts[1:], len(sizes)], strict=True):
        part_of_group[order[start:stop]] = p
    return part_of_group[group]
