"""Recipes: the schema of a training run and how YAML becomes one."""
