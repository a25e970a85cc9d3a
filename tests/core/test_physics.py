"""Physics gates: what every potential obeys, whatever its weights.

A gate measures how far a potential is from a law (``Report.below``: deviation and tolerance) and
how large the effects are without which the law would hold for nothing (``Report.floor``). Networks
have random weights made so strong that forces are some eV/Å. The last tests run all gates on
models that break laws: a gate that cannot fail proves nothing.
"""

import copy
import functools
import itertools
import re
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule as g2_molecule
from ase.units import fs, kB
from reference_library import jit

import mlip_md
from mlip_md import bundled
from mlip_md.engine import DTYPES, Engine, Result, Runtime
from mlip_md.graph import Graph
from mlip_md.neighbors import Capacities, Shape
from mlip_md.networks import MACEConfig, NequIPConfig, TorchMACEConfig, build_network
from mlip_md.potential import Potential
from mlip_md.structure import check_structure, list_edges

ELEMENTS = (1, 6, 7, 8)
ATOMIC_ENERGIES = np.array([-13.6, -1029.0, -1485.0, -2042.0])
CUTOFF = 3.6
CONFIGS = {
    "mace": MACEConfig(
        num_layers=2,
        num_channels=8,
        l_max=2,
        node_symmetry=1,
        correlation=2,
        readout_irreps=("8x0e", "0e"),
    ),
    # Four layers are the fewest in which an irrep of unnatural parity (1e) reaches the energy.
    "nequip": NequIPConfig(
        num_layers=4,
        node_irreps="8x0e + 4x0o + 4x1e + 4x1o",
        l_max=1,
        radial_net_n_hidden=16,
    ),
    "mace-torch": TorchMACEConfig(
        num_layers=2,
        num_channels=8,
        l_max=2,
        node_symmetry=1,
        correlation=2,
        first_interaction="RealAgnosticDensityInteractionBlock",
        interaction="RealAgnosticDensityResidualInteractionBlock",
        readout_width=8,
        distance_transform="agnesi",
    ),
}
# In float32 the differences of energies that large are no derivatives.
CONFIGS["mace-torch, ZBL"] = replace(CONFIGS["mace-torch"], pair_repulsion=True)
RADIAL_STRENGTH = {"mace": 1.0, "nequip": 4.0, "mace-torch": 0.6, "mace-torch, ZBL": 0.6}
"""Factor on the radial networks of random weights: forces of some eV/Å."""
ROUNDING = 128 * 2.0**-24
"""Part of the largest component by which forces and stresses in float32 may be off.

Each is a sum of contributions that have gone through some hundred rounded operations (2^-24 each)
and that cancel in part. It counts for more than the tolerance from 13 eV/Å on.
"""
NAMES = (*CONFIGS, *(name for name in ("organics-gfn2",) if name in bundled.names()))


def random_potential(name):
    """A small network for H, C, N, O with strong random weights."""
    config = CONFIGS[name]
    network = build_network(
        config,
        num_species=len(ELEMENTS),
        elements=ELEMENTS,
        cutoff=CUTOFF,
        avg_num_neighbors=8.0,
        avg_r_min=1.0,
    )
    edge = np.zeros(2, np.int32)
    graph = Graph(
        positions=np.eye(2, 3, dtype=np.float32),
        species=np.zeros(2, np.int32),
        cell=np.zeros((1, 3, 3), np.float32),
        senders=edge,
        receivers=edge,
        shifts=np.zeros((2, 3), np.int32),
        node_graph=edge,
        node_mask=np.ones(2, bool),
        edge_mask=np.ones(2, bool),
        graph_mask=np.ones(1, bool),
    )
    shapes = jax.eval_shape(network.init, jax.random.key(0), graph)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        weights = rng.standard_normal(leaf.shape)
        if "MLP_0" in jax.tree_util.keystr(path):  # NequIP divides by no fan-in where it uses these
            weights *= 2.0 / np.sqrt(leaf.shape[0])
        return weights.astype(np.float32)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    return Potential(
        config=config,
        params=strengthened(params, RADIAL_STRENGTH[name]),
        elements=ELEMENTS,
        atomic_energies=ATOMIC_ENERGIES,
        cutoff=CUTOFF,
        avg_num_neighbors=8.0,
        avg_r_min=1.0,
        info={"name": f"random-{name}"},
    )


def strengthened(params, factor):
    """Weights with a factor on the radial networks, shared among their layers."""

    def strengthen(path, leaf):
        key = jax.tree_util.keystr(path)
        if re.search(r"MLP_0|MultiLayerPerceptron_0|convolution'\]\['perceptron", key):
            leaf = (leaf * factor ** (1 / (3 if "MLP_0" in key else 4))).astype(leaf.dtype)
        return leaf

    return jax.tree_util.tree_map_with_path(strengthen, params)


@functools.cache
def potential(name):
    return random_potential(name) if name in CONFIGS else mlip_md.load(name)


class OneRoom(Capacities):
    """All that fits into one shape is computed in it."""

    def __init__(self, room):
        super().__init__()
        self.room = room

    def choose(self, nodes, edges, graphs, *options):
        if nodes < self.room.nodes and edges <= self.room.edges and graphs <= self.room.graphs:
            return self.room
        return super().choose(nodes, edges, graphs, *options)


class OneShape(Runtime):
    """A runtime that no other test shares: one shape is compiled well, others hastily."""

    def __init__(self, potential, dtype, device, room):
        super().__init__(potential, dtype, device)
        self.capacities, well = OneRoom(room), self.step

        def step(params, floats, integers, kept, shape):
            if shape == room:
                return well(params, floats, integers, kept, shape)
            return jit(functools.partial(self.evaluate_buffers, kept=kept, shape=shape))(
                params, floats, integers
            )

        self.step = step


