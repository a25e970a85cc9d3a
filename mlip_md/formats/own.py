"""The model file: one ``.safetensors`` with the weights and a JSON description of everything else.

The description is the text of one metadata entry, ``mlip_md``; its ``sha256`` covers that text
(with the hash itself blanked) and every tensor's name, shape and bytes, so that a file either
loads as it was written or is refused. Tensor names are the '#'-joined paths of the parameter tree.
Within a format version descriptions may only grow by keys that old readers can ignore and new
readers can default; anything else takes a new version. Nothing in a file is ever executed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import secrets
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from e3nn_jax import Irreps
from safetensors import SafetensorError

import mlip_md
from mlip_md import bundled
from mlip_md.elements import symbol
from mlip_md.errors import ConfigError, ModelFileError
from mlip_md.graph import Graph
from mlip_md.networks.config import (
    HIGHEST_ATOMIC_NUMBER,
    NetworkConfig,
    check_number,
    config_from_dict,
)
from mlip_md.potential import Params, Potential

FORMAT_VERSION = 1
READABLE_VERSIONS = (1,)
MAX_HEADER_BYTES = 4 * 2**20
MAX_FILE_BYTES = 2 * 2**30
RUN_FOLDER_FILE = "model.safetensors"

_METADATA_KEY = "mlip_md"
_BLANK_HASH = "0" * 64
_UNITS = {"energy": "eV", "length": "angstrom"}
_BOUNDS: Mapping[str, int] = {
    "num_layers": 64,
    "l_max": 11,  # as far as e3nn-jax knows Clebsch-Gordan coefficients
    "num_bessel": 1024,
    "num_readout_heads": 64,
    "radial_net_n_layers": 64,
    "radial_net_n_hidden": 100_000,
    "num_channels": 100_000,
    "species_embedding_dim": 100_000,
}
_MAX_TEXT = 1000
"""Bounds of what a description may ask for; no sensible network comes near."""
_LEAST_STDEV = 1e-8

_INDEX = np.zeros(1, np.int32)
_ONE_EDGE = Graph(
    positions=np.zeros((1, 3), np.float32),
    species=_INDEX,
    cell=np.zeros((1, 3, 3), np.float32),
    senders=_INDEX,
    receivers=_INDEX,
    shifts=np.zeros((1, 3), np.int32),
    node_graph=_INDEX,
    node_mask=np.ones(1, bool),
    edge_mask=np.ones(1, bool),
    graph_mask=np.ones(1, bool),
)
"""Types and ranks of a graph, for tracing; its values are never looked at."""


def open_potential(name_or_path: str | os.PathLike[str]) -> Potential:
    """Open a potential by name or path.

    Args:
        name_or_path: name of a bundled potential, or path of a ``.safetensors`` file, of an
            InstaDeep ``.zip`` or of a training run's folder. Bundled names come first; write
            ``./name`` for a folder that is called like one.

    Returns:
        The potential.

    Raises:
        ModelFileError: if this is no name or path, there is no such potential, or its file is
            unusable.
    """
    name = os.fspath(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else None
    if not name or not isinstance(name, str):  # Path("") would be the current folder
        raise ModelFileError(f"{name_or_path!r:.60} names no model; {_known_models()}")
    if name in bundled.names():
        return load(bundled.path(name))
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # unlike Path.is_dir it knows names that no file can have
        return load(_file_of_run(path))
    if not os.path.exists(path):
        raise ModelFileError(f"there is no model {name!r}; {_known_models()}")
    if path.suffix == ".zip":
        from mlip_md.formats.instadeep import load_zip

        return load_zip(path)
    if path.suffix == ".safetensors":
        return load(path)
    raise ModelFileError(
        f"{path}: a model file ends in .safetensors (this project) or .zip (InstaDeep); pickled "
        "formats (.model, .pt, .ckpt) are not read, because opening them can run foreign code"
    )


def save(potential: Potential, path: str | os.PathLike[str]) -> None:
    """Write a potential's model file; an existing file is replaced whole or left as it was.

    Args:
        potential: what to write; its weights are stored in float32.
        path: file name ending in ``.safetensors``.

    Raises:
        ModelFileError: if the name has another ending, or the potential is not sound (weights
            that are not finite or do not fit its hyperparameters).
        OSError: if the file system refuses.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ModelFileError(f"{path}: the name of a model file must end in .safetensors")
    with naming(path):
        check_potential(potential)
        content = _serialize(_describe(potential), flatten(potential.params))
        _header(content)  # a description too long to be read is not written
    write_atomically(path, content)


