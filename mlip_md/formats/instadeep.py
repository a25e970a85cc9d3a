"""Model files of InstaDeep's mlip library: its first-generation MACE and NequIP networks.

A file is a zip of ``hyperparams.json`` and ``params.npz``. Version 0.1.x of the library wrote the
dialect that its published model cards describe; 0.2.x re-saves the same networks with other names
for a few statistics. Neither says which network it holds: the hyperparameters tell.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md import files
from mlip_md.errors import ModelFileError
from mlip_md.formats.archives import opened, read_member
from mlip_md.formats.names import NAMES
from mlip_md.formats.soundness import (
    MAX_HEADER_BYTES,
    OWN_ROOT,
    check_potential,
    check_statistics,
    check_weights,
    expected_shapes,
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
from mlip_md.networks.config import NetworkConfig, config_to_dict
from mlip_md.potential import Potential

logger = logging.getLogger(__name__)

ENDING = NAMES["instadeep"].ending
HYPERPARAMETERS = "hyperparams.json"
PARAMETERS = "params.npz"
MAX_FILE_BYTES = 512 * 2**20
"""Of a file, of its weights unpacked once (params.npz) and unpacked twice (the arrays)."""

_LIBRARY_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mace": {"node_symmetry": None, "correlation": 3, "atomic_energies": None},
    "nequip": {
        "num_layers": 2,
        "node_irreps": "128x0e + 128x0o + 64x1o + 64x1e + 4x2e + 4x2o",
        "l_max": 3,
    },
}
"""Defaults of the library where they are not those of the model cards (ours)."""


def load_zip(path: str | os.PathLike[str]) -> Potential:
    """Read a model file of InstaDeep's mlip library (MACE or NequIP of its first generation).

    Args:
        path: the ``.zip``; only its two members are read, in memory, within bounds.

    Returns:
        The potential. E0 follow the library's rules: ``atomic_energies`` null or "average" takes
        the data set's map, "zero" none, and an explicit map is indexed by species, not by Z.

    Raises:
        ModelFileError: if the file is missing, damaged or foreign, holds another network, or if
            its arrays are not those of the network that its hyperparameters describe.
    """
    path = Path(path)
    with explaining(f"{path}: "):
        hyperparameters, arrays = _read_members(read_bytes(path, MAX_FILE_BYTES))
        with explaining(after=f" (a file of {_source(hyperparameters)})"):
            potential = _without_weights(hyperparameters, path.stem)
            check_statistics(potential)
            shapes = expected_shapes(potential)
            arrays = names_below(_root(potential.config), arrays)
            arrays = _without_device_axis(arrays, shapes)
            check_weights(arrays, shapes)
    return dataclasses.replace(potential, params=unflatten(arrays))


def save_zip(potential: Potential, path: str | os.PathLike[str]) -> None:
    """Write a potential as a zip that mlip 0.1.x and 0.2.x read (``models_v1`` of the latter).

    Args:
        potential: what to write; its provenance (``info``) has no place in that format, nor has
            a stored factor on the radial basis: readers compute it from ``avg_r_min``.
        path: file name ending in ``.zip``.

    Raises:
        ModelFileError: if the name has another ending, that library has no such network, or the
            potential is not sound.
        OutputError: if the file system refuses.
    """
    path, architecture = Path(path), potential.config.architecture
    wrong = f"{path}: the name of an InstaDeep model file must end in {ENDING}"
    require(path.suffix == ENDING, wrong)
    known = " or ".join(_LIBRARY_DEFAULTS)
    wrong = f"{path}: an InstaDeep model file holds {known}, not {architecture}; take another"
    require(architecture in _LIBRARY_DEFAULTS, wrong)
    with explaining(f"{path}: "):
        check_potential(potential)
    root = _root(potential.config)
    arrays = {
        root + name.removeprefix(OWN_ROOT): np.asarray(leaf, np.float32)
        for name, leaf in flatten(potential.params).items()
    }
    weights = io.BytesIO()
    np.savez(weights, allow_pickle=False, **arrays)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as members:
        text = json.dumps(_library_hyperparameters(potential))
        members.writestr(zipfile.ZipInfo(HYPERPARAMETERS), text)
        members.writestr(zipfile.ZipInfo(PARAMETERS), weights.getvalue())
    files.write_bytes(path, archive.getvalue())


def _root(config: NetworkConfig) -> str:
    """Beginning of the names of weights in a zip."""
    return f"{OWN_ROOT}mlip_network#{config.published_block}#"


def _library_hyperparameters(potential: Potential) -> dict[str, Any]:
    energies = zip(potential.elements, potential.atomic_energies, strict=True)
    config = config_to_dict(potential.config) | {"atomic_energies": "average", "num_species": None}
    return {
        "dataset_info": {
            "atomic_energies_map": {str(z): float(e) for z, e in energies},
            "cutoff_distance_angstrom": potential.cutoff,
            "avg_num_neighbors": potential.avg_num_neighbors,
            "avg_r_min_angstrom": potential.avg_r_min,
            "scaling_mean": potential.scaling_mean,
            "scaling_stdev": potential.scaling_stdev,
        },
        "config": config,
        "predict_stress": False,
    }


def _read_members(content: bytes) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with opened(content, "the file") as archive:
        text = read_member(archive, _one_member(archive, HYPERPARAMETERS), MAX_HEADER_BYTES)
        weights = read_member(archive, _one_member(archive, PARAMETERS), MAX_FILE_BYTES)
    with opened(weights, PARAMETERS) as archive:
        return parse_json(text, HYPERPARAMETERS), _read_arrays(archive)


def _one_member(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    found = [info for info in archive.infolist() if info.filename == name]
    members = ", ".join(archive.namelist()[:5]) or "nothing"
    require(
        len(found) == 1,
        f"this is no model of InstaDeep's mlip: it must hold {HYPERPARAMETERS} and {PARAMETERS} "
        f"once each; it holds {members}",
    )
    return found[0]


def _read_arrays(archive: zipfile.ZipFile) -> dict[str, np.ndarray]:
    members = archive.infolist()
    total = sum(info.file_size for info in members)
    most = f"{PARAMETERS} announces arrays of {total} bytes; at most {MAX_FILE_BYTES} are read"
    require(total <= MAX_FILE_BYTES, most)
    names = [info.filename.removesuffix(".npy") for info in members]
    require(len(set(names)) == len(names), f"{PARAMETERS} holds an array twice")
    return {
        name: _parse_array(name, read_member(archive, info, MAX_FILE_BYTES))
        for name, info in zip(names, members, strict=True)
    }


_NPY = re.compile(
    rb"\x93NUMPY(?:\x01\x00(..)|\x02\x00(....))"
    rb"(\{'descr': '([ -~]{1,99}?)', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,12}, ?){0,32}[0-9]{0,12})\), \} *\n)",
    re.DOTALL,
)
"""Head of an .npy file as NumPy writes it: version, length of the header, header.

