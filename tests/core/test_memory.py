"""What a machine and a device have of memory, what a step takes, and what is said where it ends."""

import copy
import warnings
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from mlip_md import devices, memory
from mlip_md.devices import (
    POOL_VARIABLES,
    DeviceMemory,
    Load,
    check_memory,
    device_memory,
    naming_out_of_memory,
    plan_memory,
    reserves_most,
)
from mlip_md.errors import CapacityError

GIB = 2**30
LOAD = Load("1000 atoms with room for 60000 edges", 1000, fixed=GIB)
CPU = SimpleNamespace(platform="cpu")
OLD, OLD_NAME = "cgroup/memory", "memory.limit_in_bytes"
"""Of the first version of control groups."""


def machine(folder, monkeypatch, groups="", limits=()):
    """A machine of 8 GiB and 2 of swap, of which 3 and 1 are free, in control groups."""
    told = {"MemTotal": 8, "MemFree": 1, "MemAvailable": 3, "SwapTotal": 2, "SwapFree": 1}
    files = {
        "proc/meminfo": "".join(f"{name}:   {size * 2**20} kB\n" for name, size in told.items()),
        "proc/self/cgroup": groups,
        **dict(limits),
    }
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(memory, "PROC", folder / "proc")
    monkeypatch.setattr(memory, "CGROUPS", folder / "cgroup")
    monkeypatch.setattr(memory, "total_memory", memory.total_memory.__wrapped__)


@pytest.mark.parametrize(
    ("groups", "limits", "total"),
    [
        ("0::/\n", {}, 10),
        ("0::/\n", {"cgroup/memory.max": "max\n"}, 10),
        ("0::/job/step\n", {"cgroup/job/step/memory.max": "max\n"}, 10),
        (
            "0::/job/step\n",
            {"cgroup/job/step/memory.max": f"{6 * GIB}\n", "cgroup/job/memory.max": f"{2 * GIB}\n"},
            2,
        ),
        ("3:cpu,cpuacct:/a\n4:memory:/b\n0::/\n", {f"{OLD}/b/{OLD_NAME}": f"{GIB}"}, 1),
        ("4:memory:/gone\n", {f"{OLD}/{OLD_NAME}": f"{2**63 - 4096}\n"}, 10),
        ("4:cpu:/b\n", {f"{OLD}/b/{OLD_NAME}": f"{GIB}"}, 10),
    ],
)  # fmt: skip
def test_memory_of_a_machine_and_its_control_groups(tmp_path, monkeypatch, groups, limits, total):
    machine(tmp_path, monkeypatch, groups, limits)
    assert memory.total_memory() == total * GIB
    assert memory.free_memory() == min(4, total) * GIB


def test_a_system_that_tells_nothing_of_its_memory(tmp_path, monkeypatch):
    machine(tmp_path, monkeypatch)
    (tmp_path / "proc/meminfo").unlink()
    (tmp_path / "proc/self/cgroup").unlink()
    monkeypatch.setattr(memory.os, "sysconf", lambda name: 4 if name == "SC_PHYS_PAGES" else GIB)
    assert memory.total_memory() == memory.free_memory() == 4 * GIB
    monkeypatch.delattr(memory.os, "sysconf")
    assert memory.total_memory() == memory.free_memory() == memory.UNKNOWN


def test_sizes_are_told_with_two_digits_or_more():
    assert [memory.as_gib(n * GIB) for n in (0.0123, 1.5, 79.14, 1234.5)] == [
        "0.0123 GiB", "1.5 GiB", "79.1 GiB", "1234 GiB",
    ]  # fmt: skip


def test_the_plan_of_a_call_is_known_before_it_and_compiled_once(caplog):
    def function_to_plan(x, kept):
        return jnp.sort(jnp.sin(x @ x)[0]), kept + 1

    step = jax.jit(function_to_plan, donate_argnames="kept")
    x, kept = jnp.ones((256, 256)), jnp.zeros(1000)
    with jax.log_compiles():
        needed = plan_memory(step, x, kept)
        step(x, kept)  # nothing was donated before
    assert x.nbytes + 1000 * 4 < needed < 4 * x.nbytes
    for what in ("tracing function_to_plan", "XLA compilation of jit(function_to_plan)"):
        assert caplog.text.count(f"Finished {what}") == 1
    assert plan_memory(function_to_plan, x, kept) is None


