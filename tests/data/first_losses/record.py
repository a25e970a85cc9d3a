"""Record the first losses of the cards' recipes, in float64, with version 0.1.0.

The numbers of ``losses.json`` are those of commit b795076, which wrote ``version_0_1_0``; some
checkouts after it still call themselves 0.1.0 and draw other weights from a seed. With that one:

    PYTHONPATH=CHECKOUT_OF_B795076 python tests/data/first_losses/record.py losses.json

Batches and first weights are those of a training in float32; all arithmetic is in float64.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from mlip_md.trainer.config import load_recipe
from mlip_md.trainer.dataset import load_data

import mlip_md
from mlip_md.networks import build_network
from mlip_md.trainer.data import make_batch
from mlip_md.trainer.loss import weights_at
from mlip_md.trainer.step import init_state, make_train_step
from mlip_md.trainer.train import Trainer

HERE = Path(__file__).parent
CASES = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))


def doubled(tree):
    return jax.tree_util.tree_map(
        lambda a: np.asarray(a, np.float64) if np.asarray(a).dtype == np.float32 else a, tree
    )


def record(name, overrides, count):
    files = [f"data.path={HERE / 'train.xyz'}", f"data.validation={HERE / 'validation.xyz'}"]
    recipe = load_recipe(name, [*overrides, *files])[0]
    data = load_data(recipe)
    params = jax.device_get(Trainer(recipe, data, HERE / "none").state.params)
    statistics = data.statistics
    network = build_network(
        recipe.network,
        num_species=len(statistics.elements),
        cutoff=recipe.data.cutoff,
        avg_num_neighbors=statistics.avg_num_neighbors,
        avg_r_min=statistics.avg_r_min,
    )
    losses, epoch = [], 0
    with jax.enable_x64(True):
        step = make_train_step(network.apply, recipe)
        state = init_state(recipe, doubled(params))
        while len(losses) < count:
            epoch += 1
            weights = weights_at(recipe.loss, epoch)
            for indices in data.plan(recipe.seed, epoch):
                batch = doubled(make_batch(data.train, indices, data.budget))
                state, log = step(state, batch, weights)
                losses.append(float(log.loss))
    return losses[:count]


if __name__ == "__main__":
    found = {name: record(name, rows, CASES["count"]) for name, rows in CASES["rows"].items()}
    content = {"version": mlip_md.__version__, "jax": jax.__version__, "losses": found}
    Path(sys.argv[1]).write_text(json.dumps(content, indent=0) + "\n", encoding="utf-8")
