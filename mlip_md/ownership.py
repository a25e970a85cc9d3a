"""A folder has one owner at a time: two runs in one folder would tear its files apart.

The owner is a small file with host, process and start of the process, touched all the time that the
run lives. On the same host a dead process owns nothing; of another host's process only the touch
can be seen, so a job that a queue moves to another node waits for it to become old. Whoever owns a
folder next removes what a killed process was writing there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlip_md.errors import OwnershipError
from mlip_md.files import is_temporary, temporary_name, write_text

FILE = ".owner.json"
SETTLE_SECONDS = 1.0
TOUCH_SECONDS = 15.0
DEAD_SECONDS = 90.0
"""An owner on another host that was not heard of for so long is gone."""

_held: dict[Path, bytes] = {}
"""Owner files of this process, with their content."""


@contextlib.contextmanager
def owning(folder: Path) -> Iterator[None]:
    """Own a folder while entered.

    Args:
        folder: that exists and may be written.

    Raises:
        OwnershipError: if another process that lives owns it, naming host and process.
        OutputError: if the folder may not be written.
    """
    path = folder / FILE
    _claim(path)
    _sweep(folder)
    mine, ended = path.read_bytes(), threading.Event()
    thread = threading.Thread(target=_keep_touching, args=(path, ended), daemon=True)
    thread.start()
    owner = os.getpid()
    _held[path] = mine
    try:
        yield
    finally:
        ended.set()
        if os.getpid() == owner:  # a forked child leaves through here too
            _release(path, _held.pop(path))


def release_all() -> None:
    """Give up every folder of this process, which is about to end without leaving ``owning``."""
    for path, mine in list(_held.items()):
        _release(path, mine)


def _release(path: Path, mine: bytes) -> None:
    with contextlib.suppress(OSError):
        if path.read_bytes() == mine:  # the folder may have been taken over meanwhile
            path.unlink()


def _claim(path: Path) -> None:
    """Make the owner file ours, or say whose it is."""
    pid = os.getpid()
    owner = {"host": socket.gethostname(), "pid": pid, "start": _start(pid)}
    text = json.dumps(owner | {"token": os.urandom(8).hex()}, indent=1) + "\n"
    draft = path.with_name(temporary_name(path.name))
    write_text(draft, text)
    try:
        if _linked(draft, path):
            return
        _refuse_living(path)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        if _linked(draft, path):
            # Another run may have judged the same dead owner, and now removes our file for it.
            time.sleep(SETTLE_SECONDS)
            with contextlib.suppress(OSError):
                if path.read_text(encoding="utf-8") == text:
                    return
    finally:
        draft.unlink(missing_ok=True)
    raise OwnershipError(f"{path.parent} is being taken by several runs at once; start one of them")


def _sweep(folder: Path) -> None:
    """Remove what a killed process was writing; of others that come for the folder, nothing."""
    now = _now_on_disk(folder / FILE)
    for path in [path for path in folder.rglob(".*.tmp") if is_temporary(path.name)]:
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > DEAD_SECONDS:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _linked(draft: Path, path: Path) -> bool:
    """Give a whole file its name, unless there is one of that name."""
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        if path.exists():
            return False
        os.replace(draft, path)
    return True


def _refuse_living(path: Path) -> None:
    """Raise if the owner in a file lives."""
    try:
        owner = dict(json.loads(path.read_text(encoding="utf-8")))
        silent = max(0.0, _now_on_disk(path) - path.stat().st_mtime)
    except (OSError, ValueError, TypeError):  # gone meanwhile, or torn
        return
    here = owner.get("host") == socket.gethostname()
    if (_lives(owner) if here else silent < DEAD_SECONDS) and owner.get("token") is not None:
        advice = "wait for its end, or choose another folder"
        if not here:
            advice += (
                f"; it was last heard of {silent:.0f} s ago, and after {DEAD_SECONDS:.0f} s of "
                f"silence the folder is free (if it is gone for sure, delete {path})"
            )
        who = f"process {owner.get('pid')} on {owner.get('host')}"
        raise OwnershipError(f"{path.parent} is in use by {who}; {advice}")


def _now_on_disk(path: Path) -> float:
    """The time by the clock that stamps files there, which may be another host's."""
    probe = path.with_name(temporary_name(path.name))
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()


def _start(pid: int) -> str | None:
    """When a process was started, by the system's count; None where it does not say."""
    try:
        # The command's name, in parentheses, may hold blanks.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process of this host that an owner file names still runs."""
    try:
        os.kill(int(owner["pid"]), 0)
    except PermissionError:
        return True
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return False
    return owner.get("start") in (None, _start(int(owner["pid"])))


def _keep_touching(path: Path, ended: threading.Event) -> None:
    while not ended.wait(TOUCH_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
