"""Neighbor lists against brute force: every cell, periodicity, position and capacity."""

import itertools
import logging
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from device_lists import Listed, edges_of
from hypothesis import strategies as st
from neighbor_truth import brute_force, compare
from pair_potential import pair_potential
from scipy.spatial import cKDTree

from mlip_md.engine import Engine
from mlip_md.errors import CapacityError, ConfigError, NeighborError, StructureError
from mlip_md.neighbors import (
    Capacities,
    NeighborSpec,
    check_cell,
    device,
    host,
    neighbor_list,
    nvalchemi,
)
from mlip_md.neighbors.cells import BINS_PER_CUTOFF
from mlip_md.neighbors.dense import dense_pairs, required_images
from mlip_md.neighbors.device import ladder, plan_images
from mlip_md.neighbors.geometry import close_gaps, open_directions, plane_spacings, wrap
from mlip_md.neighbors.kept import BUILDERS
from mlip_md.neighbors.search import Search

CUTOFF = 4.0


def spec_of(cutoff=CUTOFF, *, skin=None, backend="auto", capacity_margin=1.2):
    return NeighborSpec(cutoff, skin, backend, capacity_margin)


def lattice(a, b, c, alpha, beta, gamma):
    """Cell from lengths and angles (degrees), a along x and b in the xy plane."""
    cos = np.cos(np.radians([alpha, beta, gamma]))
    y = (cos[0] - cos[1] * cos[2]) / np.sin(np.radians(gamma))
    third = [cos[1], y, np.sqrt(1 - cos[1] ** 2 - y**2)]
    rows = [[1, 0, 0], [cos[2], np.sin(np.radians(gamma)), 0], third]
    return np.array(rows) * np.array([a, b, c])[:, None]


def rotation(seed):
    q, r = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    q = q * np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def random_in(cell, n, seed=0):
    return np.random.default_rng(seed).random((n, 3)) @ cell


def _cases():
    rng = np.random.default_rng(1)
    cube = np.eye(3) * 7.0
    skew = lattice(7, 8, 9, 70, 80, 65)
    open_xyz = [False, False, False]
    slab, wire = [True, True, False], [False, True, False]
    far_z = random_in(cube, 20) * [1, 1, 5] - [0, 0, 12]
    fcc = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    faces = np.array([[0, 0, 0], [1, 0.5, 1], [-1e-17, 0.3, 0.2], [0.5, 1 - 1e-16, 0.999999999]])
    no_z = cube * [[1], [1], [0]]
    flat = random_in(cube, 12) * [1, 1, 0]
    yield "half-cutoff box", random_in(np.eye(3) * 2, 12), np.eye(3) * 2, True
    yield "26 images of one atom", np.zeros((1, 3)), np.eye(3) * 2.5, True
    yield "aspect 1:20", random_in(np.diag([2, 2, 40]), 12), np.diag([2.0, 2.0, 40.0]), True
    yield "triclinic", random_in(skew, 20), skew, True
    sharp = lattice(7, 7, 7, 30, 40, 35)
    yield "sharp angles", random_in(sharp, 12), sharp, True
    rhombic = lattice(8, 8, 8, 60, 60, 60)
    yield "rhombic dodecahedron", random_in(rhombic, 15), rhombic, True
    truncated = lattice(8, 8, 8, 70.5288, 109.4712, 70.5288)
    yield "truncated octahedron", random_in(truncated, 15), truncated, True
    sheared = np.array([[6.0, 0, 0], [18.0, 6.0, 0], [-12.0, 18.0, 6.0]])
    yield "not reduced", random_in(np.eye(3) * 6, 12), sheared, True
    yield "left-handed", random_in(skew, 15), skew[[1, 0, 2]], True
    yield "negative diagonal", random_in(cube, 15), -cube, True
    yield "rotated", random_in(skew, 15) @ rotation(2), skew @ rotation(2), True
    yield "boxes away", random_in(skew, 15) + rng.integers(-5, 6, (15, 3)) @ skew, skew, True
    yield (
        "1000 boxes away",
        random_in(cube, 6) + rng.integers(-1000, 1001, (6, 3)) @ cube,
        cube,
        True,
    )
    yield "slab, atoms beyond z", far_z, cube, slab
    yield "slab without z vector", far_z, no_z, slab
    leaning = np.array([[7.0, 0, 0], [0, 7, 0], [3, 1, 0]])
    yield "slab, z vector in the plane", far_z, leaning, slab
    yield "wire", random_in(cube, 20) * 2, cube, wire
    yield "triclinic, open b", random_in(skew, 20) * 2, skew, [True, False, True]
    yield "open with a dummy cell", random_in(cube, 20), np.eye(3), open_xyz
    yield "open with a singular cell", random_in(cube, 20), np.ones((3, 3)), open_xyz
    yield "no cell", random_in(cube, 20), None, False
    yield "planar molecule", flat, None, False
    yield "linear molecule", flat * [1, 0, 0], None, False
    yield "one atom", np.array([[1e3, 2, 3]]), None, False
    yield "two atoms 100 Å apart", np.array([[0, 0, 0], [100.0, 0, 0]]), None, False
    yield "no atoms", np.zeros((0, 3)), cube, True
    yield "no atoms, no cell", np.zeros((0, 3)), None, False
    yield "on the faces", faces @ cube, cube, True
    yield "perfect fcc", fcc * 4.05, np.eye(3) * 4.05, True
    yield "coincident atoms", np.array([[1, 1, 1], [1, 1, 1], [8.0, 1, 1]]), cube, True
    yield "all in one corner", random_in(np.eye(3), 30), np.eye(3) * 100, True
    yield "fcc shells near the cutoff", fcc * 4 * np.sqrt(2), np.eye(3) * 4 * np.sqrt(2), True


