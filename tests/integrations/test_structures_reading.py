"""Files of structures are read once, whole and counted, or refused in one sentence."""

import bz2
import errno
import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength, FixCartesian, FixedLine, FixedPlane
from ase.io import write
from openmm.app import PDBFile

from mlip_md.errors import OutputError, StructureError
from mlip_md.integrations.md.structures import (
    AtomLabel,
    Structure,
    bonds,
    fixed_axes,
    make_topology,
    read_structure,
    write_structure,
)

DATA = Path(__file__).parents[1] / "data" / "structures"

WATER = "O 0 0 0\nH .96 0 0\nH -.24 .93 0\n"


def pdb_line(index, name, residue, number, position, *, element="", alt=" ", rest=" ", occ=1.0):
    x, y, z = position
    name = f" {name:<3s}" if len(name) < 4 else name
    return (
        f"HETATM{index:5d} {name}{alt}{residue:<4s}A{number:4d}    {x:8.3f}{y:8.3f}{z:8.3f}"
        f"{occ:6.2f}  0.00          {element:>2s}{rest}\n"
    )


def pdb_of(atoms, names, residue="UNL"):
    rows = zip(names, atoms.positions, atoms.symbols, strict=True)
    return "".join(pdb_line(i, n, residue, 1, x, element=e) for i, (n, x, e) in enumerate(rows, 1))


