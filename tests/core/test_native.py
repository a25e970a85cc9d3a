"""The compiled convolution: its definition, bit for bit the same on threads, refusals, fallback."""

import dataclasses
import subprocess
import sys
import warnings

import jax
import numpy as np
import pytest

from mlip_md import native
from mlip_md.networks import native_check as check
from mlip_md.networks.native_check import Case, Path
from mlip_md.networks.native_convolution import find_native

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module", autouse=True)
def library():
    status = find_native()
    if not native.LIBRARY.exists():
        pytest.skip(status.reason)
    assert status.available, status.reason
    return status


@pytest.fixture(autouse=True)
def doubles():
    with jax.enable_x64(True):
        yield


def blocks_case(n_nodes=7, n_edges=180, seed=3) -> Case:
    """Channels of several blocks, some read twice, some not at all; targets written in parts."""
    draw = np.random.default_rng(seed)

    def normal(*shape):
        return draw.standard_normal(shape)

    paths = (
        Path(0, 0, 1, 1, 0, 0, 64),
        Path(0, 32, 0, 0, 32, 70, 40),
        Path(1, 0, 1, 0, 0, 64, 4),
        Path(1, 3, 2, 1, 64, 110, 33),
        Path(2, 0, 2, 2, 1, 150, 3),
        Path(3, 1, 1, 1, 97, 153, 12),
    )
    shapes_x, shapes_g = ((1, 80), (3, 36), (5, 4), (3, 14)), ((1, 75), (3, 109), (5, 5))
    return Case(
        paths,
        draw.integers(0, n_nodes, n_edges).astype(np.int32),
        np.sort(draw.integers(0, n_nodes - 1, n_edges)).astype(np.int32),
        draw.random(n_edges) < 0.7,
        [normal(n_nodes, *shape) for shape in shapes_x],
        normal(n_edges, 9),
        normal(n_edges, 170),
        [normal(n_nodes, *shape) for shape in shapes_g],
    )


def everything(case: Case, threads: int = 1, dtype: str = "float64") -> list[np.ndarray]:
    """Results of all handlers."""
    case = case.cast(dtype)
    rest, seven = (case.y, case.r, case.x, case.g), {"wrt": np.int64(7)}
    table = check.random_table(case, cells=6, degree=4, seed=5)
    edges = (
        *(case.senders, case.receivers, table.lengths.astype(dtype), table.pairs),
        *(case.y, table.values.astype(dtype), case.x),
    )
    tangents = case.y, case.r, case.x
    backward = case.x, case.y, case.r
    lengths = edges[2]
    cutoff = {"cutoff": np.float64(table.cutoff), "threads": np.int64(threads)}
    team = {"threads": np.int64(threads)}
    return jax.tree_util.tree_leaves(
        (
            check.run("forward", case, (case.edges, *rest[:3]), case.g, **team),
            check.run("backward", case, (case.edges, *rest), backward, **seven, **team),
            check.run("second", case, (case.edges, *rest, tangents), (*backward, case.g), **team),
            check.run("table_forward", case, edges, case.g, **cutoff),
            check.run(
                *("table_backward", case, (edges, case.g), (case.x, case.y, lengths)),
                **seven,
                **cutoff,
            ),
        )
    )


def assert_right(case: Case, dtype: str, degree: int = 5) -> None:
    draw = np.random.default_rng(11)
    tangent = dataclasses.replace(
        case,
        x=[draw.standard_normal(a.shape) for a in case.x],
        y=draw.standard_normal(case.y.shape),
        r=draw.standard_normal(case.r.shape),
    )
    table = check.random_table(case, cells=5, degree=degree, seed=6)
    for name, error in check.differences(case, tangent, table, dtype).items():
        assert error < check.TOLERANCES[dtype], (name, error)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("width", [1, 4, 35])
def test_every_coupling_is_its_definition(width, dtype):
    assert_right(check.all_couplings(width, n_nodes=5, n_edges=20, seed=width), dtype)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_blocks_of_several_sources_and_targets(dtype):
    assert_right(blocks_case(), dtype)


@pytest.mark.parametrize("degree", [3, 4, 6, 7])
def test_tables_of_every_degree(degree):
    assert_right(blocks_case(n_edges=30), "float64", degree)


