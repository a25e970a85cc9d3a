"""What torch.save writes, read by ourselves: sound files, and hostile ones, which run nothing."""

import io
import pickle
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
from model_files import refused, zipped

from mlip_md.errors import ModelFileError
from mlip_md.formats import torch_zip
from mlip_md.formats.torch_zip import Global, Record, TorchFile

PROTOCOL = b"\x80\x02"
STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nDoubleStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x06tQ"
)


def saved(pickled: bytes, **members: bytes) -> bytes:
    """A container as torch.save writes it, whose one storage holds 0.0 … 5.0."""
    data = {"data/0": np.arange(6.0).tobytes(), "byteorder": b"little", "version": b"3\n"}
    names = {name.replace("__", "/"): content for name, content in members.items()}
    return zipped({f"m/{k}": v for k, v in {"data.pkl": pickled, **data, **names}.items()})


def tensor(shape: bytes = b"K\x02K\x03\x86", strides: bytes = b"K\x03K\x01\x86", offset: int = 0):
    """A pickle of a tensor on that storage."""
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE
    rest = b"\x89ccollections\nOrderedDict\n)RtR."
    return PROTOCOL + call + b"K" + bytes([offset]) + shape + strides + rest


def test_tensors_are_read_with_their_strides_and_byte_order():
    values = np.arange(6.0).reshape(2, 3)
    file = TorchFile(saved(tensor()))
    np.testing.assert_array_equal(file.array(file.root), values)
    file = TorchFile(saved(tensor(b"K\x03K\x02\x86", b"K\x01K\x03\x86")))
    np.testing.assert_array_equal(file.array(file.root), values.T)
    file = TorchFile(saved(tensor(b"K\x02\x85", b"K\x02\x85", 1)))
    np.testing.assert_array_equal(file.array(file.root), [1.0, 3.0])
    swapped = values.byteswap().tobytes()
    file = TorchFile(saved(tensor(), byteorder=b"big", data__0=swapped))
    np.testing.assert_array_equal(file.array(file.root), values)
    assert file.array(file.root).dtype.isnative


class Plain:
    """Pickled as modules of torch are: made by its class, then filled with a dict."""


def test_plain_values_are_those_of_pickle():
    values = {
        "numbers": [0, 255, 65535, -1, 2**40, -(2**70), 1.5, True, False, None],
        "texts": ("", "Å", "x" * 300),
        "nested": {"a": {"b": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)]}},
    }
    assert TorchFile(saved(pickle.dumps(values, 2))).root == values
    thing = Plain()
    thing.part = {"x": 1}
    root = TorchFile(saved(pickle.dumps([thing, thing], 2))).root
    assert root[0] is root[1]
    assert isinstance(root[0], Record)
    assert root[0].function.name == "_reconstructor" or root[0].function.name == "Plain"
    assert root[0].state == {"part": {"x": 1}}


class Hostile:
    """Would run a command where it is unpickled."""

    def __reduce__(self):
        import os

        return os.system, ("touch /tmp/mlip-md-was-here",)


ACTIONS = "compile", "exec", "import", "marshal.", "pickle.", "os.", "subprocess.", "open"


def test_nothing_that_a_pickle_names_is_imported_or_called():
    events: list[str] = []
    watching = False

    def note(event: str, _arguments: tuple) -> None:
        if watching:
            events.append(event)

    sys.addaudithook(note)
    content = saved(pickle.dumps({"x": Hostile(), "y": zipfile.ZipFile, "z": Plain()}, 2))
    TorchFile(content)  # imports that happen late do so here
    watching = True
    root = TorchFile(content).root
    watching = False
    assert isinstance(root["x"], Record)
    assert root["x"].function.name == "system"
    assert root["y"] == Global("zipfile", "ZipFile")
    assert not [event for event in events if event.startswith(ACTIONS)]


