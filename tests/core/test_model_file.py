"""The model file: what was saved comes back bit for bit; anything else is refused by name."""

import dataclasses
import json
import math
import os
import re
import struct
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from model_files import make_potential, refused, zipped

import mlip_md
from mlip_md import bundled
from mlip_md.engine import Engine
from mlip_md.errors import ConfigError, OutputError
from mlip_md.formats import own
from mlip_md.formats.open import FORMATS, open_potential
from mlip_md.formats.own import from_bytes, load, save, to_bytes
from mlip_md.formats.soundness import flatten, unflatten
from mlip_md.networks.config import MACEConfig, config_from_dict
from mlip_md.potential import Potential


@pytest.fixture(scope="module", params=["mace", "nequip"])
def potential(request) -> Potential:
    return make_potential(request.param)


@pytest.fixture(scope="module")
def mace() -> Potential:
    return make_potential("mace")


@pytest.fixture(scope="module")
def content(mace, tmp_path_factory) -> bytes:
    file = tmp_path_factory.mktemp("saved") / "tiny.safetensors"
    save(mace, file)
    return file.read_bytes()


@pytest.fixture
def saved(content, tmp_path) -> Path:
    file = tmp_path / "tiny.safetensors"
    file.write_bytes(content)
    return file


def description_of(file: Path) -> dict:
    with safetensors.safe_open(file, "numpy") as opened:
        return json.loads(opened.metadata()["mlip_md"])


def rewrite(file: Path, change=lambda d: None, change_tensors=lambda t: None) -> None:
    """Write the file anew, with a right checksum, from a changed description or tensors."""
    description, tensors = description_of(file), safetensors.numpy.load_file(file)
    description.pop("sha256")
    change(description)
    change_tensors(tensors)
    file.write_bytes(own._serialize(description, tensors))


def test_what_was_saved_comes_back_bit_for_bit(potential, tmp_path):
    file = tmp_path / "m.safetensors"
    save(potential, file)
    loaded = load(file)
    for field in dataclasses.fields(Potential):
        if field.name not in ("params", "atomic_energies", "radial_scale"):
            assert getattr(loaded, field.name) == getattr(potential, field.name), field.name
    np.testing.assert_array_equal(loaded.atomic_energies, potential.atomic_energies)
    assert loaded.atomic_energies.dtype == np.float64
    assert jax.tree.structure(loaded.params) == jax.tree.structure(potential.params)
    for old, new in zip(
        jax.tree.leaves(potential.params), jax.tree.leaves(loaded.params), strict=True
    ):
        assert new.dtype == np.float32
        np.testing.assert_array_equal(old, new)
    assert loaded.sha256 == potential.sha256
    assert loaded.radial_scale == loaded.used_radial_scale == potential.used_radial_scale


def test_a_potential_travels_as_bytes(mace, content):
    assert to_bytes(mace) == content
    assert from_bytes(content).sha256 == mace.sha256
    with refused(r"checksum.*\(format_version 2, written by mlip-md .*, read by mlip-md "):
        from_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_a_potential_shows_itself_in_a_line(mace):
    assert repr(mace) == "<Potential tiny: mace, H C O, cutoff 4.1 Å, 19,424 weights>"
    assert repr(dataclasses.replace(mace, info={})).startswith("<Potential: mace")


def test_explicit_atomic_energies_in_the_hyperparameters_survive(mace, tmp_path):
    config = dataclasses.replace(mace.config, atomic_energies={1: -13.6, 6: -1030.0, 8: -2040.0})
    save(dataclasses.replace(mace, config=config), tmp_path / "m.safetensors")
    assert load(tmp_path / "m.safetensors").config == config