@pytest.fixture
def put(tmp_path):
    """Writes a file and returns its path."""

    def put(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return put


def refused(path, text, **keywords):
    """Asserts one sentence that names the file."""
    with pytest.raises(StructureError, match=text) as caught:
        read_structure(path, **keywords)
    message = str(caught.value)
    assert message.startswith((str(path), "there is no"))
    assert "\n" not in message
    return message


# --- PDB ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["symbols", "one"])
def test_atoms_of_one_name_are_all_read(put, names):
    ethanol = molecule("CH3CH2OH")
    called = list(ethanol.symbols) if names == "symbols" else ["X1"] * 9
    structure = read_structure(put("a.pdb", pdb_of(ethanol, called)))
    assert list(structure.atoms.symbols) == list(ethanol.symbols)
    np.testing.assert_allclose(structure.atoms.positions, ethanol.positions, atol=6e-4)
    assert structure.topology.getNumAtoms() == 9
    assert structure.topology.getNumBonds() == 8
    assert structure.report.atoms_in_file == 9


def test_water_of_one_name_has_its_bonds(put):
    water = molecule("H2O")
    structure = read_structure(put("w.pdb", pdb_of(water, ["O", "H", "H"], "HOH")))
    assert structure.bonds.tolist() == [[0, 1], [0, 2]]


def test_repeated_names_are_numbered_where_others_read_them(put, tmp_path):
    ethanol = molecule("CH3CH2OH")
    structure = read_structure(put("a.pdb", pdb_of(ethanol, ["C1", "C", "O", *"HHHHHH"])))
    wanted = ["C1", "C", "O", *(f"H{i}" for i in range(1, 7))]
    assert [atom.name for atom in structure.topology.atoms()] == wanted
    assert [label.name for label in structure.labels][3:] == ["H"] * 6  # as the file has them
    write_structure(tmp_path / "b.pdb", structure)
    assert [a.name for a in PDBFile(str(tmp_path / "b.pdb")).topology.atoms()] == wanted


def test_names_differ_in_four_letters_however_many_there_are(tmp_path):
    grid = np.stack(np.meshgrid(*3 * [np.arange(12.0)], indexing="ij"), axis=-1).reshape(-1, 3)
    # No molecule's atoms follow one another: all are one residue.
    atoms = Atoms("O2H1726", 5 * grid)
    atoms.positions[-2:] = atoms.positions[:2] + 0.55
    write_structure(tmp_path / "b.pdb", Structure("b", atoms))
    assert PDBFile(str(tmp_path / "b.pdb")).topology.getNumAtoms() == 1728


def test_ten_thousand_residues_stay_apart(tmp_path):
    labels = tuple(AtomLabel("NE", "NE", str(i)) for i in range(1, 10003))
    atoms = Atoms("Ne10002", np.arange(10002)[:, None] * [0.03, 0, 0])
    write_structure(tmp_path / "n.pdb", Structure("n", atoms, labels=labels))
    assert len(read_structure(tmp_path / "n.pdb").residues) == 10002


@pytest.mark.parametrize("pbc", ["T T T", "F T F"])
def test_periodicity_without_a_cell_is_refused(put, pbc):
    text = f'3\nProperties=species:S:1:pos:R:3 pbc="{pbc}"\n{WATER}'
    refused(put("p.extxyz", text), "is periodic along .* and has no cell there; give one")
    flat = f'3\nLattice="9 0 0 0 9 0 0 0 0" Properties=species:S:1:pos:R:3 pbc="T T F"\n{WATER}'
    assert len(read_structure(put("f.extxyz", flat)).atoms) == 3


def test_ase_writes_what_we_read(tmp_path):
    ethanol = molecule("CH3CH2OH")
    write(tmp_path / "e.pdb", ethanol)
    assert len(read_structure(tmp_path / "e.pdb").atoms) == 9


@pytest.mark.parametrize("name", ["peptide.pdb", "peptide.cif"])
def test_residues_chains_and_alternates(name):
    structure = read_structure(DATA / name)
    atoms = structure.atoms
    assert atoms.get_chemical_formula() == "C8H21N3O5"
    assert structure.report.atoms_in_file == 40
    assert structure.residues == ["GLY", "LYS", "HOH", "HOH"]
    assert [chain.id for chain in structure.topology.chains()] == ["A", "B"]
    assert [atom.name for atom in structure.topology.atoms()][:4] == ["N", "H1", "H2", "CA"]
    # Of the second water the location B, which is more occupied.
    np.testing.assert_allclose(atoms.positions[34], [6.5, 3, 3])
    assert "3 alternate locations (A" in structure.line()
    np.testing.assert_allclose(structure.occupancies[34:], 0.6)
    assert {tuple(pair) for pair in structure.bonds} == {tuple(pair) for pair in bonds(atoms)}
    assert atoms.pbc.all()
    np.testing.assert_allclose(atoms.cell.array, 20 * np.eye(3), atol=1e-12)


def test_first_of_equal_alternates(put):
    text = ""
    for alt, shift in (("A", 0.0), ("B", 0.4)):
        for name, x in zip(("O", "H1", "H2"), molecule("H2O").positions, strict=True):
            text += pdb_line(1, name, "HOH", 1, x + shift, element=name[0], alt=alt, occ=0.5)
    structure = read_structure(put("a.pdb", text))
    np.testing.assert_allclose(structure.atoms.positions, molecule("H2O").positions, atol=6e-4)


def test_an_atom_that_is_only_in_the_other_alternate_stays(put):
    water = molecule("H2O").positions
    text = pdb_line(1, "O", "HOH", 1, water[0], element="O", alt="A", occ=0.6)
    text += pdb_line(2, "O", "HOH", 1, water[0] + 0.3, element="O", alt="B", occ=0.4)
    text += pdb_line(3, "H1", "HOH", 1, water[1], element="H", alt="B", occ=0.4)
    text += pdb_line(4, "H2", "HOH", 1, water[2], element="H", alt="A", occ=0.6)
    structure = read_structure(put("a.pdb", text))
    assert list(structure.atoms.symbols) == ["O", "H", "H"]
    np.testing.assert_allclose(structure.atoms.positions[0], water[0], atol=6e-4)


def test_hydrogens_written_after_all_other_atoms(put):
    lines = (DATA / "peptide.pdb").read_text().splitlines()
    atoms = [line for line in lines if line[:4] == "ATOM"]
    text = "\n".join(sorted(atoms, key=lambda line: line[76:78].strip() == "H")) + "\nEND\n"
    structure = read_structure(put("p.pdb", text))
    assert len(structure.atoms) == 31
    assert {tuple(p) for p in structure.bonds} == {tuple(p) for p in bonds(structure.atoms)}


def test_minimized_pdb_keeps_residues_and_can_be_read(tmp_path):
    structure = read_structure(DATA / "peptide.pdb")
    moved = structure.atoms.copy()
    moved.positions += 0.1
    write_structure(tmp_path / "out.pdb", structure, moved)
    again = read_structure(tmp_path / "out.pdb")
    assert again.labels == structure.labels
    np.testing.assert_allclose(again.atoms.positions, moved.positions, atol=6e-4)
    assert again.bonds.tolist() == structure.bonds.tolist()
    assert again.report.left_out == again.report.notes == ()


def test_written_pdb_of_a_molecule_without_residues(tmp_path):
    structure = read_structure()
    write_structure(tmp_path / "out.pdb", structure)
    again = read_structure(tmp_path / "out.pdb")
    assert list(again.atoms.symbols) == list(structure.atoms.symbols)
    assert len({label.name for label in again.labels}) == 20
    assert len(again.bonds) == 20


def test_left_handed_cell_is_written_without_a_mirror_image(put, tmp_path):
    rng = np.random.default_rng(0)
    cell = [[0.5, 7.0, 1.0], [8.0, 0.3, -1.0], [1.0, 2.0, 9.0]]
    atoms = Atoms("NOFCH", positions=rng.uniform(0, 9, (5, 3)), cell=cell, pbc=True)
    write(tmp_path / "a.extxyz", atoms)
    write_structure(tmp_path / "a.pdb", read_structure(tmp_path / "a.extxyz"))
    again = read_structure(tmp_path / "a.pdb").atoms
    np.testing.assert_allclose(
        again.get_all_distances(mic=True), atoms.get_all_distances(mic=True), atol=5e-3
    )
    volumes = [
        np.linalg.det([a.get_distance(0, i, vector=True) for i in (1, 2, 3)])
        for a in (atoms, again)
    ]
    np.testing.assert_allclose(*volumes, rtol=1e-2)


def test_formal_charges_of_a_pdb_travel(put, tmp_path):
    text = pdb_of(molecule("CH3CH2OH"), [f"A{i}" for i in range(9)]).splitlines(keepends=True)
    text[2] = text[2].rstrip("\n").rstrip() + "1-\n"
    structure = read_structure(put("a.pdb", "".join(text)))
    assert structure.formal_charges.tolist() == [0, 0, -1] + [0] * 6
    assert [a.formalCharge for a in structure.topology.atoms()][2] == -1
    write_structure(tmp_path / "b.pdb", structure)
    assert read_structure(tmp_path / "b.pdb").formal_charges[2] == -1


def test_elements_from_names_where_the_column_is_empty(put):
    water = pdb_line(1, "CL1", "LIG", 1, (0, 0, 0)) + pdb_line(2, "C1", "LIG", 1, (1.78, 0, 0))
    structure = read_structure(put("a.pdb", water))
    assert list(structure.atoms.symbols) == ["Cl", "C"]
    # In columns 13-14 an element of one letter stands in the second.
    structure = read_structure(put("b.pdb", water.replace("CL1 ", "NA  ").replace(" CL1", " NA ")))
    assert list(structure.atoms.symbols) == ["N", "C"]
    text = water.replace(" CL1", "NA1 ")
    assert "line 1" in refused(put("c.pdb", text), "more than one")


def test_damaged_pdb_names_the_line(put):
    good = pdb_of(molecule("H2O"), ["O", "H1", "H2"]).splitlines(keepends=True)
    for content, line in ((good[0] + good[1][:40] + "\n", 2), (good[0][:50] + "\n", 1)):
        assert f"line {line}" in refused(put("a.pdb", content), "damaged")


def test_serials_that_occur_twice_name_no_atom(put):
    text = pdb_of(molecule("H2O"), ["O", "H1", "H2"]).replace("HETATM    2", "HETATM    3")
    structure = read_structure(put("a.pdb", text + "CONECT    3    1\n"))
    assert structure.bonds.tolist() == [[0, 1], [0, 2]]
    again = read_structure(put("b.pdb", text.replace("    3 ", "    2 ", 1) + "CONECT    3    2\n"))
    assert [1, 2] in again.bonds.tolist()


@pytest.mark.parametrize("name", ["a.pdbqt", "a.pqr"])
def test_files_that_only_look_like_pdb(put, name):
    refused(put(name, (DATA / "peptide.pdb").read_bytes()), "looks like a PDB file")


@pytest.mark.parametrize("writer", [Atoms, Path])
@pytest.mark.parametrize("name", ["a.extxyz", "a.xyz.gz", "a.pdb"])
def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch, name, writer):
    structure, path = read_structure("paracetamol"), tmp_path / name
    write_structure(path, structure)
    before = path.read_bytes()

    def fill(*what):
        with open(next(one for one in what if isinstance(one, Path)), "wb") as file:
            file.write(before[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    if writer is Atoms:
        monkeypatch.setattr(Atoms, "write", fill)
    with pytest.raises(OutputError, match="No space left"):
        write_structure(path, structure)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("suffix", "opened"), [(".gz", gzip.open), (".xz", lzma.open)])
def test_packed_pdb_is_written(tmp_path, suffix, opened):
    structure = read_structure(DATA / "peptide.pdb")
    path = tmp_path / f"a.pdb{suffix}"
    write_structure(path, structure)
    with opened(path, "rt") as file:
        assert file.read().startswith("CRYST1")
    assert read_structure(path).labels == structure.labels


def test_heavy_hydrogens_are_no_isotopes(put, tmp_path):
    rows = "H 0 0 0 3.024\nH .74 0 0 2.014\nH 5 0 0 3.016\n"
    structure = read_structure(
        put("a.extxyz", f"3\nProperties=species:S:1:pos:R:3:masses:R:1\n{rows}")
    )
    symbols = [atom.element.symbol for atom in make_topology(structure).atoms()]
    assert symbols == ["H", "D", "H"]  # OpenMM has no tritium
    write_structure(tmp_path / "a.pdb", structure)
    again = read_structure(tmp_path / "a.pdb").atoms
    np.testing.assert_allclose(again.get_masses(), [1.008, 2.014, 3.016], atol=1e-3)


# --- cells, symmetry, disorder, hydrogens ---------------------------------------------------------


def test_dummy_cell_is_dropped_and_said(put):
    cell = "CRYST1    1.000    1.000    1.000  90.00  90.00  90.00 P 1           1\n"
    structure = read_structure(put("a.pdb", cell + pdb_of(molecule("CH4"), list("CHHHH"))))
    assert not structure.atoms.pbc.any()
    assert structure.atoms.cell.rank == 0
    assert "1 x 1 x 1" in structure.line()


def test_cells_that_are_none(put):
    text = (DATA / "peptide.pdb").read_text()
    refused(
        put("a.pdb", text.replace("  90.00  90.00  90.00", "   0.00   0.00   0.00", 1)), "angles"
    )
    refused(put("b.pdb", text.replace("   20.000   20.000", "   20.0?0   20.000", 1)), "its cell")
    text = (DATA / "peptide.cif").read_text()
    assert read_structure(put("a.cif", text.replace("a 20.0", "a 20.0(3)"))).atoms.pbc.all()
    assert not read_structure(put("b.cif", text.replace("a 20.0", "a ?"))).atoms.pbc.any()
    refused(put("c.cif", text.replace("a 20.0", "a large")), "no number")


def test_asymmetric_unit_is_refused(put):
    text = (DATA / "peptide.pdb").read_text()
    assert "P 1 " in text
    refused(put("a.pdb", text.replace("P 1    ", "P 21 21", 1)), "asymmetric unit.*P 21 21")
    text = (DATA / "peptide.cif").read_text().replace("'P 1'", "'P 21 21 21'")
    refused(put("a.cif", text), "asymmetric unit.*P 21 21 21")


@pytest.mark.parametrize(
    ("residue", "symbols"), [("CN", "CN"), ("IN", "IN"), ("C", "CNN"), ("A5", "CNCN"), ("U", "U")]
)
def test_small_molecules_that_are_called_like_nucleotides(put, residue, symbols):
    """Only what has oxygen, as every sugar and phosphate has, is a nucleotide without hydrogens."""
    water = pdb_of(molecule("H2O"), ["O", "H1", "H2"], "HOH")
    rest = "".join(
        pdb_line(4 + i, f"{symbol}{i}", residue, 2, (9 + 1.2 * i, 0, 0), element=symbol)
        for i, symbol in enumerate(symbols)
    )
    assert str(read_structure(put("a.pdb", water + rest)).atoms.symbols).startswith("OH2")
    oxygen = pdb_line(9, "O5'", residue, 2, (9, 1.4, 0), element="O")
    refused(put("b.pdb", water + rest + oxygen), f"lacks hydrogens: residue {residue} A 2 has 0")


def test_no_hydrogens(put):
    lines = (DATA / "peptide.pdb").read_text().splitlines(keepends=True)
    heavy = [line for line in lines if line[76:78].strip() != "H"]
    refused(put("a.pdb", "".join(heavy)), "lacks hydrogens: residue GLY A 1 has 0")
    polar = [line for line in lines if line[76:78].strip() != "H" or line[12:14] != " H"]
    refused(put("b.pdb", "".join(polar)), "lacks hydrogens")
    waters = [line for line in lines if not (line[76:78] == " H" and "HOH B" in line)]
    refused(put("c.pdb", "".join(waters)), "residue HOH B 1")
    united = [line for line in lines if line[12:16] not in (" HA ", " HB2", " HB3", " HG2")]
    refused(put("d.pdb", "".join(united)), "residue LYS A 2")


CIF = """data_x
_cell_length_a 7.0
_cell_length_b 7.0
_cell_length_c 7.0
_cell_angle_alpha 90
_cell_angle_beta 90
_cell_angle_gamma 90
_symmetry_space_group_name_H-M '{group}'
{more}
loop_
_atom_site_label
_atom_site_type_symbol
_atom_site_fract_x
_atom_site_fract_y
_atom_site_fract_z
_atom_site_occupancy
_atom_site_disorder_group
"""


def cif(*sites, group="P 1", more=""):
    return CIF.format(group=group, more=more) + "\n".join(sites) + "\n"


def test_cif_with_disorder_is_refused(put):
    good = cif("C1 C .5 .5 .5 1.0 .", "O1 O .7 .5 .5 1.0 .")
    assert len(read_structure(put("a.cif", good)).atoms) == 2
    refused(put("b.cif", good.replace("1.0", "0.5")), "site C1 is occupied to 0.5")
    shared = cif("C1 C .5 .5 .5 1 .", "Cl1 Cl .75 .5 .5 .6 .", "Br1 Br .75 .5 .5 .4 .")
    refused(put("c.cif", shared), "site Cl1 is occupied to 0.6")
    groups = cif("H1 H .5 .5 .5 1 1", "H2 H .7 .5 .5 1 2")
    refused(put("d.cif", groups), "groups 1, 2")


def test_cif_elements_and_isotopes(put):
    text = cif("CL1 CL .1 .5 .5 1 .", "D1 D .7 .5 .5 1 .", "X2 O2- .3 .5 .5 1 .")
    structure = read_structure(put("a.cif", text))
    assert list(structure.atoms.symbols) == ["Cl", "H", "O"]
    np.testing.assert_allclose(structure.atoms.get_masses()[1], 2.014, atol=1e-3)
    refused(put("b.cif", cif("Q1 ? .1 .5 .5 1 .")), "site .* left open")


def test_cif_symmetry_and_formula(put):
    more = "_cell_formula_units_Z 2\n_chemical_formula_sum 'C O'"
    sites = ("C1 C .1 .2 .3 1 .", "O1 O .25 .2 .3 1 .")
    structure = read_structure(put("a.cif", cif(*sites, group="P -1", more=more)))
    assert structure.atoms.get_chemical_formula() == "C2O2"
    refused(put("b.cif", cif(*sites, more=more)), "2 C in the cell.* give 1")
    hydrogens = more.replace("C O", "C H4 O")
    refused(put("c.cif", cif(*sites, group="P -1", more=hydrogens)), "8 H in the cell.* give 0")


def test_cif_lists_the_symmetry_that_it_names(put):
    sites = ("C1 C .1 .2 .3 1 .", "O1 O 0 0 0 1 .")
    listed = "loop_\n_symmetry_equiv_pos_as_xyz\n'x,y,z'\n"
    for group, more, count in (
        ("P -1", listed + "'-x,-y,-z'\n", 3),
        ("P 21/c", "", 6),
        ("P 21/c", listed, None),
        ("P 1", listed, 2),
    ):
        path = put("a.cif", cif(*sites, group=group, more=more))
        if count is None:
            refused(path, "lists 1 symmetry operations, which make 2 atoms")
        else:
            assert len(read_structure(path).atoms) == count
    text = cif(*sites).replace("_symmetry_space_group_name_H-M 'P 1'", "")
    assert "no symmetry" in read_structure(put("b.cif", text)).report.notes[0]
    text = cif(*sites, group="F d -3 m")
    assert "two settings" in read_structure(put("c.cif", text)).report.notes[0]


def test_partly_occupied_pdb(put):
    text = pdb_of(molecule("H2O"), ["O", "H1", "H2"], "LIG").replace("  1.00  0.00", "  0.50  0.00")
    structure = read_structure(put("a.pdb", text))
    assert "3 partly occupied" in structure.report.notes[0]
    double = text + text.replace("   0.763", "   0.863").replace("LIG A   1", "LIG A   2")
    refused(put("b.pdb", double), "line 1, and line 4 hold alternatives")


# --- GRO ------------------------------------------------------------------------------------------


BOX = "   2.00000   2.00000   2.00000"


def gro(*rows, box=BOX, count=None, digits=3, velocities=()):
    lines = ["t", f"{len(rows) if count is None else count:5d}"]
    for index, (number, residue, name, x) in enumerate(rows):
        numbers = "".join(f"{v:{digits + 5}.{digits}f}" for v in x)
        if velocities:
            numbers += "".join(f"{v:{digits + 5}.{digits + 1}f}" for v in velocities[index])
        lines.append(f"{number:5d}{residue:<5s}{name:>5s}{index + 1:5d}{numbers}")
    return "\n".join([*lines, box]) + "\n"


SALT = [
    (1, "SOL", "OW", (0.5, 0.5, 0.5)),
    (1, "SOL", "HW1", (0.596, 0.5, 0.5)),
    (1, "SOL", "HW2", (0.476, 0.593, 0.5)),
    (2, "NA", "NA", (0.5, 1.1, 0.5)),
    (3, "CL", "CL", (1.1, 1.1, 1.1)),
    (4, "LIG", "SI1", (1.5, 0.2, 0.2)),
    (4, "LIG", "CL2", (1.5, 0.41, 0.2)),
    (4, "LIG", "CX1", (1.5, 0.2, 0.39)),
    (4, "LIG", "HO", (1.4, 0.2, 0.2)),
]


def test_gro_elements_follow_from_names(put):
    structure = read_structure(put("a.gro", gro(*SALT)))
    assert list(structure.atoms.symbols) == ["O", "H", "H", "Na", "Cl", "Si", "Cl", "C", "H"]
    assert structure.residues == ["SOL", "NA", "CL", "LIG"]
    np.testing.assert_allclose(structure.atoms.positions[1], [5.96, 5, 5])
    np.testing.assert_allclose(structure.atoms.cell.array, 20 * np.eye(3))


@pytest.mark.parametrize("name", ["NA", "CA", "CD1", "NB", "CO", "SC", "OS"])
def test_gro_names_that_leave_the_element_open(put, name):
    rows = [(1, "LIG", "C1", (0.5, 0.5, 0.5)), (1, "LIG", name, (0.65, 0.5, 0.5))]
    assert "line 4" in refused(put("a.gro", gro(*rows)), f"{name} in residue LIG.*more than one")


@pytest.mark.parametrize(("residue", "name"), [("SOL", "MW"), ("MOL", "LPA"), ("ALA", "MCB1")])
def test_virtual_sites_are_named_and_left_out_on_demand(put, residue, name):
    rows = [(1, residue, n, (0.5 + 0.1 * i, 0.5, 0.5)) for i, n in enumerate(["O", "H1", "H2"])]
    rows += [(1, residue, f"H{i}", (0.5, 0.5 + 0.1 * i, 0.5)) for i in range(3, 7)]
    path = put("a.gro", gro(*rows, (1, residue, name, (0.51, 0.51, 0.5))))
    refused(path, f"atom 8 .{name} of {residue} 1.*drop-virtual-sites")
    structure = read_structure(path, drop_virtual_sites=True)
    assert len(structure.atoms) == len(structure.labels) == 7
    assert structure.topology.getNumAtoms() == 7
    assert structure.report.atoms_in_file == 8
    assert f"1 sites without nucleus (atom 8 ({name}" in structure.line()


@pytest.mark.parametrize("digits", [3, 4, 5, 8])
def test_gro_of_any_precision_with_velocities(put, digits):
    velocities = [(0.1, -0.2, 0.3), (0.4, 0.5, 0.6), (0.0, 0.0, 0.1)]
    path = put("a.gro", gro(*SALT[:3], digits=digits, velocities=velocities))
    structure = read_structure(path)
    np.testing.assert_allclose(structure.atoms.positions[2], [4.76, 5.93, 5.0])
    np.testing.assert_allclose(structure.velocities * 1000 * units.fs / units.nm, velocities)
    assert "velocities" in structure.line()


def test_gro_that_was_cut_off(put):
    text = gro(*SALT[:3])
    for content, said in (
        (gro(*SALT[:3], count=6), "announces 6 atoms"),
        ("\n".join(text.splitlines()[:-1]) + "\n", "announces 3 atoms"),
        (gro(*SALT[:3], count=2), "should be the cell"),
        (gro(*SALT[:3], count=0), "holds no atoms"),
        (text.replace("   0.500   0.500", "   0.5?0   0.500", 1), "should be an atom"),
        ("t\nx\n", "number of atoms"),
    ):
        assert ", line " in refused(put("a.gro", content), said)


def test_gro_box_without_length_is_none(put):
    for box in ("", "   0.00000   0.00000   0.00000"):
        assert not read_structure(put("a.gro", gro(*SALT[:3], box=box))).atoms.pbc.any()


# --- SDF ------------------------------------------------------------------------------------------


def test_sdf_of_both_versions():
    for name in ("acetate.sdf", "acetate_v3000.sdf"):
        structure = read_structure(DATA / name)
        assert list(structure.atoms.symbols) == list("CCOOHHH")
        assert structure.formal_charges.tolist() == [0, 0, 0, -1, 0, 0, 0]
        assert structure.bonds.tolist() == bonds(structure.atoms).tolist()
        assert structure.atoms.info == {"charge": -1}
        assert make_topology(structure).getNumBonds() == 6


def test_two_dimensional_drawings_are_refused(put):
    text = (DATA / "acetate.sdf").read_text()
    lines = text.splitlines()
    lines[4:11] = [line[:20] + "    0.0000" + line[30:] for line in lines[4:11]]
    flat = "\n".join(lines) + "\n"
    refused(put("a.sdf", flat.replace("3D", "2D", 1)), "two-dimensional")
    refused(put("b.sdf", flat.replace("3D", "  ", 1)), "two-dimensional")
    note = read_structure(put("c.sdf", text.replace("3D", "2D", 1))).report.notes
    assert "calls itself 2D" in note[0]
    # A planar molecule is no drawing.
    benzene = put("d.sdf", "")
    write(benzene, molecule("C6H6"))
    assert len(read_structure(benzene).atoms) == 12


def test_sdf_properties(put):
    text = (DATA / "acetate.sdf").read_text()
    isotopes = text.replace("M  CHG  1   4  -1", "M  ISO  2   5   2   1  13")
    structure = read_structure(put("a.sdf", isotopes))
    np.testing.assert_allclose(structure.atoms.get_masses()[[0, 4]], [13, 2], atol=0.02)
    assert structure.own_masses.sum() == 2
    assert structure.stated == ()
    radical = read_structure(put("b.sdf", text.replace("M  CHG  1   4  -1", "M  RAD  1   4   2")))
    assert radical.atoms.info == {"multiplicity": 2}
    refused(put("c.sdf", text.partition("M  END")[0]), "without M  END")
    refused(put("d.sdf", "\n".join(text.splitlines()[:9]) + "\n"), "line 4, announces 7 atoms")
    refused(put("e.sdf", text.replace(" O ", " R#", 1)), "names 'R#'")
    refused(put("f.sdf", text + "$$$$\n" + text.replace("-0.66", "-0.76")), "2 models or frames")
    assert read_structure(put("f.sdf", text + "$$$$\n" + text), frame=1).report.frame == (1, 2)


def test_sdf_with_implied_hydrogens(put):
    text = "x\n  y\n\n  2  1  0  0  0  0            999 V2000\n"
    text += "    0.0000    0.0000    0.1000 C   0  0\n    1.4000    0.0000    0.0000 O   0  0\n"
    refused(put("a.sdf", text + "  1  2  1  0\nM  END\n"), "without hydrogens")
    text += "  1  2  3  0\nM  CHG  2   1  -1   2   1\nM  END\n"
    assert len(read_structure(put("b.sdf", text)).atoms) == 2


# --- XYZ ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0 1\n" + WATER, "line 1, should be the number of atoms"),
        (WATER, "line 1, should be the number of atoms"),
        ("4\n\n" + WATER, "announces 4 atoms and 3 follow"),
        ("2\n\n" + WATER, "line 5, should be the number"),
        ("3\n\n" + WATER.replace("H", "H1", 1), "names 'H1'"),
        ("3\n\n" + WATER.replace("O", "8"), "names '8'"),
        ("3\n\n" + WATER.replace(".96", "9.6D-1"), "9.6D-1"),
        ("3\n\n" + WATER.replace(".96", "*****"), r"\*\*\*\*\*"),
        ("3\n\n" + WATER.replace(".96", "nan"), "atom 2 a position that is not finite"),
        ("3\nProperties=species:S:1:pos:R:3:pos:R:3\n" + WATER, "more than once|ASE cannot"),
        ("3\n\n" + WATER + "3\n\nO 0 0 0\n", "line 6, announces 3 atoms and 1 follow"),
        ("", "holds no atoms"),
        ("0\n\n", "holds no atoms"),
        ("4\n\n" + WATER + "X 0 0 .5\n", "without nucleus.*atom 4"),
        ("4\n\n" + WATER + "Bq 0 0 .5\n", "without nucleus.*atom 4"),
        ("4\n\n" + WATER + "H: 0 0 .5\n", "without nucleus.*atom 4"),
        (b"3\n\xc5ngstr\xf6m\n" + WATER.encode(), "line 2, holds a byte"),
    ],
)
def test_xyz_that_is_refused(put, text, said):
    refused(put("a.xyz", text), said)


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff3\n\n" + WATER,
        "3\r\nc\r\n" + WATER.replace("\n", "\r\n").replace(" ", "\t"),
        "3\n\n" + WATER.lower(),
        "3\n\n" + WATER + "\n\n",
        "3\nwords of a program E -76.3\n" + WATER,
        "3\ncomment\n" + WATER.replace("\n", " 0.1 0.2 0.3\n"),
        "3\nProperties=Z:I:1:pos:R:3\n" + WATER.replace("O", "8").replace("H", "1"),
    ],
)
def test_xyz_that_is_read(put, text):
    structure = read_structure(put("a.xyz", text))
    assert list(structure.atoms.symbols) == ["O", "H", "H"]
    np.testing.assert_allclose(structure.atoms.positions[2], [-0.24, 0.93, 0])
    assert structure.report.left_out == ()


