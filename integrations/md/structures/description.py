"""What a structure is: atoms, and everything else that its file states."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import string
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from ase import Atoms

from mlip_md.errors import StructureError
from mlip_md.integrations.charges import Stated, check_stated

OWN_MASS = 1e-2
"""u; a mass further from the element's standard one is the file's own."""


class AtomLabel(NamedTuple):
    """Where an atom stands in a molecule: what PDB, mmCIF and GRO files say beside coordinates."""

    name: str
    residue_name: str
    residue_id: str
    insertion_code: str = ""
    chain: str = ""
    segment: int = 0
    """Counts chains, also those of one name (after TER)."""

    @property
    def residue(self) -> tuple[int, str, str, str]:
        """What atoms of one residue, which follow one another, have in common."""
        return self.segment, self.residue_id, self.insertion_code, self.residue_name

    def __str__(self) -> str:
        place = f"{self.residue_name} {self.chain} {self.residue_id}{self.insertion_code}"
        return f"{self.name} of {' '.join(place.split())}"


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of a file.

    Attributes:
        file: its name, or that of the bundled molecule.
        format: in which it was read.
        frame: index of the frame that was read, and number of frames, if there are several.
        atoms_in_file: number of atoms and other sites of that frame, with what was left out.
        left_out: what the file states and the structure does not have, and why.
        notes: what the user should know.
    """

    file: str = ""
    format: str = ""
    frame: tuple[int, int] | None = None
    atoms_in_file: int | None = None
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Structure:
    """A structure and where it comes from.

    Attributes:
        name: short name, used for the run's folder.
        atoms: elements, positions (Å), masses (u; isotopes and the file's own), cell, periodicity,
            constraints, momenta (zero if the file has no velocities); a total charge or spin in
            ``info``; no labels and no calculator.
        topology: OpenMM topology when the file had residues and chains, with its names and its
            formal charges, else None.
        labels: name, residue and chain of every atom, or None.
        bonds: (n, 2) bonds that the file states or the names of its residues imply, i < j, or None.
        formal_charges: (n,) elementary charges, where the file states them for atoms, or None.
        occupancies: (n,) shares of each site, where the file states them, or None.
        stated: total charge and spin, as stated anywhere in the file.
        report: what was read and what was left out.
    """

    name: str
    atoms: Atoms
    topology: Any = None
    labels: tuple[AtomLabel, ...] | None = None
    bonds: np.ndarray | None = None
    formal_charges: np.ndarray | None = None
    occupancies: np.ndarray | None = None
    stated: tuple[Stated, ...] = ()
    report: Report = Report()

    @property
    def residues(self) -> list[str]:
        """Names of the residues in order; empty if the file has none."""
        labels = self.labels or ()
        return [
            label.residue_name
            for before, label in zip((None, *labels), labels, strict=False)
            if before is None or before.residue != label.residue
        ]

    @property
    def velocities(self) -> np.ndarray | None:
        """Velocities (n, 3) in ASE's unit that the file states, or None."""
        return self.atoms.get_velocities() if self.atoms.get_momenta().any() else None

    @property
    def own_masses(self) -> np.ndarray:
        """Whether each atom (n,) has another mass than its element's standard one."""
        return np.abs(self.atoms.get_masses() - Atoms(self.atoms.numbers).get_masses()) > OWN_MASS

    @property
    def fixed(self) -> np.ndarray:
        """Which coordinates (n, 3) constraints hold, by Cartesian axis.

        Raises:
            StructureError: if a constraint is not of single Cartesian coordinates.
        """
        return fixed_axes(self.atoms)

    def check_charge(self) -> list[str]:
        """Refuse a charge or spin that models of neutral singlets would ignore.

        Returns:
            Warnings, each a sentence: a macromolecule with charged residues is not refused.

        Raises:
            StructureError: if a small molecule is said to be charged, or anything to have a spin.
        """
        return check_stated(self.stated, self.residues)

    def as_dict(self) -> dict[str, Any]:
        """What was read and what was left out, in plain values for JSON files."""
        atoms, report = self.atoms, self.report
        residues = self.residues
        return {
            "file": report.file,
            "format": report.format,
            "frame": None if report.frame is None else report.frame[0],
            "frames": 1 if report.frame is None else report.frame[1],
            "atoms": len(atoms),
            "atoms_in_file": report.atoms_in_file,
            "formula": atoms.get_chemical_formula(),
            "residues": len(residues) or None,
            "chains": len({label.segment for label in self.labels}) if self.labels else None,
            "periodic": atoms.pbc.tolist(),
            "cell": atoms.cell.array.tolist() if atoms.cell.rank else None,
            "own_masses": int(self.own_masses.sum()),
            "velocities": self.velocities is not None,
            "constraints": [str(one.todict()["name"]) for one in atoms.constraints],
            "constrained_atoms": len(_constrained(atoms)),
            "bonds": None if self.bonds is None else len(self.bonds),
            "formal_charges": _count(self.formal_charges, 0),
            "partly_occupied": _count(self.occupancies, 1),
            "stated": {one.where: str(one.value) for one in self.stated},
            "left_out": list(report.left_out),
            "notes": list(report.notes),
        }

    def line(self) -> str:
        """What was read and what was left out, in one line for the start of a run."""
        facts = self.as_dict()
        parts = [f"{_some(facts['atoms'], 'atom')} ({facts['formula']})"]
        if self.report.frame is not None:
            parts.append(f"frame {facts['frame']} of {facts['frames']} (counted from 0)")
        if facts["residues"]:
            parts.append(
                f"{_some(facts['residues'], 'residue')} in {_some(facts['chains'], 'chain')}"
            )
        if self.atoms.pbc.any() and self.atoms.cell.rank:
            lengths = " x ".join(f"{length:.4g}" for length in self.atoms.cell.lengths())
            parts.append(f"cell {lengths} Å")
        for key, text in (
            ("own_masses", "own masses of {}"),
            ("constrained_atoms", "constraints on {}"),
        ):
            if facts[key]:
                parts.append(text.format(_some(facts[key], "atom")))
        parts += ["velocities"] if facts["velocities"] else []
        line = f"{self.report.file or self.name}: {', '.join(parts)}"
        if self.report.left_out:
            line += f"; left out: {'; '.join(self.report.left_out)}"
        return line


