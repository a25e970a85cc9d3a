"""Several devices, and several processes with some each, that train one potential together.

Every process holds all weights and makes the same plan; each device computes its part of a batch,
and sums over all structures are taken before anything is divided or decided. So all processes go
through the same steps with the same numbers, and nobody has to tell another what comes next. What
only one may do (files, checkpoints, words) process 0 does; what only one knows travels as bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlip_md import errors
from mlip_md.errors import ConfigError, DeviceError, LostProcessError, MLIPError
from mlip_md.signals import EXIT_SAVED, Reason
from mlip_md.trainer.data.batching import Batch
from mlip_md.trainer.data.shares import Shares

AXIS = "data"
"""Name of the axis of devices."""

HEARTBEAT_SECONDS = 20
"""A process that is silent for so long is lost; its connections alone would never say so."""

OMPI_SIZE = "OMPI_COMM_WORLD_SIZE"

REASONS: tuple[Reason, ...] = ("time", "hangup", "terminated", "keyboard")
"""Why a process asks all to stop, as numbers from 1; of several reasons the last counts."""

LOST = (
    "another process of this training ended, or its machine is out of reach. What the last "
    "checkpoint holds is saved; start all processes again with the same command"
)

Tree = TypeVar("Tree")


class Place(NamedTuple):
    """Which of how many processes this is, and HOST:PORT of process 0; None where JAX knows it."""

    address: str | None
    processes: int
    number: int


def find_place(
    address: str | None = None,
    processes: int | None = None,
    number: int | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Place | None:
    """The place of this process among those of a training.

    Args:
        address: HOST:PORT of process 0; None where SLURM or Open MPI tells.
        processes: how many there are; 1 trains alone, whatever the environment says.
        number: of this one, from 0.
        environment: what SLURM and Open MPI have set.

    Returns:
        None if it is the only one.

    Raises:
        ConfigError: if something is missing, or processes were started that cannot find each other.
    """
    if processes == 1 or (processes is None and not _started(environment) and address is None):
        return None
    if address is not None and not re.fullmatch(r".+:\d+", address):
        raise ConfigError(f"--coordinator {address}: write it as HOST:PORT, such as node1:12345")
    if processes is None or number is None:
        processes, number = _told(environment, address is None)
    if not 0 <= number < processes:
        raise ConfigError(f"--process-number {number} must be from 0 to {processes - 1}")
    return Place(address, processes, number)


def _started(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or Open MPI started several processes."""
    return any(int(environment.get(name, 1)) > 1 for name in ("SLURM_NTASKS", OMPI_SIZE))


def _told(environment: Mapping[str, str], address_too: bool) -> tuple[int, int]:
    """Number of processes, and of this one, as SLURM or Open MPI tells."""
    if OMPI_SIZE in environment:
        count = int(environment[OMPI_SIZE])
        if address_too and "OMPI_MCA_orte_hnp_uri" not in environment:  # since its version 5
            raise ConfigError(
                f"Open MPI started {count} processes and does not say where they meet; give "
                "--coordinator HOST:PORT, a free port of the first machine"
            )
        return count, int(environment["OMPI_COMM_WORLD_RANK"])
    if "SLURM_NTASKS" not in environment:
        raise ConfigError(
            "several processes outside SLURM and Open MPI need --coordinator HOST:PORT, "
            "--processes and --process-number, the last different for each"
        )
    count = int(environment["SLURM_NTASKS"])
    if "SLURM_STEP_NODELIST" not in environment:
        raise ConfigError(
            f"this job of SLURM has {count} tasks, but srun did not start this process: write srun "
            "mlip-md train …, or train in one process with --processes 1"
        )
    return count, int(environment["SLURM_PROCID"])


@contextlib.contextmanager
def joined(place: Place | None) -> Iterator[None]:
    """Connect the processes of a training while entered; comes before anything is computed.

    When one is lost all others end, within seconds where its machine says so, else after
    ``HEARTBEAT_SECONDS``: with a sentence and exit code 75. JAX's farewell waits for all processes,
    so one that leaves by an error must not wait for it, see ``end_alone``.

    Args:
        place: of this process; None does nothing.

    Raises:
        ConfigError: if the processes do not meet.
        LostProcessError: in place of JAX's error of a sum that another process has left.
    """
    if place is None:
        yield
        return
    _connect(place)
    with _explaining_abort():
        try:
            yield
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if any(name in str(error) for name in ("Gloo", "NCCL", "coordination service")):
                raise LostProcessError(LOST) from error
            raise
        jax.distributed.shutdown()


def _connect(place: Place) -> None:
    name = "jax_enable_preemption_service"  # would take SIGTERM away from ``Interruptions``
    before = getattr(jax.config, name)
    jax.config.update(name, False)
    try:
        jax.distributed.initialize(
            *place,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"process {place.number} of {place.processes} did not find the others"
            f"{'' if place.address is None else f' at {place.address}'}: start all of them within "
            f"five minutes, with an address that each can reach ({str(error).splitlines()[0]})"
        ) from error
    finally:
        jax.config.update(name, before)