def test_features_that_are_copied_in_several_parts():
    case = blocks_case(n_nodes=5000, n_edges=300)  # more than the 8 MB that are copied at once
    assert sum(a.nbytes for a in case.g) > 2 * 8 * 2**20
    assert_right(case, "float64")


def test_a_node_of_very_many_edges():
    case = blocks_case(n_nodes=2, n_edges=300)  # all of them arrive at the first
    assert_right(case, "float64")


@pytest.mark.parametrize("n_edges", [0, 12])
def test_nothing_comes_of_edges_that_do_not_count(n_edges):
    case = blocks_case(n_edges=n_edges)
    case = dataclasses.replace(case, inside=np.zeros(n_edges, bool))
    forward = check.run("forward", case, (case.edges, case.y, case.r, case.x), case.g)
    rest = case.y, case.r, case.x, case.g
    wrt = {"wrt": np.int64(7)}
    backward = check.run("backward", case, (case.edges, *rest), (case.x, case.y, case.r), **wrt)
    assert all(not np.any(a) for a in jax.tree_util.tree_leaves((forward, backward)))


def test_no_nodes():
    case = blocks_case(n_edges=0)
    empty = dataclasses.replace(case, x=[a[:0] for a in case.x], g=[a[:0] for a in case.g])
    found = check.run("forward", empty, (empty.edges, empty.y, empty.r, empty.x), empty.g)
    assert [a.shape for a in found] == [a.shape for a in empty.g]


