"""A judgement of labels: what most likely went wrong with them, found by physics before training.

Three numbers hold for nearly all matter, whatever the method that made the labels, and each depends
on the units in another way:

* d: distances of nearest atoms over sums of covalent radii, 1 within 15 %;
* k: stiffness of bonds to hydrogen, about 33 eV/Å² (force along a bond against its length; C-H, N-H
  and O-H have 30 to 50 in every text on infrared spectra). Its sign is that of the forces, and its
  correlation falls to zero where forces belong to other positions;
* s: change of the energy between two close frames over the work of the forces, ΔE against
  -½(F₁+F₂)·Δr, 1 as far as the path is short. Without close frames, the spread of energies against
  that of a harmonic system with these forces stands for it, more coarsely.

Everything works on a seeded sample of whole runs of neighboring frames, taken before any filter.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np
from ase.data import covalent_radii

from mlip_md.constants import BOHR, HARTREE, KJ_PER_KCAL, KJ_PER_MOL_PER_EV
from mlip_md.trainer.data.measurements import (
    DISTANCES,
    Bonds,
    Groups,
    Pairs,
    group_by_atoms,
    measure_bonds,
    measure_pairs,
    nearest,
)
from mlip_md.trainer.data.structures import LabeledStructure

BLOCK, BLOCK_ATOMS, MAX_BLOCKS = 100, 10_000, 200
"""Neighboring frames that are sampled together, or as many as have so many atoms; most blocks."""
STIFFNESS = 33.0
"""eV/Å²; bonds to hydrogen of H2, CH, NH, OH have 25 to 50 (vibrations of 2900-4400 cm⁻¹)."""
FOREIGN = 0.5
"""Bonds to hydrogen explain at least nine tenths of the force along them; less than a quarter
(correlation below this) means forces of other positions."""
ODD_STIFFNESS, ODD_SLOPE, ODD_SPREAD = 1.6, 1.5, 6.0
"""Factors from the expected value beyond which k, s, and s from the spread, are odd. The nearest
wrong unit is a factor of 1.9 (bohr for Å) away for k and s, 23 (kcal/mol) for energies alone."""
OUTLIER, STRONG_BOND, SOFT = 15.0, 10.0, 10.0
"""Robust z of an outlier; eV that a broken bond may cost; eV/Å², softest stiffness of strain that
large forces may stand for."""
HIDDEN = 5
"""Frames that a cloud of energies has at least."""
ENERGIES = {
    "eV": 1.0,
    "hartree": 1 / HARTREE,
    "rydberg": 2 / HARTREE,
    "kcal/mol": KJ_PER_MOL_PER_EV / KJ_PER_KCAL,
    "kJ/mol": KJ_PER_MOL_PER_EV,
    "meV": 1000.0,
}
FORCES = {
    f"{energy}/{length}": factor * scale
    for energy, factor in ENERGIES.items()
    for length, scale in (("Å", 1.0), ("bohr", BOHR), ("nm", 10.0))
    if (energy, length) != ("meV", "nm")
}


ZERO, CONSTANT = "zero forces", "constant energy"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something wrong with labels.

    Attributes:
        cause: in a word or two, of a fixed list (``docs/data.md``).
        text: a sentence: what was measured, what is usual, the likely cause.
    """

    cause: str
    text: str


