"""What ASE writes in any format comes back whole, each to the precision of its format."""

import dataclasses

import numpy as np
import pytest
from ase import Atoms, units
from ase.constraints import FixAtoms, FixCartesian, FixScaled
from ase.data import atomic_masses
from ase.io import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlip_md.errors import StructureError
from mlip_md.integrations.md.structures import read_structure

ELEMENTS = ["H", "C", "N", "O", "F", "P", "S", "Cl", "Br", "Si", "Na", "K", "Zn", "I"]


@dataclasses.dataclass(frozen=True)
class Format:
    """What a format holds, as ASE writes it."""

    name: str
    precision: float = 1e-7
    cell: bool = True
    masses: float | None = None
    constraints: bool = False
    velocities: float | None = None
    always_periodic: bool = False
    rotated: bool = False


FORMATS = [
    Format("extxyz", 2e-8, masses=2e-8, constraints=True, velocities=2e-8),
    Format("xyz", 2e-8, masses=2e-8, constraints=True, velocities=2e-8),
    Format("pdb", 1e-2, rotated=True),
    Format("cif", 1e-2, always_periodic=True, rotated=True),
    Format("vasp", 1e-7, constraints=True, always_periodic=True),
    Format("gro", 6e-3),
    Format("sdf", 6e-5, cell=False),
    Format("traj", 1e-12, masses=1e-12, constraints=True, velocities=1e-10),
    Format("json", 1e-12, masses=1e-12, constraints=True, velocities=1e-10),
]


@st.composite
def structures(draw):
    """Atoms far enough from each other, with a cell, masses, constraints and velocities."""
    count = draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    symbols = draw(st.lists(st.sampled_from(ELEMENTS), min_size=count, max_size=count))
    cell = np.diag(rng.uniform(9, 12, 3)) + rng.uniform(-2, 2, (3, 3))
    cell *= 1 if np.linalg.det(cell) > 0 else -1
    grid = np.array(np.meshgrid(*[np.arange(3)] * 3)).reshape(3, -1).T / 3
    chosen = rng.permutation(len(grid))[:count]
    scaled = grid[chosen] + rng.uniform(0.02, 0.1, (count, 3))
    periodic = draw(st.booleans())
    atoms = Atoms(symbols, scaled @ cell, cell=cell if periodic else None, pbc=periodic)
    if draw(st.booleans()):
        atoms.set_masses(rng.uniform(1, 40, count))
    if draw(st.booleans()):
        atoms.set_velocities(rng.normal(0, 0.01, (count, 3)))
    kind = draw(st.sampled_from(["none", "whole", "axes"]))
    if kind == "whole":
        atoms.set_constraint(FixAtoms(sorted(rng.permutation(count)[: (count + 1) // 2].tolist())))
    if kind == "axes":
        atoms.set_constraint([FixCartesian(k, rng.random(3) < 0.5) for k in range(count)])
    return atoms


def vectors(atoms):
    """Distances (n, n), which no rotation of the cell changes."""
    return atoms.get_all_distances(mic=bool(atoms.pbc.any()))


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(atoms=structures())
def test_structures_come_back_whole(form, atoms, tmp_path):
    atoms = atoms.copy()
    if form.always_periodic and not atoms.pbc.any():
        atoms.set_cell(20 * np.eye(3))
        atoms.pbc = True
    if form.name == "vasp" and any(isinstance(c, FixCartesian) for c in atoms.constraints):
        atoms.set_constraint([FixScaled(c.index, c.mask, atoms.cell) for c in atoms.constraints])
    path = tmp_path / f"a.{form.name}"
    write(path, atoms)
    structure = read_structure(path)
    back = structure.atoms
    assert len(back) == len(atoms) == structure.report.atoms_in_file
    assert list(back.symbols) == list(atoms.symbols)
    if form.rotated:
        np.testing.assert_allclose(vectors(back), vectors(atoms), atol=2 * form.precision)
    else:
        np.testing.assert_allclose(back.positions, atoms.positions, atol=form.precision)
    if form.cell:
        assert back.pbc.tolist() == atoms.pbc.tolist()
        if atoms.pbc.any():
            check_cell(back, atoms, form)
    check_masses(back, atoms, form)
    if form.constraints:
        check_constraints(structure, atoms, form)
    if form.name == "gro":  # nm/ps with four digits; no masses
        unit = units.nm / (1000 * units.fs)
        np.testing.assert_allclose(
            back.get_velocities() / unit, atoms.get_velocities() / unit, atol=5.1e-5
        )
    if form.velocities is not None:
        np.testing.assert_allclose(
            back.get_momenta(), atoms.get_momenta(), atol=form.velocities * 1.01
        )


def check_cell(back, atoms, form):
    if form.rotated:
        np.testing.assert_allclose(back.cell.cellpar(), atoms.cell.cellpar(), atol=form.precision)
    else:
        np.testing.assert_allclose(back.cell.array, atoms.cell.array, atol=form.precision)


def check_masses(back, atoms, form):
    if form.masses is not None:
        np.testing.assert_allclose(back.get_masses(), atoms.get_masses(), atol=form.masses)
    elif form.name == "sdf":  # isotopes, as whole numbers
        near = np.abs(atoms.get_masses() - atomic_masses[atoms.numbers]) < 2e-3
        expected = np.where(near, atoms.get_masses(), np.round(atoms.get_masses()))
        np.testing.assert_allclose(back.get_masses(), expected, atol=2e-3)
    else:
        np.testing.assert_allclose(back.get_masses(), atomic_masses[atoms.numbers])


def check_constraints(structure, atoms, form):
    if any(isinstance(c, FixScaled) for c in atoms.constraints):
        expected = np.zeros((len(atoms), 3), bool)
        found = expected.copy()
        for one in atoms.constraints:
            expected[one.index] = one.mask
        for one in structure.atoms.constraints:
            found[one.index] = True if isinstance(one, FixAtoms) else one.mask
        np.testing.assert_array_equal(found, expected)
        return
    expected = np.zeros((len(atoms), 3), bool)
    for one in atoms.constraints:
        expected[one.index] = True if isinstance(one, FixAtoms) else one.mask
    try:
        found = structure.fixed
    except StructureError:
        found = None
    np.testing.assert_array_equal(found, expected)
