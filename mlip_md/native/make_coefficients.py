"""Writes coefficients.h, the couplings of the native convolution, the usual ones written out.

``python -m mlip_md.native.make_coefficients`` after a change of ``layers.coupling``.
"""

from pathlib import Path

import numpy as np

from mlip_md.networks.layers import coupling

MAX_DEGREE = 4
WRITTEN_OUT = 3
"""Largest degree of couplings that become straight-line code; of all it would compile too long."""

HEAD = """// Made by make_coefficients.py from couplings K[a, b, m] of degrees l1, l2, l3 = a, b, m.
// reverse: K[a, b, m] of l1, l2, l3 is that many times K[m, b, a] of l3, l2, l1.
// Written out: turn, t[a, m] = sum_b K y[b], and fold, h[a, b] = sum_m K g[m]; only what is not
// always 0 is made, and lists say of what is made: row, column, index.
// kernels.h includes this once for each set of instructions: first part once, second every time.
"""


def triples() -> list[tuple[int, int, int]]:
    """Degrees that couple, those that are written out first."""
    degrees = range(MAX_DEGREE + 1)
    found = [
        (l1, l2, l3)
        for l1 in degrees
        for l2 in degrees
        for l3 in range(abs(l1 - l2), min(l1 + l2, MAX_DEGREE) + 1)
    ]
    return sorted(found, key=lambda triple: max(triple) > WRITTEN_OUT)


def cleaned(degrees: tuple[int, int, int]) -> np.ndarray:
    """Coupling whose zeros are exact."""
    k = coupling(*degrees)
    return np.where(np.abs(k) < 1e-12, 0.0, k)


def sums(k: np.ndarray) -> tuple[list[str], list[str]]:
    """Entries (i, j, index) for which Σ_n k[i, j, n] s[n] is not always 0, and these sums."""
    entries, values = [], []
    for index, (i, j) in enumerate(np.argwhere(k.any(axis=2)).tolist()):
        entries.append(f"{{{i}, {j}, {index}}}")
        terms = [f"T({c!r}) * s[{n}]" for n, c in enumerate(k[i, j].tolist()) if c != 0.0]
        values.append(" + ".join(terms))
    return entries, values


def listed(kind: str, name: str, entries: list[str]) -> str:
    """A constant list."""
    return f"  static constexpr {kind} {name} = {{{', '.join(entries)}}};\n"


def function(name: str, values: list[str]) -> str:
    """A function that writes sums."""
    body = "".join(f"  d[{i}] = {value};\n" for i, value in enumerate(values))
    return f"template <class V, class T>\nvoid {name}(const V* s, V* d) {{\n{body}}}\n"


def data(degrees: tuple[int, int, int]) -> str:
    """What is known of one coupling."""
    k, other = cleaned(degrees), np.swapaxes(coupling(*degrees[::-1]), 0, 2)
    ratio = float(np.sum(k * other) / np.sum(other * other))
    assert np.allclose(k, ratio * other, atol=1e-12)
    terms = ["{{{}, {}, {}, {!r}}}".format(*i, float(k[tuple(i)])) for i in np.argwhere(k).tolist()]
    text = "struct Coupling{}{}{} {{\n".format(*degrees)
    text += "  static constexpr int d1 = {}, d2 = {}, d3 = {};\n".format(*k.shape)
    text += f"  static constexpr double reverse = {ratio!r};\n"
    text += listed("Term", f"terms[{len(terms)}]", terms)
    if max(degrees) <= WRITTEN_OUT:
        for name, entries in ("turned", sums(np.moveaxis(k, 1, 2))[0]), ("folded", sums(k)[0]):
            text += listed("int", f"{name}[{len(entries)}][3]", entries)
    return text + "};\n"


def functions(degrees: tuple[int, int, int]) -> str:
    """Straight-line code of one coupling."""
    k, name = cleaned(degrees), "{}{}{}".format(*degrees)
    turns, folds = sums(np.moveaxis(k, 1, 2))[1], sums(k)[1]
    return function(f"turn{name}", turns) + function(f"fold{name}", folds)


def macro(name: str, chosen: list[tuple[int, int, int]]) -> str:
    """A list of degrees."""
    entries = "".join(" \\\n  entry({}, {}, {})".format(*degrees) for degrees in chosen)
    return f"#define {name}(entry){entries}\n"


def header() -> str:
    """Text of coefficients.h."""
    written = [degrees for degrees in triples() if max(degrees) <= WRITTEN_OUT]
    once = "namespace mlip_md {\nstruct Term {\n  int a, b, m;\n  double k;\n};\n"
    once += "".join(map(data, triples())) + "}\n" + macro("MLIP_MD_WRITTEN_OUT", written)
    once += macro("MLIP_MD_OTHERS", triples()[len(written) :])
    guard, every = "MLIP_MD_COUPLINGS", "".join(map(functions, written))
    return f"{HEAD}#ifndef {guard}\n#define {guard}\n{once}#else\n{every}#endif\n"


if __name__ == "__main__":
    Path(__file__).with_name("coefficients.h").write_text(header(), encoding="utf-8")
