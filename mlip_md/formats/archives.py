"""Zip archives in memory, read within bounds: what several model formats are wrapped in."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Iterator

from mlip_md.errors import ModelFileError
from mlip_md.formats.soundness import require

MAX_MEMBERS = 10_000


@contextlib.contextmanager
def opened(content: bytes, what: str) -> Iterator[zipfile.ZipFile]:
    """A zip in memory, with at most MAX_MEMBERS entries; whatever zipfile raises is named."""
    entries = content.count(b"PK\x01\x02")
    most = f"{what} lists {entries} members; at most {MAX_MEMBERS} are read"
    require(entries <= MAX_MEMBERS, most)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            yield archive
    except ModelFileError:
        raise
    except Exception as error:  # on damaged data zipfile raises a dozen types
        name = type(error).__name__
        raise ModelFileError(f"{what} is damaged or no zip ({name}: {error})") from error


def read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int) -> bytes:
    """Bytes of a member; neither more than ``limit`` nor than it declares are ever unpacked."""
    name, size = info.filename, info.file_size
    require(size <= limit, f"{name} has {size} bytes; at most {limit} are read")
    bounded = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others unpack all
    require(bounded, f"{name} is compressed in a way that is not read")
    with archive.open(info) as member:
        return member.read(size)
