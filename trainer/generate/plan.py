"""Which groups the data set has: a seeded list of tasks, each with its split decided beforehand."""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.generate import molecules
from mlip_md.trainer.generate.chemistry import canonical, is_supported, size

SUBSETS = (
    "Small organics",
    "Drug-like molecules",
    "Decorated molecules",
    "Dipeptides",
    "Dimers",
    "Water clusters",
    "Solvated molecules",
    "Solvated amino acids",
    "Ions",
    "Salt bridges",
)
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """One group of the file.

    Attributes:
        name: name of the group.
        subset: one of `SUBSETS`.
        kind: how it is sampled: "molecule", "complex", "water" or "solvated".
        smiles: canonical SMILES of the molecules (without waters that solvate).
        split: "train", "validation" or "test".
        count: number of waters of a "water" or "solvated" task.
        starts: number of independent starts of a "water" task.
    """

    name: str
    subset: str
    kind: str
    smiles: tuple[str, ...]
    split: str
    count: int = 0
    starts: int = 0


@dataclass
class _Names:
    taken: set[str] = field(default_factory=set)

    def new(self, name: str) -> str:
        """A group name that HDF5 allows (no '/', as in SPICE) and that is not taken."""
        name = name.replace("/", "")
        unique, number = name, 2
        while unique in self.taken:
            unique, number = f"{name} ({number})", number + 1
        self.taken.add(unique)
        return unique


def generator(seed: int, *words: str) -> np.random.Generator:
    """A random generator of its own for a seed and a name."""
    digest = hashlib.sha256("\n".join(words).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], dtype=np.uint32).tolist()])


def split_of(smiles: Iterable[str], seed: int) -> str:
    """The split of a structure made of these molecules.

    A hash of (seed, canonical SMILES without stereochemistry) puts 5 % of the molecules in
    "test" and 5 % in "validation"; molecules of at most two heavy atoms, which are building
    blocks of all others, are always "train". A structure is held out if one of its molecules is.

    Args:
        smiles: SMILES of its molecules, one by one.
        seed: seed of the data set.

    Returns:
        "train", "validation" or "test".
    """
    return max(
        (_molecule_split(canonical(s, stereo=False), seed) for s in smiles), key=SPLITS.index
    )


def _molecule_split(key: str, seed: int) -> str:
    return "train" if size(key)[1] <= 2 else _hashed_split(key, seed)


def _hashed_split(key: str, seed: int) -> str:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if fraction < 0.90 else "validation" if fraction < 0.95 else "test"


def plan(
    seed: int = 0,
    scale: float = 1.0,
    subsets: Sequence[str] | None = None,
    max_atoms: int | None = None,
) -> list[Task]:
    """All groups of the data set, in a seeded order in which any first part is representative.

    Args:
        seed: decides the drawn molecules, pairs, splits and the order.
        scale: factor on the number of groups of each subset (for water: on the starts).
        subsets: names out of `SUBSETS`; all when None.
        max_atoms: leave out structures with more atoms.

    Raises:
        ConfigError: one of them is not allowed.
        DataError: no group is left.
    """
    _check_options(seed, scale, subsets, max_atoms)
    by_subset: dict[str, list[Task]] = {name: [] for name in SUBSETS}
    for task in _all_tasks(seed, scale):
        if max_atoms is None or num_atoms(task) <= max_atoms:
            by_subset[task.subset].append(task)
    chosen: list[Task] = []
    for name in dict.fromkeys(subsets or SUBSETS):
        tasks = by_subset[name]
        order = generator(seed, "order", name).permutation(len(tasks))
        keep = len(tasks) if name == "Water clusters" else max(1, round(scale * len(tasks)))
        chosen += [tasks[i] for i in order[:keep]]
    if not chosen:
        raise DataError(
            f"nothing to make: no structure of {', '.join(subsets or SUBSETS)} has at most "
            f"{max_atoms} atoms; raise max_atoms or choose other subsets"
        )
    order = generator(seed, "order").permutation(len(chosen))
    return [chosen[i] for i in order]


def _check_options(
    seed: int, scale: float, subsets: Sequence[str] | None, max_atoms: int | None
) -> None:
    if not 0 < scale < math.inf:
        raise ConfigError(f"scale must be a finite number larger than 0, received {scale}")
    # HDF5 keeps both as attributes
    if not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise ConfigError(f"seed must be a whole number from 0 to 2^63 - 1, received {seed}")
    if max_atoms is not None and not (isinstance(max_atoms, int) and 1 <= max_atoms < 2**63):
        raise ConfigError(f"max_atoms must be a whole number of at least 1, received {max_atoms}")
    unknown = sorted(set(subsets or ()) - set(SUBSETS))
    if unknown:
        raise ConfigError(f"unknown subsets {unknown}; choose from {', '.join(SUBSETS)}")


