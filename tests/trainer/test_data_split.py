"""Splits: exact sizes, empty parts where asked, no molecule in two parts."""

import itertools
import tracemalloc

import numpy as np
import pydantic
import pytest

from mlip_md.errors import DataError
from mlip_md.trainer.data.split import split_groups
from mlip_md.trainer.recipe import SplitConfig


def config(fractions, seed=0, by="group"):
    train, validation, test = (*fractions, 0.0)[:3]
    return SplitConfig(train=train, validation=validation, test=test, seed=seed, by=by)


def split(groups, fractions, seed, by="group"):
    """Indices of the structures of each part."""
    part = split_groups(groups, config(fractions, seed, by))
    return [np.flatnonzero(part == k).tolist() for k in range(3)]


@pytest.mark.parametrize(
    ("fractions", "sizes"),
    [
        ((0.9, 0.1, 0.0), (90, 10, 0)),
        ((0.7, 0.2, 0.1), (70, 20, 10)),
        ((0.8, 0.2), (80, 20, 0)),
        ((1.0, 0.0, 0.0), (100, 0, 0)),
        ((0.5, 0.0, 0.5), (50, 0, 50)),
        ((1 / 3, 1 / 3, 1 / 3), (33, 34, 33)),
    ],
)
@pytest.mark.parametrize("by", ["group", "structure"])
def test_sizes(fractions, sizes, by):
    parts = split([f"g{k}" for k in range(100)], fractions, seed=3, by=by)
    assert tuple(len(part) for part in parts) == sizes
    assert sorted(itertools.chain(*parts)) == list(range(100))


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_together(seed):
    generator = np.random.default_rng(seed)
    groups = [f"g{k}" for k in generator.integers(0, 12, 200)]
    parts = split(groups, (0.6, 0.3, 0.1), seed)
    kinds = [{groups[k] for k in part} for part in parts]
    assert sum(len(k) for k in kinds) == len(set(groups))
    for one, other in itertools.combinations(kinds, 2):
        assert not one & other
    assert all(kinds)
    assert abs(len(parts[0]) - 120) <= 25


def test_seed_decides():
    groups = [f"g{k}" for k in range(50)]
    first, again, other = (split(groups, (0.5, 0.5), seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other
    backwards = groups[::-1]
    shuffled = split(backwards, (0.5, 0.5), 1)[0]
    assert {backwards[k] for k in shuffled} == {groups[k] for k in first}


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.5, 0.4, 0.0), "must be 1, not 0.9"),
        ((0.9, -0.1, 0.2), "greater than or equal to 0"),
        ((0.0, 0.5, 0.5), "greater than 0"),
        ((np.nan, 0.5, 0.5), "less than or equal to 1"),
    ],
)
def test_impossible_fractions(fractions, message):
    with pytest.raises(pydantic.ValidationError, match=message):
        config(fractions)


@pytest.mark.parametrize("by", ["group", "structure"])
def test_a_part_with_files_of_its_own_leaves_its_fraction_to_training(by):
    groups = [f"g{k}" for k in range(100)]
    part = split_groups(groups, config((0.7, 0.2, 0.1), 3, by), ["validation"])
    assert np.bincount(part).tolist() == [90, 0, 10]
    part = split_groups(groups, config((0.7, 0.2, 0.1), 3, by), ["validation", "test"])
    assert (part == 0).all()


def test_too_few_groups():
    with pytest.raises(DataError, match=r"1 groups cannot fill 2 parts.*by 'structure'"):
        split_groups(["water"] * 10, config((0.9, 0.1)))


def test_long_names_take_no_more_memory_than_short_ones():
    """SMILES of a hundred atoms with their numbers are a thousand letters long."""
    names = [f"{k}" for k in range(200)]
    names[7] = "C" * 2000
    groups = [names[k % 200] for k in range(20_000)]
    tracemalloc.start()
    part = split(groups, (0.8, 0.1, 0.1), 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6  # a table of such rows has 160 MB
    numbers = np.unique(groups, return_inverse=True)[1]  # the order of names decides, as before
    assert part == split([f"{k:03}" for k in numbers], (0.8, 0.1, 0.1), 0)
