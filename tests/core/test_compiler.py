"""Sums come out right with the installed compiler, and a wrong one is noticed."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from model_files import make_potential
from pair_potential import pair_potential

import mlip_md
from mlip_md import compiler
from mlip_md.engine import Engine
from mlip_md.errors import CompilerError
from mlip_md.neighbors import Shape
from mlip_md.structure import check_structure, list_edges
from mlip_md.trainer.step import make_eval_step

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


def test_nothing_of_ours_is_compiled_in_another_way():
    folder = Path(mlip_md.__file__).parent
    rooms = folder, folder / "trainer", folder / "integrations"
    files = {p for room in rooms for p in room.rglob("*.py")} - {folder / "compiler.py"}
    assert len(files) > 50
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("jax"):
                names = [alias.name for alias in node.names]
            assert not {"jit", "pjit", "pmap"} & set(names), file


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_engine_checks_the_compiler_and_no_other_does(monkeypatch, dtype):
    def wrong(vectors, matrix):
        return right(2 * vectors, matrix)

    right = compiler._sums
    monkeypatch.setattr(compiler, "_sums", wrong)
    compiler.check_sums.cache_clear()
    with pytest.raises(CompilerError, match=dtype):
        Engine(pair_potential(), dtype)
    if dtype == "float32":  # that of all trainings
        with pytest.raises(CompilerError, match=dtype):
            make_eval_step(lambda params, graph: 0.0)
    monkeypatch.setattr(compiler, "_sums", right)
    engine = Engine(pair_potential(), dtype)
    assert engine.num_compilations == 0
    monkeypatch.setattr(compiler, "_sums", wrong)
    Engine(pair_potential(), dtype)  # this process has been found good


def clusters(n_edges: int, cutoff: float):
    """Atoms in reach of each other, in groups of 20 and 2, with so many edges (or one less)."""
    rng = np.random.default_rng(0)
    large, rest = divmod(n_edges - n_edges % 2, 20 * 19)
    grid = np.stack(np.meshgrid(*[np.arange(3)] * 3), axis=-1).reshape(-1, 3)
    for size in [20] * large + [2] * (rest // 2):
        spots = rng.permutation(grid)[:size] * 0.25 * cutoff
        yield spots + 0.1 * rng.uniform(-1, 1, (size, 3)), rng.choice([1, 6, 8], size)


@pytest.mark.slow
@pytest.mark.parametrize("n_edges", [n * 2**14 + side for n in (1, 2, 4) for side in (-1, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["mace", "nequip"])
def test_long_arrays_give_what_their_parts_give(architecture, dtype, n_edges):
    potential = make_potential(architecture)
    engine = Engine(potential, dtype)
    cutoff = potential.cutoff
    structures = [
        list_edges(check_structure(potential, positions, numbers, None, False), cutoff)
        for positions, numbers in clusters(n_edges, cutoff)
    ]
    assert n_edges - sum(structure.n_edges for structure in structures) in (0, 1)

    def computed(group, edges):
        n_atoms = sum(len(structure) for structure in group)
        shape = Shape(n_atoms + 1, edges, len(group) + 1)
        values = np.split(engine.runtime.compute(group, shape)[0].values, [shape.nodes])
        return values[0][:n_atoms], values[1].reshape(-1, 3)[:n_atoms]

    parts = [computed([structure], 400) for structure in structures]
    for found, part in zip(computed(structures, n_edges), zip(*parts, strict=True), strict=True):
        expected = np.concatenate(part)
        tolerance = 1e-11 if dtype == "float64" else 1e-4
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())
