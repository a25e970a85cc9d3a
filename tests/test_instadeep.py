"""InstaDeep zips: both dialects load exactly, everything else is refused by name."""

import dataclasses
import io
import json
import pickle
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from model_files import refused

from mlip_md import instadeep, model_file
from mlip_md.errors import ModelFileError
from mlip_md.graph import Graph
from mlip_md.instadeep import load_zip, save_zip
from mlip_md.model_file import flatten, unflatten
from mlip_md.networks.config import MACEConfig, NequIPConfig, config_to_dict
from mlip_md.potential import Potential

TINY = {
    "mace": MACEConfig(num_channels=4, l_max=1, node_symmetry=1, readout_irreps=("4x0e", "0e")),
    "nequip": NequIPConfig(num_layers=2, node_irreps="4x0e + 4x1o", l_max=1, num_bessel=4),
}
E0 = {1: -13.6, 6: -1030.25, 8: -2040.5}
ARCHITECTURES = ["mace", "nequip"]


def make_potential(architecture: str) -> Potential:
    shell = Potential(
        config=TINY[architecture],
        params={},
        elements=tuple(E0),
        atomic_energies=np.array(list(E0.values())),
        cutoff=4.0,
        avg_num_neighbors=6.5,
        avg_r_min=0.95,
        scaling_mean=0.5,
        scaling_stdev=2.0,
    )
    rng = np.random.default_rng(0)
    shapes = model_file.expected_shapes(shell)
    leaves = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return dataclasses.replace(shell, params=unflatten(leaves))


@pytest.fixture(scope="module")
def potentials() -> dict[str, Potential]:
    return {name: make_potential(name) for name in ARCHITECTURES}


def parts_of(potential: Potential) -> tuple[dict, dict[str, np.ndarray]]:
    """Content of a version 0.1.x file, written here by hand from the format's description."""
    hyperparameters = {
        "dataset_info": {
            "atomic_energies_map": {str(z): e for z, e in reversed(E0.items())},
            "cutoff_distance_angstrom": 4.0,
            "avg_num_neighbors": 6.5,
            "avg_r_min_angstrom": 0.95,
            "scaling_mean": 0.5,
            "scaling_stdev": 2.0,
        },
        "config": config_to_dict(potential.config) | {"num_species": None},
        "predict_stress": False,
    }
    arrays = {
        name.replace("params#", "params#mlip_network#", 1): leaf
        for name, leaf in flatten(potential.params).items()
    }
    return hyperparameters, arrays


def write_zip(path: Path, hyperparameters: dict, arrays: dict, **extra_members: bytes) -> Path:
    weights = io.BytesIO()
    np.savez(weights, **arrays)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hyperparams.json", json.dumps(hyperparameters))
        archive.writestr("params.npz", weights.getvalue())
        for name, content in extra_members.items():
            archive.writestr(name, content)
    return path


def assert_same(loaded: Potential, potential: Potential) -> None:
    for name in ("elements", "cutoff", "avg_num_neighbors", "avg_r_min", "scaling_mean"):
        assert getattr(loaded, name) == getattr(potential, name), name
    assert loaded.scaling_stdev == potential.scaling_stdev
    np.testing.assert_array_equal(loaded.atomic_energies, potential.atomic_energies)
    assert jax.tree.structure(loaded.params) == jax.tree.structure(potential.params)
    for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(potential.params), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == np.float32


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_first_dialect(potentials, architecture, tmp_path):
    potential = potentials[architecture]
    loaded = load_zip(write_zip(tmp_path / "m.zip", *parts_of(potential)))
    assert_same(loaded, potential)
    assert loaded.config == potential.config
    assert loaded.info["source"] == "InstaDeep mlip 0.1.x"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_second_dialect(potentials, architecture, tmp_path):
    potential = potentials[architecture]
    hyperparameters, arrays = parts_of(potential)
    info = hyperparameters["dataset_info"]
    info["graph_cutoff_angstrom"] = info.pop("cutoff_distance_angstrom")
    info["atomic_energies_map"] = [info["atomic_energies_map"]]
    info |= {
        "dataset_name": ["spice"],
        "num_graphs": 12,
        "total_charge_set": [0],
        "long_range_cutoff_angstrom": None,
        "atomic_energies_removed": False,
    }
    hyperparameters["config"] |= {"deterministic_scatter_ops": True, "num_species": 3}
    del hyperparameters["predict_stress"]
    hyperparameters |= {"version": "0.2.5", "available_properties": {"energy": True}}
    loaded = load_zip(write_zip(tmp_path / "m.zip", hyperparameters, arrays))
    assert_same(loaded, potential)
    assert loaded.info["source"] == "InstaDeep mlip 0.2.5"
    assert loaded.info["dataset_info"]["num_graphs"] == 12


