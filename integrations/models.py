"""Names of models and precisions, as every integration takes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlip_md import bundled

DEFAULT_MODEL = "organics-gfn2"

DTYPE_OF_PRECISION = {"single": "float32", "double": "float64"}
"""Names of precisions and what ``Engine`` calls them."""


def lasting_name(model: Any) -> str:
    """A model's name that still holds in another working directory.

    Args:
        model: what ``mlip_md.load`` opens.

    Returns:
        A bundled name as it is, a path made absolute, anything else unchanged (``mlip_md.load``
        has the words for what cannot be a model).
    """
    if not (isinstance(model, (str, os.PathLike)) and os.fspath(model)):
        return model
    name = os.fspath(model)
    path = Path(name).expanduser()
    return str(path.resolve()) if name not in bundled.names() and path.exists() else name