Not read by ``numpy.lib.format``, which has Python's own compiler parse the header: nothing of a
foreign file shall reach that, and a test that listens to Python's audit events holds it.
"""
_DTYPES = {b"<f4": np.float32, b"<f8": np.float64}


def _parse_array(name: str, content: bytes) -> np.ndarray:
    """A float array from the bytes of an .npy file; nothing in them is evaluated or unpickled."""
    head = _NPY.match(content)
    if head is None or int.from_bytes(head[1] or head[2], "little") != len(head[3]):
        raise ModelFileError(f"array {name!r} is no .npy file of version 1 or 2 that NumPy wrote")
    if head[4] not in _DTYPES:
        raise ModelFileError(f"array {name!r} has dtype {head[4].decode()}; float32 is needed")
    dtype, shape = np.dtype(_DTYPES[head[4]]), [int(n) for n in re.findall(rb"\d+", head[6])]
    fits = math.prod(shape) * dtype.itemsize == len(content) - head.end()
    require(fits, f"array {name!r} is not of the size that its header says")
    array = np.frombuffer(content, dtype, offset=head.end())
    with np.errstate(over="ignore"):  # too large for float32: found as infinite by check_weights
        array = array.astype(np.float32)
    return array.reshape(shape, order="F" if head[5] == b"True" else "C")


def _without_device_axis(
    arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Drop the leading axis that training with pmap left: a copy per device, all of them equal."""
    if arrays.keys() != shapes.keys() or any(
        arrays[name].ndim != len(shapes[name]) + 1 for name in arrays
    ):
        return dict(arrays)
    devices = {array.shape[0] for array in arrays.values()}
    same = len(devices) == 1 and 0 not in devices
    require(same, f"its arrays have leading device axes of different sizes: {devices}")
    for name, array in arrays.items():
        bits = array.view(np.uint32)
        require(
            bool((bits == bits[:1]).all()),
            f"array {name!r} has a leading device axis whose {len(array)} copies differ; which of "
            "them is meant cannot be told",
        )
    return {name: array[0] for name, array in arrays.items()}


def _without_weights(hyperparameters: Mapping[str, Any], name: str) -> Potential:
    """The potential that hyperparams.json describes, its weights still missing."""
    info = typed(hyperparameters, "dataset_info", dict)
    config_fields = dict(typed(hyperparameters, "config", dict))
    architecture = _architecture(config_fields)
    dataset_e0 = _energies_by_number(info)
    elements = tuple(sorted(dataset_e0))
    _drop_library_options(config_fields, len(elements))
    fields = {**_LIBRARY_DEFAULTS[architecture], **config_fields}
    choice = fields.get("atomic_energies")
    energies = _atomic_energies(choice, elements, dataset_e0)
    if isinstance(choice, dict):
        fields["atomic_energies"] = dict(zip(elements, energies.tolist(), strict=True))
    old_name, new_name = "cutoff_distance_angstrom", "graph_cutoff_angstrom"
    r_min = info.get("avg_r_min_angstrom")
    short = info.get("long_range_cutoff_angstrom") is None
    require(short, "it has long-range interactions, which are not supported")
    return Potential(
        config=parse_config(architecture, fields),
        params={},
        elements=elements,
        atomic_energies=energies,
        cutoff=number(info, old_name if old_name in info else new_name),
        avg_num_neighbors=number(info, "avg_num_neighbors", 1.0),
        avg_r_min=None if r_min is None else number(info, "avg_r_min_angstrom"),
        scaling_mean=number(info, "scaling_mean", 0.0),
        scaling_stdev=number(info, "scaling_stdev", 1.0),
        info=_provenance(hyperparameters, name, choice in (None, "average")),
    )


