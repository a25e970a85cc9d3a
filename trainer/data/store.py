"""Graphs of a whole data set in a few flat arrays, neighbor lists made once.

Structure k owns the atoms ``node_offsets[k]:node_offsets[k + 1]`` and the edges
``edge_offsets[k]:edge_offsets[k + 1]``; senders and receivers count atoms from the structure's
first. 1.7 million molecules need about 3 kB each, and a saved store is mapped, not loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.elements import symbol
from mlip_md.errors import DataError
from mlip_md.neighbors.geometry import check_cutoff
from mlip_md.neighbors.host import host_edges
from mlip_md.trainer.data.structures import MAX_ATOMIC_NUMBER, Structure

SHORTEST_DISTANCE = 0.1
"""Å; atoms nearer than this are a mistake (the shortest bond, H-H, is 0.74 Å)."""

FORMAT_VERSION = 1
OPTIONAL = ("shifts", "cell", "stress", "stress_mask")
_CHUNK = 2048

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class GraphStore:
    """The graphs and labels of n structures with N atoms and M edges in all.

    Attributes:
        elements: atomic numbers, ascending; species are indices into them.
        cutoff: Å, of the neighbor lists.
        node_offsets: (n + 1,) int64.
        edge_offsets: (n + 1,) int64.
        positions: (N, 3) float32 Å, each structure about its own centroid (float32 resolves
            vectors best there; nothing depends on the origin).
        species: (N,) uint8.
        forces: (N, 3) float32 eV/Å.
        senders: (M,) uint16 or int32, within the structure.
        receivers: (M,) likewise, ascending within a structure.
        shifts: (M, 3) int8 or int32, or None when nothing is periodic.
        cell: (n, 3, 3) float32 Å, or None when nothing is periodic.
        energy: (n,) float64 eV, total energies.
        stress: (n, 3, 3) float32 eV/Å³, or None when no structure has a label.
        stress_mask: (n,) bool, where there is a stress label, or None.
        min_distance: (n,) float32 Å, shortest edge; infinity without edges.
        num_connected: (n,) int32, atoms with at least one neighbor.
        atomic_energies: (len(elements),) float64 eV, E0 subtracted from the labels; None until
            ``with_atomic_energies`` sets them.
        names: where each structure came from.
    """

    elements: tuple[int, ...]
    cutoff: float
    node_offsets: np.ndarray
    edge_offsets: np.ndarray
    positions: np.ndarray
    species: np.ndarray
    forces: np.ndarray
    senders: np.ndarray
    receivers: np.ndarray
    shifts: np.ndarray | None
    cell: np.ndarray | None
    energy: np.ndarray
    stress: np.ndarray | None
    stress_mask: np.ndarray | None
    min_distance: np.ndarray
    num_connected: np.ndarray
    atomic_energies: np.ndarray | None = None
    names: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.energy)

    @functools.cached_property
    def num_atoms(self) -> np.ndarray:
        """(n,) int64, atoms of each structure."""
        return np.diff(self.node_offsets)

    @functools.cached_property
    def num_edges(self) -> np.ndarray:
        """(n,) int64, directed edges of each structure."""
        return np.diff(self.edge_offsets)

    @classmethod
    def from_structures(
        cls,
        structures: Iterable[Structure],
        cutoff: float,
        *,
        elements: Sequence[int] | None = None,
        atomic_energies: np.ndarray | Mapping[int, float] | None = None,
    ) -> GraphStore:
        """Make neighbor lists for all structures.

        Args:
            structures: at least one.
            cutoff: Å.
            elements: atomic numbers that define the species; None takes those that occur.
            atomic_energies: eV, E0 by species or by atomic number, if known already.

        Returns:
            The store, in the order of the structures.

        Raises:
            DataError: on an element not among ``elements``, or on atoms on top of each other.
        """
        cutoff = check_cutoff(cutoff)
        lookup = _species_lookup(elements)
        iterator, names = iter(structures), []
        blocks: list[Arrays] = []
        while chunk := list(itertools.islice(iterator, _CHUNK)):
            blocks.append(_block(chunk, cutoff, lookup))
            names += [structure.name for structure in chunk]
        if not blocks:
            raise DataError("there are no structures to make graphs of")
        arrays = _joined(blocks)
        if elements is None:  # species are atomic numbers so far
            present, species = np.unique(arrays["species"], return_inverse=True)
            elements, arrays["species"] = present.tolist(), species.astype(np.uint8)
        kinds = tuple(sorted({int(z) for z in elements}))
        store = cls(elements=kinds, cutoff=cutoff, names=tuple(names), **arrays)
        return store if atomic_energies is None else store.with_atomic_energies(atomic_energies)

    def with_atomic_energies(self, energies: np.ndarray | Mapping[int, float]) -> GraphStore:
        """The same store with labels relative to these E0 (eV, by species or by atomic number)."""
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

    @functools.cached_property
    def reference_energy(self) -> np.ndarray:
        """(n,) float64 eV, the sum of E0 over each structure's atoms."""
        if self.atomic_energies is None:
            raise DataError(
                "the store has no atomic energies (E0) yet, so there are no energy labels; compute "
                "statistics and call with_atomic_energies first"
            )
        return np.add.reduceat(self.atomic_energies[self.species], self.node_offsets[:-1])

    @functools.cached_property
    def interaction_energy(self) -> np.ndarray:
        """(n,) float32 eV: total minus reference energy, subtracted in float64."""
        return (self.energy - self.reference_energy).astype(np.float32)

    def degrees(self) -> np.ndarray:
        """(N,) int64, number of neighbors of every atom."""
        parts = []
        for first in range(0, len(self), _CHUNK):
            last = min(first + _CHUNK, len(self))
            edges = slice(self.edge_offsets[first], self.edge_offsets[last])
            starts = self.node_offsets[first:last] - self.node_offsets[first]
            receivers = self.receivers[edges] + np.repeat(starts, self.num_edges[first:last])
            size = int(self.node_offsets[last] - self.node_offsets[first])
            parts.append(np.bincount(receivers, minlength=size))
        return np.concatenate(parts)

    def compositions(self) -> np.ndarray:
        """(n, len(elements)) float64, number of atoms of each element in each structure."""
        owner = np.repeat(np.arange(len(self)), self.num_atoms)
        size = len(self.elements)
        counts = np.bincount(owner * size + self.species, minlength=len(self) * size)
        return counts.reshape(len(self), size).astype(np.float64)

    def save(self, folder: str | Path) -> None:
        """Write the store as a folder of arrays, all or nothing; ``open_store`` maps it again.

        Raises:
            DataError: if the folder exists.
        """
        folder = Path(folder)
        if folder.exists():
            raise DataError(f"{folder} exists already; remove it or choose another folder")
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True)
        try:
            arrays = {}
            for name, array in _array_fields(self):
                np.save(partial / f"{name}.npy", array, allow_pickle=False)
                arrays[name] = _sha256(partial / f"{name}.npy")
            (partial / "names.txt").write_text("\n".join(self.names))
            index = {
                "format_version": FORMAT_VERSION,
                "units": {"length": "Å", "energy": "eV"},
                "elements": self.elements,
                "cutoff": self.cutoff,
                "sha256": arrays,
            }
            (partial / "index.json").write_text(json.dumps(index, indent=1))
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def open_store(folder: str | Path, verify: bool = False) -> GraphStore:
    """Open a saved store; its arrays are mapped from disk as they are needed.

    Args:
        folder: what ``GraphStore.save`` wrote.
        verify: read everything once and compare checksums.

    Raises:
        DataError: if it is no store, of another version, or damaged.
    """
    folder = Path(folder)
    try:
        index = json.loads((folder / "index.json").read_text())
        if index["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"{folder}: format version {index['format_version']}, this program reads "
                f"{FORMAT_VERSION}; prepare the data again"
            )
        fields: dict[str, Any] = dict.fromkeys(OPTIONAL)
        for name, checksum in index["sha256"].items():
            path = folder / f"{name}.npy"
            if verify and _sha256(path) != checksum:
                raise DataError(f"{path} is damaged (checksum); prepare the data again")
            fields[name] = np.load(path, mmap_mode="r", allow_pickle=False)
        names = tuple((folder / "names.txt").read_text().split("\n"))
        elements, cutoff = tuple(index["elements"]), float(index["cutoff"])
        store = GraphStore(elements=elements, cutoff=cutoff, names=names, **fields)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{folder}: not a readable graph store ({error})") from error
    if store.node_offsets[-1] != len(store.positions) or len(names) != len(store):
        raise DataError(f"{folder}: its arrays do not fit together; prepare the data again")
    return store


