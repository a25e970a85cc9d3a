"""Structures to run: files, molecules, and whether they fly apart."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from mlip_md.errors import StructureError
from mlip_md.integrations.md.structures import (
    BondWatch,
    bonds,
    bundled_molecules,
    make_topology,
    molecules,
    read_structure,
    whole_molecules,
)


def test_molecules_cut_by_the_boundary_are_made_whole():
    one = molecule("CH3CH2OH")
    rng = np.random.default_rng(0)
    cell = np.array([[9.0, 0, 0], [2.0, 8.0, 0], [-1.0, 1.5, 7.0]])
    atoms = one.copy()
    atoms.translate([0.2, 0.1, 6.9])
    other = one.copy()
    other.translate([4.0, 4.0, 3.0])
    atoms += other
    atoms.set_cell(cell)
    atoms.pbc = True
    atoms.positions += rng.integers(-2, 3, (18, 3)) @ cell
    positions, labels = whole_molecules(atoms)
    assert sorted(np.bincount(labels)) == [9, 9]
    cells = (positions - atoms.positions) @ np.linalg.inv(cell)
    np.testing.assert_allclose(cells, cells.round(), atol=1e-9)
    for start in (0, 9):
        np.testing.assert_allclose(
            Atoms("H9", positions[start : start + 9]).get_all_distances(),
            one.get_all_distances(),
            atol=1e-9,
        )
    diamond = bulk("C", "diamond", a=3.57)
    positions, labels = whole_molecules(diamond)  # two atoms, bonded to their own images
    np.testing.assert_array_equal(positions, diamond.positions)
    assert len(set(labels)) == 2
    assert set(molecules(2, bonds(diamond))) == {0}


def test_what_is_no_falling_apart(crystal):
    def moved(atoms, vectors):
        return BondWatch(atoms).broken(atoms.positions + vectors, atoms.cell.array)

    water = molecule("H2O")
    apart = 9.0 * np.arange(3)[:, None]
    assert moved(water, apart) == 3
    assert moved(water, apart * [[0], [0], [1]]) == 0  # one hydrogen atom goes its way
    assert moved(molecule("H2"), 9.0 * np.arange(2)[:, None]) == 0  # so does a dissociating dimer
    pair = water + water
    pair.positions[3:] += 3.0
    assert moved(pair, 20.0 * (np.arange(6) > 2)[:, None]) == 0  # whole molecules evaporate
    box = water.copy()
    box.set_cell([9, 9, 9])
    box.pbc = True
    assert moved(box, np.zeros((3, 3))) == 0
    assert moved(box, 3.0 * np.arange(3)[:, None]) == 3
    # A melt: all atoms have exchanged their neighbors.
    copper = bulk("Cu", cubic=True).repeat(3)
    order = np.random.default_rng(0).permutation(len(copper))
    assert moved(copper, copper.positions[order] - copper.positions) == 0


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.pdb", "hello\nEND\n", "ATOM or HETATM"),
        ("b.pdb", "ATOM      1  C   MOL A   1       0.0\n", "b.pdb, line 1, is damaged"),
        ("c.xyz", "what is this\n", "c.xyz"),
        (
            "d.pdb",
            "CRYST1    1.100    1.000    1.000  90.00  90.00  90.00 P 1           1\n"
            "HETATM    1  C1  MOL A   1       0.000   0.000   0.000  1.00  0.00           C\n"
            "HETATM    2  C2  MOL A   1       1.500   0.000   0.000  1.00  0.00           C\n",
            "CRYST1",
        ),
        ("e.xyz", '1\nLattice="1 0 0 0 0.5 0 0 0 1"\nC 0 0 0\n', "too small for 1 atoms"),
    ],
)
def test_files_that_are_no_structures(tmp_path, name, content, text):
    (tmp_path / name).write_text(content)
    with pytest.raises(StructureError, match=text):
        read_structure(tmp_path / name)


def test_bundled_molecule_is_whole():
    assert bundled_molecules() == ["paracetamol"]
    structure = read_structure()
    assert structure.atoms.get_chemical_formula() == "C8H9NO2"
    pairs = bonds(structure.atoms)
    assert len(pairs) == 20  # 19 bonds and one ring
    assert set(molecules(20, pairs)) == {0}
    assert make_topology(structure).getNumBonds() == 20