class Subject:
    """A potential under test, through the engine."""

    def __init__(self, name, dtype):
        self.name, self.double = name, dtype == "float64"
        self.potential = potential(name)
        self.cutoff, self.layers = self.potential.cutoff, self.potential.config.num_layers
        self.exact_atoms = self.potential.config.architecture == "mace"
        self.engine = Engine(self.potential, dtype)
        room = Shape(40, 8 * round(1.37 * self.cutoff**3), 8)
        self.engine.runtime = OneShape(self.potential, dtype, self.engine.device, room)

    def in_float64(self):
        return subject(self.name, "float64")

    def strengthened(self, factor):
        """The same with stronger radial networks, and nothing compiled anew."""
        other = copy.copy(self)
        other.engine = copy.copy(self.engine)
        other.engine.runtime = runtime = copy.copy(self.engine.runtime)
        runtime.params = runtime.place(strengthened(runtime.params, factor))
        return other

    def tolerance(self, double, single):
        return double if self.double else single

    def rounded(self, double, single, values):
        """A tolerance of components; in float32 rounding grows with the largest of them."""
        return self.tolerance(double, max(single, ROUNDING * np.abs(values).max()))

    def force_tolerance(self, result):
        return self.rounded(1e-9, 1e-4, result.forces)

    def stress_tolerance(self, result):
        return self.rounded(1e-10, 1e-6, result.stress)

    def evaluate(self, atoms):
        return self.engine.evaluate(*inputs(atoms))

    def evaluate_batch(self, structures):
        return self.engine.evaluate_batch([inputs(atoms) for atoms in structures])

    def padded(self, atoms, nodes, edges, graphs):
        """Node energies, forces and stresses in given capacities, padding included."""
        structure = list_edges(check_structure(self.potential, *inputs(atoms)), self.cutoff)
        shape = Shape(nodes(len(atoms)), edges(structure.n_edges), graphs)
        values = self.engine.runtime.compute([structure], shape)[0].values
        parts = np.split(values, [shape.nodes, 4 * shape.nodes])
        return parts[0], parts[1].reshape(-1, 3), parts[2].reshape(-1, 3, 3)


def inputs(atoms):
    return atoms.positions, atoms.numbers, atoms.cell.array, atoms.pbc


class Altered(Subject):
    """A model that breaks a law: ``alter(atoms, result)`` of a subject's results."""

    def __init__(self, subject, alter):
        self.__dict__.update(subject.__dict__)
        self.alter = alter

    def evaluate(self, atoms):
        return self.alter(atoms, super().evaluate(atoms))

    def evaluate_batch(self, structures):
        results = super().evaluate_batch(structures)
        return [self.alter(atoms, r) for atoms, r in zip(structures, results, strict=True)]


class Null(Subject):
    """A model without interactions: E0, or a constant energy per structure."""

    def __init__(self, subject, constant):
        self.__dict__.update(subject.__dict__)
        self.constant = constant

    def evaluate(self, atoms):
        reference = self.potential.reference_energies(self.potential.species(atoms.numbers))
        return Result(
            energy=float(reference.sum()) + self.constant,
            interaction_energy=self.constant,
            energies=reference + self.constant / len(atoms),
            forces=np.zeros((len(atoms), 3)),
            stress=np.zeros((3, 3)) if atoms.cell.rank == 3 else None,
        )

    def evaluate_batch(self, structures):
        return [self.evaluate(atoms) for atoms in structures]

    def padded(self, atoms, nodes, edges, graphs):
        n = nodes(len(atoms))
        return np.zeros(n), np.zeros((n, 3)), np.zeros((graphs, 3, 3))


def excess(value, limit):
    """A deviation in units of its tolerance; what is no number exceeds any."""
    if not np.isfinite(value) or limit == 0.0:
        return np.inf if value else 0.0
    return value / limit


@dataclass
class Report:
    """Deviations from laws and the sizes of effects that a gate measured."""

    deviations: dict = field(default_factory=dict)
    floors: dict = field(default_factory=dict)

    def below(self, name, deviation, tolerance):
        """State that a law holds; of several measurements the worst, in tolerances, counts."""
        pairs = self.deviations.get(name, (0.0, tolerance)), (np.abs(deviation).max(), tolerance)
        self.deviations[name] = max(pairs, key=lambda pair: excess(*pair))

    def floor(self, name, size, least):
        """State that an effect is there; of several measurements the weakest counts."""
        weakest = float(size)
        if name in self.floors:
            weakest = np.minimum(weakest, self.floors[name][0])
        self.floors[name] = weakest, least

    def strong(self, result):
        self.floor("largest force", np.abs(result.forces).max(), 0.5)

    def failures(self):
        failed = [
            f"{name}: {value:.3g} is above {limit:.1g}"
            for name, (value, limit) in self.deviations.items()
            if not value <= limit
        ]
        return failed + [
            f"{name}: {value:.3g} is below the floor {limit:.2g}"
            for name, (value, limit) in self.floors.items()
            if not value >= limit
        ]


# Structures


def molecule():
    """Acetamide, shaken: nine atoms of four elements, chiral."""
    atoms = g2_molecule("CH3CONH2")
    atoms.positions += np.random.default_rng(1).normal(scale=0.06, size=(9, 3))
    return Atoms(atoms.numbers, atoms.positions)


