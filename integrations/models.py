"""Names of models and precisions, as every integration takes them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import mlip_md
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


def name_then(model: str, sha256: str | None) -> str:
    """What a model's name is called today that a file wrote down with the model's identity.

    A bundled potential that was trained anew keeps its name, and the one that it followed is
    bundled under another.

    Args:
        model: what ``mlip_md.load`` opened then.
        sha256: identity of what it was; None if nobody wrote it down.

    Returns:
        The bundled name of the potential that it was, or ``model``.
    """
    if sha256 is None or model not in bundled.names():
        return model
    others = (name for name in bundled.names() if mlip_md.load(name).sha256 == sha256)
    return next(others, model)
