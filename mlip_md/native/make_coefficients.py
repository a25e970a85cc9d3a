"""Writes coefficients.h, the couplings of the native convolution as straight-line code.

``python -m mlip_md.native.make_coefficients`` after a change of ``layers.coupling``.
"""

from pathlib import Path

import numpy as np

from mlip_md.networks.layers import coupling

LARGEST_DEGREE = 4

HEAD = """// Made by make_coefficients.py from couplings K[a, b, m] of degrees l1, l2, l3 = a, b, m.
// turn: t[a, m] = sum_b K y[b]; fold: h[a, b] = sum_m K g[m]. Only what is not always 0 is made.
// Lists of what is made: input, output, index. reverse: K[a, b, m] of l1, l2, l3 is that many times
// K[m, b, a] of l3, l2, l1.
// kernel.h includes this once for each instruction set: first part once, second part every time.
"""


def triples() -> list[tuple[int, int, int]]:
    """Degrees that couple, in the order of the tables of functions."""
    degrees = range(LARGEST_DEGREE + 1)
    return [
        (l1, l2, l3)
        for l1 in degrees
        for l2 in degrees
        for l3 in range(abs(l1 - l2), min(l1 + l2, LARGEST_DEGREE) + 1)
    ]


def sums(k: np.ndarray) -> tuple[list[tuple[int, int, int]], list[str]]:
    """Entries (i, j, index) for which Σ_n k[i, j, n] s[n] is not always 0, and these sums."""
    entries, values = [], []
    for index, (i, j) in enumerate(np.argwhere(k.any(axis=2)).tolist()):
        entries.append((i, j, index))
        terms = [f"T({c!r}) * s[{n}]" for n, c in enumerate(k[i, j].tolist()) if c != 0.0]
        values.append(" + ".join(terms))
    return entries, values


def listed(name: str, entries: list[tuple[int, int, int]]) -> str:
    """A constant list of entries."""
    text = ", ".join("{{{}, {}, {}}}".format(*entry) for entry in entries)
    return f"  static constexpr int {name}[{len(entries)}][3] = {{{text}}};\n"


def function(name: str, values: list[str]) -> str:
    """A function that writes the sums."""
    body = "".join(f"  d[{i}] = {value};\n" for i, value in enumerate(values))
    return f"template <class V, class T>\nvoid {name}(const V* s, V* d) {{\n{body}}}\n"


def header() -> str:
    """Text of coefficients.h."""
    lists, functions, entries = "", "", ""
    for degrees in triples():
        k = coupling(*degrees)
        k = np.where(np.abs(k) < 1e-12, 0.0, k)
        name = "{}{}{}".format(*degrees)
        turned, turns = sums(np.moveaxis(k, 1, 2))
        folded, folds = sums(k)
        lists += f"struct Coupling{name} {{\n  static constexpr int d1 = {k.shape[0]}, "
        lists += f"d2 = {k.shape[1]}, d3 = {k.shape[2]};\n"
        other = np.swapaxes(coupling(*degrees[::-1]), 0, 2)
        ratio = float(np.sum(k * other) / np.sum(other * other))
        assert np.allclose(k, ratio * other, atol=1e-12)
        lists += f"  static constexpr double reverse = {ratio!r};\n"
        lists += listed("turned", turned) + listed("folded", folded) + "};\n"
        functions += function(f"turn{name}", turns) + function(f"fold{name}", folds)
        entries += " \\\n  entry({}, {}, {})".format(*degrees)
    once = f"namespace mlip_md {{\n{lists}}}\n#define MLIP_MD_COUPLINGS(entry){entries}\n"
    guard = "MLIP_MD_COUPLING_LISTS"
    return f"{HEAD}#ifndef {guard}\n#define {guard}\n{once}#else\n{functions}#endif\n"


if __name__ == "__main__":
    Path(__file__).with_name("coefficients.h").write_text(header(), encoding="utf-8")
