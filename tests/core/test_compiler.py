"""Sums come out right with the installed compiler, and a wrong one is noticed."""

import jax
import numpy as np
import pytest

from mlip_md import compiler
from mlip_md.errors import CompilerError

DTYPES = ["float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_installed_compiler_is_right(dtype):
    compiler.check_sums.__wrapped__(dtype, jax.devices("cpu")[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", range(3))
def test_a_wrong_sum_is_refused(monkeypatch, dtype, which):
    def wrong(vectors, matrix):
        sums = list(right(vectors, matrix))
        sums[which] = sums[which].at[-1].multiply(0.998)
        return tuple(sums)

    right = compiler._sums
    monkeypatch.setattr(compiler, "_sums", wrong)
    with pytest.raises(CompilerError, match=f"jax {jax.__version__}.*{dtype}"):
        compiler.check_sums.__wrapped__(dtype, jax.devices("cpu")[0])


def test_the_cure_reaches_what_is_compiled(monkeypatch):
    monkeypatch.setattr(compiler.lib, "__version__", "0.10.2")
    doubled = compiler.jit(lambda x: 2 * x)
    np.testing.assert_array_equal(doubled(np.arange(3.0)), [0, 2, 4])
    monkeypatch.setattr(compiler, "_CURES", {"0.10.2": {"no such option": ""}})
    with pytest.raises(Exception, match="no such option"):
        compiler.jit(lambda x: 2 * x)(np.arange(3.0))
