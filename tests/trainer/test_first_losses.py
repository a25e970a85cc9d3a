"""The cards' recipes give the losses that version 0.1.0 gave: ``data/first_losses``.

Networks are small and molecules near their minima, so that rounding stays rounding over some
hundred steps; every other row of the recipes is the card's, and the exchange of the weights of the
loss in epoch 115 is among the losses.
"""

import itertools
import json
from pathlib import Path

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


def losses(name, folder, count, *rows):
    files = [f"data.{part}={FOLDER / file}" for part, file in
             (("path", "train.xyz"), ("validation", "validation.xyz"))]  # fmt: skip
    recipe = load_recipe(name, [*CASES["rows"][name], *files, *rows])[0]
    trainer = Trainer(recipe, load_data(recipe), folder)
    found = []
    with trainer.computing():
        for epoch in itertools.count(1):
            weights = weights_at(recipe.loss, epoch)
            for _, batch in trainer.batches(epoch):
                trainer.state, log = trainer.train_step(trainer.state, batch, weights)
                found.append(float(log.loss))
                if len(found) == count:
                    return np.array(found)


def test_the_record_is_of_the_first_version():
    assert RECORDED["version"] == "0.1.0"
    for name in CASES["rows"]:
        found = np.array(RECORDED["losses"][name])
        assert len(found) == CASES["count"] >= 200
        flip = 2 * 114  # two batches an epoch; energies weigh 25 times as much from there on
        assert np.isfinite(found).all()
        assert found[:10].mean() > found[flip - 10 : flip].mean()


@pytest.mark.parametrize("name", CASES["rows"])
def test_float64_by_the_definition(name, tmp_path, monkeypatch):
    monkeypatch.setattr(native_convolution, "find_native", lambda: NO_KERNEL)
    found = losses(name, tmp_path, CASES["count"], "train.precision=float64")
    np.testing.assert_allclose(found, RECORDED["losses"][name], rtol=1e-9)


@pytest.mark.kernel
@pytest.mark.parametrize("name", CASES["rows"])
def test_float32_with_kernels(name, tmp_path):
    found = losses(name, tmp_path, 20)
    np.testing.assert_allclose(found, RECORDED["losses"][name][:20], rtol=1e-4)
