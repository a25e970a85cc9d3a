"""How a potential is made: data, loss, optimizer, loop, checkpoints, evaluation.

    from mlip_md.trainer import Trainer, load_data, load_recipe

    recipe, _ = load_recipe("own.yaml", ["train.epochs=10"])
    outcome = Trainer(recipe, load_data(recipe), Path("my-run")).run()

    potential = mlip_md.load("my-run")
    graphs, _ = read_graphs("test.xyz", potential)
    errors = evaluate(potential, graphs).overall

Importing this package loads none of what it offers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlip_md.trainer.data import load_data as load_data
    from mlip_md.trainer.evaluation import Evaluation as Evaluation
    from mlip_md.trainer.evaluation import evaluate as evaluate
    from mlip_md.trainer.evaluation import read_graphs as read_graphs
    from mlip_md.trainer.finetune import adopt_network as adopt_network
    from mlip_md.trainer.recipe import Recipe as Recipe
    from mlip_md.trainer.recipe import load_recipe as load_recipe
    from mlip_md.trainer.train import Trainer as Trainer

_PLACES = {
    "Evaluation": "evaluation",
    "Recipe": "recipe",
    "Trainer": "train",
    "adopt_network": "finetune",
    "evaluate": "evaluation",
    "load_data": "data",
    "load_recipe": "recipe",
    "read_graphs": "evaluation",
}
__all__ = [*_PLACES]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
