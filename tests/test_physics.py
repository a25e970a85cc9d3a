"""Physics gates: what every potential obeys, whatever its weights.

A gate measures how far a potential is from a law (``Report.below``: deviation and tolerance) and
how large the effects are without which the law would hold for nothing (``Report.floor``). Networks
have random weights made so strong that forces are some eV/Å. The last tests run all gates on
models that break laws: a gate that cannot fail proves nothing.
"""

import functools
import re
from dataclasses import dataclass, field, replace

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule as g2_molecule
from ase.units import fs, kB

import mlip_md
from mlip_md import bundled
from mlip_md import engine as engine_module
from mlip_md.engine import Engine, Result, Sizes
from mlip_md.graph import Graph
from mlip_md.networks import MACEConfig, NequIPConfig, build_network
from mlip_md.potential import Potential

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
}
RADIAL_STRENGTH = {"mace": 1.0, "nequip": 4.0}
"""Factor on the radial networks of random weights: forces of some eV/Å."""
NAMES = (*CONFIGS, *(name for name in ("organics-gfn2",) if name in bundled.names()))


def random_potential(name):
    """A small network for H, C, N, O with strong random weights."""
    config = CONFIGS[name]
    network = build_network(
        config, num_species=len(ELEMENTS), cutoff=CUTOFF, avg_num_neighbors=8.0, avg_r_min=1.0
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
        key = jax.tree_util.keystr(path)
        if "MLP_0" in key:  # NequIP divides by no fan-in where it uses these kernels
            weights *= 2.0 / np.sqrt(leaf.shape[0])
        if re.search("MLP_0|MultiLayerPerceptron_0", key):
            weights *= RADIAL_STRENGTH[name] ** (1 / (3 if "MLP_0" in key else 4))
        return weights.astype(np.float32)

    return Potential(
        config=config,
        params=jax.tree_util.tree_map_with_path(draw, shapes),
        elements=ELEMENTS,
        atomic_energies=ATOMIC_ENERGIES,
        cutoff=CUTOFF,
        avg_num_neighbors=8.0,
        avg_r_min=1.0,
        info={"name": f"random-{name}"},
    )


@functools.cache
def potential(name):
    return random_potential(name) if name in CONFIGS else mlip_md.load(name)


class Subject:
    """A potential under test, through the engine; one size of graph, so one compilation."""

    def __init__(self, potential, dtype):
        self.potential, self.double = potential, dtype == "float64"
        self.cutoff, self.layers = potential.cutoff, potential.config.receptive_layers
        self.exact_atoms = potential.config.architecture == "mace"
        self.engine = Engine(potential, dtype)
        self.room = Sizes(32, 8 * round(1.37 * self.cutoff**3), 4)
        choose = self.engine._runtime.sizes

        def sizes(nodes, edges, graphs, *options):
            if nodes < self.room.nodes and edges <= self.room.edges and graphs <= self.room.graphs:
                return self.room
            return choose(nodes, edges, graphs, *options)

        self.engine._runtime.sizes = sizes

    def tolerance(self, double, single):
        return double if self.double else single

    def force_tolerance(self, result):
        """eV/Å; in float32 rounding grows with the forces themselves."""
        return self.tolerance(1e-9, max(1e-4, 5e-5 * np.abs(result.forces).max()))

    def evaluate(self, atoms):
        return self.engine.evaluate(*inputs(atoms))

    def evaluate_batch(self, structures):
        return self.engine.evaluate_batch([inputs(atoms) for atoms in structures])

    def padded(self, atoms, nodes, edges, graphs):
        """Node energies, forces and stresses in given capacities, padding included."""
        prepared = self.engine._with_edges(engine_module._check(self.potential, *inputs(atoms)))
        need = len(atoms), len(prepared.edges.senders)
        sizes = Sizes(nodes(need[0]), edges(need[1]), graphs)
        packed = engine_module._pack([prepared], sizes, self.engine._runtime.dtype)
        values = self.engine._runtime.run(*packed, sizes, None)[0].values
        parts = np.split(values, [sizes.nodes, 4 * sizes.nodes])
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


@dataclass
class Report:
    """Deviations from laws and the sizes of effects that a gate measured."""

    deviations: dict = field(default_factory=dict)
    floors: dict = field(default_factory=dict)

    def below(self, name, deviation, tolerance):
        """State that a law holds; of several measurements the worst counts."""
        worst = float(np.max(np.abs(deviation)))
        if name in self.deviations:
            worst = np.maximum(worst, self.deviations[name][0])
        self.deviations[name] = worst, tolerance

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


def chain(subject, n):
    """A zigzag of n atoms in which only neighbours see each other."""
    x = 0.58 * subject.cutoff * np.arange(n)
    y = 0.3 * (np.arange(n) % 2)
    return Atoms(np.resize([6, 8, 7, 6, 1], n), np.stack([x, y, 0 * x], axis=1))


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
SINGLE_PRECISION = []
"""Gates that mean something in float32."""


def gate(function=None, *, single=False):
    if function is None:
        return functools.partial(gate, single=single)
    GATES[function.__name__] = function
    if single:
        SINGLE_PRECISION.append(function.__name__)
    return function


def compare(subject, report, home, other, turn=None, order=slice(None), far=False):
    """Energy, forces and stress of ``other`` are those of ``home``, turned and reordered."""
    turn = np.eye(3) if turn is None else turn
    n = len(home.forces)
    energy = subject.tolerance(1e-9 if far else 1e-10, (1e-3 if far else 1e-4) * np.sqrt(n))
    report.below("energy", other.energy - home.energy, energy)
    report.below("forces", other.forces - home.forces[order] @ turn, subject.force_tolerance(home))
    report.below("energies", other.energies - home.energies[order], subject.tolerance(1e-9, 1e-4))
    if home.stress is not None and other.stress is not None:
        report.below(
            "stress",
            other.stress - turn.T @ home.stress @ turn,
            subject.tolerance(1e-10, 1e-6),
        )


@gate(single=True)
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


@gate(single=True)
def inversion(subject, report):
    for atoms in (molecule(), crystal()):
        home = subject.evaluate(atoms)
        report.strong(home)
        for turn in (-np.eye(3), np.diag([1.0, 1.0, -1.0])):
            compare(subject, report, home, subject.evaluate(deformed(atoms, turn)), turn)


@gate(single=True)
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


@gate(single=True)
def translation(subject, report):
    for atoms in (molecule(), crystal()):
        home = subject.evaluate(atoms)
        report.strong(home)
        for offset in ([0.31, -1.7, 2.3], [1000.0, -1000.0, 1000.0]):
            compare(subject, report, home, subject.evaluate(moved(atoms, offset)), far=True)
        one = moved(atoms, np.eye(len(atoms), 1) * [0.1, 0.1, 0.1])
        change = subject.evaluate(one).energy - home.energy
        report.floor("energy of moving one atom", abs(change), 1e-3)


@gate(single=True)
def lattice_shifts_of_atoms(subject, report):
    atoms = crystal()
    home = subject.evaluate(atoms)
    report.strong(home)
    shifts = np.random.default_rng(3).integers(-3, 4, (len(atoms), 3))
    compare(subject, report, home, subject.evaluate(moved(atoms, shifts @ atoms.cell.array)))
    half = moved(atoms, 0.1 * np.eye(len(atoms), 1) * atoms.cell.array[1])
    change = subject.evaluate(half).energy - home.energy
    report.floor("energy of a tenth of a shift", abs(change), 0.01)


@gate(single=True)
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


@gate(single=True)
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


@gate(single=True)
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
            subject.tolerance(1e-9, 1e-3),
        )
    vacuum = periodic.copy()
    vacuum.cell[1] = 20.0 * vacuum.cell[1]
    wide = subject.evaluate(vacuum)
    report.below("energy, vacuum", wide.energy - home.energy, subject.tolerance(1e-9, 1e-4))
    report.below("forces, vacuum", wide.forces - home.forces, subject.force_tolerance(home))
    change = subject.evaluate(periodic).energy - home.energy
    report.floor("energy of the third period", abs(change), 1e-3)


