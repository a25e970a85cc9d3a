"""What a potential is: a network, its weights, its elements and their reference energies.

Energies are split in two. The network's *interaction energy* is computed on the device in the
working precision; the atoms' *reference energies* E0 are summed in float64 on the host, because
totals of 10^4-10^7 eV leave float32 no digits for the interaction.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from mlip_md.elements import symbol
from mlip_md.errors import UnsupportedElementError
from mlip_md.graph import Graph, sum_per_graph
from mlip_md.networks import MACEConfig, NetworkConfig, build_network, scale_basis
from mlip_md.networks.config import CUTOFF, ENERGY, NEIGHBORS, R_MIN, SCALING, config_to_dict
from mlip_md.networks.radial_scale import RadialScale
from mlip_md.rows import take_rows

Params = Mapping[str, Any]
Apply = Callable[[Params, Graph], jax.Array]


class Prediction(NamedTuple):
    """What a network says of a graph; rows of padding are zero.

    Attributes:
        energy: (n_graphs,) eV, interaction energy without E0.
        node_energies: (n_nodes,) eV, its share per atom.
        forces: (n_nodes, 3) eV/Å, minus the gradient of the energy.
        stress: (n_graphs, 3, 3) eV/Å³, dE/dε / |V|, positive under tension (ASE's sign);
            zero for structures without volume.
    """

    energy: jax.Array
    node_energies: jax.Array
    forces: jax.Array
    stress: jax.Array


def strained(graph: Graph, strain: jax.Array) -> Graph:
    """Deform positions and cells by symmetric strains ε (n_graphs, 3, 3): r -> r (1 + ε)."""
    symmetric = 0.5 * (strain + jnp.swapaxes(strain, 1, 2))
    positions = jnp.asarray(graph.positions)
    node_strain = take_rows(symmetric, jnp.asarray(graph.node_graph))
    positions = positions + jnp.einsum("ni,nij->nj", positions, node_strain, precision="highest")
    cell = graph.cell + jnp.einsum("gai,gij->gaj", graph.cell, symmetric, precision="highest")
    return dataclasses.replace(graph, positions=positions, cell=cell)


def predict(
    apply: Apply,
    params: Params,
    graph: Graph,
    *,
    scaling_mean: float = 0.0,
    scaling_stdev: float = 1.0,
) -> Prediction:
    """Interaction energies, forces and stresses from one gradient over (positions, strain).

    Args:
        apply: the network, ``apply(params, graph) -> (n_nodes,)``.
        params: its weights, in the dtype of the graph's positions.
        graph: structures, padded or not.
        scaling_mean: eV, added to every node energy.
        scaling_stdev: factor on every node energy.

    Returns:
        The prediction. Works under ``jit`` and inside a further gradient (training on forces).
    """

    def total(positions: jax.Array, strain: jax.Array) -> tuple[jax.Array, jax.Array]:
        node_energies = apply(
            params, strained(dataclasses.replace(graph, positions=positions), strain)
        )
        node_energies = scaling_mean + scaling_stdev * node_energies
        node_energies = jnp.where(graph.node_mask, node_energies, 0.0)
        return jnp.sum(node_energies), node_energies

    positions = jnp.asarray(graph.positions)
    strain = jnp.zeros((graph.n_graphs, 3, 3), positions.dtype)
    gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, node_energies), (d_positions, d_strain) = gradient(positions, strain)
    volume = jnp.abs(jnp.linalg.det(jnp.asarray(graph.cell)))[:, None, None]
    stress = jnp.where(volume > 0, d_strain / jnp.where(volume > 0, volume, 1.0), 0.0)
    forces = jnp.where(jnp.asarray(graph.node_mask)[:, None], -d_positions, 0.0)
    return Prediction(sum_per_graph(node_energies, graph), node_energies, forces, stress)


@dataclasses.dataclass(frozen=True, eq=False)
class Potential:
    """A trained potential.

    Attributes:
        config: hyperparameters of its network.
        params: weights as a nested dict of NumPy arrays, in float32 or, converted, in float64.
        elements: atomic numbers, ascending; an atom's species is its element's index here.
        atomic_energies: (len(elements),) float64 eV, E0 by species.
        cutoff: Å.
        avg_num_neighbors: mean number of neighbors in the training set.
        avg_r_min: Å, mean shortest distance in the training set, or None.
        scaling_mean: eV, added to every node energy.
        scaling_stdev: factor on every node energy.
        radial_scale: factor on MACE's radial basis as the potential's file states it; None for what
            ``avg_r_min`` gives by rule. It may differ from that in rounding only, and is no part
            of the identity.
        info: provenance as plain JSON values (name, description, data set, training).

    What its numbers may be stands at their fields; ``mlip_md.formats.soundness`` checks it, because
    a potential is made of unchecked parts before its file is refused.
    """

    config: NetworkConfig
    params: Params
    elements: tuple[int, ...]
    atomic_energies: np.ndarray
    cutoff: float = dataclasses.field(metadata={"allowed": CUTOFF})
    avg_num_neighbors: float = dataclasses.field(metadata={"allowed": NEIGHBORS})
    avg_r_min: float | None = dataclasses.field(
        default=None, metadata={"allowed": R_MIN, "none": ""}
    )
    scaling_mean: float = dataclasses.field(default=0.0, metadata={"allowed": ENERGY})
    scaling_stdev: float = dataclasses.field(default=1.0, metadata={"allowed": SCALING})
    info: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    radial_scale: RadialScale | None = None

    def __repr__(self) -> str:
        name = f" {self.info['name']!s:.60}" if self.info.get("name") else ""
        elements = " ".join(symbol(z) for z in self.elements)
        return (
            f"<Potential{name}: {self.config.architecture}, {elements}, cutoff {self.cutoff} Å, "
            f"{self.num_parameters:,} weights>"
        )

    @functools.cached_property
    def network(self) -> nn.Module:
        """The flax module that ``params`` belong to."""
        return build_network(
            self.config,
            num_species=len(self.elements),
            elements=self.elements,
            cutoff=self.cutoff,
            avg_num_neighbors=self.avg_num_neighbors,
            avg_r_min=self.avg_r_min,
            radial_scale=self.radial_scale,
        )

    @functools.cached_property
    def used_radial_scale(self) -> RadialScale | None:
        """The factor on the radial basis that its network takes; None if it takes none."""
        if not isinstance(self.config, MACEConfig):
            return None
        return self.radial_scale or scale_basis(self.config, self.cutoff, self.avg_r_min)

    @property
    def num_parameters(self) -> int:
        """Number of trainable parameters."""
        return sum(int(np.size(leaf)) for leaf in jax.tree_util.tree_leaves(self.params))

    def species(self, atomic_numbers: np.ndarray) -> np.ndarray:
        """Species indices (n,) int32 of atomic numbers (n,).

        Raises:
            UnsupportedElementError: if an element is not among ``elements``.
        """
        numbers = np.asarray(atomic_numbers)
        elements = np.asarray(self.elements)
        index = np.clip(np.searchsorted(elements, numbers), 0, len(elements) - 1)
        unknown = sorted({int(z) for z in numbers[elements[index] != numbers]})
        if unknown:
            raise UnsupportedElementError(
                f"the potential does not know {', '.join(symbol(z) for z in unknown)}; it was made "
                f"for {', '.join(symbol(z) for z in self.elements)}"
            )
        return index.astype(np.int32)

    def reference_energies(self, species: np.ndarray) -> np.ndarray:
        """E0 (n,) float64 eV of atoms given by species index (n,)."""
        return np.asarray(self.atomic_energies, np.float64)[np.asarray(species)]

    def description(self) -> dict[str, Any]:
        """Everything but the weights, as plain JSON values."""
        return {
            "architecture": self.config.architecture,
            "hyperparameters": config_to_dict(self.config),
            "elements": list(self.elements),
            "atomic_energies": [float(e) for e in self.atomic_energies],
            "cutoff": self.cutoff,
            "avg_num_neighbors": self.avg_num_neighbors,
            "avg_r_min": self.avg_r_min,
            "scaling_mean": self.scaling_mean,
            "scaling_stdev": self.scaling_stdev,
            "info": dict(self.info),
        }

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of the description and of every weight: the potential's identity.

        Systems and restart files hold it. It names weights as the published files and version
        0.1.0 did, below one module more, so that it never changes with our own names.
        """
        digest = hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode())
        root = "['params']", f"['params']['{self.config.published_block}']"
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            array = np.asarray(leaf, order="C")
            name = jax.tree_util.keystr(path).replace(*root, 1)
            digest.update(f"{name}{array.dtype}{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()
