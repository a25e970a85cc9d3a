"""Splits: exact sizes, empty parts where asked, no molecule in two parts."""

import itertools

import numpy as np
import pytest

from mlip_md.errors import DataError
from mlip_md.trainer.data import Structure, split


def structures_of(groups):
    return [
        Structure(np.array([1]), np.zeros((1, 3)), float(k), np.zeros((1, 3)), group=group)
        for k, group in enumerate(groups)
    ]


def energies(part):
    return [s.energy for s in part]


@pytest.mark.parametrize(
    ("fractions", "sizes"),
    [
        ((0.9, 0.1, 0.0), (90, 10, 0)),
        ((0.7, 0.2, 0.1), (70, 20, 10)),
        ((0.8, 0.2), (80, 20, 0)),
        ((1.0, 0.0, 0.0), (100, 0, 0)),
        ((0.0, 0.5, 0.5), (0, 50, 50)),
        ((0.5, 0.0, 0.5), (50, 0, 50)),
        ((1 / 3, 1 / 3, 1 / 3), (33, 34, 33)),
    ],
)
@pytest.mark.parametrize("by", ["group", "structure"])
def test_sizes(fractions, sizes, by):
    parts = split(structures_of([f"g{k}" for k in range(100)]), fractions, seed=3, by=by)
    assert tuple(len(part) for part in parts) == sizes
    assert sorted(energy for part in parts for energy in energies(part)) == list(range(100))
    assert all(energies(p) == sorted(energies(p)) for p in parts)


@pytest.mark.parametrize("seed", range(20))
def test_groups_stay_together(seed):
    generator = np.random.default_rng(seed)
    groups = [f"g{k}" for k in generator.integers(0, 12, 200)]
    parts = split(structures_of(groups), (0.6, 0.3, 0.1), seed)
    kinds = [{s.group for s in part} for part in parts]
    assert sum(len(k) for k in kinds) == len(set(groups))
    for one, other in itertools.combinations(kinds, 2):
        assert not one & other
    assert all(kinds)
    assert abs(len(parts.train) - 120) <= 25


def test_seed_decides():
    data = structures_of([f"g{k}" for k in range(50)])
    first, again, other = (split(data, (0.5, 0.5), seed) for seed in (1, 1, 2))
    assert energies(first.train) == energies(again.train)
    assert energies(first.train) != energies(other.train)
    shuffled = split(data[::-1], (0.5, 0.5), 1)
    assert {s.group for s in shuffled.train} == {s.group for s in first.train}


@pytest.mark.parametrize(
    ("fractions", "message"),
    [
        ((0.5, 0.4, 0.0), "sum to 0.9"),
        ((1.1, -0.1, 0.0), "at least 0"),
        ((1.0,), "two or three"),
        ((np.nan, 0.5, 0.5), "at least 0"),
    ],
)
def test_impossible_fractions(fractions, message):
    with pytest.raises(DataError, match=message):
        split(structures_of("ab"), fractions, 0)


def test_too_few_groups():
    with pytest.raises(DataError, match=r"1 groups cannot fill 2 parts.*by 'structure'"):
        split(structures_of(["water"] * 10), (0.9, 0.1), 0)
    with pytest.raises(DataError, match="by = 'atoms'"):
        split(structures_of("ab"), (0.5, 0.5), 0, by="atoms")
