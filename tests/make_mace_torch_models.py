"""Make the random mace-torch models and their results in ``tests/data/mace_torch``.

Not run by the tests. In an environment of its own:

    pip install torch==2.13.0 mace-torch==0.3.16 cuequivariance cuequivariance-torch
    TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 python tests/make_mace_torch_models.py [NAME ...]

Weights have eight bits, so that the files stay small, and are scaled until energies and forces are
large; E0 are no part of the energies. What mace-torch computes is in float64.
"""

import copy
import io
import json
import lzma
import sys
from pathlib import Path

import ase.io
import numpy as np
import torch
from e3nn import o3, set_optimization_defaults
from mace import data, modules
from mace.calculators import MACECalculator
from mace.cli import convert_e3nn_cueq
from mace.tools import AtomicNumberTable, torch_geometric
from mace.tools.scripts_utils import extract_config_mace_model

FOLDER = Path(__file__).parent / "data" / "mace_torch"
SPECIES = [1, 6, 8]
PLAIN, RESIDUAL = "RealAgnosticInteractionBlock", "RealAgnosticResidualInteractionBlock"
DENSITY = "RealAgnosticDensityInteractionBlock"
DENSITY_RESIDUAL = "RealAgnosticDensityResidualInteractionBlock"

DEFAULTS = {
    "first": RESIDUAL,
    "later": RESIDUAL,
    "layers": 2,
    "hidden": "4x0e + 4x1o",
    "max_ell": 1,
    "correlation": 2,
    "num_bessel": 5,
    "p": 6,
    "radial_MLP": [8, 8],
    "gate": "silu",
    "heads": ["Default"],
    "scale_shift": True,
    "use_reduced_cg": False,
    "dtype": "float64",
}
MP = {"pair_repulsion": True, "distance_transform": "Agnesi"}
VARIANTS = {
    "one-plain": {"first": PLAIN, "layers": 1, "hidden": "4x0e", "correlation": 1},
    "one-residual": {"layers": 1, "correlation": 3},
    "plain-then-residual": {"first": PLAIN, "max_ell": 2, "correlation": 3, "p": 5},
    "density-agnesi-zbl": {
        "first": DENSITY,
        "later": DENSITY_RESIDUAL,
        "correlation": 3,
        "hidden": "4x0e",
        **MP,
    },
    "off23": {"first": PLAIN, "correlation": 3, "p": 5},
    "mp-0b3": {"first": DENSITY, "later": DENSITY_RESIDUAL, "hidden": "4x0e", **MP},
    "two-heads": {"first": PLAIN, "heads": ["mp", "own"], "hidden": "4x0e"},
    "soft-zbl": {"distance_transform": "Soft", "pair_repulsion": True, "hidden": "4x0e"},
    "gaussian-plain": {"first": PLAIN, "later": PLAIN, "radial_type": "gaussian"},
    "density-residual": {
        "first": DENSITY_RESIDUAL,
        "later": DENSITY_RESIDUAL,
        "apply_cutoff": False,
        "hidden": "4x0e",
    },
    "density-plain": {"first": DENSITY, "later": DENSITY, "layers": 1, "scale_shift": False},
    "tanh": {
        "gate": "tanh",
        "radial_MLP": [12, 6, 4],
        "hidden": "4x0e",
    },
    "single-precision": {"dtype": "float32", "layers": 1, **MP},
    "three-layers": {
        "layers": 3,
        "first": PLAIN,
        "max_ell": 2,
        "hidden": "3x0e + 3x1o + 3x2e",
    },
    "agnostic-last": {
        "use_agnostic_product": True,
        "use_last_readout_only": True,
        "hidden": "4x0e",
    },
    "no-scale-shift": {"scale_shift": False, "pair_repulsion": True, "gate": None, "p": 8},
    "reduced": {"use_reduced_cg": True, "correlation": 3, "hidden": "4x0e", "max_ell": 2},
    "degree-three": {"max_ell": 3, "hidden": "2x0e + 2x1o + 2x2e + 2x3o", "correlation": 1},
    "order-four": {"first": PLAIN, "correlation": 4, "hidden": "4x0e", "layers": 1},
    "agnesi": {"distance_transform": "Agnesi", "apply_cutoff": False, "correlation": 1},
    "zbl-plain": {"pair_repulsion": True, "layers": 1, "first": PLAIN, "num_bessel": 10},
    "everything": {
        "layers": 3,
        "first": DENSITY,
        "later": DENSITY_RESIDUAL,
        "heads": ["pt_head", "a", "b"],
        **MP,
    },
    "cueq": {"first": PLAIN, "max_ell": 2, "correlation": 3, "cueq": "ir_mul"},
    "cueq-reduced": {
        "first": DENSITY,
        "later": DENSITY_RESIDUAL,
        "correlation": 3,
        "heads": ["mp", "own"],
        "use_reduced_cg": True,
        "cueq": "mul_ir",
    },
}
CALCULATED = [("two-heads", "own"), ("two-heads", "mp"), ("mp-0b3", "Default")]
"""Models and heads that mace-torch's calculator computes."""

STATE_DICTS = {
    "density-agnesi-zbl": ("state_dict", "config"),
    "two-heads": ("model", "model_config"),
}
"""Models that are saved as a state dict with its configuration too, under these words."""

GATES = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, None: None}


