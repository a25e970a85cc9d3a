"""The engine: independent of where a structure lies, how it is padded, batched or threaded."""

import copy
import dataclasses
import gc
import logging
import pickle
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pair_potential import PairNetwork, pair_potential

from mlip_md import devices
from mlip_md import engine as engine_module
from mlip_md.devices import DeviceMemory, find_device
from mlip_md.engine import Engine
from mlip_md.errors import (
    CapacityError,
    CoincidenceError,
    ConfigError,
    DeviceError,
    MLIPError,
    NeighborError,
    NonFiniteError,
    StructureError,
    UnsupportedElementError,
)
from mlip_md.neighbors import (
    Capacities,
    Needs,
    NeighborSpec,
    Shape,
    geometry,
    host,
    neighbor_list,
)
from mlip_md.neighbors.device import ladder, plan_search
from mlip_md.neighbors.kept import BUILDERS, nothing_kept
from mlip_md.neighbors.search import Search
from mlip_md.structure import check_structure

TOLERANCE = {"float32": 2e-5, "float64": 1e-11}


def crystal(n_side=2, spacing=2.9, seed=0):
    """A jittered cubic lattice of H, C and O: positions, numbers, cell, pbc."""
    rng = np.random.default_rng(seed)
    sites = np.stack(np.meshgrid(*[np.arange(n_side)] * 3, indexing="ij"), -1).reshape(-1, 3)
    positions = (sites + 0.5) * spacing + rng.normal(scale=0.15, size=sites.shape)
    numbers = rng.choice([1, 6, 8], len(sites))
    return positions, numbers, np.eye(3) * n_side * spacing, True


def molecule(n=9, seed=1):
    positions, numbers, _, _ = crystal(3, 1.6, seed)
    return positions[:n], numbers[:n], None, False


def triclinic():
    positions, numbers, cell, _ = crystal()
    deformation = np.array([[1.0, 0, 0], [0.3, 1.0, 0], [-0.25, 0.2, 1.1]])
    return positions @ deformation, numbers, cell @ deformation, True


def slab():
    positions, numbers, cell, _ = crystal()
    return positions, numbers, cell * [[1], [1], [0]], [True, True, False]


STRUCTURES = {"molecule": molecule, "crystal": crystal, "triclinic": triclinic, "slab": slab}