def pair():
    """Hydrogen cyanide and water side by side."""
    return Atoms(
        "HCNOHH",
        [
            [-1.05, 0.05, 0.0],
            [0.0, 0.0, 0.0],
            [1.17, 0.04, -0.05],
            [0.3, 2.9, 0.3],
            [0.5, 2.1, 0.8],
            [1.1, 3.4, 0.2],
        ],
    )


def crystal():
    """The pair in a triclinic cell, one of whose edges is shorter than the cutoff."""
    atoms = pair()
    atoms.set_cell([[3.4, 0.0, 0.3], [0.5, 4.7, 0.0], [-0.8, 0.9, 5.3]])
    atoms.pbc = True
    atoms.positions = atoms.positions[:, [2, 1, 0]]
    return atoms


def chain(cutoff, n):
    """A zigzag of n atoms at bonds a little shorter than the cutoff, and no others within it."""
    width = 0.25 * cutoff
    x = np.sqrt((0.97 * cutoff) ** 2 - width**2) * np.arange(n)
    return Atoms(np.resize([6, 8, 7, 6, 1], n), np.stack([x, width * (np.arange(n) % 2), 0 * x], 1))


def moved(atoms, displacement):
    copy = atoms.copy()
    copy.positions = copy.positions + displacement
    return copy


def deformed(atoms, matrix):
    copy = atoms.copy()
    copy.cell = copy.cell.array @ matrix
    copy.positions = copy.positions @ matrix
    return copy


def left_handed(atoms):
    copy = atoms.copy()
    copy.cell = copy.cell.array[[1, 0, 2]]
    return copy


def rotation_matrix(seed):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def joined(*structures):
    return Atoms(
        np.concatenate([atoms.numbers for atoms in structures]),
        np.concatenate([atoms.positions for atoms in structures]),
    )


# Gates

GATES = {}
DOUBLE_PRECISION_ONLY = []


def gate(function=None, *, double_only=False):
    if function is None:
        return functools.partial(gate, double_only=double_only)
    GATES[function.__name__] = function
    if double_only:
        DOUBLE_PRECISION_ONLY.append(function.__name__)
    return function


def compare(subject, report, home, other, turn=None, order=slice(None), far=False):
    """Energy, forces and stress of ``other`` are those of ``home``, turned and reordered."""
    turn = np.eye(3) if turn is None else turn
    energy = subject.tolerance(1e-9 if far else 1e-10, 1e-4)
    report.below("energy", other.energy - home.energy, energy)
    report.below("forces", other.forces - home.forces[order] @ turn, subject.force_tolerance(home))
    report.below("energies", other.energies - home.energies[order], subject.tolerance(1e-9, 1e-4))
    if home.stress is not None and other.stress is not None:
        stress = turn.T @ home.stress @ turn
        report.below("stress", other.stress - stress, subject.stress_tolerance(home))


@gate
def rotation(subject, report):
    for atoms in (molecule(), crystal()):
        home = subject.evaluate(atoms)
        report.strong(home)
        for seed in range(3):
            turn = rotation_matrix(seed)
            compare(subject, report, home, subject.evaluate(deformed(atoms, turn)), turn)
    half = molecule()
    half.positions[5:] = half.positions[5:] @ rotation_matrix(9)
    change = subject.evaluate(half).energy - subject.evaluate(molecule()).energy
    report.floor("energy of turning one half", abs(change), 0.01)


@gate
def inversion(subject, report):
    for atoms in (molecule(), crystal()):
        home = subject.evaluate(atoms)
        report.strong(home)
        for turn in (-np.eye(3), np.diag([1.0, 1.0, -1.0])):
            compare(subject, report, home, subject.evaluate(deformed(atoms, turn)), turn)


@gate
def permutation(subject, report):
    for atoms in (molecule(), crystal()):
        home = subject.evaluate(atoms)
        report.strong(home)
        order = np.random.default_rng(2).permutation(len(atoms))
        compare(subject, report, home, subject.evaluate(atoms[order]), order=order)
        swapped = atoms.copy()
        first, second = np.unique(atoms.numbers, return_index=True)[1][-2:]
        swapped.numbers[[first, second]] = swapped.numbers[[second, first]]
        change = subject.evaluate(swapped).energy - home.energy
        report.floor("energy of swapping two elements", abs(change), 0.01)


@gate
def translation(subject, report):
    for atoms in (molecule(), crystal()):
        home = subject.evaluate(atoms)
        report.strong(home)
        for offset in ([0.31, -1.7, 2.3], [1000.0, -1000.0, 1000.0]):
            compare(subject, report, home, subject.evaluate(moved(atoms, offset)), far=True)
        one = moved(atoms, np.eye(len(atoms), 1) * [0.1, 0.1, 0.1])
        change = subject.evaluate(one).energy - home.energy
        report.floor("energy of moving one atom", abs(change), 1e-3)


@gate
def lattice_shifts_of_atoms(subject, report):
    atoms = crystal()
    home = subject.evaluate(atoms)
    report.strong(home)
    shifts = np.random.default_rng(3).integers(-3, 4, (len(atoms), 3))
    compare(subject, report, home, subject.evaluate(moved(atoms, shifts @ atoms.cell.array)))
    half = moved(atoms, 0.1 * np.eye(len(atoms), 1) * atoms.cell.array[1])
    change = subject.evaluate(half).energy - home.energy
    report.floor("energy of a tenth of a shift", abs(change), 0.01)


