"""Graphs of structures, block by block: in this process or in others, kept until all are made.

A kept block is known by the content that it was made of, so work that broke off goes on with what
still fits, whatever has changed meanwhile.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mlip_md.elements import symbol
from mlip_md.errors import DataError
from mlip_md.files import replacing
from mlip_md.neighbors import SMALL, HostEdges, edges_of_many
from mlip_md.trainer.data.structures import Edges, LabeledStructure, refusing_unreadable
from mlip_md.version import __version__

SHORTEST_DISTANCE = 0.1
"""Å; atoms nearer than this are a mistake (the shortest bond, H-H, is 0.74 Å)."""

CHUNK, CHUNK_ATOMS = 2048, 200_000
"""Structures handled at a time, or as many as have so many atoms."""

FEW = 4
"""Blocks that are made sooner than other processes are up (some seconds each)."""

OF_ATOMS = ("positions", "atomic_numbers", "forces")
OF_EDGES = ("senders", "receivers", "shifts")
FLAT = (*OF_ATOMS, *OF_EDGES)
OPTIONAL = {
    "shifts": 0, "cell": 0, "stress": 0, "stress_mask": 0, "forces_mask": 1, "weights": 1,
}  # fmt: skip
"""Arrays that a store lacks if all their values are these."""
Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Making:
    """How graphs are made.

    Attributes:
        cutoff: Å.
        elements: atomic numbers that are allowed; None: all.
        strict: an impossible structure is an error; otherwise it is left out and told.
        keep: folder in which flat arrays of blocks are kept; None keeps them in memory.
    """

    cutoff: float
    elements: tuple[int, ...] | None = None
    strict: bool = True
    keep: Path | None = None


@dataclasses.dataclass(frozen=True)
class Block:
    """Graphs of some structures.

    Attributes:
        arrays: by name, those in memory.
        kinds: data type of every array, but for those of ``OPTIONAL`` that are as usual.
        shapes: of every array.
        origins: name, subset and group of every structure.
        elements: atomic numbers that occur.
        bad: numbers of structures in the block that were left out, and what is wrong with them.
        path: file with the flat arrays, or None.
    """

    arrays: Arrays
    kinds: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    origins: list[tuple[str, str, str]]
    elements: list[int]
    bad: list[tuple[int, str]]
    path: Path | None = None

    def array(self, name: str, kind: np.dtype) -> np.ndarray:
        """An array of this data type."""
        if name not in self.kinds:  # fills without memory
            return np.broadcast_to(np.full((), OPTIONAL[name], kind), self.shapes[name])
        if name in self.arrays or self.path is None:
            return np.ascontiguousarray(self.arrays[name], kind)
        with np.load(self.path) as file:
            return np.ascontiguousarray(file[name], kind)

    def __len__(self) -> int:
        """Number of structures, those left out included."""
        return len(self.origins) + len(self.bad)


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def make_blocks(
    structures: Iterable[LabeledStructure], making: Making, workers: int = 1
) -> Iterator[Block]:
    """Make graphs of structures, which are taken in turn.

    Args:
        structures: any number.
        making: how.
        workers: processes that make graphs while this one reads; 1 makes them here. Blocks are the
            same, and in the same order. Fewer structures than fill some blocks need no others.

    Raises:
        DataError: if ``making`` is strict, on the first impossible structure.
    """
    tasks = ((making, k, chunk) for k, chunk in enumerate(_chunks(structures)))
    head = list(itertools.islice(tasks, FEW if workers > 1 else 0))
    if len(head) < FEW:
        yield from itertools.starmap(_make_block, itertools.chain(head, tasks))
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), _leave_with_parent
    )
    waiting: collections.deque[concurrent.futures.Future[Block]] = collections.deque()
    try:
        for task in itertools.chain(head, tasks):
            waiting.append(pool.submit(_make_block, *task))
            if len(waiting) > workers + 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_with_parent() -> None:
    """In a worker: Ctrl-C is the parent's affair, and its death, however it comes, is ours."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _chunks(structures: Iterable[LabeledStructure]) -> Iterator[list[LabeledStructure]]:
    chunk: list[LabeledStructure] = []
    atoms = 0
    for structure in structures:
        chunk.append(structure)
        atoms += len(structure)
        if len(chunk) == CHUNK or atoms >= CHUNK_ATOMS:
            yield chunk
            chunk, atoms = [], 0
    if chunk:
        yield chunk


