"""Training that starts from a potential: its network, weights and elements, and what E0 become.

The parent decides on the network, the cutoff and everything that its weights were made with. The
result knows the elements of both: those of the parent keep its weights, new ones begin as copies of
their nearest relatives or with random numbers.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mlip_md.elements import symbol
from mlip_md.errors import ConfigError
from mlip_md.formats.soundness import flatten, unflatten
from mlip_md.networks import MACEConfig, build_network, draw_weights
from mlip_md.networks.config import config_to_dict
from mlip_md.potential import Params, Potential
from mlip_md.trainer.data import GraphStore, TrainingData
from mlip_md.trainer.data.statistics import fit_atomic_energies
from mlip_md.trainer.recipe import Recipe, find_differences

logger = logging.getLogger(__name__)

NOBLE_GASES = (0, 2, 10, 18, 36, 54, 86, 118)
"""Last atomic numbers of the periods."""


def adopt_network(recipe: Recipe, parent: Potential) -> tuple[Recipe, list[str]]:
    """The recipe with the parent's network and cutoff.

    Args:
        recipe: of the fine-tuning.
        parent: the potential to start from.

    Returns:
        The recipe, and one line for every value of it that the parent decides otherwise.
    """
    network = config_to_dict(parent.config)
    network["avg_num_neighbors"] = parent.config.avg_num_neighbors or parent.avg_num_neighbors
    if isinstance(parent.config, MACEConfig) and parent.config.avg_r_min is None:
        network["avg_r_min"] = parent.avg_r_min
    network["atomic_energies"] = recipe.plain()["model"]["atomic_energies"]
    model = {"kind": parent.config.architecture, **network}
    data = recipe.data.model_copy(update={"cutoff": parent.cutoff})
    adopted = recipe.model_copy(update={"model": model, "data": data})
    before, now = ({"model": r.plain()["model"], "data": {"cutoff": r.data.cutoff}}
                   for r in (recipe, adopted))  # fmt: skip
    changes = find_differences(before, now)
    if "model.kind" in changes:  # the rows of another network say nothing of this one
        changes = {k: v for k, v in changes.items() if k in ("model.kind", "data.cutoff")}
    return adopted, [
        f"{name} is the parent's, {ours}, not the recipe's, {theirs}"
        for name, (theirs, ours) in changes.items()
        if name not in ("model.avg_num_neighbors", "model.avg_r_min")
    ]


def adopt_elements(data: TrainingData, parent: Potential, keep: bool) -> TrainingData:
    """The data with the elements of both, and E0.

    Args:
        data: of the fine-tuning, with its own elements and E0.
        parent: the potential to start from.
        keep: keep the parent's E0, and fit those of new elements to what these leave of the
            energies; else E0 are those of the data, and the parent's of elements they lack.
    """
    statistics = data.statistics
    elements = tuple(sorted({*statistics.elements, *parent.elements}))
    parents = dict(zip(parent.elements, parent.atomic_energies.tolist(), strict=True))
    own = dict(zip(statistics.elements, statistics.atomic_energies.tolist(), strict=True))
    new = [z for z in elements if z not in parents]
    source = "the parent's"
    if keep:
        own = _fit_new(data.train, parents, new) if new else {}
        energies = {**own, **parents}
        if new:
            source += f"; of {_names(new)} fitted to the data"
    else:
        energies = {**parents, **own}
        lacking = [z for z in elements if z not in own]
        source = statistics.atomic_energies_source
        if lacking:
            source += f"; of {_names(lacking)} the parent's"
    values = np.array([energies[z] for z in elements])

    def adopted(store: GraphStore | None) -> GraphStore | None:
        return None if store is None else store.with_elements(elements).with_atomic_energies(values)

    changed = dataclasses.replace(
        statistics,
        elements=elements,
        atomic_energies=values,
        atomic_energies_source=source,
        undetermined=() if keep else statistics.undetermined,
        avg_num_neighbors=parent.avg_num_neighbors,
        avg_r_min=parent.avg_r_min,
    )
    stores: dict[str, Any] = {
        name: adopted(getattr(data, name)) for name in ("train", "validation", "test")
    }
    if data.replay is not None:  # of the parent's method, whatever E0 the new data have
        theirs = data.replay.with_elements(elements)
        stores["replay"] = theirs.with_atomic_energies({**energies, **parents})
    return dataclasses.replace(data, statistics=changed, **stores)


def _fit_new(store: GraphStore, parents: dict[int, float], new: list[int]) -> dict[int, float]:
    known = [k for k, z in enumerate(store.elements) if z in parents]
    other = [k for k, z in enumerate(store.elements) if z not in parents]
    e0 = np.array([parents[store.elements[k]] for k in known])
    left = store.energy - store.compositions[:, known] @ e0
    fitted, open_ones = fit_atomic_energies(store.compositions[:, other], left, new)
    if open_ones:
        raise ConfigError(
            f"the data do not determine E0 of {_names(new)} beside the parent's (any multiple of "
            f"{', '.join(open_ones)}); give them in model.atomic_energies, or set "
            "start.atomic_energies to refit"
        )
    return dict(zip(new, fitted.tolist(), strict=True))


def _names(numbers: Sequence[int]) -> str:
    return " ".join(symbol(z) for z in numbers)


def starting_weights(
    parent: Potential, elements: Sequence[int], nearest: bool, key: jax.Array, graph: Any
) -> Params:
    """The parent's weights for more elements.

    Args:
        parent: the potential to start from.
        elements: atomic numbers, the parent's among them, ascending.
        nearest: new elements begin as copies of their nearest relatives; else at random.
        key: random key of those.
        graph: any graph, for shapes and types.

    Returns:
        Weights of the parent's network with so many species, in float32; for the parent's
        elements they give the parent's numbers.
    """
    if tuple(elements) == parent.elements:
        return jax.tree_util.tree_map(lambda leaf: np.asarray(leaf, np.float32), parent.params)
    before, now = len(parent.elements), len(elements)
    network = build_network(
        parent.config, num_species=now, elements=elements, cutoff=parent.cutoff,
        avg_num_neighbors=parent.avg_num_neighbors, avg_r_min=parent.avg_r_min,
        radial_scale=parent.radial_scale,
    )  # fmt: skip
    drawn = flatten(jax.device_get(draw_weights(network, parent.config, key, graph)))
    # names of weights state the number of species behind a bracket that tells them apart
    known = {name.partition("]")[0]: name for name in flatten(parent.params)}
    values = flatten(parent.params)
    places = [list(parent.elements).index(nearest_element(z, parent.elements)) for z in elements]
    old = [k for k, z in enumerate(elements) if z in parent.elements]
    weights = {}
    for name, fresh in drawn.items():
        mine = np.asarray(values[known[name.partition("]")[0]]], np.float32)
        if mine.shape != fresh.shape:
            [axis] = [k for k, n in enumerate(fresh.shape) if n != mine.shape[k]]
            # where the number stands in the name, and for embeddings, layers divide by its root
            divided = name not in values or name.endswith("#embeddings")
            mine = (math.sqrt(now / before) if divided else 1.0) * np.take(mine, places, axis)
            if not nearest:
                drawn_rows = np.moveaxis(np.array(fresh), axis, 0)
                drawn_rows[old] = np.moveaxis(mine, axis, 0)[old]
                mine = np.moveaxis(drawn_rows, 0, axis)
        weights[name] = np.asarray(mine, np.float32)
    return unflatten(weights)


def nearest_element(number: int, known: Sequence[int]) -> int:
    """The most similar of the known elements: of the same group, else next in atomic number."""

    def distance(other: int) -> tuple[bool, int]:
        (period1, group1), (period2, group2) = map(place_in_table, (number, other))
        same = group1 == group2
        return not same, abs(period1 - period2) if same else abs(number - other)

    return min(known, key=distance)


def place_in_table(number: int) -> tuple[int, int]:
    """Period and group (1-18; 3 for lanthanides and actinides) of an atomic number."""
    period = next(k for k, last in enumerate(NOBLE_GASES) if number <= last)
    column, length = number - NOBLE_GASES[period - 1], NOBLE_GASES[period] - NOBLE_GASES[period - 1]
    if number == 2:
        return 1, 18
    if column <= 2:
        return period, column
    if length == 32 and column <= 17:
        return period, 3
    return period, column + 18 - length


def describe_parent(parent: Potential) -> dict[str, Any]:
    """What a fine-tuned potential records of its parent, its licence note included."""
    info = parent.info
    kept = {k: info[k] for k in ("name", "description", "licence", "license") if info.get(k)}
    return {**kept, "sha256": parent.sha256}
