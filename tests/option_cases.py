"""Hyperparameters, cutoffs and structures over which networks are compared with the library.

Positions, cells, cutoffs and weights have few digits, so that float32 holds them exactly: what
differs between precisions is then arithmetic, not another structure.
"""

import dataclasses
import math

import numpy as np
from neighbor_truth import brute_force
from reference_library import graph_of, joined

from mlip_md.networks.config import ACTIVATIONS, MAX_MONOMIALS, RADIAL_ENVELOPES

ELEMENTS = (1, 3, 5, 6, 7, 8, 9, 11, 14, 15, 16, 17, 19, 35, 53)
SYSTEMS = (
    "molecule",
    "slab",
    "triclinic",
    "left-handed",
    "isolated atom",
    "all elements",
    "at the cutoff",
)

OPTIONS = {
    "mace": {
        "num_layers": (1, 2, 3),
        "num_channels": (1, 2, 3),
        "l_max": (0, 1, 2, 3, 4),
        "node_symmetry": (None, 0, 1, 2, 3),
        "correlation": (1, 2, 3, 4),
        "readout_irreps": (("16x0e", "0e"), ("5x0e", "0e"), ("2x0e + 3x0e", "1x0e")),
        "num_readout_heads": (1, 2, 3),
        "include_pseudotensors": (False, True),
        "num_bessel": (1, 5, 8, 11),
        "activation": ACTIVATIONS,
        "radial_envelope": RADIAL_ENVELOPES,
        "symmetric_tensor_product_basis": (False, True),
        "atomic_energies": (None, "average", "zero", "by element"),
        "avg_num_neighbors": (None, 11.5),
        "avg_r_min": (None, 1.37),
        "gate_nodes": (False, True),
        "species_embedding_dim": (None, 1, 4),
    },
    "nequip": {
        "num_layers": (1, 2, 3, 4),
        "node_irreps": (
            "6x0e",
            "3x0e + 2x1o",
            "4x0e + 3x0o + 2x1e + 2x1o + 1x2e + 1x2o",
            "2x1o + 5x0e + 1x2e + 2x1e + 3x0o",  # in no order
            "2x0e + 2x1o + 4x0e + 1x1o + 3x0e + 2x0o + 1x1o",  # repeated, adjacent or not
            "3x0e + 2x0e + 2x1e + 1x1e + 1x2o",
            "4x0e + 2x0o + 2x1o + 1x3o",
            "4x0e + 2x3e + 1x4e",
            "2x0e + 2x0o + 3x0e + 2x1o + 1x1e + 1x1o",  # repeated, others between them
        ),
        "l_max": (0, 1, 2, 3, 4),
        "num_bessel": (1, 5, 8, 11),
        "radial_net_nonlinearity": ACTIVATIONS,
        "radial_net_n_hidden": (1, 8, 13),
        "radial_net_n_layers": (1, 2, 3),
        "radial_envelope": RADIAL_ENVELOPES,
        "scalar_mlp_std": (1.0, 4.0),
        "atomic_energies": (None, "average", "zero", "by element"),
        "avg_num_neighbors": (None, 11.5),
    },
}
"""Every option of the networks and the values that cases take."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A network to compare.

    Attributes:
        architecture: "mace" or "nequip".
        hyperparameters: those that differ from the defaults of the library.
        cutoff: Å.
        seed: of statistics, weights and structures.
    """

    architecture: str
    hyperparameters: dict
    cutoff: float = 4.25
    seed: int = 0

    @property
    def statistics(self):
        """What the library knows of a training set; all values matter and hide nothing."""
        rng = np.random.default_rng((self.seed, 1))
        energies = rng.normal(size=len(ELEMENTS)).astype(np.float32)
        return {
            "atomic_energies_map": dict(zip(ELEMENTS, map(float, energies), strict=True)),
            "graph_cutoff_angstrom": self.cutoff,
            "avg_num_neighbors": float(rng.uniform(5, 15)),
            "avg_r_min_angstrom": None if self.seed % 4 == 3 else float(rng.uniform(0.7, 1.6)),
            "scaling_mean": 0.25,
            "scaling_stdev": 1.75,
        }

    @property
    def fields(self):
        """Hyperparameters as the library takes them: E0 by index of the species."""
        fields = dict(self.hyperparameters)
        if fields.get("atomic_energies") == "by element":
            fields["atomic_energies"] = {i: 0.125 * (7 - i) for i in range(len(ELEMENTS) - 1)}
        return fields

    def graphs(self, skin=0.0):
        """Structures as one padded graph, and the rows of each; edges up to cutoff + skin."""
        systems = structures(self.cutoff, self.seed)
        graphs = []
        for positions, cell, pbc, species in systems.values():
            rows, _ = brute_force(positions, cell, pbc, self.cutoff + skin)
            graphs.append(graph_of(positions, cell, species, rows[:, 0], rows[:, 1], rows[:, 2:]))
        sizes = np.cumsum([0, *(graph.n_nodes for graph in graphs)])
        n_edges = sum(graph.n_edges for graph in graphs) + 2
        batch = joined(graphs, int(sizes[-1]) + 2, n_edges, len(graphs) + 1)
        slices = {name: slice(*sizes[i : i + 2]) for i, name in enumerate(systems)}
        return batch, slices


