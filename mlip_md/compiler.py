"""How our functions are compiled, and whether the compiler at hand can add.

jaxlib 0.10.2 sums over components of vectors wrongly on x86-64 processors, silently and only in
long arrays (jax-ml/jax#39103: from 16,385 rows in float64, 32,769 in float32), and crashes in
others (#39257, #40412). The package excludes it; where it is installed anyway, our own functions
are compiled without the fusion that is at fault, whatever the process's flags.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lib

from mlip_md.errors import CompilerError

_CURES: Mapping[str, Mapping[str, str]] = {"0.10.2": {"xla_cpu_experimental_ynn_fusion_type": ""}}
"""Compiler options by version of jaxlib."""

_ROWS = 2**15 + 1
"""Rows of the self-check; whole powers of two and shorter arrays came out right."""


def jit(function: Callable[..., Any], **options: Any) -> Any:
    """``jax.jit`` with what the installed compiler needs to be right.

    Args:
        function: to compile.
        options: of ``jax.jit``.

    Returns:
        The compiled function.
    """
    cure = _CURES.get(lib.__version__)
    return jax.jit(function, compiler_options=dict(cure) if cure else None, **options)


def _sums(vectors: jax.Array, matrix: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums as lengths, projections and gradients of ours have them."""
    products = jax.vmap(lambda vector: jnp.sum((matrix @ vector) ** 2))(vectors)
    projected = jnp.sum(vectors[:, None, :] * matrix[None], axis=-1)
    return jnp.sum(vectors**2, axis=1), products, projected


@functools.cache
def check_sums(dtype: str, device: jax.Device) -> None:
    """Check, once per precision and device of a process, that sums of known terms come out right.

    Args:
        dtype: "float32" or "float64".
        device: on which the sums are computed.

    Raises:
        CompilerError: if they do not, naming the version.
    """
    index = 1 + np.arange(_ROWS) % 1024  # squares and their sums are exact in float32
    vectors = np.stack([index, index[::-1], np.zeros_like(index)], axis=1).astype(dtype)
    matrix = np.eye(3, dtype=dtype)
    squares = np.sum(vectors**2, axis=1)
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        found = jit(_sums)(*jax.device_put((vectors, matrix), device))
        found = jax.device_get(found)
    if not all(
        np.array_equal(a, b) for a, b in zip(found, (squares, squares, vectors), strict=True)
    ):
        raise CompilerError(
            f"jax {jax.__version__} with jaxlib {lib.__version__} adds up wrongly in {dtype} on "
            f"{device}: energies and forces would be wrong. Install another version, such as "
            "pip install 'jax!=0.10.2'"
        )