def model_of(variant, seed):
    torch.manual_seed(seed)
    v = {**DEFAULTS, **variant}
    torch.set_default_dtype(getattr(torch, v["dtype"]))
    n_heads, rng = len(v["heads"]), np.random.default_rng(seed)
    rest = "pair_repulsion", "distance_transform", "radial_type", "apply_cutoff"
    rest += "use_agnostic_product", "use_last_readout_only", "use_reduced_cg", "heads"
    arguments = {
        "r_max": 4.5,
        "num_bessel": v["num_bessel"],
        "num_polynomial_cutoff": v["p"],
        "max_ell": v["max_ell"],
        "interaction_cls": modules.interaction_classes[v["later"]],
        "interaction_cls_first": modules.interaction_classes[v["first"]],
        "num_interactions": v["layers"],
        "num_elements": len(SPECIES),
        "hidden_irreps": o3.Irreps(v["hidden"]),
        "MLP_irreps": o3.Irreps("6x0e"),
        "atomic_energies": np.round(rng.uniform(-9, 0, (n_heads, len(SPECIES))), 3),
        "avg_num_neighbors": 7.25,
        "atomic_numbers": SPECIES,
        "correlation": v["correlation"],
        "gate": GATES[v["gate"]],
        "radial_MLP": v["radial_MLP"],
        **{name: v[name] for name in rest if name in v},
    }
    if not v["scale_shift"]:
        return modules.MACE(**arguments)
    scale, shift = rng.uniform(0.6, 1.9, n_heads), rng.uniform(-0.5, 0.5, n_heads)
    if n_heads == 1:
        scale, shift = scale[0], shift[0]
    return modules.ScaleShiftMACE(**arguments, atomic_inter_scale=scale, atomic_inter_shift=shift)


def evaluated(model, atoms, head):
    """Interaction energy (eV), forces (eV/Å) and stress (eV/Å³) in float64."""
    torch.set_default_dtype(torch.float64)
    config = data.config_from_atoms(atoms, head_name=model.heads[head])
    graph = data.AtomicData.from_config(
        config, z_table=AtomicNumberTable(SPECIES), cutoff=4.5, heads=model.heads
    )
    batch = next(iter(torch_geometric.dataloader.DataLoader([graph], batch_size=1)))
    out = model(batch.to_dict(), compute_stress=True)
    table = np.atleast_2d(model.atomic_energies_fn.atomic_energies.detach().numpy())
    e0 = sum(table[head, SPECIES.index(z)] for z in atoms.numbers)
    stress = out["stress"][0].detach().numpy()
    return out["energy"].item() - e0, out["forces"].detach().numpy(), stress


def results_of(model):
    structures = ase.io.read(FOLDER / "structures.extxyz", ":")
    results = []
    for head, name in enumerate(model.heads):
        for atoms in structures:
            energy, forces, stress = evaluated(model, atoms, head)
            stress = stress.tolist() if atoms.pbc.all() else None
            result = {"head": name, "energy": energy, "forces": forces.tolist(), "stress": stress}
            results.append(result)
    return results


def is_large(results):
    return all(
        abs(r["energy"]) >= 0.1 * len(r["forces"]) and np.abs(r["forces"]).max() >= 0.5
        for r in results
    )


def make(name):
    model = model_of(VARIANTS[name], list(VARIANTS).index(name))
    with torch.no_grad():
        for weights in model.parameters():
            weights.copy_(weights.bfloat16().to(weights.dtype))
    precise = copy.deepcopy(model).double()
    factor, results = 1.0, results_of(precise)
    while not is_large(results):
        factor *= 4.0
        scale_readouts(precise, 4.0)
        results = results_of(precise)
        assert factor < 1e6, name
    scale_readouts(model, factor)
    if layout := VARIANTS[name].get("cueq"):
        model = convert_e3nn_cueq.run(model, layout=layout)
        results = results_of(model)
    content = io.BytesIO()
    torch.save(model, content)
    (FOLDER / f"{name}.model.xz").write_bytes(lzma.compress(content.getvalue(), preset=9))
    text = json.dumps({"results": results}).replace('{"head"', '\n{"head"')
    (FOLDER / f"{name}.json").write_text(text + "\n")
    print(name, max(abs(r["energy"]) for r in results), flush=True)


def scale_readouts(model, factor):
    with torch.no_grad():
        for readout in model.readouts:
            last = readout.linear_2 if hasattr(readout, "linear_2") else readout.linear
            last.weight.mul_(factor)


def saved_model(name):
    content = lzma.decompress((FOLDER / f"{name}.model.xz").read_bytes())
    return torch.load(io.BytesIO(content), weights_only=False)


def make_state_dicts():
    for name, (state, config) in STATE_DICTS.items():
        model, content = saved_model(name), io.BytesIO()
        torch.save({state: model.state_dict(), config: extract_config_mace_model(model)}, content)
        (FOLDER / f"{name}.state.xz").write_bytes(lzma.compress(content.getvalue(), preset=9))


def make_calculator_results():
    """What the ASE calculator says of a molecule and of a crystal in OpenMM's form, in float64."""
    frames = ase.io.read(FOLDER / "calculator.extxyz", ":")
    results = {}
    for name, head in CALCULATED:
        model = saved_model(name)
        calculator = MACECalculator(models=model, device="cpu", default_dtype="float64", head=head)
        rows = results[f"{name} {head}"] = []
        for atoms in frames:
            atoms.calc = calculator
            forces = atoms.get_forces().tolist()
            rows.append({"energy": float(atoms.get_potential_energy()), "forces": forces})
    text = json.dumps(results).replace('{"energy"', '\n{"energy"')
    (FOLDER / "calculator.json").write_text(text + "\n")


if __name__ == "__main__":
    set_optimization_defaults(jit_script_fx=False)  # TorchScript takes minutes
    for name in sys.argv[1:] or VARIANTS:
        make(name)
    make_state_dicts()
    make_calculator_results()