@pytest.mark.parametrize("wrt", [1, 2, 4, 3, 6])
def test_each_gradient_alone(wrt):
    case = blocks_case()
    arguments = case.edges, case.y, case.r, case.x, case.g
    all_three = case.x, case.y, case.r
    wanted = [i for i in range(3) if wrt >> i & 1]
    every = check.run("backward", case, arguments, all_three, wrt=np.int64(7))
    some = check.run("backward", case, arguments, [all_three[i] for i in wanted], wrt=np.int64(wrt))
    for found, i in zip(some, wanted, strict=True):
        jax.tree_util.tree_map(np.testing.assert_array_equal, found, every[i])


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_threads_change_no_bit(dtype):
    case = check.all_couplings(width=37, n_nodes=60, n_edges=900, seed=4)
    alone = everything(case, threads=1, dtype=dtype)
    for threads in (2, 3):
        for a, b in zip(alone, everything(case, threads, dtype), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_smaller_sets_of_instructions_agree(dtype, library):
    case = blocks_case()
    handlers = native.handlers()
    best, found = everything(case, dtype=dtype), {}
    try:
        for level in (0, 1):
            handlers.mlip_md_use_level(level)
            found[native.instructions()] = everything(case, dtype=dtype)
    finally:
        handlers.mlip_md_use_level(-1)
    assert native.instructions() == library.instructions
    for results in found.values():
        assert check.largest_error(results, best) < check.TOLERANCES[dtype]


def test_small_numbers_and_nan_stay_what_they_are():
    # A library linked for fast arithmetic makes whole processes round such numbers to zero.
    tiny = np.float32(1e-40), np.float64(1e-310)
    assert all(0 < a / a.dtype.type(2) < a for a in tiny)
    case = blocks_case()
    case.x[1][2, 0, 3] = np.nan
    found = check.run("forward", case, (case.edges, case.y, case.r, case.x), case.g)
    reached = np.unique(case.receivers[case.inside & (case.senders == 2)])
    nan = np.unique(np.nonzero(np.isnan(found[0]))[0])
    np.testing.assert_array_equal(nan, reached)
    assert not np.isnan(found[2]).any()


def wrong_cases():
    case = blocks_case()
    path = case.paths[0]
    yield "must be", dataclasses.replace(case, y=case.y[:-1])
    yield "must be", dataclasses.replace(case, senders=case.senders[:-1])
    yield "must be", dataclasses.replace(case, inside=case.inside.astype(np.int32))
    yield "must be", dataclasses.replace(case, x=[case.x[0][:-1], *case.x[1:]])
    yield "components", dataclasses.replace(case, x=[np.ones((7, 2, 80)), *case.x[1:]])
    yield "does not fit", dataclasses.replace(case, paths=(path._replace(channel=17),))
    yield "does not fit", dataclasses.replace(case, paths=(path._replace(column=-1),))
    yield "does not fit", dataclasses.replace(case, paths=(path._replace(degree=2),))
    yield "does not fit", dataclasses.replace(case, paths=(path._replace(target=9),))
    yield "share", dataclasses.replace(case, paths=(path, path))
    wild = np.where(np.arange(len(case.senders)) == 1, 7, case.senders).astype(np.int32)
    inside = np.ones_like(case.inside)
    yield "joins nodes", dataclasses.replace(case, senders=wild, inside=inside)
    yield "joins nodes", dataclasses.replace(case, receivers=-wild, inside=inside)


@pytest.mark.parametrize(("sentence", "case"), list(wrong_cases()))
def test_wrong_arguments_are_refused(sentence, case):
    with pytest.raises(Exception, match=sentence):
        check.run("forward", case, (case.edges, case.y, case.r, case.x), case.g)


def test_indices_of_edges_that_do_not_count_may_be_anything():
    case = blocks_case()
    wild = np.where(case.inside, case.senders, 2**30).astype(np.int32)
    arguments = case.y, case.r, case.x
    for a, b in zip(
        check.run("forward", case, (case.edges, *arguments), case.g),
        check.run(
            *("forward", case, (wild, case.receivers, case.inside, *arguments), case.g),
        ),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_second_order_is_the_derivative_of_the_first():
    case, step = blocks_case(), 1e-5
    other = blocks_case(seed=9)
    wrt = {"wrt": np.int64(7)}

    def gradients(by):
        x = [a + by * b for a, b in zip(case.x, other.x, strict=True)]
        y, r = case.y + by * other.y, case.r + by * other.r
        first = check.run("forward", case, (case.edges, y, r, x), case.g)
        arguments = case.edges, y, r, x, case.g
        return (*check.run("backward", case, arguments, (x, y, r), **wrt), first)

    arguments = case.edges, case.y, case.r, case.x, case.g, other.y, other.r, other.x
    found = check.run("second", case, arguments, (case.x, case.y, case.r, case.g))
    slopes = jax.tree_util.tree_map(
        lambda a, b: (a - b) / (2 * step), gradients(step), gradients(-step)
    )
    assert check.largest_error(found, slopes) < 1e-8


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_wrong_coefficient_is_noticed_at_first_use(tmp_path):
    library = native.LIBRARY.read_bytes()
    values = np.unique(check.coupling(3, 2, 3))
    coefficient = next(c for c in values if c and c.tobytes() in library)
    wrong = tmp_path / "wrong.so"
    wrong.write_bytes(library.replace(coefficient.tobytes(), (coefficient * 1.001).tobytes()))
    said = run_python(
        "from pathlib import Path; from mlip_md.networks.native_convolution import find_native;"
        f"import sys; sys.stdout.write(str(find_native(Path({str(wrong)!r}))))"
    )
    assert "available=False" in said
    assert "RuntimeWarning: the compiled convolution is not used, because its" in said


def test_a_damaged_library_is_not_used(tmp_path):
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    with pytest.warns(RuntimeWarning, match="could not be loaded"):
        status = find_native(damaged)
    assert not status.available


@pytest.mark.parametrize("kept", [0.001, 0.5, 0.999])
def test_a_library_that_was_cut_off_is_not_used(tmp_path, kept):
    # In a process of its own, which loading such a file ended.
    whole = native.LIBRARY.read_bytes()
    cut = tmp_path / "cut.so"
    cut.write_bytes(whole[: int(kept * len(whole))])
    said = run_python(
        "from pathlib import Path; from mlip_md.networks.native_convolution import find_native;"
        f"import sys; sys.stdout.write(str(find_native(Path({str(cut)!r}))))"
    )
    assert "available=False" in said
    assert "RuntimeWarning: the compiled convolution is not used, because cut.so could not" in said


def test_no_library_is_no_reason_to_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status = find_native(tmp_path / "none.so")
    assert status == (False, "", "no compiled convolution was built with this installation")


def test_an_installation_says_what_it_computes_with(tmp_path, library):
    assert native.describe() == f"compiled, {library.instructions}"
    assert "no compiled convolution" in native.describe(tmp_path / "none.so")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(b"not a library")
    assert "could not be loaded" in native.describe(damaged)
