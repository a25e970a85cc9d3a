"""Minimization for OpenMM whose steps are bounded, so that molecules stay molecules.

OpenMM's own minimizer (L-BFGS with a line search) first tries a step of about a nanometre. A force
field brings its atoms back from there, because bonds are springs; a potential learned from data may
have a lower energy somewhere out there, and then the molecule is gone.

Here it is L-BFGS too (D. C. Liu, J. Nocedal, Math. Program. 45, 503 (1989)), but no atom moves
farther than a bound in one step, and no step raises the energy. Constraints of the System hold: in
mass-weighted coordinates, in which OpenMM's projection of velocities on them is orthogonal,
directions are projected and points drawn back by OpenMM itself.
"""

from __future__ import annotations

import collections
import math
from typing import Any, NamedTuple

import numpy as np
import openmm
from numpy.typing import NDArray
from openmm import app, unit

from mlip_md.constants import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV
from mlip_md.errors import ConfigError
from mlip_md.integrations.openmm_calls import read_told

MAX_STEP = 0.02
"""nm that an atom may move in one step."""
TOLERANCE = 10.0
"""kJ/mol/nm, OpenMM's own default."""
MEMORY = 10
"""Steps whose curvature is remembered."""
STIFFNESS = 70.0 * KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM**2
"""kJ/mol/nm², curvature assumed before any is known: 70 eV/Å², that of a bond, as ASE does."""
MIN_SCALE = 2.0**-12
"""Part of a step below which none is tried."""
_ARMIJO = 1e-4
_ENERGY_NOISE = 1e-6
"""Relative noise of a single-precision energy."""
_CONSTRAINT_TOLERANCE = 1e-6

Float64 = NDArray[np.float64]


class Minimized(NamedTuple):
    """How a minimization ended.

    Attributes:
        converged: whether the forces are within the tolerance.
        iterations: steps that were taken.
        energy: kJ/mol, at the end.
        rms_force: kJ/mol/nm, root mean square of the components of the forces on moving atoms.
    """

    converged: bool
    iterations: int
    energy: float
    rms_force: float


class _Point(NamedTuple):
    """Positions (n, 3) nm, energy kJ/mol and its gradient in the working coordinates, (n, 3)."""

    positions: Float64
    energy: float
    gradient: Float64


class _Surface:
    """The energy of a Context over the coordinates that may change.

    The working coordinates are √m·x where the System has constraints, else x; massless particles
    (fixed atoms, virtual sites) do not move by themselves.
    """

    def __init__(self, context: openmm.Context) -> None:
        self._context = context
        system = context.getSystem()
        count = system.getNumParticles()
        masses = np.array([system.getParticleMass(i)._value for i in range(count)])
        self.moving = masses > 0
        self._constrained = system.getNumConstraints() > 0
        scale = masses if self._constrained else np.ones(count)
        self.scale = np.sqrt(np.where(self.moving, scale, 1.0))[:, None]
        self._virtual = any(system.isVirtualSite(i) for i in range(count))

    def at(self, positions: Float64) -> _Point:
        """Energy and projected gradient at positions (n, 3) nm, drawn onto the constraints."""
        context = self._context
        context.setPositions(positions)
        if self._constrained:
            context.applyConstraints(_CONSTRAINT_TOLERANCE)
        if self._virtual:
            context.computeVirtualSites()
        state = context.getState(positions=True, energy=True, forces=True)
        forces = state.getForces(asNumpy=True)._value
        gradient = np.where(self.moving[:, None], -forces / self.scale, 0.0)
        return _Point(
            state.getPositions(asNumpy=True)._value,
            state.getPotentialEnergy()._value,
            self.project(gradient),
        )

    def project(self, direction: Float64) -> Float64:
        """The part of a direction (working coordinates) along which constraints do not change."""
        if not self._constrained:
            return direction
        self._context.setVelocities(direction / self.scale)
        self._context.applyVelocityConstraints(_CONSTRAINT_TOLERANCE)
        velocities = self._context.getState(velocities=True).getVelocities(asNumpy=True)._value
        return np.asarray(velocities * self.scale)

    def rms_force(self, point: _Point) -> float:
        """Root mean square of the components of the forces on moving atoms, kJ/mol/nm."""
        forces = (point.gradient * self.scale)[self.moving]
        return float(np.sqrt(np.mean(forces**2))) if forces.size else 0.0


