"""Units of other programs in eV and Å, and words that more than one room uses."""

from __future__ import annotations

BOHR = 0.529177210903
"""Å (CODATA 2018)."""

HARTREE = 27.211386245988
"""eV (CODATA 2018)."""

KJ_PER_MOL_PER_EV = 1.602176634e-19 * 6.02214076e23 / 1000.0
"""1 eV in kJ/mol; exact since the SI of 2019 (e and N_A are defined numbers)."""

KJ_PER_KCAL = 4.184
"""Thermochemical calorie."""

ANGSTROM_PER_NM = 10.0

SPLITS = ("train", "validation", "test")
"""Parts of a data set, as files, recipes and reports name them."""