@gate
def supercell(subject, report):
    atoms = crystal()
    home, many = subject.evaluate(atoms), subject.evaluate(atoms.repeat((2, 1, 2)))
    report.strong(home)
    tiled = Result(
        energy=many.energy / 4,
        interaction_energy=many.interaction_energy / 4,
        energies=many.energies,
        forces=many.forces,
        stress=many.stress,
    )
    compare(subject, report, home, tiled, order=np.tile(np.arange(len(atoms)), 4), far=True)
    cluster = atoms.copy()
    cluster.pbc = False
    change = subject.evaluate(cluster).energy - home.energy
    report.floor("energy of the periodic images", abs(change), 0.01)


@gate
def other_vectors_of_the_same_lattice(subject, report):
    atoms = crystal()
    home = subject.evaluate(atoms)
    report.strong(home)
    for matrix in ([[1, 0, 0], [1, 1, 0], [-1, 2, 1]], [[0, 1, 0], [1, 0, 0], [0, 0, 1]],
                   [[1, 0, 0], [0, 1, 0], [2, -1, -1]]):  # fmt: skip
        other = atoms.copy()
        other.cell = np.array(matrix) @ atoms.cell.array
        compare(subject, report, home, subject.evaluate(other), far=True)
    other.cell = np.diag([1.0, 1.1, 1.0]) @ atoms.cell.array
    change = subject.evaluate(other).energy - home.energy
    report.floor("energy of another lattice", abs(change), 0.01)


@gate
def open_axis(subject, report):
    """Mixed periodicity is a wide vacuum; the vector of an open axis is not read."""
    periodic, slab = crystal(), crystal()
    slab.pbc = [True, False, True]
    home = subject.evaluate(slab)
    report.strong(home)
    for vector in ([0.0, 40.0, 0.0], [3.0, 9.0, -8.0]):
        other = slab.copy()
        other.cell[1] = vector
        result = subject.evaluate(other)
        report.below("energy, other length", result.energy - home.energy, 0.0)
        report.below("forces, other length", result.forces - home.forces, 0.0)
        volumes = [abs(np.linalg.det(a.cell.array)) for a in (slab, other)]
        report.below(
            "stress times volume",
            result.stress * volumes[1] - home.stress * volumes[0],
            subject.tolerance(1e-9, 1e-4),
        )
    vacuum = periodic.copy()
    vacuum.cell[1] = 20.0 * vacuum.cell[1]
    wide = subject.evaluate(vacuum)
    report.below("energy, vacuum", wide.energy - home.energy, subject.tolerance(1e-9, 1e-4))
    report.below("forces, vacuum", wide.forces - home.forces, subject.force_tolerance(home))
    change = subject.evaluate(periodic).energy - home.energy
    report.floor("energy of the third period", abs(change), 1e-3)


APART = ([0.0, 60.0, 0.0], [1000.0, 0.0, 0.0], [3000.0, 1500.0, 1.0], [4000.0, 3000.0, -1.0])


def stiffness(subject, atoms):
    """eV/Å²: most that forces change when all coordinates change at random by 1 Å, taken small."""
    signs = np.random.default_rng(6).choice([-1e-3, 1e-3], (4, len(atoms), 3))
    forces = [[subject.evaluate(moved(atoms, way * s)).forces for s in signs] for way in (1, -1)]
    return np.abs(np.subtract(*forces)).max() / 2e-3


@gate
def size_consistency(subject, report):
    """Two copies have twice the energy, however far apart.

    An engine that closes the gap has coordinates of 16 to 32 Å: float32 rounds them by 2^-20 Å.
    """
    atoms = molecule()
    home = subject.evaluate(atoms)
    report.strong(home)
    turn, half = rotation_matrix(4), len(atoms)
    forces = subject.force_tolerance(home)
    forces = subject.tolerance(forces, max(forces, 2.0**-20 * stiffness(subject, atoms)))
    for offset in APART:
        far = Atoms(atoms.numbers, atoms.positions @ turn + offset)
        both = subject.evaluate(joined(atoms, far))
        report.below("energy", both.energy - 2 * home.energy, subject.tolerance(1e-10, 1e-4))
        report.below("forces", both.forces[:half] - home.forces, forces)
        report.below("forces", both.forces[half:] - home.forces @ turn, forces)
    gap = np.ptp(atoms.positions[:, 0]) + 2.0
    near = subject.evaluate(joined(atoms, moved(atoms, [gap, 0.0, 0.0])))
    report.floor("energy of two copies 2 Å apart", abs(near.energy - 2 * home.energy), 1e-3)


@gate
def isolated_atom(subject, report):
    """MACE: E0 exactly. NequIP: E0 and a constant of the species (its residual path)."""
    reference = dict(
        zip(subject.potential.elements, subject.potential.atomic_energies, strict=True)
    )
    alone = {}
    for number in ELEMENTS:
        here, there, boxed = (
            subject.evaluate(atoms)
            for atoms in (
                Atoms([number], [[0.0, 0.0, 0.0]]),
                Atoms([number], [[7.0, -300.0, 0.1]]),
                Atoms([number], [[1.0, 2.0, 3.0]], cell=[12.0, 13.0, 14.0], pbc=True),
            )
        )
        alone[number] = here.energy
        for result in (here, there, boxed):
            report.below("force", result.forces, 0.0)
            report.below("energy, elsewhere", result.energy - here.energy, 0.0)
        report.below("stress", boxed.stress, 0.0)
        if subject.exact_atoms:
            report.below("energy - E0", here.energy - reference[number], 0.0)
    for number in ELEMENTS:
        apart = subject.evaluate(Atoms([number, 6], [[0, 0, 0], [0, 0, 1.001 * subject.cutoff]]))
        report.below("beyond the cutoff", apart.energy - alone[number] - alone[6], 1e-9)
        close = subject.evaluate(Atoms([number, 6], [[0, 0, 0], [0, 0, 1.3]]))
        report.floor("energy of a bond", abs(close.energy - alone[number] - alone[6]), 1e-3)


