"""Checkpoints: exact, atomic, and never silently wrong."""

import errno
import os

import jax.numpy as jnp
import numpy as np
import pytest

from mlip_md.errors import CheckpointError, OutputError
from mlip_md.trainer.checkpoint import CheckpointFolder, leaves_by_path, state_hash


def state(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "params": {"w[0,0] 2x0e,8x0e": jnp.asarray(generator.normal(size=(2, 8)), jnp.float32)},
        "count": jnp.asarray(seed, jnp.int32),
        "empty": jnp.zeros((0, 3)),
    }


PROGRESS = {"epoch": 3, "batch": 17, "best": {"1": {"score": 0.1 + 0.2}}, "sums": {"loss": 1e-300}}


def test_round_trip_is_exact(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_latest=1)
    path = folder.save(state(5), PROGRESS, 1)
    restored, progress = folder.restore(state(0))
    assert state_hash(leaves_by_path(restored)) == state_hash(leaves_by_path(state(5)))
    assert progress == PROGRESS
    assert restored["count"].shape == ()
    assert list(tmp_path.iterdir()) == [path]


def test_every_flipped_bit_is_refused_or_harmless(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_latest=1)
    path = folder.save(state(1), PROGRESS, 1)
    whole, expected = path.read_bytes(), state_hash(leaves_by_path(state(1)))
    refused = 0
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            restored, progress = folder.restore(state(0))
        except CheckpointError:
            refused += 1
            continue
        assert state_hash(leaves_by_path(restored)) == expected
        assert progress == PROGRESS
    assert refused > 0.9 * len(whole)


def test_a_cut_off_file_is_refused(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_latest=1)
    path = folder.save(state(1), PROGRESS, 1)
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="damaged"):
            folder.restore(state(0))


def test_the_newest_good_one_is_taken(tmp_path, caplog):
    folder = CheckpointFolder(tmp_path / "checkpoints", keep_latest=2)
    assert folder.restore(state(0)) is None
    for step in (8, 9, 10, 1000):
        folder.save(state(step), {"step": step}, step)
    assert [path.name for path in folder.files()] == [
        "step-000001000.safetensors", "step-000000010.safetensors"
    ]  # fmt: skip
    newest = bytearray(folder.files()[0].read_bytes())
    newest[-5] ^= 4
    folder.files()[0].write_bytes(newest)
    restored, progress = folder.restore(state(0))
    assert progress == {"step": 10}
    assert int(restored["count"]) == 10
    assert "SHA-256" in caplog.text
    folder.files()[1].write_bytes(b"")
    with pytest.raises(CheckpointError, match="no checkpoint is usable"):
        folder.restore(state(0))


def test_a_state_of_another_network_is_refused(tmp_path):
    folder = CheckpointFolder(tmp_path, keep_latest=1)
    folder.save(state(1), {}, 1)
    other = {**state(0), "count": jnp.zeros(2, jnp.int32)}
    with pytest.raises(CheckpointError, match=r"another network.*\['count'\]"):
        folder.restore(other)


def test_what_belongs_to_another_run_is_not_passed_over(tmp_path):
    """An older checkpoint that fits must not be taken in place of a newer one that does not."""
    folder = CheckpointFolder(tmp_path, keep_latest=2)
    folder.save(state(1), {"step": 1}, 1)
    folder.save({**state(2), "count": jnp.zeros(2, jnp.int32)}, {"step": 2}, 2)
    with pytest.raises(CheckpointError, match=r"^\S*step-000000002\S* belongs to another network"):
        folder.restore(state(0))

    def check(progress):
        raise CheckpointError(f"not step {progress['step']}")

    with pytest.raises(CheckpointError, match=r"^not step 2$"):
        folder.restore(state(0), check)


def test_a_full_disk_leaves_the_old_checkpoints(tmp_path, monkeypatch):
    folder = CheckpointFolder(tmp_path, keep_latest=1)
    folder.save(state(1), {"step": 1}, 1)

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        folder.save(state(2), {"step": 2}, 2)
    monkeypatch.undo()
    assert folder.restore(state(0))[1] == {"step": 1}
    assert len(list(tmp_path.iterdir())) == 1