def _array_fields(store: GraphStore) -> Iterator[tuple[str, np.ndarray]]:
    for field in dataclasses.fields(store):
        value = getattr(store, field.name)
        if isinstance(value, np.ndarray):
            yield field.name, value


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _species_lookup(elements: Sequence[int] | None) -> np.ndarray:
    """Species by atomic number, -1 for those not allowed; the number itself if all are."""
    if elements is None:
        return np.arange(MAX_ATOMIC_NUMBER + 1)
    lookup = np.full(MAX_ATOMIC_NUMBER + 1, -1)
    lookup[sorted(set(elements))] = np.arange(len(set(elements)))
    return lookup


def _block(structures: list[Structure], cutoff: float, lookup: np.ndarray) -> Arrays:
    """Arrays of some structures, joined."""
    graphs = [_graph(structure, cutoff, lookup) for structure in structures]
    arrays = {name: np.concatenate([g[name] for g in graphs]) for name in graphs[0]}
    if not arrays["shifts"].any():
        del arrays["shifts"]
    elif np.abs(arrays["shifts"]).max() < 128:
        arrays["shifts"] = arrays["shifts"].astype(np.int8)
    if not arrays["cell"].any():
        del arrays["cell"]
    if not arrays["stress_mask"].any():
        del arrays["stress"], arrays["stress_mask"]
    return arrays