@gate
def net_force_and_torque(subject, report):
    for atoms in (molecule(), crystal()):
        result = subject.evaluate(atoms)
        report.strong(result)
        report.below("net force", result.forces.sum(axis=0), subject.tolerance(1e-10, 1e-4))
        if not atoms.pbc.any():
            torque = np.cross(atoms.positions, result.forces).sum(axis=0)
            report.below("net torque", torque, subject.tolerance(1e-9, 1e-4))


DIFFERENCE = 3e-4
"""Part of the largest component by which a derivative of float32 energies may be off."""


def derivative(subject, deform, read):
    """Derivative at 0 of what is read of results, from five points that are computed together.

    Networks are so rough that an error of fourth order in the step (Å, or strain) is needed. In
    float32 the step is where that error and the rounding of energies, divided by it, are alike.
    """
    step = subject.tolerance(1e-4, 5e-3)
    results = subject.evaluate_batch([deform(n * step) for n in (1, -1, 2, -2)])
    a, b, c, d = (read(result) for result in results)
    return (8 * (a - b) - (c - d)) / (12 * step)


def interaction_energy(result):
    return result.interaction_energy


@gate
def forces_are_minus_the_gradient(subject, report):
    for atoms in (molecule(), crystal()):
        result = subject.evaluate(atoms)
        report.strong(result)
        tolerance = subject.tolerance(1e-6, DIFFERENCE * np.abs(result.forces).max())
        for index in np.ndindex(len(atoms), 3):
            direction = np.zeros((len(atoms), 3))
            direction[index] = 1.0
            gradient = derivative(
                subject,
                lambda h: moved(atoms, h * direction),  # noqa: B023
                interaction_energy,
            )
            report.below("force", result.forces[index] + gradient, tolerance)


@gate
def stress_is_the_derivative(subject, report):
    for atoms in (crystal(), left_handed(crystal())):
        result = subject.evaluate(atoms)
        volume = abs(np.linalg.det(atoms.cell.array))
        largest = np.abs(result.stress).max()
        tolerance = subject.tolerance(1e-7, DIFFERENCE * largest)
        for a, b in [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]:
            strain = np.zeros((3, 3))
            strain[a, b] += 0.5
            strain[b, a] += 0.5
            change = derivative(
                subject,
                lambda h: deformed(atoms, np.eye(3) + h * strain),  # noqa: B023
                interaction_energy,
            )
            report.below("stress", result.stress[a, b] - change / volume, tolerance)
            report.below("stress", result.stress[b, a] - change / volume, tolerance)
            report.floor("smallest component", abs(result.stress[a, b]), 2e-6)
        report.floor("largest component", largest, 5e-3)


@gate
def stress_is_a_symmetric_tensor(subject, report):
    """It turns with the crystal, and of a cluster in a box it is the virial of the forces."""
    for atoms in (crystal(), left_handed(crystal())):
        home = subject.evaluate(atoms)
        tolerance = subject.stress_tolerance(home)
        report.below("symmetric", home.stress - home.stress.T, tolerance)
        for seed in range(3):
            turn = rotation_matrix(seed)
            other = subject.evaluate(deformed(atoms, turn))
            report.below("turned", other.stress - turn.T @ home.stress @ turn, tolerance)
    spread = np.ptp(np.linalg.eigvalsh(home.stress))
    report.floor("anisotropy", spread, 5e-3)
    cluster = molecule()
    for box in (np.diag([8.0, 9.0, 10.0]), np.diag([8.0, 9.0, 10.0])[[1, 0, 2]]):
        cluster.cell = box
        result = subject.evaluate(cluster)
        virial = -result.forces.T @ cluster.positions / abs(np.linalg.det(box))
        report.below("virial", result.stress - virial, subject.stress_tolerance(result))


@gate
def batch_equals_single(subject, report):
    """Also: nothing that happens in one structure of a batch is felt in another."""
    tolerance = subject.tolerance(1e-12, 1e-5)
    large = [molecule(), crystal(), left_handed(pair_in_box()), pair()]
    small = [part for atoms in (large[1], *large[:3]) for part in (atoms[:3], atoms[3:6])]
    for structures in (large[:1], large[1:3], large, small):
        batch = subject.evaluate_batch(structures)
        for atoms, together in zip(structures, batch, strict=True):
            one = subject.evaluate(atoms)
            report.below("energy", together.interaction_energy - one.interaction_energy, tolerance)
            report.below("forces", together.forces - one.forces, tolerance)
            if one.stress is not None:
                report.below("stress", together.stress - one.stress, tolerance)
    batch = subject.evaluate_batch(large)
    disturbed = subject.evaluate_batch([large[0], moved(large[1], np.eye(6, 3) * 0.2), *large[2:]])
    for index in range(len(large)):
        report.strong(batch[index])
        change = disturbed[index].forces - batch[index].forces
        if index == 1:
            report.floor("disturbance", np.abs(change).max(), 0.1)
        else:
            report.below("crosstalk", change, 0.0)


def pair_in_box():
    atoms = pair()
    atoms.set_cell([7.0, 8.0, 9.0])
    return atoms


