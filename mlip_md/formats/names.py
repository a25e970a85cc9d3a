"""What model files end in and are called; nothing heavy, so that help texts come at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class FormatName(NamedTuple):
    """How a kind of model file is named.

    Attributes:
        ending: of its files' names, with the dot.
        what: an article and what it is called, for help and messages.
    """

    ending: str
    what: str


NAMES: Mapping[str, FormatName] = {
    "mlip-md": FormatName(".safetensors", "a .safetensors file"),
    "instadeep": FormatName(".zip", "an InstaDeep .zip"),
    "mace-torch": FormatName(".model", "a mace-torch .model"),
}
"""By the name that ``mlip-md convert --to`` knows, as far as they are written."""

READ_ONLY = ("mace-torch",)

MODEL_HELP = "Bundled name, {} or run folder.".format(
    ", ".join(name.what.split(" ", 1)[1] for name in NAMES.values())
)
"""What an option or argument that names a model takes."""

HEAD_HELP = "Which head of a mace-torch model that has several."
"""What an option that names a head takes."""

FORMAT_HELP = (
    " or ".join(
        f"{name} ({known.ending})" for name, known in NAMES.items() if name not in READ_ONLY
    )
    + "."
)
"""What an option that names a format takes."""