def num_atoms(task: Task) -> int:
    """Number of atoms of the structures of a task."""
    return sum(size(s)[0] for s in task.smiles) + 3 * task.count


def _all_tasks(seed: int, scale: float) -> list[Task]:
    names = _Names()
    seen: set[str] = set()

    def singles(subset: str, smiles: Iterable[str]) -> list[Task]:
        tasks = []
        for one in smiles:
            key = canonical(one)
            if key not in seen:
                seen.add(key)
                tasks.append(
                    Task(names.new(key), subset, "molecule", (key,), split_of([key], seed))
                )
        return tasks

    small = singles("Small organics", molecules.small_organics())
    drugs = singles("Drug-like molecules", molecules.drug_like())
    rng = generator(seed, "decorated")
    drawn = [s for s in molecules.decorated(round(420 * max(1.0, scale)), rng) if is_supported(s)]
    decorated = singles("Decorated molecules", drawn)
    capped = {letter: molecules.capped_peptide(letter) for letter in molecules.RESIDUES}
    peptides = singles("Dipeptides", [*capped.values(), *_dipeptides(seed, scale)])
    return [
        *small,
        *drugs,
        *decorated,
        *peptides,
        *_dimers(small, names, seed, scale),
        *_water_clusters(names, seed, scale),
        *_solvated(small, list(capped.values()), names, seed),
        *_ions(singles, names, seed),
    ]


def _dipeptides(seed: int, scale: float) -> list[str]:
    rng = generator(seed, "dipeptides")
    letters = list(molecules.RESIDUES)
    pairs = [first + second for first in letters for second in letters]
    chosen = rng.permutation(len(pairs))[: round(50 * max(1.0, scale))]
    return [molecules.capped_peptide(pairs[i]) for i in chosen]


def _dimers(small: list[Task], names: _Names, seed: int, scale: float) -> list[Task]:
    """Water with every small molecule, and random pairs that never mix validation with test."""
    rng = generator(seed, "dimers")
    monomers = [(t.smiles[0], t.split, size(t.smiles[0])[0]) for t in small]
    monomers = [m for m in monomers if m[2] <= 15]
    pairs = {(smiles, molecules.WATER): None for smiles, _, atoms in monomers if atoms <= 13}
    target = len(pairs) + round(500 * max(1.0, scale))
    for _ in range(100 * target):
        if len(pairs) >= target:
            break
        first, second = (monomers[i] for i in rng.integers(len(monomers), size=2))
        held_out = {first[1], second[1]} - {"train"}
        if len(held_out) < 2 and first[2] + second[2] <= 26:
            pairs[(first[0], second[0])] = None
    return [
        Task(names.new(".".join(pair)), "Dimers", "complex", pair, split_of(pair, seed))
        for pair in pairs
    ]


def _water_clusters(names: _Names, seed: int, scale: float) -> list[Task]:
    tasks = []
    for count in range(2, 31):
        starts = 12 if count <= 6 else 4 if count < 20 else 6
        split = _hashed_split(f"{count} waters", seed)
        name = names.new(f"{count} waters")
        starts = max(1, round(starts * scale))
        tasks.append(Task(name, "Water clusters", "water", (), split, count, starts))
    return tasks


def _solvated(small: list[Task], peptides: list[str], names: _Names, seed: int) -> list[Task]:
    rng = generator(seed, "solvated")
    solutes = [t.smiles[0] for t in small if 5 <= size(t.smiles[0])[0] <= 16]
    tasks = []
    for index in rng.permutation(len(solutes))[:90]:
        smiles, count = solutes[index], int(rng.integers(2, 9))
        name = names.new(f"{smiles} in {count} waters")
        split = split_of([smiles], seed)
        tasks.append(Task(name, "Solvated molecules", "solvated", (smiles,), split, count))
    for smiles in peptides:
        smiles, count = canonical(smiles), 20
        name = names.new(f"{smiles} in {count} waters")
        split = split_of([smiles], seed)
        tasks.append(Task(name, "Solvated amino acids", "solvated", (smiles,), split, count))
    return tasks


def _ions(singles, names: _Names, seed: int) -> list[Task]:
    alone = [s for s in molecules.ions() if "." not in s]
    pairs = [("Ions", s) for s in molecules.ions() if "." in s]
    pairs += [("Salt bridges", s) for s in molecules.salt_bridges()]
    tasks = singles("Ions", alone)
    for subset, text in pairs:
        parts = tuple(canonical(part) for part in text.split("."))
        tasks.append(
            Task(names.new(".".join(parts)), subset, "complex", parts, split_of(parts, seed))
        )
    return tasks
