"""The potentials that come with the package: ``<name>.safetensors`` and its card ``<name>.md``."""

from __future__ import annotations

from pathlib import Path

from mlip_md.errors import ModelFileError

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of the bundled potentials, sorted."""
    return sorted(file.stem for file in _FOLDER.glob("*.safetensors"))


def path(name: str) -> Path:
    """Path of a bundled potential's model file.

    Raises:
        ModelFileError: if there is no bundled potential of that name; lists those there are.
    """
    if name not in names():
        raise ModelFileError(
            f"there is no bundled potential {name!r}; bundled are: {', '.join(names()) or 'none'}"
        )
    return _FOLDER / f"{name}.safetensors"


def card(name: str) -> str | None:
    """Markdown text of a bundled potential's model card; None where there is none.

    Raises:
        ModelFileError: if there is no bundled potential of that name.
    """
    file = path(name).with_suffix(".md")
    return file.read_text(encoding="utf-8") if file.is_file() else None