@pytest.mark.parametrize(
    ("comment", "said"),
    [("charge=1 spin=2", "charge'. = 1"), ("spin=3", "spin'. = 3"), ("total_charge=0", None)],
)
def test_charge_and_spin_in_xyz(put, comment, said):
    structure = read_structure(put("a.xyz", f"3\n{comment}\n{WATER}"))
    if said is None:
        assert structure.check_charge() == []
    else:
        with pytest.raises(StructureError, match=said):
            structure.check_charge()
    assert len(structure.atoms.info) == len(comment.split())


@pytest.mark.parametrize("column", [0, 3])
def test_deuterium_in_xyz(put, column):
    if column:
        rows = "0 0 0 O\n.96 0 0 D\n-.24 .93 0 T\n"
        text = "3\nProperties=pos:R:3:species:S:1\n" + rows
    else:
        text = "3\n\nO 0 0 0\nD .96 0 0\nT -.24 .93 0\n"
    atoms = read_structure(put("a.xyz", text)).atoms
    assert list(atoms.symbols) == ["O", "H", "H"]
    np.testing.assert_allclose(atoms.get_masses(), [15.999, 2.014, 3.016], atol=1e-3)


# --- masses, constraints, velocities --------------------------------------------------------------


@pytest.mark.parametrize("column", ["mass", "masses"])
def test_own_masses(put, column):
    rows = "O 0 0 0 11.999\nH .96 0 0 3.008\nH -.24 .93 0 3.008\n"
    text = f"3\nProperties=species:S:1:pos:R:3:{column}:R:1\n" + rows
    structure = read_structure(put("a.xyz", text))
    np.testing.assert_allclose(structure.atoms.get_masses(), [11.999, 3.008, 3.008])
    assert "own masses of 3 atoms" in structure.line()
    assert structure.report.left_out == ()
    refused(put("b.xyz", text.replace("11.999", "0.0")), "the mass 0")


