"""Models of mace-torch: the numbers of mace-torch itself, and what is refused.

``tests/make_mace_torch_models.py`` made the models and what mace-torch 0.3.16 says of them.
"""

import dataclasses
import io
import json
import pickle
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from mace_torch_cases import NAMES, Numbers, content, expected, structures
from model_files import refused
from typer.testing import CliRunner

import mlip_md
from mlip_md.cli import app
from mlip_md.engine import Engine
from mlip_md.errors import HeadError, ModelFileError
from mlip_md.formats import own
from mlip_md.formats.mace_torch import load_model
from mlip_md.formats.soundness import flatten
from mlip_md.potential import Potential

IN_FLOAT32 = (
    *("density-agnesi-zbl", "gaussian-plain"),
    *(pytest.param(n, marks=pytest.mark.slow) for n in ("plain-then-residual", "soft-zbl")),
)
SINGLE = ("single-precision",)
"""Models whose constants were rounded to float32 before mace-torch computed in float64."""


@pytest.fixture
def saved(tmp_path):
    """Writes a model's file, or another content, and gives its path."""

    def write(name: str, changed: bytes | None = None) -> Path:
        path = tmp_path / f"{name}.model"
        path.write_bytes(content(name) if changed is None else changed)
        return path

    return write


def computed(potential: Potential, dtype: str = "float64") -> list[Numbers]:
    """Interaction energy, forces and stress of the structures."""
    cells = [atoms.cell.array if atoms.pbc.any() else None for atoms in structures()]
    results = Engine(potential, dtype=dtype).evaluate_batch(
        [(a.positions, a.numbers, cell, a.pbc) for a, cell in zip(structures(), cells, strict=True)]
    )
    numbers = []
    for atoms, result in zip(structures(), results, strict=True):
        e0 = potential.reference_energies(potential.species(atoms.numbers)).sum()
        stress = result.stress if atoms.pbc.all() else None
        numbers.append(Numbers(result.energy - e0, result.forces, stress))
    return numbers


def assert_equal(found: list[Numbers], wanted: list[Numbers], energies: float, forces: float):
    """Within tolerances relative to the energy and to the largest component."""
    for mine, theirs in zip(found, wanted, strict=True):
        assert abs(mine.energy - theirs.energy) <= energies * abs(theirs.energy)
        for values, exact in zip(mine[1:], theirs[1:], strict=True):
            if exact is not None:
                np.testing.assert_allclose(values, exact, rtol=0, atol=forces * abs(exact).max())


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_those_of_mace_torch(saved, name):
    path, rounded = saved(name), name in SINGLE
    for head, wanted in expected(name).items():
        for numbers in wanted:
            assert abs(numbers.energy) >= 0.1 * len(numbers.forces)
            assert abs(numbers.forces).max() >= 0.5
        potential = load_model(path, head)
        limits = (2e-6, 2e-6) if rounded else (1e-10, 1e-9)
        assert_equal(computed(potential), wanted, *limits)


@pytest.mark.parametrize("name", IN_FLOAT32)
def test_float32_has_the_numbers_too(saved, name):
    """By tables of the radial weights and the compiled convolution, where there is one."""
    potential = load_model(saved(name))
    assert_equal(computed(potential, "float32"), expected(name)["Default"], 2e-5, 2e-5)


def test_there_are_models_of_every_block_and_depth(saved):
    configs = [load_model(saved(name), next(iter(expected(name)))).config for name in NAMES]
    blocks = {(c.first_interaction, c.interaction) for c in configs if c.num_layers > 1}
    assert len({block for pair in blocks for block in pair}) == 4
    assert {c.num_layers for c in configs} == {1, 2, 3}
    assert {c.distance_transform for c in configs} == {"none", "agnesi", "soft"}
    assert {c.radial_basis for c in configs} == {"bessel", "gaussian"}
    assert {c.activation for c in configs} == {"silu", "tanh", "none"}
    assert {c.correlation for c in configs} == {1, 2, 3, 4}
    assert {c.node_symmetry for c in configs} == {0, 1, 2, 3}
    for field in ("pair_repulsion", "cutoff_on_weights", "last_readout_only"):
        assert {getattr(c, field) for c in configs} == {True, False}, field


LEFT_OUT = {
    "pair_repulsion": False,
    "distance_transform": "none",
    "cutoff_on_weights": False,
    "cutoff_exponent": 4,
    "radial_basis": "bessel",
}


@pytest.mark.parametrize("field", LEFT_OUT)
def test_nothing_that_is_left_out_goes_unnoticed(saved, field):
    value, looked = LEFT_OUT[field], 0
    for name in NAMES:
        head, wanted = next(iter(expected(name).items()))
        potential = load_model(saved(name), head)
        if getattr(potential.config, field) == value or looked == 2:
            continue
        looked += 1
        config = dataclasses.replace(potential.config, **{field: value})
        changed = computed(dataclasses.replace(potential, config=config))
        differences = [
            abs(a.energy - b.energy) / abs(b.energy) for a, b in zip(changed, wanted, strict=True)
        ]
        assert max(differences) > 1e-3, name
    assert looked