def test_the_same_potential_makes_the_same_bytes(mace, tmp_path):
    save(mace, tmp_path / "a.safetensors")
    save(load(tmp_path / "a.safetensors"), tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_file_is_plain_safetensors_with_a_readable_description(saved, mace):
    tensors = safetensors.numpy.load_file(saved)
    assert set(tensors) == set(flatten(mace.params))
    assert "params#LinearNodeEmbeddingBlock_0#embeddings" in tensors
    description = description_of(saved)
    assert description["format_version"] == 2
    assert description["architecture"] == "mace"
    assert description["hyperparameters"]["num_channels"] == 4
    assert description["atomic_energies"]["O"] == 0.1 + 0.2
    assert description["units"] == {"energy": "eV", "length": "angstrom"}
    assert len(description["sha256"]) == 64


def test_a_case_change_inside_an_escape_is_found(saved, content):
    assert content.count(b"u00c5") == 1  # Å in the info
    saved.write_bytes(content.replace(b"u00c5", b"u00C5"))
    with refused("checksum"):
        load(saved)


def test_exchanged_tensors_are_found(saved, content):
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    first, second = [name for name, v in header.items() if v.get("shape") == [64, 64]][:2]
    assert first != second
    header[first], header[second] = header[second], header[first]
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    saved.write_bytes(struct.pack("<Q", len(raw)) + raw + content[8 + size :])
    assert set(safetensors.numpy.load_file(saved)) > {first, second}
    with refused("checksum"):
        load(saved)


def test_a_renamed_tensor_is_found(saved, content):
    name = b"LinearNodeEmbeddingBlock_0#embeddings"
    saved.write_bytes(content.replace(name, name.replace(b"_0", b"_1")))
    with refused("checksum"):
        load(saved)


def test_a_longer_file_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    with refused("longer"):
        load(saved)


def test_missing_empty_and_folder_are_told_apart(tmp_path):
    with refused("No such file"):
        load(tmp_path / "none.safetensors")
    (tmp_path / "empty.safetensors").touch()
    with refused("empty"):
        load(tmp_path / "empty.safetensors")
    with refused("folder"):
        load(tmp_path)


def test_foreign_files_are_refused(tmp_path):
    file = tmp_path / "m.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, file)
    with refused("not written by mlip-md"):
        load(file)
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, file, {"format": "pt"})
    with refused("not written by mlip-md"):
        load(file)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00")
    with refused("no safetensors"):
        load(file)
    deep = b'{"a":' * 200_000
    file.write_bytes(struct.pack("<Q", len(deep)) + deep)
    with refused("header"):
        load(file)


@pytest.mark.parametrize("version", [4, 0, "1", True, 1.0, None])
def test_an_unknown_version_says_what_can_be_read(saved, version):
    rewrite(saved, lambda d: d.update(format_version=version))
    with refused(r"reads 1, 2, 3\. Upgrade mlip-md"):
        load(saved)


def test_a_newer_writer_may_add_keys_and_an_older_one_lack_defaults(saved, mace):
    rewrite(saved, lambda d: d.update(invented_later={"a": [1, 2]}))
    assert load(saved).sha256 == mace.sha256

    def age(description):
        optional = ("avg_r_min", "scaling_mean", "scaling_stdev", "info", "units", "radial_scale")
        for name in optional:
            del description[name]
        for name in ("gate_nodes", "species_embedding_dim"):
            del description["hyperparameters"][name]

    rewrite(saved, age)
    old = load(saved)
    assert (old.avg_r_min, old.scaling_mean, old.scaling_stdev, old.info) == (None, 0.0, 1.0, {})
    assert old.config == mace.config


def forces(engine: Engine) -> np.ndarray:
    return engine.evaluate([[0, 0, 0], [0, 0, 1.1], [0.9, 0.1, -0.3]], [8, 1, 6]).forces


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_stored_factor_on_the_radial_basis_is_what_counts(saved, mace, precision):
    """Its last digit changes results of its precision and of no other; the identity stays."""
    given = load(saved).radial_scale._asdict()[precision]
    changed = float(np.nextafter(np.dtype(precision).type(given), np.inf))
    rewrite(saved, lambda d: d["radial_scale"].update({precision: changed}))
    other = load(saved)
    assert other.radial_scale._asdict()[precision] == changed != given
    assert other.sha256 == mace.sha256
    for dtype in ("float32", "float64"):
        engines = Engine(mace, dtype), Engine(other, dtype)  # both at once, of one identity
        assert np.array_equal(*map(forces, engines)) == (dtype != precision)
    assert to_bytes(other) == saved.read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_file_without_the_factor_gives_the_same_numbers(saved, mace, dtype):
    rewrite(saved, lambda d: d.pop("radial_scale"))
    older = load(saved)
    assert older.radial_scale is None
    np.testing.assert_array_equal(forces(Engine(older, dtype)), forces(Engine(mace, dtype)))


def test_a_network_without_such_a_factor_stores_none(tmp_path):
    save(make_potential("nequip"), tmp_path / "m.safetensors")
    assert "radial_scale" not in description_of(tmp_path / "m.safetensors")


def test_a_changed_potential_does_not_keep_the_factor_of_another(saved):
    changed = dataclasses.replace(load(saved), avg_r_min=1.2)
    with refused("radial_scale = .* leave radial_scale out"):
        to_bytes(changed)
    to_bytes(dataclasses.replace(changed, radial_scale=None))