@contextlib.contextmanager
def _explaining_abort() -> Iterator[None]:
    """JAX aborts where a process is lost, in a thread of its own: say why, and end with 75.

    Python's own handlers do not run while a process aborts.
    """

    def explain(_number: int) -> None:
        os.write(2, f"Error: {LOST}\n".encode())
        os._exit(EXIT_SAVED)

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    handler, system = kind(explain), ctypes.CDLL(None).signal
    system.argtypes, system.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
    before = system(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        system(signal.SIGABRT, before)


def end_alone(code: int) -> None:
    """End this process now if it is still connected to others, which it has left by an error.

    Args:
        code: for the shell.
    """
    if jax.distributed.is_initialized():
        os._exit(code)


@dataclasses.dataclass(frozen=True)
class Team:
    """The devices that train together.

    Attributes:
        mesh: all of them, those of a process side by side; None for one device alone.
    """

    mesh: Mesh | None = None

    @property
    def processes(self) -> int:
        """How many there are."""
        return 1 if self.mesh is None else jax.process_count()

    @property
    def _mesh(self) -> Mesh:
        if self.mesh is None:
            raise ConfigError("one device alone has nothing to divide; see gather")
        return self.mesh

    @property
    def leads(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.mesh is None or jax.process_index() == 0

    @property
    def shares(self) -> Shares | None:
        """The parts of a batch that this process makes; None where a batch is not divided."""
        if self.mesh is None:
            return None
        parts = self.mesh.size
        count = parts // self.processes
        first = count * jax.process_index()
        return Shares(parts, range(first, first + count))

    def lines(self) -> list[str]:
        """What a run should say of its devices; nothing of the only one there is."""
        if self.mesh is not None:
            return [
                f"{self.mesh.size} devices of {self.processes} processes divide every batch "
                f"({self.mesh.devices.flat[0].device_kind})"
            ]
        there = jax.local_device_count()
        return [f"one of {there} devices trains; --devices all uses all"] if there > 1 else []

    def spread(self, parts: Sequence[Batch]) -> Batch:
        """The parts of a batch on their devices, as one with an axis of parts in front.

        Args:
            parts: those of this process. Without a mesh it is one, given back as it is.
        """
        if self.mesh is None:
            return parts[0]

        def put(*arrays: np.ndarray) -> jax.Array:
            return self._from_all(np.stack(arrays))

        spread: Batch = jax.tree_util.tree_map(put, *parts)
        return spread

    def _from_all(self, mine: np.ndarray) -> jax.Array:
        place = NamedSharding(self._mesh, PartitionSpec(AXIS))
        return jax.make_array_from_process_local_data(place, mine)

    def everywhere(self, tree: Tree) -> Tree:
        """The values of process 0, bit for bit, on all devices; memory of their own.

        Args:
            tree: of arrays, alike in all processes but for their values.
        """
        if self.mesh is None:
            return tree
        place = NamedSharding(self.mesh, PartitionSpec())

        def put(value: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(
                value.shape, place, lambda index: np.array(value[index])
            )

        leaves, kind = jax.tree_util.tree_flatten(tree)
        arrays = [np.asarray(leaf) for leaf in leaves]
        raw = self._from_first(b"".join(array.tobytes() for array in arrays))
        ends = np.cumsum([0, *(array.nbytes for array in arrays)]).tolist()
        found = [
            put(np.frombuffer(raw[a:b], array.dtype).reshape(array.shape))
            for array, a, b in zip(arrays, ends, ends[1:], strict=False)
        ]
        placed: Tree = jax.tree_util.tree_unflatten(kind, found)
        return placed

    def first(self, function: Callable[[], Any]) -> Any:
        """What a function gives in process 0, in all of them; so is an error of ours.

        Args:
            function: gives plain JSON values; called in process 0 only.
        """
        if self.processes == 1:
            return function()
        said, own = {}, None
        if self.leads:
            try:
                said = {"value": function()}
            except MLIPError as error:
                said, own = {"error": type(error).__name__, "arguments": error.args}, error
        text = json.dumps(said).encode()
        length = np.frombuffer(self._from_first(np.int64(len(text)).tobytes()), np.int64)[0]
        heard = json.loads(self._from_first(text[:length].ljust(length)))
        if own is not None:
            raise own
        if "error" in heard:
            raise getattr(errors, heard["error"], MLIPError)(*heard["arguments"])
        return heard["value"]

    def _from_first(self, content: bytes) -> bytes:
        """Bytes of process 0, as many as all processes give."""
        if self.processes == 1:
            return content
        values = multihost_utils.broadcast_one_to_all(np.frombuffer(content, np.uint8))
        return np.asarray(values).tobytes()

    def wait(self, name: str) -> None:
        """Go on when all processes have come here.

        Args:
            name: of the place in the program.
        """
        if self.processes > 1:
            multihost_utils.sync_global_devices(name)

    def asking(self, reason: Reason | None) -> jax.Array:
        """Why this process asks all to stop, for a step, which tells all.

        Args:
            reason: None does not ask.
        """
        code = 0 if reason is None else 1 + REASONS.index(reason)
        return self._from_all(np.full(self._mesh.size // self.processes, code, np.int32))


def gather(devices: int | str | None = None) -> Team:
    """The devices that train, those of all processes that are ``joined``.

    Args:
        devices: how many of each process, or "all"; None is one, or all of a process among several.

    Raises:
        DeviceError: if a process has fewer, or it is no number.
    """
    there, processes = len(jax.local_devices()), jax.process_count()
    if devices is None:
        devices = 1 if processes == 1 else "all"
    count = there if devices == "all" else int(devices) if str(devices).isdecimal() else 0
    if not 1 <= count <= there:
        raise DeviceError(
            f"--devices {devices}: JAX sees {there} in this process", f"Give 1 to {there}, or all"
        )
    if processes * count == 1:
        return Team()
    groups: list[list[jax.Device]] = [[] for _ in range(processes)]
    for device in jax.devices():
        groups[device.process_index].append(device)
    if len({len(group[:count]) for group in groups}) > 1:
        raise DeviceError(
            f"processes see {', '.join(str(len(group)) for group in groups)} devices",
            "Give the number that each is to use with --devices",
        )
    return Team(Mesh(np.array([device for group in groups for device in group[:count]]), (AXIS,)))
