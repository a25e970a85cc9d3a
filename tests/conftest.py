"""Fixtures shared by all tests."""

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test processes, also those that tests start, share compiled programs; set before JAX is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
# Ranks are never promoted silently: that is how a broadcast goes wrong unseen.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")


GPU_SUITE = (
    "test_compiler.py",
    "test_convolution.py",
    "test_engine.py",
    "test_gpu_convolution.py",
    "test_memory.py",
    "test_neighbors.py",
    "test_neighbors_kept.py",
    "test_network_parity.py",
    "test_physics.py",
    "test_radial_tables.py",
    "test_ase_calculator.py",
    "test_openmm_potential.py",
)
"""What is run on JAX's default device: ``-m gpu`` runs it where that is a card."""


def missing_card() -> str:
    """Why there is nothing to run on; empty if JAX's default device is a GPU."""
    import jax

    found = jax.devices()[0]
    return "" if found.platform == "gpu" else f"JAX sees no GPU here, its device is {found}"


@pytest.hookimpl(tryfirst=True)  # before marks are selected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the suite of the engine; ``-m gpu`` skips it where it would run on a processor."""
    for item in items:
        if item.path.name in GPU_SUITE:
            item.add_marker("gpu")
    asked = re.search(r"(?<!not )\bgpu\b", config.option.markexpr)
    if asked and (reason := missing_card()):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def card():
    """JAX's GPU; skips where there is none."""
    import jax

    if reason := missing_card():
        pytest.skip(reason)
    return jax.devices()[0]


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Folder with reference numbers (golden/) and real data (data/); skips where there is none."""
    default = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("MLIP_MD_REFERENCE_DATA", default))
    if not (folder / "golden").is_dir():
        pytest.skip("no reference data (set MLIP_MD_REFERENCE_DATA)")
    return folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Signals work here and in child processes, also where a shell started the tests without them.

    Shells let background jobs ignore SIGINT, nohup SIGHUP, and children inherit that.
    """
    before = {signal.SIGINT: signal.signal(signal.SIGINT, signal.default_int_handler)}
    for number in (signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def loose_ranks() -> Iterator[None]:
    """Ranks may be promoted, as the library that we compare with does."""
    import jax

    with jax.numpy_rank_promotion("allow"):
        yield
