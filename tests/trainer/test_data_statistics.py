"""Statistics of a data set: E0 with its rank, neighbors, shortest distances."""

import itertools
import json
import logging

import ase.build
import numpy as np
import pytest
from ase.build import molecule
from ase.neighborlist import neighbor_list as ase_neighbor_list

from mlip_md.errors import DataError
from mlip_md.trainer.data import (
    GraphStore,
    LabeledStructure,
    compute_statistics,
    fit_atomic_energies,
    iterate,
)
from mlip_md.trainer.data.statistics import describe_open_energies, warn_of_open_energies

E0 = {1: -13.6, 6: -1030.5, 8: -2043.9}


def labeled(name, shift=0.0, scale=1.0):
    atoms = molecule(name) if isinstance(name, str) else name
    energy = sum(E0[int(z)] for z in atoms.numbers) + shift
    cell = {"cell": atoms.cell.array, "pbc": atoms.pbc} if atoms.pbc.any() else {}
    forces = np.full((len(atoms), 3), 0.5)
    return LabeledStructure(
        atoms.numbers, scale * atoms.positions, energy, forces, name=str(name), **cell
    )


def statistics_of(structures, cutoff=5.0, **options):
    return compute_statistics(GraphStore.from_structures(structures, cutoff), **options)


def test_published_fit(reference_data):
    numbers = json.loads(
        (reference_data / "golden" / "training_golden.json").read_text(encoding="utf-8")
    )["e0_fit"]
    arrays = np.load(reference_data / "golden" / "training_golden.npz")
    counts = np.zeros((4, 3))
    owner = np.repeat(np.arange(4), arrays["e0_n_node"])
    np.add.at(counts, (owner, arrays["e0_species"]), 1)
    energies, undetermined = fit_atomic_energies(counts, arrays["e0_energy"], (1, 6, 8))
    np.testing.assert_allclose(energies, [numbers[k] for k in "012"], rtol=1e-10)
    assert undetermined == ()


def test_exact_energies_are_found():
    data = [labeled(name) for name in ("H2O", "CH4", "CO2", "CH3OH", "C2H6")]
    statistics = statistics_of(data)
    assert statistics.elements == (1, 6, 8)
    np.testing.assert_allclose(statistics.atomic_energies, list(E0.values()), atol=1e-8)
    assert statistics.undetermined == ()
    store = GraphStore.from_structures(data, 5.0).with_atomic_energies(statistics.atomic_energies)
    np.testing.assert_allclose(store.interaction_energy, 0, atol=1e-4)


def test_interaction_energies_keep_their_digits():
    """Totals are subtracted in float64: float32 resolves only 0.001 eV at -10 000 eV."""
    shifts = [1.23456e-3, 5e-4, -7e-4]
    data = [labeled(n, s) for n, s in zip(("C6H6", "CH3OH", "CH3COOH"), shifts, strict=True)]
    store = GraphStore.from_structures(data, 5.0, atomic_energies=E0)
    np.testing.assert_allclose(store.interaction_energy, shifts, atol=1e-8)


@pytest.mark.parametrize(
    ("names", "combinations"),
    [
        (["H2O", "H2O"], ["1 E0(H) - 2 E0(O)"]),
        (["CH4", "C6H6", "CO2", "CO2"], []),
        (["C2H4", "C3H6_D3h"], ["1 E0(H) - 2 E0(C)"]),
        (["CH3OH", "CH4"], ["1 E0(H) - 4 E0(C)"]),
        (["CH3OH"], ["1 E0(H) - 4 E0(C)", "1 E0(H) - 4 E0(O)"]),
    ],
)
def test_rank(names, combinations, caplog):
    data = [labeled(name, scale=1 + 0.01 * k) for k, name in enumerate(names)]
    statistics = statistics_of(data)
    with caplog.at_level(logging.WARNING):
        warn_of_open_energies(statistics)
    assert list(statistics.undetermined) == combinations
    one_formula = len(combinations) == len(statistics.elements) - 1
    warned = [] if one_formula else combinations
    assert [*map(bool, describe_open_energies(statistics))] == [True] * one_formula
    for text, record in zip(warned, caplog.records, strict=True):
        assert f"any multiple of {text}. " in record.getMessage()
        assert "isolated atoms" in record.getMessage()
    # what is named open is open: adding it changes no total energy
    counts = GraphStore.from_structures(data, 5.0).compositions
    for text in statistics.undetermined:
        vector = np.zeros(len(statistics.elements))
        for sign, term in zip(" " + text[0], text, strict=False):
            del sign, term
        symbols = {"H": 1, "C": 6, "O": 8}
        words = ("+ " + text).split()
        for sign, factor, name in zip(words[::3], words[1::3], words[2::3], strict=True):
            index = statistics.elements.index(symbols[name[3:-1]])
            vector[index] = float(factor) * (1 if sign == "+" else -1)
        np.testing.assert_array_equal(counts @ vector, 0)