@pytest.mark.parametrize("kind", ["pdb", "mmcif"])
def test_deuterium_in_macromolecular_files(put, kind):
    if kind == "pdb":
        text = (DATA / "peptide.pdb").read_text().replace("0.00           H", "0.00           D")
    else:
        text = (DATA / "peptide.cif").read_text().replace(" H H", " D H")
    structure = read_structure(put(f"a.{kind}", text))
    hydrogens = structure.atoms.numbers == 1
    np.testing.assert_allclose(structure.atoms.get_masses()[hydrogens], 2.014, atol=1e-3)
    symbols = {atom.element.symbol for atom in structure.topology.atoms()}
    assert "D" in symbols
    assert "H" not in symbols
    write_structure(put("b.pdb", "").parent / "c.pdb", structure)
    again = read_structure(put("b.pdb", "").parent / "c.pdb")
    np.testing.assert_allclose(again.atoms.get_masses(), structure.atoms.get_masses())


POSCAR = """two waters
1.0
8 0 0
0 8 0
0 0 8
O H
2 4
Selective dynamics
Cartesian
2.0 2.0 2.0 {0}
2.0 2.0 4.9 T T T
2.96 2.0 2.0 {0}
1.76 2.93 2.0 {1}
2.96 2.0 4.9 T T T
1.76 2.93 4.9 T T T
"""