def test_the_density_counts(saved):
    potential = load_model(saved("density-agnesi-zbl"))
    for layer in potential.params["params"].values():
        if "density" in layer:
            layer["density"]["perceptron"]["Dense_0"]["kernel"][:] = 0.0
    wanted = expected("density-agnesi-zbl")["Default"]
    differences = [
        abs(a.energy - b.energy) / abs(b.energy)
        for a, b in zip(computed(potential), wanted, strict=True)
    ]
    assert max(differences) > 1e-3


def test_heads_differ_and_must_be_chosen(saved):
    path, wanted = saved("two-heads"), expected("two-heads")
    for head, message in ((None, r"several heads; name one \(head=.*\): mp, own"),
                          ("x", "no head 'x'; it has: mp, own")):  # fmt: skip
        with pytest.raises(HeadError, match=f"two-heads.model: it has {message}$") as caught:
            mlip_md.load(path, head)
        assert caught.value.heads == ["mp", "own"]
    first, second = (mlip_md.load(path, head) for head in ("mp", "own"))
    assert (first.atomic_energies != second.atomic_energies).all()
    assert second.info["head"] == "own"
    assert second.info["heads"] == ["mp", "own"]
    for mine, theirs in zip(computed(first), wanted["own"], strict=True):
        assert abs(mine.energy - theirs.energy) > 1e-3 * abs(theirs.energy)
    with refused("no heads to choose from"):
        mlip_md.load("organics-gfn2", "mp")


def test_a_converted_file_has_the_same_numbers(saved, tmp_path):
    potential = mlip_md.load(saved("one-residual"))
    own.save(potential, tmp_path / "m.safetensors")
    again = mlip_md.load(tmp_path / "m.safetensors")
    assert again.sha256 == potential.sha256
    assert again.info["source"] == "mace-torch"
    assert "not stated" in again.info["licence"]
    assert_equal(computed(again), computed(potential), 0.0, 0.0)
    with refused("F32 is allowed"):
        text = (tmp_path / "m.safetensors").read_bytes()
        own.from_bytes(text.replace(b'format_version\\": 3', b'format_version\\": 2'))


def test_other_models_are_refused_by_name(saved):
    model = content("one-residual")
    for old, new, message in (
        (b"ScaleShiftMACE", b"PolarMACE", r"mace\.modules\.models\.PolarMACE \(charges that act"),
        (b"ScaleShiftMACE", b"MACELES", r"models\.MACELES \(charges that act beyond the cutoff"),
        (b"ScaleShiftMACE", b"AtomicDipolesMACE", r"models\.AtomicDipolesMACE \(dipoles\)"),
        (b"mace.modules.models", b"nequip.model", r"holds a nequip\.model\.ScaleShiftMACE\."),
        (b"ResidualI", b"AttResidualI", r"RealAgnosticAttResidualInteractionBlock \(attention"),
        (b"ResidualI", b"ResidualNonLinearI", r"NonLinearInteractionBlock \(gated messages.* MH-1"),
        (b"BesselBasis", b"OtherBasis", "radial functions of OtherBasis,"),
        (b"BesselBasis", b"ChebychevBasis", r"ChebychevBasis \(torch has no derivative"),
        (b"PolynomialCutoff", b"OtherCutoff", "a cutoff function of OtherCutoff,"),
        (b"FullyConnectedNet", b"RadialMLP", "radial networks of RadialMLP,"),
        (b"e3nn.o3._linear\n", b"oeq\n", r"weights in the layout of oeq\.Linear,"),
        (b"LinearReadoutBlock", b"LinearReadoutBlocx", "a LinearReadoutBlocx where"),
    ):
        path = saved("one-residual", rezipped(model, "data.pkl", old, new))
        with refused(message + ".*mlip-md reads MACE and ScaleShiftMACE"):
            mlip_md.load(path)


@pytest.mark.parametrize("holding", [
    {"model": {}, "epoch": 3},
    {"interactions.0.linear_up.weight": 1},
    {"model": 3, "config": {}},
    {"state_dict": {}, "config": [1]},
])  # fmt: skip
def test_state_dicts_without_a_configuration_are_refused(saved, holding):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("m/data.pkl", pickle.dumps(holding, 2))
    with refused(r"a checkpoint of a training.* take the NAME\.model .*extract_config_mace_model"):
        mlip_md.load(saved("x", stream.getvalue()))


