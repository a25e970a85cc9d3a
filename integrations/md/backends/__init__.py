"""The engines that integrate the equations of motion, behind one interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlip_md.integrations.md.backends.interface import Backend
    from mlip_md.integrations.md.settings import EngineName


def _load_ase() -> type[Backend]:
    from mlip_md.integrations.md.backends.ase import ASEBackend

    return ASEBackend


def _load_openmm() -> type[Backend]:
    from mlip_md.integrations.md.backends.openmm import OpenMMBackend

    return OpenMMBackend


BACKENDS: Mapping[EngineName, Callable[[], type[Backend]]] = {
    "ase": _load_ase,
    "openmm": _load_openmm,
}
"""What imports the backend of an engine, only once it is needed."""
