"""Damaged and hostile model files of every format: one kind of error, nothing run, little memory.

Whatever is done to a file, it either loads as the potential that was saved or is refused with a
ModelFileError. Where a format's checksums are made to fit the change, the content may be legal as
far as anyone can tell; then what is loaded must give finite energies and forces.
"""

import dataclasses
import functools
import io
import json
import os
import struct
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from model_files import make_potential, refused, zipped

from mlip_md.engine import Engine
from mlip_md.errors import ModelFileError, NonFiniteError
from mlip_md.formats import instadeep, soundness
from mlip_md.formats import own as model_file
from mlip_md.formats.open import FORMATS, open_potential
from mlip_md.formats.soundness import flatten
from mlip_md.potential import Potential

MEBIBYTE = 2**20


@functools.cache
def saved_potential() -> Potential:
    return make_potential("nequip", num_layers=1)


_finite: dict[str, bool] = {}


def gives_numbers(potential: Potential) -> bool:
    """Whether energy and forces of a molecule of its elements are finite."""
    potential = dataclasses.replace(potential, info={})
    if potential.sha256 not in _finite:  # compiled once, whatever the texts in the file
        positions = [[0.0, 0.0, 0.0], [0.0, 0.3, 1.0], [0.9, 0.0, 0.2]]
        try:
            result = Engine(potential).evaluate(positions, potential.elements)
            finite = bool(np.isfinite(result.energy) and np.isfinite(result.forces).all())
        except NonFiniteError:
            finite = False
        _finite[potential.sha256] = finite
    return _finite[potential.sha256]


class Target:
    """A saved potential and what becomes of changed versions of its file."""

    def __init__(self, name: str, folder: Path):
        known = FORMATS[name]
        self.read, self.file = known.load, folder / f"m{known.ending}"
        assert known.save
        known.save(saved_potential(), self.file)
        self.content = self.file.read_bytes()
        self.identity = self.read(self.file).sha256

    def outcome(self, content: bytes) -> str:
        """What a reader makes of a content: "same", "different" (but sound) or "refused".

        Errors of any other kind are let through.
        """
        self.file.write_bytes(content)
        try:
            potential = self.read(self.file)
        except ModelFileError as error:
            return "refused" if str(error).startswith(f"{self.file}: ") else str(error)
        if potential.sha256 == self.identity:
            return "same"
        assert gives_numbers(potential), potential
        return "different"

    def peak(self, content: bytes, message: str) -> float:
        """MiB at the most while a content is refused."""
        self.file.write_bytes(content)
        tracemalloc.start()
        try:
            with refused(message):
                self.read(self.file)
            return tracemalloc.get_traced_memory()[1] / MEBIBYTE
        finally:
            tracemalloc.stop()


@pytest.fixture(scope="module", autouse=True)
def _every_network_is_traced_once():
    trace = soundness.expected_shapes
    known: dict[str, dict] = {}

    def expected_shapes(potential):
        key = repr((potential.config, len(potential.elements), potential.cutoff))
        if key not in known:
            known[key] = trace(potential)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soundness, "expected_shapes", expected_shapes)
        patch.setattr(instadeep, "expected_shapes", expected_shapes)
        yield


WRITTEN = [name for name, known in FORMATS.items() if known.save]
"""Those only read have tests of their own: ``test_torch_zip.py``, ``test_mace_torch.py``."""


@pytest.fixture(params=WRITTEN)
def target(request, tmp_path) -> Target:
    return Target(request.param, tmp_path)


@pytest.fixture
def own(tmp_path) -> Target:
    return Target("mlip-md", tmp_path)


@pytest.fixture
def foreign(tmp_path) -> Target:
    return Target("instadeep", tmp_path)


def changed(content: bytes, position: int, byte: int) -> bytes:
    return content[:position] + bytes([byte]) + content[position + 1 :]


def structure(content: bytes) -> set[int]:
    """Positions outside the weights: headers, directories, names, descriptions."""
    marks = [b"PK\3\4", b"PK\1\2", b"PK\5\6", b"\x93NUMPY", b"{"]
    found: set[int] = set()
    for mark in marks:
        start = content.find(mark)
        while start >= 0:
            found.update(range(start, min(start + 120, len(content))))
            start = content.find(mark, start + 1)
    return found