HOSTILE = {
    "protocol 4": pickle.dumps({"a": 1}, 4),
    "an extension": PROTOCOL + b"\x82\x01.",
    "an instance": PROTOCOL + b"(ios\nsystem\n.",
    "an object": PROTOCOL + b"(cos\nsystem\no.",
    "a call of a text": PROTOCOL + b"X\x01\x00\x00\x00a)R.",
    "arguments of no tuple": PROTOCOL + b"cos\nsystem\n]R.",
    "an empty stack": PROTOCOL + b".",
    "two values": PROTOCOL + b"NN.",
    "no end": PROTOCOL + b"N",
    "no mark": PROTOCOL + b"t.",
    "no memory": PROTOCOL + b"h\x01.",
    "a text of 4 GiB": PROTOCOL + b"X\xff\xff\xff\xff.",
    "a text that is none": PROTOCOL + b"X\x01\x00\x00\x00\xff.",
    "a line without end": PROTOCOL + b"cos",
    "half a number": PROTOCOL + b"J\x00",
    "items of an odd number": PROTOCOL + b"}(K\x01u.",
    "a storage of no tuple": PROTOCOL + b"NQ.",
    "a storage of another kind": PROTOCOL + b"(NNNNNtQ.",
    "a tensor of no storage": tensor().replace(STORAGE, b"N"),
    "a tensor of no shape": tensor(b"N"),
    "a tensor of a negative size": tensor(b"J\xff\xff\xff\xffK\x03\x86"),
    "a tensor of other strides": tensor(strides=b"K\x03\x85"),
    "a dict of no pairs": PROTOCOL + b"ccollections\nOrderedDict\n]NaN\x85R.",
    "a parameter of nothing": PROTOCOL + b"ctorch._utils\n_rebuild_parameter\n)R.",
    "nothing": b"",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_pickles_are_refused(what):
    with pytest.raises(ModelFileError):
        TorchFile(saved(HOSTILE[what]))


@pytest.mark.parametrize(
    ("shape", "strides", "offset"),
    [
        (b"K\x02K\x04\x86", b"K\x03K\x01\x86", 0),
        (b"K\x02K\x03\x86", b"K\x03K\x01\x86", 1),
        (b"J\xff\xff\xff\x7f\x85", b"K\x00\x85", 0),
        (b"K\x02\x85", b"\x8a\x08" + b"\xff" * 7 + b"\x7f\x85", 0),
    ],
)
def test_tensors_beyond_their_storage_are_refused(shape, strides, offset):
    def read() -> None:
        file = TorchFile(saved(tensor(shape, strides, offset)))
        file.array(file.root)

    with pytest.raises(ModelFileError):
        read()


def test_storages_that_are_missing_short_or_of_another_type_are_refused():
    for content, message in (
        (saved(tensor(), data__0=bytes(40)), "not of the size"),
        (saved(tensor().replace(b"X\x01\x00\x00\x000", b"X\x01\x00\x00\x001")), "are missing"),
        (saved(tensor().replace(b"DoubleStorage", b"BFloat16Storage")), "BFloat16Storage"),
    ):
        file = TorchFile(content)
        with refused(message):
            file.array(file.root)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.", "torch before 1.6"),
        (bytes(257) + b"ustar" + bytes(300), "torch before 1.6"),
        (b"PK", "damaged or no zip"),
        (zipped({"hyperparams.json": b"{}"}), "none that torch.save wrote"),
        (zipped({"m/data.pkl": b"N.", "n/data.pkl": b"N."}), "none that torch.save wrote"),
        (zipped({"m/data.pkl": b"N.", "m/constants.pkl": b"N."}), "TorchScript"),
        (zipped({"m/data.pkl": b"N.", "m/code/__torch__.py": b""}), "TorchScript"),
        (zipped({"m/data.pkl": b"N." * 99}, zipfile.ZIP_DEFLATED), "is compressed"),
        (saved(b"N.", byteorder=b"middle"), "byte order is 'middle'"),
        (saved(b"N.", version=b"99"), "version '99'"),
        (saved(b"N.", version=b"x"), "version 'x'"),
    ],
)
def test_other_containers_are_refused_by_name(content, message):
    with refused(message):
        TorchFile(content)


def test_any_cut_or_changed_byte_raises_nothing_else():
    content, rng = saved(tensor()), np.random.default_rng(0)
    for length in range(len(content)):
        with pytest.raises(ModelFileError):
            TorchFile(content[:length])
    changed = 0
    for position in range(len(content)):
        byte = content[position] ^ (1 << int(rng.integers(8)))
        piece = content[:position] + bytes([byte]) + content[position + 1 :]
        try:
            file = TorchFile(piece)
            np.testing.assert_array_equal(file.array(file.root), np.arange(6.0).reshape(2, 3))
        except ModelFileError:
            changed += 1
    assert changed > len(content) // 2


def test_pickles_of_any_bytes_raise_nothing_else():
    rng, sound = np.random.default_rng(1), tensor()
    for _ in range(3000):
        piece = bytearray(sound)
        for position in rng.integers(2, len(sound), 2):
            piece[position] = rng.choice(list(b"(0N\x88JKMX}])t\x85\x86\x87qrhjcR\x81bQaesu."))
        try:
            file = TorchFile(saved(bytes(piece)))
            if isinstance(file.root, torch_zip.Tensor):
                file.array(file.root)
        except ModelFileError:
            pass


def peak(content: bytes) -> float:
    """MiB at the most while a content is read, or refused."""
    tracemalloc.start()
    try:
        TorchFile(content)
    except ModelFileError:
        pass
    finally:
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return top / 2**20


def test_memory_is_a_multiple_of_the_file_and_nothing_recurses():
    deep = PROTOCOL + b")" + b"\x85" * 100_000 + b"."
    assert peak(saved(deep)) < 20
    assert peak(saved(PROTOCOL + b"}" + b")" + b"\x85" * 100_000 + b"Ns.")) < 20  # as a key
    doubled = PROTOCOL + b"Nq\x00" + b"h\x00h\x00\x86q\x00" * 1000 + b"h\x00."
    assert peak(saved(doubled)) < 4
    assert peak(saved(PROTOCOL + b"}" * 200_000)) < 40
    assert peak(saved(PROTOCOL + b"X" + struct.pack("<I", 2**31) + b"x.")) < 4


def test_endless_pickles_end(monkeypatch):
    monkeypatch.setattr(torch_zip, "MAX_OPERATIONS", 1000)
    with refused("more than 1000 instructions"):
        TorchFile(saved(PROTOCOL + b"N0" * 600 + b"N."))
    monkeypatch.setattr(torch_zip, "MAX_PICKLE_BYTES", 100)
    with refused(r"data\.pkl has \d+ bytes; at most 100"):
        TorchFile(saved(PROTOCOL + b"N0" * 60 + b"N."))


def test_names_that_occur_twice_are_refused():
    stream = io.BytesIO(saved(b"\x80\x02N."))
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("m/data/0", b"other")
    with refused("is there twice"):
        TorchFile(stream.getvalue())
