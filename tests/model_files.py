"""Tiny potentials, zips and refusals for the tests of model files."""

import contextlib
import dataclasses
import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest

from mlip_md.errors import ModelFileError
from mlip_md.formats.soundness import expected_shapes, unflatten
from mlip_md.networks.config import MACEConfig, NequIPConfig, TorchMACEConfig
from mlip_md.potential import Potential

CONFIGS = {
    "mace": MACEConfig(num_channels=4, l_max=1, node_symmetry=1, readout_irreps=("4x0e", "0e")),
    "nequip": NequIPConfig(
        num_layers=2, node_irreps="4x0e + 4x1o", l_max=1, radial_net_n_hidden=8, num_bessel=4
    ),
    "mace-torch": TorchMACEConfig(
        num_channels=4, l_max=1, first_interaction="RealAgnosticInteractionBlock",
        radial_widths=(8,), readout_width=4,
    ),
}  # fmt: skip


def make_potential(architecture: str, **hyperparameters: Any) -> Potential:
    """A tiny potential whose weights are random but of the network's shapes."""
    shell = Potential(
        config=dataclasses.replace(CONFIGS[architecture], **hyperparameters),
        params={},
        elements=(1, 6, 8),
        atomic_energies=np.array([-13.587222780835477, -1029.4889999142, 0.1 + 0.2]),
        cutoff=4.1,
        avg_num_neighbors=7.3,
        avg_r_min=0.97,
        scaling_mean=0.25,
        scaling_stdev=1.75,
        info={"name": "tiny", "note": 'Å, "quotes", \\ and µ', "data": {"structures": 12}},
    )
    rng = np.random.default_rng(0)
    shapes = expected_shapes(shell)
    leaves = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    backwards = dict(reversed(leaves.items()))  # the order of a dict must not matter
    return dataclasses.replace(shell, params=unflatten(backwards))


def zipped(members: Mapping[str, bytes | str], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A zip of members by name."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    """Expect a ModelFileError whose text, without the file's path, matches a pattern."""
    with pytest.raises(ModelFileError) as caught:
        yield
    text = re.sub(r"\S*pytest-of-\S*", "", str(caught.value))
    assert re.search(message, text), text
