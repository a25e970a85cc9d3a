"""Elements from names, and what files, ``Atoms`` and topologies state beside elements."""

import importlib
import re

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import read
from openmm import app
from test_structures_reading import DATA

from mlip_md.errors import StructureError
from mlip_md.integrations.charges import (
    Stated,
    charge_or_spin,
    check_stated,
    stated_in_info,
    stated_in_topology,
)
from mlip_md.integrations.md.structures import read_structure
from mlip_md.integrations.residue_names import (
    VIRTUAL,
    amino_acid,
    is_nucleotide,
    is_standard,
    is_water,
    named_element,
    stated_element,
)
from mlip_md.integrations.statements import Watch, lacks_hydrogens, problem_of


@pytest.mark.parametrize(
    ("text", "element"),
    [
        ("C", "C"), ("CL", "Cl"), ("cl", "Cl"), ("D", "D"), ("O2-", "O"), ("Na+", "Na"),
        ("X", VIRTUAL), ("Bq", VIRTUAL), ("H:", VIRTUAL), ("@O", VIRTUAL), ("EP", VIRTUAL),
        ("Gh(O)", VIRTUAL), ("Qz", None), ("", None), ("8", None),
    ],
)  # fmt: skip
def test_stated_elements(text, element):
    assert stated_element(text) == element


@pytest.mark.parametrize(
    ("name", "residue", "alone", "element"),
    [
        ("CA", "ALA", False, "C"), ("CA", "CA", True, "Ca"), ("CA", "LIG", False, None),
        ("CA", "ALA", True, None), ("CAL", "CAL", True, "Ca"), ("SOD", "SOD", True, "Na"),
        ("CLA", "CLA", True, "Cl"), ("NA", "NA+", True, "Na"), ("NA", "ION", True, "Na"),
        ("NA", "HEM", False, None), ("Na", "1DUM", False, "Na"), ("K", "K", True, "K"),
        ("ZN", "ZN2", True, "Zn"), ("HG1", "THR", False, "H"), ("HG", "HG", True, "Hg"),
        ("1HB", "ALA", False, "H"), ("H5''", "DA", False, "H"), ("OP1", "DA5", False, "O"),
        ("CD", "NGLU", False, "C"), ("HE2", "HISH", False, "H"), ("MW", "SOL", False, VIRTUAL),
        ("M", "HOH", False, VIRTUAL), ("EPW", "T4P", False, VIRTUAL),
        ("LP1", "SOL", False, VIRTUAL),
        ("LP2", "LIG", False, VIRTUAL), ("MCH3", "ALA", False, VIRTUAL), ("OW", "SOL", True, "O"),
        ("W", "W", True, None), ("ZN", "LIG", False, "Zn"), ("PT1", "LIG", False, None),
        ("C12", "LIG", False, "C"), ("BR", "LIG", False, "Br"), ("SI2", "LIG", False, "Si"),
        ("HO5", "LIG", False, "H"), ("FE", "HEM", False, None), ("MG", "LIG", False, "Mg"),
        ("CX", "LIG", False, "C"), ("PA", "ATP", False, "P"), ("D1", "DOD", False, "D"),
        ("DOH2", "SOL", False, None), ("DCA", "ALA", False, None), ("OW1", "WATER", False, "O"),
        ("QQ", "LIG", False, None), ("12", "LIG", False, None), ("CH3", "ACE", False, "C"),
    ],
)  # fmt: skip
def test_named_elements(name, residue, alone, element):
    assert named_element(name, residue, alone=alone) == element


def test_residues():
    assert amino_acid("NALA") == amino_acid("CALA") == amino_acid("ALA") == "ALA"
    assert amino_acid("HSD") == "HIS"
    assert amino_acid("LIG") is None
    assert is_nucleotide("DA5")
    assert is_water("TIP3")
    assert not is_water("LIG")
    assert not is_standard("HOH")


def charged(total):
    return [Stated("the file", "charge", total)]


def test_charges_of_small_molecules_are_refused():
    with pytest.raises(StructureError, match=r"the file = -1, .*no input for charge"):
        check_stated(charged(-1), ["LIG"])
    with pytest.raises(StructureError, match="is no number"):
        check_stated(charged("two"), ["GLY", "LYS"])
    assert check_stated(charged(0), ["LIG"]) == []
    with pytest.raises(StructureError, match="= 1"):
        check_stated(charged(1), ["LYS", "HOH", "HOH"])