def load(path: str | os.PathLike[str]) -> Potential:
    """Read a model file of this project.

    Args:
        path: a ``.safetensors`` file written by ``save``.

    Returns:
        The potential, with float32 NumPy weights.

    Raises:
        ModelFileError: if the file is missing, damaged, foreign, of a version that this release
            cannot read, or if its tensors are not exactly those of the network it describes.
    """
    path = Path(path)
    with naming(path):
        content = read_bytes(path, MAX_FILE_BYTES)
        header = _header(content)
        text = _description_text(header)
        description = _parse_description(text)
        tensors = _parse_tensors(content, header)
        _check_digest(description["sha256"], text, tensors)
        potential = _potential(description, unflatten(tensors))
        check_potential(potential)
    return potential


def check_potential(potential: Potential) -> None:
    """Check everything about a potential: ``check_statistics`` and ``check_weights``.

    Raises:
        ModelFileError: naming what is not allowed.
    """
    check_statistics(potential)
    check_weights(flatten(potential.params), expected_shapes(potential))


def check_statistics(potential: Potential) -> None:
    """Check a potential's elements, E0, cutoff, scaling and what is from its training set.

    Raises:
        ModelFileError: naming the first value that is not allowed.
    """
    elements = potential.elements
    _require(len(elements) > 0, "it has no elements")
    bounded = (0, *elements, HIGHEST_ATOMIC_NUMBER + 1)
    ascending = all(a < b for a, b in itertools.pairwise(bounded))
    _require(ascending, f"elements = {elements}; they must be atomic numbers, ascending")
    energies = np.asarray(potential.atomic_energies)
    _require(energies.shape == (len(elements),), "atomic_energies must be one per element")
    r_min, stdev = potential.avg_r_min, potential.scaling_stdev
    try:
        for z, energy in zip(elements, energies.tolist(), strict=True):
            check_number(f"atomic_energies[{symbol(z)}]", energy, "atomic_energies")
        for name in ("cutoff", "avg_num_neighbors", "scaling_mean", "scaling_stdev"):
            check_number(name, getattr(potential, name))
        if r_min is not None:
            check_number("avg_r_min", r_min)
    except ConfigError as error:
        raise ModelFileError(str(error)) from error
    _require(
        r_min is None or r_min < potential.cutoff,
        f"avg_r_min = {r_min}; it must be below the cutoff, {potential.cutoff} Å",
    )
    _require(
        abs(stdev) >= _LEAST_STDEV,
        f"scaling_stdev = {stdev}; its magnitude must be at least {_LEAST_STDEV}",
    )


