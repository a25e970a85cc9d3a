"""Rows that a training of some length never comes to are told, each in a sentence."""

import pytest

from mlip_md.errors import ConfigError
from mlip_md.trainer.lengths import find_unreached
from mlip_md.trainer.recipe import Recipe, load_recipe

LONG = {"epochs": 20, "ema_decay": 0.9}
FALLING = {"init_learning_rate": 0.001, "final_learning_rate": 0.0001, "warmup_steps": 10}
FLIP = {"weight": [{"from_epoch": 1, "value": 1.0}, {"from_epoch": 11, "value": 2.0}]}


def unreached(steps=10, **sections):
    train = {**LONG, **sections.pop("train", {})}
    return find_unreached(Recipe.model_validate({"train": train, **sections}), steps)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"loss": {"energy": FLIP}, "train": {"epochs": 10}},
         "loss.energy.weight: 2 from epoch 11 on is never reached; train.epochs is 10"),
        ({"optimizer": {**FALLING, "warmup_steps": 201}},
         "optimizer: the warm-up takes 201 steps, the whole training has 20 epochs of 10 steps: "
         "the learning rate rises to 0.00996, never to its peak; shorten the warm-up"),
        ({"optimizer": {**FALLING, "transition_steps": 250}},
         "optimizer: after 20 epochs of 10 steps the learning rate is 0.00248, not "
         "final_learning_rate: 0.0001; transition_steps: to the end brings it there"),
        ({"train": {"patience": 10}, "loss": {"energy": FLIP}},
         "train.patience: 10 never ends this training early; its last stage of loss weights has 9 "
         "epochs after its first"),
        ({"optimizer": {"schedule": "plateau", "plateau_epochs": 20}},
         "optimizer.plateau_epochs: 20 never lowers the learning rate in 20 epochs"),
        ({"optimizer": {"num_gradient_accumulation_steps": 25}},
         "train.ema_decay: 0.9 averages the weights of some 10 updates, and there are 8: early "
         "weights count to the end; lower it"),
    ],
)  # fmt: skip
def test_each_is_told(sections, message):
    assert unreached(**sections) == [message]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"loss": {"energy": FLIP}, "train": {"epochs": 11}},
        {"optimizer": {"warmup_steps": 4000}},  # all rates are the same
        {"optimizer": {**FALLING, "transition_steps": 190}},
        {"optimizer": {**FALLING, "transition_steps": 205}},  # an estimate
        {"optimizer": {**FALLING, "transition_steps": "to the end"}},
        {"optimizer": {**FALLING, "transition_steps": 300, "schedule": "plateau"}},
        {"train": {"patience": 9}, "loss": {"energy": FLIP}},
        {"optimizer": {"schedule": "plateau", "plateau_epochs": 19}},
        {"train": {"ema_decay": 0.0}, "optimizer": {"num_gradient_accumulation_steps": 200}},
    ],
)
def test_what_is_reached_is_not(sections):
    assert unreached(**sections) == []


def test_a_training_without_a_single_update_is_refused():
    with pytest.raises(ConfigError, match=r"201 is more than the whole training has \(20 e"):
        unreached(optimizer={"num_gradient_accumulation_steps": 201})


@pytest.mark.parametrize(
    ("name", "steps"), [("mace-spice2", 25000), ("nequip-spice2", 100000), ("organics-gfn2", 2000)]
)
def test_shipped_recipes_reach_all_of_theirs(name, steps):
    assert find_unreached(load_recipe(name)[0], steps) == []