def test_missing_fields_take_the_defaults_of_the_library(potentials, tmp_path):
    hyperparameters, arrays = parts_of(potentials["mace"])
    for name in ("gate_nodes", "species_embedding_dim", "num_species", "avg_r_min"):
        del hyperparameters["config"][name]
    for name in ("scaling_mean", "scaling_stdev", "avg_r_min_angstrom"):
        del hyperparameters["dataset_info"][name]
    loaded = load_zip(write_zip(tmp_path / "m.zip", hyperparameters, arrays))
    assert loaded.config == TINY["mace"]
    assert (loaded.scaling_mean, loaded.scaling_stdev, loaded.avg_r_min) == (0.0, 1.0, None)


def test_defaults_are_those_of_the_library():
    pytest.importorskip("mlip")
    from mlip.models_v1.mace.config import MaceConfig
    from mlip.models_v1.nequip.config import NequipConfig

    pairs = (MACEConfig(), MaceConfig()), (NequIPConfig(), NequipConfig())
    for card, theirs in pairs:
        expected = json.loads(theirs.model_dump_json())
        assert expected.pop("num_species") is None
        assert expected.pop("deterministic_scatter_ops") is False
        fields = instadeep._LIBRARY_DEFAULTS[card.architecture]
        ours = config_to_dict(dataclasses.replace(card, **fields))
        assert ours == expected


@pytest.mark.parametrize("devices", [1, 4])
def test_a_leading_device_axis_is_dropped(potentials, tmp_path, devices):
    hyperparameters, arrays = parts_of(potentials["mace"])
    arrays = {name: np.stack([a] * devices) for name, a in arrays.items()}
    file = write_zip(tmp_path / "m.zip", hyperparameters, arrays)
    assert_same(load_zip(file), potentials["mace"])
    first = next(iter(arrays))
    write_zip(file, hyperparameters, arrays | {first: arrays[first][0]})
    with refused("shape"):
        load_zip(file)
    write_zip(file, hyperparameters, arrays | {first: np.stack([arrays[first][0]] * 9)})
    with refused("device axes"):
        load_zip(file)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, list(E0.values())),
        ("average", list(E0.values())),
        ("zero", [0.0, 0.0, 0.0]),
        ({"0": -1.0, "1": -2.0, "2": -3.0}, [-1.0, -2.0, -3.0]),
        ({"2": -3.0}, [0.0, 0.0, -3.0]),
        ({"1": -13.6, "6": -1030.0, "8": -2040.0}, [0.0, -13.6, 0.0]),
    ],
)
def test_atomic_energies_follow_the_rules_of_the_library(potentials, tmp_path, choice, expected):
    hyperparameters, arrays = parts_of(potentials["mace"])
    hyperparameters["config"]["atomic_energies"] = choice
    loaded = load_zip(write_zip(tmp_path / "m.zip", hyperparameters, arrays))
    np.testing.assert_array_equal(loaded.atomic_energies, expected)
    if isinstance(choice, dict):
        assert loaded.config.atomic_energies == dict(zip(E0, expected, strict=True))
    again = tmp_path / "again.zip"
    save_zip(loaded, again)
    np.testing.assert_array_equal(load_zip(again).atomic_energies, expected)


def test_keys_beyond_the_species_are_warned_of(potentials, tmp_path, caplog):
    hyperparameters, arrays = parts_of(potentials["mace"])
    hyperparameters["config"]["atomic_energies"] = {"1": -13.6, "6": -1030.0, "8": -2040.0}
    load_zip(write_zip(tmp_path / "m.zip", hyperparameters, arrays))
    assert "keys [6, 8] are ignored" in caplog.text


def edit(section, **values):
    return lambda h, a: (h[section] if section else h).update(values)


def drop(section, name):
    return lambda h, a: h[section].pop(name)


