"""Graph store, epoch plans and batches: nothing lost, doubled, mixed up or out of its budget."""

import dataclasses
import errno
import gc
import json
import os
import threading
import time
from types import SimpleNamespace

import ase.build
import jax
import numpy as np
import pytest
from ase.build import molecule
from ase.neighborlist import neighbor_list as ase_neighbor_list

from mlip_md.errors import DataError, OutputError
from mlip_md.graph import edge_vectors
from mlip_md.trainer.data import (
    BatchBudget,
    GraphStore,
    LabeledStructure,
    iterate_batches,
    make_batch,
    open_store,
    plan_epoch,
)
from mlip_md.trainer.data.batching import pack_greedily

CUTOFF = 4.0
E0 = {1: -13.6, 6: -1030.5, 8: -2043.9}


def labeled(atoms, generator, stress=None):
    positions = atoms.positions + generator.normal(scale=0.03, size=(len(atoms), 3))
    energy = sum(E0[int(z)] for z in atoms.numbers) + generator.normal()
    forces = generator.normal(size=(len(atoms), 3))
    cell = {"cell": atoms.cell.array, "pbc": atoms.pbc} if atoms.pbc.any() else {}
    return LabeledStructure(atoms.numbers, positions, energy, forces, stress=stress, **cell)


@pytest.fixture(scope="module")
def structures():
    generator = np.random.default_rng(0)
    names = ["H2O", "CH4", "CO2", "CH3OH", "C6H6", "C2H6", "H2", "CH3COOH"]
    molecules = [labeled(molecule(n), generator) for n in names * 12]
    crystal = ase.build.bulk("C", "diamond", 3.57, cubic=False)
    slab = ase.build.bulk("C", "sc", 2.2) * (2, 2, 1)
    slab.pbc = (True, True, False)
    periodic = [labeled(crystal, generator, np.diag([0.1, 0.2, 0.3])), labeled(slab, generator)]
    return molecules + periodic


@pytest.fixture(scope="module")
def store(structures):
    return GraphStore.from_structures(structures, CUTOFF, atomic_energies=E0)


@pytest.fixture(scope="module")
def budget(store):
    return BatchBudget.from_card(8, store=store)


def sorted_distances(structure):
    atoms = ase.Atoms(
        numbers=structure.atomic_numbers,
        positions=structure.positions,
        cell=structure.cell,
        pbc=structure.pbc,
    )
    return np.sort(ase_neighbor_list("d", atoms, CUTOFF))


def test_edges_against_ase(structures, store):
    """Shifts, sender and receiver are right if every vector's length is."""
    budget = BatchBudget(int(store.num_atoms.max()) + 1, int(store.num_edges.max()), 2)
    for index in (0, 4, len(store) - 2, len(store) - 1):
        graph = make_batch(store, np.array([index]), budget).graph
        vectors = np.asarray(edge_vectors(graph))[graph.edge_mask]
        lengths = np.sort(np.linalg.norm(vectors, axis=1))
        np.testing.assert_allclose(lengths, sorted_distances(structures[index]), atol=2e-6)
        assert (np.diff(graph.receivers) >= 0).all()


