"""What makes a potential, or a file that somebody made, sound: every format reads through this.

Nothing here knows a format. Files are read within bounds, JSON without what only some readers
accept, and a potential is checked against the network that it describes before it is handed on.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mlip_md.devices import check_process
from mlip_md.elements import MAX_ATOMIC_NUMBER, symbol
from mlip_md.errors import ConfigError, ModelFileError
from mlip_md.graph import Graph
from mlip_md.networks.config import ENERGY, NetworkConfig, check_fields, config_from_dict
from mlip_md.potential import Potential

MAX_HEADER_BYTES = 4 * 2**20
"""Of the text in a file that describes its potential."""

OWN_ROOT = "params#"
"""Beginning of the names of weights; flax calls its trainable variables so."""

_MAX_TEXT = 1000
_MIN_STDEV = 1e-8

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
    require(len(elements) > 0, "it has no elements")
    bounded = (0, *elements, MAX_ATOMIC_NUMBER + 1)
    ascending = all(a < b for a, b in itertools.pairwise(bounded))
    require(ascending, f"elements = {elements}; they must be atomic numbers, ascending")
    energies = np.asarray(potential.atomic_energies)
    require(energies.shape == (len(elements),), "atomic_energies must be one per element")
    try:
        for z, energy in zip(elements, energies.tolist(), strict=True):
            ENERGY.check(f"atomic_energies[{symbol(z)}]", energy)
        check_fields(potential)
    except ConfigError as error:
        raise ModelFileError(str(error)) from error
    r_min, stdev = potential.avg_r_min, potential.scaling_stdev
    require(
        r_min is None or r_min < potential.cutoff,
        f"avg_r_min = {r_min}; it must be below the cutoff, {potential.cutoff} Å",
    )
    require(
        abs(stdev) >= _MIN_STDEV,
        f"scaling_stdev = {stdev}; its magnitude must be at least {_MIN_STDEV}",
    )


def expected_shapes(potential: Potential) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that a potential's network has, by '#'-joined path.

    The network is only traced; nothing is compiled or computed.

    Raises:
        ModelFileError: if its hyperparameters describe no network.
        ForkError: in a forked process of one that has used a potential.
    """
    check_process()
    try:
        tree = jax.eval_shape(potential.network.init, jax.random.key(0), _ONE_EDGE)
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
        require(
            array.shape == shape,
            f"tensor {name!r} has shape {array.shape}; the network it describes has {shape}",
        )
        require(np.issubdtype(array.dtype, np.floating), f"tensor {name!r} has dtype {array.dtype}")
        broken = int(array.size - (np.abs(array) <= np.finfo(np.float32).max).sum())
        require(broken == 0, f"tensor {name!r} has {broken} values that are NaN or infinite")


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def flatten(tree: Mapping[str, Any], separator: str = "#") -> dict[str, Any]:
    """Leaves of a nested dict by their joined paths."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            below = flatten(value, separator)
            flat |= {f"{name}{separator}{path}": leaf for path, leaf in below.items()}
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
            require(isinstance(node, dict), f"tensor name {path!r} lies below another tensor")
        require(name not in node, f"tensor name {path!r} is also the beginning of others")
        node[name] = leaf
    return tree


def names_below(root: str, leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Weights by our names from names that begin with another root instead of ``params#``.

    Raises:
        ModelFileError: if a name does not begin with that root.
    """
    foreign = [name for name in leaves if not name.startswith(root)]
    if foreign:
        raise ModelFileError(
            f"array {foreign[0]!r} is not a weight of its network (the name should begin with "
            f"{root!r})"
        )
    return {OWN_ROOT + name.removeprefix(root): leaf for name, leaf in leaves.items()}


@contextlib.contextmanager
def explaining(before: str = "", after: str = "") -> Iterator[None]:
    """Put the name of the file at hand before the message of a ModelFileError, and more behind."""
    try:
        yield
    except ModelFileError as error:
        explained = copy.copy(error)  # with its attributes
        explained.args = (f"{before}{error}{after}",)
        raise explained from error


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
            require(size > 0, "the file is empty")
            require(size <= limit, f"the file has {size} bytes; at most {limit} are read")
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
        require(short, f"{name} is longer than {_MAX_TEXT} characters")
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


def require(condition: bool, message: str) -> None:
    """Refuse with a message unless a condition holds.

    Raises:
        ModelFileError: if it does not.
    """
    if not condition:
        raise ModelFileError(message)


def typed(values: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A string, list or object of a JSON object.

    Raises:
        ModelFileError: if it is missing (and has no default) or of another type.
    """
    value = values.get(name, default)
    if not isinstance(value, kind):
        found = "is missing" if value is None else f"is {value!r:.60}"
        raise ModelFileError(f"{name} {found}; a JSON {_JSON_NAMES[kind]} is needed")
    return value


_JSON_NAMES: Mapping[type, str] = {str: "string", list: "list", dict: "object"}