def _make_block(making: Making, number: int, structures: Sequence[LabeledStructure]) -> Block:
    """The block of some structures, or the one that is kept already."""
    if making.keep is None:
        return _compute(making, structures)
    path, key = making.keep / f"{number:06d}.npz", _identify(making, structures)
    if (block := _open(path, key)) is not None:
        return block
    block = _compute(making, structures)
    about = json.dumps([key, block.kinds, block.shapes, block.origins, block.elements, block.bad])
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, about=np.frombuffer(about.encode(), np.uint8), **block.arrays)  # type: ignore[arg-type]
    small = {name: array for name, array in block.arrays.items() if name not in FLAT}
    return dataclasses.replace(block, arrays=small, path=path)


def _identify(making: Making, structures: Sequence[LabeledStructure]) -> str:
    """SHA-256 over everything that a block depends on."""
    digest = hashlib.sha256(
        repr((__version__, making.cutoff, making.elements, making.strict)).encode()
    )
    for one in structures:
        arrays = (one.atomic_numbers, one.positions, one.forces, one.pbc, one.cell, one.stress)
        given = [array is not None for array in arrays]
        words = (one.name, one.subset, one.group, one.energy, one.weights, one.has_forces)
        digest.update(repr((words, len(one), given)).encode())
        for array in arrays:
            if array is not None:
                digest.update(array.tobytes())
    return digest.hexdigest()


def _open(path: Path, key: str) -> Block | None:
    """A kept block, if it is whole (every array has a checksum) and made of the same structures."""
    try:
        with refusing_unreadable(path), np.load(path, allow_pickle=False) as file:
            about = json.loads(file["about"].tobytes())
            if about[0] != key:
                return None
            arrays = {name: file[name] for name in file.files}
    except DataError:
        return None
    _, kinds, shapes, origins, elements, bad = about
    small = {name: array for name, array in arrays.items() if name not in (*FLAT, "about")}
    return Block(small, kinds, {name: tuple(shape) for name, shape in shapes.items()},
                 [tuple(origin) for origin in origins], elements, [(k, text) for k, text in bad],
                 path)  # fmt: skip


def _compute(making: Making, structures: Sequence[LabeledStructure]) -> Block:
    kept, edges, bad = [], [], list[tuple[int, str]]()
    for number, (structure, found) in enumerate(
        zip(structures, _find_small(structures, making.cutoff), strict=True)
    ):
        try:
            edges.append(_check(structure, making, found))
            kept.append(structure)
        except DataError as error:
            if making.strict:
                raise
            bad.append((number, str(error)))
    arrays = _arrays(kept, edges) if kept else {}
    shapes = {name: array.shape for name, array in arrays.items()}
    for name, usual in OPTIONAL.items():
        if kept and (arrays[name] == usual).all():
            del arrays[name]
    present = {z for s in kept for z in s.atomic_numbers.tolist()}
    kinds = {name: array.dtype.str for name, array in arrays.items()}
    return Block(
        arrays, kinds, shapes, [(s.name, s.subset, s.group) for s in kept], sorted(present), bad
    )


def unknown_elements(name: str, unknown: Iterable[int], known: Iterable[int]) -> DataError:
    """The error of a structure with elements that a store does not have."""
    return DataError(
        f"{name}: {', '.join(symbol(z) for z in unknown)} is not among the elements "
        f"{', '.join(symbol(z) for z in known)} of the training set; leave such structures out "
        "(filter by elements)"
    )