@gate(single=True)
def size_consistency(subject, report):
    atoms = molecule()
    home = subject.evaluate(atoms)
    report.strong(home)
    turn = rotation_matrix(4)
    far = Atoms(atoms.numbers, atoms.positions @ turn + [0.0, 60.0, 0.0])
    both = subject.evaluate(joined(atoms, far))
    half = len(atoms)
    report.below("energy", both.energy - 2 * home.energy, subject.tolerance(1e-10, 1e-4))
    report.below("forces", both.forces[:half] - home.forces, subject.force_tolerance(home))
    report.below("forces", both.forces[half:] - home.forces @ turn, subject.force_tolerance(home))
    gap = np.ptp(atoms.positions[:, 0]) + 2.0
    near = subject.evaluate(joined(atoms, moved(atoms, [gap, 0.0, 0.0])))
    report.floor("energy of two copies 2 Å apart", abs(near.energy - 2 * home.energy), 1e-3)


@gate(single=True)
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


@gate(single=True)
def net_force_and_torque(subject, report):
    for atoms in (molecule(), crystal()):
        result = subject.evaluate(atoms)
        report.strong(result)
        report.below("net force", result.forces.sum(axis=0), subject.tolerance(1e-10, 1e-4))
        if not atoms.pbc.any():
            torque = np.cross(atoms.positions, result.forces).sum(axis=0)
            report.below("net torque", torque, subject.tolerance(1e-9, 1e-4))