class Sample:
    """Runs of neighboring frames, a seeded choice of all that pass by.

    Args:
        seed: of the choice.
    """

    def __init__(self, seed: int = 0) -> None:
        self._random = np.random.default_rng(seed)
        self._blocks: list[list[LabeledStructure]] = []
        self._number = self._frames = self._atoms = 0
        self._current: list[LabeledStructure] | None = None

    def watch(self, structures: Iterable[LabeledStructure]) -> Iterator[LabeledStructure]:
        """Yield the structures, and keep some of them."""
        for structure in structures:
            if self._frames % BLOCK == 0 or self._atoms >= BLOCK_ATOMS:
                self._current, self._frames, self._atoms = self._place(), 0, 0
            self._frames += 1
            self._atoms += len(structure)
            if self._current is not None:
                self._current.append(structure)
            yield structure

    def _place(self) -> list[LabeledStructure] | None:
        """Where the next block goes (reservoir sampling), or None."""
        number, block = self._number, list[LabeledStructure]()
        self._number += 1
        if number < MAX_BLOCKS:
            self._blocks.append(block)
            return block
        place = int(self._random.integers(number + 1))
        if place >= MAX_BLOCKS:
            return None
        self._blocks[place] = block
        return block

    def frames(self) -> list[LabeledStructure]:
        """What was kept."""
        return [frame for block in self._blocks for frame in block]


def judge(frames: Sequence[LabeledStructure], seed: int = 0) -> list[Finding]:
    """What is most likely wrong with labels; nothing for right ones.

    Args:
        frames: of a data set, see ``Sample``; isolated atoms are no frames.
        seed: of the choice of pairs.

    Returns:
        Findings, the most basic first: what a later one would only repeat is left out.
    """
    frames = [frame for frame in frames if len(frame) > 1 and frame.has_forces]
    if not frames:
        return []
    groups = group_by_atoms(frames)
    found = [f for f in (find_zero_forces(frames), find_constant_energy(groups)) if f]
    bonds = measure_bonds(frames, seed)
    pairs = measure_pairs(groups, bonds.length_factor, seed)
    if not any(finding.cause == CONSTANT for finding in found) and bonds.length_unit == "Å":
        found += judge_energies(groups, pairs)
    return found + judge_units(bonds, pairs, groups, {finding.cause for finding in found})


def describe_findings(findings: Iterable[Finding]) -> str:
    """Findings as one text."""
    return " ".join(f"Labels: {finding.text}" for finding in findings)


# Labels that are no labels


def find_zero_forces(frames: Sequence[LabeledStructure]) -> Finding | None:
    """Molecules whose forces are all exactly zero, which no computation gives.

    Atoms that are all apart have none, and in a crystal they may cancel.
    """
    molecules = [frame for frame in frames if frame.cell is None and not frame.forces.any()]
    zero = [frame for frame in molecules if nearest(frame).ratios.min() < DISTANCES[1]]
    energies = {frame.energy for frame in frames if frame.cell is not None}
    if len(energies) > 1 and not any(f.forces.any() for f in frames if len(f) > 4):
        zero += [frame for frame in frames if frame.cell is not None and len(frame) > 4]
    if not zero:
        return None
    return Finding(
        ZERO,
        f"all forces of {len(zero)} of {len(frames)} frames are exactly zero, e.g. of "
        f"{zero[0].name}: were they computed?",
    )


def find_constant_energy(groups: Groups) -> Finding | None:
    """Different positions with one energy."""
    groups = [group for group in groups if len(group) > 2]
    flat = [group for group in groups if len({frame.energy for frame in group}) == 1]
    if not flat or 2 * sum(map(len, flat)) < sum(map(len, groups)):
        return None
    return Finding(
        CONSTANT,
        f"{len(flat[0])} frames of the same atoms at different positions have one energy, "
        f"{flat[0][0].energy:g} eV, e.g. {flat[0][0].name}: is it that of these positions?",
    )


# Energies


def judge_energies(groups: Groups, pairs: Pairs) -> list[Finding]:
    """Two methods in one set, or single frames whose energy is none of theirs."""
    clouds = _clouds_in_pairs(pairs) or _clouds_in_groups(groups) or _clouds_of_atoms(groups)
    if clouds:
        text = (
            f"the energies fall into two clouds about {clouds:.3g} eV apart that nothing in the "
            "positions explains: two levels of theory, programs or E0 in one set?"
        )
        return [Finding("two levels of theory", text)]
    far = find_outliers(groups)
    if not far:
        return []
    worst = ", ".join(f"{frame.name} ({gap:+.4g} eV)" for gap, frame in far[:3])
    text = (
        f"the energies of {len(far)} frames lie far from those of the same atoms in similar "
        f"positions: {worst}"
    )
    return [Finding("outliers", text)]


