"""Energies and gradients of quantum-chemical methods: GFN2-xTB (tblite) and ωB97M-D3(BJ) (pyscf).

Everything here is in atomic units (bohr, hartree), as the file format wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from typing import TYPE_CHECKING, Any

import numpy as np

from mlip_md.constants import BOHR, HARTREE
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.generate.chemistry import ELEMENTS

if TYPE_CHECKING:
    from tblite.interface import Calculator

FORCE_UNIT = HARTREE / BOHR
"""1 hartree/bohr in eV/Å."""

Label = Callable[[np.ndarray, np.ndarray, int, int], tuple[float, np.ndarray]]
"""(atomic numbers (N,), positions (N, 3) in bohr, charge in e, number of unpaired electrons)
-> (energy in hartree, gradient (N, 3) in hartree/bohr); raises LabelError."""


class LabelError(DataError):
    """A method did not converge or gave a non-finite result; the structure is dropped."""


@dataclass(frozen=True)
class Method:
    """A level of theory and what computes it.

    Attributes:
        level_of_theory, settings: as the file names them.
        programs: distributions that compute the labels.
        modules: what must be importable to make a data set with it.
        extra: extra of this package that brings them.
        label: the function that labels one structure.
    """

    level_of_theory: str
    settings: str
    programs: tuple[str, ...]
    modules: tuple[str, ...]
    extra: str
    label: Label


def find_method(name: str) -> Method:
    """A method of `METHODS` whose programs are installed.

    Raises:
        ConfigError: unknown method.
        DataError: a program is missing; names it and the extra that brings it.
    """
    if name not in METHODS:
        raise ConfigError(f"method {name!r} is not known; choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    missing = [module for module in method.modules if not _installed(module)]
    if missing:
        raise DataError(
            f"making a data set with method {name!r} needs {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not installed; "
            f"install the extra: pip install 'mlip-md[{method.extra}]'"
        )
    return method


def describe_method(method: Method) -> dict[str, str]:
    """Level of theory, program and version of a method, for the file."""
    return {
        "level_of_theory": method.level_of_theory,
        "program": " + ".join(method.programs),
        "program_version": " + ".join(map(metadata.version, method.programs)),
        "settings": method.settings,
    }


def compute_atomic_energies(label: Label) -> dict[int, float]:
    """Energies in hartree of isolated neutral atoms in their ground states, by atomic number."""
    nowhere = np.zeros((1, 3))
    return {
        z: label(np.array([z]), nowhere, 0, element.unpaired_electrons)[0]
        for z, element in ELEMENTS.items()
    }


def gfn2_calculator(
    atomic_numbers: np.ndarray,
    positions: np.ndarray,
    charge: int,
    unpaired_electrons: int = 0,
    *,
    accuracy: float,
) -> Calculator:
    """A quiet tblite calculator of GFN2-xTB.

    Args:
        atomic_numbers: (N,).
        positions: (N, 3) in bohr.
        charge: total charge in e.
        unpaired_electrons: number of them.
        accuracy: factor of tblite on all thresholds; smaller is tighter.
    """
    from tblite.interface import Calculator

    calculator = Calculator(
        "GFN2-xTB", atomic_numbers, positions, float(charge), unpaired_electrons
    )
    calculator.set("verbosity", 0)
    calculator.set("accuracy", accuracy)
    return calculator


def _label_gfn2(
    atomic_numbers: np.ndarray, positions: np.ndarray, charge: int, unpaired_electrons: int
) -> tuple[float, np.ndarray]:
    from tblite.exceptions import TBLiteRuntimeError

    positions = np.asarray(positions, dtype=float)
    try:
        result = gfn2_calculator(
            atomic_numbers, positions, charge, unpaired_electrons, accuracy=0.1
        ).singlepoint()
    except TBLiteRuntimeError as error:
        raise LabelError(f"GFN2-xTB failed: {error}") from error
    return float(result["energy"]), np.array(result["gradient"])


def _label_wb97m_d3bj(
    atomic_numbers: np.ndarray, positions: np.ndarray, charge: int, unpaired_electrons: int
) -> tuple[float, np.ndarray]:
    from pyscf import dft, gto

    atoms: Any = [(int(z), x.tolist()) for z, x in zip(atomic_numbers, positions, strict=True)]
    molecule = gto.M(
        atom=atoms,
        unit="Bohr",
        basis="def2-tzvppd",
        charge=int(charge),
        spin=unpaired_electrons,
        verbose=0,
    )
    kohn_sham = dft.UKS if unpaired_electrons else dft.RKS
    field = kohn_sham(molecule, xc="wb97m-d3bj").density_fit()
    field.grids.atom_grid = (75, 302)
    field.conv_tol = 1e-9
    energy = field.kernel()
    if not field.converged:
        raise LabelError("the Kohn-Sham iterations of pyscf did not converge")
    return float(energy), np.array(field.nuc_grad_method().kernel())


def _installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


METHODS = {
    "gfn2": Method(
        level_of_theory="GFN2-xTB",
        settings="closed shell, electronic temperature 300 K, accuracy 0.1",
        programs=("tblite",),
        modules=("rdkit", "tblite"),
        extra="data",
        label=_label_gfn2,
    ),
    "wb97m-d3bj": Method(
        level_of_theory="wB97M-D3(BJ)/def2-TZVPPD",
        settings="restricted Kohn-Sham, density fitting, grid (75,302), conv_tol 1e-9",
        programs=("pyscf", "pyscf-dispersion"),
        modules=("rdkit", "tblite", "pyscf", "pyscf.dispersion"),
        extra="data,wb97m",
        label=_label_wb97m_d3bj,
    ),
}
"""By the name that `mlip-md make-dataset --method` takes."""
