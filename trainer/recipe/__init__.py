"""Recipes: the schema of a training run and how YAML becomes one."""

from mlip_md.trainer.recipe.compare import find_differences as find_differences
from mlip_md.trainer.recipe.messages import Origins as Origins
from mlip_md.trainer.recipe.reading import RECIPES as RECIPES
from mlip_md.trainer.recipe.reading import dump_resolved as dump_resolved
from mlip_md.trainer.recipe.reading import load_recipe as load_recipe
from mlip_md.trainer.recipe.reading import print_recipe as print_recipe
from mlip_md.trainer.recipe.rows import describe_rows as describe_rows
from mlip_md.trainer.recipe.schema import CheckpointConfig as CheckpointConfig
from mlip_md.trainer.recipe.schema import CurationConfig as CurationConfig
from mlip_md.trainer.recipe.schema import DataConfig as DataConfig
from mlip_md.trainer.recipe.schema import FaultConfig as FaultConfig
from mlip_md.trainer.recipe.schema import LogConfig as LogConfig
from mlip_md.trainer.recipe.schema import LossConfig as LossConfig
from mlip_md.trainer.recipe.schema import OptimizerConfig as OptimizerConfig
from mlip_md.trainer.recipe.schema import Recipe as Recipe
from mlip_md.trainer.recipe.schema import SplitConfig as SplitConfig
from mlip_md.trainer.recipe.schema import StartConfig as StartConfig
from mlip_md.trainer.recipe.schema import TrainConfig as TrainConfig
from mlip_md.trainer.recipe.schema import WeightStep as WeightStep
