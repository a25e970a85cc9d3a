"""Compiled programs kept on the disk, so that the next process starts at once.

JAX can keep what it compiles; here is where, for whom and how much. The command line does it
unless told not to, scripts do it by ``mlip_md.enable_cache()``. Nothing else of the package writes
to a user's disk unasked.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import sys
from pathlib import Path
from typing import Any

MAX_SIZE = 2**30
"""Bytes that the cache may take; what was used longest ago goes first."""
VARIABLE = "MLIP_MD_CACHE"
"""Environment variable: the folder, or "off"."""
_WORTH_KEEPING = 0.3
"""Seconds of compilation."""


def enable_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Let JAX keep compiled programs on the disk, for this process and the next ones.

    A first step costs seconds of compilation in every process; with the cache only in the first
    one. It changes JAX's configuration of this process, so it is to be asked for. A cache that JAX
    was given already, by its own configuration or environment, stays as it is. A folder that
    cannot be written is passed over silently: a cache must not stop anybody.

    Args:
        folder: where; None is MLIP_MD_CACHE, else a folder "mlip-md" in the user's folder for
            caches. Programs of other processors and of other versions of jaxlib lie beside it.

    Returns:
        The folder in use, or None if there is no cache.
    """
    import jax

    config: Any = jax.config  # its annotations do not name its options
    if config.jax_compilation_cache_dir is not None:
        return Path(config.jax_compilation_cache_dir)
    wanted = os.environ.get(VARIABLE, "") if folder is None else os.fspath(folder)
    if wanted == "off":
        return None
    path = Path(wanted or _user_caches() / "mlip-md").expanduser() / _key()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            return None
        _trim(path.parent)
    except OSError:
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _WORTH_KEEPING)
    return path


def _user_caches() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", "~/AppData/Local")).expanduser()
    if sys.platform == "darwin":
        return Path("~/Library/Caches").expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()


def _key() -> str:
    """Version of jaxlib and kind of processor: programs for another one may crash."""
    from jax import lib

    features = [platform.machine(), platform.processor(), sys.platform]
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        features += [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return f"{lib.__version__}-{hashlib.sha256(' '.join(features).encode()).hexdigest()[:12]}"


def _trim(folder: Path) -> None:
    """Remove what was used longest ago, of all versions and processors."""
    files = []
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # another process may remove it
            if file.is_file():
                status = file.stat()
                files.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    excess = sum(size for _, size, _ in files) - MAX_SIZE
    for _, size, file in sorted(files):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            file.unlink()
            excess -= size
