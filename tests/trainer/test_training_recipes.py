"""Recipes: the cards row by row, and errors that name file, line, column and the nearest key."""

import json
import re
import typing
from pathlib import Path

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from mlip_md.cli import app
from mlip_md.errors import ConfigError
from mlip_md.networks import NequIPConfig
from mlip_md.trainer.recipe import (
    RECIPES,
    CheckpointConfig,
    CurationConfig,
    DataConfig,
    FaultConfig,
    LogConfig,
    LossConfig,
    OptimizerConfig,
    Recipe,
    SplitConfig,
    StartConfig,
    TrainConfig,
    describe_rows,
    dump_resolved,
    load_recipe,
)

SHIPPED = ("mace-spice2", "nequip-spice2", "organics-gfn2")

RECIPE = """\
name: test
model:
  kind: mace
  num_channels: 16
optimizer:
  init_learning_rate: 1e-3
train:
  epochs: 7
"""


@pytest.fixture
def write(tmp_path):
    """Write a recipe and give its path."""

    def write(text):
        path = tmp_path / "train.yaml"
        path.write_text(text)
        return str(path)

    return write


def card_rows(path):
    """Name and value of every row of a card's tables: three lines each, closed by bars."""
    rows = re.findall(
        r"^([a-z_]+) \|\n(.+) \|\n.+ \|$", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    return dict(rows)


@pytest.mark.parametrize(("name", "card"), [("mace-spice2", "mace"), ("nequip-spice2", "nequip")])
def test_every_row_of_the_cards_is_in_its_recipe(reference_data, name, card):
    path = reference_data / "reference" / "cards" / f"{card}.txt"
    if not path.exists():
        pytest.skip("the cards are not there")
    rows = card_rows(path)
    assert len(rows) == {"mace": 26, "nequip": 23}[card]
    tree = YAML(typ="safe").load((RECIPES / f"{card}_spice2.yaml").read_text(encoding="utf-8"))
    given = {key: value for section in tree.values() if isinstance(section, dict)
             for key, value in section.items()}  # fmt: skip
    for key, value in rows.items():
        expected = YAML(typ="safe").load({"None": "null"}.get(value, value))
        assert key in given, key
        assert given[key] == expected, key
    recipe = load_recipe(name)[0]
    assert (recipe.train.epochs, recipe.train.ema_decay) == (220, 0.99)
    assert recipe.loss.kind == {"mace": "mse", "nequip": "huber"}[card]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load_and_their_resolved_form_is_the_same(name, write):
    recipe, origins = load_recipe(name)
    assert recipe.name == name
    text = dump_resolved(recipe, origins)
    assert load_recipe(write(text))[0].plain() == recipe.plain()
    assert re.search(rf"epochs: \d+ +# {name.replace('-', '_')}\.yaml:\d+", text)
    assert re.search(r"keep_latest: 2 +# default", text)


def test_a_typo_is_shown_with_its_place_and_the_key_that_was_meant(write):
    path = write("optimizer:\n  kind: amsgrad\n  lrr: 0.01\n")
    expected = "train.yaml:3:3: optimizer.lrr: unknown key; did you mean init_learning_rate?"
    with pytest.raises(ConfigError, match=f"^{re.escape(expected)}$"):
        load_recipe(path)


SECTIONS = {
    "data": DataConfig, "optimizer": OptimizerConfig, "train": TrainConfig, "loss": LossConfig,
    "checkpoint": CheckpointConfig, "faults": FaultConfig, "log": LogConfig,
    "data.split": SplitConfig, "data.curate": CurationConfig,
}  # fmt: skip
FIELDS = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]
FIELDS += [("model", key) for key in ("num_channels", "l_max", "correlation", "avg_num_neighbors")]
FIELDS += [("", key) for key in Recipe.model_fields if key != "name"]


