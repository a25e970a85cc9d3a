"""InstaDeep zips: both dialects load exactly, everything else is refused by name."""

import dataclasses
import functools
import importlib
import io
import json
import pickle
import zipfile
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ase.build import molecule
from model_files import make_potential, refused, zipped

from mlip_md.engine import Engine
from mlip_md.formats import instadeep
from mlip_md.formats.instadeep import load_zip, save_zip
from mlip_md.formats.soundness import flatten
from mlip_md.networks.config import MACEConfig, NequIPConfig, config_to_dict
from mlip_md.potential import Potential

ARCHITECTURES = ["mace", "nequip"]
QUICKLY_COMPILED = {"xla_backend_optimization_level": "0"}


@pytest.fixture(scope="module")
def potentials() -> dict[str, Potential]:
    return {name: make_potential(name) for name in ARCHITECTURES}


def parts_of(potential: Potential) -> tuple[dict, dict[str, np.ndarray]]:
    """Content of a version 0.1.x file, written here by hand from the format's description."""
    e0 = zip(potential.elements, potential.atomic_energies.tolist(), strict=True)
    hyperparameters = {
        "dataset_info": {
            "atomic_energies_map": {str(z): energy for z, energy in reversed(list(e0))},
            "cutoff_distance_angstrom": potential.cutoff,
            "avg_num_neighbors": potential.avg_num_neighbors,
            "avg_r_min_angstrom": potential.avg_r_min,
            "scaling_mean": potential.scaling_mean,
            "scaling_stdev": potential.scaling_stdev,
        },
        "config": config_to_dict(potential.config) | {"num_species": None},
        "predict_stress": False,
    }
    block = {"mace": "MaceBlock_0", "nequip": "NequipBlock_0"}[potential.config.architecture]
    arrays = {
        name.replace("params#", f"params#mlip_network#{block}#", 1): leaf
        for name, leaf in flatten(potential.params).items()
    }
    return hyperparameters, arrays


def npz(arrays: dict[str, np.ndarray]) -> bytes:
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def write_zip(path: Path, hyperparameters: dict, arrays: dict, **extra_members: bytes) -> Path:
    own = {"hyperparams.json": json.dumps(hyperparameters), "params.npz": npz(arrays)}
    path.write_bytes(zipped(own | extra_members))
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
    assert loaded.config == potentials["mace"].config
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


@pytest.mark.parametrize("value", [np.nan, 0.5, -0.0])
def test_copies_of_devices_that_differ_are_refused(potentials, tmp_path, value):
    hyperparameters, arrays = parts_of(potentials["mace"])
    arrays = {name: np.stack([a] * 3) for name, a in arrays.items()}
    first = next(name for name in arrays if name.endswith("embeddings"))
    arrays[first][:, -1, -1] = 0.0
    file = write_zip(tmp_path / "m.zip", hyperparameters, arrays)
    load_zip(file)
    arrays[first][-1, -1, -1] = value
    write_zip(file, hyperparameters, arrays)
    with refused(r"embeddings' has a leading device axis whose 3 copies differ"):
        load_zip(file)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, None),
        ("average", None),
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
    if expected is None:
        expected = potentials["mace"].atomic_energies
    np.testing.assert_array_equal(loaded.atomic_energies, expected)
    if isinstance(choice, dict):
        assert loaded.config.atomic_energies == dict(zip((1, 6, 8), expected, strict=True))
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
        (edit("config", activation="softsign"), "activation"),
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
        (edit("dataset_info", atomic_energies_map={"1": 1.0, "6": 2.0, "8": 1e308}), r"gies\[O\]"),
        (edit("config", atomic_energies={"2": -1e308}), r"atomic_energies\[8\] = -1e\+308"),
        (edit("config", gate_nodes=0), "gate_nodes = 0 .* true or false"),
        (edit("dataset_info", cutoff_distance_angstrom=0), "cutoff"),
        (edit("dataset_info", cutoff_distance_angstrom=999999.0), "from 0.1 to 100 Å"),
        (drop("dataset_info", "cutoff_distance_angstrom"), "graph_cutoff_angstrom = None"),
        (edit("dataset_info", avg_num_neighbors=-1.0), "avg_num_neighbors"),
        (edit("dataset_info", scaling_stdev=float("nan")), "NaN is not allowed"),
        (edit("dataset_info", scaling_stdev=1e308), r"scaling_stdev = 1e\+308"),
        (edit("dataset_info", scaling_stdev=0.0), "scaling_stdev = 0"),
        (edit("dataset_info", scaling_mean=1e308), r"scaling_mean = 1e\+308"),
        (edit("dataset_info", long_range_cutoff_angstrom=9.0), "long-range"),
        (edit(None, dataset_info=None), "dataset_info"),
        (edit(None, config=[]), "config"),
        (lambda h, a: a.popitem(), "missing"),
        (lambda h, a: a.update({"params#mlip_network#more": np.zeros(2)}), "more"),
        (lambda h, a: a.update({"params#other": np.zeros(2)}), "not a weight"),
        (first_array(lambda a: a * np.nan), "NaN"),
        (first_array(lambda a: a[..., :-1]), "shape"),
        (first_array(lambda a: a.astype(np.int32)), "dtype <i4"),
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
    with refused("dtype .O"):
        load_zip(file)
    members = {"hyperparams.json": json.dumps(hyperparameters), "params.npz": pickle.dumps(Trap())}
    file.write_bytes(zipped(members))
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
        file.write_bytes(zipped(dict.fromkeys(members, "{}")))
        with refused("no model of InstaDeep's mlip"):
            load_zip(file)
    file.write_bytes(b"no zip at all")
    with refused("damaged or no zip"):
        load_zip(file)
    file.write_bytes(b"")
    with refused("empty"):
        load_zip(file)
    with refused("No such file"):
        load_zip(tmp_path / "none.zip")
    with refused("folder"):
        load_zip(tmp_path)


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


