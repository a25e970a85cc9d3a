"""Conformations of each kind of task: thermal ones by GFN2-xTB dynamics, others on purpose.

Positions are (N, 3) in Å.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np

from mlip_md.trainer.generate.chemistry import (
    Conformation,
    Molecule,
    Sample,
    build_molecule,
    join_molecules,
)
from mlip_md.trainer.generate.distortions import distort, press
from mlip_md.trainer.generate.dynamics import XTBSurface, quench, run_langevin, spc_fw_forces
from mlip_md.trainer.generate.labels import LabelError
from mlip_md.trainer.generate.placement import (
    place_in_contact,
    place_in_hydrogen_bond,
    surround,
)


def sample_molecule(smiles: str, rng: np.random.Generator) -> Sample:
    """One molecule in vacuum: dynamics at 300 to 1200 K, quenched partners, distortions."""
    molecule = build_molecule(smiles, 4, rng)
    n = len(molecule.atomic_numbers)
    surface = XTBSurface(molecule)
    thermal: list[Conformation] = []
    for index, temperature in enumerate((300, 500, 800, 1200) if n <= 20 else (300, 500, 1000)):
        start = molecule.conformers[index % len(molecule.conformers)]
        thermal += _thermal(surface, molecule, start, temperature, rng, quenched=index % 2 == 1)
    if n <= 8:
        counts = {"stretch": 8, "angle": 3, "twist": 1, "rattle": 3}
    elif n <= 20:
        counts = {"stretch": 4, "angle": 1, "twist": 1, "rattle": 1}
    else:
        counts = {"stretch": 3, "angle": 1, "twist": 2, "rattle": 1}
    bases = [*molecule.conformers, *[one.positions for one in thermal[:4]]]
    return molecule, thermal + distort(molecule, bases, counts, rng)


def sample_complex(smiles: Sequence[str], rng: np.random.Generator) -> Sample:
    """Two molecules: contacts, hydrogen bonds, a relaxed and a thermal conformation."""
    first, second = (build_molecule(part, 2, rng) for part in smiles)
    molecule = join_molecules([first, second])
    made: list[Conformation] = []

    def rattled(one: Molecule) -> np.ndarray:
        base = one.conformers[rng.integers(len(one.conformers))]
        return base + 0.03 * rng.normal(size=base.shape)

    def touching(low: float, high: float) -> np.ndarray:
        ratio = np.exp(rng.uniform(np.log(low), np.log(high)))
        return place_in_contact(first, rattled(first), second, rattled(second), ratio, rng)

    for low, high in [(0.5, 0.75), (0.7, 1.1), (0.9, 2.4)]:
        made.append(Conformation(touching(low, high), "contact"))
    best = touching(0.85, 0.95)
    for low, high in [(1.6, 2.1), (1.2, 2.6)]:
        length = rng.uniform(low, high)
        bonded = place_in_hydrogen_bond(first, rattled(first), second, rattled(second), length, rng)
        if bonded is None:
            made.append(Conformation(touching(0.65, 1.0), "contact"))
        else:
            made.append(Conformation(bonded, "hydrogen bond"))
            best = bonded if low == 1.6 else best
    surface = XTBSurface(molecule)
    relaxed = _relaxed(surface, best, 10)
    start = relaxed[0].positions if relaxed else best
    temperature = rng.choice([300, 500])
    thermal = _thermal(surface, molecule, start, temperature, rng, settle=6, every=10, count=1)
    return molecule, made + relaxed + thermal


def sample_water(
    num_molecules: int, num_starts: int, rng: np.random.Generator, per_start: int = 8
) -> Sample:
    """Water clusters: SPC/Fw droplets at 300 or 400 K, then GFN2-xTB dynamics from there."""
    water = build_molecule("O", 1, rng)
    made: list[Conformation] = []
    for start in range(num_starts):
        molecule, positions = surround([water] * num_molecules, rng)
        temperature = (300, 400)[start % 2]
        forces = spc_fw_forces(num_molecules)
        positions = quench(forces, positions, 50)
        steps = int(rng.integers(700, 1500))
        for droplet in run_langevin(
            forces, molecule.masses, positions, temperature, steps, steps, rng
        ):
            positions = droplet
        made.append(Conformation(positions, "water model"))
        made += _thermal(
            XTBSurface(molecule), molecule, positions, temperature, rng,
            settle=4, every=5, count=per_start - 2, quenched=True,
        )  # fmt: skip
    return molecule, made


def sample_solvated(
    smiles: str, num_waters: int, rng: np.random.Generator, count: int = 5
) -> Sample:
    """A molecule among waters, relaxed briefly and then at 300 K."""
    solute = build_molecule(smiles, 1, rng)
    water = build_molecule("O", 1, rng)
    molecule, positions = surround([solute] + [water] * num_waters, rng)
    surface = XTBSurface(molecule)
    relaxed = _relaxed(surface, positions, 12)
    start = relaxed[0].positions if relaxed else positions
    thermal = _thermal(surface, molecule, start, 300, rng, settle=6, every=8, count=count)
    return molecule, relaxed + thermal


def sample_pressed(
    smiles: Sequence[str], num_waters: int, rng: np.random.Generator, count: int = 6
) -> Sample:
    """Molecules pressed into each other, and a few steps back: what no liquid may fall into.

    A potential that never saw several contacts too short at once may find energy there; a whole
    drop then collapses into such a place, over a barrier that no pair of molecules has.
    """
    parts = [build_molecule(one, 1, rng) for one in [*smiles, *["O"] * num_waters]]
    molecule, positions = surround(parts, rng)
    surface = XTBSurface(molecule)
    made = _relaxed(surface, positions, 20)
    start = made[0].positions if made else positions
    members = np.repeat(np.arange(len(parts)), [len(part.atomic_numbers) for part in parts])
    for _ in range(count):
        pressed = press(start, members, rng)
        made.append(Conformation(pressed, "pressed"))
        made += _relaxed(surface, pressed, int(rng.integers(1, 6)))
    return molecule, made


def _thermal(
    surface: XTBSurface,
    molecule: Molecule,
    start: np.ndarray,
    temperature: float,
    rng: np.random.Generator,
    settle: int = 10,
    every: int = 10,
    count: int = 2,
    quenched: bool = False,
) -> list[Conformation]:
    """Dynamics of `settle + count * every` steps: `count` conformations, and a quenched one."""
    made: list[Conformation] = []
    with suppress(LabelError):  # what there is until then is good
        steps = settle + count * every
        path = run_langevin(surface, molecule.masses, start, temperature, steps, 1, rng)
        for step, positions in enumerate(path, start=1):
            if step > settle and (step - settle) % every == 0:
                made.append(Conformation(positions, "md"))
        if quenched and made:
            made.append(Conformation(quench(surface, made[-1].positions), "quench"))
    return made


def _relaxed(surface: XTBSurface, start: np.ndarray, steps: int) -> list[Conformation]:
    with suppress(LabelError):
        return [Conformation(quench(surface, start, steps), "quench")]
    return []
