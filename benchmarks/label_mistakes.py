"""Classic mistakes made with the labels of right data sets: which are named, which sets accused.

    python benchmarks/label_mistakes.py FILE_OR_FOLDER ... [--most 2000]

Each data set is judged as it is, and with each of 15 mistakes made on purpose. A mistake counts as
named if the judgement has the words for it, alone or as one of at most three likely causes. The
table, in Markdown, says for each set how many frames it has, whether it is accused as it is, and
which mistakes are not named. For the sets of ``docs/data.md`` it takes some minutes.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator

from mlip_md.constants import BOHR, HARTREE, KJ_PER_KCAL, KJ_PER_MOL_PER_EV
from mlip_md.trainer.data import IsolatedAtoms, LabeledStructure, iterate
from mlip_md.trainer.data.judgement import judge
from mlip_md.trainer.data.sources import find_files

Frames = list[LabeledStructure]
KCAL = KJ_PER_MOL_PER_EV / KJ_PER_KCAL


def scaled(positions: float = 1.0, energy: float = 1.0, forces: float = 1.0) -> Callable:
    """Other units."""

    def change(frames: Frames) -> Frames:
        return [
            dataclasses.replace(
                f,
                positions=f.positions * positions,
                cell=None if f.cell is None else f.cell * positions,
                energy=f.energy * energy,
                forces=f.forces * forces,
            )
            for f in frames
        ]

    return change


def with_energies(energy: Callable[[LabeledStructure, int, int], float]) -> Callable:
    """Other energies: of a frame, its number and how many there are."""

    def change(frames: Frames) -> Frames:
        count = len(frames)
        return [dataclasses.replace(f, energy=energy(f, k, count)) for k, f in enumerate(frames)]

    return change


def with_forces_of_the_next(frames: Frames) -> Frames:
    """Each frame has the forces of the next one of the same atoms."""
    groups: dict[bytes, list[int]] = {}
    for k, frame in enumerate(frames):
        groups.setdefault(frame.atomic_numbers.tobytes(), []).append(k)
    changed = list(frames)
    for members in groups.values():
        for one, other in zip(members, [*members[1:], members[0]], strict=True):
            changed[one] = dataclasses.replace(frames[one], forces=frames[other].forces)
    return changed


ATOMIC = scaled(energy=1 / HARTREE, forces=BOHR / HARTREE)
MISTAKES = {
    "all in hartree": (ATOMIC, "energies in hartree and forces in hartree/bohr"),
    "all in kcal/mol": (scaled(1, KCAL, KCAL), "energies in kcal/mol and forces in kcal/mol/Å"),
    "all in kJ/mol": (
        scaled(1, KJ_PER_MOL_PER_EV, KJ_PER_MOL_PER_EV),
        "energies in kJ/mol and forces in kJ/mol/Å",
    ),
    "forces with flipped sign": (scaled(forces=-1.0), "gradients with the sign of the energy"),
    "positions in bohr": (scaled(positions=1 / BOHR), "positions in bohr"),
    "positions in nm": (scaled(positions=0.1), "positions in nm"),
    "positions in pm": (scaled(positions=100.0), "positions in pm"),
    "forces in hartree/bohr": (scaled(forces=BOHR / HARTREE), "forces in hartree/bohr"),
    "energies in hartree": (scaled(energy=1 / HARTREE), "energies in hartree"),
    "forces of zero": (scaled(forces=0.0), "exactly zero"),
    "one energy for all": (with_energies(lambda *_: 0.0), "have one energy"),
    "energies per atom": (with_energies(lambda f, *_: f.energy / len(f)), "per atom"),
    "one energy 50 eV off": (
        with_energies(lambda f, k, _: f.energy + 50.0 * (k == 7)), "lie far from",
    ),
    "forces of the next frame": (with_forces_of_the_next, "do not belong to these positions"),
    "two methods 10 eV apart": (
        with_energies(lambda f, k, n: f.energy + 10.0 * (k < n // 2)), "two clouds",
    ),
}  # fmt: skip


def read(path: str, most: int) -> Frames:
    """Frames of a file or folder, without isolated atoms."""
    files = (iterate(file, on_bad="skip") for file in find_files(path))
    frames: Iterator[LabeledStructure] = itertools.chain.from_iterable(files)
    return list(itertools.islice(IsolatedAtoms().part_from(frames, 5.0), most))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--most", type=int, default=2000, help="frames of each set")
    options = parser.parse_args()
    named = made = 0
    print("| data set | frames | accused | mistakes named | not named |\n|---|---|---|---|---|")
    for path in options.paths:
        frames = read(path, options.most)
        accused = "; ".join(finding.cause for finding in judge(frames)) or "no"
        missed = []
        for mistake, (change, words) in MISTAKES.items():
            said = " ".join(finding.text for finding in judge(change(frames)))
            missed += [] if words in said else [mistake]
        name = "/".join(path.rstrip("/").split("/")[-2:])
        found = len(MISTAKES) - len(missed)
        print(f"| {name} | {len(frames)} | {accused} | {found} of {len(MISTAKES)} | "
              f"{'; '.join(missed) or '-'} |", flush=True)  # fmt: skip
        named, made = named + found, made + len(MISTAKES)
    print(f"\n{named} of {made} mistakes are named.")


if __name__ == "__main__":
    main()