@pytest.fixture(scope="module", params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def potential():
    return pair_potential()


@pytest.fixture(scope="module")
def engine(potential, dtype):
    return Engine(potential, dtype)


@pytest.fixture(scope="module")
def double(potential):
    return Engine(potential, "float64")


def assert_same(a, b, tolerance, forces_order=slice(None)):
    scale = max(1.0, np.abs(b.forces).max())
    assert a.interaction_energy == pytest.approx(
        b.interaction_energy, abs=tolerance * len(b.forces)
    )
    assert a.energy == pytest.approx(b.energy, abs=tolerance * len(b.forces))
    assert np.abs(a.forces - b.forces[forces_order]).max() < tolerance * scale
    assert np.abs(a.energies - b.energies[forces_order]).max() < tolerance * scale
    assert (a.stress is None) == (b.stress is None)
    if a.stress is not None:
        assert np.abs(a.stress - b.stress).max() < tolerance


def reference(potential, positions, numbers, cell, pbc):
    """Energies per atom by a loop over edges in NumPy, without anything of the engine."""
    i, j, S = neighbor_list(positions, cell, pbc, potential.cutoff)
    box = np.zeros((3, 3)) if cell is None else np.asarray(cell)
    lengths = np.linalg.norm(positions[j] + S @ box - positions[i], axis=1)
    weights = {k: v.astype(float) for k, v in potential.params["params"].items()}
    species = potential.species(numbers)
    envelope = (1 - (lengths / potential.cutoff) ** 2) ** 3
    a, b = weights["amplitude"][species], weights["density"][species]
    pair = np.bincount(j, 4 * a[i] * a[j] * np.exp(-0.7 * lengths) * envelope, len(species))
    density = np.bincount(j, b[i] * np.exp(-0.4 * lengths) * envelope, len(species))
    return pair - np.sqrt(1 + density) + np.asarray(potential.atomic_energies)[species]


@pytest.mark.parametrize("name", STRUCTURES)
def test_energies_forces_and_stress_are_right(engine, potential, dtype, name):
    structure = STRUCTURES[name]()
    result = engine.evaluate(*structure)
    expected = reference(potential, *structure)
    tolerance = TOLERANCE[dtype]
    assert np.abs(result.energies - expected).max() < tolerance
    assert result.energy == pytest.approx(expected.sum(), abs=tolerance * len(expected))
    assert result.energy == pytest.approx(result.energies.sum(), abs=1e-8)
    assert isinstance(result.energy, float)
    assert result.forces.dtype == result.energies.dtype == np.float64
    assert np.abs(result.forces).max() > 0.3, "a potential without forces tests nothing"
    if dtype == "float64":
        check_derivatives(potential, structure, result)


def check_derivatives(potential, structure, result):
    """Forces and stress against central differences of the NumPy energies."""
    positions, numbers, cell, pbc = structure
    step = 1e-5
    for atom, axis in [(0, 0), (3, 1), (7, 2)]:
        moved = np.zeros_like(positions)
        moved[atom, axis] = step
        up = reference(potential, positions + moved, numbers, cell, pbc).sum()
        down = reference(potential, positions - moved, numbers, cell, pbc).sum()
        assert result.forces[atom, axis] == pytest.approx(-(up - down) / (2 * step), abs=2e-6)
    if result.stress is None:
        return
    for a, b in [(0, 0), (1, 1), (0, 1), (1, 2)]:
        strain = np.zeros((3, 3))
        strain[a, b] += step / 2
        strain[b, a] += step / 2
        energies = [
            reference(potential, positions @ F, numbers, cell @ F, pbc).sum()
            for F in (np.eye(3) + strain, np.eye(3) - strain)
        ]
        slope = (energies[0] - energies[1]) / (2 * step) / abs(np.linalg.det(cell))
        assert result.stress[a, b] == pytest.approx(slope, abs=1e-7)


def test_stress_needs_a_volume(engine):
    positions, numbers, cell, _ = crystal()
    assert engine.evaluate(*molecule()).stress is None
    assert engine.evaluate(*slab()).stress is None
    for pbc in (False, [True, True, False], True):
        stress = engine.evaluate(positions, numbers, cell, pbc).stress
        assert stress.shape == (3, 3)
        assert np.allclose(stress, stress.T, atol=1e-6)


@pytest.mark.parametrize("name", STRUCTURES)
def test_it_does_not_matter_where_the_structure_lies(engine, dtype, name):
    positions, numbers, cell, pbc = STRUCTURES[name]()
    home = engine.evaluate(positions, numbers, cell, pbc)
    # Atoms on a face may be wrapped to the other side: equal up to the last digits of float32.
    tolerance = {"float32": 1e-5, "float64": 1e-10}[dtype]
    for offset in ([1000.0, -1000.0, 1000.0], [1e5, 3e4, -2e5]):
        far = engine.evaluate(positions + offset, numbers, cell, pbc)
        assert_same(far, home, max(tolerance, 1e-15 * np.abs(offset).max() * 10))
    if cell is not None:
        hops = np.random.default_rng(4).integers(-50, 51, positions.shape) * np.array(pbc)
        assert_same(engine.evaluate(positions + hops @ cell, numbers, cell, pbc), home, tolerance)


def test_permutation_and_rotation(engine, dtype):
    positions, numbers, cell, pbc = triclinic()
    home = engine.evaluate(positions, numbers, cell, pbc)
    order = np.random.default_rng(0).permutation(len(numbers))
    permuted = engine.evaluate(positions[order], numbers[order], cell, pbc)
    assert_same(permuted, home, TOLERANCE[dtype], order)
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]  # may be left-handed
    turned = engine.evaluate(positions @ turn, numbers, cell @ turn, pbc)
    assert turned.energy == pytest.approx(home.energy, abs=TOLERANCE[dtype] * 10)
    assert np.allclose(turned.forces, home.forces @ turn, atol=TOLERANCE[dtype] * 5)
    assert np.allclose(turned.stress, turn.T @ home.stress @ turn, atol=TOLERANCE[dtype])


