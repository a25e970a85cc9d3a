"""Graphs of a whole data set in a few flat arrays, neighbor lists made once.

Atoms and edges of all structures lie one after the other; structure k owns the ``num_atoms[k]``
atoms from ``first_atom[k]`` on and the ``num_edges[k]`` edges from ``first_edge[k]`` on, whose
senders and receivers count from its own first atom. A part of a data set (training, validation)
is a store with other rows over the same flat arrays. The arrays can lie in a folder and be mapped:
then neither making nor using them needs more memory than some thousand structures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.elements import MAX_ATOMIC_NUMBER, symbol
from mlip_md.errors import DataError
from mlip_md.files import new_folder, write_text
from mlip_md.neighbors import check_cutoff
from mlip_md.trainer.data.blocks import (
    CHUNK,
    FLAT,
    OPTIONAL,
    Block,
    Making,
    make_blocks,
    unknown_elements,
)
from mlip_md.trainer.data.structures import LabeledStructure, refusing_unreadable
from mlip_md.version import __version__

FORMAT_VERSION = 2
WRITTEN_BY = f"mlip-md {__version__}"
NEWER = ("forces_mask", "weights")
"""Arrays that format version 1 did not have."""
Reject = Callable[[int, DataError], None]
"""Takes the number of a structure and what is wrong with it."""


@dataclasses.dataclass(frozen=True, eq=False)
class GraphStore:
    """The graphs and labels of n structures; N atoms and M edges lie in its flat arrays.

    Attributes:
        elements: atomic numbers, ascending; species are indices into them.
        cutoff: Å, of the neighbor lists.
        positions: (N, 3) float32 Å, each structure about its own centroid (float32 resolves
            vectors best there; nothing depends on the origin).
        atomic_numbers: (N,) uint8.
        forces: (N, 3) float32 eV/Å.
        senders: (M,) uint16 or int32, within the structure.
        receivers: (M,) likewise, ascending within a structure.
        shifts: (M, 3) int8 or int32, or None when nothing is periodic.
        first_atom: (n,) int64.
        num_atoms: (n,) int64.
        first_edge: (n,) int64.
        num_edges: (n,) int64, directed edges.
        cell: (n, 3, 3) float32 Å, or None when nothing is periodic.
        energy: (n,) float64 eV, total energies.
        stress: (n, 3, 3) float32 eV/Å³, or None when no structure has a label.
        stress_mask: (n,) bool, where there is a stress label, or None.
        forces_mask: (n,) bool, where forces are labels (they are 0 elsewhere); None: everywhere.
        weights: (n, 3) float32, of energy, forces and stress in the loss; None: all are 1.
        min_distance: (n,) float32 Å, shortest edge; infinity without edges.
        num_connected: (n,) int32, atoms with at least one neighbor.
        names: (n,) where each structure came from.
        subsets: (n,) the part of the data set that it belongs to.
        groups: (n,) its molecule.
        atomic_energies: (len(elements),) float64 eV, E0 subtracted from the labels; None until
            ``with_atomic_energies`` sets them.
    """

    elements: tuple[int, ...]
    cutoff: float
    positions: np.ndarray
    atomic_numbers: np.ndarray
    forces: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    shifts: np.ndarray | None
    first_atom: np.ndarray
    num_atoms: np.ndarray
    first_edge: np.ndarray
    num_edges: np.ndarray
    cell: np.ndarray | None
    energy: np.ndarray
    stress: np.ndarray | None
    stress_mask: np.ndarray | None
    min_distance: np.ndarray
    num_connected: np.ndarray
    names: Sequence[str]
    subsets: Sequence[str]
    groups: Sequence[str]
    forces_mask: np.ndarray | None = None
    weights: np.ndarray | None = None
    atomic_energies: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.energy)

    @classmethod
    def from_structures(
        cls,
        structures: Iterable[LabeledStructure],
        cutoff: float,
        *,
        elements: Sequence[int] | None = None,
        atomic_energies: np.ndarray | Mapping[int, float] | None = None,
        folder: str | Path | None = None,
        reject: Reject | None = None,
        workers: int = 1,
        keep: Path | None = None,
        tell: Callable[[int], None] | None = None,
    ) -> GraphStore:
        """Make neighbor lists for all structures.

        Args:
            structures: at least one; taken in turn, so they may be read as they are needed.
            cutoff: Å.
            elements: atomic numbers that define the species; None takes those that occur.
            atomic_energies: eV, E0 by species or by atomic number, if known already.
            folder: new folder to keep the arrays in, for ``open_store`` and for data sets larger
                than the memory; None keeps them in memory.
            reject: takes the number of an impossible structure, which is left out, and what is
                wrong with it; None raises that. Called when all structures are read.
            workers: processes that make neighbor lists, see ``make_blocks``.
            keep: folder in which finished parts of the work are kept, and from which they are
                taken where they fit; None keeps them while it works.
            tell: called with the number of structures that are done.

        Returns:
            The store, in the order of the structures.

        Raises:
            DataError: on an element not among ``elements``, on atoms on top of each other or too
                dense for a list, if there is no structure, or if the folder exists.
            OutputError: if the folder cannot be written.
        """
        cutoff = check_cutoff(cutoff)
        allowed = None if elements is None else tuple(sorted({int(z) for z in elements}))
        making = Making(cutoff, allowed, reject is None)
        if folder is None:
            store = _Spool(make_blocks(structures, making, workers), making, reject, tell).store()
        else:
            with new_folder(Path(folder)) as partial, _keeping(keep, partial) as place:
                making = dataclasses.replace(making, keep=place)
                blocks = make_blocks(structures, making, workers)
                _Spool(blocks, making, reject, tell).write(partial)
            store = open_store(folder)
        return store if atomic_energies is None else store.with_atomic_energies(atomic_energies)

    def subset(self, indices: np.ndarray) -> GraphStore:
        """A store of the structures (k,) in that order; the flat arrays are shared."""
        indices = np.asarray(indices, np.int64)
        rows: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("names", "subsets", "groups"):
                rows[field.name] = tuple(value[k] for k in indices.tolist())
            elif isinstance(value, np.ndarray) and field.name not in (*FLAT, "atomic_energies"):
                rows[field.name] = value[indices]
        return dataclasses.replace(self, **rows)

    def with_atomic_energies(self, energies: np.ndarray | Mapping[int, float]) -> GraphStore:
        """The same store with labels relative to these E0.

        Args:
            energies: eV, (len(elements),) by species, or a map of atomic number to eV.

        Raises:
            DataError: if an element has none, or they are not finite numbers, one per element.
        """
        if isinstance(energies, Mapping):
            missing = [symbol(z) for z in self.elements if z not in energies]
            if missing:
                raise DataError(f"no atomic energy (E0) is given for {', '.join(missing)}")
            energies = np.array([energies[z] for z in self.elements])
        energies = np.asarray(energies, np.float64)
        if energies.shape != (len(self.elements),) or not np.isfinite(energies).all():
            raise DataError(
                f"atomic energies {energies} must be {len(self.elements)} finite numbers, one for "
                f"each of {', '.join(symbol(z) for z in self.elements)}"
            )
        return dataclasses.replace(self, atomic_energies=energies)

    def with_elements(self, elements: Sequence[int]) -> GraphStore:
        """The same store with species of these elements (atomic numbers), E0 unset.

        Raises:
            DataError: if a structure has an element that is not among them.
        """
        kinds = tuple(sorted({int(z) for z in elements}))
        counts = self.compositions
        for column, number in enumerate(self.elements):
            holders = np.flatnonzero(counts[:, column])
            if number not in kinds and len(holders):
                raise unknown_elements(self.names[int(holders[0])], [number], kinds)
        return dataclasses.replace(self, elements=kinds, atomic_energies=None)

    @functools.cached_property
    def species_of(self) -> np.ndarray:
        """(119,) int32, species by atomic number; -1 for elements that do not occur."""
        lookup = np.full(MAX_ATOMIC_NUMBER + 1, -1, np.int32)
        lookup[list(self.elements)] = np.arange(len(self.elements))
        return lookup

    def chunks(self) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Some structures at a time: their slice, and indices of their atoms and edges."""
        for first in range(0, len(self), CHUNK):
            part = slice(first, first + CHUNK)
            atoms = ranges(self.first_atom[part], self.num_atoms[part])
            yield part, atoms, ranges(self.first_edge[part], self.num_edges[part])

    @functools.cached_property
    def compositions(self) -> np.ndarray:
        """(n, len(elements)) float64, number of atoms of each element in each structure."""
        size = len(self.elements)
        counts = []
        for part, atoms, _ in self.chunks():
            sizes = self.num_atoms[part]
            owner = np.repeat(np.arange(len(sizes)), sizes)
            flat = owner * size + self.species_of[self.atomic_numbers[atoms]]
            counts.append(np.bincount(flat, minlength=len(sizes) * size).reshape(-1, size))
        return np.concatenate(counts).astype(np.float64)

    def has_forces(self, index: int) -> bool:
        """Whether a structure has force labels."""
        return self.forces_mask is None or bool(self.forces_mask[index])

    def has_stress(self, index: int) -> bool:
        """Whether a structure has a stress label."""
        return self.stress_mask is not None and bool(self.stress_mask[index])

    def forces_rms(self) -> float:
        """Root mean square of the force components that have labels, eV/Å; 0 without any."""
        squares = 0.0
        for _, atoms, _ in self.chunks():  # 0 where there is no label
            squares += float(np.sum(np.square(self.forces[atoms], dtype=np.float64)))
        mask = slice(None) if self.forces_mask is None else self.forces_mask
        return float(np.sqrt(squares / max(3 * self.num_atoms[mask].sum(), 1)))

    @functools.cached_property
    def interaction_energy(self) -> np.ndarray:
        """(n,) float32 eV: ``exact_interaction_energy``, rounded."""
        return self.exact_interaction_energy.astype(np.float32)

    @functools.cached_property
    def exact_interaction_energy(self) -> np.ndarray:
        """(n,) float64 eV: total energy minus the sum of E0.

        Raises:
            DataError: if the store has no E0 yet.
        """
        if self.atomic_energies is None:
            raise DataError(
                "the store has no atomic energies (E0) yet, so there are no energy labels; compute "
                "statistics and call with_atomic_energies first"
            )
        exact: np.ndarray = self.energy - self.compositions @ self.atomic_energies
        return exact

    def degrees(self) -> np.ndarray:
        """Number of neighbors of every atom of every structure, in their order; (sum of atoms,)."""
        parts = []
        for part, atoms, edges in self.chunks():
            sizes = self.num_atoms[part]
            before = np.repeat(np.cumsum(sizes) - sizes, self.num_edges[part])
            parts.append(np.bincount(self.receivers[edges] + before, minlength=len(atoms)))
        return np.concatenate(parts)