@pytest.mark.parametrize(("section", "key"), FIELDS)
def test_every_key_misspelled_is_refused_with_its_name(section, key, write):
    typo = key[:-1] + "q" if len(key) > 3 else key + "q"
    text, column = f"{typo}: 1\n", 1
    for name in reversed(section.split(".") if section else []):
        text = f"{name}:\n" + "".join(f"  {line}\n" for line in text.splitlines())
        column += 2
    if section == "model":
        text = text.replace("model:\n", "model:\n  kind: mace\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(text))
    path = f"{section}.{typo}" if section else typo
    line = 1 + text.splitlines().index("  " * ((column - 1) // 2) + f"{typo}: 1")
    message = f"train.yaml:{line}:{column}: {path}: unknown key; did you mean {key}?"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  epochs: 2.5\n", "train.yaml:2:3: train.epochs: .*integer.*2.5"),
        ("train:\n  epochs: 0\n", "train.yaml:2:3: train.epochs: .*greater than or equal to 1"),
        ("train:\n  epochs: yes\n", "train.yaml:2:3: train.epochs: .*'yes'"),
        ("train:\n  ema_decay: 1.0\n", "train.yaml:2:3: train.ema_decay: .*less than 1"),
        ("optimizer:\n  grad_norm: .nan\n", "train.yaml:2:3: optimizer.grad_norm"),
        ("loss:\n  kind: mae\n", "train.yaml:2:3: loss.kind: .*'mse', 'huber', 'l1' or 'l1-l2'"),
        (
            "loss:\n  forces: {weight: -1.0}\n",
            "train.yaml:2:12: loss.forces.weight.0.value: .*greater than or equal to 0",
        ),
        (
            "loss:\n  energy:\n    weight: [{from_epoch: 0, valu: 1.0}]\n",
            r"3:30: .*did you mean value\?",
        ),
        ("model:\n  kind: schnet\n", "train.yaml:2:3: model.kind: schnet is.*mace, nequip"),
        ("model:\n  kind: mace\n  l_max: -1\n", "train.yaml:3:3: model.l_max: l_max = -1"),
        ("model:\n  num_layers: 1\n", "train.yaml:1:1: model.kind: None"),
        ("data:\n  split: {train: 0.7, validation: 0.1}\n", "train.yaml:2:3: data.split: .*0.8"),
        ("data:\n  curate: {elements: [H, Xx]}\n", "data.curate.elements: .*Xx"),
        ("seed: 1\nseed: 2\n", 'train.yaml:2:1: found duplicate key "seed"'),
        ("model: [1, 2\n", "train.yaml:2:1: "),
        ("- 1\n", "train.yaml: a recipe is a map"),
        ("data:\n  cutoff: 5.0\n  graph_cutoff_angstrom: 6.0\n", "train.yaml:3:3: .*keep one"),
        ("seed: 99999999999999999999\n", "train.yaml:1:1: seed: .*9223372036854775807"),
        ("train:\n  epochs: !foo 3\n", "2:3: train.epochs: the tag !foo means nothing"),
        ("train: !foo {epochs: 3}\n", "1:1: train: the tag !foo means nothing"),
        ("data: {path: 3}\n", r"1:8: data.path: .*string or a valid list \(given: 3\)$"),
        ("data: {path: [a, 3]}\n", r"1:18: data.path.1: .*valid string \(given: 3\)$"),
        ("train: 3\n", r"train.yaml:1:1: train: input should be a valid map of keys \(given: 3\)$"),
        (
            "checkpoint: &x {every_stepz: 5}\nlog: {<<: *x}\n",
            r"1:17: log.every_stepz: unknown key; did you mean every_steps\?$",
        ),
        ("model:\n  kind: mace\n  atomic_energies:\n    Xx: 1.0\n",
         r"4:5: model.atomic_energies.Xx: Xx is neither the symbol of an element nor"),
        ("model: {kind: mace, atomic_energies: {true: 1.0}}\n", "1:39: .*True is neither"),
        ("model: {kind: mace, atomic_energies: {119: 1.0}}\n", "1:39: .*119 is neither"),
        ("model: {kind: mace, atomic_energies: {H: 1.0, 1: 2.0}}\n", "1:47: .*same element as H"),
        ("model: {kind: mace, atomic_energies: {H: x}}\n", "1:21: model.atomic_energies: "),
    ],
)  # fmt: skip
def test_bad_values_are_refused_with_their_place(text, message, write):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(write(text))
    lines = str(caught.value).splitlines()
    assert all(line.startswith("train.yaml") for line in lines)
    assert len(lines) == (2 if "<<" in text else 1)  # a merged mistake stands in two sections


CONTRADICTIONS = [
    ("optimizer", "{peak_learning_rate: 0.001, final_learning_rate: 0.0001}",
     "init_learning_rate: 0.01 is above peak_learning_rate: 0.001; peak_learning_rate is the "
     "highest of the three: lower the first, or set warmup_steps: 0"),
    ("optimizer", "{peak_learning_rate: 0.001, warmup_steps: 0}",
     "final_learning_rate: 0.01 is above peak_learning_rate: 0.001; peak_learning_rate is the "
     "highest of the three: lower the first"),
    ("optimizer", "{schedule: exponential, final_learning_rate: 0.0}",
     "an exponential schedule never reaches final_learning_rate: 0"),
    ("loss", "{energy: {weight: 0.0}, forces: {weight: 0.0}}",
     "energy, forces and stress all weigh 0 from epoch 1 on, and nothing would be trained; give one"
     " of them a weight"),
    ("loss", "{energy: {weight: [{from_epoch: 1, value: 1.0}, {from_epoch: 7, value: 0.0}]},"
     " forces: {weight: [{from_epoch: 0, value: 1.0}, {from_epoch: 5, value: 0.0}]}}",
     "energy, forces and stress all weigh 0 from epoch 7 on, and nothing would be trained; give one"
     " of them a weight"),
    ("start", "{potential: organics-gfn2, replay_weight: 0.5}",
     "replay_weight: 0.5 weighs nothing without replay; name the second data set, or leave the"
     " weight out"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "rows", "message"), CONTRADICTIONS)
def test_rows_that_contradict_each_other_are_refused_in_a_sentence(section, rows, message, write):
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(f"{section}: {rows}\n"))
    assert str(caught.value) == f"train.yaml:1:1: {section}: {message}"


