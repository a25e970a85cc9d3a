"""Files of structures as text: unpacked, decoded, in lines whose numbers messages can name."""

from __future__ import annotations

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from mlip_md.errors import StructureError

_PACKED: dict[bytes, Callable[[bytes], bytes]] = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
}
_PACKED_SUFFIXES = (".gz", ".bz2", ".xz")


class Line(NamedTuple):
    """A line of a file, counted from 1."""

    number: int
    text: str


class Source(NamedTuple):
    """A file that has been read.

    Attributes:
        path: as given.
        name: of the file without the ending of a packer.
        content: its bytes, unpacked.
        packed: whether the file on the disk is compressed.
    """

    path: Path
    name: str
    content: bytes
    packed: bool = False

    @property
    def suffix(self) -> str:
        """Ending of the name in lower case, with its dot."""
        return Path(self.name).suffix.lower()

    def text(self, *, strict: bool = False) -> str:
        """Content as text, without a byte order mark.

        Args:
            strict: refuse what is not UTF-8, instead of reading it as Latin-1.
        """
        try:
            return self.content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            if not strict:
                return self.content.decode("latin-1")
            line = self.content.count(b"\n", 0, error.start) + 1
            raise self.refusal(
                "holds a byte that is no UTF-8 text; save the file as UTF-8", line
            ) from error

    def lines(self, *, strict: bool = False) -> list[Line]:
        """Lines without their ends."""
        text = self.text(strict=strict).replace("\r\n", "\n").replace("\r", "\n")
        lines = text.split("\n")
        if lines and not lines[-1]:
            lines.pop()
        return [Line(number, line) for number, line in enumerate(lines, start=1)]

    def refusal(self, what: str, line: int | None = None) -> StructureError:
        """The error that says what is wrong where, and what to do."""
        place = "" if line is None else f", line {line},"
        return StructureError(f"{self.path}{place} {what}")


def read_source(path: Path) -> Source:
    """Read a file, whichever packer wrote it.

    Raises:
        StructureError: if it is a folder, cannot be read, or its compression is damaged.
    """
    if path.is_dir():
        raise StructureError(f"{path} is a folder; name a file in it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StructureError(f"{path} cannot be read ({error.strerror}); look at it") from error
    packed = content
    for magic, unpack in _PACKED.items():
        if content.startswith(magic):
            try:
                content = unpack(content)
            except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:
                raise StructureError(
                    f"{path} is damaged: it cannot be unpacked ({error}); copy it again"
                ) from error
            break
    name = path.name
    if path.suffix.lower() in _PACKED_SUFFIXES and len(path.suffixes) > 1:
        name = path.stem
    return Source(path, name, content, packed is not content)