def open_store(folder: str | Path, trusted: bool = False) -> GraphStore:
    """Open a store that ``GraphStore.from_structures`` made in a folder.

    Its arrays are read once to compare checksums, then mapped from disk as they are needed.

    Args:
        folder: of the store.
        trusted: whether to compare none.

    Raises:
        DataError: if it is no store, of another version, or damaged.
    """
    folder = Path(folder)
    with refusing_unreadable(folder, "not a readable graph store"):
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        check_format(folder, index, FORMAT_VERSION)
        arrays = {name: _mapped(folder, name, spec) for name, spec in index["arrays"].items()}
        if not trusted:
            check_sums(folder, index["sha256"])
        with open(folder / "structures.jsonl", encoding="utf-8") as stream:
            origins = [_origin(*json.loads(line)) for line in stream]
        return _store(arrays, origins, tuple(index["elements"]), float(index["cutoff"]))


def check_format(folder: Path, index: Mapping[str, Any], newest: int) -> None:
    """Refuse a folder whose format this version does not know.

    Args:
        folder: for the message.
        index: its description, with ``format_version`` and, mostly, ``written_by``.
        newest: format version that is read, with all before it.

    Raises:
        DataError: naming the version of mlip-md that reads the folder.
    """
    version = index["format_version"]
    if version not in range(1, newest + 1):
        writer = index.get("written_by", "a newer mlip-md than this")
        raise DataError(
            f"{folder}: its format version is {version}, written and read by {writer!s:.40}; "
            f"{WRITTEN_BY} reads up to {newest}. Upgrade mlip-md, or prepare the data again"
        )


