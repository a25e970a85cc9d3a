"""A first recipe for a data set, after looking at it: every row with a reason beside it."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlip_md.elements import symbol
from mlip_md.errors import ConfigError
from mlip_md.trainer.data import Reading
from mlip_md.trainer.recipe import DataConfig

CUTOFF = 5.0
"""Å; reaches second neighbors, and through two layers of messages 10 Å."""
ATOMS_PER_BATCH, MOST_PER_BATCH = 256, 32
STEPS = 60_000
"""Updates after which small networks have learned most of what they can."""
FEW_GROUPS = 10
"""With fewer molecules, a part for validation would hold one or none of them."""
NOISE = 0.1
"""eV/Å, net force over √N: what loosely converged forces of plane-wave programs have."""


@dataclasses.dataclass(frozen=True)
class Look:
    """What was seen of a data set.

    Attributes:
        paths: its files.
        count: structures, without isolated atoms.
        elements: atomic numbers.
        sizes: (count,) numbers of atoms.
        groups: molecules.
        marked: whether every structure has a mark of its part.
        periodic: share of structures with a cell.
        stresses: share with a stress.
        forces: share with forces.
        charged: share with a total charge.
        noisy: share with a net force above ``NOISE``.
        atoms: elements of which isolated atoms are there.
        bad: unusable records.
    """

    paths: tuple[str, ...]
    count: int
    elements: tuple[int, ...]
    sizes: np.ndarray
    groups: int
    marked: bool
    periodic: float
    stresses: float
    forces: float
    charged: float
    noisy: float
    atoms: tuple[int, ...]
    bad: int


def look_at(paths: Sequence[str]) -> Look:
    """Read a data set once.

    Raises:
        DataError: if there is no usable structure in it.
    """
    reading = Reading(DataConfig(path=list(paths), on_bad="skip", cutoff=CUTOFF))
    sizes: list[int] = []
    elements: set[int] = set()
    groups: set[str] = set()
    seen: collections.Counter[str] = collections.Counter()
    for structure in reading.structures():
        sizes.append(len(structure))
        elements.update(structure.atomic_numbers.tolist())
        groups.add(structure.group)
        net = float(np.linalg.norm(structure.forces.sum(axis=0)))
        seen["marked"] += bool(structure.mark)
        seen["periodic"] += structure.cell is not None
        seen["stresses"] += structure.stress is not None
        seen["forces"] += structure.has_forces
        seen["charged"] += structure.charge != 0
        seen["noisy"] += net > NOISE * math.sqrt(len(structure))
    count = len(sizes)
    return Look(
        paths=tuple(paths),
        count=count,
        elements=tuple(sorted(elements)),
        sizes=np.array(sizes),
        groups=len(groups),
        marked=seen["marked"] == count,
        atoms=tuple(sorted(reading.isolated.found)),
        bad=reading.rejected.count,
        **{n: seen[n] / count for n in ("periodic", "stresses", "forces", "charged", "noisy")},
    )


def write_recipe(look: Look, name: str, length: int | None = None) -> str:
    """The recipe for a data set as YAML, every row commented.

    Args:
        look: at the data set.
        name: of the potential.
        length: of the training in epochs; None for ``STEPS`` steps.
    """
    length = epochs(look) if length is None else length
    training = (_loss(look, length), _training(look, length))
    sections = (_head(look, name), _model(look), _data(look), *training)
    return "\n".join(sections)


def _head(look: Look, name: str) -> str:
    names = " ".join(symbol(z) for z in look.elements)
    least, most = look.sizes.min(), look.sizes.max()
    middle = f"{least} to {most} atoms, {np.median(look.sizes):g} in the middle"
    sizes = f"{most} atoms" if least == most else middle
    return f"""\
# Recipe for {look.count} structures of {names} with {sizes}.
# "mlip-md check FILE" says what it comes to, "mlip-md train FILE" runs it.
name: {json.dumps(name, ensure_ascii=False)}
seed: 42
"""


def _model(look: Look) -> str:
    channels, l_max = (
        (32, 2) if look.count < 20_000 else (64, 2) if look.count < 300_000 else (128, 3)
    )
    missing = [symbol(z) for z in look.elements if z not in look.atoms]
    if not missing:
        energies, why = "isolated", "E0 of the isolated atoms in the data, exactly"
    else:
        energies = "average"
        why = "E0 fitted; better: isolated, with isolated atoms of the same method in the data"
    return f"""\
model:
  kind: mace                  # or nequip
  num_layers: 2               # an atom sees up to {2 * CUTOFF:g} Å
  num_channels: {channels:<14d}# size of the network, for {look.count} structures: 32, 64 or 128
  l_max: {l_max:<21d}# highest degree of directions
  node_symmetry: 1            # kept between layers; more is slower
  correlation: 3              # bodies per product; 3 is MACE's usual one
  readout_irreps: [16x0e, 0e]
  num_bessel: 8
  symmetric_tensor_product_basis: true
  atomic_energies: {energies:<11s}# {why}
