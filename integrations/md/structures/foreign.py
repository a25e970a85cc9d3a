"""All other formats: ASE's readers, on the unpacked file under its own name."""

from __future__ import annotations

import contextlib
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ase import Atoms

from mlip_md.integrations.charges import stated_in_info
from mlip_md.integrations.md.structures.description import Content
from mlip_md.integrations.md.structures.labels import remove_labels
from mlip_md.integrations.md.structures.text import Source

_ELEMENTS_ARE_STATED = {
    "lammps-dump-text": r"^ITEM: ATOMS.*\belement\b",
    "lammps-dump-binary": r"$^",
    "lammps-data": r"^\s*(Masses|Atom Type Labels)\b",
    "gromos": r"$^",
}
"""What a file of such a format must hold for its elements to be known; ``$^`` is nowhere."""

_NEAR_MASS = 0.1
"""u; masses of programs are rounded by less."""


def guess(source: Source) -> str:
    """Name of ASE's format for a file.

    Raises:
        StructureError: if ASE knows none.
    """
    from ase.io.formats import filetype

    with _on_disk(source) as path:
        try:
            return str(filetype(str(path), read=True))
        except Exception as error:
            raise _unreadable(source, error) from error


def frames(source: Source, form: str) -> Iterator[Atoms]:
    """Frames one by one.

    Raises:
        StructureError: if a frame cannot be read.
    """
    from ase.io import iread

    _refuse_guesses(source, form)
    content = _plain_flags(source) if form == "vasp" else None
    with _on_disk(source, content) as path:
        stream = iread(str(path), index=":", format=form)
        while True:
            try:
                with warnings.catch_warnings(action="ignore"):
                    atoms = next(stream, None)
                if not isinstance(atoms, Atoms | None):
                    raise TypeError("it is no structure")
            except Exception as error:
                raise _unreadable(source, error) from error
            if atoms is None:
                return
            _refuse_guessed_masses(source, form, atoms)
            yield atoms


def _refuse_guesses(source: Source, form: str) -> None:
    """Formats without elements, for which ASE takes numbers of types or first letters of names."""
    stated = _ELEMENTS_ARE_STATED.get(form)
    if stated is not None and not re.search(stated, source.text(), re.MULTILINE):
        raise source.refusal(
            f"states no elements (format {form} of ASE): types and names of atoms are none; write "
            "them (dump_modify element, a Masses section), or convert it to extxyz or PDB"
        )


def _refuse_guessed_masses(source: Source, form: str, atoms: Atoms) -> None:
    """Elements by the nearest mass are wrong for masses that are nobody's."""
    if form != "lammps-data":
        return
    away = np.abs(atoms.get_masses() - Atoms(atoms.numbers).get_masses())
    if (away > _NEAR_MASS).any():
        mass = atoms.get_masses()[np.argmax(away)]
        raise source.refusal(
            f"states no elements and a mass of {mass:g} u, which no element has; convert it to "
            "extxyz or PDB with elements"
        )


def parse(source: Source, atoms: Atoms) -> Content:  # noqa: ARG001 (as every format has it)
    """One frame."""
    results, atoms = atoms.calc, atoms.copy()
    atoms.calc = results  # what it holds is named among what is left out
    stated = stated_in_info(atoms.info)
    return Content(atoms, len(atoms), stated=stated, left_out=remove_labels(atoms))


@contextlib.contextmanager
def _on_disk(source: Source, content: bytes | None = None) -> Iterator[Path]:
    """The path of a file, or of an unpacked or changed copy while it is needed."""
    if not source.packed and content is None:
        yield source.path
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / source.name
        path.write_bytes(source.content if content is None else content)
        yield path


def _unreadable(source: Source, error: Exception) -> Exception:
    return source.refusal(
        f"cannot be read by ASE ({type(error).__name__}: {error}); is it damaged, or its name "
        "wrong for its format? extxyz and PDB are safe choices"
    )


def _plain_flags(source: Source) -> bytes | None:
    """A POSCAR file whose flags of selective dynamics are all T or F; None if it has none.

    VASP reads them as Fortran does (.FALSE., f, .F.); ASE takes all but F for free.
    """
    lines = [line.text for line in source.lines()]
    # After the elements, which may begin with S as well, and their numbers.
    begin = next((i for i in (6, 7) if lines[i : i + 1] and lines[i].strip()[:1] in "Ss"), None)
    if begin is None or not lines[begin].strip():
        return None
    for i in range(begin + 2, len(lines)):
        words = lines[i].split()
        if len(words) < 6:
            break
        flags = [word.strip(".").upper()[:1] for word in words[3:6]]
        if not set(flags) <= {"T", "F"}:
            raise source.refusal(
                f"has the flags {' '.join(words[3:6])}; selective dynamics knows T and F", i + 1
            )
        lines[i] = " ".join(words[:3] + flags)
    return ("\n".join(lines) + "\n").encode()
