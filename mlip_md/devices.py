"""Devices of JAX: their names, computing on them in all digits, and what fits into their memory."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlip_md.allocation import release_memory
from mlip_md.errors import CapacityError, ConfigError, DeviceError, ForkError
from mlip_md.memory import as_gib, free_memory, total_memory

SHARE_VARIABLE = "MLIP_MD_MEMORY_SHARE"
"""Environment variable: share of an accelerator's memory that one turn may take."""
DEFAULT_SHARE = 0.1
POOL_VARIABLES = (
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
"""Environment variables by which a user says how much of a GPU's memory JAX takes, and when."""


@functools.cache
def _first_process() -> int:
    """The process in which JAX was started for us; forked ones inherit the answer."""
    return os.getpid()


def check_process() -> None:
    """Start JAX for us in this process, or refuse one that would wait for ever.

    A forked process inherits what its parent has compiled and locked, but not the threads that
    compute.

    Raises:
        ForkError: if JAX was started for us in another process, of which this one is a fork.
    """
    if _first_process() != os.getpid():
        raise ForkError(
            f"process {os.getpid()} is a fork of process {_first_process()}, which has started "
            "JAX; it would wait for ever for threads that it does not have. Start processes by "
            "multiprocessing.get_context('spawn'), or open potentials only after the fork"
        )


def find_device(device: str | jax.Device | None) -> jax.Device:
    """The JAX device that a name stands for.

    Args:
        device: None for JAX's default, a platform ("cpu", "gpu", "cuda", "tpu"), a platform with
            an index ("cuda:1"), or a device.

    Returns:
        The device.

    Raises:
        DeviceError: if there is none of that name.
        ConfigError: if it is no name.
        ForkError: as ``check_process``.
    """
    check_process()
    if isinstance(device, jax.Device):
        return device
    if device is not None and not isinstance(device, str):
        raise ConfigError(f"device = {device!r} is no device; give None, a name or a jax.Device")
    if device is None:
        # The device of a new array is the default one, however it was set (argument, context).
        return next(iter(jnp.zeros(()).devices()))
    platform, colon, index = device.partition(":")
    try:
        found = jax.local_devices(backend=platform or "no name")
        if not colon:
            return found[0]
        if index.isdecimal() and int(index) < len(found):
            return found[int(index)]
    except RuntimeError:
        found = []
    present = ", ".join(f"{d.platform}:{d.id}" for d in found or jax.local_devices())
    raise DeviceError(
        f"there is no device {device!r}; JAX sees {present}",
        "Give None, 'cpu', 'gpu', 'cuda:1' or a jax.Device, and for a GPU install the extra: pip "
        "install 'mlip-md[cuda13]'",
    )


def device_name(device: jax.Device) -> str:
    """A name by which ``find_device`` finds a device again, in this process or another."""
    return f"{device.platform}:{jax.local_devices(backend=device.platform).index(device)}"


def message_memory(device: jax.Device) -> int | None:
    """Bytes that messages, say, may take at a time; None for what is best for processors.

    Turns keep a processor's caches warm, but cost an accelerator launches.

    Args:
        device: that is computed on.

    Raises:
        ConfigError: if the environment's share is not above 0 and at most 1.
    """
    given = os.environ.get(SHARE_VARIABLE, "") or str(DEFAULT_SHARE)
    try:
        share = float(given)
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ConfigError(
            f"{SHARE_VARIABLE} = {given!r} is not allowed; it must be a number above 0 and at most "
            "1, the share of a GPU's memory that messages may take at a time"
        )
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return int(share * limit) if limit else None


@contextlib.contextmanager
def precision(dtype: str, platform: str) -> Iterator[None]:
    """Compute in a dtype and with all its bits, whatever the process's setting.

    Accelerators multiply float32 matrices with ten bits or fewer unless told otherwise; forces
    would carry noise of a thousandth, and images of a periodic cell be 0.01 Å off.

    Args:
        dtype: "float32" or "float64".
        platform: of the device that is computed on.
    """
    matmul = contextlib.nullcontext()
    if platform != "cpu":
        matmul = jax.default_matmul_precision("float32")
    with jax.enable_x64(dtype == "float64"), matmul:
        yield


class DeviceMemory(NamedTuple):
    """Bytes that a device has for JAX: in all, and not in use; and what it is, in a sentence."""

    total: int
    free: int
    where: str


def device_memory(device: jax.Device) -> DeviceMemory | None:
    """What a device has for JAX: the machine's memory, or JAX's part of an accelerator's.

    Args:
        device: of this process.

    Returns:
        None where JAX does not tell.
    """
    if device.platform == "cpu":
        return DeviceMemory(total_memory(), free_memory(), "this machine")
    told = device.memory_stats() or {}
    if not (limit := told.get("bytes_limit")):
        return None
    free = limit - told.get("bytes_in_use", 0)
    return DeviceMemory(limit, free, f"{device.device_kind} that are JAX's")


def reserves_most(device: jax.Device) -> bool:
    """Whether JAX takes three quarters of a device's memory at its start, by its own default."""
    return device.platform == "gpu" and not any(name in os.environ for name in POOL_VARIABLES)


def plan_memory(function: Any, *arguments: Any) -> int | None:
    """Bytes that a call takes, from the compiler's plan; the call itself need not compile again.

    What compiling leaves is given back, so that it does not add to what the call takes.

    Args:
        function: of ``compiler.jit``.
        arguments: of the call; none is used up.

    Returns:
        Arguments, results and all between; None of other functions, and where JAX does not tell.
    """
    if not isinstance(function, jax.stages.Wrapped):
        return None
    plan = function.lower(*arguments).compile().memory_analysis()
    release_memory()
    if plan is None:
        return None
    kept = plan.argument_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    return int(kept + plan.temp_size_in_bytes)


@dataclasses.dataclass(frozen=True)
class Load:
    """What is computed on a device, as errors of its memory name it.

    Attributes:
        what: the plural of what is computed, with its size.
        count: of what a user can make fewer.
        unit: what is counted, in the plural.
        advice: what to do.
        fixed: bytes that do not grow with the count.
    """

    what: str
    count: int = 0
    unit: str = "atoms"
    advice: str = "use fewer atoms, a smaller model, dtype='float32' or another device"
    fixed: int = 0

    def fitting(self, needed: int, total: int) -> str:
        """How many fit; empty if the count is no part of the problem or all should have fitted.

        Memory grows linearly, in steps of a quarter (capacities of nodes and edges).
        """
        share = (total - self.fixed) / max(needed - self.fixed, 1)
        most = int(0.8 * share * self.count)
        return (
            f"; about {float(f'{most:.2g}'):.0f} {self.unit} fit" if 0 < share < 1 and most else ""
        )


def check_memory(load: Load, device: jax.Device, needed: int | None) -> None:
    """Refuse what can never fit on a device, and warn of what does not fit on a machine now.

    Linux ends a process for whose memory there is no room, without a word.

    Args:
        load: what is to be computed.
        device: that is computed on.
        needed: bytes, of ``plan_memory``; None is not checked.

    Raises:
        CapacityError: if the device has less memory in all.
    """
    memory = device_memory(device)
    if needed is None or memory is None or needed <= memory.free:
        return
    words = f"{load.what} need about {as_gib(needed)} of memory"
    if needed > memory.total:
        raise CapacityError(
            f"{words}, more than the {as_gib(memory.total)} of {memory.where}"
            f"{load.fitting(needed, memory.total)}; {load.advice}",
            needed=needed,
            available=memory.total,
        )
    if device.platform == "cpu":
        warnings.warn(
            f"{words}, and only {as_gib(memory.free)} of the {as_gib(memory.total)} of "
            f"{memory.where} are free: it may become very slow, or the system may end this "
            f"process. End other programs, or {load.advice}",
            RuntimeWarning,
            stacklevel=2,
        )


@contextlib.contextmanager
def naming_out_of_memory(
    load: Load, device: jax.Device, needed: int | None = None
) -> Iterator[None]:
    """Say what did not fit into a device's memory.

    Args:
        load: what is computed.
        device: that is computed on.
        needed: bytes, of ``plan_memory``, or None.

    Raises:
        CapacityError: in place of JAX's error that the memory is exhausted.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        memory = device_memory(device)
        told = f"; about {as_gib(needed)} are needed" if needed else ""
        if memory is not None:
            told += (
                f"; {as_gib(memory.free)} of the {as_gib(memory.total)} of {memory.where} are free"
            )
            told += load.fitting(needed, memory.total) if needed else ""
        raise CapacityError(
            f"{load.what} do not fit into the device's memory{told}; {load.advice}. JAX says: "
            + str(error).splitlines()[0][:200],
            needed=needed,
            available=None if memory is None else memory.free,
        ) from error
