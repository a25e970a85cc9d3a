"""An engine without network, a Morse pair potential in NumPy, to test what surrounds engines."""

import numpy as np

from mlip_md.engine import Result
from mlip_md.errors import NonFiniteError
from mlip_md.neighbors import neighbor_list

DEPTH, WIDTH, MINIMUM, CUTOFF = 0.15, 2.0, 2.2, 5.0
OFFSET = -1029.0
"""eV, E0 of carbon in `small_models`."""


class PairEngine:
    """Energy Σ_{i<j} D [(1 - e^{-a(r - r0)})² - 1] (1 - r²/rc²)³; the interface of ``Engine``."""

    num_compilations = 0

    def __init__(self, potential, dtype="float32", device=None, **options):
        self.potential = potential
        self.calls = 0

    def evaluate(self, positions, atomic_numbers, cell=None, pbc=False):
        self.calls += 1
        positions = np.asarray(positions, float)
        if not np.isfinite(positions).all():
            raise NonFiniteError("positions are not finite")
        cell = np.zeros((3, 3)) if cell is None else np.asarray(cell, float)
        pbc = np.broadcast_to(np.asarray(pbc), 3)
        i, j, shifts = neighbor_list(positions, cell, pbc, CUTOFF)
        vectors = positions[j] - positions[i] + shifts @ cell
        r = np.linalg.norm(vectors, axis=1)
        decay = np.exp(-WIDTH * (r - MINIMUM))
        well, d_well = DEPTH * ((1 - decay) ** 2 - 1), 2 * DEPTH * WIDTH * decay * (1 - decay)
        smooth = 1 - (r / CUTOFF) ** 2
        slope = d_well * smooth**3 - well * 3 * smooth**2 * 2 * r / CUTOFF**2
        energies = np.bincount(j, 0.5 * well * smooth**3, len(positions))
        pair_forces = -0.5 * (slope / r)[:, None] * vectors  # half of each pair per direction
        forces = np.zeros_like(positions)
        np.add.at(forces, j, pair_forces)
        np.add.at(forces, i, -pair_forces)
        volume = abs(np.linalg.det(cell))
        stress = 0.5 * np.einsum("e,ei,ej->ij", slope / r, vectors, vectors)
        interaction = float(energies.sum())
        return Result(
            energy=interaction + OFFSET * len(positions),
            interaction_energy=interaction,
            energies=energies + OFFSET,
            forces=forces,
            stress=stress / volume if volume > 0 else None,
        )