"""


def _data(look: Look) -> str:
    paths = json.dumps(look.paths[0] if len(look.paths) == 1 else look.paths, ensure_ascii=False)
    batch = batch_size(look)
    bad = "skip" if look.bad else "error"
    noise, why = (str(NOISE), "eV/Å, net force over √atoms: noise of the method")
    if look.noisy > 0.01:
        noise, why = "null", f"{100 * look.noisy:.2g} % have more than {NOISE} eV/Å of net force"
    neutral = str(look.charged > 0).lower()
    return f"""\
data:
  path: {paths}
  cutoff: {CUTOFF:<20g}# Å
  batch_size: {batch:<16d}# most structures in a batch, of {np.median(look.sizes):g} atoms
  max_n_node: null            # room for atoms in a batch: measured
  max_n_edge: null            # room for pairs: measured
  split: {_split(look)}
  on_bad: {bad:<20s}# {look.bad or "no"} unusable records; skip leaves them out
  curate:                     # filters; what each removes is told
    elements: null            # all
    neutral_only: {neutral:<12s}# {100 * look.charged:.2g} % have a charge; the network sees none
    one_bond_per_hydrogen: false    # true for organic molecules without reactions
    max_force: null           # eV/Å
    max_net_force: null       # eV/Å
    max_net_force_per_sqrt_atom: {noise}    # {why}
"""


def _split(look: Look) -> str:
    if look.marked:
        return "{from_file: true}    # as the file marks its structures"
    share = 0.1 if look.count < 100_000 else 0.05
    by, why = "group", f"{look.groups} molecules: none is in two parts"
    if look.groups < FEW_GROUPS:
        by = "structure"
        why = f"{look.groups} molecule{'s' * (look.groups != 1)}, parted by structure"
    return f"{{train: {1 - share:g}, validation: {share:g}, by: {by}, seed: 0}}    # {why}"


def _loss(look: Look, length: int) -> str:
    flip = max(2, round(0.75 * length))
    forces = "{weight: 0.0}    # there are none"
    energy = "{weight: 40.0}"
    if look.forces:
        energy = (
            f"{{weight: [{{from_epoch: 1, value: 40.0}}, {{from_epoch: {flip}, value: 1000.0}}]}}"
        )
        forces = (
            f"{{weight: [{{from_epoch: 1, value: 1000.0}}, {{from_epoch: {flip}, value: 100.0}}]}}"
        )
    stress = "{weight: 0.0}    # there are none"
    if look.stresses:
        stress = "{weight: 100000.0}    # 0.005 eV/Å³ weigh like 0.05 eV/Å"
    return f"""\
loss:
  kind: huber                 # a few large errors do not rule
  # forces first, then energies, from three quarters of the training on
  energy: {energy}
  forces: {forces}
  stress: {stress}
"""


def _training(look: Look, length: int) -> str:
    steps = length * steps_per_epoch(look)
    warmup = min(1000, max(10, steps // 20))
    return f"""\
optimizer:
  init_learning_rate: 0.0005  # rises to
  peak_learning_rate: 0.003   # within the steps of the warm-up, and falls to
  final_learning_rate: 0.00002
  warmup_steps: {warmup}
  transition_steps: {max(1, steps - warmup):<10d}# to the end of the training
  grad_norm: 100.0            # longer gradients are clipped

train:
  epochs: {length:<20d}# about {steps} steps; halve them for a first try
  ema_decay: 0.999            # weights are averaged over some thousand steps
"""


def batch_size(look: Look) -> int:
    """Structures in a batch, a power of 2: some hundred atoms, and 20 batches an epoch at least."""
    wanted = min(ATOMS_PER_BATCH / float(np.median(look.sizes)), look.count / 20, MOST_PER_BATCH)
    return int(2 ** max(0, math.floor(math.log2(max(wanted, 1)))))


def steps_per_epoch(look: Look) -> int:
    """Batches of an epoch, about."""
    return max(1, math.ceil(0.9 * look.count / batch_size(look)))


def epochs(look: Look) -> int:
    """Length of the training: ``STEPS`` steps, 10 to 1000 epochs."""
    return min(1000, max(10, round(STEPS / steps_per_epoch(look))))


def paths_for(paths: Sequence[Path], output: Path) -> list[str]:
    """Paths as a recipe in another folder has to name them.

    Raises:
        ConfigError: if there is no such file.
    """
    for path in paths:
        if not path.exists():
            raise ConfigError(f"there is no data file {path}")
    here = output.resolve().parent == Path.cwd()
    return [str(path) if here or path.is_absolute() else os.path.abspath(path) for path in paths]