def holding(monkeypatch, total, free):
    monkeypatch.setattr(
        devices, "device_memory", lambda _: DeviceMemory(total * GIB, free * GIB, "this card")
    )


def test_what_can_never_fit_is_refused_with_what_fits(monkeypatch):
    holding(monkeypatch, 11, 2)
    with pytest.raises(CapacityError) as caught:
        check_memory(LOAD, CPU, 21 * GIB)
    said = "1000 atoms with room for 60000 edges need about 21 GiB of memory, more than the 11 GiB "
    # half of what grows, and a quarter less because shapes grow in such steps
    said += "of this card; about 400 atoms fit; use fewer atoms, a smaller model, dtype='float32'"
    assert str(caught.value).startswith(said)
    assert (caught.value.needed, caught.value.available) == (21 * GIB, 11 * GIB)
    located = copy.copy(caught.value).locate("structure 3")
    assert located.needed == 21 * GIB
    with pytest.raises(CapacityError, match="this card; use fewer"):
        check_memory(Load("x", 5, fixed=20 * GIB), CPU, 21 * GIB)


def test_what_does_not_fit_now_is_warned_of_on_a_machine(monkeypatch):
    holding(monkeypatch, 32, 20)
    with pytest.warns(RuntimeWarning, match="need about 21 GiB.*only 20 GiB of the 32 GiB"):
        check_memory(LOAD, CPU, 21 * GIB)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_memory(LOAD, CPU, 20 * GIB)
        check_memory(LOAD, CPU, None)
        check_memory(LOAD, SimpleNamespace(platform="gpu"), 21 * GIB)  # it tries, and says so


def fill(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nand more")


@pytest.mark.parametrize(
    ("needed", "told"),
    [
        (21 * GIB, "memory; about 21 GiB are needed; 2 GiB of the 11 GiB of this card are free; "
         "about 400 atoms fit; use"),
        (8 * GIB, "memory; about 8 GiB are needed; 2 GiB of the 11 GiB of this card are free; use"),
        (None, "memory; 2 GiB of the 11 GiB of this card are free; use fewer"),
    ],
)  # fmt: skip
def test_memory_that_ends_on_the_way_is_told_in_numbers(monkeypatch, needed, told):
    holding(monkeypatch, 11, 2)
    with pytest.raises(CapacityError) as caught, naming_out_of_memory(LOAD, CPU, needed):
        fill()
    assert told in str(caught.value)
    assert str(caught.value).endswith("JAX says: RESOURCE_EXHAUSTED: Out of memory")
    assert (caught.value.needed, caught.value.available) == (needed, 2 * GIB)
    with pytest.raises(jax.errors.JaxRuntimeError), naming_out_of_memory(LOAD, CPU, needed):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def card(**told):
    return SimpleNamespace(platform="gpu", device_kind="NVIDIA X", memory_stats=lambda: told)


def test_memory_of_a_card_is_the_part_that_jax_has():
    found = device_memory(card(bytes_limit=60 * GIB, bytes_in_use=GIB))
    assert found[:2] == (60 * GIB, 59 * GIB)
    assert "NVIDIA X" in found.where
    assert device_memory(card()) is None
    cpu = device_memory(jax.devices("cpu")[0])
    assert 0 < cpu.free <= cpu.total == memory.total_memory()


def test_jax_reserves_a_card_unless_somebody_has_said_otherwise(monkeypatch):
    for name in POOL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert reserves_most(card())
    assert not reserves_most(CPU)
    for name in POOL_VARIABLES:
        with monkeypatch.context() as patch:
            patch.setenv(name, "0.5")
            assert not reserves_most(card())


def test_numbers_of_a_training_batch():
    load = Load("steps of 8 structures", 8, "structures", "lower data.batch_size")
    assert load.fitting(16 * GIB, 8 * GIB) == "; about 3 structures fit"