FIRST = "params#LinearNodeEmbeddingBlock_0#embeddings"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(FIRST), rf"missing: '{FIRST}'"),
        (lambda t: t.update(more=np.zeros(2, np.float32)), "not in the network: 'more'"),
        (lambda t: t.update({FIRST: t[FIRST][:, :3]}), r"shape \(3, 3\).*has \(3, 4\)"),
        (lambda t: t.update({FIRST: t[FIRST].ravel()}), r"shape \(12,\)"),
        (lambda t: t.update({FIRST: np.full((3, 4), np.nan)}), "12 values that are NaN"),
        (lambda t: t.update({f"{FIRST}#below": t[FIRST]}), r"below|beginning"),
        (lambda t: t.clear(), "and .* more"),
    ],
)
def test_tensors_must_be_exactly_those_of_the_network(saved, change, message):
    rewrite(saved, change_tensors=change)
    with refused(message):
        load(saved)


def test_other_tensor_types_are_refused(saved):
    tensors = safetensors.numpy.load_file(saved)
    tensors[FIRST] = tensors[FIRST].astype(np.float64)
    with safetensors.safe_open(saved, "numpy") as opened:
        metadata = opened.metadata()
    safetensors.numpy.save_file(tensors, saved, metadata)
    with refused("F64"):
        load(saved)