STEP = 1e-4
"""Å, or strain. Networks are so rough that an error of fourth order in it is needed."""


def slope(function):
    """Derivative at 0 from five points."""
    near, far = (function(h) - function(-h) for h in (STEP, 2 * STEP))
    return (8 * near - far) / (12 * STEP)


@gate
def forces_are_minus_the_gradient(subject, report):
    for atoms in (molecule(), crystal()):
        result = subject.evaluate(atoms)
        report.strong(result)
        for index in np.ndindex(len(atoms), 3):
            direction = np.zeros((len(atoms), 3))
            direction[index] = 1.0
            gradient = slope(
                lambda h: subject.evaluate(moved(atoms, h * direction)).energy  # noqa: B023
            )
            report.below("force", result.forces[index] + gradient, 1e-6)


@gate
def stress_is_the_derivative(subject, report):
    for atoms in (crystal(), left_handed(crystal())):
        result = subject.evaluate(atoms)
        volume = abs(np.linalg.det(atoms.cell.array))
        for a, b in [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]:
            strain = np.zeros((3, 3))
            strain[a, b] += 0.5
            strain[b, a] += 0.5
            derivative = slope(
                lambda h: subject.evaluate(deformed(atoms, np.eye(3) + h * strain)).energy  # noqa: B023
            )
            report.below("stress", result.stress[a, b] - derivative / volume, 1e-7)
            report.below("stress", result.stress[b, a] - derivative / volume, 1e-7)
            report.floor("smallest component", abs(result.stress[a, b]), 2e-6)
        report.floor("largest component", np.abs(result.stress).max(), 5e-3)


@gate(single=True)
def stress_is_a_symmetric_tensor(subject, report):
    """It turns with the crystal, and of a cluster in a box it is the virial of the forces."""
    tolerance = subject.tolerance(1e-10, 1e-6)
    for atoms in (crystal(), left_handed(crystal())):
        home = subject.evaluate(atoms)
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
        report.below("virial", result.stress - virial, tolerance)


@gate
def batch_equals_single(subject, report):
    """Also: nothing that happens in one structure of a batch is felt in another."""
    structures = [molecule(), crystal(), left_handed(pair_in_box()), pair()]
    singles = [subject.evaluate(atoms) for atoms in structures]
    batch = subject.evaluate_batch(structures)
    structures[1] = moved(structures[1], np.eye(6, 3) * 0.2)
    disturbed = subject.evaluate_batch(structures)
    for index, (one, together) in enumerate(zip(singles, batch, strict=True)):
        report.strong(one)
        report.below("energy", together.interaction_energy - one.interaction_energy, 1e-12)
        report.below("forces", together.forces - one.forces, 1e-12)
        if one.stress is not None:
            report.below("stress", together.stress - one.stress, 1e-12)
        if index != 1:
            report.below("crosstalk", disturbed[index].forces - together.forces, 0.0)
    change = np.abs(disturbed[1].forces - batch[1].forces).max()
    report.floor("disturbance", change, 0.1)


def pair_in_box():
    atoms = pair()
    atoms.set_cell([7.0, 8.0, 9.0])
    return atoms


@gate(single=True)
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
    if not subject.double:
        return
    order = np.log2(depth(0.12)) - np.log2(depth(0.06))
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
        return np.append(result.energy, result.forces.ravel())

    h = 5e-4  # Å
    home = crossing(0.0)
    coarse, fine = (crossing(t) - 2 * home + crossing(-t) for t in (h, h / 2))
    curvature = coarse[1:] / h**2
    report.below("jump of E", (4 * fine - coarse)[0], 1e-9)
    report.below("jump of F", (4 * fine - coarse)[1:], 1e-7)
    report.below("jump of dF/dr", (4 * fine - coarse)[1:] / h, 1e-4)
    stiffness = np.abs(crossing(h) - crossing(-h))[1:].max() / (2 * h)
    report.floor("dF/dr", stiffness, 0.1)
    report.floor("d²F/dr²", np.abs(curvature).max(), 0.1)


@gate
def receptive_field(subject, report):
    """An atom feels those that are at most ``layers`` edges away, and no others."""
    layers = subject.layers
    for start, order in ((0, 1), (layers + 1, -1)):
        atoms = chain(subject, layers + 2)
        home = subject.evaluate(atoms)
        for hops in range(1, layers + 2):
            shift = np.zeros((layers + 2, 3))
            shift[start + order * hops] = [0.0, 0.2, 0.1]
            change = abs(subject.evaluate(moved(atoms, shift)).energies - home.energies)[start]
            if hops <= layers:
                report.floor(f"{hops} edges away", change, 1e-9)
            else:
                report.below("one edge further", change, 1e-11)