@pytest.mark.parametrize(("name", "head"), [
    ("density-agnesi-zbl", None), ("two-heads", "mp"), ("two-heads", "own"),
])  # fmt: skip
def test_a_state_dict_with_its_configuration_is_the_model(saved, name, head):
    whole = mlip_md.load(saved(name), head)
    found = mlip_md.load(saved(name, content(name, "state")), head)
    weights, wanted = flatten(found.params), flatten(whole.params)
    assert weights.keys() == wanted.keys()
    for key, values in wanted.items():
        np.testing.assert_array_equal(weights[key], values, err_msg=key)
    np.testing.assert_array_equal(found.atomic_energies, whole.atomic_energies)
    for field in ("config", "elements", "cutoff", "avg_num_neighbors", "scaling_mean", "info"):
        assert getattr(found, field) == getattr(whole, field), field
    assert found.scaling_stdev == whole.scaling_stdev
    assert_equal(computed(found), expected(name)[head or "Default"], 1e-10, 1e-9)


@pytest.mark.parametrize(("before", "old", "new", "message"), [
    (rb"num_bessel~", rb"K\x05", b"K\x06", "differ in num_bessel; save both of one model"),
    (rb"num_polynomial_cutoff~", rb"K\x06", b"K\x05", "differ in num_polynomial_cutoff;"),
    (rb"num_interactions~", rb"K\x02", b"K\x03", "differ in num_interactions;"),
    (rb"num_elements~", rb"K\x03", b"K\x04", "differ in num_elements;"),
    (rb"correlation~", rb"K\x03", b"K\x02", "differ in correlation;"),
    (rb"pair_repulsion~", rb"\x88", b"\x89", "differ in pair_repulsion;"),
    (rb"r_max~", rb"G.{8}", b"G" + struct.pack(">d", 4.6), "differ in r_max;"),
    (rb"radial_MLP~\]~\(", rb"K\x08", b"K\x09", "differ in radial_MLP;"),
    (rb"radial_MLP~\]~\(", rb"K\x08", b"]", "differ in radial_MLP;"),
    (rb"radial_MLP~\]~\(", rb"K\x08", b"\x8a\xff" + 255 * b"\x7f", "differ in radial_MLP;"),
    (rb"MLP_irreps.{1,40}?", rb"K\x06", b"K\x07", "differ in MLP_irreps;"),
    (rb"hidden_irreps.{1,80}?", rb"K\x04", b"K\x05", "other features than equally many"),
    (rb"", rb"X\x0b\0\0\0edge_irreps", b"X\x0d\0\0\0hidden_irreps", "hidden_irreps are no"),
    (rb"max_ell~", rb"K\x01", b"K\x02", "needed"),
    (rb"max_ell~", rb"K\x01", b"M\xff\xff", "its max_ell is not 0 to"),
    (rb"X\x06\0\0\0", rb"Agnesi", b"Others", "transformed by Others"),
    (rb"X\x06\0\0\0", rb"bessel", b"gausss", "radial functions of gausss"),
    (rb"", rb"contractions\.0", b"contractiens.0", "basis of cuEquivariance's modules; save"),
    (rb"interaction_cls~", rb"c[^\n]*\n[^\n]*\n", b"N", "interaction_cls is no class"),
    (rb"", rb"RealAgnosticDensityR", b"RealAgnosticNonLinearR", r"\(gated messages"),
    (rb"X\x04\0\0\0", rb"gate", b"gatf", "its config has no gate; extract_config"),
    (rb"", rb"silu", b"gelu", "the nonlinearity torch.nn.functional.gelu"),
    (rb"", rb"scale_shift.shift", b"scale_shlft.shift", "has scale_shlft, which"),
    (rb"", rb"atomic_energies_fn", b"atomic.energies.fn", "has atomic, which"),
    (rb"", rb"covalent_radii", 14 * b".", "other names than a model's"),
])  # fmt: skip
def test_configurations_that_do_not_fit_are_refused(saved, before, old, new, message):
    changed = edited(content("density-agnesi-zbl", "state"), before, old, new)
    with refused(message):
        mlip_md.load(saved("x", changed))


@pytest.mark.parametrize(("word", "other"), [
    ("atomic_energies", "radial_MLP"), ("atomic_numbers", "radial_MLP"),
    ("atomic_inter_scale", "atomic_inter_shift"), ("atomic_inter_shift", "atomic_inter_scale"),
])  # fmt: skip
def test_statistics_that_do_not_fit_are_refused(saved, word, other):
    """The configuration's are other numbers: of another word in it."""
    keys = [f"X{chr(len(key))}\0\0\0{key}".encode() for key in (word, other)]
    model = content("two-heads", "state")
    if word == "atomic_inter_shift":  # the later of two counts
        model = edited(model, b"", keys[0], keys[0][:-1] + b"x")
    with refused(f"differ in {word};"):
        mlip_md.load(saved("x", edited(model, b"", keys[1], keys[0])), "own")