def _graph(structure: Structure, cutoff: float, lookup: np.ndarray) -> Arrays:
    species = lookup[structure.atomic_numbers]
    if species.min() < 0:
        unknown = sorted({int(z) for z in structure.atomic_numbers[species < 0]})
        raise DataError(
            f"{structure.name}: {', '.join(symbol(z) for z in unknown)} is not among the elements "
            f"{', '.join(symbol(int(z)) for z in np.flatnonzero(lookup >= 0))} of the training "
            "set; leave such structures out (filter by elements)"
        )
    cell = np.zeros((3, 3)) if structure.cell is None else structure.cell
    edges = host_edges(structure.positions, cell, structure.pbc, cutoff)
    shortest = float(edges.lengths.min()) if len(edges.lengths) else np.inf
    if shortest < SHORTEST_DISTANCE:
        raise DataError(
            f"{structure.name}: two atoms are {shortest:.4f} Å apart, less than "
            f"{SHORTEST_DISTANCE} Å; are the positions in Å?"
        )
    small = np.uint16 if len(structure) <= 2**16 else np.int32
    labeled = structure.stress is not None
    return {
        "num_atoms": np.array([len(structure)]),
        "num_edges": np.array([len(edges.senders)]),
        "positions": (structure.positions - structure.positions.mean(0)).astype(np.float32),
        "species": species.astype(np.uint8),
        "forces": structure.forces.astype(np.float32),
        "senders": edges.senders.astype(small),
        "receivers": edges.receivers.astype(small),
        "shifts": edges.shifts.astype(np.int32),
        "cell": cell[None].astype(np.float32),
        "energy": np.array([structure.energy]),
        "stress": np.asarray(structure.stress if labeled else np.zeros((3, 3)), np.float32)[None],
        "stress_mask": np.array([labeled]),
        "min_distance": np.array([shortest], np.float32),
        "num_connected": np.array([np.count_nonzero(np.bincount(edges.receivers))], np.int32),
    }


def _joined(blocks: list[Arrays]) -> dict[str, Any]:
    """Join blocks; a field that no block has is None, one that some lack is zero there."""
    shapes: dict[str, tuple[int, ...]] = {"shifts": (3,), "cell": (3, 3), "stress": (3, 3)}
    names = {name for block in blocks for name in block}
    joined: dict[str, Any] = {name: None for name in OPTIONAL if name not in names}
    for name in sorted(names):
        parts = []
        for block in blocks:
            part = block.get(name)
            if part is None:
                count = block["num_edges"].sum() if name == "shifts" else len(block["energy"])
                kind = next(b[name].dtype for b in blocks if name in b)
                part = np.zeros((count, *shapes.get(name, ())), kind)
            parts.append(part)
        joined[name] = np.concatenate(parts)
    for name, offsets in (("num_atoms", "node_offsets"), ("num_edges", "edge_offsets")):
        joined[offsets] = np.concatenate([[0], np.cumsum(joined.pop(name))])
    return joined