def test_any_changed_byte_is_refused_or_changes_nothing(target):
    """Every byte of every header and a sample of the others; a bit, all bits and none set."""
    content, rng = target.content, np.random.default_rng(0)
    headers = structure(content)
    weights = set(rng.integers(0, len(content), 1500).tolist()) - headers
    refusals = 0
    for position in sorted(headers | weights):
        old = content[position]
        more = (0, 255) if position in headers and position % 4 == 0 else ()
        for byte in {old ^ (1 << int(rng.integers(8))), *more}:
            if byte != old:
                outcome = target.outcome(changed(content, position, byte))
                assert outcome in ("refused", "same"), (position, byte, outcome)
                assert outcome == "refused" or position in headers, (position, byte)
                refusals += outcome == "refused"
    assert refusals > len(headers)


def test_a_file_cut_anywhere_is_refused(target):
    content = target.content
    size = len(content)
    lengths = {*range(1, 400), *range(400, size, 37), *range(size - 400, size)}
    assert {target.outcome(content[:length]) for length in lengths} == {"refused"}
    assert {target.outcome(content[start:]) for start in range(1, size, 97)} == {"refused"}


def test_moved_repeated_and_foreign_pieces_are_refused_or_change_nothing(target):
    content, rng = target.content, np.random.default_rng(1)
    for _ in range(300):
        a, b, c = np.sort(rng.integers(0, len(content) + 1, 3))
        for pieced in (
            content[:b] + content[a:],
            content[:a] + content[b:c] + content[a:b] + content[c:],
            content[:a] + rng.bytes(int(c - b)) + content[a + c - b :],
        ):
            if pieced != content:
                assert target.outcome(pieced) in ("refused", "same")
    for noise in (b"", b"\0" * 5000, rng.bytes(5000), content[::-1], b"<html></html>" * 99):
        assert target.outcome(noise) == "refused"


def with_description(target: Target, text: str) -> bytes:
    """The file with another description, checksum and sizes in order."""
    digest = model_file._digest(text, flatten(saved_potential().params))
    text = text.replace(model_file._BLANK_HASH, digest, 1)
    size = struct.unpack("<Q", target.content[:8])[0]
    header = json.loads(target.content[8 : 8 + size])
    header["__metadata__"]["mlip_md"] = text
    return with_header(json.dumps(header), target.content[8 + size :])


def with_header(header: str | dict, weights: bytes) -> bytes:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(raw)) + raw + weights


def description(target: Target) -> dict:
    size = struct.unpack("<Q", target.content[:8])[0]
    text = json.loads(target.content[8 : 8 + size])["__metadata__"]["mlip_md"]
    return json.loads(text) | {"sha256": model_file._BLANK_HASH}


CHARACTERS = list('0123456789"{}[],:-.eE\\ntfax€\0')


def misprinted(text: str, rng: np.random.Generator) -> str:
    position = int(rng.integers(len(text)))
    return text[:position] + str(rng.choice(CHARACTERS)) + text[position + 1 :]


def test_misprints_under_a_right_checksum_raise_nothing_else(own):
    text, rng = json.dumps(description(own)), np.random.default_rng(2)
    outcomes = {own.outcome(with_description(own, misprinted(text, rng))) for _ in range(400)}
    assert outcomes == {"same", "different", "refused"}


ODD_VALUES = [None, True, -1, 1e300, 10**400, "x", "0" * 64, [], [[[]]], {}, {"a": 1}, ["x", 2]]


def test_fields_of_any_type_under_a_right_checksum_raise_nothing_else(own):
    fields = description(own)
    described = [fields | {name: value} for name in fields for value in ODD_VALUES]
    for part in ("hyperparameters", "atomic_energies"):
        odd = [fields[part] | {name: value} for name in fields[part] for value in ODD_VALUES]
        described += [fields | {part: values} for values in odd]
    outcomes = {own.outcome(with_description(own, json.dumps(odd))) for odd in described}
    assert outcomes == {"same", "different", "refused"}


