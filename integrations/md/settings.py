"""What a run of molecular dynamics is told: its settings, and the file that keeps them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from mlip_md.errors import CheckpointError, ConfigError
from mlip_md.files import write_text
from mlip_md.hints import hint
from mlip_md.integrations.models import DEFAULT_MODEL
from mlip_md.integrations.versions import find_version_problem

EngineName = Literal["ase", "openmm"]
Ensemble = Literal["nve", "nvt", "npt"]
Precision = Literal["single", "double"]
TrajectoryFormat = Literal["dcd", "xtc"]
VelocityOrigin = Literal["draw", "file"]

SETTINGS = "settings.json"
"""Name of the file in a run folder."""
VERSION = 2
"""Of that file; 1 stated none and knew fewer settings."""

DEFAULT_STEPS = 2000
MAX_SEED = 2**31 - 2

_NUMBERS: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("temperature", "", lambda t: 0 <= t < math.inf, "at least 0 and finite"),
    ("friction", "", lambda rate: 0 <= rate < math.inf, "at least 0 and finite"),
    ("pressure", "", math.isfinite, "finite"),
    ("timestep", " fs", lambda t: 0 < t < math.inf, "positive and finite"),
    ("steps", "", lambda n: n is None or n >= 1, "at least 1"),
    ("report_interval", "", lambda n: n is None or n >= 1, "at least 1"),
    (
        "hydrogen_mass",
        " u",
        lambda mass: mass is None or 1 <= mass < math.inf,
        "at least 1 and finite, 3 for example",
    ),
    ("seed", "", lambda seed: 0 <= seed <= MAX_SEED, "in 0 … 2^31 - 2"),
)
"""Settings that are numbers: name, unit, what is allowed, and that in words."""


@dataclasses.dataclass(frozen=True)
class MDSettings:
    """What to run.

    Attributes:
        structure: file or bundled molecule; None is the bundled default.
        model: what ``mlip_md.load`` opens.
        engine: "ase" or "openmm".
        ensemble: "nve", "nvt" (Langevin) or "npt" (isotropic; periodic structures only).
        temperature: K; of the thermostat, and of the velocities at the start.
        pressure: bar, for npt.
        timestep: fs.
        steps: number of steps of the whole run.
        friction: 1/ps, of the Langevin thermostat.
        minimize: relax the positions first.
        seed: of velocities and thermostat.
        precision: "single" or "double".
        device: JAX device of the potential; None is JAX's default.
        platform: OpenMM platform; None is the fastest there is.
        report_interval: steps between frames; None makes about 500 frames.
        trajectory_format: of the trajectory for mdtraj: "dcd", or "xtc" (smaller; rounded to
            0.01 Å). The one for ASE is always there.
        frame: which of several frames or models of the file, counted from 0; None is for one.
        drop_virtual_sites: leave out sites without nucleus, which are refused otherwise.
        velocities: at the start: "draw" them, or those of the "file".
        hydrogen_mass: u, to which hydrogen is made heavier by what its heavy neighbor loses; None
            leaves the masses.
        head: which head of a mace-torch model that has several.

    Raises:
        ConfigError: if a value is not allowed.
    """

    structure: str | None = None
    model: str = DEFAULT_MODEL
    engine: EngineName = "ase"
    ensemble: Ensemble = "nvt"
    temperature: float = 300.0
    pressure: float = 1.0
    timestep: float = 0.5
    steps: int = DEFAULT_STEPS
    friction: float = 10.0
    minimize: bool = True
    seed: int = 0
    precision: Precision = "single"
    device: str | None = None
    platform: str | None = None
    report_interval: int | None = None
    trajectory_format: TrajectoryFormat = "dcd"
    frame: int | None = None
    drop_virtual_sites: bool = False
    velocities: VelocityOrigin = "draw"
    hydrogen_mass: float | None = None
    head: str | None = None

    def __post_init__(self) -> None:
        for name in ("engine", "ensemble", "precision", "trajectory_format", "velocities"):
            value, choices = getattr(self, name), choices_of(name)
            if value not in choices:
                told = hint(str(value), choices)
                raise ConfigError(f"{name} = {value!r} is not allowed; {told}")
        if self.velocities == "file" and self.minimize:
            raise ConfigError(
                "velocities of the file belong to its positions, which minimizing would change; "
                "give --no-minimize (in Python minimize=False), or draw velocities"
            )
        for name, unit, allowed, must in _NUMBERS:
            value = getattr(self, name)
            if not allowed(value):
                raise ConfigError(f"{name} = {value}{unit} is not allowed; it must be {must}")

    @property
    def interval(self) -> int:
        """Steps between frames."""
        return self.report_interval or min(max(self.steps // 500, 10), self.steps)


def choices_of(name: str) -> tuple[str, ...]:
    """What a setting that takes one of some words may be."""
    return get_args(get_type_hints(MDSettings)[name])


def read_settings(folder: Path) -> MDSettings:
    """Settings of the run in a folder.

    Raises:
        ConfigError: if there is no such folder.
        CheckpointError: if it holds no settings, or they are damaged or of a newer version.
    """
    if not folder.is_dir():
        raise ConfigError(f"there is no folder {folder}")
    path = folder / SETTINGS
    if not path.exists():
        raise CheckpointError(f"{folder} holds no run: there is no {SETTINGS} in it")
    try:
        values = dict(json.loads(path.read_text(encoding="utf-8")))
        if problem := find_version_problem(values.pop("version", 1), VERSION):
            raise CheckpointError(f"{path} {problem}")
        return MDSettings(**values)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} holds no usable settings of a run: {error}") from error


def write_settings(folder: Path, settings: MDSettings) -> None:
    """Keep the settings of a run in its folder.

    Raises:
        OutputError: if the file cannot be written.
    """
    values = {"version": VERSION, **dataclasses.asdict(settings)}
    write_text(folder / SETTINGS, json.dumps(values, indent=2) + "\n")
