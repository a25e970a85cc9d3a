"""Velocities at the start of a run, and the temperature that velocities have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta

from mlip_md.integrations.md.settings import MDSettings
from mlip_md.integrations.md.structures import fixed_axes

DEGREES = "degrees_of_freedom"
"""Name of their number in a restart file."""

_AT_REST = 1e-3
"""Share of the kinetic energy below which a motion of the whole is none."""


def count_degrees_of_freedom(atoms: Atoms, ensemble: str, *, drawn: bool = True) -> int:
    """Number of momenta that are free, at least 1.

    Thermostats touch all that are not held by a constraint. nve conserves the total ones, unless
    something is held, which takes momentum up; they count where they are not zero.

    Args:
        atoms: with the present momenta, unless they were drawn.
        ensemble: "nve", "nvt" or "npt".
        drawn: whether the velocities are those of ``draw_velocities``, and in nve at rest in total.
    """
    held = int(fixed_axes(atoms).sum())
    count = 3 * len(atoms) - held
    if ensemble == "nve" and not held:
        drifting, turning = (False, False) if drawn else _motion_of_the_whole(atoms)
        count -= 0 if drifting else 3
        if not (atoms.pbc.any() or turning):
            moments = atoms.get_moments_of_inertia()
            count -= int(np.sum(moments > 1e-6 * max(float(moments.max()), 1e-12)))
    return max(count, 1)


def count_for_run(
    atoms: Atoms, settings: MDSettings, saved: Mapping[str, Any] | None = None
) -> int:
    """``count_degrees_of_freedom`` of a whole run: that of its start, which its restart file keeps.

    A linear molecule bends and the kinetic energy varies; what a run conserves does not change.

    Args:
        atoms: with the momenta at the start, or at the restart.
        settings: of the run.
        saved: values of the restart file, in which older ones have no such number.
    """
    if saved is not None and DEGREES in saved:
        return int(saved[DEGREES])
    return count_degrees_of_freedom(atoms, settings.ensemble, drawn=settings.velocities == "draw")


def _motion_of_the_whole(atoms: Atoms) -> tuple[bool, bool]:
    """Whether atoms drift, and turn about their centre of mass, more than rounding explains."""
    limit = _AT_REST * atoms.get_kinetic_energy()
    momentum = atoms.get_momenta().sum(axis=0)
    drift = momentum @ momentum / (2.0 * atoms.get_masses().sum())
    inner = atoms.copy()
    inner.set_velocities(atoms.get_velocities() - momentum / atoms.get_masses().sum())
    angular = inner.get_angular_momentum()
    moments, axes = atoms.get_moments_of_inertia(vectors=True)
    there = moments > 1e-6 * max(float(moments.max()), 1e-12)
    turn = 0.5 * float(np.sum((axes @ angular)[there] ** 2 / moments[there]))
    return bool(drift > limit), bool(turn > limit)


def compute_temperature(kinetic: float, degrees_of_freedom: int) -> float:
    """Temperature (K) of a kinetic energy (eV)."""
    return float(2.0 * kinetic / (degrees_of_freedom * units.kB))


def start_velocities(atoms: Atoms, settings: MDSettings, rng: np.random.Generator) -> None:
    """Draw the velocities of atoms, or keep those of the file that they have; change ``atoms``."""
    if settings.velocities == "draw":
        draw_velocities(atoms, settings.ensemble, settings.temperature, rng)
    else:  # without those of held coordinates
        atoms.set_momenta(atoms.get_momenta())


def draw_velocities(
    atoms: Atoms, ensemble: str, temperature_K: float, rng: np.random.Generator
) -> None:
    """Give atoms velocities of a temperature; in nve without total momentum and rotation.

    Held coordinates get none; where there are such, nothing is taken off the others.

    Args:
        atoms: get them, as momenta in ASE's unit.
        ensemble: "nve", "nvt" or "npt".
        temperature_K: K.
        rng: is drawn from.
    """
    thermalize_momenta(atoms, temperature_K, rng=rng)
    if ensemble != "nve" or len(atoms) == 1:
        return
    if not atoms.constraints:
        Stationary(atoms, preserve_temperature=False)
        if not atoms.pbc.any():
            ZeroRotation(atoms, preserve_temperature=False)
    kinetic = atoms.get_kinetic_energy()
    wanted = 0.5 * count_degrees_of_freedom(atoms, ensemble) * units.kB * temperature_K
    if kinetic > 0:
        atoms.set_momenta(atoms.get_momenta() * np.sqrt(wanted / kinetic))