@pytest.mark.parametrize(
    "entry",
    [
        *ODD_VALUES,
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [], "data_offsets": [None, "x"]},
        {"dtype": {}, "shape": "x", "data_offsets": [0, -5]},
        {"mlip_md": 1},
        {"mlip_md": "[]"},
    ],
)
def test_odd_headers_are_refused(own, entry):
    size = struct.unpack("<Q", own.content[:8])[0]
    header = json.loads(own.content[8 : 8 + size])
    for name in ("w", "__metadata__"):
        content = with_header(header | {name: entry}, own.content[8 + size :])
        assert own.outcome(content) == "refused"


def test_names_that_occur_twice_are_refused(own, foreign):
    """Two readers could take different ones."""
    text = json.dumps(description(own))
    for name in ("cutoff", "num_bessel", "O"):
        twice = text.replace(f'"{name}": ', f'"{name}": 4.2, "{name}": ', 1)
        own.file.write_bytes(with_description(own, twice))
        with refused("twice"):
            own.read(own.file)
    text, weights = members(foreign)
    twice = text.replace(b'"config":', b'"config": {}, "config":')
    foreign.file.write_bytes(wrapped(twice, weights))
    with refused("twice"):
        foreign.read(foreign.file)


def members(target: Target) -> tuple[bytes, bytes]:
    with zipfile.ZipFile(io.BytesIO(target.content)) as archive:
        return archive.read("hyperparams.json"), archive.read("params.npz")


