"""Structures to run: bundled molecules, files, and their topologies for OpenMM and mdtraj."""

from mlip_md.integrations.md.structures.description import (
    AtomLabel,
    Report,
    Structure,
    fixed_axes,
)
from mlip_md.integrations.md.structures.molecules import (
    BondWatch,
    bonds,
    compare_bonds,
    describe_contact,
    molecules,
    whole_molecules,
)
from mlip_md.integrations.md.structures.orientation import reduce_lattice, reduce_structure
from mlip_md.integrations.md.structures.reading import (
    DEFAULT_MOLECULE,
    bundled_molecules,
    read_structure,
)
from mlip_md.integrations.md.structures.topology import make_topology
from mlip_md.integrations.md.structures.writing import (
    describe_unwritten,
    format_structure,
    write_structure,
)

__all__ = [
    "DEFAULT_MOLECULE",
    "AtomLabel",
    "BondWatch",
    "Report",
    "Structure",
    "bonds",
    "bundled_molecules",
    "compare_bonds",
    "describe_contact",
    "describe_unwritten",
    "fixed_axes",
    "format_structure",
    "make_topology",
    "molecules",
    "read_structure",
    "reduce_lattice",
    "reduce_structure",
    "whole_molecules",
    "write_structure",
]