CASES = {name: case for name, *case in _cases()}


@pytest.mark.parametrize("name", CASES)
def test_host_list_is_exact(name):
    positions, cell, pbc = CASES[name]
    i, j, S = neighbor_list(positions, cell, pbc, CUTOFF)
    assert compare((i, j, S), positions, cell, pbc, CUTOFF) == (0, 0, 0)
    assert (np.diff(j) >= 0).all()
    assert i.dtype == j.dtype == S.dtype == np.int32
    assert i.shape == j.shape == S.shape[:1]
    assert S.shape[1:] == (3,)


def reach_of(search, cell):
    """What a search of a cell needs to either side: images, or bins of its grid."""
    axes = search.axes
    reach = np.array(BINS_PER_CUTOFF) * (search.backend == "cells")
    if len(axes):
        spacings = plane_spacings(cell, np.array(search.pbc))
        if search.backend == "dense":
            reach[axes] = required_images(search.cutoff, 0.99 * spacings)
        else:
            reach[axes] = np.ceil(search.cutoff * np.array(search.grid)[axes] / spacings + 1e-4)
    return reach


def common_search(backend, cell, pbc, n_atoms=0, cutoff=CUTOFF):
    """A search whose capacities serve most cases, so that few are compiled."""
    pbc = tuple(bool(axis) for axis in np.broadcast_to(pbc, 3))
    search = Search(backend, cutoff, pbc)
    cell = np.zeros((3, 3)) if cell is None else np.asarray(cell, float)
    if backend == "nvalchemi":
        return search._replace(atoms=n_atoms, slots=512, bins=4096)
    if backend == "cells":
        search = search._replace(grid=(2, 2, 3), slots=256)
        common = np.array([4, 4, 6])
    else:
        common = np.where(pbc, 2, 0)
    reach = np.maximum(reach_of(search, cell), common)
    return search._replace(reach=tuple(reach.tolist()))


BUILD = {name: jax.jit(build, static_argnums=(3, 4, 5)) for name, build in BUILDERS.items()}


def skip_without(backend):
    if backend == "nvalchemi":
        pytest.importorskip("nvalchemiops", reason="the extra nvalchemi is not installed")


@pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("backend", BUILDERS)
@pytest.mark.parametrize("name", CASES)
def test_device_lists_are_exact(name, backend, x64):
    """All cases in one shape, with padding atoms that sit where they would be neighbors."""
    skip_without(backend)
    positions, cell, pbc = CASES[name]
    n_atoms, dtype = len(positions), np.float64 if x64 else np.float32
    padded = np.full((32, 3), 1.0, dtype)
    padded[:n_atoms] = positions
    cell = np.asarray(np.zeros((3, 3)) if cell is None else cell, dtype)
    search = common_search(backend, cell, pbc, n_atoms)
    if backend == "nvalchemi" and n_atoms == 0:
        pytest.skip("an engine never searches nothing")
    with jax.enable_x64(x64):
        found = BUILD[backend](padded, cell, n_atoms, search, CUTOFF, 8192)
    found = jax.device_get(found)
    # What float32 cannot hold is not asked for: truth is of the cast positions, in a band.
    positions, truth_cell = padded[:n_atoms].astype(float), cell.astype(float)
    band = 1e-9 if x64 else max(1e-5, 4e-7 * np.abs(positions).max(initial=10.0))
    mask = found.mask
    edges = found.senders[mask], found.receivers[mask], found.shifts[mask]
    assert mask.sum() == found.n_pairs
    assert (np.diff(found.receivers) >= 0).all()
    assert (found.senders[~mask] == 31).all()
    assert found.slots <= search.slots
    assert compare(edges, positions, truth_cell, pbc, CUTOFF, band) == (0, 0, 0)
    assert (found.reach <= search.reach).all()
    assert not found.reach[~np.array(search.pbc)].any()
    if backend == "dense":  # the images said to be required are those that the edges come from
        i, j, S = edges
        axes = search.axes
        fractions = (positions[j] - positions[i]) @ np.linalg.pinv(truth_cell[axes])
        assert (np.abs(S[:, axes] + np.rint(fractions)) <= found.reach[axes]).all()
        assert (
            np.array(plan_images(CUTOFF, truth_cell, np.array(search.pbc))) >= found.reach
        ).all()


@pytest.mark.parametrize("backend", ["dense", "cells", "nvalchemi"])
@pytest.mark.parametrize("name", ["triclinic", "slab without z vector", "no cell", "no atoms"])
def test_lists_as_engines_make_them_are_exact(name, backend):
    skip_without(backend)
    positions, cell, pbc = CASES[name]
    if backend == "nvalchemi" and len(positions) == 0:
        pytest.skip("an engine never searches nothing")
    listed = Listed(spec_of(backend=backend), positions, cell, pbc)
    assert listed.list.search.backend == backend
    found = listed.edges(positions, cell)
    assert compare(found, positions, cell, pbc, CUTOFF, 1e-4) == (0, 0, 0)