def test_charges_of_macromolecules_are_a_warning():
    (warning,) = check_stated(charged(1), ["GLY", "LYS", "HOH"])
    assert "= +1: this model has no input for charges" in warning
    with pytest.raises(StructureError, match="= 3"):
        check_stated([Stated("the file", "multiplicity", 3)], ["GLY", "LYS"])


def test_info_states_charges_and_partial_charges_do_not():
    info = {"charge": -1, "spin": 1, "smiles": "C", "charges": [1, 2]}
    assert [(one.key, one.value) for one in stated_in_info(info)] == [("charge", -1), ("spin", 1)]
    assert "atoms.info['charge'] = -1" in charge_or_spin(info)
    assert charge_or_spin({"total_charge": np.array([0.0]), "multiplicity": 1}) is None


def topology_of(charges):
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for charge in charges:
        topology.addAtom("C", app.element.carbon, residue, formalCharge=charge)
    return topology


def test_topologies_state_formal_charges():
    (one,) = stated_in_topology(topology_of([None, -1, 2]))
    assert one.value == 1
    (one,) = stated_in_topology(topology_of([None, -1, 2]), atoms=[0, 1])
    assert one.value == -1
    assert stated_in_topology(topology_of([None, None])) == []


def test_a_charged_ligand_and_a_nitro_group(tmp_path):
    structure = read_structure(DATA / "acetate.sdf")
    with pytest.raises(StructureError, match="charge"):
        structure.check_charge()
    assert "-1" in charge_or_spin(structure.atoms.info)  # as the calculator asks
    text = (DATA / "acetate.sdf").read_text()
    balanced = text.replace("M  CHG  1   4  -1", "M  CHG  2   3   1   4  -1")
    (tmp_path / "a.sdf").write_text(balanced)
    assert read_structure(tmp_path / "a.sdf").check_charge() == []


def test_a_protein_with_charged_residues_is_warned_of(tmp_path):
    text = (DATA / "peptide.pdb").read_text()
    lines = [line + "1+" if " NZ " in line else line for line in text.splitlines()]
    (tmp_path / "a.pdb").write_text("\n".join(lines) + "\n")
    structure = read_structure(tmp_path / "a.pdb")
    assert structure.formal_charges.sum() == 1
    assert "charge" not in structure.atoms.info
    assert structure.check_charge() == list(structure.report.notes)
    assert len(structure.report.notes) == 1


def gro_of(residue, names, positions):
    lines = [f"    1{residue:<5s}{n:>5s}{i:5d}" for i, n in enumerate(names, 1)]
    rows = ("".join(f"{x / 10:8.3f}" for x in position) for position in positions)
    body = "\n".join(map("".join, zip(lines, rows, strict=True)))
    return f"one\n{len(names)}\n{body}\n   2.0   2.0   2.0\n"


def named_reader(problem):
    """What a sentence tells to import."""
    module, name = re.search(r"from ([\w.]+) import (\w+)", problem).groups()
    return getattr(importlib.import_module(module), name)


def test_elements_that_ase_guesses_from_gro_names_are_compared_with_them(tmp_path):
    path = tmp_path / "c.gro"
    positions = molecule("CH3Cl").positions
    path.write_text(gro_of("LIG", ["C1", "CL1", "H1", "H2", "H3"], positions))
    atoms = read(path)
    assert atoms.get_chemical_formula() == "C2H3"  # ASE's reader, which this is about
    assert "atom 1, CL1 of residue LIG, is C among the elements and Cl by" in problem_of(atoms)
    assert named_reader(problem_of(atoms)) is read_structure
    atoms.symbols[1] = "Cl"
    assert problem_of(atoms) is None
    path.write_text(gro_of("SOL", ["OW", "HW1", "HW2"], molecule("H2O").positions))
    assert problem_of(read(path)) is None


