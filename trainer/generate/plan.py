"""Which groups the data set has: a seeded list of tasks, each with its split decided beforehand."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mlip_md.constants import SPLITS
from mlip_md.elements import symbol
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.generate import molecules
from mlip_md.trainer.generate.chemistry import ELEMENTS, canonicalize, count_atoms, is_supported

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
    "Pressed clusters",
    "Isolated atoms",
    "Atom pairs",
    "Dissociation",
    "Separated pairs",
)
DISSOCIATION = SUBSETS[-4:]
"""Those that tell a potential what lies between molecules and atoms; see `dissociation`."""


@dataclass(frozen=True)
class Task:
    """One group of the file.

    Attributes:
        name: name of the group.
        subset: one of `SUBSETS`.
        kind: how it is sampled: "molecule", "complex", "water", "solvated", "pressed", "atoms",
            "dissociation" or "separation".
        smiles: canonical SMILES of the molecules (without waters that solvate).
        split: one of `SPLITS`.
        num_waters: number of waters of a "water", "solvated" or "pressed" task.
        num_starts: number of independent starts of a "water" task.
    """

    name: str
    subset: str
    kind: str
    smiles: tuple[str, ...]
    split: str
    num_waters: int = 0
    num_starts: int = 0

    @property
    def num_atoms(self) -> int:
        """Number of atoms of each of its structures."""
        return sum(count_atoms(s)[0] for s in self.smiles) + 3 * self.num_waters


def make_generator(seed: int, *words: str) -> np.random.Generator:
    """A random generator of its own for a seed and a name."""
    digest = hashlib.sha256("\n".join(words).encode()).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], dtype=np.uint32).tolist()])


def assign_split(smiles: Iterable[str], seed: int) -> str:
    """The split of a structure made of these molecules.

    A hash of (seed, canonical SMILES without stereochemistry) puts 5 % of the molecules in
    "test" and 5 % in "validation"; molecules of at most two heavy atoms, which are building
    blocks of all others, are always "train". A structure is held out if one of its molecules is.

    Args:
        smiles: SMILES of its molecules, one by one.
        seed: seed of the data set.

    Returns:
        One of `SPLITS`.
    """
    keys = [canonicalize(s, stereo=False) for s in smiles]
    splits = ["train" if count_atoms(k)[1] <= 2 else _hash_split(k, seed) for k in keys]
    return max(splits, key=SPLITS.index)


def _hash_split(key: str, seed: int) -> str:
    digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    fraction = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if fraction < 0.90 else "validation" if fraction < 0.95 else "test"


def plan_tasks(
    seed: int = 0,
    scale: float = 1.0,
    subsets: Sequence[str] | None = None,
    max_atoms: int | None = None,
    shares: Mapping[str, float] | None = None,
) -> list[Task]:
    """All groups of the data set, in a seeded order in which any first part is representative.

    Args:
        seed: decides the drawn molecules, pairs, splits and the order.
        scale: factor on the number of groups of each subset (for water: on the starts).
        subsets: names out of `SUBSETS`; all when None.
        max_atoms: leave out structures with more atoms.
        shares: a further factor for single subsets, by name; 0 leaves one out.

    Raises:
        ConfigError: one of them is not allowed.
        DataError: no group is left.
    """
    shares = shares or {}
    _check_options(seed, scale, subsets, max_atoms, shares)
    by_subset: dict[str, list[Task]] = {name: [] for name in SUBSETS}
    for task in _Planner(seed, scale, shares).all_tasks():
        if max_atoms is None or task.num_atoms <= max_atoms:
            by_subset[task.subset].append(task)
    chosen: list[Task] = []
    for name in dict.fromkeys(subsets or SUBSETS):
        tasks = by_subset[name]
        factor = scale * shares.get(name, 1.0)
        keep = max(factor > 0, round(factor * len(tasks)))
        if factor and name in ("Isolated atoms", "Water clusters"):
            keep = len(tasks)  # of waters the starts are fewer
        chosen += _shuffle(tasks, make_generator(seed, "order", name))[:keep]
    if not chosen:
        raise DataError(
            f"nothing to make: no structure of {', '.join(subsets or SUBSETS)} has at most "
            f"{max_atoms} atoms; raise max_atoms or choose other subsets"
        )
    return _shuffle(chosen, make_generator(seed, "order"))


def _shuffle(tasks: list[Task], rng: np.random.Generator) -> list[Task]:
    return [tasks[i] for i in rng.permutation(len(tasks))]


def _check_options(
    seed: int,
    scale: float,
    subsets: Sequence[str] | None,
    max_atoms: int | None,
    shares: Mapping[str, float],
) -> None:
    if not 0 < scale < math.inf:
        raise ConfigError(f"scale must be a finite number larger than 0, received {scale}")
    # HDF5 keeps both as attributes
    if not (isinstance(seed, int) and 0 <= seed < 2**63):
        raise ConfigError(f"seed must be a whole number from 0 to 2^63 - 1, received {seed}")
    if max_atoms is not None and not (isinstance(max_atoms, int) and 1 <= max_atoms < 2**63):
        raise ConfigError(f"max_atoms must be a whole number of at least 1, received {max_atoms}")
    for name, share in shares.items():
        if not 0 <= share < math.inf:
            raise ConfigError(f"the share of {name!r} must be a number of at least 0, not {share}")
    unknown = sorted({*(subsets or ()), *shares} - set(SUBSETS))
    if unknown:
        raise ConfigError(f"unknown subsets {unknown}; choose from {', '.join(SUBSETS)}")


@dataclass
class _Planner:
    """Draws the tasks of all subsets; remembers which names and molecules there are already."""

    seed: int
    scale: float
    shares: Mapping[str, float]
    names: set[str] = field(default_factory=set)
    molecules: set[str] = field(default_factory=set)

    def all_tasks(self) -> list[Task]:
        small = self.singles("Small organics", molecules.small_organics())
        drugs = self.singles("Drug-like molecules", molecules.drug_like())
        drawn = molecules.decorated(self.at_least(420), make_generator(self.seed, "decorated"))
        decorated = self.singles("Decorated molecules", filter(is_supported, drawn))
        capped = [molecules.capped_peptide(letter) for letter in molecules.RESIDUES]
        peptides = self.singles("Dipeptides", [*capped, *self.dipeptides()])
        return [
            *small,
            *drugs,
            *decorated,
            *peptides,
            *self.dimers(small),
            *self.water_clusters(),
            *self.solvated(small, capped),
            *self.charged(),
            *self.singles("Small organics", molecules.unusual()),
            *self.pressed(small),
            *self.atoms(),
            *self.dissociations(small),
            *self.separations(small),
        ]

    def at_least(self, count: int) -> int:
        """What a scale above 1 asks for; below, all are drawn and a part of them is kept."""
        return round(count * max(1.0, self.scale))

    def new_name(self, name: str) -> str:
        """A group name that HDF5 allows (no '/', as in SPICE) and that is not taken."""
        name = unique = name.replace("/", "")
        number = 2
        while unique in self.names:
            unique, number = f"{name} ({number})", number + 1
        self.names.add(unique)
        return unique

    def task(
        self, name: str, subset: str, kind: str, smiles: tuple[str, ...], num_waters: int = 0
    ) -> Task:
        split = assign_split(smiles, self.seed)
        return Task(self.new_name(name), subset, kind, smiles, split, num_waters)

    def singles(self, subset: str, smiles: Iterable[str]) -> list[Task]:
        new = [s for s in dict.fromkeys(map(canonicalize, smiles)) if s not in self.molecules]
        self.molecules.update(new)
        return [self.task(one, subset, "molecule", (one,)) for one in new]

    def complexes(self, subset: str, pairs: Iterable[tuple[str, ...]]) -> list[Task]:
        return [self.task(".".join(pair), subset, "complex", pair) for pair in pairs]

    def dipeptides(self) -> list[str]:
        letters = list(molecules.RESIDUES)
        pairs = [first + second for first in letters for second in letters]
        order = make_generator(self.seed, "dipeptides").permutation(len(pairs))
        return [molecules.capped_peptide(pairs[i]) for i in order[: self.at_least(50)]]

    def draw_pairs(
        self,
        monomers: list[Task],
        count: int,
        max_atoms: int,
        rng: np.random.Generator,
        pairs: dict[tuple[str, ...], None],
    ) -> dict[tuple[str, ...], None]:
        """Add random pairs that never mix validation with test."""
        sizes = [t.num_atoms for t in monomers]
        target = len(pairs) + count
        for _ in range(100 * target):
            if len(pairs) >= target:
                break
            first, second = rng.integers(len(monomers), size=2)
            held_out = {monomers[first].split, monomers[second].split} - {"train"}
            if len(held_out) < 2 and sizes[first] + sizes[second] <= max_atoms:
                pairs[(monomers[first].smiles[0], monomers[second].smiles[0])] = None
        return pairs

    def dimers(self, small: list[Task]) -> list[Task]:
        """Water with every small molecule, and random pairs."""
        monomers = [t for t in small if t.num_atoms <= 15]
        waters = [(t.smiles[0], molecules.WATER) for t in monomers if t.num_atoms <= 13]
        rng = make_generator(self.seed, "dimers")
        pairs = self.draw_pairs(monomers, self.at_least(500), 26, rng, dict.fromkeys(waters))
        return self.complexes("Dimers", pairs)

    def water_clusters(self) -> list[Task]:
        tasks = []
        scale = self.scale * self.shares.get("Water clusters", 1.0)
        for count in range(2, 31):
            starts = 12 if count <= 6 else 4 if count < 20 else 6
            starts = max(1, round(starts * scale))
            split = _hash_split(f"{count} waters", self.seed)
            name = self.new_name(f"{count} waters")
            tasks.append(Task(name, "Water clusters", "water", (), split, count, starts))
        return tasks

    def solvated(self, small: list[Task], peptides: list[str]) -> list[Task]:
        rng = make_generator(self.seed, "solvated")
        solutes = [t.smiles[0] for t in small if 5 <= t.num_atoms <= 16]
        chosen = [solutes[i] for i in rng.permutation(len(solutes))[:90]]
        drawn = [("Solvated molecules", s, int(rng.integers(2, 9))) for s in chosen]
        drawn += [("Solvated amino acids", canonicalize(s), 20) for s in peptides]
        return [
            self.task(f"{smiles} in {count} waters", subset, "solvated", (smiles,), count)
            for subset, smiles, count in drawn
        ]

    def pressed(self, small: list[Task]) -> list[Task]:
        """Clusters of waters, of copies of a small molecule, and of small molecules in water."""
        rng = make_generator(self.seed, "pressed")
        liquids = [t.smiles[0] for t in small if 2 < t.num_atoms <= 10]
        chosen = [liquids[i] for i in rng.permutation(len(liquids))[:120]]
        drawn: list[tuple[tuple[str, ...], int]] = [((), 3 + index % 15) for index in range(90)]
        drawn += [((smiles,) * int(rng.integers(2, 5)), 0) for smiles in chosen[:60]]
        drawn += [((smiles,), int(rng.integers(2, 9))) for smiles in chosen[60:]]
        tasks = []
        for smiles, count in drawn:
            name = ".".join([*smiles, *[f"{count} waters"] * (count > 0)]) + " pressed"
            split = assign_split(smiles, self.seed) if smiles else _hash_split(name, self.seed)
            name = self.new_name(name)
            tasks.append(Task(name, "Pressed clusters", "pressed", smiles, split, count))
        return tasks

    def charged(self) -> list[Task]:
        def parts(texts: Iterable[str]) -> list[tuple[str, ...]]:
            return [tuple(map(canonicalize, s.split("."))) for s in texts if "." in s]

        return [
            *self.singles("Ions", [s for s in molecules.ions() if "." not in s]),
            *self.complexes("Ions", parts(molecules.ions())),
            *self.complexes("Salt bridges", parts(molecules.salt_bridges())),
        ]

    def atoms(self) -> list[Task]:
        """Each element alone and with each other one; building blocks, so all for training."""
        names = [f"[{symbol(z)}]" for z in ELEMENTS]
        pairs = itertools.combinations_with_replacement(names, 2)
        return [
            *[self.task(one, "Isolated atoms", "atoms", (one,)) for one in names],
            *[self.task(".".join(pair), "Atom pairs", "atoms", pair) for pair in pairs],
        ]

    def dissociations(self, small: list[Task]) -> list[Task]:
        others = map(canonicalize, [*molecules.unusual(), *molecules.radicals()])
        return [
            self.task(f"{smiles} apart", "Dissociation", "dissociation", (smiles,))
            for smiles in dict.fromkeys([*(t.smiles[0] for t in small), *others])
            if 2 < count_atoms(smiles)[0] <= 20
        ]

    def separations(self, small: list[Task]) -> list[Task]:
        monomers = [t for t in small if t.num_atoms <= 10]
        rng = make_generator(self.seed, "separations")
        pairs = self.draw_pairs(monomers, self.at_least(300), 18, rng, {})
        return [
            self.task(f"{'.'.join(pair)} apart", "Separated pairs", "separation", pair)
            for pair in pairs
        ]