@pytest.mark.parametrize(
    "text",
    [
        "optimizer: {init_learning_rate: 0.02, warmup_steps: 0}\n",  # no warm-up, no first rate
        "optimizer: {init_learning_rate: 0.02, warmup_epochs: 0.0}\n",
        "loss: {energy: {weight: 0.0}}\n",
        "loss: {energy: {weight: 0.0}, forces: {weight: 0.0}, stress: {weight: 1.0}}\n",
        "start: {potential: organics-gfn2, replay: a.xyz, replay_weight: 0.0}\n",
        "optimizer: {grad_norm: .inf}\ncheckpoint: {every_minutes: .inf}\n",  # never
    ],
)
def test_rows_that_only_look_so_are_not(text, write):
    load_recipe(write(text))


NUMBERS = [
    (section, key)
    for section, model in {**SECTIONS, "start": StartConfig}.items()
    for key, field in model.model_fields.items()
    if float in (field.annotation, *typing.get_args(field.annotation))
]


@pytest.mark.parametrize(("section", "key"), NUMBERS)
@pytest.mark.parametrize("value", [".nan", "-1.0", "-.inf"])
def test_no_number_is_negative_or_none(section, key, value, write):
    text = f"{key}: {value}\n"
    for name in reversed(section.split(".")):
        text = f"{name}:\n" + "".join(f"  {line}\n" for line in text.splitlines())
    with pytest.raises(ConfigError, match=rf"{section}\.{key}: "):
        load_recipe(write(text))


@pytest.mark.parametrize(
    "row", ["loss.delta", "train.select_energy_weight", "train.select_stress_weight",
            "optimizer.peak_learning_rate", "loss.forces.weight"],
)  # fmt: skip
def test_what_would_give_nan_is_finite(row, write):
    with pytest.raises(ConfigError, match=rf"^--set {row}.*finite"):
        load_recipe(write(RECIPE), [f"{row}=.inf"])


def test_a_recipe_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "train.yaml"
    path.write_bytes("name: x\ndescription: café\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^train\.yaml:2: not UTF-8 text"):
        load_recipe(str(path))


def test_sections_can_be_merged(write):
    recipe, origins = load_recipe(
        write("checkpoint: &every {every_steps: 7}\nlog:\n  <<: *every\n  plots: false\n")
    )
    assert (recipe.checkpoint.every_steps, recipe.log.every_steps) == (7, 7)
    assert re.search(r"every_steps: 7 +# train\.yaml:1\n  plots", dump_resolved(recipe, origins))


