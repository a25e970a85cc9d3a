"""The factor on MACE's radial basis, to the last digit of the library of the published models."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class RadialScale(NamedTuple):
    """The factor by working precision."""

    float32: float
    float64: float


@functools.lru_cache
def radial_scale(
    avg_r_min: float | None, cutoff: float, number: int, envelope: str, double: bool
) -> float:
    """Factor that gives the radial basis a mean square of 1 between avg_r_min and the cutoff.

    Published weights were trained with its value in float32, rounding included, so that its last
    digit matters. It is computed without XLA, whose float32 sums depend on its version, flags and
    device, by one rule: every operation of the reference library in float32, in the order and with
    the functions that XLA has on x86-64 CPUs (jaxlib 0.10.1, up to 32 radial functions).

    Args:
        avg_r_min: Å; None: not normalised.
        cutoff: Å.
        number: of radial functions.
        envelope: name of the envelope.
        double: the value that the library has where float64 is enabled. There the constants
            √(2/rc) and 1.2/s(2) are computed in float64 and rounded to float32 last.

    Returns:
        The factor; 1 without avg_r_min.
    """
    if avg_r_min is None:
        return 1.0
    real, rc = np.float64 if double else np.float32, np.float32(cutoff)
    t = _divided(np.arange(999, dtype=np.float32), np.float32(999))
    r = _fused(np.float32(avg_r_min), 1 - t, rc * t)  # 999 of 1000 samples; the last is 0, at rc
    x, lengths = np.minimum(_divided(r, rc), 1), r[:, None]
    frequencies = _divided(np.arange(1, number + 1, dtype=np.float32) * np.float32(np.pi), rc)
    prefactor = np.float32(np.sqrt(real(2.0 / cutoff)))
    basis = prefactor * _divided(_sin(frequencies * lengths), lengths)
    if envelope == "polynomial_envelope":
        x2, x4 = x * x, (x * x) * (x * x)
        u = 1 - 21 * (x * x4) + 35 * (x2 * x4) - 15 * ((x * x2) * x4)
    else:
        at_two = math.exp(-0.5) if double else _exp(np.array(-0.5, np.float32))
        step = _exp(-1 / (2 * np.where(x < 1, 1 - x, 1)))
        u = np.float32(real(1.2) / real(at_two)) * np.where(x < 1, step, 0)
    return float(_mean((basis * u[:, None]) ** 2)) ** -0.5


def radial_scales(
    avg_r_min: float | None, cutoff: float, number: int, envelope: str
) -> RadialScale:
    """Both values of ``radial_scale``, of the same arguments."""
    basis = avg_r_min, cutoff, number, envelope
    return RadialScale(radial_scale(*basis, double=False), radial_scale(*basis, double=True))


def _divided(a: np.ndarray, b: np.ndarray | np.float32) -> np.ndarray:
    """Ratio a / b of float32; a divisor that broadcasts is multiplied as its reciprocal."""
    return a / b if a.size == b.size else a * (1 / b)


def _fused(a: npt.ArrayLike, b: npt.ArrayLike, c: npt.ArrayLike) -> np.ndarray:
    """The sum a·b + c of float32, rounded once."""
    product = np.asarray(a, np.float64) * np.asarray(b, np.float64)
    return np.asarray(product + np.asarray(c, np.float64), np.float32)


def _exp(x: np.ndarray) -> np.ndarray:
    """Exponential in float32 by the polynomial of Cephes (Moshier, expf), which XLA has too."""
    n = np.floor(_fused(x, np.float32(math.log2(math.e)), np.float32(0.5)))
    r = _fused(-n, np.float32(0.693359375), x)
    r = _fused(-n, np.float32(-2.12194440e-4), r)
    p = np.full_like(x, 1.9875691500e-4)
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = _fused(p, r, np.float32(c))
    return ((_fused(p, r * r, r) + 1) * np.exp2(n, dtype=np.float64)).astype(np.float32)


def _sin(x: np.ndarray) -> np.ndarray:
    """Sine in float32 by the polynomials in float64 of glibc's sinf (Arm), which XLA calls."""
    quarter = np.rint(x * np.float64(2 / np.pi))
    r = x - quarter * (np.pi / 2)
    z = r * r
    sine = (r + r * z * float.fromhex("-0x1.555545995a603p-3")) + (r * z * z) * (
        float.fromhex("0x1.1107605230bc4p-7") + z * float.fromhex("-0x1.994eb3774cf24p-13")
    )
    cosine = (
        (1 + z * float.fromhex("-0x1.ffffffd0c621cp-2"))
        + (z * z) * float.fromhex("0x1.55553e1068f19p-5")
    ) + (z * z * z) * (
        float.fromhex("-0x1.6c087e89a359dp-10") + z * float.fromhex("0x1.99343027bf8c3p-16")
    )
    values = np.where(quarter % 2 == 0, sine, cosine)
    return np.where(quarter % 4 < 2, values, -values).astype(np.float32)


def _mean(values: np.ndarray) -> np.float32:
    """Mean in float32 of 999 rows and one of zeros: 32 rows are summed at a time, in order."""
    windows = np.pad(values, ((12, 13), (0, 0))).reshape(32, -1)
    total = np.cumsum(np.cumsum(windows, axis=1)[:, -1])[-1]  # in order, unlike np.sum
    return np.float32(total) * (1 / np.float32(1000 * values.shape[1]))