def _clouds_in_pairs(pairs: Pairs) -> float:
    """Distance (eV) of two clouds between which close frames jump; 0 without."""
    close = pairs.close
    left = np.sort(np.abs(close.energies - close.works))
    at = _widest_gap(left)
    if not at:
        return 0.0
    low, high = left[:at], left[at:]
    narrow = float(np.subtract(*np.percentile(high, (90, 10)))) < 0.5 * float(np.median(high))
    apart = high[0] > 2 * low[-1] and high[0] - low[-1] > 5 * np.median(low)
    return float(np.median(high)) if narrow and apart else 0.0


def _widest_gap(values: np.ndarray) -> int:
    """Where the widest gap of sorted values ends that leaves some on both sides; 0 for too few."""
    least = max(HIDDEN, math.ceil(0.05 * len(values)))
    if len(values) < max(4 * HIDDEN, 2 * least + 1):
        return 0
    return least + int(np.diff(values[least - 1 : len(values) - least + 1]).argmax())


def _clouds_in_groups(groups: Groups) -> float:
    """Distance (eV) of two clouds of energies of the same atoms; 0 without.

    What hot frames have more than cold ones is taken off first, in proportion to their forces.
    """
    groups = [group for group in groups if len(group) >= 4 * HIDDEN]
    holes, weight = [], 0
    for group in groups:
        energies = np.array([frame.energy for frame in group])
        energies -= np.median(energies)
        heat = np.array([float((frame.forces**2).sum()) for frame in group])
        terms = np.stack([np.ones(len(group)), heat], axis=1)
        energies -= terms @ np.linalg.lstsq(terms, energies, rcond=None)[0]
        energies.sort()
        at = _widest_gap(energies)
        low, high = energies[:at], energies[at:]
        if at and high[0] - low[-1] > 2 * max(low.std(), high.std()):
            holes.append(float(np.median(high) - np.median(low)))
            weight += len(group)
    enough = 5 * weight >= sum(map(len, groups)) > 0
    return float(np.median(holes)) if enough else 0.0


def _counts(frames: Sequence[LabeledStructure]) -> np.ndarray:
    """(n, S + 1) atoms of each element, and the charge."""
    elements = np.unique(np.concatenate([frame.atomic_numbers for frame in frames]))
    rows = [[*(frame.atomic_numbers[:, None] == elements).sum(0), frame.charge] for frame in frames]
    return np.array(rows, float)


def _clouds_of_atoms(groups: Groups) -> float:
    """Distance (eV) of two clouds of energies beyond E0, over molecules; 0 without."""
    if len(groups) < 4 * HIDDEN:
        return 0.0
    counts = _counts([group[0] for group in groups])
    energies = np.array([np.median([frame.energy for frame in group]) for group in groups])
    left = energies - counts @ np.linalg.lstsq(counts, energies, rcond=None)[0]
    upper = left > np.median(left)
    for _ in range(20):
        terms = np.concatenate([counts, upper[:, None]], axis=1)
        solution = np.linalg.lstsq(terms, energies, rcond=None)[0]
        left, shift = energies - counts @ solution[:-1], float(solution[-1])
        if np.array_equal(upper, left > shift / 2):
            break
        upper = left > shift / 2
    low, high = left[~upper], left[upper]
    if min(len(low), len(high)) < max(HIDDEN, 0.05 * len(left)):
        return 0.0
    between = ((left > 0.33 * shift) & (left < 0.67 * shift)).mean()
    spread = max(_spread(low), _spread(high))
    return shift if shift > 5 * spread and between < 0.03 else 0.0


def _spread(values: np.ndarray) -> float:
    """Robust standard deviation, from the median of distances to the median."""
    return 1.4826 * float(np.median(np.abs(values - np.median(values))))


