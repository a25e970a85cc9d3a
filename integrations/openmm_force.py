"""The callable behind a ``PythonForce``: an OpenMM State in, energy and forces out.

OpenMM's units (nm, kJ/mol, kJ/mol/nm) end in the files that name OpenMM. What OpenMM 8.6 does
with such a callable rules its form: it pickles it when the force is made, copies it for every
``CustomCVForce``, crashes if unpickling raises, passes on nothing but the text of an exception,
never frees what an exception holds, and lets several Contexts and threads share one callable.
"""

from __future__ import annotations

import collections
import threading
import traceback
import weakref
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openmm
from numpy.typing import ArrayLike, DTypeLike

import mlip_md
from mlip_md.constants import ANGSTROM_PER_NM, KJ_PER_MOL_PER_EV
from mlip_md.engine import Engine, Result
from mlip_md.errors import MLIPError, ModelFileError, NonFiniteError, StructureError
from mlip_md.formats import own
from mlip_md.integrations.models import name_then
from mlip_md.integrations.openmm_calls import ADVICE, Calls, enter_inside_try
from mlip_md.integrations.openmm_wall import evaluate_walled
from mlip_md.integrations.versions import find_version_problem
from mlip_md.potential import Potential

VERSION = 2
"""Of the token that stands for a force in a System's XML; 1 stated none."""
_KEYS = (
    "model", "sha256", "numbers", "particles", "periodic", "total_energy", "engine_options",
    "content",
)  # fmt: skip

_potentials: weakref.WeakValueDictionary[str, Potential] = weakref.WeakValueDictionary()
_potentials_lock = threading.Lock()


def share_potential(
    model: str,
    sha256: str | None = None,
    content: bytes | None = None,
    head: str | None = None,
) -> Potential:
    """Open a potential, or find it among those that this process has open.

    Args:
        model: what ``mlip_md.load`` opens.
        sha256: identity that the potential must have; None takes what is there.
        content: the model file itself, of one head; it is read instead of ``model``.
        head: which head of a model that has several.

    Raises:
        HeadError: if there is no such head, or several and none is named.
        ModelFileError: if there is no such model, or it is another one than ``sha256`` says.
    """
    with _potentials_lock:
        if sha256 is not None and sha256 in _potentials:
            return _potentials[sha256]
        if content is None:
            potential = mlip_md.load(name_then(model, sha256), head)
        else:
            potential = own.from_bytes(content)
        if sha256 is not None and potential.sha256 != sha256:
            raise ModelFileError(
                f"{model} holds another model (sha256 {potential.sha256[:12]}…) than this System "
                f"was made with ({sha256[:12]}…); put the original file back, or make the System "
                "anew"
            )
        return _potentials.setdefault(potential.sha256, potential)


