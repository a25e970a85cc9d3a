"""A small labeled data set and recipe, and the numbers of the reference training traces."""

import itertools
import json
from pathlib import Path

import h5py
import numpy as np

from mlip_md.graph import Graph
from mlip_md.potential import Prediction
from mlip_md.trainer.data import Batch
from mlip_md.trainer.recipe import Recipe

E0 = {1: -13.6, 6: -1030.5, 8: -2043.9}
FLIP = 3


def molecules(count, seed=0):
    """Random chains of 3 to 7 atoms with Morse energies and forces, each its own group."""
    generator = np.random.default_rng(seed)
    for _ in range(count):
        n = generator.integers(3, 8)
        numbers = generator.choice([1, 6, 8], n)
        numbers[:3] = 1, 6, 8
        steps = generator.normal(size=(n, 3))
        steps /= np.linalg.norm(steps, axis=1, keepdims=True)
        positions = np.cumsum(1.3 * steps + [0.8, 0, 0], axis=0)
        energy, forces = sum(E0[int(z)] for z in numbers), np.zeros((n, 3))
        for i, j in itertools.combinations(range(n), 2):
            vector = positions[j] - positions[i]
            r = np.linalg.norm(vector)
            decay = np.exp(-1.2 * (r - 1.5))
            energy += (1 - decay) ** 2 - 1
            push = 2 * 1.2 * (1 - decay) * decay * vector / r
            forces[i] += push
            forces[j] -= push
        yield numbers, positions, energy, forces


def write_data_set(path, count=60, seed=0):
    """The molecules as a curated HDF5 file; the name carries the subset."""
    with h5py.File(path, "w") as file:
        for k, (numbers, positions, energy, forces) in enumerate(molecules(count, seed)):
            group = file.create_group(f"molecule-{k:03d}")
            group["elements"], group["positions"], group["forces"] = numbers, positions, forces
            group.attrs["energy"], group.attrs["charge"] = energy, 0
            group["smiles"] = f"molecule {k:03d}"  # is none, so chains of one graph stay apart
    return path


def weights(first, second, flip=FLIP):
    return {"weight": [{"from_epoch": 0, "value": first}, {"from_epoch": flip, "value": second}]}


def small_recipe(path, **sections):
    """A run of a few epochs of six batches, whose loss weights are exchanged in epoch 3."""
    values = {
        "name": "small",
        "seed": 3,
        "model": {
            "kind": "mace", "num_layers": 1, "num_channels": 4, "l_max": 1, "node_symmetry": 1,
            "correlation": 1, "readout_irreps": ["4x0e", "0e"], "num_bessel": 4,
        },
        "data": {
            "path": str(path), "cutoff": 4.0, "batch_size": 8, "max_n_node": 7, "max_n_edge": 21,
            "curate": None,
            "split": {"train": 0.8, "validation": 0.1, "test": 0.1},
        },
        "loss": {"kind": "mse", "energy": weights(40.0, 1000.0), "forces": weights(1000.0, 40.0)},
        "optimizer": {"warmup_steps": 3, "transition_steps": 20, "final_learning_rate": 1e-3},
        "train": {"epochs": 4, "ema_decay": 0.9},
        "checkpoint": {"every_steps": 4},
        "log": {"every_steps": 2, "plots": False},
    }  # fmt: skip
    for name, changes in sections.items():
        if isinstance(changes, dict):
            values[name] = {**values[name], **changes} if name in values else changes
        else:
            values[name] = changes
    return Recipe.model_validate(values)


def golden():
    """Reference numbers of losses and of optimizer steps, made with InstaDeep's mlip 0.1.2."""
    folder = Path(__file__).parent / "data"
    return np.load(folder / "training_golden.npz"), json.loads(
        (folder / "training_golden.json").read_text(encoding="utf-8")
    )


def golden_batch(arrays):
    """The prediction, batch and structure weights of the reference losses."""
    n_node = arrays["loss_n_node"][:4]
    n_nodes, n_graphs = int(n_node.sum()), 4
    graph = Graph(
        positions=np.zeros((n_nodes, 3), np.float32),
        species=np.zeros(n_nodes, np.int32),
        cell=np.zeros((n_graphs, 3, 3), np.float32),
        senders=np.zeros(1, np.int32),
        receivers=np.zeros(1, np.int32),
        shifts=np.zeros((1, 3), np.int32),
        node_graph=np.repeat(np.arange(n_graphs), n_node),
        node_mask=np.arange(n_nodes) < n_node[:3].sum(),
        edge_mask=np.zeros(1, bool),
        graph_mask=np.arange(n_graphs) < 3,
    )
    batch = Batch(graph, arrays["loss_e_ref"][:4], arrays["loss_f_ref"])
    energies, forces = arrays["loss_e_pred"][:4], arrays["loss_f_pred"]
    return Prediction(energies, None, forces, None), batch, arrays["loss_weight"][:4]


def random_batch():
    """The same of numbers that mean nothing: three structures and padding, errors everywhere."""
    rng = np.random.default_rng(0)
    n_node = np.array([3, 2, 4, 3])
    forces = [rng.normal(size=(n_node.sum(), 3)).astype(np.float32) for _ in range(2)]
    for array in forces:
        array[n_node[:3].sum() :] = 0
    energies = [np.append(rng.normal(size=3), 0).astype(np.float32) for _ in range(2)]
    return golden_batch({
        "loss_n_node": n_node, "loss_weight": np.ones(4, np.float32),
        "loss_e_ref": energies[0], "loss_e_pred": energies[1],
        "loss_f_ref": forces[0], "loss_f_pred": forces[1],
    })  # fmt: skip


def golden_with_stress(arrays, error):
    """The same with stresses that are off by ``error`` (4, 3, 3); the second has no label."""
    prediction, batch, _ = golden_batch(arrays)
    reference = np.arange(36, dtype=np.float32).reshape(4, 3, 3)
    prediction = prediction._replace(stress=reference + error)
    return prediction, batch.replace(stress=reference, stress_mask=np.arange(4) != 1)
