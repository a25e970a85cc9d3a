"""Our model file: one ``.safetensors`` with the weights and a JSON description of everything else.

The description is the text of one metadata entry, ``mlip_md``; its ``sha256`` covers that text
(with the hash itself blanked) and every tensor's name, shape and bytes, so that a file either
loads as it was written or is refused. Tensor names are the '#'-joined paths of the parameter tree;
in format version 1 they had the published block's name in between. Version 3 is written where
all weights are in float64 (converted ones), else version 2. Within a format version
descriptions may only grow by keys that old readers can ignore and new readers can default; anything
else takes a new version. Nothing in a file is ever executed.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from mlip_md import files
from mlip_md.elements import symbol
from mlip_md.errors import ModelFileError
from mlip_md.formats.names import NAMES
from mlip_md.formats.soundness import (
    MAX_HEADER_BYTES,
    OWN_ROOT,
    check_potential,
    explaining,
    flatten,
    names_below,
    number,
    parse_config,
    parse_json,
    read_bytes,
    require,
    typed,
    unflatten,
)
from mlip_md.networks.radial_scale import RadialScale
from mlip_md.potential import Potential
from mlip_md.version import __version__

ENDING = NAMES["mlip-md"].ending
FORMAT_VERSION, FORMAT_VERSION_FLOAT64 = 2, 3
READABLE_VERSIONS = (1, 2, 3)
MAX_FILE_BYTES = 2 * 2**30

_METADATA_KEY = "mlip_md"
_BLANK_HASH = "0" * 64
_UNITS = {"energy": "eV", "length": "angstrom"}


def save(potential: Potential, path: str | os.PathLike[str]) -> None:
    """Write a potential's model file; an existing file is replaced whole or left as it was.

    Args:
        potential: what to write; its weights are stored in float32, or in float64 if all are.
        path: file name ending in ``.safetensors``.

    Raises:
        ModelFileError: if the name has another ending, or the potential is not sound (weights
            that are not finite or do not fit its hyperparameters).
        OutputError: if the file system refuses.
    """
    path = Path(path)
    require(path.suffix == ENDING, f"{path}: the name of a model file must end in {ENDING}")
    with explaining(f"{path}: "):
        content = to_bytes(potential)
    files.write_bytes(path, content)


def load(path: str | os.PathLike[str]) -> Potential:
    """Read a model file of this project.

    Args:
        path: a ``.safetensors`` file written by ``save``.

    Returns:
        The potential, with NumPy weights.

    Raises:
        ModelFileError: if the file is missing, damaged, foreign, of a version that this release
            cannot read, or if its tensors are not exactly those of the network it describes.
    """
    path = Path(path)
    with explaining(f"{path}: "):
        return from_bytes(read_bytes(path, MAX_FILE_BYTES))


def to_bytes(potential: Potential) -> bytes:
    """Content of a potential's model file.

    Args:
        potential: what to write; its weights are stored in float32, or in float64 if all are.

    Raises:
        ModelFileError: if it is not sound.
    """
    check_potential(potential)
    content = _serialize(_describe(potential), flatten(potential.params))
    _header(content)  # a description too long to be read is not written
    return content


def from_bytes(content: bytes) -> Potential:
    """The potential of a model file's content, see ``load``.

    Args:
        content: what ``to_bytes`` of this version or of an older one made.

    Raises:
        ModelFileError: as ``load``.
    """
    header = _header(content)
    text = _description_text(header)
    description = _parse_description(text)
    with explaining(after=_origin(description)):
        tensors = _parse_tensors(content, header, description["format_version"])
        _check_digest(description["sha256"], text, tensors)
        potential = _potential(description, tensors)
        check_potential(potential)
    return potential


def _origin(description: Mapping[str, Any]) -> str:
    """Which versions a refused file and its reader are of, and what helps if they differ."""
    writer = f"{description.get('written_by', 'an unknown program')!s:.40}"
    return (
        f" (format_version {description['format_version']}, written by {writer}, read by mlip-md "
        f"{__version__}; options that are newer than a release need an upgrade)"
    )


def _describe(potential: Potential) -> dict[str, Any]:
    description = potential.description()
    energies = (float(e) for e in potential.atomic_energies)
    e0 = dict(zip(map(symbol, potential.elements), energies, strict=True))
    scale = potential.used_radial_scale
    precise = _dtype(flatten(potential.params)) == np.float64
    return {
        "format_version": FORMAT_VERSION_FLOAT64 if precise else FORMAT_VERSION,
        "written_by": f"mlip-md {__version__}",
        "units": _UNITS,
        **description,
        "atomic_energies": e0,
        **({} if scale is None else {"radial_scale": scale._asdict()}),
    }


def _dtype(tensors: Mapping[str, Any]) -> np.dtype[Any]:
    """What weights are stored in: float64 if all of them are of that type."""
    precise = all(np.asarray(leaf).dtype == np.float64 for leaf in tensors.values())
    return np.dtype(np.float64 if precise else np.float32)


def _serialize(description: Mapping[str, Any], tensors: Mapping[str, Any]) -> bytes:
    dtype = _dtype(tensors)
    arrays = {name: np.ascontiguousarray(leaf, dtype) for name, leaf in tensors.items()}
    try:
        text = json.dumps({"sha256": _BLANK_HASH, **description}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"its info is not plain JSON values: {error}") from error
    text = text.replace(_BLANK_HASH, _digest(text, arrays), 1)
    return safetensors.numpy.save(arrays, metadata={_METADATA_KEY: text})


def _digest(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        digest.update(f"\n{name} {tensors[name].shape}\n".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _check_digest(expected: str, text: str, tensors: Mapping[str, np.ndarray]) -> None:
    if _digest(text.replace(expected, _BLANK_HASH, 1), tensors) != expected:
        raise ModelFileError(
            "its content does not fit its checksum: it was damaged or changed after it was "
            "written; copy or download it again"
        )


def _header(content: bytes) -> dict[str, Any]:
    """The JSON header of a safetensors file (its first 8 bytes are the header's size)."""
    size = struct.unpack("<Q", content[:8])[0] if len(content) >= 8 else -1
    if not 2 <= size <= MAX_HEADER_BYTES or content[8:9] != b"{":
        raise ModelFileError("this is no safetensors file (or its first bytes are damaged)")
    _check_length(content, 8 + size)
    header = parse_json(content[8 : 8 + size], "its header")
    try:
        ends = [v["data_offsets"][1] for name, v in header.items() if name != "__metadata__"]
        end = max(map(int, ends), default=0)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ModelFileError("its header is damaged") from error
    _check_length(content, 8 + size + end, exactly=True)
    return header


def _check_length(content: bytes, announced: int, exactly: bool = False) -> None:
    if len(content) < announced or (exactly and len(content) > announced):
        kind = "truncated" if len(content) < announced else "longer than its header says"
        raise ModelFileError(
            f"the file is {kind}: {len(content)} bytes instead of {announced}; copy or download "
            "it again"
        )


def _description_text(header: Mapping[str, Any]) -> str:
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_METADATA_KEY), str):
        raise ModelFileError(
            "this safetensors file was not written by mlip-md: it has no description of a "
            f"potential (metadata entry {_METADATA_KEY!r})"
        )
    return metadata[_METADATA_KEY]


