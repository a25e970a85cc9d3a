"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def reference_data() -> Path:
    """Folder with reference numbers (golden/) and real data (data/); skips where there is none."""
    default = Path(__file__).parents[2] / "shared"
    folder = Path(os.environ.get("MLIP_MD_REFERENCE_DATA", default))
    if not (folder / "golden").is_dir():
        pytest.skip("no reference data (set MLIP_MD_REFERENCE_DATA)")
    return folder