lengths = st.floats(2.1, 12.0)
angles = st.floats(-0.6, 0.6)


@st.composite
def structures(draw):
    """A cell of any shape, hand and orientation, and atoms in it, around it and far away."""
    tilts = np.array([[0, 0, 0], [draw(angles), 0, 0], [draw(angles), draw(angles), 0]])
    cell = (np.eye(3) + tilts) * np.array([draw(lengths) for _ in range(3)])[:, None]
    cell = cell[draw(st.permutations(range(3)))] * draw(st.sampled_from([1, -1]))
    cell = cell @ rotation(draw(st.integers(0, 99)))
    pbc = draw(st.sampled_from([(True, True, True), (True, False, True), (False, False, False)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_atoms = draw(st.integers(1, 20))
    fractions = rng.uniform(-0.5, 1.5, (n_atoms, 3))
    crowded = draw(st.booleans())
    if crowded:  # on faces, edges and corners of the cell
        fractions = rng.integers(-1, 3, (n_atoms, 3)) / 2 + rng.normal(
            scale=0.01, size=(n_atoms, 3)
        )
    hops = rng.integers(-3, 4, (n_atoms, 3)) * np.array(pbc) * draw(st.booleans())
    return (fractions + hops) @ cell, cell, pbc


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(structures(), st.booleans())
def test_all_backends_are_exact_in_any_cell(structure, x64):
    positions, cell, pbc = structure
    dtype = np.float64 if x64 else np.float32
    positions, cell = positions.astype(dtype).astype(float), cell.astype(dtype).astype(float)
    n_atoms = len(positions)
    assert compare(neighbor_list(*structure, CUTOFF), *structure, CUTOFF, 1e-9) == (0, 0, 0)
    padded = np.full((32, 3), 1.0, dtype)
    padded[:n_atoms] = positions
    for backend in ("dense", "cells"):
        search = common_search(backend, np.eye(3) * 99, pbc)
        fits = (reach_of(search, cell) <= search.reach).all()
        with jax.enable_x64(x64):
            arguments = padded, cell.astype(dtype), n_atoms, search, CUTOFF, 8192
            found = jax.device_get(BUILD[backend](*arguments))
        whole = (found.reach <= search.reach).all() and found.slots <= (search.slots or 0)
        assert whole or not fits, "a search that suffices says that it does not"
        if whole:
            edges = tuple(
                part[found.mask] for part in (found.senders, found.receivers, found.shifts)
            )
            band = 1e-9 if x64 else 2e-5
            assert compare(edges, positions, cell, pbc, CUTOFF, band) == (0, 0, 0)


def test_truth_itself():
    """Brute force knows a face-centered cubic crystal's shells: 12 and 6 neighbors."""
    positions, cell, pbc = CASES["perfect fcc"]
    lengths = brute_force(positions, cell, pbc, 4.05 * 1.1)[1]
    assert len(lengths) == 4 * (12 + 6)
    assert np.allclose(np.sort(lengths)[:48], 4.05 / np.sqrt(2))


def test_pairs_at_the_cutoff():
    """r < cutoff: a pair a hair inside is listed, at the cutoff and beyond it is not."""
    for factor, count in [(1 - 1e-7, 2), (1.0, 0), (1 + 1e-7, 0)]:
        positions = np.array([[0, 0, 0], [CUTOFF * factor, 0, 0]])
        assert len(neighbor_list(positions, None, False, CUTOFF)[0]) == count


def test_shifts_reproduce_vectors_wherever_atoms_are():
    """Moving atoms by lattice vectors changes shifts, never vectors or the pairs."""
    positions, cell, pbc = CASES["triclinic"]
    moves = np.random.default_rng(3).integers(-5, 6, positions.shape)
    spec = spec_of(backend="dense")

    def vectors(where, find):
        i, j, S = find(where)
        D = where[j] + S @ cell - where[i]
        assert np.linalg.norm(D, axis=1).max() < CUTOFF * (1 + 1e-6)
        return np.array(sorted(zip(i, j, *np.round(D, 6).T, strict=True)))

    for find in (
        lambda where: neighbor_list(where, cell, pbc, CUTOFF),
        lambda where: edges_of(spec, where, cell, pbc, np.float64),
    ):
        home, moved = vectors(positions, find), vectors(positions + moves @ cell, find)
        assert np.allclose(home, moved, atol=2e-6)


def test_same_lattice_in_another_basis():
    """A reduced and a sheared basis of one lattice give the same distances."""
    positions = random_in(np.eye(3) * 6, 12)
    sheared = CASES["not reduced"][1]
    lengths = []
    for cell in (np.eye(3) * 6, sheared):
        i, j, S = neighbor_list(positions, cell, True, CUTOFF)
        lengths.append(np.sort(np.linalg.norm(positions[j] + S @ cell - positions[i], axis=1)))
    assert np.allclose(*lengths)


def test_seventy_thousand_atoms_stay_sorted():
    positions = random_in(np.eye(3) * 200.0, 70_000)  # more than 16 bits can number
    i, j, _ = neighbor_list(positions, None, False, 2.0)
    assert (np.diff(j) >= 0).all()
    assert j.max() > 2**16
    lengths = np.linalg.norm(positions[i] - positions[j], axis=1)
    assert (lengths < 2.0).all()
    tree = cKDTree(positions)  # counts every atom with itself
    assert len(i) == tree.count_neighbors(tree, 2.0) - len(positions)
    assert set(zip(i, j, strict=True)) == set(zip(j, i, strict=True))


def many_open():
    """Open structures of equal size: molecules, chains, planes, atoms alone, groups far apart."""
    random = np.random.default_rng(3)
    for n, stretch in ((9, 4.0), (40, 9.0), (40, [30.0, 3.0, 0.0]), (128, 16.0), (1, 1.0)):
        yield random.random((20, n, 3)) * stretch + random.normal(size=(20, 1, 3)) * 50
    apart = random.random((20, 12, 3)) * 5
    apart[10:, 6:] += [3000.0, 0.0, -40.0]
    yield apart
    yield np.cumsum(random.random((3, 120, 3)) * 7.9, axis=1)  # too many bins for vesin


@pytest.mark.parametrize("positions", [*many_open()])
@pytest.mark.parametrize("cutoff", [0.4, CUTOFF])
def test_small_open_structures_have_edges_as_a_grid_has_them(positions, cutoff, monkeypatch):
    """Sums over edges, and with them runs that are continued, depend on their order."""
    no_cell, open_ = np.zeros((3, 3)), np.zeros(3, bool)
    together = list(host.edges_of_many(positions, cutoff))
    alone = [host.host_edges(one, no_cell, open_, cutoff) for one in positions]
    monkeypatch.setattr(host, "SMALL", 0)
    for one, *fast in zip(positions, together, alone, strict=True):
        expected = host.host_edges(one, no_cell, open_, cutoff)  # by vesin
        for found in fast:
            for name in ("senders", "receivers", "shifts"):
                array, right = getattr(found, name), getattr(expected, name)
                assert array.dtype == right.dtype
                assert array.shape == right.shape
                assert (array == right).all()
            assert np.allclose(found.lengths, expected.lengths, rtol=1e-12)


# Shapes that no grid of bins likes


def far_apart():
    """Structures of a few groups of atoms with nothing in between, in open directions."""
    group = random_in(np.eye(3) * 5, 6)
    for offset in ([5.1e5, 0, 0], [3000.0, 1500.0, 1.0], [1e8, -1e8, 0], [0, 0, 9.0], [7e9] * 3):
        yield np.vstack([group, group + offset]), None, False
    slab = np.vstack([group + offset for offset in ([0, 0, 0], [3, 3, 4e5], [1, 2, 4e5 + 3])])
    yield slab, np.diag([5.0, 6.0, 20.0]), [True, True, False]
    wire = np.vstack([group + offset for offset in ([0, 0, 0], [2, 1e6, 1e7])])
    yield wire, np.array([[6.0, 1, 1], [0, 1, 0], [0, 0, 1]]), [True, False, False]


@pytest.mark.parametrize(("positions", "cell", "pbc"), [*far_apart()])
def test_groups_far_apart(positions, cell, pbc):
    """A fragment that flies away costs nothing: same list, small coordinates, small grid."""
    band = max(1e-9, 1e-15 * np.abs(positions).max())
    found = neighbor_list(positions, cell, pbc, CUTOFF)
    assert compare(found, positions, cell, pbc, CUTOFF, band) == (0, 0, 0)
    checked, periodic = check_cell(cell, pbc)
    closed = close_gaps(positions, checked, periodic, 10.0)
    assert compare(found, closed, cell, pbc, CUTOFF, 1e-6) == (0, 0, 0)
    assert np.ptp(closed @ open_directions(checked, periodic).T, axis=0).max() < 60.0
    for backend in ("dense", "cells"):
        spec = spec_of(backend=backend, skin=0.0)
        found = edges_of(spec, positions, cell, pbc)
        assert compare(found, positions, cell, pbc, CUTOFF, max(1e-5, band)) == (0, 0, 0)


def test_gaps_are_closed_as_far_as_allowed():
    """Groups keep their distances within, their order, and the widest gap between them."""
    x = np.array([0.0, 1.0, 500.0, 501.0, 503.0, 1e6])
    closed = close_gaps(np.stack([x, 0 * x, 0 * x], 1), np.zeros((3, 3)), np.zeros(3, bool), 20.0)
    assert np.allclose(closed[:, 0], [0, 1, 21, 22, 24, 44])
    near = random_in(np.eye(3) * 9, 5)
    assert close_gaps(near, np.zeros((3, 3)), np.zeros(3, bool), 20.0) is near
    assert close_gaps(near * 1e3, np.eye(3), np.ones(3, bool), 20.0) is not None


@pytest.mark.parametrize("sides", [(5.1e5, 6, 6), (1700, 1700, 6), (6, 2e5, 2), (400, 400, 400)])
def test_needles_and_plates(sides):
    """Large thin cells, of which a grid of bins as wide as the cutoff would be too fine."""
    cell = np.diag(np.array(sides, float))
    positions = random_in(np.diag([9.0, 9.0, 9.0]), 15)
    found = neighbor_list(positions, cell, True, CUTOFF)
    assert len(found[0]) > 10
    assert compare(found, positions, cell, True, CUTOFF, 1e-9) == (0, 0, 0)
    spec = spec_of(backend="cells", skin=0.0)
    listed = Listed(spec, positions, cell, True)
    assert np.prod(listed.list.search.grid) <= 4096
    found = listed.edges(positions, cell)
    assert compare(found, positions, cell, True, CUTOFF, 1e-4) == (0, 0, 0)


def test_cells_that_are_too_sparse_are_refused():
    with pytest.raises(CapacityError, match="spread over"):
        neighbor_list(np.eye(3), np.diag([1e9, 6.0, 6.0]), True, CUTOFF)


@pytest.mark.parametrize("backend", ["vesin", "dense", "cells"])
def test_atoms_many_cells_away_lose_nothing(backend):
    """Positions on the host are wrapped in float64 before the device gets them in float32."""
    cell = CASES["triclinic"][1]
    near = random_in(cell, 20)
    moves = np.random.default_rng(6).integers(-100_000, 100_001, near.shape)
    find = finder(spec_of(backend=backend), near + moves @ cell, cell)
    for positions in (near + moves @ cell, near + 2 * moves @ cell):
        found = find(positions, cell)
        assert compare(found, positions, cell, True, CUTOFF, 1e-5) == (0, 0, 0)


def finder(spec, positions, cell):
    """One list of a periodic system that is made again and again, by any backend."""
    if spec.backend == "vesin":
        return lambda positions, cell: neighbor_list(positions, cell, True, spec.cutoff)
    return Listed(spec, positions, cell, True).edges


def test_shifts_that_cannot_be_counted_are_refused():
    cell = CASES["triclinic"][1]
    with pytest.raises(StructureError, match="cells away"):
        neighbor_list(random_in(cell, 20) + 2**31 * cell[0], cell, True, CUTOFF)
    with pytest.raises(StructureError, match="cells away"):
        neighbor_list([[2.0**31 * 9, 0, 0], [0, 0, 0]], np.eye(3) * 9, True, CUTOFF)


@pytest.mark.parametrize("backend", ["vesin", "dense", "cells"])
def test_whole_numbers_are_positions_too(backend):
    positions = np.random.default_rng(0).integers(0, 7, (12, 3))
    cell = np.eye(3) * 7.9
    for where in (positions, jnp.asarray(positions), positions.astype(np.float16)):
        found = edges_of(spec_of(backend=backend), where, cell, True)
        assert compare(found, positions, cell, True, CUTOFF, 1e-5) == (0, 0, 0)


# Capacities


def crowd(n=30, side=9.0, seed=5):
    return random_in(np.eye(3) * side, n, seed), np.eye(3) * side


@pytest.mark.parametrize("backend", ["dense", "cells"])
def test_one_edge_too_many_is_flagged_and_cured(backend, caplog):
    """A step without room says how much it needed; the same step again has it."""
    positions, cell = crowd()
    spec = spec_of(backend=backend, skin=0.0, capacity_margin=1.0)
    listed = Listed(spec, positions, cell, True)
    near, box, _, _ = listed.placed(positions, cell)
    need = int(listed.find(near, box).needs.edges)
    search = listed.list.search
    exact, _ = listed.run(near, box, (shape := listed.steps[-1].shape._replace(edges=need)), None)
    assert exact.complete
    found = exact.pairs[:3]
    assert compare(found, near, cell, True, CUTOFF, 1e-5) == (0, 0, 0)
    short, _ = listed.run(near, box, shape._replace(edges=need - 1), None)
    assert not short.complete
    assert int(short.needs.edges) == need
    assert short.pairs.mask.sum() == need - 1

    class Tight(Capacities):
        """Room for one edge less than there are, once."""

        def choose(self, n_nodes, n_edges, *rest):
            return super().choose(n_nodes, n_edges, *rest)._replace(edges=next(rooms))

    rooms = iter([need - 1, ladder(need)])
    tight = Listed(spec, positions, cell, True, capacities=Tight())
    found = tight.edges(positions, cell)
    assert [step.complete for step in tight.steps] == [False, True]
    assert compare(found, positions, cell, True, CUTOFF, 1e-5) == (0, 0, 0)
    assert tight.list.search == search
    with caplog.at_level(logging.INFO, "mlip_md"):  # more edges than any step before had room for
        dense = positions * 0.6, cell
        found = listed.edges(*dense)
    assert [step.complete for step in listed.steps] == [False, True]
    assert int(listed.steps[0].needs.edges) > listed.steps[0].shape.edges
    assert listed.steps[1].shape.edges == ladder(int(listed.steps[0].needs.edges))
    growths = [r for r in caplog.records if "edges grown from" in r.getMessage()]
    assert len(growths) == 1
    assert str(int(listed.steps[0].needs.edges)) in growths[0].getMessage()
    assert compare(found, *dense, True, CUTOFF, 1e-5) == (0, 0, 0)


def test_capacities_that_fit_are_taken_again():
    """Known shapes serve needs that fall by 1.6 times; below that the next rungs do."""
    capacities = Capacities()
    first = capacities.choose(100, 1000, 1, 1.05)
    assert first.nodes == ladder(101)
    assert first.edges == ladder(1050)
    for need in (first.edges, 1000, math.ceil(first.edges / 1.6)):
        assert capacities.choose(100, need, 1, 1.05) == first
    assert capacities.choose(100, math.floor(first.edges / 1.6) - 1, 1, 1.05).edges < first.edges
    assert capacities.choose(100, first.edges + 1, 1, 1.05).edges > first.edges
    search = Search("dense", CUTOFF, (True,) * 3)
    assert capacities.choose(100, 500, 1, 1.05, search).search == search
    assert capacities.choose(100, 500, 3, 1.05).graphs == 4


def test_a_number_that_breathes_asks_for_no_new_shape():
    """Edges between 1/1.6 of the room and all of it: the same shape, and nothing is compiled."""
    positions, cell = crowd(60, 11.0)
    listed = Listed(spec_of(backend="dense", skin=0.0), positions, cell, True)
    shapes = set()
    for scale in (1.0, 1.04, 0.99, 1.02, 1.05, 1.0):
        found = listed.edges(positions * scale, cell * scale)
        assert compare(found, positions * scale, cell * scale, True, CUTOFF, 1e-5) == (0, 0, 0)
        shapes.add(listed.steps[-1].shape)
        assert len(listed.steps) == 1
    assert len(shapes) == listed.compiled == 1
    thrown_away = 0
    for scale in (0.9, 1.0, 0.9, 1.0, 0.9):  # across the edge of the first room: grown once
        listed.edges(positions * scale, cell * scale)
        thrown_away += len(listed.steps) - 1
    assert thrown_away == 1
    listed.edges(positions * 1.5, cell * 1.5)  # a third of the edges: too much to carry along
    listed.edges(positions * 1.5, cell * 1.5)
    assert listed.steps[-1].shape.edges < next(iter(shapes)).edges


def test_all_atoms_in_one_bin():
    """A grid planned for a gas: its slots overflow when the gas collapses, and grow."""
    gas, cell = crowd(30, 100.0)
    spec = spec_of(backend="cells", skin=0.0, capacity_margin=1.0)
    listed = Listed(spec, gas, cell, True)
    listed.edges(gas, cell)
    before = int(listed.steps[-1].needs.slots)
    drop = crowd(30, 1.5)[0] + 50.0
    found = listed.edges(drop, cell)
    assert not listed.steps[0].complete
    assert int(listed.steps[0].needs.slots) >= 30 > before
    assert compare(found, drop, cell, True, CUTOFF, 1e-5) == (0, 0, 0)


@pytest.mark.parametrize(
    ("backend", "first", "last", "most_growths"), [("dense", 0, 1, 1), ("cells", 1, 2, 4)]
)
def test_a_shrinking_box_asks_for_more_images(backend, first, last, most_growths):
    """12 Å -> 4.2 Å with the atoms still or moving along: flagged in time, then right."""
    positions, cell = crowd(12, 12.0)
    spec = spec_of(backend=backend, skin=0.0)
    listed = Listed(spec, positions, cell, True, capacities=Roomy())
    assert listed.list.search.reach[0] == first
    growths = 0
    for scale in np.linspace(1.0, 0.35, 14):
        for where in (positions, positions * scale):
            found = listed.edges(where, cell * scale)
            growths += len(listed.steps) - 1
            assert compare(found, where, cell * scale, True, CUTOFF, 1e-5) == (0, 0, 0)
    assert listed.list.search.reach[0] == last
    assert 1 <= growths <= most_growths


class Roomy(Capacities):
    """Room for all edges that a test has, so that only the search has to grow."""

    def choose(self, *arguments):
        return super().choose(*arguments)._replace(edges=8192)


@pytest.mark.parametrize("backend", ["dense", "cells"])
def test_the_first_plan_survives_a_barostat(backend):
    """Seven percent of compression, or shear at constant volume, need no growth of the search."""
    positions, cell = crowd(20, 9.0)
    spec = spec_of(backend=backend, skin=0.0, capacity_margin=2.0)
    listed = Listed(spec, positions, cell, True)
    for deformation in (np.eye(3), np.eye(3) * 0.93, np.eye(3) + 0.08 * np.eye(3, k=-1)):
        truth = positions @ deformation, cell @ deformation
        assert compare(listed.edges(*truth), *truth, True, CUTOFF, 1e-5) == (0, 0, 0)
        assert len(listed.steps) == 1


def test_a_step_is_compiled_once():
    """It is a pure function of arrays: other positions, cells and kept lists change no shape."""
    positions, cell = crowd()
    for backend in ("dense", "cells"):
        listed = Listed(spec_of(backend=backend), positions, cell, True)
        for where in (positions, positions + 0.1, positions[::-1], positions):
            found = listed.edges(where, cell)
            assert compare(found, where, cell, True, CUTOFF, 1e-5) == (0, 0, 0)
        assert listed.compiled == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_device_reports_what_is_not_finite(bad):
    positions, cell = crowd(10)
    listed = Listed(spec_of(backend="dense"), positions, cell, True)
    engine = Engine(pair_potential(CUTOFF), backend="dense")
    spoiled = positions.copy()
    spoiled[3, 1] = bad
    flat = cell * [[1], [1], [0]]
    for where, box in ((spoiled, cell), (positions, cell + bad), (positions, flat)):
        with pytest.raises(StructureError, match="not finite"):
            listed.find(where, box)
        (step,) = listed.steps
        assert not step.complete
        assert not step.needs.finite
        with pytest.raises(StructureError):  # on the host there is more to say
            engine.evaluate(where, np.ones(10), box, True)
    assert compare(listed.edges(positions, cell), positions, cell, True, CUTOFF, 1e-5) == (0, 0, 0)


def test_ladder():
    rungs = sorted({ladder(n) for n in range(1, 200_000, 7)})
    assert all(rung % (8 if rung <= 1024 else 128) == 0 for rung in rungs)
    assert all(1 < b / a <= 1.4 for a, b in itertools.pairwise(rungs[2:]))
    assert all(ladder(n) >= n for n in (0, 1, 8, 9, 1024, 1025, 5_343_032, 2**31 - 1))
    assert all(ladder(rung) == rung for rung in rungs)
    assert len(rungs) < 50
    with pytest.raises(CapacityError, match="counted"):
        ladder(2**31)


# Input that cannot be worked with


def evaluate(positions, cell, pbc, cutoff):
    engine = Engine(pair_potential(cutoff))
    return engine.evaluate(positions, np.ones(len(positions), int), cell, pbc)


@pytest.mark.parametrize("find", [neighbor_list, evaluate])
def test_bad_input_is_refused_with_its_numbers(find):
    positions, cell = crowd(5)
    spoiled = positions.copy()
    spoiled[3, 1] = np.nan
    with pytest.raises(StructureError, match=r"1 of 5 atoms are not finite, first atom 3 .*nan"):
        find(spoiled, cell, True, CUTOFF)
    for singular in (None, np.zeros((3, 3)), cell * [[1], [1], [0]], np.ones((3, 3))):
        with pytest.raises(StructureError, match="periodic along a, b, c but"):
            find(positions, singular, True, CUTOFF)
    with pytest.raises(StructureError, match="periodic along b but"):
        find(positions, cell * [[1], [0], [1]], [False, True, False], CUTOFF)
    with pytest.raises(StructureError, match="not finite"):
        find(positions, cell + np.inf, True, CUTOFF)
    for cutoff in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(StructureError, match=f"cutoff is {cutoff}"):
            find(positions, cell, True, cutoff)
    with pytest.raises(StructureError, match=r"\(5, 2\)"):
        find(positions[:, :2], cell, True, CUTOFF)
    with pytest.raises(StructureError, match="shape"):
        find(positions, cell[0], True, CUTOFF)
    with pytest.raises(StructureError, match="pbc"):
        find(positions, cell, [True, True], CUTOFF)


def test_a_cell_in_the_wrong_units_does_not_eat_the_memory():
    positions, cell = crowd(30)
    for tiny in (1e-3, 1e-6):
        with pytest.raises(CapacityError, match="Å"):
            neighbor_list(positions * tiny, cell * tiny, True, CUTOFF)


def test_dependent_vectors_are_no_cell():
    """Integer vectors in one plane, whose determinant is rounding: refused, whatever the hand."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        a, b = rng.integers(-5, 6, (2, 3)).astype(float)
        c = a * rng.integers(-3, 4) + b * rng.integers(-3, 4)
        cell = np.array([a, b, c])[rng.permutation(3)] @ rotation(1)
        with pytest.raises(StructureError, match="linearly dependent"):
            check_cell(cell, True)
        with pytest.raises(StructureError, match="linearly dependent"):
            check_cell(np.array([a, 2 * a, b]) @ rotation(2), [True, True, False])
    thin = np.array([[5.0, 0, 0], [5.0, 1e-3, 0], [0, 0, 5.0]])
    assert check_cell(thin, True)[0] is not None


@pytest.mark.parametrize("backend", ["vesin", "dense", "cells"])
def test_too_many_pairs_are_refused_before_the_memory_is_gone(backend):
    """Nanometers taken for ångströms, open or periodic, evenly spread or in a heap."""
    spec = spec_of(cutoff=5.0, backend=backend)
    everywhere = random_in(np.eye(3) * 10, 100_000)
    heap = np.vstack([everywhere[:40_000] * 0.1, everywhere[:10] * 1e3])
    slab = np.diag([0.05, 0.05, 1.0])
    for positions, cell, pbc in [
        (everywhere, None, False),
        (heap, None, False),
        (heap, np.eye(3) * 1e4, True),
        (everywhere[:20_000], slab, [True, True, False]),
        (everywhere[:20_000], slab, [True, False, False]),
        (everywhere[:9], np.eye(3) * 1e-3, True),
    ]:
        with pytest.raises(CapacityError, match="Å"):
            edges_of(spec, positions, cell, pbc)


def test_estimates_of_pairs_do_not_refuse_what_fits(monkeypatch):
    """Judged from counts in cubes, a liquid has the pairs that it has, to a factor of two."""
    monkeypatch.setattr(host, "total_memory", lambda: host.BYTES_PER_EDGE * 300_000)
    positions, cell = crowd(5000, 36.8)  # 0.1 atoms/Å³, like water: 167,000 pairs
    for pbc in (True, [True, True, False], False):
        assert len(neighbor_list(positions, cell, pbc, CUTOFF)[0]) > 100_000
    monkeypatch.setattr(host, "total_memory", lambda: host.BYTES_PER_EDGE * 80_000)
    with pytest.raises(CapacityError, match="pairs within 4"):
        neighbor_list(positions, cell, True, CUTOFF)


@pytest.mark.parametrize("backend", ["dense", "cells"])
def test_a_box_that_vanishes_is_refused_by_name(backend):
    positions, cell = crowd(12, 7.9)
    listed = Listed(spec_of(backend=backend, skin=0.0), positions, cell, True)
    with pytest.raises((CapacityError, StructureError)):
        listed.find(positions * 1e-12, cell * 1e-12)
    assert not any(step.complete for step in listed.steps)


def test_the_first_list_is_compared_with_the_host(monkeypatch):
    """A search that loses or invents an edge is found out when the list is made."""
    positions, cell = crowd(25)
    spec = spec_of(backend="dense", skin=0.0)
    build = BUILDERS["dense"]
    for change in (-1, 1):

        def wrong(*arguments, change=change):
            pairs = build(*arguments)
            mask = jnp.arange(len(pairs.mask)) < pairs.n_pairs + change
            return pairs._replace(n_pairs=pairs.n_pairs + change, mask=mask)

        monkeypatch.setitem(BUILDERS, "dense", wrong)
        with pytest.raises(NeighborError, match="where the host's list has"):
            edges_of(spec, positions, cell, True)


def test_choice_of_backend(monkeypatch, caplog):
    """By device and size, as measured; what is asked for is taken; each choice is logged once."""
    device._log_once.cache_clear()
    monkeypatch.setattr(nvalchemi, "trusted", lambda: True)
    wide, narrow, periodic = np.eye(3) * 99, np.eye(3) * 1.2 * CUTOFF, np.ones(3, bool)

    def chosen(backend, platform, n_atoms, cell):
        return spec_of(backend=backend).backend_of(platform, n_atoms, cell, periodic)

    with caplog.at_level(logging.INFO, "mlip_md"):
        for _ in range(3):
            assert chosen("auto", "cpu", 10**6, narrow) == "vesin"
            assert chosen("auto", "gpu", 1500, wide) == "dense"
            assert chosen("auto", "gpu", 300, narrow) == "dense"
            assert chosen("auto", "gpu", 1500, narrow) == "nvalchemi"
            assert chosen("auto", "gpu", 10**5, wide) == "nvalchemi"
            assert chosen("auto", "tpu", 10**5, wide) == "cells"
            assert chosen("cells", "cpu", 10, wide) == "cells"
    assert len(caplog.records) == 4
    monkeypatch.setattr(nvalchemi, "trusted", lambda: False)
    assert chosen("auto", "gpu", 10**5, wide) == "cells"


def test_a_foreign_search_is_trusted_only_after_its_self_check(monkeypatch, caplog):
    """Not installed, failing, wrong, right: only the last is used."""
    trusted = nvalchemi.trusted.__wrapped__
    monkeypatch.setattr(nvalchemi.importlib.util, "find_spec", lambda _: None)
    assert not trusted()
    monkeypatch.setattr(nvalchemi.importlib.util, "find_spec", lambda _: True)
    monkeypatch.setattr(nvalchemi, "nvalchemi_pairs", dense_pairs)
    assert trusted()

    def lossy(*arguments):
        pairs = dense_pairs(*arguments)
        return pairs._replace(mask=pairs.mask & (jnp.arange(len(pairs.mask)) != 7))

    def failing(*arguments):
        raise ImportError("libcuda.so")

    for broken in (lossy, failing):
        monkeypatch.setattr(nvalchemi, "nvalchemi_pairs", broken)
        with caplog.at_level(logging.WARNING, "mlip_md"):
            assert not trusted()
        assert "not used" in caplog.text
        caplog.clear()


def test_specifications_are_checked():
    for wrong in (
        {"skin": -1.0}, {"skin": "1"}, {"skin": True}, {"skin": 1e9}, {"backend": "cuda"},
        {"capacity_margin": 0.5}, {"capacity_margin": "a"}, {"capacity_margin": np.nan},
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            spec_of(**wrong)
    with pytest.raises(CapacityError, match="candidates to try"):
        Listed(spec_of(backend="dense"), *crowd(50_000, 200.0), False)


def test_wrapping():
    positions, cell, _ = CASES["boxes away"]
    for pbc in ([True, True, True], [True, False, True], [False, True, False], [False] * 3):
        pbc = np.array(pbc)
        wrapped, offsets = wrap(positions, cell, pbc)
        assert np.allclose(wrapped + offsets @ cell, positions, atol=1e-12)
        assert (offsets[:, ~pbc] == 0).all()
        fractions = wrapped @ np.linalg.pinv(cell[pbc])
        assert ((fractions > -1e-9) & (fractions < 1 + 1e-9)).all()
