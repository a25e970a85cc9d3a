"""Energies and gradients of quantum-chemical methods: GFN2-xTB (tblite) and ωB97M-D3(BJ) (pyscf).

Everything here is in atomic units (bohr, hartree), as the file format wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlip_md.constants import BOHR, HARTREE
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.generate.chemistry import ELEMENTS

if TYPE_CHECKING:
    from tblite.interface import Calculator

FORCE_UNIT = HARTREE / BOHR
"""1 hartree/bohr in eV/Å."""


class Labels(NamedTuple):
    """What a method says of one structure.

    Attributes:
        energy: in hartree.
        gradient: (N, 3) in hartree/bohr.
        charges: (N,) in e, of the atoms; None where the method gives none.
    """

    energy: float
    gradient: np.ndarray
    charges: np.ndarray | None = None


Label = Callable[[np.ndarray, np.ndarray, int, int], Labels]
"""(atomic numbers (N,), positions (N, 3) in bohr, charge in e, number of unpaired electrons)
-> labels; raises LabelError."""


class LabelError(DataError):
    """A structure has no usable label and is dropped; `reason` is what it is counted under."""

    def __init__(self, message: str, reason: str = "not converged") -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Method:
    """A level of theory and what computes it.

    Attributes:
        level_of_theory, settings: as the file names them.
        programs: distributions that compute the labels.
        modules: what must be importable to make a data set with it.
        extra: extra of this package that brings them.
        dissociates: whether its energies hold for bonds that break.
        label: the function that labels one structure.
    """

    level_of_theory: str
    settings: str
    programs: tuple[str, ...]
    modules: tuple[str, ...]
    extra: str
    dissociates: bool
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
        z: label(np.array([z]), nowhere, 0, element.unpaired_electrons).energy
        for z, element in ELEMENTS.items()
    }


def gfn2_calculator(
    atomic_numbers: np.ndarray,
    positions: np.ndarray,
    charge: int,
    unpaired_electrons: int = 0,
    *,
    accuracy: float,
    max_iterations: int = 250,
) -> Calculator:
    """A quiet tblite calculator of GFN2-xTB.

    Args:
        atomic_numbers: (N,).
        positions: (N, 3) in bohr.
        charge: total charge in e.
        unpaired_electrons: number of them.
        accuracy: factor of tblite on all thresholds; smaller is tighter.
        max_iterations: after how many self-consistent iterations it gives up.
    """
    from tblite.interface import Calculator

    calculator = Calculator(
        "GFN2-xTB", atomic_numbers, positions, float(charge), unpaired_electrons
    )
    calculator.set("verbosity", 0)
    calculator.set("accuracy", accuracy)
    calculator.set("max-iter", max_iterations)
    return calculator


def _label_gfn2(
    atomic_numbers: np.ndarray, positions: np.ndarray, charge: int, unpaired_electrons: int
) -> Labels:
    from tblite.exceptions import TBLiteRuntimeError

    positions = np.asarray(positions, dtype=float)
    try:
        # each iteration costs more than the one before, and what takes long never ends
        result = gfn2_calculator(
            atomic_numbers,
            positions,
            charge,
            unpaired_electrons,
            accuracy=0.1,
            max_iterations=100,
        ).singlepoint()
    except TBLiteRuntimeError as error:
        raise LabelError(f"GFN2-xTB failed: {error}") from error
    return Labels(float(result["energy"]), np.array(result["gradient"]), result["charges"])


def _label_wb97m_d3bj(
    atomic_numbers: np.ndarray, positions: np.ndarray, charge: int, unpaired_electrons: int
) -> Labels:
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
    return Labels(float(energy), np.array(field.nuc_grad_method().kernel()))


def _installed(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


METHODS = {
    "gfn2": Method(
        level_of_theory="GFN2-xTB",
        settings="fewest unpaired electrons, electronic temperature 300 K, accuracy 0.1",
        programs=("tblite",),
        modules=("rdkit", "tblite"),
        extra="data",
        dissociates=True,
        label=_label_gfn2,
    ),
    "wb97m-d3bj": Method(
        level_of_theory="wB97M-D3(BJ)/def2-TZVPPD",
        settings="restricted Kohn-Sham, density fitting, grid (75,302), conv_tol 1e-9",
        programs=("pyscf", "pyscf-dispersion"),
        modules=("rdkit", "tblite", "pyscf", "pyscf.dispersion"),
        extra="data,wb97m",
        dissociates=False,
        label=_label_wb97m_d3bj,
    ),
}
"""By the name that `mlip-md make-dataset --method` takes."""
