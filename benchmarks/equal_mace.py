"""A MACE of mace-torch with random weights, of the same architecture as ours, for races.

    python benchmarks/equal_mace.py FILE          # in an environment with mace-torch

Two layers, l_max 3, correlation 3, 128 channels, hidden 0e+1o, cutoff 5 Å, 15 elements.
"""

import sys

import numpy as np
import torch
from e3nn import o3
from mace import modules

ELEMENTS = (1, 3, 5, 6, 7, 8, 9, 11, 14, 15, 16, 17, 19, 35, 53)


def make() -> torch.nn.Module:
    """The network, float32."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    return modules.ScaleShiftMACE(
        r_max=5.0,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=modules.RealAgnosticResidualInteractionBlock,
        interaction_cls_first=modules.RealAgnosticInteractionBlock,
        num_interactions=2,
        num_elements=len(ELEMENTS),
        hidden_irreps=o3.Irreps("128x0e + 128x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        atomic_energies=np.zeros(len(ELEMENTS)),
        avg_num_neighbors=50.0,
        atomic_numbers=list(ELEMENTS),
        correlation=3,
        radial_MLP=[64, 64, 64],
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )


if __name__ == "__main__":
    torch.save(make(), sys.argv[1])
