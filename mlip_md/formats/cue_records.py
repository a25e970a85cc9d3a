"""What the package cuEquivariance leaves in a model of mace-torch, read from its records.

mace-torch can keep its linear maps and product bases as modules of that package
(``mace_e3nn_cueq``). Their weights are those of e3nn in the same order, but for the product basis:
there a polynomial is written out path by path, of weights and components of the features.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mlip_md.errors import ModelFileError
from mlip_md.formats.torch_zip import numpy_array

PACKAGE = "cuequivariance_torch"
LAYERS = ("Linear", "FullyConnectedTensorProduct", "SymmetricContraction")
"""Modules whose weights are known."""


def irreps(record: Any) -> list[tuple[int, int, int]]:
    """(multiplicity, degree, parity) of every part.

    Raises:
        TypeError, KeyError, AttributeError: if these are no irreps of cuEquivariance.
    """
    parts = [(part.state["mul"], part.state["ir"].state) for part in record.state["_mulirreps"]]
    return [(mul, ir["l"], ir["p"]) for mul, ir in parts]


def paths(module: Any, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The polynomial of one order of a SymmetricContraction, path by path.

    Args:
        module: its record.
        order: number of factors.

    Returns:
        Indices (n_paths, order + 2) of the weight, of the components that are multiplied, and of
        the component that gets the product; and coefficients (n_paths,).

    Raises:
        ModelFileError: if the record is damaged or of another form.
    """
    try:
        polynomial = module.state["_modules"]["f"].arguments[0]
        found = [
            path.state
            for operation, product in polynomial.state["operations"]
            if operation.state["buffers"] == (0, *(1,) * order, 2)
            for path in product.state["paths"]
        ]
        indices = np.array([path["indices"] for path in found], np.int32)
        coefficients = np.array([numpy_array(path["coefficients"]).item() for path in found])
        return indices.reshape(len(found), order + 2), coefficients
    except (TypeError, KeyError, AttributeError, ValueError, IndexError, OverflowError) as error:
        raise ModelFileError(
            "its product basis of cuEquivariance is damaged, or of a version that is not known"
        ) from error