def expected_shapes(potential: Potential) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that a potential's network has, by '#'-joined path.

    The network is only traced; nothing is compiled or computed.

    Raises:
        ModelFileError: if its hyperparameters describe no network.
    """
    try:
        _check_bounds(potential.config)
        tree = jax.eval_shape(potential.network.init, jax.random.key(0), _ONE_EDGE)
    except ModelFileError:
        raise
    except Exception as error:  # of JAX, flax or e3nn: a network is built from foreign numbers
        raise ModelFileError(f"its hyperparameters describe no network: {error}") from error
    return {name: tuple(leaf.shape) for name, leaf in flatten(tree).items()}


def check_weights(found: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check weights, by '#'-joined path, against the shapes that the network has.

    Raises:
        ModelFileError: naming weights that are missing, unknown, misshapen or not finite.
    """
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    if missing or extra:
        parts = [f"missing: {_some(missing)}"] if missing else []
        parts += [f"not in the network: {_some(extra)}"] if extra else []
        raise ModelFileError(
            f"its tensors are not those of the network it describes; {'; '.join(parts)}"
        )
    for name, shape in expected.items():
        array = np.asarray(found[name])
        _require(
            array.shape == shape,
            f"tensor {name!r} has shape {array.shape}; the network it describes has {shape}",
        )
        _require(
            np.issubdtype(array.dtype, np.floating), f"tensor {name!r} has dtype {array.dtype}"
        )
        broken = int(array.size - (np.abs(array) <= np.finfo(np.float32).max).sum())
        _require(broken == 0, f"tensor {name!r} has {broken} values that are NaN or infinite")


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves of a nested dict by their '#'-joined paths."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}#{path}": leaf for path, leaf in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict of leaves given by their '#'-joined paths.

    Raises:
        ModelFileError: if a path is both a leaf and a branch.
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *branches, name = path.split("#")
        node = tree
        for branch in branches:
            node = node.setdefault(branch, {})
            _require(isinstance(node, dict), f"tensor name {path!r} lies below another tensor")
        _require(name not in node, f"tensor name {path!r} is also the beginning of others")
        node[name] = leaf
    return tree


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file so that a crash leaves either the old one or the new one, complete.

    Args:
        path: file to write or replace; its folder must exist.
        content: its bytes.

    Raises:
        OSError: if the file system refuses; the old file is then untouched.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "there is no such folder", str(path.parent))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the name of the model file at hand before the message of a ModelFileError."""
    try:
        yield
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error


def read_bytes(path: Path, limit: int) -> bytes:
    """Content of a file of at most ``limit`` bytes.

    Raises:
        ModelFileError: if it is missing, no file, empty, unreadable or larger.
    """
    try:
        if os.path.exists(path) and not path.is_file():
            raise ModelFileError("this is a folder or a device, not a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            _require(size > 0, "the file is empty")
            _require(size <= limit, f"the file has {size} bytes; at most {limit} are read")
            return file.read(size)
    except ModelFileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no name of a file
        raise ModelFileError(f"it cannot be read ({getattr(error, 'strerror', error)})") from error


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object without NaN, infinite numbers and names that occur twice.

    Raises:
        ModelFileError: if the text is not one, saying that ``what`` is damaged.
    """
    try:
        value = json.loads(
            text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique
        )
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"{what} is damaged or foreign (no valid JSON: {error})") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{what} is foreign (no JSON object)")
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text:.40} is not allowed")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return values


def parse_config(architecture: str, fields: Mapping[str, Any]) -> NetworkConfig:
    """The configuration of an architecture from plain JSON values.

    Raises:
        ModelFileError: if the architecture or a hyperparameter is unknown or not allowed.
    """
    for name, value in fields.items():
        short = not isinstance(value, (str, list)) or len(str(value)) <= _MAX_TEXT
        _require(short, f"{name} is longer than {_MAX_TEXT} characters")
    try:
        return config_from_dict(architecture, fields)
    except (ValueError, TypeError, OverflowError) as error:  # ConfigError is a ValueError
        raise ModelFileError(str(error)) from error


