"""Runs of the tests compute with a pair potential in NumPy, and start from these structures."""

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from md_cases import set_engine
from pair_engine import PairEngine
from small_models import random_mace

import mlip_md


@pytest.fixture(scope="session")
def potential():
    return random_mace()


@pytest.fixture(autouse=True)
def pair_engine(monkeypatch, potential):
    monkeypatch.setattr(mlip_md, "load", lambda name, head=None: potential)
    monkeypatch.setattr(PairEngine, "device", jax.devices()[0], raising=False)
    set_engine(monkeypatch, PairEngine)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """27 carbon atoms near the minimum of the pair potential."""
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3)
    path = tmp_path_factory.mktemp("structures") / "cluster.xyz"
    Atoms("C27", positions=grid * 2.2).write(path)
    return str(path)


@pytest.fixture(scope="session")
def crystal(tmp_path_factory):
    """A face-centred cubic crystal of 32 carbon atoms near zero pressure."""
    path = tmp_path_factory.mktemp("structures") / "crystal.extxyz"
    bulk("C", "fcc", a=2.95, cubic=True).repeat(2).write(path)
    return str(path)