def wrapped(text: bytes, weights: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    return zipped({"hyperparams.json": text, "params.npz": weights}, compression)


def arrays_of(weights: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(weights)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def with_first_array(target: Target, content: bytes) -> bytes:
    text, weights = members(target)
    arrays = arrays_of(weights)
    return wrapped(text, zipped(arrays | {next(iter(arrays)): content}))


def test_damage_inside_params_npz_is_refused_or_changes_nothing(foreign):
    text, weights = members(foreign)
    rng = np.random.default_rng(3)
    for position in sorted(structure(weights))[::7]:
        byte = weights[position] ^ (1 << int(rng.integers(8)))
        outcome = foreign.outcome(wrapped(text, changed(weights, position, byte)))
        assert outcome in ("refused", "same"), (position, outcome)
    for length in range(0, len(weights), 61):
        assert foreign.outcome(wrapped(text, weights[:length])) == "refused"


def test_misprints_in_hyperparameters_raise_nothing_else(foreign):
    text, weights = members(foreign)
    rng = np.random.default_rng(4)
    texts = [misprinted(text.decode(), rng).encode() for _ in range(300)]
    texts += [text[:length] for length in range(0, len(text), 7)]
    outcomes = {foreign.outcome(wrapped(text, weights)) for text in texts}
    assert outcomes == {"same", "different", "refused"}
    described = []
    for name, fields in json.loads(text).items():
        for field in fields if isinstance(fields, dict) else ():
            for value in ODD_VALUES:
                odd = json.loads(text)
                odd[name][field] = value
                described.append(json.dumps(odd).encode())
    outcomes = {foreign.outcome(wrapped(odd, weights)) for odd in described}
    assert outcomes == {"same", "different", "refused"}


@pytest.mark.parametrize(
    "text",
    [b"", b"null", b"{}", b"\xff\xfe", b"[" * 10**5, b'{"a":' * 10**5, b"9" * 10**5, b'"\\ud800"'],
)
def test_texts_that_are_no_description_are_refused(own, foreign, text):
    assert foreign.outcome(wrapped(text, members(foreign)[1])) == "refused"
    assert own.outcome(struct.pack("<Q", len(text)) + text) == "refused"


def test_damaged_heads_of_arrays_raise_nothing_else(foreign):
    first = next(iter(arrays_of(members(foreign)[1]).values()))
    rng = np.random.default_rng(5)
    for position in range(128):
        for byte in {0, 255, *rng.integers(32, 127, 4).tolist()} - {first[position]}:
            outcome = foreign.outcome(with_first_array(foreign, changed(first, position, byte)))
            # The padding of the head may change; a transposed shape has a head of its own.
            assert outcome in ("refused", "same"), (position, byte, outcome)
    for length in range(0, len(first), 3):
        assert foreign.outcome(with_first_array(foreign, first[:length])) == "refused"


def npy(head: str, version: tuple[int, int] = (1, 0), data: bytes = bytes(48)) -> bytes:
    length = struct.pack("<H" if version == (1, 0) else "<I", len(head))
    return b"\x93NUMPY" + bytes(version) + length + head.encode("latin1") + data


def head(descr: str, shape: str) -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


HEADS = [
    "",
    "()",
    "{}",
    "(" * 9000,
    "-" * 9000 + "1",
    "9" * 9000,
    "+1" * 4000,
    "__import__('os').abort()",
    head("'|O'", "(1,)"),
    head("'V999999999999'", "(1,)"),
    head("'M8[9999999999999s]'", "()"),
    head("('<f4', (4,))", "(1,)"),
    head("[('a', '<f4')] * 5", "(1,)"),
    head("'<f4'", "(-1,)"),
    head("'<f4'", "(True,)"),
    head("'<f4'", "(12.0,)"),
    head("'<f4'", f"(0, {10**30})"),
    head("'<f4'", f"({2**50},)"),
    head("'<f4'", "(" + "1, " * 4000 + "12)"),
    head("'<f4'", "(" + "1, " * 31 + "12)"),
    head("'<f4'", "(12, __import__('os').abort())"),
]


def test_hostile_heads_of_arrays_are_refused(foreign):
    for version in [(1, 0), (2, 0), (3, 0), (9, 9)]:
        for head in HEADS:
            outcome = foreign.outcome(with_first_array(foreign, npy(head, version)))
            assert outcome == "refused", (version, head[:50])


def test_paths_as_names_lead_nowhere(foreign):
    text, weights = members(foreign)
    arrays = arrays_of(weights)
    paths = "../evil", "/tmp/evil", "C:\\evil", "params#mlip_network#../../evil", "a\0b"
    for path in paths:
        more = zipped(arrays | {f"{path}.npy": npy(head("'<f4'", "(12,)"))})
        assert foreign.outcome(wrapped(text, more)) == "refused"
        beside = {"hyperparams.json": text, "params.npz": weights, path: b"x"}
        assert foreign.outcome(zipped(beside)) == "same"
    assert [file.name for file in foreign.file.parent.iterdir()] == ["m.zip"]


ACTIONS = (
    "compile",
    "exec",
    "import",
    "marshal.",
    "pickle.",
    "os.",
    "shutil.",
    "subprocess.",
    "ctypes.",
)
_events: list[tuple[str, tuple]] | None = None


@functools.cache
def _watch() -> None:
    def note(event: str, arguments: tuple) -> None:
        if _events is not None:
            _events.append((event, arguments))

    sys.addaudithook(note)  # there is no way to remove it


def test_reading_runs_nothing_and_opens_nothing_else(target):
    """As Python's audit events tell: no code compiled or run, no process, only the file itself."""
    global _events
    _watch()
    contents = [target.content, target.content[:-9], b"x" * 999]
    if target.read is instadeep.load_zip:
        contents += [with_first_array(target, npy(head)) for head in HEADS]
    for content in contents:  # imports that happen late do so here
        target.outcome(content)
    for content in contents:
        target.file.write_bytes(content)
        _events = []
        try:
            target.read(target.file)
        except ModelFileError:
            pass
        finally:
            events, _events = _events, None
        opened = {str(arguments[0]) for event, arguments in events if event == "open"}
        assert opened == {str(target.file)}
        assert not [event for event, _ in events if event.startswith(ACTIONS)]


def understated(archive: bytes, name: str, size: int) -> bytes:
    """The zip with another unpacked size of a member, in its directory and at the member."""
    patched = bytearray(archive)
    for mark, field, name_at in ((b"PK\3\4", 22, 30), (b"PK\1\2", 24, 46)):
        start = patched.find(mark)
        while patched[start + name_at : start + name_at + len(name)] != name.encode():
            start = patched.find(mark, start + 1)
        patched[start + field : start + field + 4] = struct.pack("<I", size)
    return bytes(patched)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_bombs_that_lie_about_their_size_stay_small(foreign, method):
    text, weights = members(foreign)
    first = next(iter(arrays_of(weights)))
    bomb = bytes(100 * MEBIBYTE)
    outer = understated(wrapped(text, bomb, method), "params.npz", 5000)
    assert len(outer) < MEBIBYTE
    assert foreign.peak(outer, "damaged|compressed in a way") < 4
    inner = understated(zipped({first: bomb}, method), first, 5000)
    assert foreign.peak(wrapped(text, inner), "damaged|compressed in a way") < 4
    outer = understated(wrapped(bomb, weights, method), "hyperparams.json", 5000)
    assert foreign.peak(outer, "damaged|compressed in a way") < 4


def test_bombs_that_say_their_size_are_not_unpacked(foreign, monkeypatch):
    monkeypatch.setattr(instadeep, "MAX_FILE_BYTES", MEBIBYTE)
    text, weights = members(foreign)
    deflated = zipfile.ZIP_DEFLATED
    blanks = b" " * (instadeep.MAX_HEADER_BYTES + 1)
    assert foreign.peak(wrapped(blanks, weights, deflated), r"hyperparams\.json has") < 4
    bomb = wrapped(text, bytes(2 * MEBIBYTE), deflated)
    assert foreign.peak(bomb, r"params\.npz has") < 4
    arrays = {f"a{i}.npy": bytes(MEBIBYTE // 2) for i in range(4)}
    assert foreign.peak(wrapped(text, zipped(arrays, deflated)), "announces arrays of") < 4


def test_a_directory_of_a_hundred_thousand_members_is_not_read(foreign):
    text, _ = members(foreign)
    entry = b"PK\1\2" + bytes(42)
    size = 100_000 * len(entry)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, size, 0, 0)
    directory = entry * 100_000 + end
    assert foreign.peak(directory, "lists 100000 members") < 3 * len(directory) / MEBIBYTE
    inside = wrapped(text, directory, zipfile.ZIP_DEFLATED)
    assert foreign.peak(inside, "lists 100000 members") < 30


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        ({"node_irreps": "1000000000x0e"}, "larger than any"),
        ({"node_irreps": "4x0e + 4x40o"}, "larger than any"),
        ({"node_irreps": "4x0e + " * 1000 + "4x0e"}, "longer than"),
        ({"radial_net_n_hidden": 10**12}, "radial_net_n_hidden"),
        ({"num_layers": 10**9}, "num_layers"),
        ({"num_bessel": 10**9}, "num_bessel"),
        ({"avg_num_neighbors": 1e300}, "avg_num_neighbors"),
    ],
)
def test_descriptions_of_absurd_networks_cost_nothing(own, foreign, hyperparameters, message):
    fields = description(own)
    fields["hyperparameters"] |= hyperparameters
    assert own.peak(with_description(own, json.dumps(fields)), message) < 16
    text, weights = members(foreign)
    fields = json.loads(text)
    fields["config"] |= hyperparameters
    assert foreign.peak(wrapped(json.dumps(fields).encode(), weights), message) < 16


def test_headers_that_announce_more_than_there_is_cost_nothing(own):
    entry = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    for content in (
        struct.pack("<Q", 2**40) + b"{" + bytes(100),
        with_header({"w": entry}, b""),
        with_header(" " * (soundness.MAX_HEADER_BYTES + 1), b""),
    ):
        assert own.peak(content, "no safetensors|truncated") < 16


def test_a_file_larger_than_any_is_not_read(target):
    limit = sys.modules[target.read.__module__].MAX_FILE_BYTES
    with open(target.file, "wb") as sparse:
        os.truncate(sparse.fileno(), limit + 1)
    size = target.file.stat().st_size
    with refused(f"has {size} bytes; at most {limit} are read"):
        target.read(target.file)


def test_what_is_no_file_is_refused(target, tmp_path):
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with refused("device"):
            target.read(tmp_path / "pipe")
    for name in ("a\0b", "x" * 5000, "~nobody-of-that-name/x"):
        with refused("there is no model"):
            open_potential(f"{name}.safetensors")
        with refused("cannot be read"):
            target.read(Path(name))
