"""Kept lists: exact after every move there is, and tests that notice when they are not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from neighbor_truth import compare

from mlip_md.neighbors import kept as kept_module
from mlip_md.neighbors.geometry import plane_spacings
from mlip_md.neighbors.kept import find_edges, nothing_kept
from mlip_md.neighbors.search import Search

CUTOFF, SKIN = 4.0, 0.5
CUBIC = np.diag([9.0, 9.9, 8.1])
TRICLINIC = np.array([[9.0, 0, 0], [2.7, 9.0, 0], [-3.1, 2.2, 9.0]])
SMALL = np.diag([6.0, 6.5, 5.5])  # less than twice the cutoff
FULL, SLAB, WIRE, OPEN = (True,) * 3, (True, True, False), (False, True, False), (False,) * 3


def nothing(n_atoms, search):
    return nothing_kept(n_atoms, search, np.dtype("float32"), jax.local_devices()[0])


class Moving:
    """Atoms and a cell that move step by step, and the list that follows them."""

    def __init__(self, cell, pbc=FULL, n_atoms=40, backend="cells", seed=0, **limits):
        self.rng = np.random.default_rng(seed)
        self.cell, self.pbc = np.array(cell, float), pbc
        self.positions = self.rng.random((n_atoms, 3)) @ self.cell
        reach = (3, 3, 8) if backend == "cells" else tuple(int(2 * axis) for axis in pbc)
        search = Search(
            backend, CUTOFF, pbc, reach, grid=(2, 2, 5), slots=128, skin=SKIN, candidates=16384
        )
        self.search, self.capacity = search._replace(**limits), 12288
        self.kept = nothing(n_atoms, self.search)
        self.steps = self.rebuilds = 0

        def find(positions, cell, kept, search):  # a new function: a patched module is traced anew
            return find_edges(positions, cell, n_atoms, kept, search, self.capacity)

        self.find = jax.jit(find, static_argnames="search")

    def check(self):
        """The list is exact, or says that it is not."""
        positions = self.positions.astype(np.float32)
        before = np.asarray(self.kept.positions)
        cell = self.cell.astype(np.float32)
        pairs, needs, self.kept = self.find(positions, cell, self.kept, self.search)
        self.steps += 1
        self.rebuilds += not np.array_equal(before, self.kept.positions)
        pairs, needs = jax.device_get((pairs, needs))
        if not needs.fit(self.search, self.capacity):
            return False
        mask = pairs.mask
        assert mask.sum() == pairs.n_pairs == needs.edges
        found = pairs.senders[mask], pairs.receivers[mask], pairs.shifts[mask]
        assert (np.diff(pairs.receivers) >= 0).all()
        truth = positions.astype(float), cell.astype(float)
        assert compare(found, *truth, self.pbc, CUTOFF, 1e-5) == (0, 0, 0), "not exact"
        return True

    def deform(self, gradient, atoms=True):
        self.cell = self.cell @ gradient
        if atoms:
            self.positions = self.positions @ gradient

    def diffuse(self, size):
        self.positions = self.positions + self.rng.normal(scale=size, size=self.positions.shape)

    def rewrap(self):
        axes = np.flatnonzero(self.pbc)
        fractions = self.positions @ np.linalg.inv(self.cell)
        self.positions = self.positions - np.floor(fractions)[:, axes] @ self.cell[axes]

    def hop(self, most=2):
        hops = self.rng.integers(-most, most + 1, self.positions.shape) * np.array(self.pbc)
        self.positions = self.positions + hops @ self.cell


def diffusion(moving):
    for _ in range(8):
        moving.diffuse(0.01)
        assert moving.check()


def rewrapping(moving):
    """Atoms cross faces and are put back, or hop by whole cells: no reason to build anew."""
    for _ in range(4):
        moving.diffuse(0.01)
        moving.rewrap()
        assert moving.check()
        moving.hop()
        assert moving.check()


def compression(moving):
    """A barostat: atoms move along, so none has moved by itself."""
    for _ in range(6):
        moving.deform(np.eye(3) * 0.97)
        assert moving.check()


def shear(moving):
    for _ in range(5):
        moving.deform(np.eye(3) + 0.06 * np.eye(3, k=-1))
        assert moving.check()


def cell_only(moving):
    """The cell shrinks around atoms that stand still."""
    for _ in range(5):
        moving.deform(np.diag([0.98, 0.99, 0.97]), atoms=False)
        assert moving.check()


def teleport(moving):
    """One atom jumps 2 Å, then another across the box: the skin is more than used up."""
    for atom, jump in [(3, [2.0, 0, 0]), (7, [-3.0, 4.0, 2.5]), (7, [0, 0, 0])]:
        moving.positions[atom] += jump
        assert moving.check()


def everything(moving):
    for step in range(24):
        moving.diffuse(0.01)
        if step % 3 == 2:
            moving.deform(np.eye(3) * moving.rng.uniform(0.97, 1.03) + 0.02 * np.eye(3, k=-1))
        if step % 4 == 0:
            moving.rewrap()
        if step % 7 == 6:
            moving.hop()
        assert moving.check()


MOVES = [diffusion, rewrapping, compression, shear, cell_only, teleport, everything]
SYSTEMS = {
    "cubic": (CUBIC, FULL),
    "triclinic": (TRICLINIC, FULL),
    "small": (SMALL, FULL),
    "slab": (CUBIC, SLAB),
    "wire": (TRICLINIC, WIRE),
    "open": (CUBIC, OPEN),
}


@pytest.mark.parametrize("backend", ["cells", "dense"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_kept_lists_are_exact_after_every_move(system, backend):
    n_atoms = 12 if system == "small" else 40
    moving = Moving(*SYSTEMS[system], n_atoms=n_atoms, backend=backend)
    start = moving.positions, moving.cell
    for move in MOVES:
        moving.positions, moving.cell = (np.array(part) for part in start)
        assert moving.check()
        move(moving)


def test_lists_are_kept_while_that_is_safe():
    """Re-wrapping and hops never rebuild, diffusion seldom, and a jump always."""
    moving = Moving(TRICLINIC)
    assert moving.check()
    assert moving.rebuilds == 1
    rewrapping(moving)
    assert moving.rebuilds == 1
    moving.deform(np.eye(3) * 0.99)  # (4 + 0.5) * 0.01 * sqrt(3) Å: much less than the skin
    assert moving.check()
    assert moving.rebuilds == 1
    teleport(moving)
    assert moving.rebuilds == 3  # the last step of it moved nothing
    turn = np.linalg.qr(moving.rng.normal(size=(3, 3)))[0]
    moving.deform(turn)
    assert moving.check()


def test_a_kept_list_of_other_positions_is_replaced():
    """What another system left behind is no danger."""
    first, second = Moving(CUBIC, seed=1), Moving(TRICLINIC, seed=2)
    first.find = second.find
    for _ in range(2):
        assert first.check()
        first.kept, second.kept = second.kept, first.kept
        assert second.check()
        first.kept, second.kept = second.kept, first.kept


@pytest.mark.parametrize("limit", ["slots", "candidates", "capacity", "reach"])
def test_one_too_few_is_reported_as_long_as_the_list_is_kept(limit):
    moving = Moving(CUBIC)
    start = moving.positions.astype(np.float32), CUBIC.astype(np.float32)
    _, needs, _ = moving.find(*start, moving.kept, moving.search)
    if limit == "capacity":
        moving.capacity = int(needs.edges)
    elif limit == "reach":
        moving.search = moving.search._replace(reach=tuple(np.array(needs.reach).tolist()))
    else:
        moving.search = moving.search._replace(**{limit: int(getattr(needs, limit))})
    moving.kept = nothing(40, moving.search)
    assert moving.check()
    if limit == "capacity":
        moving.capacity -= 1
    elif limit == "reach":
        reach = moving.search.reach
        moving.search = moving.search._replace(reach=(reach[0], reach[1] - 1, reach[2]))
    else:
        fewer = getattr(moving.search, limit) - 1
        moving.search = moving.search._replace(**{limit: fewer})
    moving.kept = nothing(40, moving.search)
    for _ in range(3):
        moving.diffuse(0.001)
        assert not moving.check()


# Mutants: what peers have got wrong, and what the checks above must notice


def _ignore_the_box(monkeypatch):
    movement = kept_module.movement

    def blind(positions, cell, kept, search):
        homes, moved = movement(positions, cell, kept, search)
        strain = kept_module.dual(kept.cell).T @ (cell - kept.cell)
        closer = jnp.linalg.norm(0.5 * (strain + strain.T))
        return homes, moved - (search.cutoff + search.skin) * closer

    monkeypatch.setattr(kept_module, "movement", blind)


def _raw_displacement(monkeypatch):
    """Only the atoms are watched, as if cells never changed."""
    movement = kept_module.movement

    def raw(positions, cell, kept, search):
        homes, _ = movement(positions, cell, kept, search)
        return homes, 2 * jnp.linalg.norm(positions - kept.positions, axis=1).max()

    monkeypatch.setattr(kept_module, "movement", raw)


def _no_shift_correction(monkeypatch):
    """Minimum images hide that atoms were wrapped, and shifts stay as they were."""
    movement = kept_module.movement

    def uncorrected(*arguments):
        homes, moved = movement(*arguments)
        return 0 * homes, moved

    monkeypatch.setattr(kept_module, "movement", uncorrected)


def _stale_shifts(monkeypatch):
    """The right pairs, with the shifts that they had when the list was made."""
    prune = kept_module.prune

    def stale(positions, cell, homes, *rest):
        pairs = prune(positions, cell, homes, *rest)
        return pairs._replace(shifts=pairs.shifts - homes[pairs.senders] + homes[pairs.receivers])

    monkeypatch.setattr(kept_module, "prune", stale)


def _skin_edges_reach_the_network(monkeypatch):
    prune = kept_module.prune

    def unpruned(positions, cell, homes, pairs, search, capacity):
        wide = search._replace(cutoff=search.cutoff + search.skin)
        return prune(positions, cell, homes, pairs, wide, capacity)

    monkeypatch.setattr(kept_module, "prune", unpruned)


def _forget(name):
    """A required size that a builder does not report."""

    def mutate(monkeypatch):
        build = kept_module.BUILDERS["cells"]

        def forgetful(*arguments):
            pairs = build(*arguments)
            most = arguments[-1] if name == "n_pairs" else 0
            return pairs._replace(**{name: jnp.minimum(getattr(pairs, name), most)})

        monkeypatch.setitem(kept_module.BUILDERS, "cells", forgetful)

    return mutate


MUTANTS = {
    "ignores the box": (_ignore_the_box, compression, {}),
    "ignores shear": (_ignore_the_box, shear, {}),
    "watches the atoms only": (_raw_displacement, cell_only, {}),
    "minimum image without shift correction": (_no_shift_correction, rewrapping, {}),
    "stale shifts": (_stale_shifts, rewrapping, {}),
    "edges of the skin": (_skin_edges_reach_the_network, diffusion, {}),
    "forgets bin occupancy": (_forget("slots"), diffusion, {"slots": 24}),
    "forgets the reach": (_forget("reach"), diffusion, {"reach": (1, 0, 3)}),
    "forgets the capacity": (_forget("n_pairs"), diffusion, {"candidates": 500}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name, monkeypatch):
    mutate, move, limits = MUTANTS[name]
    if limits:  # the original says that this does not fit
        assert not Moving(CUBIC, **limits).check()
    mutate(monkeypatch)
    with pytest.raises(AssertionError, match="not exact"):
        move(Moving(CUBIC, **limits))


def test_positions_that_are_no_numbers_are_reported():
    moving = Moving(CUBIC)
    assert moving.check()
    for spoil in (np.nan, np.inf):
        moving.positions[5, 1] = spoil
        assert not moving.check()
    moving.positions[5] = 1.0
    assert moving.check()
    assert plane_spacings(moving.cell, np.ones(3, bool)).min() > 2 * CUTOFF
