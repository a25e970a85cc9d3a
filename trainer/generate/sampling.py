"""Geometries for the data set: thermal ones by GFN2-xTB dynamics, distorted ones on purpose.

Positions are in Å, energies in eV, times in fs throughout.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mlip_md.trainer.generate.chemistry import VAN_DER_WAALS_RADII, Molecule, build, combine
from mlip_md.trainer.generate.labels import BOHR, FORCE_UNIT, HARTREE, LabelError, gfn2_calculator

HEAVY_HYDROGEN = 4.0  # u
KB = 8.617333262e-5  # eV/K
ACCELERATION = 9.648533212e-3  # Å/fs² per eV/(Å u)
ORIGINS = (
    "md",
    "quench",
    "stretch",
    "angle",
    "twist",
    "rattle",
    "contact",
    "hydrogen bond",
    "water model",
)


@dataclass(frozen=True)
class Frame:
    """One sampled geometry: positions (N, 3) in Å and which of `ORIGINS` made it."""

    positions: np.ndarray
    origin: str


class Surface:
    """The GFN2-xTB energy surface of one molecule, converged loosely: for sampling only."""

    def __init__(self, molecule: Molecule):
        self._molecule = molecule
        self._calculator: Any = None
        self._result: Any = None

    def __call__(self, positions: np.ndarray) -> tuple[float, np.ndarray]:
        """Energy in eV and forces (N, 3) in eV/Å at positions (N, 3) in Å.

        Raises:
            LabelError: not converged.
        """
        from tblite.exceptions import TBLiteRuntimeError

        try:
            if self._calculator is None:
                self._calculator = gfn2_calculator(
                    self._molecule.atomic_numbers,
                    positions / BOHR,
                    self._molecule.charge,
                    accuracy=100.0,
                )
                self._result = self._calculator.singlepoint()
            else:
                self._calculator.update(positions=positions / BOHR)
                self._result = self._calculator.singlepoint(self._result, copy=True)
        except TBLiteRuntimeError as error:
            self._calculator = None
            raise LabelError(f"GFN2-xTB failed while sampling: {error}") from error
        return float(self._result["energy"]) * HARTREE, -self._result["gradient"] * FORCE_UNIT


def langevin(
    forces, masses, positions, temperature, steps, every, rng, timestep=2.0, friction=0.02
):
    """Langevin dynamics (BAOAB) from a rest geometry; yields positions each `every` steps.

    Hydrogens weigh `HEAVY_HYDROGEN`: the distribution of positions does not depend on masses,
    and the time step can be twice as long. Velocities start at twice the temperature because
    half of that energy goes into the bonds.

    Args:
        forces: positions (N, 3) in Å -> (energy in eV, forces (N, 3) in eV/Å).
        masses: (N,) in u.
        positions: (N, 3) in Å.
        temperature: in K.
        steps: number of time steps.
        every: steps between two samples.
        rng: source of the noise.
        timestep: in fs.
        friction: in 1/fs.
    """
    mass = np.maximum(masses, HEAVY_HYDROGEN)[:, None]
    width = np.sqrt(KB * temperature * ACCELERATION / mass)
    velocities = np.sqrt(2.0) * width * rng.normal(size=positions.shape)
    velocities -= (mass * velocities).sum(0) / mass.sum()
    decay = np.exp(-friction * timestep)
    _, force = forces(positions)
    for step in range(1, steps + 1):
        velocities = velocities + 0.5 * timestep * ACCELERATION * force / mass
        positions = positions + 0.5 * timestep * velocities
        noise = width * rng.normal(size=positions.shape)
        velocities = decay * velocities + np.sqrt(1 - decay**2) * noise
        positions = positions + 0.5 * timestep * velocities
        _, force = forces(positions)
        if not np.all(np.abs(force) < 200.0):
            return
        velocities = velocities + 0.5 * timestep * ACCELERATION * force / mass
        if step % every == 0:
            yield positions


def quench(forces, positions, steps=6):
    """A few clipped steepest-descent steps: the low-energy partner of a thermal geometry."""
    for _ in range(steps):
        positions = positions + np.clip(0.0062 * forces(positions)[1], -0.04, 0.04)
    return positions


def stretch(molecule, positions, bond, factor):
    """Change one bond length; the smaller side moves rigidly, in a ring only the two atoms."""
    first, second = bond
    axis = positions[second] - positions[first]
    shift = (factor - 1.0) * axis
    moved = positions.copy()
    if bond in molecule.ring_bonds:
        moved[first] -= 0.5 * shift
        moved[second] += 0.5 * shift
        return moved
    side = beyond(molecule, first, second)
    if 2 * side.sum() <= len(positions):
        moved[side] += shift
    else:
        moved[beyond(molecule, second, first)] -= shift
    return moved


def rotate_beyond(molecule, positions, bond, axis, angle):
    """Rotate what lies beyond a bond about an axis through the bond's first atom (radians)."""
    first, second = bond
    side = beyond(molecule, first, second)
    moved = positions.copy()
    center = positions[first]
    moved[side] = (positions[side] - center) @ rotation(axis, angle).T + center
    return moved