def structures(cutoff, seed):
    """(positions, cell, pbc, species) by the names of SYSTEMS."""
    rng = np.random.default_rng((seed, 2))

    def few_digits(array):
        return np.rint(np.asarray(array) * 1024) / 1024

    def scattered(n, spacing):
        sites = np.array(list(np.ndindex(3, 3, 2) if n > 8 else np.ndindex(2, 2, 2)), float)
        return spacing * rng.permutation(sites)[:n] + rng.uniform(-0.2, 0.2, (n, 3))

    def some_species(n):
        return rng.integers(0, len(ELEMENTS), n)

    def random_box(lengths, skew):
        return np.diag(lengths) + rng.uniform(-skew, skew, (3, 3))

    none, everywhere = np.zeros((3, 3)), (True, True, True)
    cell = few_digits(random_box([2.6, 3.3, 3.8], 0.5))
    sites = np.array([[0.0, 0.1, 0.0], [1.2, 0.9, 0.4], [1.7, 1.8, 2.0]])
    atoms = few_digits(sites + rng.uniform(-0.2, 0.2, (3, 3)))
    kinds = some_species(3)
    slab = few_digits(random_box([3.6, 4.1, 14.0], 0.3))
    end = few_digits([[0, 0, 0], [cutoff, 0, 0], [0.4 * cutoff, 0.9, 0.3], [-cutoff, 0, 0]])
    return {
        "molecule": (few_digits(scattered(6, 1.3)), none, False, some_species(6)),
        "slab": (few_digits(scattered(3, 1.4)), slab, (True, True, False), some_species(3)),
        "triclinic": (atoms, cell, everywhere, kinds),
        "left-handed": (atoms, cell[[1, 0, 2]], everywhere, kinds),
        "isolated atom": (np.zeros((1, 3)), none, False, some_species(1)),
        "all elements": (few_digits(scattered(15, 1.6)), none, False, rng.permutation(15)),
        "at the cutoff": (end, none, False, some_species(4)),
    }


def random_case(architecture, seed):
    """A case of random values of all options, not too expensive for the library, nor void."""
    rng = np.random.default_rng((seed, 3))
    options = OPTIONS[architecture]
    while True:
        values = {name: choices[rng.integers(len(choices))] for name, choices in options.items()}
        if _alive(values) if architecture == "nequip" else _affordable(values):
            return Case(architecture, values, float(rng.integers(24, 50)) / 8, seed)


def _alive(values):
    """Whether NequIP has more hidden units than one, which relu can silence with all forces.

    A sigmoid saturates instead: what is left of the forces has fewer digits than float32, in the
    library as well.
    """
    silenced = values["radial_net_nonlinearity"] in ("relu", "sigmoid")
    return not silenced or values["radial_net_n_hidden"] > 1


def _affordable(values):
    """Whether hyperparameters of MACE are allowed and their couplings fit into the library."""
    l_max, order = values["l_max"], values["correlation"]
    dimension = (l_max + 1) ** 2 * (2 if values["include_pseudotensors"] else 1)
    allowed = math.comb(dimension + order - 1, order) < MAX_MONOMIALS
    return allowed and (values["node_symmetry"] or 0) <= l_max and dimension**order < 10_000


def _mace(seed=0, **values):
    return Case("mace", values, seed=seed)