def find_outliers(groups: Groups) -> list[tuple[float, LabeledStructure]]:
    """Frames whose energy (eV beyond the others', the largest first) nothing explains.

    Large forces explain strain, missing and new bonds explain the energy of bonds.
    """
    far = []
    for group in groups:
        if len(group) < 2 * HIDDEN:
            continue
        energies = np.array([frame.energy for frame in group])
        gaps = energies - np.median(energies)
        limit = OUTLIER * _spread(energies)
        usual = group[int(np.abs(gaps).argmin())]
        for k in np.flatnonzero(np.abs(gaps) > limit).tolist():
            strain = float((group[k].forces ** 2).sum()) / (2 * SOFT)
            broken = abs(_count_bonds(group[k]) - _count_bonds(usual))
            if abs(gaps[k]) > limit + strain + STRONG_BOND * broken:
                far.append((float(gaps[k]), group[k]))
    return sorted(far, key=lambda item: -abs(item[0]))


def _count_bonds(frame: LabeledStructure) -> int:
    near = frame.find_edges(1.25 * 2 * float(covalent_radii[frame.atomic_numbers].max()))
    radii = covalent_radii[frame.atomic_numbers]
    return int((near.lengths < 1.25 * (radii[near.senders] + radii[near.receivers])).sum()) // 2


# Units and signs


def judge_units(
    bonds: Bonds, pairs: Pairs, groups: Groups, known: Collection[str]
) -> list[Finding]:
    """Units of positions, energies and forces, signs, labels of other frames.

    Args:
        bonds: measured.
        pairs: measured.
        groups: of frames with the same atoms.
        known: causes found before, which would only be repeated.
    """
    found = _judge_lengths(bonds)
    if ZERO in known:
        return found
    stray = judge_signs(bonds, pairs if not known else Pairs(*[np.zeros(0)] * 4))
    if stray:
        return [*found, *stray]
    slope, width = (math.nan, math.nan) if known else measure_slope(bonds, pairs, groups)
    atoms = float(np.median([len(group[0]) for group in groups for _ in group]))
    return found + _judge_scales(bonds, slope, width, atoms)


def _judge_lengths(bonds: Bonds) -> list[Finding]:
    if bonds.length_unit == "Å":
        return []
    cause = f"positions in {bonds.length_unit or 'no known unit'}"
    text = (
        f"nearest atoms are {bonds.distance:.3g} times the sum of their covalent radii apart, 1 is "
        f"usual: {cause}?"
    )
    return [Finding("units of positions", text)]


def judge_signs(bonds: Bonds, pairs: Pairs) -> list[Finding]:
    """Flipped forces or energies, and labels of other positions."""
    close = pairs.close
    work = _correlation(close) if len(close) >= 30 else math.nan
    spring = bonds.correlation
    if spring > FOREIGN or (math.isnan(spring) and work < -FOREIGN):
        text = (
            f"forces push bonds apart that are too long (correlation {spring:+.2f}, -0.9 is usual)"
            if spring > FOREIGN
            else f"energies rise where forces point (correlation {work:+.2f})"
        )
        return [Finding("sign of forces", f"{text}: gradients with the sign of the energy?")]
    if spring > -FOREIGN or (math.isnan(spring) and abs(work) < FOREIGN / 2):
        text = (
            f"forces do not belong to these positions (correlation with lengths of bonds "
            f"{spring:+.2f}, -0.9 is usual): those of another frame, or of another order of atoms?"
            if not math.isnan(spring)
            else f"energies and forces of close frames have nothing in common (correlation "
            f"{work:+.2f}): labels of other frames?"
        )
        return [Finding("labels of other frames", text)]
    if work < -FOREIGN:
        text = f"energies of close frames rise where forces point (correlation {work:+.2f})"
        return [Finding("sign of energies", f"{text}: energies with the wrong sign?")]
    if abs(work) < FOREIGN / 2:
        text = (
            f"energies of close frames do not follow from their forces (correlation {work:+.2f}): "
            "energies of other frames?"
        )
        return [Finding("labels of other frames", text)]
    return []