@gate
def hessian_is_symmetric(subject, report):
    atoms = pair()
    n = 3 * len(atoms)
    rows = [
        -slope(lambda h: subject.evaluate(moved(atoms, h * direction)).forces)  # noqa: B023
        for direction in np.eye(n).reshape(n, -1, 3)
    ]
    hessian = np.array(rows).reshape(n, n)
    report.below("asymmetry", hessian - hessian.T, 1e-6)
    report.below("translation", hessian.reshape(n, -1, 3).sum(axis=1), 1e-8)
    report.floor("largest curvature", np.abs(hessian).max(), 1.0)
    report.floor("coupling of the molecules", np.abs(hessian[:9, 9:]).max(), 1e-3)


def verlet(subject, atoms, velocities, step, n_steps):
    """Velocity Verlet: atoms and velocities at the end, total and kinetic energies before steps."""
    atoms, velocities = atoms.copy(), velocities.copy()
    masses = atoms.get_masses()[:, None]
    total, kinetic = [], []
    result = subject.evaluate(atoms)
    for _ in range(n_steps):
        kinetic.append(0.5 * np.sum(masses * velocities**2))
        total.append(result.energy + kinetic[-1])
        velocities += 0.5 * step * result.forces / masses
        atoms.positions += step * velocities
        result = subject.evaluate(atoms)
        velocities += 0.5 * step * result.forces / masses
    return atoms, velocities, np.array(total), np.array(kinetic)


@gate
def dynamics(subject, report):
    """Energy fluctuates with the square of the time step, and time can be turned back."""
    atoms = pair()
    atoms.set_masses(6 * [12.0])  # random weights would throw hydrogen about
    velocities = np.random.default_rng(5).normal(size=(6, 3)) * np.sqrt(kB * 300.0 / 12.0)
    step, n_steps = 0.02 * fs, 500
    there, final, total, kinetic = verlet(subject, atoms, velocities, step, n_steps)
    _, _, finer, _ = verlet(subject, atoms, velocities, step / 2, 2 * n_steps)
    back, _, _, _ = verlet(subject, there, -final, step, n_steps)
    ratio = (total - total[0]).std() / (finer[::2] - finer[0]).std()
    report.below("ratio of fluctuations - 4", ratio - 4.0, 0.5)
    report.below("time reversal", back.positions - atoms.positions, 1e-9)
    report.floor("exchange with kinetic energy", np.ptp(kinetic), 0.02)
    report.floor("path", np.abs(there.positions - atoms.positions).max(), 0.03)


def padding(subject, report):
    """Capacities of just what is needed, one more and many more give the same."""
    atoms = crystal()
    home = subject.evaluate(atoms)
    report.strong(home)
    for capacity, graphs in ((lambda n: n, 1), (lambda n: n + 1, 2), (lambda n: 4 * n, 2)):
        energies, forces, stress = subject.padded(atoms, capacity, capacity, graphs)
        n = len(atoms)
        report.below("energy", energies.sum() - home.interaction_energy, 1e-12)
        report.below("forces", forces[:n] - home.forces, 1e-12)
        report.below("stress", stress[0] - home.stress, 1e-12)
        if graphs > 1:
            padded = np.concatenate([energies[n:], forces[n:].ravel(), stress[1:].ravel()])
            report.below("padding", padded, 0.0)


# Tests


@functools.cache
def subject(name, dtype):
    return Subject(potential(name), dtype)


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


@pytest.mark.parametrize("gate", SINGLE_PRECISION)
@pytest.mark.parametrize("name", NAMES)
def test_single_precision(name, gate, record_property):
    check(GATES[gate], subject(name, "float32"), record_property)


@pytest.mark.parametrize("name", CONFIGS)
def test_padding_changes_nothing(name, record_property):
    check(padding, subject(name, "float64"), record_property)


# A gate that cannot fail proves nothing


@pytest.fixture(scope="module")
def intact():
    return subject("mace", "float64")


@pytest.mark.parametrize("gate", [*GATES, "padding"])
@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_no_gate_passes_a_model_without_interactions(intact, gate, constant):
    report = Report()
    with np.errstate(invalid="ignore", divide="ignore"):
        {**GATES, "padding": padding}[gate](Null(intact, constant), report)
    assert report.failures()


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
        "forces_are_minus_the_gradient",
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
        "smooth_at_the_cutoff receptive_field isolated_atom forces_are_minus_the_gradient",
    ),
}


@pytest.mark.parametrize("alteration", ALTERATIONS)
def test_gates_catch(intact, alteration):
    alter, gates = ALTERATIONS[alteration]
    for gate in gates.split():
        report = Report()
        GATES[gate](Altered(intact, alter), report)
        assert report.failures(), gate