@pytest.mark.parametrize("kind", ["mace", "nequip"])
def test_atomic_energies_are_given_by_symbol_or_number(kind, write):
    energies = "{H: -13.6, 6: -1030.5, '8': -2043.9, No: 1}"
    text = f"model:\n  kind: {kind}\n  atomic_energies: {energies}\n"
    recipe, origins = load_recipe(write(text))
    assert recipe.network.atomic_energies == {1: -13.6, 6: -1030.5, 8: -2043.9, 102: 1.0}
    plain = recipe.plain()
    assert plain["model"]["atomic_energies"] == {"H": -13.6, "C": -1030.5, "O": -2043.9, "No": 1.0}
    assert json.loads(json.dumps(plain)) == plain
    again = load_recipe(write(dump_resolved(recipe, origins)))[0]
    assert again.network == recipe.network
    assert again.plain() == plain


def test_values_are_read_as_yaml_1_2(write):
    recipe, _ = load_recipe(write(RECIPE + "description: No\n"))
    assert recipe.optimizer.init_learning_rate == 1e-3
    assert recipe.description == "No"


def test_spellings_of_the_cards_are_accepted(write):
    text = "model:\n  kind: mace\n  avg_um_neighbors: 14.5\ndata:\n  graph_cutoff_angstrom: 6.0\n"
    recipe, _ = load_recipe(write(text))
    assert recipe.network.avg_num_neighbors == 14.5
    assert recipe.data.cutoff == 6.0


def test_values_can_be_overridden(write):
    settings = [
        "train.epochs=3",
        "model.kind=nequip",
        "model.num_layers=2",
        "loss.energy.weight=7.0",
    ]
    with pytest.raises(ConfigError, match=r"train\.yaml:4:3: model\.num_channels: unknown key"):
        load_recipe(write(RECIPE), settings)
    recipe, origins = load_recipe(write(RECIPE.replace("  num_channels: 16\n", "")), settings)
    assert recipe.train.epochs == 3
    assert recipe.network == NequIPConfig(num_layers=2)
    assert [(step.from_epoch, step.value) for step in recipe.loss.energy.weight] == [(0, 7.0)]
    assert re.search(r"epochs: 3 +# --set", dump_resolved(recipe, origins))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("train.epoch=3", "^--set train.epoch: unknown key; did you mean epochs\\?$"),
        ("train.epochs=x", "^--set train.epochs: .*'x'"),
        ("train.epochs", "section.key=value"),
        ("name.first=x", "name holds no keys"),
        ("seed=99999999999999999999", "^--set seed: .*9223372036854775807"),
        ("train.epochs=[1", r"^--set train.epochs=\[1: the value is no YAML \(expected .*\)$"),
        ("train.epochs=!foo 1", "^--set train.epochs=!foo 1: the value is no YAML .*"),
        ("train.epochs=2020-99-99", "the value is no YAML"),
        ("model.atomic_energies={Q: 1.0}", "^--set model.atomic_energies.Q: Q is neither"),
    ],
)
def test_bad_overrides_are_refused(setting, message, write):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(write(RECIPE), [setting])
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_the_shipped_ones():
    with pytest.raises(ConfigError, match="mace-spice2, nequip-spice2, organics-gfn2"):
        load_recipe("mace-spice3")


def test_the_page_of_rows_is_what_the_schema_says():
    """Write it again by ``mlip-md check --rows > docs/recipes.md``."""
    page = Path(__file__).parents[2] / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == describe_rows()
    empty = [line for line in describe_rows().splitlines() if line.endswith("|  |")]
    assert empty == []
    result = CliRunner().invoke(app, ["check", "--rows"])
    assert result.output == describe_rows()


def test_a_check_without_a_recipe_says_what_it_wants():
    result = CliRunner().invoke(app, ["check"])
    assert "name a recipe" in str(result.exception or result.output)


def test_validation_sets_are_named_in_a_map(write, tmp_path):
    (tmp_path / "a.xyz").write_text("")
    recipe = load_recipe(write("data:\n  validation: {one: a.xyz, two: [a.xyz, b.xyz]}\n"))[0]
    beside = str(tmp_path / "a.xyz")
    assert recipe.data.validation == {"one": beside, "two": [beside, "b.xyz"]}
    chosen = load_recipe(write("data: {validation: {}}\n"), ["data.validation.mine=a.xyz"])[0]
    assert chosen.data.validation == {"mine": "a.xyz"}
    for text in ("{'a b': a.xyz}", "{'a,b': a.xyz}", "{a: 3}", "3"):
        with pytest.raises(ConfigError, match=r"train\.yaml:2:3: data\.validation"):
            load_recipe(write(f"data:\n  validation: {text}\n"))