def test_directions_of_edges(structures, store):
    index = len(store) - 2  # the crystal: wrong shifts would hide in no other structure
    structure = structures[index]
    graph = make_batch(store, np.array([index]), BatchBudget(50, 1000, 2)).graph
    atoms = ase.Atoms(
        numbers=structure.atomic_numbers,
        positions=structure.positions,
        cell=structure.cell,
        pbc=True,
    )
    i, j, vectors = ase_neighbor_list("ijD", atoms, CUTOFF)
    real = graph.edge_mask
    ours = np.column_stack(
        [graph.senders[real], graph.receivers[real], np.asarray(edge_vectors(graph))[real]]
    )
    theirs = np.column_stack([i, j, vectors])
    for array in (ours, theirs):
        array[:] = array[np.lexsort(np.round(array, 3).T)]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_batch_content(structures, store, budget):
    indices = np.array([3, 97, 0, 96, 11])
    batch = make_batch(store, indices, budget)
    graph = batch.graph
    start = 0
    for slot, index in enumerate(indices):
        structure = structures[index]
        rows = slice(start, start + len(structure))
        np.testing.assert_array_equal(graph.node_graph[rows], slot)
        relative = graph.positions[rows] - graph.positions[start]
        expected = structure.positions - structure.positions[0]
        np.testing.assert_allclose(relative, expected, atol=1e-6)
        np.testing.assert_allclose(batch.forces[rows], structure.forces, rtol=1e-6)
        numbers = np.asarray(store.elements)[graph.species[rows]]
        np.testing.assert_array_equal(numbers, structure.atomic_numbers)
        interaction = structure.energy - sum(E0[int(z)] for z in structure.atomic_numbers)
        np.testing.assert_allclose(batch.energy[slot], interaction, atol=1e-6)
        cell = np.zeros((3, 3)) if structure.cell is None else structure.cell
        np.testing.assert_allclose(graph.cell[slot], cell, rtol=1e-6)
        start += len(structure)
    assert batch.stress_mask.tolist() == [False, False, False, True] + [False] * 5
    np.testing.assert_allclose(batch.stress[3], np.diag([0.1, 0.2, 0.3]), rtol=1e-6)
    # an edge never leaves its structure
    real = graph.edge_mask
    owner = graph.node_graph
    np.testing.assert_array_equal(owner[graph.senders[real]], owner[graph.receivers[real]])


def test_padding(store, budget):
    batch = make_batch(store, np.array([0, 1]), budget)
    graph = batch.graph
    atoms, edges = store.num_atoms[:2].sum(), store.num_edges[:2].sum()
    assert (graph.n_nodes, graph.n_edges, graph.n_graphs) == dataclasses.astuple(budget)
    for mask, count in ((graph.node_mask, atoms), (graph.edge_mask, edges), (graph.graph_mask, 2)):
        assert mask[:count].all()
        assert not mask[count:].any()
    np.testing.assert_array_equal(graph.senders[edges:], budget.n_node - 1)
    np.testing.assert_array_equal(graph.receivers[edges:], budget.n_node - 1)
    np.testing.assert_array_equal(graph.node_graph[atoms:], budget.n_graph - 1)
    for labels in (batch.energy[2:], batch.forces[atoms:], batch.stress, graph.shifts[edges:]):
        assert not np.any(labels)
    assert graph.positions.dtype == batch.energy.dtype == batch.forces.dtype == np.float32
    assert {x.dtype for x in (graph.senders, graph.receivers, graph.shifts, graph.species)} == {
        np.dtype(np.int32)
    }
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))


def test_cards():
    mace, nequip = BatchBudget.from_card(64, 32, 288), BatchBudget.from_card(16, 32, 288)
    assert dataclasses.astuple(mace) == (2049, 36864, 65)
    assert dataclasses.astuple(nequip) == (513, 9216, 17)