def _find_small(structures: Sequence[LabeledStructure], cutoff: float) -> list[HostEdges | None]:
    """Edges of all small open structures, those of equal size together; None for the others."""
    found: list[HostEdges | None] = [None] * len(structures)
    alike: dict[int, list[int]] = {}
    for number, structure in enumerate(structures):
        if structure.cell is None and len(structure) <= SMALL:
            alike.setdefault(len(structure), []).append(number)
    for numbers in alike.values():
        positions = np.array([structures[k].positions for k in numbers])
        for number, edges in zip(numbers, edges_of_many(positions, cutoff), strict=True):
            found[number] = edges
    return found


def _check(
    structure: LabeledStructure, making: Making, edges: HostEdges | None
) -> HostEdges | Edges:
    """Edges of a structure that can be trained on; ``edges`` are those known already."""
    if making.elements is not None:
        unknown = {int(z) for z in structure.atomic_numbers} - set(making.elements)
        if unknown:
            raise unknown_elements(structure.name, sorted(unknown), making.elements)
    found = structure.find_edges(making.cutoff) if edges is None else edges
    shortest = found.lengths.min(initial=np.inf)
    if shortest < SHORTEST_DISTANCE:
        raise DataError(
            f"{structure.name}: two atoms are {shortest:.4f} Å apart, less than "
            f"{SHORTEST_DISTANCE} Å; are the positions in Å?"
        )
    return found


def _joined(arrays: Sequence[np.ndarray], kind: type) -> np.ndarray:
    return np.concatenate(arrays).astype(kind)


def _arrays(structures: Sequence[LabeledStructure], edges: Sequence[HostEdges | Edges]) -> Arrays:
    """Flat arrays of structures, at least one, and of their edges."""
    num_atoms = np.array([len(s) for s in structures])
    num_edges = np.array([len(e.senders) for e in edges])
    positions = np.concatenate([s.positions for s in structures])
    centers = np.array([np.add.reduce(s.positions) for s in structures]) / num_atoms[:, None]
    index = np.uint16 if num_atoms.max() <= 2**16 else np.int32
    receivers = np.concatenate([e.receivers for e in edges])
    owner = np.repeat(np.arange(len(edges)), num_edges)
    first = np.diff(receivers + (np.cumsum(num_atoms) - num_atoms)[owner], prepend=-1) > 0
    nothing = np.zeros((3, 3))
    if all(s.cell is None for s in structures):
        shifts = np.broadcast_to(np.int8(0), (len(receivers), 3))
    else:
        shifts = np.concatenate([e.shifts for e in edges])
    return {
        "positions": (positions - np.repeat(centers, num_atoms, axis=0)).astype(np.float32),
        "atomic_numbers": _joined([s.atomic_numbers for s in structures], np.uint8),
        "forces": _joined([s.forces for s in structures], np.float32),
        "senders": _joined([e.senders for e in edges], index),
        "receivers": receivers.astype(index),
        "shifts": shifts.astype(np.int8) if np.abs(shifts).max(initial=0) < 128 else shifts,
        "num_atoms": num_atoms,
        "num_edges": num_edges,
        "cell": np.array([nothing if s.cell is None else s.cell for s in structures], np.float32),
        "energy": np.array([s.energy for s in structures]),
        "stress": np.array(
            [nothing if s.stress is None else s.stress for s in structures], np.float32
        ),
        "stress_mask": np.array([s.stress is not None for s in structures]),
        "forces_mask": np.array([s.has_forces for s in structures]),
        "weights": np.array([s.weights for s in structures], np.float32),
        "min_distance": np.array([e.lengths.min(initial=np.inf) for e in edges], np.float32),
        "num_connected": np.bincount(owner[first], minlength=len(edges)).astype(np.int32),
    }