def _correlation(pairs: Pairs) -> float:
    """Of energy differences and works, a few extreme ones aside; NaN if one does not vary."""
    inside = np.abs(pairs.energies) < 10 * np.median(np.abs(pairs.energies))
    energies, works = pairs.energies[inside], pairs.works[inside]
    if len(energies) < 2 or not energies.std() or not works.std():
        return math.nan
    return float(np.corrcoef(energies, works)[0, 1])


def measure_slope(bonds: Bonds, pairs: Pairs, groups: Groups) -> tuple[float, float]:
    """Measure s; the factor within which it is known comes second. NaN without a measure.

    From close pairs whose energies follow from their forces; else from the spread of energies of
    the same atoms against 2·√(3N/2)·⟨F²⟩/k, twice that of a harmonic system with these forces.
    """
    close = pairs.close
    if len(close) >= 20 and _correlation(close) > 0.8:
        works = float(np.median(np.abs(close.works)))
        return float(np.median(np.abs(close.energies))) / works, ODD_SLOPE
    ratios = []
    for group in groups:
        if len(group) < 2 * HIDDEN or not bonds.stiffness > 0:
            continue
        mean = float(np.mean([(frame.forces**2).mean() for frame in group]))
        harmonic = math.sqrt(1.5 * len(group[0])) * mean / bonds.stiffness
        energies = np.array([frame.energy for frame in group])
        ratios.append(_spread(energies) / (2 * harmonic + 1e-30))
    return (float(np.median(ratios)), ODD_SPREAD) if ratios else (math.nan, math.nan)


@dataclasses.dataclass(frozen=True)
class _Guess:
    """A pair of units, how well it explains k and s, and its words."""

    cost: float
    words: str


def _judge_scales(bonds: Bonds, slope: float, width: float, atoms: float) -> list[Finding]:
    stiffness, odd = bonds.stiffness / STIFFNESS, []
    if not math.isnan(stiffness) and not _within(stiffness, ODD_STIFFNESS):
        odd.append(
            f"bonds to hydrogen have a stiffness of {bonds.stiffness:.3g} eV/Å², {STIFFNESS:g} is "
            "usual"
        )
    if not math.isnan(slope) and not _within(slope, width):
        odd.append(f"energies change by {slope:.3g} times the work of the forces")
    if not odd:
        return []
    guesses = sorted(_guess(stiffness, slope, width, atoms), key=lambda guess: guess.cost)
    causes = [g.words for g in guesses[:3] if g.cost < guesses[0].cost + 1.0]
    text = f"{' and '.join(odd)}: {', or '.join(causes)}?"
    return [Finding("units of energies and forces", text)]


def _within(value: float, factor: float) -> bool:
    return 1 / factor < value < factor


def _guess(stiffness: float, slope: float, width: float, atoms: float) -> Iterator[_Guess]:
    """All pairs of units with their costs: squared misfits of k and s, one more per oddity."""
    energies = {**ENERGIES, "eV per atom": 1 / atoms}
    for force, f in FORCES.items():
        for energy, e in energies.items():
            same = force.rpartition("/")[0] == energy or energy == "eV per atom"
            oddities = (force != "eV/Å") + (energy != "eV") - 0.5 * (force != "eV/Å" and same)
            cost = float(oddities)
            if not math.isnan(stiffness):
                cost += (math.log(stiffness / f) / math.log(ODD_STIFFNESS)) ** 2
            if not math.isnan(slope):
                cost += (math.log(slope * f / e) / math.log(width) * 1.5) ** 2
            words = [f"energies in {energy}"] if energy != "eV" else []
            words += [f"forces in {force}"] if force != "eV/Å" else []
            yield _Guess(cost, " and ".join(words))