@gate
def smooth_at_the_cutoff(subject, report):
    """A lone atom approaches: E and F vanish as δ³ and δ², so that E, F and dF/dr are continuous.

    Within a molecule, jumps are what is left of second differences around the cutoff.
    """
    anchor = Atoms("HCN", [[-1.1, 0.1, 0.0], [0.0, 0.0, 0.0], [1.0, 0.3, 0.5]])
    normal = anchor.positions[2] / np.linalg.norm(anchor.positions[2])
    far = subject.evaluate(joined(anchor, probe(anchor.positions[2] + 30.0 * normal)))

    def depth(delta):
        where = anchor.positions[2] + (subject.cutoff - delta) * normal
        result = subject.evaluate(joined(anchor, probe(where)))
        return abs(result.energy - far.energy), np.linalg.norm(result.forces[3])

    report.below("energy beyond", depth(-1e-6)[0], subject.tolerance(1e-11, 1e-5))
    report.below("force beyond", depth(-1e-6)[1], 0.0)
    energy, force = depth(0.5)
    report.floor("energy 0.5 Å inside", energy, 1e-5)
    report.floor("force 0.5 Å inside", force, 1e-4)
    if subject.double:
        # near enough for the leading term: farther in, the energy may pass through zero
        order = np.log2(depth(0.06)) - np.log2(depth(0.03))
        report.floor("order of the energy", order[0], 2.9)
        report.floor("order of the force", order[1], 1.9)
    jumps_in_a_molecule(subject, report)


def probe(position):
    return Atoms("O", [position])


def way_out(atoms, cutoff):
    """An atom, and the direction in which one meets its cutoff some 2 Å from another atom."""
    directions = np.random.default_rng(6).normal(size=(300, 3))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    ways = [(center, along) for center in atoms.positions for along in directions]

    def merit(way):
        distances = np.linalg.norm(atoms.positions - way[0] - cutoff * way[1], axis=1)
        others_cross = np.sum(abs(distances - cutoff) < 0.05) > 1
        return abs(distances.min() - 2.0) + others_cross

    return min(ways, key=merit)


def jumps_in_a_molecule(subject, report):
    atoms = molecule()
    center, along = way_out(atoms, subject.cutoff)

    def crossing(t):
        result = subject.evaluate(joined(atoms, probe(center + (subject.cutoff + t) * along)))
        return np.append(result.interaction_energy, result.forces.ravel())

    h = 5e-4  # Å
    home = crossing(0.0)
    coarse, fine = (crossing(t) - 2 * home + crossing(-t) for t in (h, h / 2))
    jump = 4 * fine - coarse
    report.below("jump of E", jump[0], subject.tolerance(1e-9, 1e-4))
    report.below("jump of F", jump[1:], subject.tolerance(1e-7, 1e-3))
    stiffness = np.abs(crossing(h) - crossing(-h))[1:].max() / (2 * h)
    report.floor("dF/dr", stiffness, 0.1)
    if subject.double:
        report.below("jump of dF/dr", jump[1:] / h, 1e-4)
        report.floor("d²F/dr²", np.abs(coarse[1:]).max() / h**2, 0.1)


@gate
def receptive_field(subject, report):
    """An atom feels those that are at most ``layers`` bonds away, and no others.

    Bonds are 0.97 cutoffs long, where next to nothing passes; the radial networks are made so
    strong that what does pass is seen through all layers.
    """
    subject, layers = subject.strengthened(3000.0), subject.layers
    for start, order in ((0, 1), (layers + 1, -1)):
        atoms = chain(subject.cutoff, layers + 2)
        home = subject.evaluate(atoms)
        for hops in range(1, layers + 2):
            shift = np.zeros((layers + 2, 3))
            shift[start + order * hops] = [0.0, 0.2, 0.1]
            change = abs(subject.evaluate(moved(atoms, shift)).energies - home.energies)[start]
            if hops <= layers:
                report.floor(f"{hops} bonds away", change, 1e-6)
            else:
                report.below("one bond further", change, subject.tolerance(1e-11, 1e-7))


@gate
def repeatable(subject, report):
    """The same question has the same answer, bit by bit, whatever was asked in between."""
    structures = [molecule(), crystal()]
    first = [subject.evaluate(atoms) for atoms in structures]
    for _ in range(3):
        for atoms, once in zip(structures, first, strict=True):
            again = subject.evaluate(atoms)
            report.below("energy", again.energy - once.energy, 0.0)
            report.below("energies", again.energies - once.energies, 0.0)
            report.below("forces", again.forces - once.forces, 0.0)
    report.below("stress", again.stress - once.stress, 0.0)
    report.strong(first[0])


@gate
def short_range(subject, report):
    """Two atoms at 0.3 to 2.5 Å: finite, and the force is minus the slope of the energy.

    Slopes are taken in float64, for a few eV in thousands round away in float32; there energies and
    forces are compared with those of float64.

    Whether they repel each other is not asked: no data says so to a network; random ones and some
    pairs of trained ones attract below 0.5 Å, with forces that change tenfold within 0.05 Å.
    """
    exact = subject.in_float64()
    if subject.potential.config.architecture == "nequip":  # else gates open and shut within 1e-5 Å
        subject, exact = subject.strengthened(0.5), exact.strengthened(0.5)
    for numbers in itertools.combinations_with_replacement(subject.potential.elements, 2):
        largest = 0.0
        for r in np.geomspace(0.3, 2.5, 8):
            h = 1e-5 * r  # walls of 1e5 eV/Å bend within 1e-3 Å
            where = [[0.0, 0.0, r + n * h] for n in (0, 1, -1, 2, -2)]
            dimers = [Atoms(numbers, [[0.0, 0.0, 0.0], position]) for position in where]
            judges = subject if subject.double else exact
            here, a, b, c, d = map(interaction_energy, judges.evaluate_batch(dimers))
            result = subject.evaluate(dimers[0])
            force, scale = result.forces[1, 2], 1.0 + abs(here)
            slope = (8 * (a - b) - (c - d)) / (12 * h)
            error = (force + slope) / (scale + abs(force))
            report.below("error of the force", error, subject.tolerance(1e-7, 1e-3))
            if not subject.double:
                error = (result.interaction_energy - here) / scale
                report.below("error of the energy", error, 1e-3)
            largest = max(largest, abs(force))
        report.floor("largest force", largest, 0.5)