def _architecture(fields: Mapping[str, Any]) -> str:
    """Architecture by its hyperparameters; networks that are not read are refused by name."""
    for key, network in _OTHER_NETWORKS.items():
        if key in fields:
            raise ModelFileError(
                f"it holds {network} (hyperparameter {key!r}), which mlip-md does not have; MACE "
                "and NequIP of mlip 0.1.x (models_v1 in 0.2.x) are read"
            )
    if "node_irreps" in fields:
        return "nequip"
    if "num_channels" in fields:
        return "mace"
    raise ModelFileError(
        "its config has neither num_channels (MACE) nor node_irreps (NequIP); it has "
        f"{', '.join(fields) or 'nothing'}"
    )


def _drop_library_options(fields: dict[str, Any], num_elements: int) -> None:
    """Remove options of the library that do not change what the network computes."""
    num_species = fields.pop("num_species", None)
    require(
        num_species in (None, num_elements),
        f"its network has num_species = {num_species}, but E0 are known for {num_elements} "
        "elements; which elements the other species are cannot be told",
    )
    fields.pop("deterministic_scatter_ops", None)  # the order of a sum; ours never varies


def _energies_by_number(info: Mapping[str, Any]) -> dict[int, float]:
    """E0 (eV) of the data set by atomic number; with several data sets they must be equal."""
    maps = info.get("atomic_energies_map")
    maps = maps if isinstance(maps, list) else [maps]
    if not maps or not all(isinstance(m, dict) and m == maps[0] for m in maps):
        raise ModelFileError(
            "atomic_energies_map must be a map of atomic numbers to eV, the same for every data set"
        )
    return {_whole_number(z, "atomic number"): number(maps[0], z) for z in maps[0]}


def _atomic_energies(
    choice: object, elements: tuple[int, ...], dataset_e0: Mapping[int, float]
) -> np.ndarray:
    """E0 by species (eV, float64) as the library's first generation chooses them."""
    if choice in (None, "average"):
        return np.array([dataset_e0[z] for z in elements], np.float64)
    if choice == "zero":
        return np.zeros(len(elements))
    if not isinstance(choice, dict):
        raise ModelFileError(f"atomic_energies = {choice!r}; null, average, zero or a map is read")
    by_species = {_whole_number(i, "species index"): number(choice, i) for i in choice}
    if ignored := sorted(by_species.keys() - set(range(len(elements)))):
        logger.warning(
            "The explicit atomic_energies of this model have keys beyond its %d species. mlip "
            "indexes them by species, not by atomic number, and so does mlip-md: keys %s are "
            "ignored.",
            len(elements),
            ignored,
        )
    return np.array([by_species.get(i, 0.0) for i in range(len(elements))], np.float64)


def _provenance(
    hyperparameters: Mapping[str, Any], name: str, average_used: bool
) -> dict[str, Any]:
    """Where the potential is from, and what its file says beyond the potential itself."""
    used = {*_STATISTICS, "atomic_energies_map"} if average_used else _STATISTICS
    rest = {k: v for k, v in hyperparameters["dataset_info"].items() if k not in used}
    return {"name": name, "source": _source(hyperparameters), "dataset_info": rest}


def _source(hyperparameters: Mapping[str, Any]) -> str:
    """The program that wrote the file; its first versions left no number."""
    return f"InstaDeep mlip {hyperparameters.get('version', '0.1.x')!s:.40}"


def _whole_number(text: str, what: str) -> int:
    if not (len(text) <= 4 and text.isascii() and text.isdecimal() and str(int(text)) == text):
        raise ModelFileError(f"{text!r:.40} is no {what}")
    return int(text)


_STATISTICS = {
    "cutoff_distance_angstrom",
    "graph_cutoff_angstrom",
    "avg_num_neighbors",
    "avg_r_min_angstrom",
    "scaling_mean",
    "scaling_stdev",
}
_OTHER_NETWORKS: Mapping[str, str] = {
    "vecnorm_type": "ViSNet",
    "sphere_channels": "eSEN",
    "target_irreps": "the second-generation NequIP of mlip 0.2.x",
    "radial_mlp_hidden": "the second-generation MACE of mlip 0.2.x",
}
"""Hyperparameters that only networks have which are not read here."""
