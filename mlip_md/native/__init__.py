"""The convolution compiled for this processor, where there is one and it computes what it should.

The library is beside this file if a C++ compiler was present when the package was built. It is
loaded by its C interface, so that one serves every version of Python, and its handlers become
targets of ``jax.ffi.ffi_call`` on the platform "cpu":

``mlip_md_conv_forward``, ``_backward``, ``_second``, ``_table_forward``, ``_table_backward``.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path
from typing import NamedTuple

LIBRARY = Path(__file__).with_name("libconvolution.so")

TARGETS = tuple(
    f"mlip_md_conv_{name}"
    for name in ("forward", "backward", "second", "table_forward", "table_backward")
)


class Status(NamedTuple):
    """Whether the compiled convolution is used in this process.

    Attributes:
        available: it is there and agrees with its definition.
        instructions: set that was chosen for this processor; empty if not available.
        reason: one sentence, why it is not available; empty if it is.
    """

    available: bool
    instructions: str
    reason: str


@functools.cache
def find_native(library: Path = LIBRARY) -> Status:
    """Load the compiled convolution and compare it with its definition, once in a process.

    A library that cannot be loaded or computes something else is not used, and a warning says so.

    Args:
        library: file to load.

    Returns:
        What there is.
    """
    if not library.exists():
        return Status(False, "", "no compiled convolution was built with this installation")
    problem = _register(library)
    if not problem:
        from mlip_md.native.check import compare

        problem = compare()
    if problem:
        reason = f"the compiled convolution is not used, because {problem}"
        warnings.warn(f"{reason}; results are the same, slower", RuntimeWarning, stacklevel=2)
        return Status(False, "", reason)
    return Status(True, instructions(library), "")


def _register(library: Path) -> str:
    """Make the handlers known to XLA; returns what went wrong, or nothing."""
    import jax

    try:
        functions = handlers(library)
        for name in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(functions, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except (OSError, AttributeError, RuntimeError, ValueError) as error:
        return f"{library.name} could not be loaded ({error})"
    return ""


def handlers(library: Path = LIBRARY) -> ctypes.CDLL:
    """The library's functions in C.

    Raises:
        OSError: if it cannot be loaded.
    """
    functions = ctypes.CDLL(str(library))
    functions.mlip_md_instructions.restype = ctypes.c_char_p
    return functions


def instructions(library: Path = LIBRARY) -> str:
    """Name of the set of instructions that a library computes with."""
    return bytes(handlers(library).mlip_md_instructions()).decode()