def ranges(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Concatenate ``arange(start, start + size)`` of all pairs."""
    before = np.cumsum(sizes) - sizes
    return np.arange(int(sizes.sum())) + np.repeat(starts - before, sizes)


# Making graphs


@contextlib.contextmanager
def _keeping(keep: Path | None, partial: Path) -> Iterator[Path]:
    """The folder for finished blocks; one that is gone afterwards if none is given."""
    place = partial / "blocks" if keep is None else keep
    place.mkdir(exist_ok=True)
    yield place
    if keep is None:
        shutil.rmtree(place)


class _Spool:
    """Collects blocks of graphs, and makes a store of them."""

    def __init__(
        self,
        blocks: Iterable[Block],
        making: Making,
        reject: Reject | None,
        tell: Callable[[int], None] | None,
    ) -> None:
        self.cutoff = making.cutoff
        self.origins: list[tuple[str, str, str]] = []
        self.blocks: list[Block] = []
        self.kinds: dict[str, np.dtype] = {}
        bad: list[tuple[int, str]] = []
        present: set[int] = set()
        count = 0
        for block in blocks:
            bad += [(count + number, text) for number, text in block.bad]
            count += len(block)
            if block.origins:
                self._add(block)
            present.update(block.elements)
            if tell is not None:
                tell(count)
        for number, text in bad:  # after all that reading finds, however many processes work
            if reject is not None:
                reject(number, DataError(text))
        if not self.origins:
            raise DataError("there are no structures to make graphs of")
        self.elements = making.elements or tuple(sorted(present))

    def _add(self, block: Block) -> None:
        self.origins += [_origin(*origin) for origin in block.origins]
        for name, kind in block.kinds.items():
            known = self.kinds.get(name, np.dtype(kind))
            self.kinds[name] = np.promote_types(known, np.dtype(kind))
        self.blocks.append(dataclasses.replace(block, origins=[]))

    def _arrays(self, name: str) -> Iterator[np.ndarray]:
        return (block.array(name, self.kinds[name]) for block in self.blocks)

    def store(self) -> GraphStore:
        """The store, in memory."""
        arrays = {name: np.concatenate(list(self._arrays(name))) for name in self.kinds}
        return _store(arrays, self.origins, self.elements, self.cutoff)

    def write(self, folder: Path) -> None:
        """Write everything to the folder."""
        specs: dict[str, Any] = {}
        for name, kind in self.kinds.items():
            length, shape = 0, ()
            with open(folder / f"{name}.bin", "wb") as file:
                for array in self._arrays(name):
                    array.tofile(file)
                    length, shape = length + len(array), array.shape[1:]
            specs[name] = {"dtype": kind.str, "shape": [length, *shape]}
        with open(folder / "structures.jsonl", "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(origin) + "\n" for origin in self.origins)
        files = [*(f"{name}.bin" for name in specs), "structures.jsonl"]
        index = {
            "format_version": FORMAT_VERSION if {*NEWER} & {*specs} else 1,
            "written_by": WRITTEN_BY,
            "units": {"length": "Å", "energy": "eV"},
            "elements": self.elements,
            "cutoff": self.cutoff,
            "arrays": specs,
            "sha256": sum_files(folder, files),
        }
        write_text(folder / "index.json", json.dumps(index, indent=1))


def _store(
    arrays: Mapping[str, np.ndarray],
    origins: Sequence[Sequence[str]],
    elements: tuple[int, ...],
    cutoff: float,
) -> GraphStore:
    fields: dict[str, Any] = {**dict.fromkeys(OPTIONAL), **arrays}
    for count, first in (("num_atoms", "first_atom"), ("num_edges", "first_edge")):
        fields[count] = np.array(arrays[count], np.int64)
        fields[first] = np.cumsum(fields[count]) - fields[count]
    sizes = (len(fields["positions"]), len(fields["senders"]), len(fields["energy"]))
    if sizes != (fields["num_atoms"].sum(), fields["num_edges"].sum(), len(origins)):
        raise DataError("the arrays of the graph store do not fit together; prepare the data again")
    names, subsets, groups = (tuple(o[k] for o in origins) for k in range(3))
    return GraphStore(
        elements=elements, cutoff=cutoff, names=names, subsets=subsets, groups=groups, **fields
    )


def _mapped(folder: Path, name: str, spec: Mapping[str, Any]) -> np.ndarray:
    shape = tuple(spec["shape"])
    if 0 in shape:
        return np.zeros(shape, spec["dtype"])
    path = folder / f"{name}.bin"
    expected = int(np.prod(shape)) * np.dtype(spec["dtype"]).itemsize
    if path.stat().st_size != expected:
        raise DataError(
            f"{path} has {path.stat().st_size} bytes, not {expected}; prepare the data again"
        )
    return np.memmap(path, dtype=spec["dtype"], mode="r", shape=shape)


def _origin(name: str, subset: str, group: str) -> tuple[str, str, str]:
    return name, sys.intern(subset), sys.intern(group)  # shared by many structures


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sum_files(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Checksums (SHA-256) of files by their names in a folder, for its description."""
    return {name: _sha256(folder / name) for name in names}


def check_sums(folder: Path, checksums: Mapping[str, str]) -> None:
    """Refuse a folder in which a file is not the one that had its name.

    Args:
        folder: with the files.
        checksums: as ``sum_files`` made them when the folder was written.

    Raises:
        DataError: naming the file.
        OSError: if there is none of a name.
    """
    for name, checksum in checksums.items():
        if _sha256(folder / name) != checksum:
            raise DataError(f"{folder / name} is damaged (checksum); prepare the data again")