@pytest.mark.parametrize("false", ["F", "f", ".FALSE.", ".f."])
@pytest.mark.parametrize("name", ["POSCAR", "a.vasp"])
def test_selective_dynamics(put, name, false):
    path = put(name, POSCAR.format(" ".join([false] * 3), f"{false} T T"))
    structure = read_structure(path)
    expected = np.zeros((6, 3), bool)
    expected[[0, 2]] = True
    expected[3, 0] = True
    np.testing.assert_array_equal(structure.fixed, expected)
    assert "constraints on 3 atoms" in structure.line()


def test_strange_flags_are_refused(put):
    refused(put("POSCAR", POSCAR.format("F F F", "0 1 1")), "T and F")


def test_move_mask(put):
    rows = zip(WATER.splitlines(), ("F", "T", "F"), strict=True)
    text = "3\nProperties=species:S:1:pos:R:3:move_mask:L:1\n"
    structure = read_structure(put("a.extxyz", text + "".join(f"{r} {m}\n" for r, m in rows)))
    assert structure.fixed.all(axis=1).tolist() == [True, False, True]
    rows = zip(WATER.splitlines(), ("F T T", "T T T", "T F F"), strict=True)
    text = text.replace("L:1", "L:3")
    structure = read_structure(put("b.extxyz", text + "".join(f"{r} {m}\n" for r, m in rows)))
    assert structure.fixed.tolist() == [[True, False, False], [False] * 3, [False, True, True]]