def test_automatic_budget(structures):
    small = GraphStore.from_structures(structures[:12], CUTOFF)
    budget = BatchBudget.from_card(16, store=small)
    nodes, pairs = small.num_atoms, small.num_edges / 2
    usual = np.ceil(nodes.mean() + 2 * nodes.std() / 4), np.ceil(pairs.mean() + 2 * pairs.std() / 4)
    assert dataclasses.astuple(budget) == (16 * usual[0] + 1, 32 * usual[1], 17)
    tight = BatchBudget.from_card(1, store=small)
    assert tight.n_node == small.num_atoms.max() + 1
    assert tight.fits(small).all()
    half = BatchBudget.from_card(16, int(usual[0] // 2), store=small)
    assert 0.4 < half.n_edge / budget.n_edge < 0.6
    with pytest.raises(DataError, match="max_n_edge is not given"):
        BatchBudget.from_card(16, 32)
    with pytest.raises(DataError, match="batch_size = 0"):
        BatchBudget.from_card(0, 32, 288)


@pytest.mark.parametrize("size", [4, 16, 64])
def test_as_many_structures_as_are_asked_for_fit_as_a_rule(size):
    """Of sizes as molecules have them: most are small, some several times as large."""
    random = np.random.default_rng(size)
    atoms = np.round(np.exp(random.normal(2.5, 0.6, 5000))).astype(np.int64) + 1
    edges = 2 * np.round(atoms * np.minimum(atoms - 1, random.normal(14, 2, 5000)) / 2)
    many = SimpleNamespace(num_atoms=atoms, num_edges=edges.astype(np.int64))
    budget = BatchBudget.from_card(size, store=many)
    assert budget.fits(many).all()
    starts = pack_greedily(atoms, many.num_edges, budget)
    counts = np.diff([*starts, 5000])
    assert (counts[:-1] == size).mean() > 0.85
    assert atoms.sum() / (len(starts) * (budget.n_node - 1)) > 0.55


def test_published_packing(reference_data):
    golden = json.loads(
        (reference_data / "golden" / "training_golden.json").read_text(encoding="utf-8")
    )["packing"]
    sizes = np.array(golden["sizes"])
    budget = BatchBudget.from_card(golden["batch_size"], golden["max_n_node"], golden["max_n_edge"])
    assert dataclasses.astuple(budget) == tuple(
        golden[f"n_{what}_padded"] for what in ("node", "edge", "graph")
    )
    starts = pack_greedily(sizes[:, 0], sizes[:, 1], budget)
    batches = [part.tolist() for part in np.split(sizes[:, 0], starts[1:])]
    assert batches == golden["batches_n_node"]


@pytest.mark.parametrize("seed", range(5))
def test_packing_is_greedy(seed):
    generator = np.random.default_rng(seed)
    nodes, edges = generator.integers(1, 40, 300), generator.integers(0, 700, 300)
    budget = BatchBudget(120, 1500, 9)
    starts = pack_greedily(nodes, edges, budget)
    stops = [*starts[1:], 300]
    assert starts[0] == 0
    for start, stop in zip(starts, stops, strict=True):
        assert stop > start
        assert nodes[start:stop].sum() <= 119
        assert edges[start:stop].sum() <= 1500
        assert stop - start <= 8
        if stop < 300:  # the next one would not have fitted
            more = slice(start, stop + 1)
            assert nodes[more].sum() > 119 or edges[more].sum() > 1500 or stop + 1 - start > 8


def test_plan_holds_everything_once_and_is_pure(store, budget):
    plans = {epoch: plan_epoch(store, budget, 7, epoch) for epoch in (0, 1)}
    for plan in plans.values():
        assert sorted(np.concatenate(plan)) == list(range(len(store)))
    np.random.seed(123)  # noqa: NPY002 - global state must not matter
    again = plan_epoch(store, budget, 7, 0)
    assert [p.tolist() for p in again] == [p.tolist() for p in plans[0]]
    assert np.concatenate(plans[0]).tolist() != np.concatenate(plans[1]).tolist()
    other_seed = plan_epoch(store, budget, 8, 0)
    assert np.concatenate(plans[0]).tolist() != np.concatenate(other_seed).tolist()
    ordered = plan_epoch(store, budget, 7, 0, shuffle=False)
    assert np.concatenate(ordered).tolist() == list(range(len(store)))


def test_an_epoch_of_batches(store, budget):
    plan = plan_epoch(store, budget, 0, 3)
    energies = []
    for _, batch in iterate_batches(store, plan, budget):
        assert (batch.graph.n_nodes, batch.graph.n_edges) == (budget.n_node, budget.n_edge)
        assert not batch.graph.node_mask[-1]
        energies.append(batch.energy[batch.graph.graph_mask])
    assert len(energies) == len(plan)
    np.testing.assert_array_equal(
        np.sort(np.concatenate(energies)), np.sort(store.interaction_energy)
    )


def test_oversize(store):
    budget = BatchBudget(7, 30, 5)
    with pytest.raises(DataError, match=r"fit into no batch.*6 atoms and 30 edges.*max_n_node"):
        plan_epoch(store, budget, 0, 0)
    plan = plan_epoch(store, budget, 0, 0, on_oversize="drop")
    fits = budget.fits(store)
    assert 0 < fits.sum() < len(store)
    np.testing.assert_array_equal(np.sort(np.concatenate(plan)), np.flatnonzero(fits))
    with pytest.raises(DataError, match="nothing would be left"):
        plan_epoch(store, BatchBudget(2, 1, 2), 0, 0, on_oversize="drop")
    with pytest.raises(DataError, match="on_oversize"):
        plan_epoch(store, budget, 0, 0, on_oversize="ignore")
    with pytest.raises(DataError, match="do not fit into"):
        make_batch(store, np.arange(20), budget)


def test_labels_need_atomic_energies(structures):
    bare = GraphStore.from_structures(structures[:3], CUTOFF)
    with pytest.raises(DataError, match="with_atomic_energies"):
        make_batch(bare, np.array([0]), BatchBudget(100, 1000, 3))


def test_impossible_structures():
    numbers, forces = np.array([1, 1]), np.zeros((2, 3))
    near = LabeledStructure(numbers, np.array([[0, 0, 0], [0, 0, 1e-3]]), 0.0, forces, name="f:[7]")
    with pytest.raises(DataError, match=r"f:\[7\]: two atoms are 0\.0010 Å apart"):
        GraphStore.from_structures([near], CUTOFF)
    cell = {"cell": 4 * np.eye(3), "pbc": np.ones(3, bool), "name": "f:[8]"}
    lost = LabeledStructure(numbers, np.array([[0, 0, 0], [4e10, 0, 1]]), 0.0, forces, **cell)
    with pytest.raises(DataError, match=r"f:\[8\]: an atom is 1\.0e\+10 cells away"):
        GraphStore.from_structures([lost], CUTOFF)
    with pytest.raises(DataError, match="no structures"):
        GraphStore.from_structures([], CUTOFF)
    for changes, message in (
        ({"positions": np.zeros((3, 3))}, "positions have shape"),
        ({"forces": np.full((2, 3), np.nan)}, "forces hold NaN"),
        ({"energy": np.inf}, "energies hold NaN or infinity"),
        ({"atomic_numbers": np.array([1, 0])}, "allowed are 1 to 118"),
        ({"pbc": np.array([True] * 3)}, "periodic along a, b, c .* give a cell"),
        ({"positions": np.full((2, 3), 1e13)}, "no longer resolves"),
    ):
        fields = {"atomic_numbers": numbers, "positions": np.eye(3)[:2], "energy": 0.0}
        with pytest.raises(DataError, match=message):
            LabeledStructure(**(fields | {"forces": forces} | changes))


def test_far_from_the_origin_nothing_is_lost(structures):
    structure = structures[3]
    moved = dataclasses.replace(structure, positions=structure.positions + 1e4)
    near, far = (
        make_batch(
            GraphStore.from_structures([s], CUTOFF, atomic_energies=E0),
            np.array([0]),
            BatchBudget(20, 200, 2),
        ).graph
        for s in (structure, moved)
    )
    np.testing.assert_allclose(far.positions, near.positions, atol=1e-6)


def test_store_in_a_folder(structures, store, budget, tmp_path, monkeypatch):
    monkeypatch.setattr("mlip_md.trainer.data.blocks.CHUNK", 7)  # many blocks, some without cells
    folder = tmp_path / "graphs"
    made = GraphStore.from_structures(iter(structures), CUTOFF, folder=folder, atomic_energies=E0)
    opened = open_store(folder).with_atomic_energies(E0)
    assert isinstance(opened.positions, np.memmap)
    plan = plan_epoch(store, budget, 0, 0)
    for other in (made, opened):
        assert (other.elements, other.cutoff, other.names) == (store.elements, CUTOFF, store.names)
        assert [p.tolist() for p in plan_epoch(other, budget, 0, 0)] == [p.tolist() for p in plan]
        for indices in plan:
            batches = (make_batch(s, indices, budget) for s in (store, other))
            jax.tree.map(np.testing.assert_array_equal, *batches)
    assert {path.suffix for path in folder.iterdir()} == {".bin", ".json", ".jsonl"}  # no rests
    with pytest.raises(DataError, match="exists already"):
        GraphStore.from_structures(structures, CUTOFF, folder=folder)
    forces = folder / "forces.bin"
    content = bytearray(forces.read_bytes())
    content[-3] ^= 1
    forces.write_bytes(content)
    with pytest.raises(DataError, match=r"forces\.bin is damaged"):
        open_store(folder)
    forces.unlink()
    with pytest.raises(DataError, match="not a readable graph store"):
        open_store(folder)


def test_a_store_appears_whole_and_synced(structures, tmp_path, monkeypatch):
    folder, synced, fsync = tmp_path / "graphs", {}, os.fsync

    def watch(handle):
        synced.setdefault(os.fstat(handle).st_ino, folder.exists())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", watch)
    GraphStore.from_structures(structures, CUTOFF, folder=folder)
    files = [folder, *folder.iterdir()]
    assert len(files) > 10
    assert [synced.get(path.stat().st_ino) for path in files] == [False] * len(files)
    assert synced[tmp_path.stat().st_ino] is True  # the name itself, last

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OutputError, match=r"other could not be written \(No space left"):
        GraphStore.from_structures(structures, CUTOFF, folder=tmp_path / "other")
    assert list(tmp_path.iterdir()) == [folder]


def test_subset(store, budget):
    rows = np.array([97, 5, 30])
    subset = store.subset(rows)
    assert subset.names == tuple(store.names[k] for k in rows)
    np.testing.assert_array_equal(subset.interaction_energy, store.interaction_energy[rows])
    ours = make_batch(subset, np.array([2, 0]), budget)
    theirs = make_batch(store, np.array([30, 97]), budget)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert subset.positions is store.positions
    offsets = np.concatenate([[0], np.cumsum(store.num_atoms)])
    expected = [store.degrees()[offsets[k] : offsets[k + 1]] for k in rows]
    np.testing.assert_array_equal(subset.degrees(), np.concatenate(expected))


def test_assembly_is_fast(store):
    """Far from any loop over atoms: 64 molecules in well under 50 ms even on a busy machine."""
    budget = BatchBudget.from_card(64, store=store)
    indices = plan_epoch(store, budget, 0, 0)[0]
    times = []
    for _ in range(10):
        start = time.perf_counter()
        make_batch(store, indices, budget)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


def count_threads():
    gc.collect()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        count = sum(thread.name.startswith("batches") for thread in threading.enumerate())
        if not count:
            break
        time.sleep(0.01)
    return count


@pytest.fixture
def made(monkeypatch):
    """What ``make_batch`` was called with."""
    calls = []

    def make(store, indices, budget, dtype):
        calls.append(int(indices[0]))
        return make_batch(store, indices, budget, dtype)

    monkeypatch.setattr("mlip_md.trainer.data.batching.make_batch", make)
    return calls


def test_batches_come_in_order_with_their_structures(store, budget, made):
    plan = [np.array([k % len(store)]) for k in range(40)]
    for ahead in (0, 1, 3, 100):
        pairs = list(iterate_batches(store, plan, budget, ahead))
        assert [indices for indices, _ in pairs] == plan
        for indices, batch in pairs:
            expected = store.interaction_energy[indices]
            np.testing.assert_array_equal(batch.energy[:1], expected)
    assert list(iterate_batches(store, [], budget)) == []
    assert len(made) == 4 * 40
    assert count_threads() == 0


def test_an_error_of_a_batch_is_raised_in_its_place(store, budget):
    plan = [np.array([0]), np.array([1]), np.arange(len(store)), np.array([2])]
    seen = []
    with pytest.raises(DataError, match="do not fit into"):  # noqa: PT012 - the loop is what raises
        for indices, _ in iterate_batches(store, plan, budget):
            seen.append(int(indices[0]))
    assert seen == [0, 1]
    assert count_threads() == 0


def test_no_batch_is_made_for_who_has_left(store, budget, made):
    plan = [np.array([k % len(store)]) for k in range(10**4)]
    for indices, _ in iterate_batches(store, plan, budget, 2):
        if indices[0] == 5:
            break
    assert count_threads() == 0
    assert 6 <= len(made) <= 9
    iterator = iterate_batches(store, plan, budget, 2)
    next(iterator)
    iterator.close()
    assert count_threads() == 0
    assert len(made) <= 13
