"""Chemical elements, for messages and files (the core does not import ASE)."""

from __future__ import annotations

import types
from collections.abc import Mapping

_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy "
    "Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf "
    "Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
).split()

MAX_ATOMIC_NUMBER = len(_SYMBOLS)

ATOMIC_NUMBERS: Mapping[str, int] = types.MappingProxyType(
    {name: z for z, name in enumerate(_SYMBOLS, start=1)}
)
"""Atomic number by symbol."""


def symbol(atomic_number: int) -> str:
    """Chemical symbol of an atomic number; a number without one is written as ``Z=…``."""
    if 0 < atomic_number <= MAX_ATOMIC_NUMBER:
        return _SYMBOLS[atomic_number - 1]
    return f"Z={atomic_number}"