def set_hyperparameter(**values):
    return lambda d: d["hyperparameters"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(architecture="mcae"), "unknown architecture 'mcae'"),
        (lambda d: d.pop("architecture"), "architecture is missing"),
        (set_hyperparameter(num_chanels=4), "did you mean num_channels"),
        (set_hyperparameter(activation="softplus"), "activation"),
        (set_hyperparameter(readout_irreps=5), "readout_irreps = 5 .* two entries"),
        (set_hyperparameter(readout_irreps=["import os", "0e"]), "import os.* cannot be read"),
        (set_hyperparameter(num_channels=8), "not in the network: .*4x0e"),
        (set_hyperparameter(num_layers=10**9), "num_layers"),
        (set_hyperparameter(num_bessel=10**9), "num_bessel"),
        (set_hyperparameter(l_max=50), "l_max"),
        (set_hyperparameter(l_max=11, correlation=4), "products of feature components"),
        (lambda d: d.update(elements=[1, 8, 6]), "ascending"),
        (lambda d: d.update(elements=[1, 6.0, 8]), "whole numbers"),
        (lambda d: d.update(elements=[0, 6, 8]), "atomic_energies"),
        (lambda d: d.update(elements=[1, 6]), "atomic_energies"),
        (lambda d: d["atomic_energies"].pop("C"), "atomic_energies"),
        (lambda d: d["atomic_energies"].update(C="low"), "number"),
        (lambda d: d["atomic_energies"].update(C=10**400), "too large"),
        (
            lambda d: d["atomic_energies"].update(C=1e308),
            r"\[C\] = 1e\+308 .* -1e\+08 to 1e\+08 eV",
        ),
        (lambda d: d.update(cutoff=-1), "cutoff"),
        (lambda d: d.update(cutoff=0.05), "cutoff = 0.05 .* from 0.1 to 100 Å"),
        (lambda d: d.update(cutoff=999999), "cutoff = 999999.0 .* from 0.1 to 100 Å"),
        (lambda d: d.update(cutoff=None), "cutoff"),
        (lambda d: d.update(avg_num_neighbors=0), "avg_num_neighbors"),
        (lambda d: d.update(avg_num_neighbors=1e-300), "avg_num_neighbors"),
        (lambda d: d.update(avg_r_min=9.0), "avg_r_min"),
        (lambda d: d.update(avg_r_min=1e-300), "avg_r_min"),
        (lambda d: d.update(avg_r_min=4.0999), "avg_r_min = 4.0999 Å is beyond 98% of the cutoff"),
        (set_hyperparameter(avg_r_min=4.0999), "avg_r_min = 4.0999 Å is beyond 98% of the cutoff"),
        (lambda d: d.update(scaling_mean=1e308), "scaling_mean = 1e"),
        (lambda d: d.update(scaling_stdev=-1e308), "scaling_stdev = -1e"),
        (lambda d: d.update(scaling_stdev=0), "scaling_stdev = 0.0; .* at least 1e-08"),
        (set_hyperparameter(avg_num_neighbors=1e-300), "avg_num_neighbors"),
        (set_hyperparameter(avg_r_min=1e-300), "avg_r_min"),
        (set_hyperparameter(gate_nodes=1), "gate_nodes = 1 .* true or false"),
        (set_hyperparameter(atomic_energies={"1": 1e308}), r"atomic_energies\[1\] = 1e\+308"),
        (set_hyperparameter(atomic_energies={"119": 0.0}), "'119' .* atomic number, 1 to 118"),
        (lambda d: d["radial_scale"].update(float32=5.0), "radial_scale = 5.0 is not the factor"),
        (
            lambda d: d["radial_scale"].update(float64=1.0001 * d["radial_scale"]["float64"]),
            "radial_scale = .* is not the factor",
        ),
        (lambda d: d.update(avg_r_min=0.98), "radial_scale = .* is not the factor"),
        (lambda d: d["radial_scale"].pop("float32"), "float32 = None; a number"),
        (lambda d: d.update(radial_scale=5.0), "radial_scale is 5.0; a JSON object"),
        (lambda d: d.update(info=[1]), "info"),
        (lambda d: d["units"].update(energy="kcal/mol"), "units"),
    ],
)
def test_a_wrong_description_is_refused_by_name(saved, change, message):
    rewrite(saved, change)
    with refused(message):
        load(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"atomic_energies": {1: math.nan}}, r"atomic_energies\[1\] = nan"),
        ({"atomic_energies": {1: math.inf}}, r"atomic_energies\[1\] = inf"),
        ({"atomic_energies": {1: 10**400}}, r"atomic_energies\[1\] = 1000"),
        ({"atomic_energies": {1: "-13.6"}}, r"atomic_energies\[1\] = '-13\.6'"),
        ({"atomic_energies": {1: True}}, r"atomic_energies\[1\] = True"),
        ({"atomic_energies": {0: -1.0}}, "= 0 .* atomic number, 1 to 118"),
        ({"atomic_energies": {True: -1.0}}, "= True .* atomic number"),
        ({"atomic_energies": {1.0: -1.0}}, r"= 1\.0 .* atomic number"),
        ({"atomic_energies": {"H": -1.0}}, "= 'H' .* atomic number"),
        ({"atomic_energies": {"1": -1.0, 1: -2.0}}, "one per element"),
        ({"atomic_energies": [-1.0]}, "atomic_energies"),
        ({"gate_nodes": 1}, "gate_nodes = 1"),
        ({"include_pseudotensors": 1.0}, r"include_pseudotensors = 1\.0"),
        ({"symmetric_tensor_product_basis": 0}, "symmetric_tensor_product_basis = 0"),
        ({"num_layers": True}, "num_layers = True"),
        ({"num_layers": 65}, "num_layers = 65 .* an integer from 1 to 64"),
        ({"num_channels": 8.0}, r"num_channels = 8\.0 .* an integer from 1 to 100000"),
        ({"correlation": 5}, "correlation = 5 .* an integer from 1 to 4"),
        ({"node_symmetry": 4}, "node_symmetry = 4 .* at most l_max = 3"),
        ({"radial_envelope": "soft"}, "must be one of polynomial_envelope, soft_envelope"),
        ({"avg_r_min": 0}, "from 0.01 to 100 Å, or null to take it from the training set"),
        ({"avg_num_neighbors": True}, "avg_num_neighbors = True"),
        ({"avg_r_min": math.nan}, "avg_r_min = nan"),
        ({"activation": 1}, "activation = 1"),
        ({"readout_irreps": {"16x0e": 1, "0e": 2}}, "readout_irreps"),
        ({"readout_irreps": None}, "readout_irreps = None"),
    ],
)
def test_hyperparameters_are_of_their_type(fields, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict("mace", fields)


def test_energies_by_element_are_floats_by_number():
    energies = {"1": -13, 118: -1.5e6}
    config = config_from_dict("mace", {"atomic_energies": energies})
    assert config == MACEConfig(atomic_energies={1: -13.0, 118: -1.5e6})
    assert [*map(type, config.atomic_energies.values())] == [float, float]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cutoff": float("nan")}, "cutoff"),
        (
            {"cutoff": 1e5},
            "cutoff = 100000.0 is not allowed; it must be a number from 0.1 to 100 Å",
        ),
        ({"cutoff": "5"}, "cutoff = '5'"),
        ({"scaling_stdev": float("inf")}, "scaling_stdev"),
        ({"scaling_stdev": 0.0}, "scaling_stdev"),
        ({"scaling_stdev": -1e308}, "scaling_stdev"),
        ({"scaling_mean": float("nan")}, "scaling_mean"),
        ({"atomic_energies": np.array([1e308, 1e308, 0.0])}, r"atomic_energies\[H\] = 1e\+308"),
        ({"atomic_energies": np.array([1.0, np.nan, 0.0])}, "atomic_energies"),
        ({"atomic_energies": np.zeros(2)}, "one per element"),
        ({"elements": ()}, "no elements"),
        ({"params": {}}, "missing"),
        ({"info": {"function": print}}, "JSON"),
        ({"info": {"number": float("nan")}}, "JSON"),
    ],
)
def test_an_unsound_potential_is_not_written(mace, tmp_path, changes, message):
    with refused(message):
        save(dataclasses.replace(mace, **changes), tmp_path / "m.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_overflow_float32_are_not_written(mace, tmp_path):
    leaves = flatten(mace.params) | {FIRST: np.full((3, 4), 1e300)}
    with refused("infinite"):
        save(dataclasses.replace(mace, params=unflatten(leaves)), tmp_path / "m.safetensors")


def test_saving_replaces_whole_files_only(mace, saved, monkeypatch):
    before = saved.read_bytes()

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(dataclasses.replace(mace, cutoff=3.9), saved)
    assert saved.read_bytes() == before
    assert [file.name for file in saved.parent.iterdir()] == ["tiny.safetensors"]
    monkeypatch.undo()
    save(dataclasses.replace(mace, cutoff=3.9), saved)
    assert load(saved).cutoff == 3.9


def test_saving_asks_for_the_right_ending_and_an_existing_folder(mace, tmp_path):
    with refused(r"\.safetensors"):
        save(mace, tmp_path / "m.zip")
    with pytest.raises(OutputError, match="there is no folder"):
        save(mace, tmp_path / "none" / "m.safetensors")


def test_open_by_path_run_folder_and_name(saved, mace, tmp_path, monkeypatch):
    assert open_potential(str(saved)).sha256 == mace.sha256
    run = tmp_path / "run"
    run.mkdir()
    with refused(r"no model\.safetensors"):
        open_potential(run)
    save(mace, run / "model.safetensors")
    assert mlip_md.load(str(run)).sha256 == mace.sha256
    monkeypatch.setattr(bundled, "_FOLDER", tmp_path)
    assert bundled.names() == ["tiny"]
    assert mlip_md.load("tiny").sha256 == mace.sha256
    assert bundled.card("tiny") is None
    (tmp_path / "tiny.md").write_text("# Tiny")
    assert bundled.card("tiny") == "# Tiny"
    with refused(r"no model 'tinny'.*\(tiny\)"):
        mlip_md.load("tinny")
    with refused("bundled are: tiny"):
        bundled.path("tinny")


@pytest.mark.parametrize("given", [None, 123, 1.5, True, [], {}, b"m.zip", "", object()])
def test_what_is_no_name_or_path_is_refused(given, saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    saved.rename("model.safetensors")  # a run folder, which an empty path would open
    with refused(rf"^{re.escape(repr(given)[:60])} names no model; give a bundled name .* path"):
        mlip_md.load(given)


@pytest.mark.parametrize("content", [b"\x80\x04N.", zipped({"archive/data.pkl": b"\x80\x04N."})])
def test_what_pickles_hold_is_never_run(tmp_path, content):
    (tmp_path / "m.pt").write_bytes(content)
    with refused("without running what they hold|has protocol 4"):
        open_potential(tmp_path / "m.pt")


@pytest.mark.parametrize("ending", [".safetensors", ".zip", ".SAFETENSORS", "", ".bin"])
def test_formats_are_recognised_by_content(mace, tmp_path, ending):
    for known in (known for known in FORMATS.values() if known.save):
        known.save(mace, tmp_path / f"m{known.ending}")
        file = (tmp_path / f"m{known.ending}").rename(tmp_path / f"named{ending}")
        assert open_potential(file).num_parameters == mace.num_parameters
    file.write_bytes(b"nothing known")
    with refused(r"safetensors|damaged or no zip|ends in \.safetensors \(mlip-md\) or \.zip"):
        open_potential(file)


def test_bundled_potentials_open_and_have_cards():
    for name in bundled.names():
        assert mlip_md.load(name).num_parameters > 0
        assert bundled.card(name)
        assert description_of(bundled.path(name))["format_version"] == own.FORMAT_VERSION


def test_weights_in_float64_are_kept_in_a_version_of_their_own(mace, tmp_path):
    """And are not mistaken for those of an older version, nor the other way round."""
    exact = {name: leaf + np.float64(1e-12) for name, leaf in flatten(mace.params).items()}
    precise = dataclasses.replace(mace, params=unflatten(exact))
    own.save(precise, tmp_path / "m.safetensors")
    assert description_of(tmp_path / "m.safetensors")["format_version"] == 3
    assert load(tmp_path / "m.safetensors").sha256 == precise.sha256 != mace.sha256
    rewrite(tmp_path / "m.safetensors", lambda d: d.update(format_version=2))
    with refused("tensors of type F64; F32 is allowed"):
        load(tmp_path / "m.safetensors")