def test_a_network_that_the_library_does_not_have_is_not_written(potentials, tmp_path):
    class OtherConfig(MACEConfig):
        architecture = "other"

    other = dataclasses.replace(
        potentials["mace"], config=OtherConfig(**dataclasses.asdict(potentials["mace"].config))
    )
    with refused("holds mace or nequip, not other"):
        save_zip(other, tmp_path / "m.zip")
    assert not list(tmp_path.iterdir())


LIBRARY_NETWORKS = {"mace": "Mace", "nequip": "Nequip"}


@pytest.fixture
def library(monkeypatch, loose_ranks):
    """The library that the format is from; its loader then only needs the shapes of weights."""
    models = pytest.importorskip("mlip.models_v1")
    predictor = models.ForceFieldPredictorV1
    init = predictor.init
    shapes_only = functools.partialmethod(lambda *a: jax.eval_shape(lambda: init(*a)))
    monkeypatch.setattr(predictor, "init", shapes_only)
    return models


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_library_reads_our_zip_to_the_same_energies(
    potentials, architecture, tmp_path, library
):
    from mlip.data import ChemicalSystem
    from mlip.data.helpers.dynamically_batch import dynamically_batch
    from mlip.graph import Graph
    from mlip.models.model_io import load_model_from_zip, save_model_to_zip

    potential = potentials[architecture]
    ours, theirs = tmp_path / "ours.zip", tmp_path / "theirs.zip"
    save_zip(potential, ours)
    model = load_model_from_zip(getattr(library, LIBRARY_NETWORKS[architecture]), ours)
    save_model_to_zip(theirs, model)
    again = load_zip(theirs)
    assert_same(again, potential)
    assert again.info["source"].startswith("InstaDeep mlip 0.2")

    ethanol = molecule("CH3CH2OH", vacuum=3.0)
    ethanol.rattle(0.1, seed=0)
    system = ChemicalSystem.from_ase_atoms(ethanol, get_property_fields=False)
    graph = Graph.from_chemical_system(system, potential.cutoff)
    n_edges = len(graph.senders) + 1
    with jax.enable_x64(True):
        batch = next(dynamically_batch([graph], n_node=10, n_edge=n_edges, n_graph=2))
        params = jax.tree.map(np.float64, model.params)
        predict = jax.jit(model.predictor.apply, compiler_options=QUICKLY_COMPILED)
        expected = jax.device_get(predict(params, batch).to_prediction())
    result = Engine(again, "float64").evaluate(ethanol.positions, ethanol.numbers)
    interaction = result.energy - again.atomic_energies[again.species(ethanol.numbers)].sum()
    assert abs(interaction) > 1.0
    assert result.energy == pytest.approx(expected.energy[0], rel=0, abs=1e-9)
    np.testing.assert_allclose(result.forces, expected.forces[:9], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("module", "network", "name"),
    [
        ("mlip.models", "Mace", "second-generation MACE"),
        ("mlip.models", "Nequip", "second-generation NequIP"),
        ("mlip.models", "Visnet", "ViSNet"),
        ("mlip.models", "Esen", "eSEN"),
        ("mlip.models_v1", "Visnet", "ViSNet"),
    ],
)
def test_other_networks_of_the_library_are_refused_by_name(tmp_path, module, network, name):
    pytest.importorskip("mlip")
    from mlip.data.dataset_info import DatasetInfo
    from mlip.models.model_io import save_model_to_zip

    info = DatasetInfo(atomic_energies_map={1: -13.6}, graph_cutoff_angstrom=5.0)
    network_class = getattr(importlib.import_module(module), network)
    network = network_class(network_class.Config(), info)
    predictor = SimpleNamespace(mlip_network=network)
    model = SimpleNamespace(
        dataset_info=info, config=network.config, predictor=predictor, params={"w": np.zeros(3)}
    )
    save_model_to_zip(tmp_path / "m.zip", model)
    with refused(name):
        load_zip(tmp_path / "m.zip")


@pytest.mark.parametrize("file", ["mace_card_v012.zip", "nequip_card_strong_v012.zip"])
def test_a_published_file_is_written_back_as_it_was(reference_data, file, tmp_path):
    published = reference_data / "golden" / file
    potential = load_zip(published)
    assert potential.num_parameters == {"mace": 2139152, "nequip": 1327792}[file.split("_")[0]]
    save_zip(potential, tmp_path / "m.zip")
    old, new = (dict(np.load(zip_member(f))) for f in (published, tmp_path / "m.zip"))
    assert old.keys() == new.keys()
    for name, array in old.items():
        np.testing.assert_array_equal(new[name], array)
        assert new[name].dtype == array.dtype
    old, new = (
        json.load(zip_member(f, "hyperparams.json")) for f in (published, tmp_path / "m.zip")
    )
    assert new["dataset_info"] == old["dataset_info"]
    assert new["predict_stress"] == old["predict_stress"]
    for name, value in old["config"].items():
        if name != "atomic_energies":  # null and "average" mean the same
            assert new["config"][name] == value, name


def zip_member(path: Path, name: str = "params.npz") -> io.BytesIO:
    with zipfile.ZipFile(path) as archive:
        return io.BytesIO(archive.read(name))