def test_axes_of_constraints():
    atoms = molecule("CH4")
    atoms.set_constraint(
        [
            FixAtoms([0]),
            FixCartesian(1, [True, False, True]),
            FixedLine(2, [0, 0, 1]),
            FixedPlane(3, [0, 1, 0]),
        ]
    )
    expected = [[1, 1, 1], [1, 0, 1], [1, 1, 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_array_equal(fixed_axes(atoms), np.array(expected, bool))
    for constraint in (FixedLine(2, [1, 0, 1]), FixBondLength(0, 1)):
        atoms.set_constraint(constraint)
        with pytest.raises(StructureError, match="constraint holds no single"):
            fixed_axes(atoms)


def test_velocities_of_no_unit_are_left_out(put):
    text = "1\nProperties=species:S:1:pos:R:3:vel:R:3\nO 0 0 0 1 2 3\n"
    structure = read_structure(put("a.extxyz", text))
    assert structure.velocities is None
    assert "velocities in column vel" in structure.line()


def test_virtual_sites_go_and_constraints_stay_with_their_atoms(put):
    text = "4\nProperties=species:S:1:pos:R:3:move_mask:L:1\n"
    text += "X 0 0 .5 T\nO 0 0 0 F\nH .96 0 0 T\nH -.24 .93 0 F\n"
    structure = read_structure(put("a.extxyz", text), drop_virtual_sites=True)
    assert structure.fixed.all(axis=1).tolist() == [True, False, True]


def test_velocities_of_a_trajectory(tmp_path):
    water = molecule("H2O")
    assert read_structure().velocities is None
    water.set_velocities(np.arange(9.0).reshape(3, 3) * 1e-3)
    for name in ("a.traj", "a.extxyz"):
        write(tmp_path / name, water)
        np.testing.assert_allclose(
            read_structure(tmp_path / name).velocities, water.get_velocities(), atol=1e-8
        )


# --- formats, packers, frames ---------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
@pytest.mark.parametrize("name", ["peptide.pdb", "peptide.cif", "acetate.sdf"])
def test_packed_files_read_like_plain_ones(put, name, suffix, pack):
    content = (DATA / name).read_bytes()
    plain = read_structure(DATA / name)
    for given in (f"{name}.{suffix}", name):
        packed = read_structure(put(given, pack.compress(content)))
        assert packed.name == plain.name
        np.testing.assert_array_equal(packed.atoms.positions, plain.atoms.positions)
        assert packed.labels == plain.labels
    refused(put(f"{name}.{suffix}", pack.compress(content)[:-20]), "damaged")


@pytest.mark.parametrize("name", ["peptide.pdb", "peptide.cif", "acetate.sdf"])
def test_content_tells_the_format(put, name):
    plain = read_structure(DATA / name)
    found = read_structure(put("structure", (DATA / name).read_bytes()))
    assert found.report.format == plain.report.format
    assert len(found.atoms) == len(plain.atoms)


def test_packed_formats_of_ase(tmp_path, put):
    write(tmp_path / "a.vasp", Atoms("CO", [[0, 0, 0], [1.1, 0, 0]], cell=[9, 9, 9], pbc=True))
    content = gzip.compress((tmp_path / "a.vasp").read_bytes())
    for name in ("b.vasp.gz", "c.vasp"):
        assert len(read_structure(put(name, content)).atoms) == 2


DUMP = """ITEM: TIMESTEP
0
ITEM: NUMBER OF ATOMS
2
ITEM: BOX BOUNDS pp pp pp
0 9
0 9
0 9
ITEM: ATOMS id type {0}x y z
1 1 {1}0 0 0
2 2 {2}1.1 0 0
"""


def test_types_are_no_elements(put, tmp_path):
    dump = put("a.lammpstrj", DUMP.format("element ", "C ", "O "))
    assert list(read_structure(dump).atoms.symbols) == ["C", "O"]
    refused(put("b.lammpstrj", DUMP.format("", "", "")), "states no elements")
    water = molecule("H2O")
    water.set_cell(9 * np.eye(3))
    data = tmp_path / "a.lammps-data"
    write(data, water, format="lammps-data", masses=True, specorder=["H", "O"])
    text = "LAMMPS data file\n" + data.read_text().partition("\n")[2]
    assert sorted(read_structure(put("c.lammps-data", text)).atoms.symbols) == ["H", "H", "O"]
    heavy = text.replace("1.00799", "3.02400")
    refused(put("d.lammps-data", heavy), r"mass of 3\.024")
    write(data, water, format="lammps-data", specorder=["H", "O"])
    text = "LAMMPS data file\n" + data.read_text().partition("\n")[2]
    refused(put("e.lammps-data", text), "states no elements")


def frames_of(kind, moved):
    water = molecule("H2O")
    second = water.copy()
    second.positions[1, 1] += 0.1 * moved
    names = ["O", "H1", "H2"]
    if kind == "pdb":
        models = (f"MODEL {i}\n{pdb_of(a, names)}ENDMDL\n" for i, a in enumerate((water, second)))
        return "".join(models) + "END\n"
    if kind == "gro":
        rows = [(1, "SOL", n, x / 10) for n, x in zip(names, water.positions, strict=True)]
        others = [(1, "SOL", n, x / 10) for n, x in zip(names, second.positions, strict=True)]
        return gro(*rows) + gro(*others)
    lines = []
    for atoms in (water, second):
        lines += ["3", ""]
        lines += [f"{s} {x} {y} {z}" for s, (x, y, z) in zip(atoms.symbols, atoms.positions)]  # noqa: B905
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("kind", ["pdb", "gro", "xyz"])
def test_frames_are_named_or_the_same(put, kind):
    path = put(f"two.{kind}", frames_of(kind, moved=True))
    assert "--frame" in refused(path, "holds 2 models or frames")
    for frame, index in ((0, 0), (1, 1), (-1, 1), (-2, 0)):
        structure = read_structure(path, frame=frame)
        y = structure.atoms.positions[1, 1]
        np.testing.assert_allclose(y, 0.763 + 0.1 * index, atol=1e-2)
        assert structure.report.frame == (index, 2)
        assert f"frame {index} of 2" in structure.line()
    refused(path, "frame 2 is none", frame=2)
    same = read_structure(put(f"same.{kind}", frames_of(kind, moved=False)))
    assert same.report.frame == (0, 2)
    assert read_structure(DATA / "peptide.pdb").report.frame is None


def test_frames_of_a_trajectory(tmp_path):
    frames = [molecule("H2O"), molecule("H2O")]
    frames[1].positions[0] += 0.1
    write(tmp_path / "a.traj", frames)
    refused(tmp_path / "a.traj", "--frame")
    np.testing.assert_allclose(
        read_structure(tmp_path / "a.traj", frame=-1).atoms.positions, frames[1].positions
    )
    structure = read_structure(tmp_path / "a.traj", frame=-2)
    np.testing.assert_allclose(structure.atoms.positions, frames[0].positions)
    assert structure.report.frame == (0, 2)
    for frame in (2, -3):
        refused(tmp_path / "a.traj", f"2 frames.*frame {frame} is none", frame=frame)


def test_no_file_and_no_structure(put, tmp_path):
    with pytest.raises(StructureError, match=r"there is no file 'nowhere\.xyz'"):
        read_structure("nowhere.xyz")
    refused(tmp_path, "is a folder")
    refused(put("a.txt", "what is this\n"), "cannot be read by ASE")
    refused(put("a.cif", "data_x\n_cell_length_a 3\n"), "no structure")
    refused(put("a.cif", "loop_\n_atom_site.id\n"), "holds no atoms")
    cut = (DATA / "peptide.cif").read_text()
    refused(put("b.cif", cut[: cut.rindex(" B 1")] + "\n"), "middle of a row")


# --- labels, report -------------------------------------------------------------------------------


def test_labels_of_the_input_do_not_travel(tmp_path):
    water = molecule("H2O")
    water.info.update(REF_energy=-2081.1, config_type="water", my_energy=3.0, charge=0, name="w")
    water.set_array("REF_forces", np.ones((3, 3)))
    water.set_initial_charges([-0.8, 0.4, 0.4])
    water.calc = SinglePointCalculator(water, energy=-1.0, forces=np.zeros((3, 3)))
    for name in ("a.extxyz", "a.traj"):
        write(tmp_path / name, water)
        structure = read_structure(tmp_path / name)
        assert structure.atoms.calc is None
        assert set(structure.atoms.info) == {"charge", "name"}
        assert set(structure.atoms.arrays) <= {"numbers", "positions", "initial_charges"}
        if name == "a.extxyz":
            for label in ("REF_energy", "REF_forces", "config_type", "my_energy", "forces"):
                assert label in structure.report.left_out[0]


def test_report_is_plain_and_whole():
    structure = read_structure(DATA / "peptide.pdb")
    facts = json.loads(json.dumps(structure.as_dict()))
    assert facts["atoms"] == 37
    assert facts["atoms_in_file"] == 40
    assert facts["residues"] == 4
    assert facts["chains"] == 2
    assert facts["bonds"] == 34
    assert facts["partly_occupied"] == 3
    assert facts["left_out"] == list(structure.report.left_out)
    assert "\n" not in structure.line()
    assert json.loads(json.dumps(read_structure().as_dict()))["file"] == "paracetamol"
