"""The convolution compiled for this processor, where the installation has it.

The library is beside this file if a C++ compiler was present when the package was built. It is
loaded by its C interface, so that one serves every version of Python, and its handlers become
targets of ``jax.ffi.ffi_call`` on the platform "cpu". ``networks/native_convolution.py`` says
whether it is used.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Literal

LIBRARY = Path(__file__).with_name("libconvolution.so")

TARGETS = tuple(
    f"mlip_md_conv_{name}"
    for name in ("forward", "backward", "second", "table_forward", "table_backward")
)


def register(library: Path = LIBRARY) -> str:
    """Make a library's handlers known to XLA.

    Args:
        library: file to load.

    Returns:
        What went wrong, or nothing.
    """
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

    Args:
        library: file to load.

    Raises:
        OSError: if it cannot be loaded.
    """
    if _is_cut(library):  # to load it could end the process
        raise OSError(f"{library}: its end is missing")
    functions = ctypes.CDLL(str(library))
    functions.mlip_md_instructions.restype = ctypes.c_char_p
    return functions


def _is_cut(library: Path) -> bool:
    """Whether a library for Linux is shorter than its header says (ELF, 64 bits)."""
    with library.open("rb") as file:
        head = file.read(64)
        size = file.seek(0, 2)
    if len(head) < 64 or head[:5] != b"\x7fELF\x02":
        return False
    order: Literal["little", "big"] = "little" if head[5] == 1 else "big"
    sections, entry, number = (
        int.from_bytes(head[begin:end], order) for begin, end in ((40, 48), (58, 60), (60, 62))
    )
    return size < sections + entry * number


def instructions(library: Path = LIBRARY) -> str:
    """Name of the set of instructions that a library computes with.

    Args:
        library: file to load.

    Raises:
        OSError: if it cannot be loaded.
    """
    return bytes(handlers(library).mlip_md_instructions()).decode()


def describe(library: Path = LIBRARY) -> str:
    """In words, what this installation computes convolutions with on processors.

    Args:
        library: file that an installation with it has.
    """
    if not library.exists():
        return "JAX alone: no compiled convolution was built with this installation"
    try:
        return f"compiled, {instructions(library)}"
    except (OSError, AttributeError) as error:
        return f"JAX alone: {library.name} could not be loaded ({error})"
