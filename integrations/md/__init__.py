"""Molecular dynamics from a structure to a run folder, with ASE or OpenMM as the engine.

Importing this package loads neither ASE nor OpenMM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlip_md.integrations.md.run import restart_md as restart_md
    from mlip_md.integrations.md.run import run_md as run_md
    from mlip_md.integrations.md.settings import MDSettings as MDSettings
    from mlip_md.integrations.md.settings import read_settings as read_settings
    from mlip_md.integrations.md.structures import read_structure as read_structure

__all__ = ["MDSettings", "read_settings", "read_structure", "restart_md", "run_md"]


def __getattr__(name: str) -> Any:
    """The public names, from the modules that have them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from mlip_md.integrations.md import run

    return getattr(run, name)
