"""What a name or a path is: the one place that recognises the files that potentials come in."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlip_md import bundled
from mlip_md.errors import HeadError, ModelFileError
from mlip_md.formats import instadeep, mace_torch, own
from mlip_md.formats.names import NAMES
from mlip_md.potential import Potential

HEAD_BYTES = 300
"""Of a file, by which its format is recognised; the first name in a zip is among them."""

RUN_FOLDER_FILE = "model.safetensors"
PICKLED = (".pt", ".pth", ".ckpt", ".pkl")
"""Endings of formats that hold programs; only what mace-torch saved is read of them."""


class Format(NamedTuple):
    """A kind of model file.

    Attributes:
        ending: of its files' names.
        what: an article and what it is called, for messages.
        begins: whether the first bytes of a file are those of this format.
        load: reads a path.
        save: writes a potential to a path; None if files of this format are only read.
        has_heads: whether a file may hold several heads, of which ``load`` takes the one named by
            its argument ``head``.
    """

    ending: str
    what: str
    begins: Callable[[bytes], bool]
    load: Callable[..., Potential]
    save: Callable[[Potential, Path], None] | None
    has_heads: bool = False


def _is_of_torch(head: bytes) -> bool:
    return head.startswith(b"PK\3\4") and b"/data.pkl" in head


FORMATS = {
    "mlip-md": Format(
        *NAMES["mlip-md"],
        lambda head: head[4:9] == b"\0\0\0\0{",
        own.load,
        own.save,
    ),
    "instadeep": Format(
        *NAMES["instadeep"],
        lambda head: head.startswith(b"PK\3\4") and not _is_of_torch(head),
        instadeep.load_zip,
        instadeep.save_zip,
    ),
    "mace-torch": Format(
        *NAMES["mace-torch"], _is_of_torch, mace_torch.load_model, None, has_heads=True
    ),
}
"""Formats by the names of ``formats.names``; a new one is an entry of both."""


def open_potential(name_or_path: str | os.PathLike[str], head: str | None = None) -> Potential:
    """Open a potential by name or path.

    A file is recognised by its first bytes and, where these are nothing known, by its ending, so
    that the reader of the format tells what is wrong with it.

    Args:
        name_or_path: name of a bundled potential, or path of a file of one of ``FORMATS`` or of a
            training run's folder. Bundled names come first; write ``./name`` for a folder that is
            called like one.
        head: which head of a file that has several.

    Returns:
        The potential.

    Raises:
        HeadError: if there is no such head, or several and none is named.
        ModelFileError: if this is no name or path, there is no such potential, or its file is
            unusable.
    """
    name = os.fspath(name_or_path) if isinstance(name_or_path, (str, os.PathLike)) else None
    if not name or not isinstance(name, str):  # Path("") would be the current folder
        raise ModelFileError(f"{name_or_path!r:.60} names no model; {_known_models()}")
    if name in bundled.names():
        return _without_heads(own.load(bundled.path(name)), name, head)
    path = Path(os.path.expanduser(name))
    if os.path.isdir(path):  # unlike Path.is_dir it knows names that no file can have
        return _without_heads(own.load(_file_of_run(path)), name, head)
    if not os.path.exists(path):
        raise ModelFileError(f"there is no model {name!r}; {_known_models()}")
    known = _format_of(path)
    if known.has_heads:
        return known.load(path, head)
    return _without_heads(known.load(path), name, head)


def _without_heads(potential: Potential, name: str, head: str | None) -> Potential:
    """A potential of one head at most, which may be named if it is the one that was converted."""
    stated = potential.info.get("head")
    if head in (None, stated):
        return potential
    if stated is None:
        raise HeadError(f"{name}: it has no heads to choose from; leave head {head!r:.60} out")
    raise HeadError(f"{name}: it has head {stated!r:.60} alone, not {head!r:.60}", [stated])


def _format_of(path: Path) -> Format:
    suffix, head = path.suffix.lower(), _head(path)
    by_content = [known for known in FORMATS.values() if known.begins(head)]
    by_ending = [known for known in FORMATS.values() if known.ending == suffix]
    if suffix in PICKLED:  # some of them are zips too
        by_content = [known for known in by_content if known is FORMATS["mace-torch"]]
    for known in by_content + by_ending:
        return known
    endings = " or ".join(f"{known.ending} ({name})" for name, known in FORMATS.items())
    raise ModelFileError(
        f"{path}: a model file ends in {endings}; of pickled formats ({', '.join(PICKLED)}) only "
        "whole models of mace-torch are read, without running what they hold"
    )


def _head(path: Path) -> bytes:
    """The first bytes of a file; none where there is no file that can be read."""
    try:
        if not path.is_file():  # opening a pipe would wait
            return b""
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError:
        return b""


def _known_models() -> str:
    names = ", ".join(bundled.names()) or "none"
    files = ", of ".join(known.what for known in FORMATS.values())
    return f"give a bundled name ({names}) or the path of {files} or of a training run's folder"


def _file_of_run(folder: Path) -> Path:
    file = folder / RUN_FOLDER_FILE
    if not file.is_file():
        raise ModelFileError(
            f"{folder}: this folder has no {RUN_FOLDER_FILE}, so it is no finished training run; "
            f"{_known_models()}"
        )
    return file