def beyond(molecule, first, second):
    """Mask (N,) of the atoms on the side of `second` of a bond that is in no ring."""
    neighbors = molecule.neighbors()
    mask = np.zeros(len(neighbors), dtype=bool)
    mask[second] = True
    stack = [second]
    while stack:
        for atom in neighbors[stack.pop()]:
            if not mask[atom] and atom != first:
                mask[atom] = True
                stack.append(atom)
    return mask


def rotation(axis, angle):
    """Rotation matrix about an axis by an angle in radians (Rodrigues)."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def random_rotation(rng):
    """A uniformly random rotation matrix."""
    q = rng.normal(size=4)
    w, x, y, z = q / np.linalg.norm(q)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def distorted(molecule, bases, counts, rng):
    """Distorted copies of given geometries.

    Args:
        molecule: with its bonds.
        bases: geometries (N, 3) in Å to distort.
        counts: how many of each kind: "stretch", "angle", "twist", "rattle"; a molecule without
            an open angle or torsion is rattled in their place.
        rng: source of every choice.

    Returns:
        Frames.
    """
    makers = {"stretch": _stretched, "angle": _bent, "twist": _twisted, "rattle": _rattled}
    frames = []
    for kind, count in counts.items():
        for _ in range(count):
            base = bases[rng.integers(len(bases))]
            positions = makers[kind](molecule, base, rng)
            if positions is not None:
                frames.append(Frame(positions, kind))
    return frames


def _stretched(molecule, positions, rng):
    bond = molecule.bonds[rng.integers(len(molecule.bonds))]
    rng.random()  # a draw that recipe 1 has: without it every later geometry would be another
    if bond in molecule.ring_bonds:
        return stretch(molecule, positions, bond, rng.uniform(0.82, 1.25))
    # as many compressed as stretched ones, a few of them towards dissociation
    factor = rng.uniform(0.68, 1.0) if rng.random() < 0.5 else rng.uniform(1.0, 1.5)
    if rng.random() < 0.1:
        factor = rng.uniform(1.5, 2.2)
    return stretch(molecule, positions, bond, factor)


def _bent(molecule, positions, rng):
    open_bonds = _directed_open_bonds(molecule)
    if not open_bonds:
        return _rattled(molecule, positions, rng)
    bond = open_bonds[rng.integers(len(open_bonds))]
    along = positions[bond[1]] - positions[bond[0]]
    axis = np.cross(along, rng.normal(size=3))
    return rotate_beyond(molecule, positions, bond, axis, np.deg2rad(rng.uniform(8, 40)))


def _twisted(molecule, positions, rng):
    neighbors = molecule.neighbors()
    inner = [
        (a, b)
        for a, b in _directed_open_bonds(molecule)
        if len(neighbors[a]) > 1 and len(neighbors[b]) > 1
    ]
    if not inner:
        return _rattled(molecule, positions, rng)
    bond = inner[rng.integers(len(inner))]
    axis = positions[bond[1]] - positions[bond[0]]
    return rotate_beyond(molecule, positions, bond, axis, rng.uniform(0.3, 2 * np.pi - 0.3))


def _rattled(molecule, positions, rng):
    if rng.random() < 0.3:
        return positions * rng.uniform(0.90, 1.10) + 0.02 * rng.normal(size=positions.shape)
    return positions + rng.uniform(0.03, 0.14) * rng.normal(size=positions.shape)


def _directed_open_bonds(molecule):
    single = [bond for bond in molecule.bonds if bond not in molecule.ring_bonds]
    neighbors = molecule.neighbors()
    both = single + [(b, a) for a, b in single]
    return [(a, b) for a, b in both if len(neighbors[a]) > 1]


def contact(first, first_positions, second, second_positions, ratio, rng):
    """Put a second molecule at a random side and orientation of a first one.

    Args:
        first: the molecule that stays.
        first_positions: (N, 3) in Å.
        second: the molecule that is placed.
        second_positions: (M, 3) in Å.
        ratio: smallest distance between the two over the sum of the van der Waals radii.
        rng: source of the orientation.

    Returns:
        (N + M, 3) positions in Å.
    """
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    fixed = first_positions - first_positions.mean(0)
    placed = (second_positions - second_positions.mean(0)) @ random_rotation(rng).T
    radii = _radii(first)[:, None] + _radii(second)[None, :]
    near, far = 0.0, 60.0
    for _ in range(40):
        middle = 0.5 * (near + far)
        gap = np.linalg.norm(fixed[:, None] - placed[None] - middle * direction, axis=-1) / radii
        near, far = (middle, far) if gap.min() < ratio else (near, middle)
    return np.concatenate([fixed, placed + far * direction])


def hydrogen_bond(first, first_positions, second, second_positions, length, rng):
    """Place an acceptor of one molecule on the axis of a polar X-H bond of the other.

    Args:
        first: the donor if it has a polar hydrogen, else the acceptor.
        first_positions: (N, 3) in Å.
        second: the other molecule.
        second_positions: (M, 3) in Å.
        length: H...acceptor distance in Å.
        rng: source of the choices.

    Returns:
        (N + M, 3) positions in Å, or None when no donor and acceptor face each other.
    """
    options = [(True, h, a) for h in _donors(first) for a in _acceptors(second)]
    options += [(False, h, a) for h in _donors(second) for a in _acceptors(first)]
    if not options:
        return None
    forward, (heavy, hydrogen), acceptor = options[rng.integers(len(options))]
    donor, giver, taker, receiver = (
        (first_positions, first, second_positions, second)
        if forward
        else (second_positions, second, first_positions, first)
    )
    axis = donor[hydrogen] - donor[heavy]
    site = donor[hydrogen] + length * axis / np.linalg.norm(axis)
    radii = _radii(giver)[:, None] + _radii(receiver)[None, :]
    best, best_gap = None, -1.0
    for _ in range(24):
        trial = (taker - taker[acceptor]) @ random_rotation(rng).T + site
        gap = np.linalg.norm(donor[:, None] - trial[None], axis=-1) / radii
        gap[hydrogen, acceptor] = gap[heavy, acceptor] = 9.0
        if gap.min() > best_gap:
            best, best_gap = trial, gap.min()
    return np.concatenate([donor, best] if forward else [best, donor])


def _radii(molecule):
    return np.array([VAN_DER_WAALS_RADII[int(z)] for z in molecule.atomic_numbers])


def _donors(molecule):
    numbers, neighbors = molecule.atomic_numbers, molecule.neighbors()
    hydrogens = [i for i, z in enumerate(numbers) if z == 1 and neighbors[i]]
    return [
        (neighbors[h][0], h) for h in hydrogens if numbers[neighbors[h][0]] in (7, 8, 9, 16, 17)
    ]


def _acceptors(molecule):
    return [i for i, z in enumerate(molecule.atomic_numbers) if z in (7, 8, 9, 16, 17, 35)]


def pack(molecules, rng, ratio=0.80):
    """Place molecules around the first one, each as near to the center as its contacts allow.

    Args:
        molecules: with one conformer each; the first is put in the center.
        rng: source of directions and orientations.
        ratio: smallest allowed distance over the sum of van der Waals radii (0.8: hydrogen bonds).

    Returns:
        The combined molecule and its positions (N, 3) in Å.
    """
    placed = molecules[0].conformers[0] - molecules[0].conformers[0].mean(0)
    radii = _radii(molecules[0])
    for molecule in molecules[1:]:
        own = molecule.conformers[0] - molecule.conformers[0].mean(0)
        best, best_radius = None, np.inf
        for _ in range(12):
            turned = own @ random_rotation(rng).T
            direction = rng.normal(size=3)
            direction /= np.linalg.norm(direction)
            for radius in np.arange(0.0, min(best_radius, 40.0), 0.3):
                trial = turned + radius * direction
                gap = np.linalg.norm(placed[:, None] - trial[None], axis=-1)
                if (gap / (radii[:, None] + _radii(molecule)[None])).min() >= ratio:
                    best, best_radius = trial, radius
                    break
        placed = np.concatenate([placed, best])
        radii = np.concatenate([radii, _radii(molecule)])
    return combine(molecules), placed


def water_model(num_molecules):
    """Forces of the flexible SPC/Fw water model without cutoff, to prepare clusters cheaply.

    Wu, Tepper and Voth, J. Chem. Phys. 124, 024503 (2006), Table I. Atoms in the order O H H.

    Returns:
        positions (3n, 3) in Å -> (energy in eV, forces (3n, 3) in eV/Å).
    """
    kcal = 0.0433641
    charges = np.tile([-0.82, 0.41, 0.41], num_molecules)
    owner = np.repeat(np.arange(num_molecules), 3)
    apart = owner[:, None] != owner[None, :]
    coulomb = 14.399645 * charges[:, None] * charges[None, :] * apart
    oxygen = np.arange(0, 3 * num_molecules, 3)
    k_bond, r_bond, k_angle, angle_0 = 1059.162 * kcal, 1.012, 75.90 * kcal, np.deg2rad(113.24)
    epsilon, sigma = 0.1554253 * kcal, 3.165492

    def forces(positions):
        difference = positions[:, None] - positions[None]
        distance = np.sqrt((difference**2).sum(-1) + 1e-12)
        inverse = np.where(apart, 1.0 / distance, 0.0)
        pair = coulomb * inverse
        energy = 0.5 * pair.sum()
        slope = pair * inverse**2
        oo = np.ix_(oxygen, oxygen)
        six = (sigma * inverse[oo]) ** 6
        energy += 2.0 * epsilon * (six**2 - six).sum()
        slope[oo] += 24.0 * epsilon * (2 * six**2 - six) * inverse[oo] ** 2
        force = (slope[..., None] * difference).sum(1)
        arms = [positions[oxygen + i] - positions[oxygen] for i in (1, 2)]
        lengths = [np.linalg.norm(arm, axis=1, keepdims=True) for arm in arms]
        units = [arm / length for arm, length in zip(arms, lengths, strict=True)]
        cosine = np.clip((units[0] * units[1]).sum(1, keepdims=True), -0.999999, 0.999999)
        bend = np.arccos(cosine) - angle_0
        energy += 0.5 * k_angle * (bend**2).sum()
        for i in (0, 1):
            reach = lengths[i] - r_bond
            energy += 0.5 * k_bond * (reach**2).sum()
            turn = (units[1 - i] - cosine * units[i]) / (lengths[i] * np.sqrt(1 - cosine**2))
            push = -k_bond * reach * units[i] + k_angle * bend * turn
            force[oxygen + 1 + i] += push
            force[oxygen] -= push
        return float(energy), force

    return forces


def sample_molecule(smiles, rng):
    """Frames of one molecule in vacuum: dynamics at 300 to 1200 K, partners, distortions."""
    molecule = build(smiles, 4, rng)
    n = len(molecule.atomic_numbers)
    surface = Surface(molecule)
    temperatures = (300, 500, 800, 1200) if n <= 20 else (300, 500, 1000)
    frames = []
    for index, temperature in enumerate(temperatures):
        start = molecule.conformers[index % len(molecule.conformers)]
        frames += _thermal(surface, molecule, start, temperature, rng, quenched=index % 2 == 1)
    if n <= 8:
        counts = {"stretch": 8, "angle": 3, "twist": 1, "rattle": 3}
    elif n <= 20:
        counts = {"stretch": 4, "angle": 1, "twist": 1, "rattle": 1}
    else:
        counts = {"stretch": 3, "angle": 1, "twist": 2, "rattle": 1}
    bases = [*molecule.conformers, *[f.positions for f in frames[:4]]]
    return molecule, frames + distorted(molecule, bases, counts, rng)


def sample_complex(smiles, rng, num_contacts=3, num_bonds=2):
    """Frames of two molecules: contacts, hydrogen bonds, a relaxed and a thermal one."""
    first, second = (build(part, 2, rng) for part in smiles)
    molecule = combine([first, second])
    frames = []

    def rattled(one):
        base = one.conformers[rng.integers(len(one.conformers))]
        return base + 0.03 * rng.normal(size=base.shape)

    def touching(low, high):
        ratio = np.exp(rng.uniform(np.log(low), np.log(high)))
        return contact(first, rattled(first), second, rattled(second), ratio, rng)

    for low, high in [(0.5, 0.75), (0.7, 1.1), (0.9, 2.4)][:num_contacts]:
        frames.append(Frame(touching(low, high), "contact"))
    best = touching(0.85, 0.95)
    for low, high in [(1.6, 2.1), (1.2, 2.6)][:num_bonds]:
        length = rng.uniform(low, high)
        bonded = hydrogen_bond(first, rattled(first), second, rattled(second), length, rng)
        if bonded is None:
            frames.append(Frame(touching(0.65, 1.0), "contact"))
        else:
            frames.append(Frame(bonded, "hydrogen bond"))
            best = bonded if low == 1.6 else best
    surface = Surface(molecule)
    relaxed = _guarded(lambda: [Frame(quench(surface, best, 10), "quench")])
    start = relaxed[0].positions if relaxed else best
    temperature = rng.choice([300, 500])
    thermal = _thermal(surface, molecule, start, temperature, rng, settle=6, every=10, count=1)
    return molecule, frames + relaxed + thermal


def sample_water(num_molecules, num_starts, rng, frames_per_start=8):
    """Frames of water clusters: SPC/Fw droplets at 300 or 400 K, then GFN2-xTB dynamics."""
    water = build("O", 1, rng)
    frames = []
    for start in range(num_starts):
        molecule, positions = pack([water] * num_molecules, rng)
        temperature = (300, 400)[start % 2]
        model = water_model(num_molecules)
        positions = quench(model, positions, 50)
        steps = int(rng.integers(700, 1500))
        for droplet in langevin(model, molecule.masses, positions, temperature, steps, steps, rng):
            positions = droplet
        frames.append(Frame(positions, "water model"))
        frames += _thermal(
            Surface(molecule), molecule, positions, temperature, rng,
            settle=4, every=5, count=frames_per_start - 2, quenched=True,
        )  # fmt: skip
    return molecule, frames


def sample_solvated(smiles, num_waters, rng, count=5):
    """Frames of a molecule among waters, relaxed briefly and then at 300 K."""
    solute = build(smiles, 1, rng)
    water = build("O", 1, rng)
    molecule, positions = pack([solute] + [water] * num_waters, rng)
    surface = Surface(molecule)
    relaxed = _guarded(lambda: [Frame(quench(surface, positions, 12), "quench")])
    start = relaxed[0].positions if relaxed else positions
    frames = _thermal(surface, molecule, start, 300, rng, settle=6, every=8, count=count)
    return molecule, relaxed + frames


def _thermal(
    surface, molecule, start, temperature, rng, settle=10, every=10, count=2, quenched=False
):
    """Dynamics of `settle + count * every` steps from `start`: `count` frames, and a partner."""
    frames: list[Frame] = []

    def run():
        steps = settle + count * every
        path = langevin(surface, molecule.masses, start, temperature, steps, 1, rng)
        for step, positions in enumerate(path, start=1):
            if step > settle and (step - settle) % every == 0:
                frames.append(Frame(positions, "md"))
        if quenched and frames:
            frames.append(Frame(quench(surface, frames[-1].positions), "quench"))
        return frames

    _guarded(run)
    return frames


def _guarded(make):
    try:
        return make()
    except LabelError:
        return []
