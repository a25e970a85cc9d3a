"""The factor on the radial basis, to the last digit of the library of the published models."""

import subprocess
import sys

import numpy as np
import pytest

from mlip_md.networks.radial_scale import radial_scale

# avg_r_min, cutoff, functions, envelope; the library's factor without and with float64 enabled, as
# version 0.2.5 computes it with jaxlib 0.10.1 on x86-64.
RECORDED = [
    (0.984375, 5.0, 8, "polynomial_envelope", 5.543741905248562, 5.543741905248562),
    (0.984375, 5.0, 8, "soft_envelope", 5.5059013726538435, 5.5059013726538435),
    (1.7854, 3.4751, 8, "polynomial_envelope", 9.89524760054665, 9.895248502907378),
    (0.8337, 3.2595, 8, "soft_envelope", 3.673120868785121, 3.673120499556201),
    (0.5169, 5.0595, 1, "polynomial_envelope", 4.558696959883005, 4.558696430495758),
    (1.3292, 3.3682, 32, "soft_envelope", 6.36969416645109, 6.369694647828734),
    (1.2933, 5.7906, 8, "polynomial_envelope", 7.650046774256618, 7.650045523382663),
    (1.4863, 3.2624, 5, "soft_envelope", 7.166107592679095, 7.16610827813601),
]


@pytest.mark.parametrize("case", RECORDED)
def test_both_values_are_the_library_s(case):
    *basis, single, double = case
    assert radial_scale(*basis, double=False) == single
    assert radial_scale(*basis, double=True) == double


@pytest.mark.parametrize(("r_min", "tolerance"), [(1.1, 2e-6), (0.98 * 5.3, 1e-3)])
@pytest.mark.parametrize("envelope", ["polynomial_envelope", "soft_envelope"])
def test_the_mean_square_becomes_one(envelope, r_min, tolerance):
    """Computed in float64 from the definitions, it is 1 to what float32 can say.

    That is three digits where the normalisation starts as near to the cutoff as it may.
    """
    r, cutoff = np.linspace(r_min, 5.3, 1000)[:-1, None], 5.3
    x = r / cutoff
    basis = np.sqrt(2 / cutoff) * np.sin(np.arange(1, 9) * np.pi * x) / r
    envelopes = {
        "polynomial_envelope": 1 - 21 * x**5 + 35 * x**6 - 15 * x**7,
        "soft_envelope": 1.2 * np.exp(0.5 - 0.5 / (1 - x)),
    }
    squares = (
        radial_scale(r_min, cutoff, 8, envelope, double=True) * basis * envelopes[envelope]
    ) ** 2
    np.testing.assert_allclose(squares.sum() / 8000, 1.0, rtol=tolerance)


def test_without_a_shortest_distance_nothing_is_scaled():
    assert radial_scale(None, 5.0, 8, "polynomial_envelope", double=False) == 1.0


def test_no_compiler_takes_part():
    """The value cannot depend on flags or devices of a library that is not there."""
    code = (
        "import sys, importlib.util as u; "
        f"s = u.spec_from_file_location('r', {radial_scale.__wrapped__.__code__.co_filename!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); "
        "value = m.radial_scale(0.984375, 5.0, 8, 'polynomial_envelope', False); "
        "assert value == 5.543741905248562, value; "
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
