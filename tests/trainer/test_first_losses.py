"""The cards' recipes give the losses that version 0.1.0 gave: ``data/first_losses``.

Networks are small; every other row of the recipes is the card's, and the exchange of the weights of
the loss in epoch 115 is among the losses. At the card's learning rates training amplifies rounding:
NequIP's losses stay within 1e-9 over two hundred steps, MACE's over fifty. What comes after is held
to what a change of every weight in its last digit does.
"""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from mlip_md.networks import native_convolution
from mlip_md.trainer.data import load_data
from mlip_md.trainer.loss import weights_at
from mlip_md.trainer.recipe import load_recipe
from mlip_md.trainer.train import Trainer

FOLDER = Path(__file__).parents[1] / "data" / "first_losses"
CASES = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
RECORDED = json.loads((FOLDER / "losses.json").read_text(encoding="utf-8"))
NO_KERNEL = native_convolution.Status(False, "", "not wanted")
FEW = 20
EXACT = {"mace-spice2": 50, "nequip-spice2": 200}
"""Losses before which rounding is not amplified beyond 1e-9."""
ROUNDING = 2e-16


def losses(name, folder, count, *rows, change=0.0):
    """Losses of the first steps; every weight times 1 ± ``change`` at the start."""
    files = [f"data.path={FOLDER / 'train.xyz'}", f"data.validation={FOLDER / 'validation.xyz'}"]
    recipe = load_recipe(name, [*CASES["rows"][name], *files, *rows])[0]
    trainer = Trainer(recipe, load_data(recipe), folder)
    found, signs = [], np.random.default_rng(0)
    with trainer.computing():
        params = jax.tree_util.tree_map(
            lambda w: w * (1 + change * signs.choice([-1.0, 1.0], w.shape)), trainer.state.params
        )
        trainer.state = dataclasses.replace(trainer.state, params=params)
        for epoch in itertools.count(1):
            weights = weights_at(recipe.loss, epoch)
            for _, batch in trainer.batches(epoch):
                found.append(float(trainer.step(batch, weights).loss))
                if len(found) == count:
                    return np.array(found)


def test_the_record_is_of_the_first_version():
    assert RECORDED["version"] == "0.1.0"
    for name in CASES["rows"]:
        found = np.array(RECORDED["losses"][name])
        assert len(found) == CASES["count"] >= 200
        assert np.isfinite(found).all()
        assert found[-20:].mean() < 0.5 * found[:20].mean()


@pytest.mark.parametrize("name", CASES["rows"])
def test_float64_by_the_definition(name, tmp_path, monkeypatch):
    monkeypatch.setattr(native_convolution, "find_native", lambda: NO_KERNEL)
    found = losses(name, tmp_path, FEW, "train.precision=float64")
    np.testing.assert_allclose(found, RECORDED["losses"][name][:FEW], rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES["rows"])
def test_many_in_float64_by_the_definition(name, tmp_path, monkeypatch):
    monkeypatch.setattr(native_convolution, "find_native", lambda: NO_KERNEL)
    count, expected = CASES["count"], np.array(RECORDED["losses"][name])
    found = losses(name, tmp_path, count, "train.precision=float64")
    other = losses(name, tmp_path, count, "train.precision=float64", change=ROUNDING)
    exact = EXACT[name]
    np.testing.assert_allclose(found[:exact], expected[:exact], rtol=1e-9)
    sensitivity = np.maximum.accumulate(np.abs(other / found - 1))
    assert (np.abs(expected / found - 1) <= np.maximum(30 * sensitivity, 1e-9)).all()


@pytest.mark.kernel
@pytest.mark.parametrize(
    "name", ["mace-spice2", pytest.param("nequip-spice2", marks=pytest.mark.slow)]
)
def test_float32_with_kernels(name, tmp_path):
    found = losses(name, tmp_path, FEW)
    np.testing.assert_allclose(found, RECORDED["losses"][name][:FEW], rtol=1e-4)
