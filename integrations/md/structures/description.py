"""What a structure is: atoms, and everything else that its file states."""

from __future__ import annotations

import dataclasses
from typing import Any

from ase import Atoms


@dataclasses.dataclass(frozen=True)
class Structure:
    """A structure and where it comes from.

    Attributes:
        name: short name, used for the run's folder.
        atoms: positions (Å), elements, cell, periodicity.
        topology: OpenMM topology when the file had residues and chains (PDB), else None.
    """

    name: str
    atoms: Atoms
    topology: Any = None