def _count(values: np.ndarray | None, usual: float) -> int:
    """How many of some values are not the usual one."""
    return 0 if values is None else int(np.sum(values != usual))


def _some(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _constrained(atoms: Atoms) -> set[int]:
    """Atoms that any constraint names; all, for constraints without a list of atoms."""
    found: set[int] = set()
    for one in atoms.constraints:
        indices = one.get_indices() if hasattr(one, "get_indices") else range(len(atoms))
        found.update(int(i) for i in np.ravel(indices))
    return found


def fixed_axes(atoms: Atoms) -> np.ndarray:
    """Which coordinates (n, 3) the constraints of a structure hold, by Cartesian axis.

    Args:
        atoms: with constraints of single atoms: FixAtoms, FixCartesian, and along the axes x, y, z
            FixScaled (selective dynamics), FixedLine and FixedPlane.

    Raises:
        StructureError: on any other constraint, or one along another direction.
    """
    fixed = np.zeros((len(atoms), 3), bool)
    for one in atoms.constraints:
        fixed[np.ravel(one.get_indices())] |= _axes(one, atoms)
    return fixed


def _axes(constraint: Any, atoms: Atoms) -> np.ndarray:
    """Axes (3,) that a constraint of atoms holds."""
    kind = constraint.todict()["name"]
    if kind == "FixAtoms":
        return np.ones(3, bool)
    if kind == "FixCartesian":
        return np.asarray(constraint.mask, bool)
    if kind in ("FixedLine", "FixedPlane"):
        along = np.abs(np.asarray(constraint.dir, float)) > 1e-9
        if along.sum() == 1:
            return ~along if kind == "FixedLine" else along
    if kind == "FixScaled" and _axes_of_cell(atoms) is not None:
        return np.asarray(constraint.mask, bool)[_axes_of_cell(atoms)]
    raise StructureError(
        f"a {kind} constraint holds no single Cartesian coordinates, which is all that can be held "
        "beside whole atoms; remove it, or fix the atoms"
    )


def _axes_of_cell(atoms: Atoms) -> np.ndarray | None:
    """Cell vector (3,) that lies along each Cartesian axis, or None if they do not."""
    along = np.abs(atoms.cell.array) > 1e-6 * np.abs(atoms.cell.array).max(initial=1e-12)
    if not (along.sum(0) == 1).all() or not (along.sum(1) == 1).all():
        return None
    return np.argmax(along, axis=0)


@dataclasses.dataclass
class Content:
    """One frame of a file as its reader found it.

    Attributes:
        atoms: as in ``Structure``; sites without nucleus have the number 0.
        count: atoms and other sites that the file announces or lists for this frame.
        labels, bonds, formal_charges, occupancies, stated: as in ``Structure``.
        left_out: as in ``Report``.
        notes: as in ``Report``.
    """

    atoms: Atoms
    count: int
    labels: list[AtomLabel] | None = None
    bonds: np.ndarray | None = None
    formal_charges: np.ndarray | None = None
    occupancies: np.ndarray | None = None
    stated: list[Stated] = dataclasses.field(default_factory=list)
    left_out: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def label(self, index: int) -> str:
        """An atom for messages: its number, and where it stands."""
        where = f" ({self.labels[index]})" if self.labels else ""
        return f"atom {index + 1}{where}"

    def keep(self, wanted: Sequence[bool] | np.ndarray) -> None:
        """Remove the atoms that are not wanted (n,)."""
        mask = np.asarray(wanted, bool)
        if self.bonds is not None:
            new = np.cumsum(mask) - 1
            self.bonds = new[self.bonds[mask[self.bonds].all(axis=1)]]
        self.atoms = self.atoms[mask]
        if self.labels is not None:
            self.labels = [label for label, there in zip(self.labels, mask, strict=True) if there]
        for name in ("formal_charges", "occupancies"):
            values = getattr(self, name)
            setattr(self, name, None if values is None else values[mask])


def make_atoms(symbols: Sequence[str], positions: Any, **keywords: Any) -> Atoms:
    """ASE's ``Atoms`` of symbols among which D and T are isotopes of hydrogen.

    Args:
        symbols: of elements, "D", "T", or "X" for sites without nucleus.
        positions: (n, 3) Å.
        keywords: further ones of ``Atoms``.
    """
    from mlip_md.integrations.residue_names import ISOTOPE_MASSES

    plain = ["H" if symbol in ISOTOPE_MASSES else symbol for symbol in symbols]
    atoms = Atoms(plain, np.asarray(positions, float).reshape(-1, 3), **keywords)
    set_masses(atoms, {i: ISOTOPE_MASSES[s] for i, s in enumerate(symbols) if s in ISOTOPE_MASSES})
    return atoms


def is_isotope(atoms: Atoms, symbol: str) -> np.ndarray:
    """Whether each atom (n,) is hydrogen with the mass of "D" or "T"."""
    from mlip_md.integrations.residue_names import ISOTOPE_MASSES

    # Other masses near it are hydrogen made heavier, which no isotope's name may tell.
    return (atoms.numbers == 1) & (np.abs(atoms.get_masses() - ISOTOPE_MASSES[symbol]) < 2e-3)


def distinct_names(labels: Sequence[AtomLabel]) -> list[AtomLabel]:
    """Labels whose names differ within each residue in the four letters that PDB files have.

    Of atoms with one name in one residue most readers keep the first only. Names that differ stay;
    the others get numbers, in base 36 where there are too many.
    """
    found, start = [], 0
    for end in range(1, len(labels) + 1):
        if end == len(labels) or labels[end].residue != labels[start].residue:
            found += _number_names(labels[start:end])
            start = end
    return found


def _number_names(labels: Sequence[AtomLabel]) -> list[AtomLabel]:
    """``distinct_names`` of one residue."""
    times = collections.Counter(label.name[:4] for label in labels)
    if max(times.values()) == 1:
        return list(labels)
    taken = {name for name, count in times.items() if count == 1}
    stems = {name: name.rstrip("0123456789") or name for name in times}
    tags = {stem: _tags() for stem in stems.values()}
    found = []
    for label in labels:
        short = label.name[:4]
        if times[short] > 1:
            stem = stems[short]
            new = (stem[: 4 - len(tag)] + tag for tag in tags[stem])
            name = next((name for name in new if name not in taken), label.name)
            taken.add(name)
            label = label._replace(name=name)
        found.append(label)
    return found


def _tags() -> Iterator[str]:
    """1, 2 ... 999, and then three letters and digits, a letter first."""
    yield from map(str, range(1, 1000))
    digits = string.digits + string.ascii_uppercase
    yield from map("".join, itertools.product(string.ascii_uppercase, digits, digits))


def set_masses(atoms: Atoms, masses: dict[int, float]) -> None:
    """Give some atoms, by index, their own masses (u)."""
    if masses:
        values = atoms.get_masses()
        values[list(masses)] = list(masses.values())
        atoms.set_masses(values)
