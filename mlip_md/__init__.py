"""Molecular dynamics with machine-learned potentials, in JAX.

``load`` opens a potential; ``mlip_md.integrations`` runs it in ASE and OpenMM;
``mlip_md.trainer`` makes new ones. Importing this package loads neither JAX nor a host library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlip_md.version import __version__

__all__ = ["__version__", "enable_cache", "keep_memory", "load"]

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from mlip_md.potential import Potential


def load(name_or_path: str | os.PathLike[str], head: str | None = None) -> Potential:
    """Open a potential.

    Args:
        name_or_path: name of a bundled potential ("organics-gfn2"), or path of a training run's
            folder or of a model file: the formats are those of ``mlip_md.formats.names``.
        head: which head of a model of mace-torch that has several.

    Returns:
        The potential.

    Raises:
        HeadError: if it has no such head, or several and none is named.
        ModelFileError: if this is no name or path, there is no such potential, or its file is
            unusable.
    """
    from mlip_md.formats.open import open_potential

    return open_potential(name_or_path, head)


def enable_cache(folder: str | os.PathLike[str] | None = None) -> Path | None:
    """Let JAX keep compiled programs on the disk: see ``mlip_md.compilation_cache``.

    Args:
        folder: where; None is a folder of the user's cache.

    Returns:
        The folder in use, or None if there is no cache.
    """
    from mlip_md import compilation_cache

    return compilation_cache.enable_cache(folder)


def keep_memory() -> bool:
    """Let this process keep freed memory for its next step: see ``mlip_md.allocation``.

    Returns:
        Whether it does; it needs Linux with glibc.
    """
    from mlip_md import allocation

    return allocation.keep_memory()