def test_given_and_zero_energies():
    data = [labeled("H2O"), labeled("H2O", scale=1.1)]
    given = statistics_of(data, atomic_energies=E0)
    np.testing.assert_array_equal(given.atomic_energies, [E0[1], E0[8]])
    assert (given.atomic_energies_source, given.undetermined) == ("given", ())
    zero = statistics_of(data, atomic_energies="zero")
    np.testing.assert_array_equal(zero.atomic_energies, 0)
    with pytest.raises(DataError, match=r"no atomic energy \(E0\) is given for O"):
        statistics_of(data, atomic_energies={1: -13.6})
    with pytest.raises(DataError, match="'mean' is not allowed"):
        statistics_of(data, atomic_energies="mean")
    json.dumps(given.to_dict())


def test_neighbors_and_distances_against_ase():
    """Lonely atoms do not count as atoms with neighbors, lonely structures have no distance."""
    far = ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 30.0]])
    crystal = ase.build.bulk("C", "diamond", 3.57, cubic=False)
    pair = molecule("CH4") + ase.Atoms("O", positions=[[40.0, 0, 0]])
    frames = [molecule("CH3OH"), far, crystal, pair]
    statistics = statistics_of([labeled(a) for a in frames], 4.0, atomic_energies=E0)
    degrees, shortest = [], []
    for atoms in frames:
        i, d = ase_neighbor_list("id", atoms, 4.0)
        degrees.append(np.bincount(i, minlength=len(atoms)))
        shortest += [d.min()] if len(d) else []
    degrees = np.concatenate(degrees)
    np.testing.assert_allclose(statistics.avg_num_neighbors, degrees[degrees > 0].mean())
    np.testing.assert_allclose(statistics.avg_r_min, np.mean(shortest), rtol=1e-6)
    assert statistics.num_edges == degrees.sum()
    assert statistics.forces_rms == pytest.approx(0.5)


def test_no_neighbors_at_all():
    far = ase.Atoms("H2", positions=[[0, 0, 0], [0, 0, 30.0]])
    with pytest.raises(DataError, match=r"no atom has a neighbor within the cutoff of 5\.0"):
        statistics_of([labeled(far)])


def test_elements_of_another_store():
    store = GraphStore.from_structures([labeled("H2O", 0.25)], 5.0).with_elements([8, 6, 1])
    assert store.elements == (1, 6, 8)
    np.testing.assert_array_equal(store.compositions, [[2, 0, 1]])
    np.testing.assert_allclose(store.with_atomic_energies(E0).interaction_energy, [0.25], atol=1e-6)
    with pytest.raises(DataError, match="CO2: C is not among the elements H, O"):
        GraphStore.from_structures([labeled("CO2")], 5.0, elements=[1, 8])
    with pytest.raises(DataError, match="CO2: C is not among the elements H, O"):
        GraphStore.from_structures([labeled("CO2")], 5.0).with_elements([1, 8])


def test_water_clusters_leave_energies_open(reference_data):
    data = iterate(reference_data / "data" / "spice_mini_gfn2" / "mini_wat.hdf5")
    statistics = statistics_of(itertools.islice(data, 5))
    assert statistics.undetermined == ("1 E0(H) - 2 E0(O)",)
    assert 20 < statistics.avg_num_neighbors < 35
    assert 0.85 < statistics.avg_r_min < 1.0
