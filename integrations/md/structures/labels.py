"""Labels of an input: energies, forces and words about it that must not travel into outputs.

A result of ours stands beside its own energies only. Everything that is not part of the structure
goes, whatever its name: programs call their labels as they like.
"""

from __future__ import annotations

from ase import Atoms

from mlip_md.integrations.charges import NEUTRAL_SINGLET

_ARRAYS = {"numbers", "positions", "masses", "mass", "momenta", "tags", "initial_charges"}
_ARRAYS |= {"initial_magmoms"}
_VELOCITIES = {"vel", "velo", "velocity", "velocities"}
_INFO = {"name", "smiles", "inchi", "inchikey", *NEUTRAL_SINGLET}
_KNOWN = {
    "residuenames", "residuenumbers", "atomtypes", "occupancy", "bfactor", "spacegroup",
    "unit_cell", "spacegroup_kinds", "castep_labels",
}  # fmt: skip
"""What ASE's readers add by themselves: read by us elsewhere or no part of a structure."""


def remove_labels(atoms: Atoms) -> list[str]:
    """Take from ``Atoms`` what is no part of a structure.

    Returns:
        What was left out, for the report; empty if nothing.
    """
    said = [
        f"the velocities in column {name} (their unit is not stated)"
        for name in sorted(_VELOCITIES & set(atoms.arrays))
    ]
    for name in _VELOCITIES & set(atoms.arrays):
        del atoms.arrays[name]
    names = [] if atoms.calc is None else sorted(getattr(atoms.calc, "results", {}))
    atoms.calc = None
    for name in sorted(set(atoms.arrays) - _ARRAYS):
        names += [name] if name not in _KNOWN else []
        del atoms.arrays[name]
    atoms.arrays.pop("mass", None)
    for key in sorted(set(atoms.info) - _INFO, key=str):
        value = atoms.info.pop(key)
        # A word of a plain comment is read as a key that is true.
        names += [key] if value is not True and key not in _KNOWN else []
    return said + ([f"{', '.join(map(str, names))} (labels of the input)"] if names else [])