class _Curvature(collections.deque[tuple[Float64, Float64, float]]):
    """The last steps, their changes of the gradient, and the products of both, for L-BFGS."""

    def note(self, step: Float64, change: Float64) -> None:
        """Remember a step and how the gradient changed over it, if that is a valley."""
        product = float(np.vdot(step, change))
        if product > 1e-10 * float(np.linalg.norm(step) * np.linalg.norm(change)):
            self.append((step, change, product))

    def direction(self, gradient: Float64, scale: Float64) -> Float64:
        """Minus the inverse Hessian times the gradient, as far as known (two-loop recursion)."""
        direction = -gradient
        weights = []
        for step, change, product in reversed(self):
            weight = float(np.vdot(step, direction)) / product
            direction = direction - weight * change
            weights.append(weight)
        if self:
            _, change, product = self[-1]
            direction = direction * (product / float(np.vdot(change, change)))
        else:
            direction = direction * scale**2 / STIFFNESS
        for (step, change, product), weight in zip(self, reversed(weights), strict=True):
            direction = direction + step * (weight - float(np.vdot(change, direction)) / product)
        return direction


def minimize(
    simulation: app.Simulation | openmm.Context,
    tolerance: float | unit.Quantity = TOLERANCE,
    maxIterations: int = 0,
    maxStep: float | unit.Quantity = MAX_STEP,
) -> Minimized:
    """Relax the positions of a Simulation in bounded steps; use it instead of ``minimizeEnergy``.

    Box, velocities, time and step count stay as they are.

    Args:
        simulation: a Simulation, or a Context, whose positions are set.
        tolerance: kJ/mol/nm (or with unit), root mean square of the force components at which to
            stop, as in OpenMM.
        maxIterations: most steps; 0 is no limit.
        maxStep: nm (or with unit), farthest that an atom may move in one step.

    Returns:
        How it ended. It also ends, not converged, where rounding hides any further descent.

    Raises:
        ConfigError: if a number is not allowed.
        openmm.OpenMMException: if the forces cannot be computed.
    """
    context = simulation.context if isinstance(simulation, app.Simulation) else simulation
    force_unit = unit.kilojoule_per_mole / unit.nanometer
    tolerance = _positive("tolerance", tolerance, force_unit)
    longest = _positive("maxStep", maxStep, unit.nanometer)
    if isinstance(maxIterations, bool) or not isinstance(maxIterations, int) or maxIterations < 0:
        raise ConfigError(f"maxIterations = {maxIterations!r} is not allowed; it must be 0 or more")
    velocities = context.getState(velocities=True).getVelocities(asNumpy=True)
    try:
        return _descend(_Surface(context), context, tolerance, maxIterations or math.inf, longest)
    except openmm.OpenMMException as error:
        raise openmm.OpenMMException(read_told(error).text) from None
    finally:
        context.setVelocities(velocities)


def _descend(
    surface: _Surface, context: openmm.Context, tolerance: float, most: float, longest: float
) -> Minimized:
    start = context.getState(positions=True).getPositions(asNumpy=True)._value
    point, curvature, iterations = surface.at(start), _Curvature(maxlen=MEMORY), 0
    while surface.rms_force(point) > tolerance and iterations < most:
        found = _step(surface, point, curvature, longest)
        if found is None:
            if not curvature:
                break
            curvature.clear()  # what was learnt of the surface elsewhere may mislead here
            continue
        curvature.note(
            (found.positions - point.positions) * surface.scale, found.gradient - point.gradient
        )
        point, iterations = found, iterations + 1
    surface.at(point.positions)  # the last trial may have been another
    rms = surface.rms_force(point)
    return Minimized(rms <= tolerance, iterations, point.energy, rms)


def _step(surface: _Surface, point: _Point, curvature: _Curvature, longest: float) -> _Point | None:
    """The next point, lower than the present one; None if there is none along the direction."""
    direction = surface.project(curvature.direction(point.gradient, surface.scale))
    slope = float(np.vdot(direction, point.gradient))
    if not slope < 0:
        return None
    moves = direction / surface.scale
    moves *= min(1.0, longest / float(np.linalg.norm(moves, axis=1).max()))
    slope = float(np.vdot(moves * surface.scale, point.gradient))
    noise = _ENERGY_NOISE * abs(point.energy)
    scale = 1.0
    while scale >= MIN_SCALE:
        trial = surface.at(point.positions + scale * moves)
        rise = trial.energy - point.energy
        flatter = np.linalg.norm(trial.gradient) < np.linalg.norm(point.gradient)
        if rise <= _ARMIJO * scale * slope or (flatter and rise <= noise):
            return trial
        scale *= 0.5
    return None


def _positive(name: str, value: Any, of: unit.Unit) -> float:
    """A positive number in a unit."""
    try:
        number = float(value.value_in_unit(of) if unit.is_quantity(value) else value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name} = {value!r} is no number of {of}") from error
    if not 0 < number < math.inf:
        raise ConfigError(f"{name} = {value!r} is not allowed; it must be positive and finite")
    return number
