"""Devices of JAX: their names, computing on them in all digits, and the end of their memory."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from mlip_md.errors import CapacityError, ConfigError, DeviceError, ForkError

SHARE_VARIABLE = "MLIP_MD_MEMORY_SHARE"
"""Environment variable: share of an accelerator's memory that one turn may take."""
DEFAULT_SHARE = 0.1
_MEMINFO, _CGROUP = Path("/proc/meminfo"), Path("/sys/fs/cgroup")


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


def available_memory(device: jax.Device) -> int | None:
    """Bytes that a computation may take on a device now; None where nothing tells.

    Of an accelerator, those that JAX may use and has not given away; of a processor, the memory
    that the system has free, or what is left of the limit of a container.
    """
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        limit = stats.get("bytes_limit")
        return None if limit is None else int(limit) - int(stats.get("bytes_in_use", 0))
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        rows = _MEMINFO.read_text().splitlines()
        found.append(1024 * int(next(r for r in rows if r.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, ValueError):  # "max" is no number
        limit = int((_CGROUP / "memory.max").read_text())
        found.append(max(0, limit - int((_CGROUP / "memory.current").read_text())))
    return min(found, default=None)


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


@contextlib.contextmanager
def naming_out_of_memory(
    what: str, advice: str = "use fewer atoms, a smaller model, dtype='float32' or another device"
) -> Iterator[None]:
    """Say what did not fit into a device's memory.

    Args:
        what: the plural of what is computed, with its size.
        advice: what to do.

    Raises:
        CapacityError: in place of JAX's error that the memory is exhausted.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        there = available_memory(find_device(None))
        of = "" if there is None else f", of which {there / 1e9:.3g} GB are free"
        raise CapacityError(
            f"{what} do not fit into the device's memory{of}; {advice}. JAX says: "
            + str(error).splitlines()[0][:200]
        ) from error
