"""Energy surfaces to sample on, and motion on them: Langevin dynamics and a brief relaxation.

Positions are (N, 3) in Å, energies in eV, forces in eV/Å, times in fs, masses in u.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from mlip_md.constants import BOHR, HARTREE
from mlip_md.trainer.generate.chemistry import Molecule, count_unpaired
from mlip_md.trainer.generate.labels import FORCE_UNIT, LabelError, gfn2_calculator

if TYPE_CHECKING:
    from tblite.interface import Calculator, Result

HEAVY_HYDROGEN = 4.0
"""u; see `run_langevin`."""
KB = 8.617333262e-5
"""eV/K."""
ACCELERATION = 9.648533212e-3
"""Å/fs² per eV/(Å u)."""

Forces = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""positions (N, 3) -> (energy, forces (N, 3))."""


class XTBSurface:
    """The GFN2-xTB energy surface of one molecule, converged loosely: for sampling only."""

    def __init__(self, molecule: Molecule) -> None:
        self._molecule = molecule
        self._calculator: Calculator | None = None
        self._result: Result | None = None

    def __call__(self, positions: np.ndarray) -> tuple[float, np.ndarray]:
        """Energy and forces (N, 3) at positions (N, 3).

        Raises:
            LabelError: not converged.
        """
        from tblite.exceptions import TBLiteRuntimeError

        try:
            if self._calculator is None:
                self._result = None
                self._calculator = gfn2_calculator(
                    self._molecule.atomic_numbers,
                    positions / BOHR,
                    self._molecule.charge,
                    count_unpaired(self._molecule.atomic_numbers, self._molecule.charge),
                    accuracy=100.0,
                )
            else:
                self._calculator.update(positions=positions / BOHR)
            result = self._calculator.singlepoint(self._result, copy=self._result is not None)
        except TBLiteRuntimeError as error:
            self._calculator = None
            raise LabelError(f"GFN2-xTB failed while sampling: {error}") from error
        self._result = result
        return float(result["energy"]) * HARTREE, -result["gradient"] * FORCE_UNIT


def run_langevin(
    forces: Forces,
    masses: np.ndarray,
    positions: np.ndarray,
    temperature: float,
    steps: int,
    every: int,
    rng: np.random.Generator,
    timestep: float = 2.0,
    friction: float = 0.02,
) -> Iterator[np.ndarray]:
    """Langevin dynamics (BAOAB) from a rest geometry; yields positions each `every` steps.

    Hydrogens weigh `HEAVY_HYDROGEN`: the distribution of positions does not depend on masses,
    and the time step can be twice as long. Velocities start at twice the temperature because
    half of that energy goes into the bonds. It ends early where atoms crash into each other.

    Args:
        forces: the surface.
        masses: (N,).
        positions: (N, 3).
        temperature: in K.
        steps: number of time steps.
        every: steps between two samples.
        rng: source of the noise.
        timestep: in fs.
        friction: in 1/fs.
    """
    mass = np.maximum(masses, HEAVY_HYDROGEN)[:, None]
    width = np.sqrt(KB * temperature * ACCELERATION / mass)
    velocities = np.sqrt(2.0) * width * rng.normal(size=positions.shape)
    velocities -= (mass * velocities).sum(0) / mass.sum()
    decay = np.exp(-friction * timestep)
    _, force = forces(positions)
    for step in range(1, steps + 1):
        velocities = velocities + 0.5 * timestep * ACCELERATION * force / mass
        positions = positions + 0.5 * timestep * velocities
        noise = width * rng.normal(size=positions.shape)
        velocities = decay * velocities + np.sqrt(1 - decay**2) * noise
        positions = positions + 0.5 * timestep * velocities
        _, force = forces(positions)
        if not np.all(np.abs(force) < 200.0):
            return
        velocities = velocities + 0.5 * timestep * ACCELERATION * force / mass
        if step % every == 0:
            yield positions


def quench(forces: Forces, positions: np.ndarray, steps: int = 6) -> np.ndarray:
    """A few clipped steepest-descent steps: the low-energy partner of a thermal geometry."""
    for _ in range(steps):
        positions = positions + np.clip(0.0062 * forces(positions)[1], -0.04, 0.04)
    return positions


def spc_fw_forces(num_molecules: int) -> Forces:
    """The flexible SPC/Fw water model without cutoff, to prepare clusters cheaply.

    Wu, Tepper and Voth, J. Chem. Phys. 124, 024503 (2006), Table I. Atoms in the order O H H.
    """
    kcal = 0.0433641
    charges = np.tile([-0.82, 0.41, 0.41], num_molecules)
    owner = np.repeat(np.arange(num_molecules), 3)
    apart = owner[:, None] != owner[None, :]
    coulomb = 14.399645 * charges[:, None] * charges[None, :] * apart
    oxygen = np.arange(0, 3 * num_molecules, 3)
    oo = np.ix_(oxygen, oxygen)
    epsilon, sigma = 0.1554253 * kcal, 3.165492

    def forces(positions: np.ndarray) -> tuple[float, np.ndarray]:
        difference = positions[:, None] - positions[None]
        distance = np.sqrt((difference**2).sum(-1) + 1e-12)
        inverse = np.where(apart, 1.0 / distance, 0.0)
        pair = coulomb * inverse
        energy = 0.5 * pair.sum()
        slope = pair * inverse**2
        six = (sigma * inverse[oo]) ** 6
        energy += 2.0 * epsilon * (six**2 - six).sum()
        slope[oo] += 24.0 * epsilon * (2 * six**2 - six) * inverse[oo] ** 2
        force = (slope[..., None] * difference).sum(1)
        energy += _add_spc_fw_intramolecular(force, positions, oxygen, kcal)
        return float(energy), force

    return forces


def _add_spc_fw_intramolecular(
    force: np.ndarray, positions: np.ndarray, oxygen: np.ndarray, kcal: float
) -> float:
    """Harmonic bonds and angles of waters, whose oxygens are given: added forces, the energy."""
    k_bond, r_bond, k_angle, angle_0 = 1059.162 * kcal, 1.012, 75.90 * kcal, np.deg2rad(113.24)
    arms = [positions[oxygen + i] - positions[oxygen] for i in (1, 2)]
    lengths = [np.linalg.norm(arm, axis=1, keepdims=True) for arm in arms]
    units = [arm / length for arm, length in zip(arms, lengths, strict=True)]
    cosine = np.clip((units[0] * units[1]).sum(1, keepdims=True), -0.999999, 0.999999)
    bend = np.arccos(cosine) - angle_0
    energy = 0.5 * k_angle * (bend**2).sum()
    for i in (0, 1):
        reach = lengths[i] - r_bond
        energy += 0.5 * k_bond * (reach**2).sum()
        turn = (units[1 - i] - cosine * units[i]) / (lengths[i] * np.sqrt(1 - cosine**2))
        push = -k_bond * reach * units[i] + k_angle * bend * turn
        force[oxygen + 1 + i] += push
        force[oxygen] -= push
    return float(energy)
