"""Constant pressure by Monte Carlo moves of the volume, whose state can be saved and restored."""

from __future__ import annotations

from typing import Any

import numpy as np
import openmm
from openmm import unit

MOVE_INTERVAL = 25
"""Steps between moves of the volume, as OpenMM's barostats have it."""


class VolumeMoves:
    """Monte Carlo moves of the volume at constant pressure; molecules keep their shape.

    A random walk in ln V; a move to V' is accepted with the probability min(1, exp(-w / kT)),
    w = ΔE + P (V' - V) - (N + 1) kT ln(V' / V) for N molecules (Frenkel and Smit, Understanding
    Molecular Simulation, section 5.4). OpenMM's MonteCarloBarostat samples the same ensemble, but
    its checkpoints lack the size of its moves, and so a continued run would be another one.

    Args:
        context: of a periodic System.
        labels: (n,) molecule of each atom, counted from 0; every molecule is in one piece.
        pressure: bar.
        temperature: K.
        seed: of the random numbers.

    Attributes:
        scale: largest |ln(V' / V)|.
    """

    def __init__(
        self,
        context: openmm.Context,
        labels: np.ndarray,
        pressure: float,
        temperature: float,
        seed: int,
    ) -> None:
        self.labels = np.unique(labels, return_inverse=True)[1]
        self.scale, self._attempted, self._accepted = 0.01, 0, 0
        self._context = context
        self._rng = np.random.default_rng(seed)
        per_mole = pressure * unit.bar * unit.AVOGADRO_CONSTANT_NA
        self._pressure = per_mole.value_in_unit(unit.kilojoule_per_mole / unit.nanometer**3)
        self._kT = temperature * unit.MOLAR_GAS_CONSTANT_R.value_in_unit(
            unit.kilojoule_per_mole / unit.kelvin
        )

    def attempt(self) -> None:
        """Try one move."""
        state = self._context.getState(positions=True, energy=True)
        positions = state.getPositions(asNumpy=True)._value
        box = state.getPeriodicBoxVectors(asNumpy=True)._value
        volume, counts = abs(np.linalg.det(box)), np.bincount(self.labels)
        change = self.scale * self._rng.uniform(-1.0, 1.0)  # of ln V
        factor = np.exp(change / 3.0)
        centers = [np.bincount(self.labels, x) / counts for x in positions.T]
        moved = positions + (factor - 1.0) * np.transpose(centers)[self.labels]
        self._set(moved, box * factor)
        energy = self._context.getState(energy=True).getPotentialEnergy()
        work = (energy - state.getPotentialEnergy())._value
        work += self._pressure * volume * np.expm1(change)
        work -= (len(counts) + 1) * self._kT * change
        accepted = work <= 0 or self._rng.random() < np.exp(-work / self._kT)
        if not accepted:
            self._set(positions, box)
        self._adapt(accepted)

    def _set(self, positions: np.ndarray, box: np.ndarray) -> None:
        self._context.setPeriodicBoxVectors(*box)
        self._context.setPositions(positions)

    def _adapt(self, accepted: bool) -> None:
        """Aim at an acceptance between a quarter and three quarters."""
        self._attempted, self._accepted = self._attempted + 1, self._accepted + bool(accepted)
        share = self._accepted / self._attempted
        if self._attempted >= 10 and not 0.25 <= share <= 0.75:
            self.scale = min(self.scale * 1.1, 0.3) if share > 0.75 else self.scale / 1.1
            self._attempted = self._accepted = 0

    def state(self) -> dict[str, Any]:
        """JSON values from which ``restore`` goes on exactly."""
        return {
            "rng": self._rng.bit_generator.state,
            "moves": [self.scale, self._attempted, self._accepted],
        }

    def restore(self, values: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._rng.bit_generator.state = values["rng"]
        self.scale, self._attempted, self._accepted = values["moves"]