def _parse_description(text: str) -> dict[str, Any]:
    description = parse_json(text, "its description")
    version = description.get("format_version")
    if version not in READABLE_VERSIONS or isinstance(version, (bool, float)):
        raise ModelFileError(
            f"its format_version is {version!r}; mlip-md {__version__} reads "
            f"{', '.join(map(str, READABLE_VERSIONS))}. Upgrade mlip-md to read newer files"
        )
    if not isinstance(description.get("sha256"), str) or len(description["sha256"]) != 64:
        raise ModelFileError("its description has no checksum (sha256)")
    return description


def _parse_tensors(
    content: bytes, header: Mapping[str, Any], version: int
) -> dict[str, np.ndarray]:
    allowed = "F64" if version == FORMAT_VERSION_FLOAT64 else "F32"
    types = {str(v.get("dtype")) for name, v in header.items() if name != "__metadata__"}
    require(types <= {allowed}, f"it has tensors of type {', '.join(types)}; {allowed} is allowed")
    try:
        return dict(safetensors.numpy.load(content))
    except (SafetensorError, ValueError, OverflowError) as error:
        raise ModelFileError(f"its header is damaged ({error})") from error


def _potential(description: Mapping[str, Any], tensors: Mapping[str, Any]) -> Potential:
    units = description.get("units", _UNITS)
    require(units == _UNITS, f"its units are {units}; {_UNITS} are read")
    elements = typed(description, "elements", list)
    require(all(type(z) is int for z in elements), f"elements = {elements}; whole numbers needed")
    e0 = typed(description, "atomic_energies", dict)
    symbols = [symbol(z) for z in elements]
    require(
        set(e0) == set(symbols) and len(e0) == len(symbols),
        f"atomic_energies are given for {', '.join(e0)}, the elements are {', '.join(symbols)}",
    )
    r_min = description.get("avg_r_min")
    hyperparameters = typed(description, "hyperparameters", dict)
    config = parse_config(typed(description, "architecture", str), hyperparameters)
    if description["format_version"] == 1:
        tensors = names_below(f"{OWN_ROOT}{config.published_block}#", tensors)
    return Potential(
        config=config,
        params=unflatten(tensors),
        elements=tuple(elements),
        atomic_energies=np.array([number(e0, s) for s in symbols], np.float64),
        cutoff=number(description, "cutoff"),
        avg_num_neighbors=number(description, "avg_num_neighbors"),
        avg_r_min=None if r_min is None else number(description, "avg_r_min"),
        scaling_mean=number(description, "scaling_mean", 0.0),
        scaling_stdev=number(description, "scaling_stdev", 1.0),
        info=typed(description, "info", dict, {}),
        radial_scale=_radial_scale(description),
    )


def _radial_scale(description: Mapping[str, Any]) -> RadialScale | None:
    """The stored factor on the radial basis; descriptions of NequIP and older ones have none."""
    if "radial_scale" not in description:
        return None
    stored = typed(description, "radial_scale", dict)
    return RadialScale(*(number(stored, precision) for precision in RadialScale._fields))