def cif_of(*sites):
    cell = "".join(f"_cell_length_{k} 9\n" for k in "abc")
    cell += "".join(f"_cell_angle_{k} 90\n" for k in ("alpha", "beta", "gamma"))
    keys = ("label", "type_symbol", "fract_x", "fract_y", "fract_z", "occupancy")
    loop = "".join(f"_atom_site_{key}\n" for key in keys)
    return f"data_x\n{cell}loop_\n{loop}" + "\n".join(sites) + "\n"


@pytest.mark.parametrize(
    ("sites", "text"),
    [
        (("C1 C 0 0 0 1.0", "H1 H 0 0 0.12 0.5"), "H 0.5 on one site"),
        (("C1 C 0 0 0 1.0", "X1 Cl 0 0 0.2 0.6", "X2 Br 0 0 0.2 0.4"), "Cl 0.6 and Br 0.4 on"),
        (("C1 C 0 0 0 1.0", "O1 O 0 0 0.12 1.0"), None),
    ],
)
def test_disorder_that_ase_reads_of_cif_files(tmp_path, sites, text):
    (tmp_path / "x.cif").write_text(cif_of(*sites))
    problem = problem_of(read(tmp_path / "x.cif"))
    assert problem is None if text is None else text in problem


def residues_of(atoms, name, occupancy=None):
    atoms.set_array("residuenames", np.array([name] * len(atoms)))
    if occupancy is not None:
        atoms.set_array("occupancy", np.array(occupancy))
    return atoms


def test_alternate_locations_that_ase_keeps_both():
    water = molecule("H2O")
    both = water + water
    both.positions[3:] += [0.3, 0, 0]
    residues_of(both, "HOH", [0.6] * 3 + [0.4] * 3)
    assert "atoms 0 and 3 are alternatives" in problem_of(both)
    assert named_reader(problem_of(both)) is read_structure
    assert problem_of(residues_of(water, "HOH", [0.6] * 3)) is None


def test_who_asks_at_every_step_reads_again_only_what_changed(tmp_path, monkeypatch):
    """Also what was changed in place, and back."""
    path, looks = tmp_path / "c.gro", []
    path.write_text(gro_of("LIG", ["C1", "CL1", "H1", "H2", "H3"], molecule("CH3Cl").positions))
    atoms, watch = read(path), Watch()
    atoms.symbols[1] = "Cl"

    def named(*names, **keywords):
        looks.append(names)
        return named_element(*names, **keywords)

    monkeypatch.setattr("mlip_md.integrations.statements.named_element", named)
    for _ in range(5):
        assert watch.problem_of(atoms) is None
        atoms.positions += 0.1
    assert len(looks) == len(atoms)
    for key, index, value in (("numbers", 1, 6), ("atomtypes", 0, "N1"), ("residuenames", 1, "CL")):
        kept = atoms.arrays[key][index]
        atoms.arrays[key][index] = value
        assert (watch.problem_of(atoms) is None) == (key == "residuenames")
        atoms.arrays[key][index] = kept
        assert watch.problem_of(atoms) is None
    atoms.symbols[1] = "C"
    assert "atom 1, CL1" in (watch.problem_of(atoms) or "")
    atoms.set_array("bfactor", np.zeros(5))
    assert watch.problem_of(atoms) is None
    assert watch.problem_of(residues_of(Atoms("NC", [[0, 0, 0], [1.4, 0, 0]]), "GLY")) is not None

    both = residues_of(molecule("H2O") + molecule("H2O"), "HOH", [0.6] * 3 + [0.4] * 3)
    both.positions[3:] += 5.0
    assert watch.problem_of(both) is None
    both.positions[3:] -= 4.7
    assert "are alternatives" in (watch.problem_of(both) or "")
    both.arrays["occupancy"][:] = 1.0
    assert watch.problem_of(both) is None


def test_residues_without_any_hydrogen():
    bare = Atoms("NC", [[0, 0, 0], [1.4, 0, 0]])
    assert "has residues GLY and not one hydrogen" in problem_of(residues_of(bare, "GLY"))
    assert problem_of(residues_of(molecule("CH4"), "GLY")) is None
    for name in ("LIG", "CN", "C", "U"):
        assert lacks_hydrogens(np.array([6, 7]), [name]) is None
    assert "residues DA" in lacks_hydrogens(np.array([6, 7]), ["LIG", "DA"])
    assert lacks_hydrogens(np.array([6]), ["HOH"]) is None