def number(values: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A finite number of a JSON object.

    Raises:
        ModelFileError: if it is missing (and has no default) or no finite number.
    """
    value = values.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelFileError(f"{name} = {value!r:.60}; a number is needed")
    try:
        return float(value)
    except OverflowError as error:
        raise ModelFileError(f"{name} is too large a number") from error


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ModelFileError(message)


def _known_models() -> str:
    names = ", ".join(bundled.names()) or "none"
    return (
        f"give a bundled name ({names}) or the path of a .safetensors file, of an InstaDeep .zip "
        "or of a training run's folder"
    )


def _file_of_run(folder: Path) -> Path:
    file = folder / RUN_FOLDER_FILE
    if not file.is_file():
        raise ModelFileError(
            f"{folder}: this folder has no {RUN_FOLDER_FILE}, so it is no finished training run; "
            f"{_known_models()}"
        )
    return file


def _check_bounds(config: NetworkConfig) -> None:
    """Refuse networks so large that only tracing them would exhaust time or memory."""
    for name, bound in _BOUNDS.items():
        value = getattr(config, name, None) or 0
        _require(value <= bound, f"{name} = {value}; files with at most {bound} are read")
    irreps = Irreps(getattr(config, "node_irreps", "0e"))
    top = max((ir.l for _, ir in irreps), default=0)
    large = top > _BOUNDS["l_max"] or irreps.dim > _BOUNDS["num_channels"]
    _require(not large, f"node_irreps = {irreps!s:.60} are larger than any that are read")


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _describe(potential: Potential) -> dict[str, Any]:
    description = potential.description()
    energies = (float(e) for e in potential.atomic_energies)
    e0 = dict(zip(map(symbol, potential.elements), energies, strict=True))
    return {
        "format_version": FORMAT_VERSION,
        "written_by": f"mlip-md {mlip_md.__version__}",
        "units": _UNITS,
        **description,
        "atomic_energies": e0,
    }


def _serialize(description: Mapping[str, Any], tensors: Mapping[str, Any]) -> bytes:
    arrays = {name: np.ascontiguousarray(leaf, np.float32) for name, leaf in tensors.items()}
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
            f"its format_version is {version!r}; mlip-md {mlip_md.__version__} reads "
            f"{', '.join(map(str, READABLE_VERSIONS))}. Upgrade mlip-md to read newer files"
        )
    if not isinstance(description.get("sha256"), str) or len(description["sha256"]) != 64:
        raise ModelFileError("its description has no checksum (sha256)")
    return description


def _parse_tensors(content: bytes, header: Mapping[str, Any]) -> dict[str, np.ndarray]:
    types = {str(v.get("dtype")) for name, v in header.items() if name != "__metadata__"}
    _require(types <= {"F32"}, f"it has tensors of type {', '.join(types)}; F32 is allowed")
    try:
        return dict(safetensors.numpy.load(content))
    except (SafetensorError, ValueError, OverflowError) as error:
        raise ModelFileError(f"its header is damaged ({error})") from error


def _potential(description: Mapping[str, Any], params: Params) -> Potential:
    units = description.get("units", _UNITS)
    _require(units == _UNITS, f"its units are {units}; {_UNITS} are read")
    elements = _typed(description, "elements", list)
    _require(all(type(z) is int for z in elements), f"elements = {elements}; whole numbers needed")
    e0 = _typed(description, "atomic_energies", dict)
    symbols = [symbol(z) for z in elements]
    _require(
        set(e0) == set(symbols) and len(e0) == len(symbols),
        f"atomic_energies are given for {', '.join(e0)}, the elements are {', '.join(symbols)}",
    )
    r_min = description.get("avg_r_min")
    architecture = _typed(description, "architecture", str)
    try:
        config = parse_config(architecture, _typed(description, "hyperparameters", dict))
    except ModelFileError as error:
        writer = f"{description.get('written_by', 'an unknown program')!s:.40}"
        raise ModelFileError(
            f"{error} (written by {writer}, read by mlip-md {mlip_md.__version__}; options that "
            "are newer than a release need an upgrade)"
        ) from error
    return Potential(
        config=config,
        params=params,
        elements=tuple(elements),
        atomic_energies=np.array([number(e0, s) for s in symbols], np.float64),
        cutoff=number(description, "cutoff"),
        avg_num_neighbors=number(description, "avg_num_neighbors"),
        avg_r_min=None if r_min is None else number(description, "avg_r_min"),
        scaling_mean=number(description, "scaling_mean", 0.0),
        scaling_stdev=number(description, "scaling_stdev", 1.0),
        info=_typed(description, "info", dict, {}),
    )


def _typed(values: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    value = values.get(name, default)
    if not isinstance(value, kind):
        found = "is missing" if value is None else f"is {value!r:.60}"
        raise ModelFileError(f"{name} {found}; a JSON {_JSON_NAMES[kind]} is needed")
    return value


_JSON_NAMES: Mapping[type, str] = {str: "string", list: "list", dict: "object"}
