"""Checkpoints: the complete state of a run in one checksummed file, never half written.

A checkpoint is one safetensors file. Its tensors are the leaves of the state by path; its metadata
hold a JSON text (step, epoch, batch, bests, …) and the SHA-256 over that text and over every name,
type, shape and byte of the tensors. It is written whole or not at all, so that a crash at any
moment leaves the older files whole. Reading takes the newest file whose hash is right.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from mlip_md.errors import CheckpointError
from mlip_md.files import write_bytes
from mlip_md.networks.config import CONFIGS

FORMAT = 3
READABLE_FORMATS = (2, 3)

State = TypeVar("State")
_log = logging.getLogger(__name__)


def leaves_by_path(state: Any) -> dict[str, np.ndarray]:
    """The leaves of a pytree as NumPy arrays on the host, by their path in the tree."""
    flat, _ = jax.tree_util.tree_flatten_with_path(state)
    return {
        jax.tree_util.keystr(path): np.asarray(jax.device_get(leaf), order="C")
        for path, leaf in flat
    }


def state_hash(tensors: Mapping[str, np.ndarray], text: str = "") -> str:
    """SHA-256 over a text and over the name, type, shape and bytes of every tensor."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"\0{name}\0{array.dtype}\0{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def write_checkpoint(path: Path, state: Any, progress: Mapping[str, Any]) -> None:
    """Write one checkpoint.

    Args:
        path: of the new file.
        state: pytree of arrays.
        progress: plain JSON values that belong to the state.

    Raises:
        OutputError: if the file cannot be written.
    """
    tensors = leaves_by_path(state)
    text = json.dumps({"format": FORMAT, "progress": dict(progress)}, sort_keys=True)
    metadata = {"checkpoint": text, "sha256": state_hash(tensors, text)}
    write_bytes(path, to_safetensors(tensors, metadata))


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and progress of a checkpoint that is whole and of this format."""
    try:
        with safe_open(path, framework="numpy") as stream:
            metadata = stream.metadata() or {}
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        text, expected = metadata["checkpoint"], metadata["sha256"]
        if state_hash(tensors, text) != expected:
            raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one stored in it")
        content = json.loads(text)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint ({error})") from error
    if content["format"] not in READABLE_FORMATS:
        raise CheckpointError(
            f"{path} has checkpoint format {content['format']}; this version reads "
            f"{' and '.join(map(str, READABLE_FORMATS))}: go on with the version that wrote it"
        )
    if content["format"] == 2:
        tensors = _without_published_block(tensors)
    return tensors, content["progress"]


def _without_published_block(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Present names of the weights of format 2, which lay below the published block."""
    blocks = "|".join(config.published_block for config in CONFIGS.values())
    below = re.compile(rf"\['params'\]\['({blocks})'\]")
    return {below.sub("['params']", name, count=1): array for name, array in tensors.items()}


def _fill(path: Path, template: State, tensors: Mapping[str, np.ndarray]) -> State:
    flat, tree = jax.tree_util.tree_flatten_with_path(template)
    names = [jax.tree_util.keystr(place) for place, _ in flat]
    wanted = {name: np.shape(leaf) for name, (_, leaf) in zip(names, flat, strict=True)}
    given = {name: array.shape for name, array in tensors.items()}
    if wanted != given:
        differing = sorted(n for n in {*wanted, *given} if wanted.get(n) != given.get(n))
        raise CheckpointError(
            f"{path} belongs to another network or optimizer: {len(differing)} tensors differ, "
            f"first {differing[0]} (here {wanted.get(differing[0])}, "
            f"there {given.get(differing[0])})"
        )
    return jax.tree_util.tree_unflatten(tree, [tensors[name] for name in names])


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """The newest checkpoints of a run, as files ``step-NNNNNNNNN.safetensors``.

    Attributes:
        folder: for the files; made at the first save.
        keep_latest: how many of them stay.
    """

    folder: Path
    keep_latest: int

    def files(self) -> list[Path]:
        """The checkpoints there are, newest first."""
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def save(self, state: Any, progress: Mapping[str, Any], step: int) -> Path:
        """Write the checkpoint of a step, then delete those beyond ``keep_latest``.

        Raises:
            OutputError: if it cannot be written; the older ones are untouched then.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{step:09d}.safetensors"
        write_checkpoint(path, state, progress)
        for old in self.files()[self.keep_latest :]:
            old.unlink(missing_ok=True)
        return path

    def restore(
        self, template: State, check: Callable[[dict[str, Any]], None] | None = None
    ) -> tuple[State, dict[str, Any]] | None:
        """The newest undamaged checkpoint, or None where there is none at all.

        Args:
            template: a state of the same run; its values do not matter.
            check: called with the progress of that checkpoint before its state is looked at; what
                it raises ends the search.

        Raises:
            CheckpointError: if there are checkpoints and not one is usable, or the newest
                undamaged one belongs to another network or optimizer.
        """
        problems = []
        for path in self.files():
            try:
                tensors, progress = _read(path)
            except CheckpointError as error:
                _log.warning("%s; trying the one before", error)
                problems.append(str(error))
                continue
            if check is not None:
                check(progress)
            return _fill(path, template, tensors), progress
        if problems:
            raise CheckpointError("no checkpoint is usable: " + "; ".join(problems))
        return None
