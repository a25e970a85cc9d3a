"""Relaxation of a structure, and of its cell, with ASE."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ase import Atoms
from ase.filters import FrechetCellFilter
from ase.optimize import BFGS, FIRE

from mlip_md.errors import ConfigError, SimulationError, StructureError
from mlip_md.integrations.ase import MLIPCalculator
from mlip_md.integrations.md.structures import describe_contact


def relax_structure(
    atoms: Atoms,
    calculator: MLIPCalculator,
    *,
    fmax: float = 0.01,
    steps: int = 500,
    relax_cell: bool = False,
    optimizer: str = "bfgs",
    observer: Callable[[int, float, float], None] | None = None,
) -> tuple[Atoms, bool]:
    """Relax a structure.

    Args:
        atoms: the structure; not changed. Its constraints are held.
        calculator: the potential.
        fmax: eV/Å, largest force on an atom at which to stop.
        steps: at most so many steps.
        relax_cell: relax the cell too (at zero pressure); periodic structures only.
        optimizer: "bfgs" (small structures) or "fire".
        observer: called with step, energy (eV) and largest force (eV/Å) at every step.

    Returns:
        The relaxed copy with its calculator, and whether it converged.

    Raises:
        ConfigError: on an unknown optimizer.
        StructureError: if the cell cannot be relaxed because there is none, or atoms are held.
        SimulationError: if atoms lie on each other in the end.
    """
    optimizers = {"bfgs": BFGS, "fire": FIRE}
    if optimizer not in optimizers:
        raise ConfigError(f"optimizer = {optimizer!r} is not allowed; it must be bfgs or fire")
    if relax_cell and (atoms.cell.rank < 3 or not atoms.pbc.all()):
        raise StructureError(
            "only a structure with a cell, periodic in three directions, has one to relax"
        )
    if relax_cell and atoms.constraints:
        raise StructureError(
            "a cell that relaxes takes all atoms with it, but the structure holds some in place; "
            "remove the constraints, or relax without the cell"
        )
    relaxed = atoms.copy()
    relaxed.calc = calculator
    target = FrechetCellFilter(relaxed) if relax_cell else relaxed
    run = optimizers[optimizer](target, logfile=None)

    def observe() -> None:
        if observer is not None:
            largest = float(np.linalg.norm(target.get_forces(), axis=1).max())
            observer(run.nsteps, float(relaxed.get_potential_energy()), largest)

    run.attach(observe)
    converged = bool(run.run(fmax=fmax, steps=steps))
    check_relaxed(relaxed)
    return relaxed, converged


def check_relaxed(atoms: Atoms) -> None:
    """Refuse what a minimization has made if atoms lie on each other.

    Raises:
        SimulationError: naming two of them.
    """
    if contact := describe_contact(atoms):
        raise SimulationError(
            f"the minimization ended in a structure that is none: {contact}. Check that the given "
            "one has no overlapping atoms; otherwise the model was not made for such structures"
        )
