"""The version of the package: here and, for builds, in ``pyproject.toml``; a test compares."""

__version__ = "0.2.0.dev0"