class MLForce:
    """Energy and forces of some or all particles of a System.

    Pickles as a token (model path, content hash, options) and opens the model at its first use, so
    that XML files stay small and the copies that OpenMM makes cost nothing and cannot fail.

    Args:
        model: what ``mlip_md.load`` opens.
        sha256: identity of the potential.
        atomic_numbers: (n,) of the particles of this force.
        particles: their indices in the System; None is all.
        periodic: whether the State carries a box.
        total_energy: whether the energy includes that of the isolated atoms.
        engine_options: keywords of ``Engine``.
        content: the model file, if it is to travel with the System.
        head: which head of a model that has several.

    Attributes:
        last_result: what the engine said of the latest geometry that was computed (eV, Å), stress
            included and walls between overlapping atoms left out; None before.
    """

    # XML files hold this class by its path, and these keys: a new version has to read old ones.

    def __init__(
        self,
        model: str,
        sha256: str,
        atomic_numbers: np.ndarray,
        particles: Sequence[int] | None,
        periodic: bool,
        total_energy: bool,
        engine_options: dict[str, Any],
        content: bytes | None = None,
        head: str | None = None,
    ) -> None:
        self.__setstate__(
            {
                "model": model,
                "sha256": sha256,
                "numbers": _packed(atomic_numbers, np.uint8),
                "particles": None if particles is None else _packed(particles, np.int32),
                "periodic": periodic,
                "total_energy": total_energy,
                "engine_options": engine_options,
                "content": content,
                "head": head,
                "version": VERSION,
            }
        )

    def __getstate__(self) -> dict[str, Any]:
        return self._token

    def __setstate__(self, token: dict[str, Any]) -> None:
        self._token = token
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self._calls = Calls(weakref.proxy(self))
        # Barostats, reporters and getState ask for the two latest geometries again.
        # More than two, because several Contexts may take turns.
        self._memo: collections.deque[tuple[bytes, float, np.ndarray]] = collections.deque(maxlen=6)
        self.last_result: Result | None = None

    @property
    def engine(self) -> Engine:
        """The compiled potential; engines of one potential share weights and compiled functions.

        Raises:
            ModelFileError: if the model file is gone or holds another model, or the System was
                written by a newer version or is damaged.
            ConfigError: if the options are not allowed or the device does not exist here.
        """
        if self._engine is None:
            token = _checked(self._token)
            self._engine = Engine(_reopen(token), **token["engine_options"])
            self._atomic_numbers = _unpacked(token["numbers"], np.uint8).astype(np.int32)
        return self._engine

    @enter_inside_try
    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        """Energy (kJ/mol) and forces (n, 3) (kJ/mol/nm) of a State.

        Raises:
            RuntimeError: if there are none, or Ctrl-C was pressed.
        """
        positions = state.getPositions(asNumpy=True)._value
        box = None
        if _checked(self._token)["periodic"]:
            box = state.getPeriodicBoxVectors(asNumpy=True)._value
        key = positions.tobytes() + (b"" if box is None else box.tobytes())
        with self._lock:
            for known, energy, forces in self._memo:
                if known == key:
                    return energy, forces
            energy, forces = self._compute(positions, box)
            self._memo.append((key, energy, forces))
            return energy, forces

    def _compute(self, positions: np.ndarray, box: np.ndarray | None) -> tuple[float, np.ndarray]:
        """Energy in kJ/mol and forces in kJ/mol/nm at positions and box in nm."""
        engine = self.engine
        result, wall = evaluate_walled(
            engine.evaluate,
            positions * ANGSTROM_PER_NM,
            self._atomic_numbers,
            None if box is None else box * ANGSTROM_PER_NM,
        )
        self.last_result = result
        total = self._token["total_energy"]
        energy = (result.energy if total else result.interaction_energy) * KJ_PER_MOL_PER_EV
        energy += wall.energy * KJ_PER_MOL_PER_EV
        forces = np.multiply(
            wall.forces, KJ_PER_MOL_PER_EV * ANGSTROM_PER_NM, dtype=np.float64, order="C"
        )
        # GPU platforms turn NaN forces into huge numbers and go on.
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            bad = np.flatnonzero(~np.isfinite(forces).all(axis=1))[:8].tolist()
            raise NonFiniteError(f"the potential's energy or forces (atoms {bad}) are not finite")
        return float(energy), forces

    def story(self, error: BaseException, state: openmm.State | None) -> str:
        """Type, message, place, step and a hint, as one text."""
        step = "" if state is None else f" at step {state.getStepCount()}"
        lines = [f"mlip-md{step}: {type(error).__name__}: {error}"]
        if isinstance(error, (NonFiniteError, StructureError)):
            if self._token["particles"] is not None:
                particles = _unpacked(self._token["particles"], np.int32).tolist()
                lines.append(f"Among the System's particles, ML atoms {_runs(particles)}.")
            lines.append(ADVICE)
        if not isinstance(error, MLIPError):
            frames = traceback.extract_tb(error.__traceback__)[-3:]
            lines += [f"  {Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames]
        return "\n".join(lines)


def _packed(values: ArrayLike, dtype: DTypeLike) -> bytes:
    """Small integers for a token, which XML doubles in size."""
    return zlib.compress(np.asarray(values, dtype).tobytes(), 9)


def _unpacked(content: bytes, dtype: DTypeLike) -> np.ndarray:
    return np.frombuffer(zlib.decompress(content), dtype)


def _checked(token: dict[str, Any]) -> dict[str, Any]:
    """The token of a System that another version may have written, if all is in it.

    Unpickling cannot refuse it: OpenMM would crash.
    """
    if problem := find_version_problem(token.get("version", 1), VERSION):
        raise ModelFileError(f"the ML force of this System {problem}")
    if missing := [key for key in _KEYS if key not in token]:
        raise ModelFileError(
            f"the ML force of this System lacks {', '.join(missing)}: its file is damaged; make "
            "the System anew"
        )
    return token


def _reopen(token: dict[str, Any]) -> Potential:
    """Open the model of a System that may have been made elsewhere."""
    try:
        return share_potential(token["model"], token["sha256"], token["content"], token.get("head"))
    except ModelFileError as error:
        raise ModelFileError(
            f"the model of this System cannot be opened: {error}. If the file has moved, open it "
            "before the System is used, and keep it: potential = "
            "MLPotential('mlip-md', modelPath='...')"
        ) from error


def _runs(particles: list[int]) -> str:
    """Which particles the ML atoms are: "0-3 are 8-11, 4 is 20"."""
    starts = [i for i, p in enumerate(particles) if i == 0 or p != particles[i - 1] + 1]
    runs = [
        f"{i}-{j - 1} are {particles[i]}-{particles[j - 1]}"
        if j - i > 1
        else f"{i} is {particles[i]}"
        for i, j in zip(starts, [*starts[1:], len(particles)], strict=True)
    ]
    return ", ".join(runs[:8] + ["…"] * (len(runs) > 8))
