"""State dicts of mace-torch with a configuration, described as the module they were taken from.

Such a file holds names and tensors, and what ``extract_config_mace_model`` says of the model. Both
together make the records that ``torch.save(model)`` would have left, so that one reader is enough.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mlip_md.errors import ModelFileError
from mlip_md.formats.soundness import require
from mlip_md.formats.torch_zip import Global, Record

_STATES = "state_dict", "model_state_dict", "model"
_CONFIGS = "config", "model_config"
_NEEDED = (
    *("interaction_cls", "interaction_cls_first", "hidden_irreps", "MLP_irreps", "max_ell"),
    *("gate", "avg_num_neighbors", "radial_type", "distance_transform", "heads"),
)
"""What no tensor tells."""

_PARTS = {
    *("node_embedding", "radial_embedding", "pair_repulsion_fn", "atomic_energies_fn"),
    *("interactions", "products", "readouts", "scale_shift"),
}
_KINDS = {
    "cutoff_fn": "PolynomialCutoff",
    "conv_tp_weights": "FullyConnectedNet",
    **{"bessel": "BesselBasis", "gaussian": "GaussianBasis", "chebyshev": "ChebychevBasis"},
    **{"Agnesi": "AgnesiTransform", "Soft": "SoftTransform"},
}
"""Classes by the name of a part, or by the word of a configuration for them."""

_CONSTANTS = {"silu": 1.6791767923989418, "tanh": 1.5937334472592695}
"""1/√<act(x)²> over the million normal x of e3nn for torch, which state dicts do not have."""

_MAX_NAMES, _MAX_DEPTH, _MAX_ELL = 10_000, 10, 20
_HOW = (
    'take the NAME.model that the training left, or save torch.save(model), or {"state_dict": '
    'model.state_dict(), "config": extract_config_mace_model(model)}'
)


def described(saved: dict[Any, Any]) -> tuple[Record, dict[str, Any]]:
    """The module that a state dict and its configuration are of, and the configuration.

    Args:
        saved: what the file holds.

    Raises:
        ModelFileError: if it has no configuration, or a part that the networks have not.
    """
    weights, config = (
        next((saved[word] for word in words if word in saved), None)
        for words in (_STATES, _CONFIGS)
    )
    if not isinstance(weights, dict) or not isinstance(config, dict):
        raise ModelFileError(
            "it holds a dict without a state dict and its config, such as a checkpoint of a "
            f"training: weights without their network; {_HOW}"
        )
    missing = ", ".join(word for word in _NEEDED if word not in config)
    of_others = (
        "extract_config_mace_model gives it of ScaleShiftMACE; save others by torch.save(model)"
    )
    require(not missing, f"its config has no {missing}; {of_others}")
    root = _tree(weights)
    parts = root.state["_modules"]
    unknown = ", ".join(f"{name:.40}" for name in sorted(parts.keys() - _PARTS)[:5])
    require(not unknown, f"its state dict has {unknown}, which ScaleShiftMACE has not")
    root.function = Global(
        "mace.modules.models", "ScaleShiftMACE" if "scale_shift" in parts else "MACE"
    )
    _fill(root, config)
    return root, config


def _tree(weights: dict[Any, Any]) -> Record:
    """Modules in modules, by the names of their tensors."""
    sound = len(weights) <= _MAX_NAMES and all(
        isinstance(name, str) and name.count(".") < _MAX_DEPTH for name in weights
    )
    require(sound, f"its state dict has other names than a model's, or more than {_MAX_NAMES}")
    root = _module("")
    for name, tensor in weights.items():
        *path, leaf = name.split(".")
        _reach(root, path).state["_buffers"][leaf] = tensor
    return root


def _module(name: str) -> Record:
    return Record(
        Global("mace.modules", _KINDS.get(name, "")), (), {"_modules": {}, "_buffers": {}}
    )


def _reach(module: Record, path: Iterable[str], **attributes: Any) -> Record:
    """A module in it, made if it is not there, with attributes."""
    for name in path:
        module = module.state["_modules"].setdefault(name, _module(name))
    module.state |= attributes
    return module


def _modules(module: Record, name: str) -> dict[str, Record]:
    found: dict[str, Record] = _reach(module, [name]).state["_modules"]
    return found


def _fill(root: Record, config: dict[str, Any]) -> None:
    """Give the modules what only the configuration says: classes, irreps, functions."""
    l_max, hidden = config["max_ell"], config["hidden_irreps"]
    require(type(l_max) is int and 0 <= l_max <= _MAX_ELL, f"its max_ell is not 0 to {_MAX_ELL}")
    parity = 1 if config.get("use_so3", False) else -1
    _reach(
        root,
        ["spherical_harmonics"],
        irreps_out=_irreps([(1, l, parity**l) for l in range(l_max + 1)]),
    )
    root.state |= {
        name: config[name] for name in ("heads", "use_last_readout_only") if name in config
    }
    radial = _reach(root, ["radial_embedding"], apply_cutoff=config.get("apply_cutoff", True))
    for key, word in (("bessel_fn", "radial_type"), ("distance_transform", "distance_transform")):
        if key in radial.state["_modules"]:
            stated = config[word] if isinstance(config[word], str) else "unknown"
            kind = _KINDS.get(stated, stated)
            radial.state["_modules"][key].function = Global("mace.modules.radial", kind)
    for name, block in _modules(root, "interactions").items():
        block.function = _class(config, "interaction_cls" + "_first" * (name == "0"))
        block.state["avg_num_neighbors"] = config["avg_num_neighbors"]
        for layer in _modules(block, "conv_tp_weights").values():
            _reach(layer, ["act"], **_normalized(Global("torch.nn.functional", "silu")))
    products = _modules(root, "products")
    for name, product in products.items():
        last = name == str(len(products) - 1)
        _reach(product, ["linear"], irreps_out=_first(hidden) if last else hidden)
        basis = _reach(product, ["symmetric_contractions"])
        whole = "a product basis of cuEquivariance's modules; save the model by torch.save(model)"
        require("contractions" in basis.state["_modules"], f"its state dict has {whole}")
        for part in _modules(basis, "contractions").values():
            part.state["correlation"] = sum(
                word.startswith("U_") for word in part.state["_buffers"]
            )
    _fill_readouts(_modules(root, "readouts"), config)


def _fill_readouts(readouts: dict[str, Record], config: dict[str, Any]) -> None:
    for name, readout in readouts.items():
        kind = Global("mace.modules.blocks", "LinearReadoutBlock")
        if "linear_1" in readout.state["_modules"]:
            kind = Global("mace.modules.blocks", "NonLinearReadoutBlock")
            _reach(readout, ["linear_1"], irreps_out=config["MLP_irreps"])
            _reach(readout, ["non_linearity", "acts"])
            if config["gate"] is not None:
                _reach(readout, ["non_linearity", "acts", "0"], **_normalized(config["gate"]))
        last = name == str(len(readouts) - 1) and "readout_cls" in config
        readout.function = _class(config, "readout_cls") if last else kind


def _normalized(stated: Any) -> dict[str, Any]:
    """Attributes of a nonlinearity; one without a known constant is refused where it is read."""
    function = function_of(stated)
    return {"f": stated, "cst": _CONSTANTS.get(function.name) if function else None}


def function_of(stated: Any) -> Global | None:
    """The function that a record stands for; a built-in one is written as a class and its name."""
    if isinstance(stated, Record) and stated.function.name == "getattr":
        try:
            (module, kind), word = stated.arguments
            return Global(".".join([module, kind]), "" + word)
        except (TypeError, ValueError):
            return None
    return stated if isinstance(stated, Global) else None


def _class(config: dict[str, Any], word: str) -> Global:
    stated = config[word]
    if not isinstance(stated, Global):
        raise ModelFileError(f"its config's {word} is no class")
    return stated


def _irreps(parts: list[tuple[int, int, int]]) -> Record:
    """Irreps as torch.save writes those of e3nn."""
    kind = Global("e3nn.o3._irreps", "Irreps")
    pairs = [(mul, Record(kind, ((degree, parity),))) for mul, degree, parity in parts]
    return Record(kind, (tuple(Record(kind, (pair,)) for pair in pairs),))


def _first(irreps: Any) -> Record:
    """The first of irreps."""
    try:
        return Record(irreps.function, (irreps.arguments[0][:1],))
    except (AttributeError, TypeError, IndexError) as error:
        raise ModelFileError("its config's hidden_irreps are no irreps") from error