def edited(model: bytes, before: bytes, old: bytes, new: bytes) -> bytes:
    """The file with something else in its pickle after a pattern; ~ is a place in the memo."""
    with zipfile.ZipFile(io.BytesIO(model)) as archive:
        pickled = archive.read(archive.namelist()[0])
    pattern = b"(" + before.replace(b"~", rb"(?:q.|r.{4})") + b")" + old
    text, count = re.subn(pattern, lambda found: found[1] + new, pickled, flags=re.DOTALL)
    assert count
    return rezipped(model, "data.pkl", pickled, text)


def test_bases_of_cuequivariance_are_read_or_refused(saved):
    model = content("cueq-reduced")
    for old, new, message in (
        (b"linear\nLinear", b"linear\nOther", r"layout of cuequivariance_torch\.Other,"),
        (b"operations", b"operatjons", "cuEquivariance is damaged, or of a version"),
        (b"indices", b"indjces", "cuEquivariance is damaged, or of a version"),
        (b"latin1", b"latin2", "cuEquivariance is damaged"),
        (b"\2\0\0\0f8r", b"\2\0\0\0i8r", "cuEquivariance is damaged"),
    ):
        path = saved("x", rezipped(model, "data.pkl", old, new))
        with refused(message):
            mlip_md.load(path, "mp")


def test_models_are_recognised_by_content_and_by_ending(saved, tmp_path):
    path = saved("one-plain")
    for name in ("m.model", "m.pt", "m.zip", "m"):
        assert mlip_md.load(path.rename(tmp_path / name)).config.architecture == "mace-torch"
        path = tmp_path / name
    with refused("ends too early|no zip"):
        mlip_md.load(saved("x", b"no model"))
    with refused("the file is empty"):
        mlip_md.load(saved("x", b""))


@pytest.mark.parametrize(
    ("name", "kind"), [("one-plain", "model"), ("density-agnesi-zbl", "state")]
)
def test_damaged_models_raise_nothing_else(saved, name, kind):
    """Misprints of the pickle under right checksums, and cuts."""
    model, rng = content(name, kind), np.random.default_rng(0)
    with zipfile.ZipFile(io.BytesIO(model)) as archive:
        pickled = archive.read(archive.namelist()[0])
    outcomes = set()
    for _ in range(120):
        at = int(rng.integers(len(pickled) - 40))
        piece = bytearray(pickled[at : at + 40])
        piece[0] = int(rng.integers(256))
        changed = pickled[:at] + bytes(piece) + pickled[at + 40 :]
        outcomes.add(outcome(saved("x", rezipped(model, "data.pkl", pickled, changed))))
    assert outcomes == {"loaded", "refused"}
    for length in range(1, len(model), 9001):
        assert outcome(saved("x", model[:length])) == "refused"


def outcome(path: Path) -> str:
    try:
        load_model(path)
    except ModelFileError:
        return "refused"
    return "loaded"


def rezipped(model: bytes, member: str, old: bytes, new: bytes) -> bytes:
    """The file with something else in a member, checksums in order."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(model)) as before, zipfile.ZipFile(stream, "w") as after:
        for info in before.infolist():
            text = before.read(info)
            if info.filename.endswith(member):
                assert old in text
                text = text.replace(old, new)
            after.writestr(info.filename, text)
    return stream.getvalue()


def test_the_command_line_converts_a_head_and_shows_it(saved, tmp_path):
    path, ours = saved("two-heads"), tmp_path / "own.safetensors"
    said = CliRunner().invoke(app, ["convert", str(path), str(ours), "--head", "own"])
    assert said.exit_code == 0, said.output
    assert_equal(computed(mlip_md.load(ours)), expected("two-heads")["own"], 1e-10, 1e-9)
    said = CliRunner().invoke(app, ["show", str(ours), "--json"])
    info = json.loads(said.output)["info"]
    assert info["head"] == "own"
    assert info["heads"] == ["mp", "own"]
    for head, shown in (([], "mp"), (["--head", "own"], "own")):
        said = CliRunner().invoke(app, ["show", str(path), *head])
        assert said.exit_code == 0, said.output
        assert re.search(rf"\bhead +│ *{shown} ", said.stdout)
        assert '["mp", "own"]' in said.stdout
        assert said.stderr.startswith("This is head mp of several") != bool(head)
    said = CliRunner().invoke(app, ["show", str(path), "--head", "x"])
    assert "no head 'x'; it has: mp, own" in str(said.exception)
    said = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "none.safetensors")])
    assert "name one" in str(said.exception)
    assert mlip_md.load(ours, "own").info["head"] == "own"
    with refused("has head 'own' alone, not 'mp'"):
        mlip_md.load(ours, "mp")
    said = CliRunner().invoke(app, ["convert", str(ours), "--to", "mace-torch"])
    assert "one only read" in str(said.exception)
