"""Energies and gradients of quantum-chemical methods: GFN2-xTB (tblite) and ωB97M-D3(BJ) (pyscf).

Everything here is in atomic units (bohr, hartree), as the file format wants it.
"""

from collections.abc import Callable
from importlib import metadata, util

import numpy as np

from mlip_md.errors import ConfigError, DataError

METHODS = ("gfn2", "wb97m-d3bj")
BOHR = 0.529177210903  # Å, CODATA 2018
HARTREE = 27.211386245988  # eV, CODATA 2018
FORCE_UNIT = HARTREE / BOHR  # eV/Å per hartree/bohr

# unpaired electrons of the isolated neutral atoms in their ground states
UNPAIRED_ELECTRONS = {1: 1, 6: 2, 7: 3, 8: 2, 9: 1, 15: 3, 16: 2, 17: 1, 35: 1}

Label = Callable[[np.ndarray, np.ndarray, int], tuple[float, np.ndarray]]

_NEEDS = {
    "gfn2": ("data", ("rdkit", "tblite")),
    "wb97m-d3bj": ("data,wb97m", ("rdkit", "tblite", "pyscf", "pyscf.dispersion")),
}


class LabelError(DataError):
    """A method did not converge or gave a non-finite result; the structure is dropped."""


def require(method: str) -> None:
    """Check that a method is known and its programs are installed.

    Raises:
        ConfigError: unknown method.
        DataError: a program is missing; names it and the extra that brings it.
    """
    if method not in METHODS:
        raise ConfigError(f"method {method!r} is not known; choose one of {', '.join(METHODS)}")
    extra, modules = _NEEDS[method]
    missing = [name for name in modules if not _installed(name)]
    if missing:
        raise DataError(
            f"making a data set with method {method!r} needs {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed; "
            f"install the extra: pip install 'mlip-md[{extra}]'"
        )


def describe(method: str) -> dict[str, str]:
    """Level of theory, program and version of a method, for the file."""
    if method == "gfn2":
        return {
            "level_of_theory": "GFN2-xTB",
            "program": "tblite",
            "program_version": metadata.version("tblite"),
            "settings": "closed shell, electronic temperature 300 K, accuracy 0.1",
        }
    return {
        "level_of_theory": "wB97M-D3(BJ)/def2-TZVPPD",
        "program": "pyscf + pyscf-dispersion",
        "program_version": f"{metadata.version('pyscf')} + {metadata.version('pyscf-dispersion')}",
        "settings": "restricted Kohn-Sham, density fitting, grid (75,302), conv_tol 1e-9",
    }


def labeler(method: str) -> Label:
    """The function that labels one structure.

    Returns:
        `label(atomic_numbers (N,), positions (N, 3) in bohr, charge)` ->
        (energy in hartree, gradient (N, 3) in hartree/bohr); raises LabelError.
    """
    return {"gfn2": _gfn2, "wb97m-d3bj": _wb97m_d3bj}[method]


def atomic_energies(method: str) -> dict[int, float]:
    """Energies in hartree of the isolated neutral atoms by the method itself.

    Ground-state numbers of unpaired electrons; by atomic number.
    """
    return {z: _atom(method, z, unpaired) for z, unpaired in UNPAIRED_ELECTRONS.items()}


def gfn2_calculator(atomic_numbers: np.ndarray, positions: np.ndarray, charge: int, **options):
    """A quiet tblite calculator of GFN2-xTB.

    Args:
        atomic_numbers: (N,).
        positions: (N, 3) in bohr.
        charge: total charge in e.
        **options: settings of tblite, e.g. `accuracy`; `uhf` is the number of unpaired electrons.
    """
    from tblite.interface import Calculator

    uhf = options.pop("uhf", 0)
    calculator = Calculator("GFN2-xTB", atomic_numbers, positions, float(charge), uhf)
    calculator.set("verbosity", 0)
    for name, value in options.items():
        calculator.set(name, value)
    return calculator


def _gfn2(atomic_numbers, positions, charge):
    from tblite.exceptions import TBLiteRuntimeError

    try:
        result = gfn2_calculator(
            atomic_numbers, np.asarray(positions, dtype=float), charge, accuracy=0.1
        ).singlepoint()
    except TBLiteRuntimeError as error:
        raise LabelError(f"GFN2-xTB failed: {error}") from error
    return float(result["energy"]), np.array(result["gradient"])


def _wb97m_d3bj(atomic_numbers, positions, charge):
    field = _kohn_sham(atomic_numbers, positions, charge, spin=0)
    energy = field.kernel()
    if not field.converged:
        raise LabelError("the Kohn-Sham iterations of pyscf did not converge")
    gradient = field.nuc_grad_method()
    gradient.verbose = 0
    return float(energy), np.array(gradient.kernel())


def _kohn_sham(atomic_numbers, positions, charge, spin):
    from pyscf import dft, gto

    molecule = gto.M(
        atom=[
            (int(z), tuple(map(float, x))) for z, x in zip(atomic_numbers, positions, strict=True)
        ],
        unit="Bohr",
        basis="def2-tzvppd",
        charge=int(charge),
        spin=spin,
        verbose=0,
    )
    field = (dft.UKS if spin else dft.RKS)(molecule, xc="wb97m-d3bj").density_fit()
    field.grids.atom_grid = (75, 302)
    field.conv_tol = 1e-9
    return field


def _atom(method, atomic_number, unpaired):
    if method == "gfn2":
        calculator = gfn2_calculator(
            np.array([atomic_number]), np.zeros((1, 3)), 0, uhf=unpaired, accuracy=0.1
        )
        return float(calculator.singlepoint()["energy"])
    return float(_kohn_sham([atomic_number], np.zeros((1, 3)), 0, spin=unpaired).kernel())


def _installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