def _nequip(irreps, **values):
    return Case("nequip", {"node_irreps": OPTIONS["nequip"]["node_irreps"][irreps], **values})


SHORT = {
    "scalars only": _mace(
        seed=1,
        num_layers=1,
        num_channels=1,
        l_max=0,
        node_symmetry=0,
        correlation=1,
        readout_irreps=("5x0e", "0e"),
        num_readout_heads=1,
        include_pseudotensors=False,
        num_bessel=1,
        activation="none",
        radial_envelope="polynomial_envelope",
        symmetric_tensor_product_basis=False,
        atomic_energies=None,
        avg_num_neighbors=None,
        avg_r_min=None,
        gate_nodes=False,
        species_embedding_dim=None,
    ),
    "third order": _mace(
        num_layers=2,
        num_channels=2,
        l_max=2,
        node_symmetry=1,
        correlation=3,
        readout_irreps=("16x0e", "0e"),
        num_readout_heads=2,
        num_bessel=5,
        activation="silu",
        radial_envelope="soft_envelope",
        atomic_energies="average",
        avg_num_neighbors=11.5,
        avg_r_min=1.37,
        gate_nodes=True,
        species_embedding_dim=4,
    ),
    "symmetric basis": _mace(
        num_channels=2,
        l_max=2,
        node_symmetry=2,
        correlation=3,
        num_readout_heads=3,
        num_bessel=8,
        activation="tanh",
        symmetric_tensor_product_basis=True,
        atomic_energies="zero",
    ),
    "fourth order": _mace(
        num_channels=2,
        l_max=1,
        node_symmetry=None,
        correlation=4,
        activation="sigmoid",
        species_embedding_dim=1,
    ),
    "fourth order, symmetric": _mace(
        num_channels=3,
        l_max=1,
        correlation=4,
        activation="elu",
        radial_envelope="soft_envelope",
        symmetric_tensor_product_basis=True,
    ),
    "third degree": _mace(
        num_channels=2,
        l_max=3,
        node_symmetry=3,
        correlation=2,
        readout_irreps=("2x0e + 3x0e", "1x0e"),
        num_bessel=11,
        activation="relu",
        atomic_energies="by element",
    ),
    "fourth degree": _mace(
        num_channels=2, l_max=4, node_symmetry=1, correlation=1, activation="swish"
    ),
    "three layers": _mace(num_layers=3, num_channels=2, l_max=1, correlation=2, gate_nodes=True),
    "pseudotensors": _mace(num_channels=2, l_max=2, correlation=2, include_pseudotensors=True),
    "one block": _nequip(
        0,
        num_layers=1,
        l_max=0,
        num_bessel=1,
        radial_net_nonlinearity="none",
        radial_net_n_hidden=1,
        radial_net_n_layers=1,
        radial_envelope="polynomial_envelope",
        scalar_mlp_std=1.0,
        atomic_energies=None,
        avg_num_neighbors=None,
    ),
    "two blocks": _nequip(
        1,
        num_layers=2,
        l_max=4,
        num_bessel=5,
        radial_net_nonlinearity="silu",
        radial_net_n_hidden=13,
        radial_net_n_layers=3,
        radial_envelope="soft_envelope",
        atomic_energies="average",
        avg_num_neighbors=11.5,
    ),
    "six blocks": _nequip(
        2,
        num_layers=4,
        l_max=2,
        num_bessel=8,
        radial_net_nonlinearity="swish",
        radial_net_n_hidden=8,
        radial_net_n_layers=2,
        scalar_mlp_std=4.0,
        atomic_energies="zero",
    ),
    "unsorted blocks": _nequip(
        3, num_layers=3, l_max=1, num_bessel=11, radial_net_nonlinearity="elu"
    ),
    "repeated blocks": _nequip(
        4, num_layers=3, l_max=1, radial_net_nonlinearity="tanh", atomic_energies="by element"
    ),
    "adjacent blocks": _nequip(5, num_layers=3, l_max=2, radial_net_nonlinearity="sigmoid"),
    "a block out of reach": _nequip(6, num_layers=2, l_max=1, radial_net_nonlinearity="relu"),
    "high degrees": _nequip(7, num_layers=2, l_max=3),
    "separated blocks": _nequip(8, num_layers=3, l_max=1),
}
"""Few small cases by name that take every value of every option at least once."""
