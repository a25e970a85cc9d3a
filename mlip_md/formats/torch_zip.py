"""What ``torch.save`` writes, read without torch and without running anything.

The container is a zip of a pickle (``data.pkl``) and of the bytes of its tensors (``data/0``, …).
A pickle is a program for a small machine that imports and calls what it names. Ours has the same
machine without these two: a class or function that is named becomes a ``Global``, a call of it a
``Record`` of the call, and only the few builders of tensors and dicts that torch writes are known,
as functions of our own. Memory is a bounded multiple of the file's size, and nothing recurses.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mlip_md.errors import ModelFileError
from mlip_md.formats.archives import opened, read_member
from mlip_md.formats.soundness import require

MAX_PICKLE_BYTES = 64 * 2**20
MAX_OPERATIONS = 2_000_000
_MAX_DIMENSIONS = 16
_VERSIONS = range(1, 11)

_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""First bytes of the container of torch before 1.6: its magic number, pickled."""

_STORAGES: Mapping[str, str] = {
    "DoubleStorage": "f8",
    "FloatStorage": "f4",
    "HalfStorage": "f2",
    "LongStorage": "i8",
    "IntStorage": "i4",
    "ShortStorage": "i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class Global(NamedTuple):
    """A class or function that a file names; nothing is imported.

    Attributes:
        module: its module.
        name: its name there.
    """

    module: str
    name: str


class Record:
    """An object that a file would have made by calling something.

    Attributes:
        function: what it would have called.
        arguments: with what.
        state: what it would have filled the object with, or None.
    """

    __slots__ = ("arguments", "function", "state")

    def __init__(
        self, function: Global, arguments: tuple[Any, ...], state: dict[str, Any] | None = None
    ) -> None:
        self.function, self.arguments = function, arguments
        self.state: Any = state


class _Storage(NamedTuple):
    type: str
    key: str
    size: int


class Tensor(NamedTuple):
    """A tensor whose numbers have not been read.

    Attributes:
        storage: where they are.
        offset: the first one's place there.
        shape: as of an array.
        strides: in numbers, not bytes.
    """

    storage: Any
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchFile:
    """The content of a file that ``torch.save`` wrote.

    Args:
        content: the file's bytes.

    Attributes:
        root: what was saved: plain values, dicts, lists, tuples, ``Global``, ``Record`` and
            ``Tensor``.

    Raises:
        ModelFileError: if it is damaged, foreign, or of another container of torch.
    """

    def __init__(self, content: bytes) -> None:
        legacy = (
            "it is in the container of torch before 1.6; load and save it again with a newer torch"
        )
        require(not content.startswith(_LEGACY) and content[257:262] != b"ustar", legacy)
        self._content = content
        with opened(content, "the file") as archive:
            members = _members(archive)
            pickled = read_member(archive, members["data.pkl"], MAX_PICKLE_BYTES)
            order = _text(archive, members, "byteorder", "little")
            version = _text(archive, members, "version", "3")
        require(
            order in ("little", "big"), f"its byte order is {order!r:.40}; it must be little or big"
        )
        known = version.isdecimal() and len(version) < 4 and int(version) in _VERSIONS
        require(known, f"its container has version {version!r:.40}; 1 to {_VERSIONS[-1]} are read")
        self._order, self._members = "<" if order == "little" else ">", members
        self.root = _Machine(pickled).run()

    def array(self, tensor: Tensor) -> np.ndarray:
        """The numbers of a tensor, in an array of its own.

        Raises:
            ModelFileError: if they are not in the file, or of a type that is not read.
        """
        storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
        kind = _STORAGES.get(storage.type)
        if kind is None:
            raise ModelFileError(f"it has a tensor in a {storage.type:.40}, which is not read")
        dtype = np.dtype(self._order + kind)
        info = self._members.get(f"data/{storage.key}")
        if info is None:
            raise ModelFileError(f"the numbers of a tensor (data/{storage.key:.40}) are missing")
        size = storage.size * dtype.itemsize
        require(info.file_size == size, f"{info.filename} is not of the size that data.pkl says")
        last = tensor.offset + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
        number = math.prod(shape)
        inside = number == 0 or (number <= storage.size and last < storage.size)
        require(inside, f"a tensor of shape {shape} is larger than its {info.filename}")
        with opened(self._content, "the file") as archive:
            flat = np.frombuffer(read_member(archive, info, size), dtype)
        if number == 0:
            return np.zeros(shape, dtype.newbyteorder("="))
        steps = [step * dtype.itemsize for step in strides]
        view = np.lib.stride_tricks.as_strided(flat[tensor.offset :], shape, steps)
        return np.array(view, dtype.newbyteorder("="))


def numpy_array(record: Any) -> np.ndarray:
    """The numbers of an array of NumPy in double or single precision, flat, in float64.

    Raises:
        TypeError, ValueError, AttributeError: if it is none, or they are not finite.
    """
    _version, _shape, dtype, fortran, content = record.state
    text, encoding = content.arguments
    known = (
        content.function == Global("_codecs", "encode")
        and (fortran, encoding, dtype.state[1]) == (False, "latin1", "<")
        and dtype.arguments[0] in ("f8", "f4")
    )
    if not known:
        raise ValueError("no array of float64 or float32")
    found = np.frombuffer(text.encode("latin1"), "<" + dtype.arguments[0]).astype(np.float64)
    if not np.isfinite(found).all():
        raise ValueError("values that are not finite")
    return found


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Members by their name below the folder that all of them are in; every checksum is checked."""
    found = [name for name in archive.namelist() if name.endswith("/data.pkl")]
    require(
        len(found) == 1, "this zip is none that torch.save wrote: it has no data.pkl of its own"
    )
    folder = found[0].removesuffix("data.pkl")
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removeprefix(folder)
        require(name not in members, f"{info.filename!r:.60} is there twice")
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size
        require(stored, f"{info.filename!r:.60} is compressed, as torch.save never does")
        members[name] = info
    script = "constants.pkl" in members or any(name.startswith("code/") for name in members)
    wrong = (
        "it holds TorchScript, a compiled program without the model's parts (mace-torch's "
        "NAME_compiled.model, or one made for LAMMPS); take the NAME.model beside it"
    )
    require(not script, wrong)
    damaged = archive.testzip()
    require(damaged is None, f"{damaged!r:.60} is damaged: its checksum is wrong")
    return members


def _text(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str, default: str
) -> str:
    if name not in members:
        return default
    return read_member(archive, members[name], 100).decode("latin1").strip()


def _ordered_dict(*arguments: Any) -> dict[Any, Any]:
    """The dict of pairs that OrderedDict is called with; none are what torch writes."""
    found: dict[Any, Any] = {}
    for pair in arguments[0] if arguments else ():
        key, value = pair
        _set_item(found, key, value)
    return found


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Tensor:
    del rest  # whether it has a gradient, its hooks and its metadata
    lists = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)
    valid = (
        lists
        and isinstance(storage, _Storage)
        and len(shape) <= _MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**48 for n in (offset, *shape, *strides))
    )
    require(valid, "a tensor in it has no sound shape")
    return Tensor(storage, offset, shape, strides)


_BUILDERS: Mapping[Global, Callable[..., Any]] = {
    Global("collections", "OrderedDict"): _ordered_dict,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    Global("torch._utils", "_rebuild_parameter_with_state"): lambda data, *_: data,
}
"""The only calls in a pickle that are answered."""


def _set_item(target: Any, key: Any, value: Any) -> None:
    """Into a dict, where the key is a text or a number: what is found by name. Others are dropped.

    Hashing a key of nested tuples would recurse.
    """
    if isinstance(target, dict) and isinstance(key, str | int | float):
        target[key] = value


class _Machine:
    """The stack machine of pickles of protocol 2, which imports and calls nothing.

    Args:
        code: the pickle.
    """

    def __init__(self, code: bytes) -> None:
        self._code, self._at = code, 0
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # stacks under marks
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """What the pickle describes.

        Raises:
            ModelFileError: if it is damaged or does what torch.save does not write.
        """
        try:
            for _ in range(MAX_OPERATIONS):
                operation = self._take(1)
                if operation == b".":
                    (root,) = self._stack
                    return root
                if operation not in _OPERATIONS:
                    raise ModelFileError(
                        f"its data.pkl has an instruction ({operation!r}) that torch.save does "
                        "not write"
                    )
                _OPERATIONS[operation](self)
        except ModelFileError:
            raise
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise ModelFileError(
                f"its data.pkl is damaged ({type(error).__name__} at byte {self._at})"
            ) from error
        raise ModelFileError(f"its data.pkl has more than {MAX_OPERATIONS} instructions")

    def _take(self, number: int) -> bytes:
        taken = self._code[self._at : self._at + number]
        if len(taken) < number:
            raise ModelFileError("its data.pkl ends too early")
        self._at += number
        return taken

    def _number(self, format: str) -> int:
        value: int = struct.unpack("<" + format, self._take(struct.calcsize("<" + format)))[0]
        return value

    def _line(self) -> str:
        end = self._code.index(b"\n", self._at)
        line = self._take(end + 1 - self._at)
        return line[:-1].decode()

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _drop(self) -> None:
        self._stack.pop()

    def _protocol(self) -> None:
        version = self._number("B")
        require(version == 2, f"its pickle has protocol {version}; torch.save writes 2")

    def _mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[Any]:
        values, self._stack = self._stack, self._below.pop()
        return values

    def _tuple(self, number: int) -> None:
        values = tuple(self._stack[-number:])
        if len(values) < number:
            raise IndexError
        self._stack[-number:] = [values]

    def _memorize(self, format: str) -> None:
        self._memo[self._number(format)] = self._stack[-1]

    def _recall(self, format: str) -> None:
        self._push(self._memo[self._number(format)])

    def _global(self) -> None:
        self._push(Global(self._line(), self._line()))

    def _call(self) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise TypeError
        build = _BUILDERS.get(function)
        self._push(Record(function, arguments) if build is None else build(*arguments))

    def _fill(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Record):
            target.state = state

    def _persistent(self) -> None:
        """The storage of a tensor."""
        word, kind, key, _place, size = self._stack.pop()
        sound = word == "storage" and isinstance(kind, Global) and isinstance(key, str)
        require(sound and type(size) is int and size >= 0, "it refers to no storage of a tensor")
        self._push(_Storage(kind.name, key, size))

    def _append(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)

    def _set_items(self, values: list[Any]) -> None:
        for key, value in zip(values[::2], values[1::2], strict=True):
            _set_item(self._stack[-1], key, value)

    def _text(self) -> None:
        self._push(self._take(self._number("I")).decode())

    def _long(self) -> None:
        self._push(int.from_bytes(self._take(self._number("B")), "little", signed=True))


_OPERATIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine._protocol,
    b"(": _Machine._mark,
    b"0": _Machine._drop,
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"J": lambda m: m._push(m._number("i")),
    b"K": lambda m: m._push(m._number("B")),
    b"M": lambda m: m._push(m._number("H")),
    b"\x8a": _Machine._long,
    b"G": lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
    b"X": _Machine._text,
    b"}": lambda m: m._push({}),
    b"]": lambda m: m._push([]),
    b")": lambda m: m._push(()),
    b"t": lambda m: m._push(tuple(m._since_mark())),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"q": lambda m: m._memorize("B"),
    b"r": lambda m: m._memorize("I"),
    b"h": lambda m: m._recall("B"),
    b"j": lambda m: m._recall("I"),
    b"c": _Machine._global,
    b"R": _Machine._call,
    b"\x81": _Machine._call,
    b"b": _Machine._fill,
    b"Q": _Machine._persistent,
    b"a": lambda m: m._append([m._stack.pop()]),
    b"e": lambda m: m._append(m._since_mark()),
    b"s": lambda m: m._set_items([m._stack.pop(-2), m._stack.pop()]),
    b"u": lambda m: m._set_items(m._since_mark()),
}
"""What protocol 2 has, as far as torch.save writes it."""