def first_array(change):
    def apply(hyperparameters, arrays):
        name = next(iter(arrays))
        arrays[name] = change(arrays[name])

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit("config", vecnorm_type="none"), "ViSNet"),
        (edit("config", sphere_channels=16), "eSEN"),
        (edit("config", target_irreps="8x0e"), "second-generation NequIP"),
        (edit("config", radial_mlp_hidden=[64]), "second-generation MACE"),
        (drop("config", "num_channels"), "neither num_channels"),
        (edit("config", off_diagonal=True), "no hyperparameter 'off_diagonal'"),
        (edit("config", activation="none"), "activation"),
        (edit("config", correlation="2"), "correlation"),
        (edit("config", num_layers=3), "missing: .*layer_1"),
        (edit("config", num_species=20), "num_species = 20"),
        (edit("config", atomic_energies="mean"), "atomic_energies"),
        (edit("config", atomic_energies={"C": 1.0}), "species index"),
        (edit("dataset_info", atomic_energies_map=None), "atomic_energies_map"),
        (edit("dataset_info", atomic_energies_map={}), "no elements"),
        (edit("dataset_info", atomic_energies_map={"H": 1.0}), "atomic number"),
        (edit("dataset_info", atomic_energies_map={"01": 1.0, "1": 2.0}), "atomic number"),
        (edit("dataset_info", atomic_energies_map={"1": "low"}), "number is needed"),
        (edit("dataset_info", atomic_energies_map=[{"1": 1.0}, {"1": 2.0}]), "every data set"),
        (edit("dataset_info", atomic_energies_map={"1": 1.0, "6": 2.0}), "w"),
        (edit("dataset_info", cutoff_distance_angstrom=0), "cutoff"),
        (drop("dataset_info", "cutoff_distance_angstrom"), "graph_cutoff_angstrom = None"),
        (edit("dataset_info", avg_num_neighbors=-1.0), "avg_num_neighbors"),
        (edit("dataset_info", scaling_stdev=float("nan")), "NaN is not allowed"),
        (edit("dataset_info", long_range_cutoff_angstrom=9.0), "long-range"),
        (edit(None, dataset_info=None), "dataset_info"),
        (edit(None, config=[]), "config"),
        (lambda h, a: a.popitem(), "missing"),
        (lambda h, a: a.update({"params#mlip_network#more": np.zeros(2)}), "more"),
        (lambda h, a: a.update({"params#other": np.zeros(2)}), "not a weight"),
        (first_array(lambda a: a * np.nan), "NaN"),
        (first_array(lambda a: a[..., :-1]), "shape"),
        (first_array(lambda a: a.astype(np.int32)), "dtype int32"),
        (first_array(lambda a: a.astype(">f4")), "dtype >f4"),
        (first_array(lambda a: np.full(a.shape, 1e39)), "infinite"),
    ],
)
def test_wrong_content_is_refused_by_name(potentials, tmp_path, change, message):
    hyperparameters, arrays = parts_of(potentials["mace"])
    change(hyperparameters, arrays)
    file = write_zip(tmp_path / "wrong.zip", hyperparameters, arrays)
    with refused(message):
        load_zip(file)


def test_nothing_is_unpickled(potentials, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    hyperparameters, arrays = parts_of(potentials["mace"])
    objects = np.empty(1, object)
    objects[0] = Trap()
    file = write_zip(tmp_path / "m.zip", hyperparameters, arrays | {next(iter(arrays)): objects})
    with refused("dtype object"):
        load_zip(file)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hyperparams.json", json.dumps(hyperparameters))
        archive.writestr("params.npz", pickle.dumps(Trap()))
    with refused("damaged"):
        load_zip(file)
    assert not (tmp_path / "executed").exists()


def test_members_outside_the_format_are_not_touched(potentials, tmp_path):
    file = tmp_path / "folder" / "m.zip"
    file.parent.mkdir()
    write_zip(file, *parts_of(potentials["mace"]), **{"../evil": b"x", "README.md": b"y"})
    load_zip(file)
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "m.zip"]


def test_zips_of_something_else_are_refused(tmp_path):
    file = tmp_path / "m.zip"
    for members in ([], ["a.txt"], ["hyperparams.json"], ["x/hyperparams.json", "x/params.npz"]):
        with zipfile.ZipFile(file, "w") as archive:
            for member in members:
                archive.writestr(member, "{}")
        with refused("no model of InstaDeep's mlip"):
            load_zip(file)
    file.write_bytes(b"no zip at all")
    with refused("damaged or foreign"):
        load_zip(file)
    file.write_bytes(b"")
    with refused("empty"):
        load_zip(file)
    with refused("No such file"):
        load_zip(tmp_path / "none.zip")
    with refused("folder"):
        load_zip(tmp_path)


