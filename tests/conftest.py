"""Fixtures shared by all tests."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

# Test processes, also those that tests start, share compiled programs; set before JAX is imported.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".jax_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "1")
# Ranks are never promoted silently: that is how a broadcast goes wrong unseen.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")


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
