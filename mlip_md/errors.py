"""Errors that a user of mlip-md can meet; each says what was given, what is allowed, what to do."""

import copy
from collections.abc import Sequence
from typing import Self


class MLIPError(Exception):
    """Base of every error that mlip-md raises on purpose."""

    def locate(self, place: str) -> Self:
        """A copy, with all its attributes, whose message begins with the place of the error."""
        located = copy.copy(self)
        message, *rest = self.args
        located.args = f"{place}: {message}", *rest
        return located


class UnsupportedElementError(MLIPError, ValueError):
    """An atom is of an element that the potential was not made for."""


class StructureError(MLIPError, ValueError):
    """Positions, cell or atomic numbers that allow no result (NaN, overlap, volume 0)."""


class CoincidenceError(StructureError):
    """Atoms closer than any two atoms can be.

    Attributes:
        pairs: (i, j) of all such atoms, i < j; an atom and its own image is none.
        vectors: (x, y, z) Å from i to the nearest image of j.
        limit: Å, what they are closer than.
    """

    def __init__(
        self,
        message: str,
        pairs: Sequence[tuple[int, int]] = (),
        vectors: Sequence[Sequence[float]] = (),
        limit: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.pairs, self.vectors, self.limit = pairs, vectors, limit


class ConfigError(MLIPError, ValueError):
    """A hyperparameter or option is unknown, or its value is not allowed or not supported.

    Attributes:
        field: the hyperparameter that it is about; empty where none is named.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class DeviceError(ConfigError):
    """There is no device of that name.

    Attributes:
        problem: what was asked for, and what there is.
        advice: what to give instead, in Python.
    """

    def __init__(self, problem: str, advice: str) -> None:
        super().__init__(problem)
        self.args = self.problem, self.advice = problem, advice  # copies are made of the arguments

    def __str__(self) -> str:
        return "{}. {}".format(*self.args)


class ModelFileError(MLIPError, ValueError):
    """A model file is damaged, foreign, of an unknown version or does not fit its description."""


class HeadError(ModelFileError):
    """A model has several heads and none is named, or it has not the one that is.

    Attributes:
        heads: names of those that it has.
    """

    def __init__(self, message: str, heads: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.heads = list(heads)


class DataError(MLIPError, ValueError):
    """A data set, a label or a statistic of it is unusable."""


class RejectedError(DataError):
    """Records of a data set are unusable.

    Attributes:
        records: where each of them is, and what is wrong with it.
    """

    def __init__(self, message: str, records: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        self.records = list(records)


class CheckpointError(MLIPError, RuntimeError):
    """A checkpoint is damaged or belongs to another run."""


class OutputError(MLIPError, OSError):
    """A file could not be written: no room, no permission, no such folder."""


class OwnershipError(MLIPError, RuntimeError):
    """A run's folder is in use by another run."""


class CapacityError(MLIPError, MemoryError):
    """Something needs more memory than there is, or more edges than can be counted.

    Attributes:
        needed: bytes, as planned; None where they are not known.
        available: bytes that there are for it; None where they are not known.
    """

    def __init__(
        self, message: str, *, needed: int | None = None, available: int | None = None
    ) -> None:
        super().__init__(message)
        self.needed, self.available = needed, available


class NeighborError(MLIPError, RuntimeError):
    """A neighbor list on the device contradicts the host's."""


class NonFiniteError(MLIPError, FloatingPointError):
    """A potential gave NaN or infinite energies or forces."""


class NotLearnedError(MLIPError, RuntimeError):
    """A training whose best model is no better than one that predicts nothing."""


class CompilerError(MLIPError, RuntimeError):
    """The installed compiler computes wrong numbers."""


class ForkError(MLIPError, RuntimeError):
    """A forked process would compute with threads of JAX that only its parent has."""


class StoppedError(MLIPError, RuntimeError):
    """A signal of the system (SIGTERM, SIGHUP) ended a run; what it had done is saved."""


class LostProcessError(StoppedError):
    """Another process of the same training ended, or is out of reach."""


class SimulationError(MLIPError, RuntimeError):
    """A simulation became unstable or its engine stopped; its last good frame is kept."""