def test_bombs_are_refused_before_they_are_read(potentials, tmp_path, monkeypatch):
    hyperparameters, arrays = parts_of(potentials["mace"])
    file = tmp_path / "m.zip"

    def deflated(weights: bytes, text: str) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("hyperparams.json", text)
            archive.writestr("params.npz", weights)

    deflated(b"", " " * (instadeep.MAX_HYPERPARAMETERS_BYTES + 1))
    with refused(r"hyperparams\.json has"):
        load_zip(file)
    monkeypatch.setattr(instadeep, "MAX_PARAMETERS_BYTES", 2**20)
    inner = io.BytesIO()
    np.savez_compressed(inner, **{f"a{i}": np.zeros(2**17) for i in range(4)})
    assert len(inner.getvalue()) < 2**20
    deflated(inner.getvalue(), json.dumps(hyperparameters))
    with refused("announces 4 arrays"):
        load_zip(file)
    deflated(bytes(2**20 + 1), json.dumps(hyperparameters))
    with refused(r"params\.npz has"):
        load_zip(file)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<f4", "fortran_order": False, "shape": (2**50,)}
    )
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr(f"{next(iter(arrays))}.npy", header.getvalue())
    deflated(inner.getvalue(), json.dumps(hyperparameters))
    with refused("not of the size"):
        load_zip(file)


def test_flipped_bytes_never_pass_unseen(potentials, tmp_path):
    """The zip's own CRC covers the members; its directory may change without consequence."""
    potential = potentials["mace"]
    file = write_zip(tmp_path / "m.zip", *parts_of(potential))
    content, rng = file.read_bytes(), np.random.default_rng(2)
    refused = 0
    for position in rng.integers(0, len(content), 150):
        damaged = bytearray(content)
        damaged[position] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            assert_same(load_zip(file), potential)
        except ModelFileError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_written_zips_come_back(potentials, architecture, tmp_path):
    file = tmp_path / "m.zip"
    save_zip(potentials[architecture], file)
    assert_same(load_zip(file), potentials[architecture])
    first = file.read_bytes()
    save_zip(load_zip(file), file)
    assert file.read_bytes() == first
    with refused(r"\.zip"):
        save_zip(potentials[architecture], tmp_path / "m.npz")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_library_reads_our_zip_and_its_own_comes_back(potentials, architecture, tmp_path):
    pytest.importorskip("mlip")
    from mlip.models.model_io import load_model_from_zip, save_model_to_zip
    from mlip.models_v1 import Mace, Nequip

    potential = potentials[architecture]
    save_zip(potential, tmp_path / "ours.zip")
    model = {"mace": Mace, "nequip": Nequip}[architecture]
    theirs = load_model_from_zip(model, tmp_path / "ours.zip")
    save_model_to_zip(tmp_path / "theirs.zip", theirs)
    assert_same(load_zip(tmp_path / "theirs.zip"), potential)


def golden_graph(outputs: np.lib.npyio.NpzFile, name: str, inputs: Path, species) -> Graph:
    data = np.load(inputs / f"{name}.npz")
    n = len(data["numbers"])
    order = np.argsort(outputs[f"{name}/receivers"], kind="stable")
    return Graph(
        positions=data["positions"],
        species=species(data["numbers"]),
        cell=data["cell"][None],
        senders=outputs[f"{name}/senders"][order],
        receivers=outputs[f"{name}/receivers"][order],
        shifts=outputs[f"{name}/shifts"][order].astype(np.int32),
        node_graph=np.zeros(n, np.int32),
        node_mask=np.ones(n, bool),
        edge_mask=np.ones(len(order), bool),
        graph_mask=np.ones(1, bool),
    )


@pytest.mark.parametrize(
    ("file", "outputs"),
    [
        ("mace_card_v012.zip", "mace_outputs_mlip0110_f64.npz"),
        ("nequip_card_strong_v012.zip", "nequip_outputs_strong_f64.npz"),
    ],
)
def test_published_files_give_the_published_energies(reference_data, file, outputs):
    golden = reference_data / "golden"
    potential = load_zip(golden / file)
    assert potential.num_parameters == {"mace": 2139152, "nequip": 1327792}[file.split("_")[0]]
    expected = np.load(golden / outputs)
    with jax.enable_x64(True):
        params = jax.tree.map(np.float64, potential.params)
        graph = golden_graph(expected, "mix15", golden / "inputs", potential.species)
        quickly_compiled = {"xla_backend_optimization_level": "0"}
        apply = jax.jit(potential.network.apply, compiler_options=quickly_compiled)
        energies = np.asarray(apply(params, graph))
    energies = potential.scaling_mean + potential.scaling_stdev * energies
    reference = expected["mix15/node_energies"] - potential.reference_energies(graph.species)
    np.testing.assert_allclose(energies, reference, rtol=0, atol=1e-8 * np.abs(reference).max())
