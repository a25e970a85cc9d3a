"""Compiled programs on the disk: asked for, bounded, and never in anybody's way."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlip_md import compilation_cache

CODE = """
import sys, jax, mlip_md
print(mlip_md.enable_cache(*sys.argv[1:]))
jax.jit(lambda x: x + 1)(1.0)
"""


def run(tmp_path: Path, *arguments: str, code: str = CODE, **variables: str) -> str:
    """What a fresh process prints, whose user's caches lie in ``tmp_path``."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("JAX_COMPILATION_CACHE_DIR", "MLIP_MD_CACHE")
    }
    environment = {**kept, "XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), **variables}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "rror" not in done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="other platforms keep caches elsewhere")
def test_where_programs_are_kept(tmp_path):
    folder = Path(run(tmp_path))
    assert folder.parent == tmp_path / "mlip-md"
    import jaxlib

    assert folder.name.startswith(jaxlib.__version__)
    assert Path(run(tmp_path, str(tmp_path / "own"))).parent == tmp_path / "own"
    assert Path(run(tmp_path, MLIP_MD_CACHE=str(tmp_path / "b"))).parent == tmp_path / "b"


def test_off_unwritable_and_what_jax_was_told_before(tmp_path):
    assert run(tmp_path, MLIP_MD_CACHE="off") == "None"
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    assert run(tmp_path, str(blocked)) == "None"
    mine = str(tmp_path / "mine")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=mine) == mine
    assert not (tmp_path / "mlip-md").exists()


def test_importing_and_computing_write_nothing_unasked(tmp_path):
    code = "import mlip_md, mlip_md.engine, jax; jax.jit(lambda x: x + 1)(1.0)"
    run(tmp_path, code=code)
    assert list(tmp_path.iterdir()) == []


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(compilation_cache, "MAX_SIZE", 250)
    for name, used in [("a/old", 1), ("b/new", 3), ("b/middle", 2)]:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"x" * 100)
        os.utime(file, (used, used))
    compilation_cache._trim(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["middle", "new"]