@gate(double_only=True)
def hessian_is_symmetric(subject, report):
    atoms = pair()
    n = 3 * len(atoms)
    rows = [
        -derivative(subject, lambda h: moved(atoms, h * direction), lambda r: r.forces)  # noqa: B023
        for direction in np.eye(n).reshape(n, -1, 3)
    ]
    hessian = np.array(rows).reshape(n, n)
    report.below("asymmetry", hessian - hessian.T, 1e-6)
    report.below("translation", hessian.reshape(n, -1, 3).sum(axis=1), 1e-8)
    report.floor("largest curvature", np.abs(hessian).max(), 1.0)
    report.floor("coupling of the molecules", np.abs(hessian[:9, 9:]).max(), 1e-3)


def verlet(subject, atoms, start, steps, n_steps):
    """Velocity Verlet of several trajectories at once.

    Args:
        start: positions and velocities, (trajectories, atoms, 3) each.
        steps: time steps of the trajectories.

    Returns:
        Positions and velocities at the end; total and kinetic energies before every step.
    """
    positions, velocities = np.array(start)
    masses, steps = atoms.get_masses()[:, None], np.reshape(steps, (-1, 1, 1))
    total, kinetic = [], []

    def forces():
        results = subject.evaluate_batch([Atoms(atoms.numbers, where) for where in positions])
        energies.append([result.interaction_energy for result in results])
        return np.array([result.forces for result in results])

    energies = []
    force = forces()
    for _ in range(n_steps):
        kinetic.append(0.5 * np.sum(masses * velocities**2, axis=(1, 2)))
        total.append(energies[-1] + kinetic[-1])
        velocities += 0.5 * steps * force / masses
        positions += steps * velocities
        force = forces()
        velocities += 0.5 * steps * force / masses
    return (positions, velocities), np.array(total), np.array(kinetic)


@gate
def dynamics(subject, report):
    """Energy fluctuates with the square of the time step, and time can be turned back.

    In float32 steps are longer, so that fluctuations exceed rounding, as far as networks let them.
    """
    atoms = pair()
    atoms.set_masses(6 * [12.0])  # random weights would throw hydrogen about
    velocities = np.random.default_rng(5).normal(size=(6, 3)) * np.sqrt(kB * 300.0 / 12.0)
    longer = 0.05 if subject.potential.config.architecture == "nequip" else 0.1
    step, n_steps = subject.tolerance(0.02, longer) * fs, 400
    start = [2 * [atoms.positions], 2 * [velocities]]
    # Two trajectories, one of them at half the step: it goes on while the other goes back.
    there, total, kinetic = verlet(subject, atoms, start, [step, step / 2], n_steps)
    turned = there[0], there[1] * np.reshape([-1, 1], (2, 1, 1))
    back, finer, _ = verlet(subject, atoms, turned, [step, step / 2], n_steps)
    finer = np.concatenate([total[:, 1], finer[:, 1]])
    ratio = total[:, 0].std() / finer[::2].std()
    report.below("ratio of fluctuations - 4", ratio - 4.0, 0.5)
    distance = back[0][0] - atoms.positions
    report.below("time reversal", distance, subject.tolerance(1e-9, 1e-3))
    report.floor("exchange with kinetic energy", np.ptp(kinetic[:, 0]), 0.02)
    report.floor("path", np.abs(there[0][0] - atoms.positions).max(), 0.03)


@gate
def padding(subject, report):
    """Capacities of just what is needed, one more and many more give the same."""
    atoms = crystal()
    n, tolerance = len(atoms), subject.tolerance(1e-12, 1e-5)
    home = subject.evaluate(atoms)
    report.strong(home)
    room = subject.engine.runtime.capacities.room
    for capacities in (
        (lambda n: n, lambda n: n, 1),
        (lambda n: n + 1, lambda n: n + 1, 2),
        (lambda _: room.nodes, lambda _: room.edges, room.graphs),
    ):
        energies, forces, stress = subject.padded(atoms, *capacities)
        report.below("energy", energies.sum() - home.interaction_energy, tolerance)
        report.below("forces", forces[:n] - home.forces, tolerance)
        report.below("stress", stress[0] - home.stress, tolerance)
        padded = [energies[n:], forces[n:].ravel(), stress[1:].ravel()]
        report.below("padding", np.concatenate([*padded, [0.0]]), 0.0)


# Tests


@functools.cache
def subject(name, dtype):
    return Subject(name, dtype)


def check(gate, subject, record_property):
    report = Report()
    gate(subject, report)
    for what, (value, _) in {**report.deviations, **report.floors}.items():
        record_property(what, float(value))
    assert report.deviations or report.floors
    assert not report.failures()


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("name", NAMES)
def test_double_precision(name, gate, record_property):
    check(GATES[gate], subject(name, "float64"), record_property)


@pytest.mark.parametrize("gate", [name for name in GATES if name not in DOUBLE_PRECISION_ONLY])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name == "mace-torch" else name
        for name in NAMES
        if name != "mace-torch, ZBL"
    ],
)
def test_single_precision(name, gate, record_property):
    check(GATES[gate], subject(name, "float32"), record_property)


