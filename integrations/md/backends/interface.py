"""What a run sees of an engine: ``Backend``, and the ``Frame`` that it hands out."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from ase import Atoms, units

from mlip_md.integrations.md.settings import Ensemble, MDSettings
from mlip_md.integrations.md.structures import Structure
from mlip_md.potential import Potential

BAR = 1e5 * units.Pascal
"""1 bar in eV/Å³."""


class Frame(NamedTuple):
    """The state of a run at one step, in the frame of the structure's file.

    Attributes:
        step: number of steps done.
        time: ps.
        positions: (n, 3) Å, never wrapped.
        velocities: (n, 3) Å/fs.
        cell: (3, 3) Å, zeros without one.
        potential: eV.
        kinetic: eV.
        conserved: eV, the quantity that the equations of motion conserve, or None.
        temperature: K.
        pressure: eV/Å³ with its kinetic part, or None without a periodic cell.
        forces: (n, 3) eV/Å of the potential, on held atoms too.
    """

    step: int
    time: float
    positions: np.ndarray
    velocities: np.ndarray
    cell: np.ndarray
    potential: float
    kinetic: float
    conserved: float | None
    temperature: float
    pressure: float | None
    forces: np.ndarray

    def place(self, atoms: Atoms) -> Atoms:
        """A copy of atoms, at the positions and in the cell of this frame."""
        placed = atoms.copy()
        placed.positions = self.positions
        if self.cell.any():
            placed.cell = self.cell
        return placed


class Backend(Protocol):
    """An engine that integrates the equations of motion of one structure; engines derive from it.

    Every method may raise NonFiniteError, StructureError or SimulationError where the potential
    has no number or the engine stops, CapacityError where memory is full, and KeyboardInterrupt.

    Attributes:
        title: what the engine is called.
        holds_axes: whether it can hold single coordinates of an atom, not only whole atoms.
        potential: that of the settings.
        structure: what is run, in the frame in which the engine computes.
    """

    title: ClassVar[str]
    holds_axes: ClassVar[bool]
    potential: Potential
    structure: Structure

    def __init__(self, settings: MDSettings, structure: Structure) -> None: ...

    @classmethod
    def ignored(cls, ensemble: Ensemble) -> dict[str, str]:
        """Settings that would change nothing in an ensemble: their names, and why."""

    def warm_up(self) -> None:
        """Evaluate once, so that everything is compiled."""

    def notes(self) -> list[str]:
        """What a user should know of the engine on this machine; after ``warm_up``."""
        return []

    def minimize(self, force: float, steps: int) -> bool:
        """Relax the positions until forces are below ``force`` (eV/Å); False after ``steps``."""

    def start(self) -> None:
        """Draw velocities, or keep the file's, and set up the integrator."""

    def advance(self) -> None:
        """Integrate one step."""

    def frame(self) -> Frame:
        """The present state."""

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Arrays and JSON values from which ``restore`` continues exactly."""

    def restore(self, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Set up the integrator in a saved state.

        Raises:
            KeyError, ValueError, TypeError: if it is not the state of such a run.
        """

    def describe(self) -> dict[str, Any]:
        """Engine, integrator, device: for the summary."""

    def compilations(self) -> int:
        """How often the potential has been compiled so far."""