def test_a_supercell_is_the_same_crystal(engine, dtype):
    positions, numbers, cell, pbc = triclinic()
    home = engine.evaluate(positions, numbers, cell, pbc)
    images = [a * cell[0] + c * cell[2] for a in (0, 1) for c in (0, 1)]
    many = engine.evaluate(
        np.concatenate([positions + image for image in images]),
        np.tile(numbers, 4),
        cell * [[2], [1], [2]],
        pbc,
    )
    assert many.energy / 4 == pytest.approx(home.energy, abs=TOLERANCE[dtype] * 10)
    assert np.allclose(many.forces, np.tile(home.forces, (4, 1)), atol=TOLERANCE[dtype] * 2)
    assert np.allclose(many.stress, home.stress, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("name", STRUCTURES)
def test_sorting_in_space_changes_nothing(engine, potential, dtype, name, monkeypatch):
    structure = STRUCTURES[name]()
    home = engine.evaluate(*structure)
    computed = []
    compute = engine.runtime.compute
    monkeypatch.setattr(
        engine.runtime,
        "compute",
        lambda given, shape: computed.append(given) or compute(given, shape),
    )
    monkeypatch.setattr(engine_module, "SORTED_FROM", 1)
    result = engine.evaluate(*structure)
    labels = computed[0][0].labels
    assert sorted(labels) == list(range(len(labels)))
    assert (labels != np.arange(len(labels))).sum() >= len(labels) / 2, "nothing was sorted"
    assert_same(result, home, TOLERANCE[dtype])
    assert np.abs(result.energies - reference(potential, *structure)).max() < TOLERANCE[dtype]


def test_errors_name_the_callers_atoms_when_sorted(engine, monkeypatch):
    monkeypatch.setattr(engine_module, "SORTED_FROM", 1)
    test_coincident_atoms_are_named(engine)
    positions, numbers, cell, pbc = crystal()
    positions[5] = positions[2] + [0.01, 0, 0] + 3 * cell[1]
    with pytest.raises(CoincidenceError) as caught:
        engine.evaluate(positions, numbers, cell, pbc)
    assert sorted(caught.value.pairs[0]) == [2, 5]
    positions, numbers, cell, pbc = crystal()
    compute = engine.runtime.compute

    def spoil(structures, shape):
        output, kept = compute(structures, shape)
        values = np.array(output.values)
        values[structures[0].labels.tolist().index(3)] = np.nan
        return output._replace(values=values), kept

    monkeypatch.setattr(engine.runtime, "compute", spoil)
    numbers[:] = 1
    numbers[3] = 6
    with pytest.raises(NonFiniteError, match=r"atoms 3 \(C\) that are not finite; the shortest"):
        engine.evaluate(positions, numbers, cell, pbc)


def test_atoms_close_in_space_are_close_when_sorted():
    rng = np.random.default_rng(0)
    positions = rng.uniform(0, 40, size=(2000, 3))
    order = geometry.morton_order(positions, 2.0)
    assert sorted(order) == list(range(2000))
    steps = np.linalg.norm(np.diff(positions[order], axis=0), axis=1)
    assert steps.mean() < 5.0 < np.linalg.norm(np.diff(positions, axis=0), axis=1).mean()
    far = np.concatenate([positions, [[1e7, -3.0, 5.0]]])  # bins are counted in int64
    assert sorted(geometry.morton_order(far, 2.0)) == list(range(2001))
    assert geometry.morton_order(positions[:1], 2.0).tolist() == [0]


# Padding and compilations


def test_padding_changes_nothing(potential, dtype, engine, monkeypatch):
    """Capacities of need, need + 1 and four times need give the same numbers."""
    structure = crystal()
    home = engine.evaluate(*structure)
    nodes, edges = len(structure[0]), n_edges(potential, *structure)
    for more_nodes, capacity in [(1, edges), (2, edges + 1), (3 * nodes, 4 * edges)]:
        shape = Shape(nodes + more_nodes, capacity, 1)
        monkeypatch.setattr(engine.runtime.capacities, "choose", lambda *_, shape=shape: shape)
        assert_same(engine.evaluate(*structure), home, TOLERANCE[dtype] / 10)


def n_edges(potential, positions, numbers, cell, pbc):
    return len(neighbor_list(positions, cell, pbc, potential.cutoff)[0])


def test_few_compilations_for_a_growing_and_breathing_system():
    """Every size from 1 to 20 atoms and back, then many densities: each rung is compiled once."""
    engine = Engine(pair_potential(info={"test": "compilations"}))
    assert engine.num_compilations == 0
    positions, numbers, _, _ = crystal(3, 3.1)
    for n in (*range(1, 21), *range(20, 0, -1)):
        engine.evaluate(positions[:n], numbers[:n])
    grown = engine.num_compilations
    assert 3 <= grown <= 12
    for scale in np.linspace(1.0, 0.72, 15):  # about three times as many edges
        engine.evaluate(positions * scale, numbers)
    assert engine.num_compilations - grown <= 5


def test_shapes_are_logarithmically_few():
    """From 1 to 20,000 atoms with 10 to 60 neighbors each: four shapes per doubling of size."""
    capacities = Capacities()
    rng = np.random.default_rng(0)
    atoms = np.unique(np.geomspace(1, 20_000, 2000).astype(int))
    for n in atoms:
        shape = capacities.choose(int(n), 20 * int(n), 1, 1.05)
        assert shape.nodes > n
        assert 20 * n <= shape.edges <= max(1.6 * 20 * n, 32)
    shapes = {capacities.choose(int(n), 20 * int(n), 1, 1.05) for n in atoms}
    assert len(shapes) < 100
    breathing = {
        capacities.choose(1000, int(1000 * x), 1, 1.05).edges for x in rng.uniform(10, 60, 500)
    }
    assert len(breathing) <= 9


def test_growth_is_logged_once(caplog):
    engine = Engine(pair_potential(info={"test": "log"}))
    positions, numbers, _, _ = crystal(3, 3.1)
    with caplog.at_level(logging.INFO, "mlip_md"):
        engine.evaluate(positions, numbers)
        assert not caplog.records
        for _ in range(3):
            engine.evaluate(positions * 0.75, numbers)
    assert len(caplog.records) == 1
    assert "edges grown from" in caplog.text


def test_two_systems_in_turn(engine, dtype):
    """Alternating systems neither mix nor compile again."""
    first, second = crystal(), molecule()
    a, b = engine.evaluate(*first), engine.evaluate(*second)
    before = engine.num_compilations
    for _ in range(3):
        assert_same(engine.evaluate(*second), b, 1e-14)
        assert_same(engine.evaluate(*first), a, 1e-14)
    assert engine.num_compilations == before


def test_repeated_calls_are_bitwise_equal(engine):
    a, b = engine.evaluate(*triclinic()), engine.evaluate(*triclinic())
    assert a.energy == b.energy
    assert np.array_equal(a.forces, b.forces)
    assert np.array_equal(a.stress, b.stress)


# Batches


def test_a_batch_equals_one_by_one(engine, dtype, monkeypatch):
    positions, numbers, cell, _ = crystal(3)
    structures = [
        molecule(1),
        crystal(),
        molecule(3),
        slab(),
        (positions, numbers, cell, True),
        triclinic(),
        molecule(9, seed=5),
    ]
    singles = [engine.evaluate(*structure) for structure in structures]
    for limits in [(4096, 32768), (30, 2000)]:
        monkeypatch.setattr(engine_module, "CPU_BATCH", limits)
        batch = engine.evaluate_batch(structures)
        assert len(batch) == len(structures)
        for together, alone in zip(batch, singles, strict=True):
            assert_same(together, alone, TOLERANCE[dtype] / 10)
    assert engine.evaluate_batch([]) == []


def test_a_batch_in_parts_is_compiled_once(monkeypatch):
    engine = Engine(pair_potential(info={"test": "batch"}))
    monkeypatch.setattr(engine_module, "CPU_BATCH", (40, 10_000))
    structures = [molecule(n) for n in (9, 8, 9, 7, 9, 9, 5, 9, 9, 6, 2)]
    assert len(engine.evaluate_batch(structures)) == 11
    assert engine.num_compilations == 1


def test_a_batch_names_the_bad_structure(engine):
    positions, numbers, cell, pbc = crystal()
    spoiled = positions.copy()
    spoiled[2] = np.nan
    with pytest.raises(StructureError, match=r"structure 1: .*first atom 2"):
        engine.evaluate_batch([molecule(), (spoiled, numbers, cell, pbc)])


def test_an_error_of_a_batch_has_what_the_error_of_one_has(engine):
    positions, numbers, cell, pbc = molecule()
    positions[4] = positions[1]
    with pytest.raises(CoincidenceError) as alone:
        engine.evaluate(positions, numbers, cell, pbc)
    with pytest.raises(CoincidenceError) as together:
        engine.evaluate_batch([molecule(), (positions, numbers, cell, pbc)])
    assert str(together.value) == f"structure 1: {alone.value}"
    assert together.value.pairs == [(1, 4)]
    assert vars(together.value) == vars(alone.value)


def test_an_error_of_several_parts_takes_a_place():
    located = DeviceError("there is no tpu", "take cpu").locate("structure 3")
    assert str(located) == "structure 3: there is no tpu. take cpu"
    assert (located.problem, located.advice) == ("there is no tpu", "take cpu")
    assert str(copy.copy(located)) == str(located)


# Precision


def test_float32_agrees_with_float64(potential, double):
    single = Engine(potential, "float32")
    for make in STRUCTURES.values():
        assert_same(single.evaluate(*make()), double.evaluate(*make()), 2e-6)


def test_float64_leaves_the_process_alone(double):
    double.evaluate(*molecule())
    assert not jax.config.jax_enable_x64
    assert jax.numpy.ones(1).dtype == np.float32


def test_float32_stays_float32_in_a_float64_process(potential):
    single = Engine(potential, "float32")
    expected = single.evaluate(*crystal())
    before = single.num_compilations
    with jax.enable_x64(True):
        inside = single.evaluate(*crystal())
    assert single.num_compilations == before
    assert inside.energy == expected.energy


def test_totals_of_ten_thousand_atoms_keep_their_digits(potential, double):
    """10,000 atoms at DFT totals (some 10^7 eV): energies to 1e-6 eV/atom in float32 mode."""
    positions, numbers, _, _ = crystal(22, 2.9)
    positions, numbers = positions[:10_000], numbers[:10_000]
    single = Engine(potential, "float32").evaluate(positions, numbers)
    exact = double.evaluate(positions, numbers)
    assert abs(exact.energy) > 5e6
    assert abs(single.energy - exact.energy) / 10_000 < 1e-6
    assert np.abs(single.energies - exact.energies).max() < 1e-5
    expected = reference(potential, positions, numbers, None, False).sum()
    assert abs(exact.energy - expected) < 1e-6


def test_an_isolated_atom_has_its_reference_energy(engine, potential):
    energy_of_nothing = -1.0  # the double's embedding of no neighbors
    for number, reference_energy in zip(potential.elements, potential.atomic_energies, strict=True):
        result = engine.evaluate([[5.0, 5.0, 5.0]], [number])
        assert result.energy == reference_energy + energy_of_nothing
        assert np.array_equal(result.forces, np.zeros((1, 3)))


# Search on the device


@pytest.mark.parametrize("backend", ["dense", "cells", "nvalchemi"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_searching_on_the_device_gives_the_same(dtype, engine, name, backend):
    if backend == "nvalchemi":
        pytest.importorskip("nvalchemiops", reason="the extra nvalchemi is not installed")
    searching = Engine(pair_potential(), dtype, backend=backend)
    structure = STRUCTURES[name]()
    assert_same(searching.evaluate(*structure), engine.evaluate(*structure), TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["dense", "cells"])
def test_searching_survives_overflow(caplog, double, backend):
    """Edges treble and images appear between two calls: the second call is right all the same."""
    engine = Engine(pair_potential(), "float64", backend=backend)
    positions, numbers, cell, pbc = crystal(3, 4.2)
    engine.evaluate(positions, numbers, cell, pbc)
    with caplog.at_level(logging.INFO, "mlip_md"):
        for scale in (0.9, 0.62):
            now = positions * scale, numbers, cell * scale, pbc
            assert_same(engine.evaluate(*now), double.evaluate(*now), 1e-10)
    # The same cell, crowded: capacity was chosen for few edges and has to grow within the call.
    crowded = molecule(27)[0]
    gas = crowded * 3.0
    caplog.clear()
    with caplog.at_level(logging.INFO, "mlip_md"):
        for where in (gas, crowded):
            here = engine.evaluate(where, numbers)
            assert_same(here, double.evaluate(where, numbers), 1e-10)
    assert "grown from" in caplog.text


@pytest.mark.parametrize("backend", ["vesin", "dense", "cells"])
@pytest.mark.parametrize("offset", [(3000.0, 1500.0, 1.0), (1e6, 0.0, 0.0), (2e7, -3e7, 1e8)])
def test_a_fragment_that_flew_away_costs_no_digits(potential, backend, offset):
    """Two molecules far apart in float32: each as precise as alone, on every backend."""
    engine = Engine(potential, backend=backend)
    positions, numbers, _, _ = molecule()
    alone = engine.evaluate(positions, numbers)
    both = engine.evaluate(np.vstack([positions, positions + offset]), np.tile(numbers, 2))
    # The distance itself is rounded: 1e-8 Å at 1e8 Å, in float64.
    assert abs(both.energy - 2 * alone.energy) < 1e-5 * abs(alone.energy)
    assert np.abs(both.forces - np.tile(alone.forces, (2, 1))).max() < 1e-5 * np.ptp(alone.forces)


def test_a_search_that_contradicts_the_host_is_refused(monkeypatch):
    """The first list of a system on the device is compared with the host's."""
    engine = Engine(pair_potential(info={"test": "lossy"}), "float64", backend="dense")
    build = BUILDERS["dense"]

    def lossy(*arguments):
        pairs = build(*arguments)
        return pairs._replace(n_pairs=pairs.n_pairs - 1)

    monkeypatch.setitem(BUILDERS, "dense", lossy)
    with pytest.raises(NeighborError, match="report the structure"):
        engine.evaluate(*crystal())
    assert not engine.device_lists


def test_a_list_that_never_fits_is_refused(monkeypatch):
    engine = Engine(pair_potential(info={"test": "never fits"}), backend="dense")
    fetched = counted(monkeypatch)
    monkeypatch.setattr(Needs, "fit", lambda *_: np.False_)
    with pytest.raises(CapacityError, match=r"did not fit after 8 growths.*backend='vesin'"):
        engine.evaluate(*crystal())
    assert len(fetched) == 8
    assert not engine.device_lists


def test_memory_that_ends_is_a_named_error(potential, monkeypatch):
    """A real allocation that must fail, in the place of the network's."""
    engine = Engine(potential)
    monkeypatch.setattr(engine.runtime, "step", lambda *_: jnp.zeros(2**46))
    said = r"8 atoms with room for 192 edges do not fit.*GiB of this machine are free.*RESOURCE"
    with pytest.raises(CapacityError, match=said):
        engine.evaluate(*crystal())


def test_a_step_that_cannot_fit_is_refused_before_it_runs(monkeypatch):
    """By the compiler's plan: of energies and forces, and of second derivatives."""
    engine = Engine(pair_potential(info={"test": "no room"}))
    little = DeviceMemory(20000, 20000, "a small device")
    monkeypatch.setattr(devices, "device_memory", lambda _: little)
    fetched = counted(monkeypatch)
    for compute, name in ((engine.evaluate, "8 atoms with"), (engine.hessian, "second deriv")):
        for _ in range(2):
            with pytest.raises(CapacityError, match=name + r".*more than the \S+ GiB of") as caught:
                compute(*crystal())
            assert caught.value.needed > caught.value.available == 20000
    assert engine.num_compilations == 1
    assert not fetched
    monkeypatch.undo()
    engine.evaluate(*crystal())
    assert engine.num_compilations == 1


def counted(monkeypatch):
    """A list that receives what every call to the device brings back."""
    fetched, get = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: fetched.append(tree) or get(tree))
    return fetched


@pytest.mark.parametrize("backend", ["vesin", "dense", "cells"])
def test_one_round_trip_per_step(potential, backend, monkeypatch):
    """Energy, forces and flags come back together; a kept list never leaves the device."""
    engine = Engine(potential, backend=backend, skin=0.5)
    positions, numbers, cell, pbc = crystal(3)
    engine.evaluate(positions, numbers, cell, pbc)
    fetched, runs, run = counted(monkeypatch), [], engine.runtime.step
    monkeypatch.setattr(engine.runtime, "step", lambda *a: runs.append(a) or run(*a))
    rng = np.random.default_rng(0)
    for step in range(1, 6):
        positions = positions + rng.normal(scale=0.01, size=positions.shape)
        engine.evaluate(positions, numbers, cell, pbc)
        assert len(runs) == len(fetched) == step
    values = sum(leaf.size for leaf in jax.tree_util.tree_leaves(fetched[-1]))
    assert values <= 4 * ladder(len(numbers) + 1) + 9 + 8


def walk(engine, steps, seed=0):
    """A barostat and thermostat of a kind: the cell breathes and shears, atoms shake in place."""
    rng = np.random.default_rng(seed)
    positions, numbers, cell, pbc = crystal(3, 3.0)
    sites = positions @ np.linalg.inv(cell)
    strain, moved = np.zeros((3, 3)), np.zeros(sites.shape)
    for _ in range(steps):
        strain = 0.98 * strain + rng.normal(scale=0.004, size=(3, 3))
        moved = 0.98 * moved + rng.normal(scale=0.003, size=sites.shape)
        fractions, box = sites + moved, cell @ (np.eye(3) + strain)
        result = engine.evaluate(fractions @ box, numbers, box, pbc)
        assert np.isfinite(result.energy)
    return fractions @ box, numbers, box, pbc


@pytest.mark.parametrize("backend", ["vesin", "dense", "cells"])
def test_a_breathing_cell_compiles_a_handful_of_times(backend, double):
    engine = Engine(pair_potential(info={"test": f"npt {backend}"}), backend=backend, skin=0.5)
    last = walk(engine, 100)
    assert engine.num_compilations <= 4
    assert_same(engine.evaluate(*last), double.evaluate(*last), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["vesin", "dense", "cells"])
def test_ten_thousand_steps_compile_a_handful_of_times(backend, double):
    engine = Engine(pair_potential(info={"test": f"long npt {backend}"}), backend=backend, skin=0.5)
    last = walk(engine, 10_000, seed=1)
    assert engine.num_compilations <= 8
    assert_same(engine.evaluate(*last), double.evaluate(*last), 2e-5)


@pytest.mark.parametrize("backend", ["dense", "cells"])
def test_a_gas_compressed_to_a_third(backend, double):
    """Three times as many edges in one run: right all the way, log₁.₂₅ 3 = 5 capacities each."""
    engine = Engine(pair_potential(info={"test": f"gas {backend}"}), "float64", backend=backend)
    positions, numbers, cell, pbc = crystal(4, 3.6)
    for scale in np.linspace(1.0, 3 ** (-1 / 3), 12):
        now = positions * scale, numbers, cell * scale, pbc
        assert_same(engine.evaluate(*now), double.evaluate(*now), 1e-10)
    assert engine.num_compilations <= 10


def total_energies(engine, wrapping):
    """400 steps of 0.5 fs of NVE from the same start, atoms put back anywhere between steps."""
    positions, numbers, cell, pbc = crystal(3)
    rng = np.random.default_rng(0)
    mass, step = 12.0, 0.5 / 10.18  # u, fs in ASE's unit of time
    velocities = rng.normal(scale=0.02, size=positions.shape)
    result = engine.evaluate(positions, numbers, cell, pbc)
    totals, lists = [], set()
    for _ in range(400):
        velocities += 0.5 * step * result.forces / mass
        positions = positions + step * velocities
        if wrapping:
            hops = rng.integers(-2, 3, positions.shape)
            positions = (positions @ np.linalg.inv(cell) % 1.0 + hops) @ cell
        result = engine.evaluate(positions, numbers, cell, pbc)
        velocities += 0.5 * step * result.forces / mass
        totals.append(result.interaction_energy + 0.5 * mass * (velocities**2).sum())
        (device_list,) = engine.device_lists
        lists.add(float(np.asarray(device_list.kept.positions).sum()))
    assert 1 < len(lists) < 200, "the list was not kept, or never made anew"
    return np.array(totals) / len(numbers)


def test_energy_is_conserved_whether_atoms_are_wrapped_or_not():
    engine = Engine(pair_potential(), "float64", backend="cells", skin=0.5)
    totals = total_energies(engine, wrapping=False)
    drift = np.polyfit(np.arange(400) * 0.5e-3, totals, 1)[0]
    assert abs(drift) < 1e-5, "eV per atom and ps"
    assert np.ptp(totals) < 3e-5
    assert np.abs(totals - total_energies(engine, wrapping=True)).max() < 1e-9


def test_systems_in_turn_with_kept_lists(double, monkeypatch):
    """Same atoms in other places and cells, other atoms: no list is used for the wrong system."""
    monkeypatch.setattr(engine_module, "MAX_SYSTEMS", 3)
    engine = Engine(pair_potential(), "float64", backend="cells", skin=0.5)
    positions, numbers, cell, pbc = crystal(3)
    systems = [
        (positions, numbers, cell, pbc),
        (positions[::-1], numbers, cell, pbc),
        (positions * 1.1, numbers, cell * 1.1, pbc),
        (positions, numbers, cell, [True, True, False]),
        (positions, numbers[::-1], cell, pbc),
    ]
    for _ in range(2):
        for system in systems:
            assert_same(engine.evaluate(*system), double.evaluate(*system), 1e-10)
    before = engine.num_compilations
    for system in systems:
        engine.evaluate(*system)
    assert engine.num_compilations == before
    assert len(engine.device_lists) == 3
    first, second = systems[:2]
    for _ in range(2):
        assert_same(engine.evaluate(*first), double.evaluate(*first), 1e-10)
        assert_same(engine.evaluate(*second), double.evaluate(*second), 1e-10)


@pytest.mark.parametrize("backend", ["dense", "cells"])
def test_capacities_of_a_search_change_nothing(potential, double, backend, monkeypatch):
    """Need, need + 1 and four times need of edges, and of candidates, give the same numbers."""
    structure = crystal(3)
    home = double.evaluate(*structure)
    engine = Engine(potential, "float64", backend=backend, skin=0.3)
    engine.evaluate(*structure)
    (device_list,) = engine.device_lists
    edges, search = n_edges(potential, *structure), device_list.search
    candidates = int(device_list.kept.pairs.n_pairs)
    for change in (lambda n: n, lambda n: n + 1, lambda n: 4 * n):
        device_list.search = search._replace(candidates=change(candidates))
        device_list.kept = None
        shape = Shape(32, change(edges), 1, device_list.search)
        monkeypatch.setattr(engine.runtime.capacities, "choose", lambda *_, shape=shape: shape)
        result = engine.evaluate(*structure)
        assert_same(result, home, 1e-12)
        assert np.isfinite(result.forces).all()
        assert engine.device_lists == (device_list,)
        assert device_list.search == shape.search, "it fitted at once"


def test_an_incomplete_search_gives_no_numbers(potential):
    """Too few edges, images, slots or candidates: the device itself makes the energy NaN."""
    structure = check_structure(potential, *crystal())
    engine = Engine(potential, backend="dense")
    need = n_edges(potential, *crystal())

    def run(search, capacity):
        kept = nothing_kept(16, search, np.dtype("float32"), engine.device)
        output, _ = engine.runtime.compute([structure], Shape(16, capacity, 1, search), kept)
        whole = bool(output.needs.fit(search, capacity))
        assert np.isfinite(output.values).all() == whole
        return whole, output.needs

    dense = Search("dense", potential.cutoff, (True, True, True), reach=(1, 1, 1))
    assert run(dense, need)[0]
    assert not run(dense, need - 1)[0]
    assert not run(dense._replace(reach=(0, 1, 1)), need)[0]
    spec = NeighborSpec(potential.cutoff, 0.5, "cells", 1.2)
    cells, *_ = plan_search(spec, "cells", structure.positions, structure.cell, structure.pbc)
    whole, needs = run(cells, need)
    assert whole
    candidates, slots = int(needs.candidates), int(needs.slots)
    assert run(cells._replace(candidates=candidates, slots=slots), need)[0]
    assert not run(cells._replace(candidates=candidates - 1), need)[0]
    assert not run(cells._replace(slots=slots - 1), need)[0]


@pytest.mark.parametrize("backend", ["dense", "cells"])
def test_no_list_is_used_for_other_atoms(backend, double):
    """One atom fewer, and one more: each number of atoms has a list of its own."""
    engine = Engine(pair_potential(), "float64", backend=backend, skin=0.5)
    positions, numbers, cell, pbc = crystal(3)
    for n in (27, 26, 27, 25, 26):
        here = positions[:n], numbers[:n], cell, pbc
        assert_same(engine.evaluate(*here), double.evaluate(*here), 1e-10)
    assert len(engine.device_lists) == 3


@pytest.mark.parametrize("backend", ["vesin", "dense", "cells"])
def test_gaps_are_closed_once_a_step(potential, backend, monkeypatch):
    """Where they are closed at all: a list of placed atoms takes them as they are."""
    engine, calls = Engine(potential, backend=backend), []
    close = geometry.close_gaps
    counting = lambda *arguments: calls.append(arguments) or close(*arguments)  # noqa: E731
    for module in (geometry, host):
        monkeypatch.setattr(module, "close_gaps", counting)
    engine.evaluate(*molecule())
    engine.evaluate(*slab())
    assert len(calls) == 2


def test_coincident_atoms_are_found_on_the_device_too(potential):
    positions, numbers, cell, pbc = crystal()
    positions[5] = positions[2] + 0.01
    with pytest.raises(StructureError, match=r"atoms .*[25].* apart"):
        Engine(potential, backend="dense").evaluate(positions, numbers, cell, pbc)


# Sharing, threads, copies


def test_engines_share_weights_and_compilations(potential):
    one, other = Engine(potential), Engine(pair_potential())
    assert one.runtime is other.runtime
    assert Engine(potential, "float64").runtime is not one.runtime
    assert Engine(pair_potential(cutoff=4.0)).runtime is not one.runtime
    one.evaluate(*crystal())
    before = one.num_compilations
    other.evaluate(*crystal())
    assert other.num_compilations == before


@pytest.mark.parametrize("backend", ["vesin", "cells"])
def test_threads(potential, dtype, backend):
    """Several threads on new shapes: no double compilation, no mixed results, no shared list."""
    info = {"test": "threads", "dtype": dtype, "backend": backend}
    engine = Engine(pair_potential(info=info), dtype, backend=backend)
    structures = [crystal(), molecule(), slab(), molecule(27, seed=3)]
    expected = [Engine(potential, dtype).evaluate(*s) for s in structures]
    failures = []

    def work(offset):
        try:
            for k in range(8):
                index = (k + offset) % len(structures)
                assert_same(engine.evaluate(*structures[index]), expected[index], 1e-6)
        except BaseException as error:  # reported in the main thread
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert engine.num_compilations <= len(structures) + (backend == "cells")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_copies(duplicate, engine, dtype):
    expected = engine.evaluate(*crystal())
    before = engine.num_compilations
    again = duplicate(engine)
    assert again.dtype == dtype
    assert again.spec == engine.spec
    assert again.runtime is engine.runtime
    assert again.evaluate(*crystal()).energy == expected.energy
    assert again.num_compilations == before


def test_runtimes_are_freed():
    engine = Engine(pair_potential(info={"test": "freed"}))
    runtime = weakref.ref(engine.runtime)
    gc.collect()
    assert runtime() is engine.runtime
    del engine
    gc.collect()
    assert runtime() is None


# Errors


def test_devices():
    cpu = jax.local_devices(backend="cpu")[0]
    assert find_device("cpu") == find_device("cpu:0") == find_device(cpu) == cpu
    assert find_device(None) == jax.numpy.zeros(1).devices().pop()
    for wrong in ("cpu:99", "cpu:-1", "cpu:x", "quantum", "quantum:1"):
        with pytest.raises(ConfigError, match=f"no device '{wrong}'.*JAX sees cpu:0"):
            find_device(wrong)


def test_options_are_checked(potential):
    with pytest.raises(ConfigError, match="float16"):
        Engine(potential, "float16")
    for wrong in ({"skin": -1.0}, {"backend": "magic"}, {"capacity_margin": 0.0}):
        with pytest.raises(ConfigError):
            Engine(potential, **wrong)


def test_bad_structures_are_refused(engine):
    positions, numbers, cell, pbc = crystal()
    with pytest.raises(StructureError, match="no atoms"):
        engine.evaluate(np.zeros((0, 3)), [], cell, pbc)
    with pytest.raises(StructureError, match="8 positions but atomic numbers of shape"):
        engine.evaluate(positions, numbers[:-1], cell, pbc)
    with pytest.raises(UnsupportedElementError, match=r"does not know Si; .*H, C, O"):
        engine.evaluate(positions, np.where(numbers == 6, 14, numbers), cell, pbc)
    for bad in (np.nan, np.inf):
        spoiled = positions.copy()
        spoiled[4, 2] = bad
        with pytest.raises(StructureError, match="first atom 4"):
            engine.evaluate(spoiled, numbers, cell, pbc)
    with pytest.raises(StructureError, match="linearly dependent"):
        engine.evaluate(positions, numbers, np.zeros((3, 3)), pbc)


def test_coincident_atoms_are_named(engine):
    positions, numbers, cell, pbc = crystal()
    numbers[[2, 5]] = 8, 1
    positions[5] = positions[2] + [0.01, 0, 0] + 3 * cell[1]
    with pytest.raises(StructureError, match=r"(5 \(H\).*2 \(O\)|2 \(O\).*5 \(H\)).*0.01 Å apart"):
        engine.evaluate(positions, numbers, cell, pbc)
    with pytest.raises(StructureError, match="image"):
        engine.evaluate(positions[:1], numbers[:1], np.diag([0.04, 9.0, 9.0]), pbc)
    positions[5] = positions[2] + [0.06, 0, 0]
    engine.evaluate(positions, numbers, cell, pbc)


def test_non_finite_results_name_their_atoms(engine, monkeypatch):
    """A network that fails at one atom: the error says which, and only that structure fails."""
    step = engine.runtime.step

    def spoil(rows):
        def spoiled(*arguments):
            output, kept = step(*arguments)
            values = np.array(output.values)
            values[rows] = np.nan
            return output._replace(values=values), kept

        monkeypatch.setattr(engine.runtime, "step", spoiled)

    positions, numbers, cell, pbc = crystal()
    numbers[3] = 6
    spoil([3])
    with pytest.raises(NonFiniteError, match=r"atoms 3 \(C\) that are not finite; the shortest"):
        engine.evaluate(positions, numbers, cell, pbc)
    spoil([-1])
    with pytest.raises(NonFiniteError, match="stress"):
        engine.evaluate(positions, numbers, cell, pbc)


def test_a_diverging_network_is_caught(potential):
    class Diverging(type(potential)):
        @property
        def network(self):
            return PairNetwork(len(self.elements), self.cutoff)

    weights = {"params": {k: v * np.float32(1e25) for k, v in potential.params["params"].items()}}
    diverging = Diverging(
        potential.config, weights, potential.elements, potential.atomic_energies, 5.0, 20.0
    )
    with pytest.raises(NonFiniteError, match="not finite"):
        Engine(diverging).evaluate(*crystal())


def test_energies_beyond_float64_are_refused(potential):
    heavy = dataclasses.replace(potential, atomic_energies=np.full(3, 1e308))
    positions, numbers, cell, pbc = crystal()
    with pytest.raises(NonFiniteError, match="reference energies"):
        Engine(heavy).evaluate(positions, numbers, cell, pbc)


def test_every_error_is_ours(engine):
    for arguments in [([[0, 0, 0]], [6], np.eye(3), [1, 1]), ([[0, 0]], [6]), ([[0, 0, 0]], [[6]])]:
        with pytest.raises(MLIPError):
            engine.evaluate(*arguments)
