"""Part a data set into training, validation and test structures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from mlip_md.constants import SPLITS
from mlip_md.errors import DataError
from mlip_md.trainer.recipe.schema import SplitConfig


def split_groups(
    groups: Sequence[str], split: SplitConfig, own_files: Sequence[str] = ()
) -> np.ndarray:
    """Part structures at random into training, validation and test sets.

    By structure, sizes are exact to the nearest whole number; by group they are as near as whole
    groups allow. The result depends on the seed and the groups' names, not on the order of groups.

    Args:
        groups: (n,) name of each structure's molecule.
        split: fractions of the parts, their unit and the seed.
        own_files: parts that have files of their own; their fraction goes to training.

    Returns:
        (n,) int64, the part of each structure: 0 train, 1 validation, 2 test.

    Raises:
        DataError: if there are fewer groups than parts to fill.
    """
    shares = np.array([split.train, split.validation, split.test])
    for part, name in enumerate(SPLITS):
        if name in own_files:
            shares[[0, part]] = shares[0] + shares[part], 0.0
    group = np.arange(len(groups))
    if split.by == "group":
        # not np.unique, whose array of text has room for the longest name in every row
        place = {name: k for k, name in enumerate(sorted({*groups}))}
        group = np.array([place[name] for name in groups], np.int64)
    return _assign(group, shares, split)


def _assign(group: np.ndarray, shares: np.ndarray, split: SplitConfig) -> np.ndarray:
    """Part index of every structure from its group index."""
    sizes = np.bincount(group)
    filled = np.flatnonzero(shares > 0)
    if len(sizes) < len(filled):
        hint = "; split by 'structure' (data.split.by) to part conformers"
        raise DataError(
            f"{len(sizes)} {split.by}s cannot fill {len(filled)} parts ("
            f"{', '.join(SPLITS[p] for p in filled)}){hint if split.by == 'group' else ''}"
        )
    order = np.random.default_rng(split.seed).permutation(len(sizes))
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


def find_overlap(groups: Sequence[str], part: np.ndarray) -> list[str]:
    """What parts have in common, a line for each pair of parts that share a molecule.

    Args:
        groups: (n,) name of each structure's molecule.
        part: (n,) as ``split_groups`` gives it.
    """
    kinds = [{groups[k] for k in np.flatnonzero(part == p).tolist()} for p in range(len(SPLITS))]
    lines = []
    for one, other in itertools.combinations(range(len(SPLITS)), 2):
        shared = sorted(kinds[one] & kinds[other])
        if shared:
            lines.append(
                f"{len(shared)} of {len(kinds[other])} molecules in {SPLITS[other]} are also in "
                f"{SPLITS[one]}, e.g. {shared[0]}"
            )
    return lines
