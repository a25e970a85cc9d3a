"""Writing files: whole or not at all, and known to be possible before anything is computed.

The one durability rule of the project: content goes to a temporary file in the same folder, is
synced to the disk, takes the place of the old file in one step, and the folder is synced. A crash
at any moment leaves the old file or the new one, complete.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from mlip_md.errors import ConfigError, DataError, OutputError


def temporary_name(name: str) -> str:
    """A name for what will become the file or folder of a name."""
    return f".{name}.{secrets.token_hex(6)}.tmp"


def is_temporary(name: str) -> bool:
    """Whether ``temporary_name`` makes such names."""
    return re.fullmatch(r"\..+\.[0-9a-f]{12}\.tmp", name) is not None


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place, synced, if nothing fails.

    Args:
        path: file to write or replace; its folder must exist.

    Yields:
        The temporary path; whoever enters writes and closes it.

    Raises:
        OutputError: if the file system refuses; the old file is untouched then.
    """
    path = Path(path)
    temporary = path.with_name(temporary_name(path.name))
    try:
        with _explaining(path):
            if not path.parent.is_dir():
                raise FileNotFoundError(f"there is no folder {path.parent}")
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            _sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], inside: Path | None = None) -> Iterator[Path]:
    """A temporary folder that appears as ``path``, with all in it synced, if nothing fails.

    Args:
        path: folder to make, with its parents.
        inside: folder on the same disk to make the temporary one in; None makes it beside ``path``.

    Yields:
        The temporary folder, to write into.

    Raises:
        DataError: if there is something of that name.
        OutputError: if the file system refuses.
    """
    path = Path(path)
    temporary = (inside or path.parent) / temporary_name(path.name)
    try:
        with _explaining(path):
            if path.exists():
                raise DataError(f"{path} exists already; remove it or choose another folder")
            temporary.mkdir(parents=True)
            yield temporary
            for part in (*temporary.rglob("*"), temporary):
                (_sync_folder if part.is_dir() else sync)(part)
            os.rename(temporary, path)
            _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{path} could not be written ({error.strerror or error}); what was there before is "
            "untouched. Make room, or name another place"
        ) from error


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        sync(path)


def sync(path: Path) -> None:
    """Put what was written into a file or folder on the disk.

    Raises:
        OSError: if the file system refuses.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all.

    Args:
        path: file to write or replace; its folder must exist.
        content: its bytes.

    Raises:
        OutputError: if the file system refuses; the old file is untouched then.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """``write_bytes`` of a text in UTF-8, line ends as they are."""
    write_bytes(path, text.encode())


def check_new_file(path: Path, what: str) -> None:
    """Look whether a file can be written, before anything is computed for it.

    Args:
        path: of the file; it may exist.
        what: named it, for the message, such as "--output".

    Raises:
        ConfigError: if its folder is missing or may not be written, or it is a folder.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"{what} {path}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ConfigError(f"{what} {path} is a folder; name a file")
    _check_writable(path.parent, f"{what} {path}")


def check_new_folder(path: Path, what: str) -> None:
    """Look whether a folder can be made, or written if it is there.

    Args:
        path: of the folder.
        what: named it, for the message, such as "--run".

    Raises:
        ConfigError: if it or a parent is a file, or may not be written.
    """
    there = next((part for part in (path, *path.parents) if part.exists()), Path())
    if not there.is_dir():
        raise ConfigError(f"{what} {path}: {there} is a file; name another folder")
    _check_writable(there, f"{what} {path}")


def _check_writable(folder: Path, what: str) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{what}: {folder.resolve()} may not be written; name another place")
