"""All other formats: ASE's readers, on the unpacked file under its own name."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from ase import Atoms

from mlip_md.integrations.charges import stated_in_info
from mlip_md.integrations.md.structures.description import Content
from mlip_md.integrations.md.structures.labels import remove_labels
from mlip_md.integrations.md.structures.text import Source


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

    content = _plain_flags(source) if form == "vasp" else None
    with _on_disk(source, content) as path, warnings.catch_warnings(action="ignore"):
        try:
            for atoms in iread(str(path), index=":", format=form):
                if not isinstance(atoms, Atoms):
                    raise TypeError("it is no structure")
                yield atoms
        except Exception as error:
            raise _unreadable(source, error) from error


def parse(source: Source, atoms: Atoms) -> Content:
    """One frame."""
    atoms = atoms.copy() if atoms.calc is None else _with_results(atoms)
    stated = stated_in_info(atoms.info)
    count = len(atoms)
    left_out = remove_labels(atoms)
    return Content(atoms, count, stated=stated, left_out=left_out)


def _with_results(atoms: Atoms) -> Atoms:
    """A copy that keeps the calculator, whose results are named among what is left out."""
    copy = atoms.copy()
    copy.calc = atoms.calc
    return copy


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


def _plain_flags(source: Source) -> bytes:
    """A POSCAR file whose flags of selective dynamics are all T or F.

    VASP reads them as Fortran does (.FALSE., f, .F.); ASE takes all but F for free.
    """
    lines = [line.text for line in source.lines()]
    # After the elements, which may begin with S as well, and their numbers.
    begin = next((i for i in (6, 7) if lines[i : i + 1] and lines[i].strip()[:1] in "Ss"), None)
    if begin is None or not lines[begin].strip():
        return source.content
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