# A gate that cannot fail proves nothing


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("constant", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_gate_passes_a_model_without_interactions(dtype, gate, constant):
    report = Report()
    with np.errstate(invalid="ignore", divide="ignore"):
        GATES[gate](Null(subject("mace", dtype), constant), report)
    assert report.failures()


def test_the_worst_of_several_measurements_counts():
    report = Report()
    for deviation, tolerance in ((1.0, 2.0), (0.1, 0.15), (-1e-3, 1.0)):
        report.below("law", [0.0, deviation], tolerance)
    assert report.deviations["law"] == (0.1, 0.15)
    assert not report.failures()
    for deviation, tolerance in ((np.nan, 1.0), (1.0, 2.0), (0.0, 0.0)):
        report.below("law", [0.0, deviation], tolerance)
    assert "law: nan is above" in report.failures()[0]
    report.floor("effect", np.nan, 0.1)
    report.floor("effect", 1.0, 0.1)
    assert len(report.failures()) == 2


def volume(atoms):
    return np.linalg.det(atoms.cell.array)


def with_stress(factor):
    def alter(atoms, result):
        if result.stress is None:
            return result
        return replace(result, stress=result.stress * factor(atoms))

    return alter


def with_forces(forces):
    return lambda atoms, result: replace(result, forces=forces(atoms, result))


def with_energy(energy):
    """Adds to the total and, shared among the atoms, to their energies."""

    def alter(atoms, result):
        added = energy(atoms)
        return replace(
            result,
            energy=result.energy + added,
            interaction_energy=result.interaction_energy + added,
            energies=result.energies + added / len(atoms),
        )

    return alter


def handedness(atoms):
    if len(atoms) < 4:
        return 0.0
    return 1e-6 * np.linalg.det(atoms.positions[1:4] - atoms.positions[0])


def tail(atoms):
    distances = atoms.get_all_distances()
    return 1e-3 * np.sum(distances[distances > 0] ** -6.0)


def bonds(atoms):
    return 1e-6 * np.sum(atoms.get_all_distances() < CUTOFF)


RANDOM = np.random.default_rng(0)


def noise(_):
    return 1e-6 * RANDOM.normal()


def curl(atoms, result):
    return result.forces + 0.05 * np.cross([0.0, 0.0, 1.0], atoms.positions)


ALTERATIONS = {
    "stress of the other sign": (with_stress(lambda _: -1.0), "stress_is_the_derivative"),
    "strain energy, not stress": (with_stress(volume), "stress_is_the_derivative"),
    "pressure of another unit": (with_stress(lambda _: 1.001), "stress_is_a_symmetric_tensor"),
    "volume with a sign": (
        with_stress(lambda atoms: np.sign(volume(atoms))),
        "stress_is_the_derivative stress_is_a_symmetric_tensor other_vectors_of_the_same_lattice",
    ),
    "forces too large": (
        with_forces(lambda atoms, result: 1.0001 * result.forces),
        "forces_are_minus_the_gradient short_range",
    ),
    "forces of the other sign": (
        with_forces(lambda atoms, result: -result.forces),
        "forces_are_minus_the_gradient dynamics",
    ),
    "a field": (
        with_forces(lambda atoms, result: result.forces + 1e-6 * np.eye(1, 3)),
        "rotation inversion net_force_and_torque isolated_atom smooth_at_the_cutoff",
    ),
    "a torque": (
        with_forces(lambda atoms, result: result.forces + np.cross([1e-6, 0, 0], atoms.positions)),
        "net_force_and_torque translation",
    ),
    "forces without potential": (with_forces(curl), "hessian_is_symmetric dynamics"),
    "energy of the place": (
        with_energy(lambda atoms: 1e-6 * atoms.positions.mean()),
        "translation rotation inversion lattice_shifts_of_atoms",
    ),
    "energy of the order": (
        with_energy(lambda atoms: 1e-6 * atoms.numbers[0]),
        "permutation supercell",
    ),
    "energy of all pairs": (
        with_energy(lambda atoms: 1e-6 * len(atoms) ** 2),
        "size_consistency supercell isolated_atom",
    ),
    "energy of the hand": (with_energy(handedness), "inversion"),
    "energy of the box": (
        with_energy(lambda atoms: 1e-6 * atoms.cell.array.sum()),
        "open_axis other_vectors_of_the_same_lattice rotation",
    ),
    "a tail beyond the cutoff": (
        with_energy(tail),
        "smooth_at_the_cutoff receptive_field isolated_atom forces_are_minus_the_gradient "
        "short_range",
    ),
    "a step at the cutoff": (with_energy(bonds), "smooth_at_the_cutoff"),
    "noise": (with_energy(noise), "repeatable batch_equals_single"),
}


def amplified(alter, factor):
    """An alteration that changes results ``factor`` times as much."""

    def amplify(atoms, result):
        changed = vars(alter(atoms, result))
        return Result(**{
            name: value if value is None else value + factor * (changed[name] - value)
            for name, value in vars(result).items()
        })  # fmt: skip

    return amplify


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("alteration", "gate"),
    [(name, gate) for name, (_, gates) in ALTERATIONS.items() for gate in gates.split()],
)
def test_gates_catch(alteration, gate, dtype):
    """Small breaches of laws in float64; in float32 those that are 300 times as large."""
    if dtype == "float32" and gate in (*DOUBLE_PRECISION_ONLY, "dynamics"):
        return
    alter, report = ALTERATIONS[alteration][0], Report()
    if dtype == "float32":
        alter = amplified(alter, 300.0)
    GATES[gate](Altered(subject("mace", dtype), alter), report)
    assert report.failures()
