"""Lists on the device in a step without a network, run by the driver that engines use."""

from typing import NamedTuple

import jax
import numpy as np

from mlip_md.neighbors import (
    Capacities,
    DeviceList,
    check_cell,
    check_positions,
    find_edges,
    neighbor_list,
    place,
)
from mlip_md.neighbors.geometry import wrap


class Step(NamedTuple):
    """A call to the device: its shape, and the list and needs that came back."""

    shape: tuple
    pairs: tuple
    needs: tuple

    @property
    def complete(self):
        return bool(self.needs.fit(self.shape.search, self.shape.edges))


class Listed:
    """The list of one system, as it moves; ``steps`` are those of the last call of ``edges``.

    Positions and cell are checked and placed as ``structure.check_structure`` does it.
    """

    def __init__(self, spec, positions, cell, pbc, dtype=np.float32, capacities=None):
        self.spec, self.pbc, self.dtype = spec, pbc, np.dtype(dtype)
        self.compiled, self.steps = 0, []
        device = jax.local_devices(backend="cpu")[0]
        self._find = jax.jit(self._searched, static_argnames="shape", donate_argnames="kept")
        with jax.enable_x64(self.dtype == np.float64):
            self.list = DeviceList(
                spec,
                spec.backend,
                *self.placed(positions, cell)[:3],
                capacities=capacities or Capacities(),
                dtype=self.dtype,
                device=device,
            )

    def placed(self, positions, cell):
        """Positions near the origin, cell and periodicity, and the cells that atoms were moved."""
        positions, (cell, pbc) = check_positions(positions), check_cell(cell, self.pbc)
        near = place(positions, cell, pbc, self.spec.cutoff) if len(positions) else positions
        return near, cell, pbc, wrap(positions, cell, pbc)[1]

    def _searched(self, positions, cell, n_atoms, kept, shape):
        self.compiled += 1  # runs when JAX traces
        pairs, needs, kept = find_edges(positions, cell, n_atoms, kept, shape.search, shape.edges)
        return (pairs, needs), kept

    def run(self, positions, cell, shape, kept):
        """One step in a shape: the call, and what it keeps."""
        padded = np.zeros((shape.nodes, 3), self.dtype)
        padded[: len(positions)] = positions
        arguments = padded, np.asarray(cell, self.dtype), len(positions), kept, shape
        with jax.enable_x64(self.dtype == np.float64):
            found, kept = self._find(*arguments)
            return Step(shape, *jax.device_get(found)), kept

    def find(self, positions, cell):
        """The first complete step with these positions (placed) and this cell."""
        self.steps = []

        def step(shape, kept):
            made, kept = self.run(positions, cell, shape, kept)
            self.steps.append(made)
            return made, made.needs, kept

        with jax.enable_x64(self.dtype == np.float64):
            made, shape = self.list.find(step)
        assert shape == made.shape
        assert made is self.steps[-1]
        return made

    def edges(self, positions, cell):
        """(i, j, S) of atoms anywhere in space, after checking what every padded list obeys."""
        near, cell, _, offsets = self.placed(positions, cell)
        made = self.find(near, cell)
        mask, (senders, receivers, shifts) = made.pairs.mask, made.pairs[:3]
        assert made.complete
        assert not any(step.complete for step in self.steps[:-1])
        assert mask.sum() == made.pairs.n_pairs == made.needs.edges
        assert not mask[made.needs.edges :].any()
        assert (np.diff(receivers) >= 0).all()
        assert (senders[~mask] == made.shape.nodes - 1).all()
        assert (shifts[~mask] == 0).all()
        i, j = senders[mask], receivers[mask]
        return i, j, shifts[mask] + offsets[i] - offsets[j]


def edges_of(spec, positions, cell, pbc, dtype=np.float32):
    """(i, j, S) by a backend, the host's "vesin" among them."""
    if spec.backend == "vesin":
        return neighbor_list(positions, cell, pbc, spec.cutoff)
    return Listed(spec, positions, cell, pbc, dtype).edges(positions, cell)
