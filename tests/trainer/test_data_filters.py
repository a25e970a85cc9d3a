"""Curation: each filter removes what it names, and only that; counts add up."""

import dataclasses
import itertools

import ase.build
import numpy as np
import pydantic
import pytest
from ase.build import molecule

from mlip_md.errors import DataError
from mlip_md.trainer.data import LabeledStructure, iterate
from mlip_md.trainer.data.filters import (
    CurationReport,
    apply_filters,
    has_single_bonds,
    make_filters,
)
from mlip_md.trainer.recipe import CurationConfig, DataConfig, load_recipe


def structure(atoms="H2O", forces=None, **changes):
    atoms = molecule(atoms) if isinstance(atoms, str) else atoms
    forces = np.zeros((len(atoms), 3)) if forces is None else forces
    periodic = bool(atoms.pbc.any())
    cell = {"cell": atoms.cell.array, "pbc": atoms.pbc} if periodic else {}
    return LabeledStructure(atoms.numbers, atoms.positions, -1.0, forces, **cell, **changes)


def pushed(*forces):
    array = np.zeros((3, 3))
    array[: len(forces), 0] = forces
    return structure(forces=array)


def curate(structures, **options):
    report = CurationReport()
    filters = make_filters(CurationConfig(**options))
    return list(apply_filters(structures, filters, report)), report


@pytest.mark.parametrize(
    "name", ["H2", "H2O", "CH4", "NH3", "C2H6", "C6H6", "CH3SH", "HCl", "SiH4"]
)
def test_sound_molecules(name):
    assert has_single_bonds(structure(name))


def test_hydrogens_without_or_with_two_bonds():
    water = molecule("H2O")
    lost = water.copy()
    lost.positions[1] += [0, 3, 0]
    assert not has_single_bonds(structure(lost))
    shared = water + molecule("H2O")
    shared.positions[3:] += water.positions[1] - shared.positions[3] + [0, 1.1, 0]
    assert not has_single_bonds(structure(shared))
    cation = water + ase.Atoms("Na", positions=[water.positions[1] + [0, 1.6, 0]])
    assert has_single_bonds(structure(cation))


def test_bonds_across_a_periodic_boundary():
    water = molecule("H2O", cell=[6, 6, 6], pbc=True)
    water.positions -= water.positions[0]  # hydrogens now on both sides of the faces
    water.wrap()
    assert has_single_bonds(structure(water))
    water.pbc = False
    assert not has_single_bonds(structure(water))


def test_a_cell_that_is_too_small_to_search_is_named():
    grain = ase.Atoms("H", cell=[1e-3] * 3, pbc=True)
    with pytest.raises(DataError, match=r"^f:\[7\]: 1 atoms with lattice planes"):
        has_single_bonds(structure(grain, name="f:[7]"))


def test_each_filter_removes_its_own():
    lost = molecule("H2O")
    lost.positions[1] += [0, 3, 0]
    data = [
        structure(),
        structure(lost),
        structure(charge=-1),
        structure(charge=1),
        pushed(15.1, -15.1),
        pushed(14.9, -14.9),
        pushed(0.11),
        pushed(0.09),
    ]
    kept, report = curate(data)
    assert [data.index(s) for s in kept] == [0, 5, 7]
    assert report.removed == {
        "one_bond_per_hydrogen": 1,
        "neutral_only": 2,
        "max_force": 1,
        "max_net_force": 1,
    }
    assert (report.total, report.kept) == (8, 3)
    assert "kept 3 of 8" in str(report)


def test_the_net_force_may_grow_with_the_root_of_the_number_of_atoms():
    many = structure(molecule("C6H6") + molecule("H2O") + ase.Atoms("He", [[0, 0, 9.0]]))
    forces = np.zeros((16, 3))
    forces[0, 0] = 0.39
    big, small = dataclasses.replace(many, forces=forces), pushed(0.39)
    off = {"neutral_only": False, "max_force": None, "one_bond_per_hydrogen": False}
    kept, report = curate([big, small], max_net_force=None, max_net_force_per_sqrt_atom=0.1, **off)
    assert kept == [big]
    assert report.removed == {"max_net_force_per_sqrt_atom": 1}
    kept, report = curate([big, small], max_net_force=0.1, **off)  # that row is |ΣF| as it was
    assert report.removed == {"max_net_force": 2}


def test_what_a_filter_removed_is_told_with_share_and_examples(caplog):
    data = [structure(name=f"s[{k}]", charge=int(k < 4)) for k in range(50)]
    report = curate(data)[1]
    words = "neutral_only: 4, 8 %, e.g. s[0], s[1], s[2]"
    assert words in str(report)
    report.warn_of_much("a.xyz")
    assert f"a.xyz: data.curate removed by {words}; null switches" in caplog.text
    caplog.clear()
    curate(data[2:])[1].warn_of_much("a.xyz")
    assert caplog.text == ""


def test_nothing_is_filtered_by_default():
    assert DataConfig().curate is None
    for name in ("mace-spice2", "nequip-spice2"):
        curation = load_recipe(name)[0].data.curate
        assert list(make_filters(curation)) == [
            "one_bond_per_hydrogen",
            "neutral_only",
            "max_force",
            "max_net_force",
        ]


def test_filters_can_be_switched_off():
    lost = molecule("H2O")
    lost.positions[1] += [0, 3, 0]
    data = [structure(lost, charge=1), pushed(99.0)]
    off = {"neutral_only": False, "max_force": None, "max_net_force": None}
    off["one_bond_per_hydrogen"] = False
    kept, report = curate(data, **off)
    assert len(kept) == 2
    assert report.removed == {}
    kept, report = curate(data, **off, elements=["H", "C"])
    assert (len(kept), report.removed) == (0, {"elements": 2})


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan")])
def test_impossible_limits(limit):
    with pytest.raises(pydantic.ValidationError, match="max_force"):
        CurationConfig(max_force=limit)


def test_without_a_curation_everything_passes():
    assert make_filters(None) == {}


def test_force_limit_does_not_depend_on_the_axes():
    """A vector, not its components, is compared."""
    diagonal = np.zeros((3, 3))
    diagonal[0], diagonal[1] = 9.0, -9.0  # length 15.6
    assert curate([structure(forces=diagonal)])[1].removed["max_force"] == 1


def test_real_monomers(reference_data):
    data = iterate(reference_data / "data" / "spice_mini_gfn2" / "mini_des.hdf5")
    kept, report = curate(itertools.islice(data, 2000))
    assert report.total == 2000
    assert report.removed["neutral_only"] + report.removed["one_bond_per_hydrogen"] < 0.06 * 2000
    assert report.removed["one_bond_per_hydrogen"] < 20  # sound molecules in thermal motion pass
    assert {s.charge for s in kept} == {0}
