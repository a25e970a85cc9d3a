"""Models that mace-torch 0.3 saved whole (``NAME.model``), or as a state dict with its config.

They are read without torch, and only read. ``torch_zip`` makes records of the modules that a file
describes, ``mace_state`` of those that a state dict is of. Here they become a
``TorchMACEConfig`` and its weights. What the network does not compute is refused by name. Weights
are those of the file but for linear maps that leave every energy as it is:

- our edge vectors point the other way: radial weights of odd harmonics change their sign;
- paths of messages and elements have our order;
- e3nn for torch has other constants of nonlinearities, which go into the weights that follow;
- couplings of the product basis are mapped to ours, from the tensors that the file brings along
  (or the polynomials, where modules of cuEquivariance hold the weights);
- one of several heads is taken.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from e3nn_jax import Irrep

from mlip_md.elements import COVALENT_RADII
from mlip_md.errors import HeadError, ModelFileError
from mlip_md.formats import cue_records, mace_state
from mlip_md.formats.soundness import (
    check_statistics,
    check_weights,
    expected_shapes,
    explaining,
    flatten,
    parse_config,
    read_bytes,
    require,
)
from mlip_md.formats.torch_zip import Global, Record, Tensor, TorchFile, numpy_array
from mlip_md.networks.config import INTERACTIONS
from mlip_md.networks.layers import SECOND_MOMENTS
from mlip_md.networks.mace import message_paths, natural_irreps
from mlip_md.networks.product_basis import monomial_indices, reduced_couplings
from mlip_md.networks.torch_mace import RADIAL_ACTIVATION
from mlip_md.potential import Potential

MAX_FILE_BYTES = 2**30

_SUPPORTED = (
    "mlip-md reads MACE and ScaleShiftMACE of mace-torch 0.3 with the interaction blocks "
    + ", ".join(INTERACTIONS)
)
_CONSTANTS = 1e-6
"""Relative; as far as single precision may take a constant in a file from its value."""

_COUPLINGS = 1e-4
"""Relative; beyond it a file's product basis is none of products of Clebsch-Gordan coefficients."""

_BEYOND = {
    "Polar": "charges that act beyond the cutoff",
    "LES": "charges that act beyond the cutoff",
    "Dipole": "dipoles",
    "NonLinear": "gated messages and a radial network with biases (as MH-1 and OMOL have)",
    "Att": "attention between neighbors",
}
"""Why a class is not computed, by a word in its name."""

_BASES = {"BesselBasis": "bessel", "GaussianBasis": "gaussian"}
_TRANSFORMS = {"AgnesiTransform": "agnesi", "SoftTransform": "soft"}
_GATES = {
    Global("torch.nn.functional", "silu"): "silu",
    Global("torch", "tanh"): "tanh",
    Global("torch._C._VariableFunctionsClass", "tanh"): "tanh",
}


def load_model(path: str | os.PathLike[str], head: str | None = None) -> Potential:
    """Read a model that mace-torch 0.3 saved whole, or as a state dict with its config.

    Args:
        path: the file, as ``torch.save`` writes it.
        head: which of its heads; it may be left out where there is one.

    Returns:
        The potential, with float64 weights.

    Raises:
        HeadError: if it has no such head, or several and none is named.
        ModelFileError: if the file is missing, damaged or foreign, or holds something else than
            ``TorchMACEConfig`` describes.
    """
    path = Path(path)
    with explaining(f"{path}: "):
        file = TorchFile(read_bytes(path, MAX_FILE_BYTES))
        root, stated = file.root, None
        if isinstance(root, dict):
            root, stated = mace_state.described(root)
        model = _Module(file, "", root)
        potential = _potential(model, head, path.stem)
        if stated is not None:
            _check_agreement(model, stated, potential.config)
        check_statistics(potential)
        check_weights(flatten(potential.params), expected_shapes(potential))
    return potential


class _Module:
    """A module of torch, as a file describes it.

    Args:
        file: the file.
        name: its place in the model, for messages.
        record: what the file has there.
    """

    def __init__(self, file: TorchFile, name: str, record: Any) -> None:
        self.file, self.name, self.record = file, name, record
        state: Any = record.state if isinstance(record, Record) else None
        if not isinstance(record, Record) or not isinstance(state, dict):
            raise ModelFileError(f"{name or 'what it holds'} is no saved module. {_SUPPORTED}")
        self.kind: Global = record.function
        self._state: dict[str, Any] = state

    def _part(self, group: str, name: str) -> Any:
        values = self._state.get(group)
        return values.get(name) if isinstance(values, dict) else None

    def child(self, name: str) -> _Module:
        """A module in it."""
        return _Module(self.file, f"{self.name}.{name}".strip("."), self._part("_modules", name))

    def has_child(self, name: str) -> bool:
        """Whether it has such a module."""
        return self._part("_modules", name) is not None

    def children(self, name: str) -> list[_Module]:
        """Modules of a list in it, in order."""
        parts = self.child(name)
        count = len(parts._state.get("_modules") or {})
        return [parts.child(str(i)) for i in range(count)]

    def array(self, name: str, *shape: int) -> np.ndarray:
        """A parameter or buffer in float64, of that shape if one is given."""
        tensor = self._part("_parameters", name)
        tensor = self._part("_buffers", name) if tensor is None else tensor
        where = f"{self.name}.{name}".strip(".")
        if not isinstance(tensor, Tensor):
            raise ModelFileError(f"it has no tensor {where}. {_SUPPORTED}")
        array = self.file.array(tensor).astype(np.float64)
        require(bool(np.isfinite(array).all()), f"{where} has values that are NaN or infinite")
        if shape and array.size != np.prod(shape):
            raise ModelFileError(f"{where} has shape {array.shape}; {shape} is needed")
        return array.reshape(shape) if shape else array

    def has_tensor(self, name: str) -> bool:
        """Whether it has such a parameter or buffer."""
        return any(isinstance(self._part(g, name), Tensor) for g in ("_parameters", "_buffers"))

    def number(self, name: str) -> float:
        """A number that is an attribute or a tensor."""
        value = self._state.get(name)
        if isinstance(value, int | float):
            array = np.array([value], np.float64) if abs(value) < 1e300 else np.array([np.inf])
        elif isinstance(value, Tensor):
            array = self.file.array(value)
        else:
            array = self.array(name)
        single = array.size == 1 and bool(np.isfinite(array).all())
        require(single, f"{self.name}.{name} is no single finite number")
        return float(array.ravel()[0])

    def attribute(self, name: str, default: Any = None) -> Any:
        """A plain attribute; older versions lack some."""
        return self._state.get(name, default)

    def irreps(self, name: str) -> list[tuple[int, int, int]]:
        """Irreps that are an attribute, as (multiplicity, degree, parity)."""
        try:
            if self.of_package(cue_records.PACKAGE):
                return cue_records.irreps(self._state[name])
            pairs = [mul_ir.arguments[0] for mul_ir in self._state[name].arguments[0]]
            found = [(mul, *ir.arguments[0]) for mul, ir in pairs]
            return [(mul, degree, parity) for mul, degree, parity in found]
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise ModelFileError(f"{self.name}.{name} are no irreps. {_SUPPORTED}") from error

    def of_package(self, package: str) -> bool:
        """Whether it is a class of a package."""
        return self.kind.module.split(".")[0] == package


def _potential(model: _Module, head: str | None, name: str) -> Potential:
    kind = model.kind.name
    if not model.of_package("mace") or kind not in ("MACE", "ScaleShiftMACE"):
        named = f"{model.kind.module:.60}.{kind:.60}{_reason(kind)}"
        raise ModelFileError(f"it holds a {named}. {_SUPPORTED}")
    numbers = model.array("atomic_numbers").ravel()
    order = np.argsort(numbers, kind="stable")
    elements = tuple(int(z) for z in numbers[order])
    require(len(elements) > 0, "it has no elements")
    index, heads = _head(model, head)
    config = _config(model, elements)
    energies = model.child("atomic_energies_fn").array("atomic_energies")
    energies = _per_head(energies, len(elements), heads, "E0")[index]
    scale, shift = 1.0, 0.0
    if kind == "ScaleShiftMACE":
        part = model.child("scale_shift")
        scale, shift = (
            float(_per_head(part.array(word), 1, heads, word)[index, 0])
            for word in ("scale", "shift")
        )
    info: dict[str, Any] = {"name": name, "source": "mace-torch", "licence": _licence(model)}
    if len(heads) > 1:
        info |= {"head": heads[index], "heads": heads}
    return Potential(
        config=config,
        params={"params": _Weights(model, config, order, index, len(heads)).tree()},
        elements=elements,
        atomic_energies=energies[order],
        cutoff=model.number("r_max"),
        avg_num_neighbors=_neighbors(model),
        scaling_mean=shift,
        scaling_stdev=scale,
        info=info,
    )


def _check_agreement(model: _Module, stated: dict[str, Any], config: Any) -> None:
    """What tensors give must be what the configuration beside them states."""
    found = {
        "r_max": model.array("r_max"),
        "atomic_numbers": model.array("atomic_numbers"),
        "num_elements": model.array("atomic_numbers").size,
        "num_interactions": config.num_layers,
        "num_bessel": config.num_basis,
        "num_polynomial_cutoff": config.cutoff_exponent,
        "radial_MLP": config.radial_widths,
        "correlation": config.correlation,
        "pair_repulsion": config.pair_repulsion,
        "radial_type": config.radial_basis,
        "distance_transform": config.distance_transform,
        "atomic_energies": model.child("atomic_energies_fn").array("atomic_energies"),
    }
    if model.has_child("scale_shift"):
        for word in ("scale", "shift"):
            found[f"atomic_inter_{word}"] = model.child("scale_shift").array(word)
    differing = [
        word for word in found if word in stated and not _is(model, stated[word], found[word])
    ]
    readout = model.children("readouts")[-1]
    if readout.has_child("linear_1"):
        irreps = readout.child("linear_1").irreps("irreps_out")
        differing += ["MLP_irreps"] * (irreps != [(config.readout_width, 0, 1)])
    listed = ", ".join(differing)
    require(not listed, f"its state dict and its config differ in {listed}; save both of one model")


def _is(model: _Module, stated: Any, found: Any) -> bool:
    """Whether a value of a configuration is what the tensors give."""
    if isinstance(found, str):
        stated = "none" if stated is None else stated
        return isinstance(stated, str) and stated.lower() == found
    try:
        if isinstance(stated, Tensor):
            numbers = model.file.array(stated)
        else:
            flat = stated if isinstance(stated, list | tuple) else [stated]
            plain = all(isinstance(value, int | float) for value in flat)
            numbers = np.array(flat, np.float64) if plain else numpy_array(stated)
    except (TypeError, ValueError, AttributeError, OverflowError):
        return False
    wanted = np.ravel(found)
    return numbers.size == wanted.size and np.allclose(numbers.ravel(), wanted, _CONSTANTS, 0.0)


def _head(model: _Module, head: str | None) -> tuple[int, list[str]]:
    """Index of the head that is wanted, and the names of all."""
    heads = model.attribute("heads", ["Default"])
    if not isinstance(heads, list) or not heads or not all(isinstance(h, str) for h in heads):
        raise ModelFileError("its heads are no list of names")
    listed = ", ".join(f"{name:.40}" for name in heads[:20])
    if head is None and len(heads) > 1:
        named = "head=, on the command line --head, in a recipe start.head"
        raise HeadError(f"it has several heads; name one ({named}): {listed}", heads)
    if head is not None and head not in heads:
        raise HeadError(f"it has no head {head!r:.60}; it has: {listed}", heads)
    return (0 if head is None else heads.index(head)), heads


def _per_head(values: np.ndarray, width: int, heads: Sequence[str], what: str) -> np.ndarray:
    """Values as a row per head, whether a file has one for all of them or one for each."""
    rows = values.size // width
    whole = values.size == rows * width and rows in (1, len(heads))
    require(whole, f"its {what} has shape {values.shape}; {width} for each head are needed")
    return np.broadcast_to(values.reshape(rows, width), (len(heads), width))


def _licence(model: _Module) -> str:
    """What the file says of its licence; mace-torch has no place for it."""
    for word in ("license", "licence"):
        if isinstance(stated := model.attribute(word), str) and stated:
            return stated[:10_000]
    return "not stated in the file: whoever gave it to you knows what you may do with it"


def _neighbors(model: _Module) -> float:
    found = {block.number("avg_num_neighbors") for block in model.children("interactions")}
    require(len(found) == 1, f"avg_num_neighbors differs between its layers: {sorted(found)[:5]}")
    return found.pop()


def _reason(kind: str) -> str:
    """In brackets, what a class has that is not computed; empty for unknown ones."""
    return next((f" ({why})" for word, why in _BEYOND.items() if word in kind), "")


def _refusing(wrong: bool, what: str) -> None:
    """Refuse what the network does not compute."""
    require(not wrong, f"it has {what}, which mlip-md does not compute. {_SUPPORTED}")


def _config(model: _Module, elements: tuple[int, ...]) -> Any:
    """The hyperparameters of a model; everything that they do not describe is refused."""
    blocks, products = model.children("interactions"), model.children("products")
    kinds = [block.kind.name for block in blocks]
    require(bool(blocks) and len(blocks) == len(products), f"it has no layers. {_SUPPORTED}")
    for kind in kinds:
        _refusing(kind not in INTERACTIONS, f"layers of {kind:.60}{_reason(kind)}")
    _refusing(len(set(kinds[1:])) > 1, "later layers of different kinds")
    _refusing(model.has_child("joint_embedding"), "embeddings of charge, spin or other inputs")
    _refuse_layouts(model)
    harmonics = model.child("spherical_harmonics").irreps("irreps_out")
    l_max = len(harmonics) - 1
    natural = [(1, l, (-1) ** l) for l in range(l_max + 1)]
    _refusing(harmonics != natural, "harmonics of even parity (use_so3)")
    num_species = len(elements)
    embedding = model.child("node_embedding").child("linear").array("weight")
    channels = embedding.size // num_species
    require(channels > 0, f"its node_embedding has no weights. {_SUPPORTED}")
    hidden = [product.child("linear").irreps("irreps_out") for product in products]
    symmetry = len(hidden[0]) - 1
    inner = [(channels, l, (-1) ** l) for l in range(symmetry + 1)]
    same = all(irreps == inner for irreps in hidden[:-1]) and hidden[-1] == inner[:1]
    _refusing(not same, "other features than equally many of 0e, 1o, 2e, … (0e in the last layer)")
    bases = [product.child("symmetric_contractions") for product in products]
    parts = [
        part
        for basis in bases
        for part in ([basis] if _is_cue(basis) else basis.children("contractions"))
    ]
    orders = {part.attribute("contraction_degree", part.attribute("correlation")) for part in parts}
    _refusing(len(orders) != 1, "different correlations")
    radial, last = model.child("radial_embedding"), model.children("readouts")[-1:]
    basis, widths = _radial(model, radial)
    fields = {
        "num_layers": len(blocks),
        "num_channels": channels,
        "l_max": l_max,
        "node_symmetry": symmetry,
        "correlation": orders.pop(),
        "first_interaction": kinds[0],
        "interaction": kinds[-1],
        "last_readout_only": bool(model.attribute("use_last_readout_only", False)),
        **basis,
        "radial_widths": widths,
        "pair_repulsion": model.has_child("pair_repulsion_fn"),
        "atomic_energies": None,
    }
    if len(blocks) > 1:
        fields |= _readout(last[0] if last else model, channels, len(model.attribute("heads", [1])))
    if fields["pair_repulsion"]:
        _check_repulsion(model.child("pair_repulsion_fn"), fields["cutoff_exponent"], elements)
    if radial.has_child("distance_transform"):
        _check_radii(radial.child("distance_transform"), elements)
    return parse_config("mace-torch", fields)


def _is_cue(part: _Module) -> bool:
    """Whether it is one of cuEquivariance's modules whose weights are known."""
    return part.of_package(cue_records.PACKAGE) and part.kind.name in cue_records.LAYERS


def _refuse_layouts(model: _Module) -> None:
    """Other packages than e3nn keep weights in an order of their own."""
    for block, product in zip(
        model.children("interactions"), model.children("products"), strict=True
    ):
        parts = [block.child("linear"), block.child("skip_tp"), product.child("linear")]
        parts.append(product.child("symmetric_contractions"))
        for part in parts:
            known = part.of_package("e3nn") or part.of_package("mace") or _is_cue(part)
            package = part.kind.module.split(".")[0]
            _refusing(not known, f"weights in the layout of {package:.40}.{part.kind.name:.40}")
        density = block.has_child("density_fn") == ("Density" in block.kind.name)
        _refusing(not density, f"a {block.kind.name} without or with a density")


def _radial(model: _Module, radial: _Module) -> tuple[dict[str, Any], list[int]]:
    """Hyperparameters of the radial basis, and the hidden widths of the radial network."""
    functions, cutoff = radial.child("bessel_fn"), radial.child("cutoff_fn")
    basis = _BASES.get(functions.kind.name, "")
    named = f"radial functions of {functions.kind.name:.60}"
    if functions.kind.name == "ChebychevBasis":  # torch 2.13 gives none, and no word of it
        named += " (torch has no derivative of them: mace-torch's forces are not of its energies)"
    _refusing(not basis, named)
    kind = cutoff.kind.name
    _refusing(kind != "PolynomialCutoff", f"a cutoff function of {kind:.60}")
    rc = model.number("r_max")
    same = np.isclose(cutoff.number("r_max"), rc, rtol=_CONSTANTS)
    _refusing(not same, "a cutoff function that ends elsewhere than at r_max")
    if basis == "bessel":
        number = functions.array("bessel_weights").size
        values = functions.array("bessel_weights").ravel(), np.pi / rc * np.arange(1, number + 1)
    else:
        number = functions.array("gaussian_weights").size
        values = functions.array("gaussian_weights").ravel(), np.linspace(0, rc, number)
    trained = not np.allclose(*values, rtol=_CONSTANTS, atol=_CONSTANTS * rc)
    _refusing(trained, "radial functions of trained frequencies or centers")
    transform = "none"
    if radial.has_child("distance_transform"):
        part = radial.child("distance_transform")
        transform = _TRANSFORMS.get(part.kind.name, "")
        _refusing(not transform, f"distances transformed by {part.kind.name:.60}")
        constants = {"agnesi": {"a": 1.0805, "q": 0.9183, "p": 4.5791}, "soft": {"alpha": 4.0}}
        for name, value in constants[transform].items():
            trained = not np.isclose(part.number(name), value, rtol=_CONSTANTS)
            _refusing(trained, f"a distance transform of trained {name}")
    networks = [block.child("conv_tp_weights") for block in model.children("interactions")]
    for network in networks:
        kind = network.kind.name
        _refusing(kind != "FullyConnectedNet", f"radial networks of {kind:.60}")
    widths = [[int(w.shape[-1]) for w in _kernels(network)[:-1]] for network in networks]
    _refusing(any(w != widths[0] for w in widths), "radial networks of different widths")
    exponent = cutoff.number("p")
    return {
        "radial_basis": basis,
        "num_basis": number,
        "cutoff_exponent": int(exponent) if exponent == round(exponent) else exponent,
        "cutoff_on_weights": not radial.attribute("apply_cutoff", True),
        "distance_transform": transform,
    }, widths[0]


def _kernels(network: _Module) -> list[np.ndarray]:
    """Weights of the layers of an e3nn FullyConnectedNet."""
    count = 0
    while network.has_child(f"layer{count}"):
        count += 1
    arrays = [network.child(f"layer{i}").array("weight") for i in range(count)]
    sound = bool(arrays) and all(array.ndim == 2 for array in arrays)
    require(sound, f"{network.name} has no layers")
    return arrays


def _readout(readout: _Module, channels: int, heads: int) -> dict[str, Any]:
    """Hyperparameters of the last readout."""
    kind = readout.kind.name
    _refusing(kind != "NonLinearReadoutBlock", f"a {kind:.60} at the end")
    hidden = readout.child("linear_1").irreps("irreps_out")
    _refusing([(l, p) for _, l, p in hidden] != [(0, 1)], "a readout of more than scalars")
    width = readout.child("linear_1").array("weight").size // channels
    return {"readout_width": width // heads, "activation": _gate(readout)[0]}


def _gate(readout: _Module) -> tuple[str, float]:
    """Nonlinearity of a readout, and the factor that e3nn puts before it."""
    acts = readout.child("non_linearity").child("acts")
    if not acts.has_child("0"):
        return "none", 1.0
    return _activation(acts.child("0"))


def _activation(part: _Module) -> tuple[str, float]:
    function = mace_state.function_of(part.attribute("f"))
    name = _GATES.get(function, "") if function else ""
    stated = ".".join(function)[:60] if function else "of an unknown function"
    _refusing(not name, f"the nonlinearity {stated}")
    return name, 1.0 if part.attribute("_is_id", False) else part.number("cst")


def _check_radii(part: _Module, elements: tuple[int, ...]) -> None:
    """Covalent radii in a file must be those that we know."""
    radii = part.array("covalent_radii").ravel()
    known = all(
        z <= len(COVALENT_RADII)
        and z < len(radii)
        and np.isclose(radii[z], COVALENT_RADII[z - 1], rtol=_CONSTANTS)
        for z in elements
    )
    _refusing(not known, "covalent radii that are not those of Cordero et al. (2008)")


def _check_repulsion(part: _Module, exponent: int, elements: tuple[int, ...]) -> None:
    _check_radii(part, elements)
    coefficients = 0.1818, 0.5099, 0.2802, 0.02817
    same = (
        part.number("p") == exponent
        and np.allclose(part.array("c", 4), coefficients, rtol=_CONSTANTS)
        and np.isclose(part.number("a_exp"), 0.3, rtol=_CONSTANTS)
        and np.isclose(part.number("a_prefactor"), 0.4543, rtol=_CONSTANTS)
    )
    _refusing(not same, "a repulsion of trained constants, or with a cutoff of its own")


class _Weights:
    """The weights of a model by our names and in our order.

    Args:
        model: the model.
        config: its hyperparameters.
        order: its species in ours.
        head: index of the head that is taken.
        heads: number of heads.
    """

    def __init__(
        self, model: _Module, config: Any, order: np.ndarray, head: int, heads: int
    ) -> None:
        self.model, self.config, self.order = model, config, order
        self.head, self.heads = head, heads
        self.channels, self.species = config.num_channels, len(order)

    def tree(self) -> dict[str, Any]:
        """All of them."""
        config = self.config
        embedding = self.model.child("node_embedding").child("linear")
        embedding = embedding.array("weight", self.species, self.channels)[self.order]
        tree: dict[str, Any] = {"embedding": {"embeddings": embedding}}
        entering = 1
        for i, (block, product) in enumerate(
            zip(self.model.children("interactions"), self.model.children("products"), strict=True)
        ):
            last = i == config.num_layers - 1
            leaving = 1 if last else config.node_symmetry + 1
            tree[f"layer_{i}"] = self._layer(block, product, entering, leaving)
            entering = leaving
        readouts = self.model.children("readouts")
        layers = (
            range(config.num_layers)[-1:] if config.last_readout_only else range(config.num_layers)
        )
        require(len(readouts) == len(layers), f"it has {len(readouts)} readouts. {_SUPPORTED}")
        for i, readout in zip(layers, readouts, strict=True):
            linear = config.num_layers == 1 or i < config.num_layers - 1
            weights = self._linear_readout(readout) if linear else self._last_readout(readout)
            tree[f"readout_{i}"] = weights
        return tree

    def _layer(
        self, block: _Module, product: _Module, entering: int, leaving: int
    ) -> dict[str, Any]:
        degrees = self.config.l_max + 1
        residual = "Residual" in block.kind.name
        skip = min(entering, leaving) if residual else degrees
        c, s = self.channels, self.species
        by_species = block.child("skip_tp").array("weight", skip, c, s, c)[:, :, self.order]
        up = block.child("linear_up").array("weight", entering, c, c)
        out = product.child("linear").array("weight", leaving, c, c)
        convolution, down = self._messages(block, entering)
        layer = {
            "skip": {
                f"w[{l},0,{l}] {c}x{_natural(l)},{s}x0e,{c}x{_natural(l)}": by_species[l]
                for l in range(skip)
            },
            "linear_up": _linear(list(up)),
            "convolution": {"perceptron": convolution},
            "linear_down": _linear(down),
            "SymmetricContraction": self._contraction(product, leaving),
            "linear_out": _linear(list(out)),
        }
        if block.has_child("density_fn"):
            kernels = _kernels(block.child("density_fn"))
            _refusing(len(kernels) != 1, "a density of several layers")
            layer["density"] = {"perceptron": {"Dense_0": {"kernel": kernels[0]}}}
        return layer

    def _messages(self, block: _Module, entering: int) -> tuple[dict[str, Any], list[np.ndarray]]:
        """The radial network and the linear map of its messages, paths in our order."""
        l_max, c = self.config.l_max, self.channels
        network = block.child("conv_tp_weights")
        kernels = _kernels(network)
        for k in range(1, len(kernels)):
            name, factor = _activation(network.child(f"layer{k - 1}").child("act"))
            _refusing(name != RADIAL_ACTIVATION, f"a radial network with {name}")
            kernels[k] = kernels[k] * (factor * SECOND_MOMENTS[RADIAL_ACTIVATION])
        ours = message_paths(natural_irreps(entering - 1), l_max, natural_irreps(l_max))
        total = sum(map(len, ours.values()))
        last = kernels[-1]
        fits = last.shape[1] == total * c
        require(fits, f"{network.name} has {last.shape[1]} weights; {total * c} are needed")
        rows = block.child("linear").array("weight", total, c, c)
        columns, start, down = [], 0, []
        for paths in ours.values():
            theirs = sorted((ir.l, l) for ir, l, _ in paths)
            places = [start + theirs.index((ir.l, l)) for ir, l, _ in paths]
            for place, (_, l, _) in zip(places, paths, strict=True):
                columns.append((-1) ** l * last[:, place * c : (place + 1) * c])
            down.append(rows[places].reshape(-1, c))
            start += len(paths)
        kernels[-1] = np.concatenate(columns, axis=1)
        return {f"Dense_{k}": {"kernel": kernel} for k, kernel in enumerate(kernels)}, down

    def _contraction(self, product: _Module, leaving: int) -> dict[str, np.ndarray]:
        """Weights of the product basis."""
        highest, factors = self.config.correlation, natural_irreps(self.config.l_max)
        if _is_cue(basis := product.child("symmetric_contractions")):
            return self._cue_contraction(basis, leaving)
        contractions = basis.children("contractions")
        require(len(contractions) == leaving, f"{product.name} has not {leaving} contractions")
        weights = {}
        for l, contraction in enumerate(contractions):
            for order in range(highest, 0, -1):
                if order == highest:
                    found = contraction.array("weights_max")
                else:
                    found = contraction.child("weights").array(str(highest - 1 - order))
                sound = found.ndim == 3 and found.shape[2] == self.channels
                sound = sound and found.shape[0] in (1, self.species)
                require(sound, f"{contraction.name} has weights of shape {found.shape}")
                tensor = contraction.array(f"U_matrix_{order}")
                matrix = _couplings(tensor, factors, order, _natural(l), found.shape[1])
                weights[f"w{order}_{_natural(l)}"] = self._by_species(matrix, found)
        return weights

    def _cue_contraction(self, basis: _Module, leaving: int) -> dict[str, np.ndarray]:
        """The same of cuEquivariance's module: one tensor of weights for all irreps and orders."""
        factors, found = natural_irreps(self.config.l_max), basis.array("weight")
        sound = found.ndim == 3 and found.shape[2] == self.channels
        sound = sound and found.shape[0] in (1, self.species)
        require(sound, f"{basis.name} has weights of shape {found.shape}")
        if basis.has_tensor("projection"):
            projection = basis.array("projection")
            sound = projection.ndim == 2 and len(projection) == found.shape[1]
            require(sound, f"{basis.name} has a projection of shape {projection.shape}")
            found = np.einsum("sac,ab->sbc", found, projection)
        weights = {}
        for order in range(self.config.correlation, 0, -1):
            indices, coefficients = cue_records.paths(basis.record, order)
            ends = [found.shape[1], *[sum(ir.dim for ir in factors)] * order, leaving**2]
            within = bool(((indices >= 0) & (indices < ends)).all())
            require(within, f"{basis.name} has paths between other features than its own")
            for l in range(leaving):
                mine = (indices[:, -1] >= l**2) & (indices[:, -1] < (l + 1) ** 2)
                used, columns = np.unique(indices[mine, 0], return_inverse=True)
                places = np.stack([*indices[mine, 1:-1].T, indices[mine, -1] - l**2, columns])
                theirs = _polynomials(
                    places, coefficients[mine], factors, order, _natural(l), len(used)
                )
                matrix = _solved(theirs, factors, order, _natural(l))
                weights[f"w{order}_{_natural(l)}"] = self._by_species(matrix, found[:, used])
        return weights

    def _by_species(self, matrix: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Weights (species, our paths, channels) of theirs, in our order of species."""
        ours = np.einsum("rk,skc->src", matrix, weights)
        # of use_agnostic_product: the same for every element
        return ours[np.zeros(self.species, int) if len(ours) == 1 else self.order]

    def _linear_readout(self, readout: _Module) -> dict[str, Any]:
        kind = readout.kind.name
        _refusing(
            kind != "LinearReadoutBlock", f"a {kind:.60} where a LinearReadoutBlock should be"
        )
        weight = readout.child("linear").array("weight", self.channels, self.heads)
        return {"Linear_0": _linear([weight[:, self.head : self.head + 1]])}

    def _last_readout(self, readout: _Module) -> dict[str, Any]:
        name, factor = _gate(readout)
        heads, width = self.heads, self.config.readout_width
        first = readout.child("linear_1").array("weight", self.channels, heads, width)
        second = readout.child("linear_2").array("weight", heads, width, heads)
        second = second[self.head, :, self.head, None]  # the others are masked
        second = second * (factor * SECOND_MOMENTS[name] / np.sqrt(heads))
        return {"Linear_0": _linear([first[:, self.head]]), "Linear_1": _linear([second])}


def _natural(l: int) -> Irrep:
    return Irrep(l, (-1) ** l)


def _linear(matrices: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Weights of a ``Linear`` by its names, from a matrix per degree."""
    return {
        f"w[{l},{l}] {w.shape[0]}x{_natural(l)},{w.shape[1]}x{_natural(l)}": np.ascontiguousarray(w)
        for l, w in enumerate(matrices)
    }


def _couplings(
    tensor: np.ndarray, factors: tuple[Irrep, ...], order: int, irrep: Irrep, paths: int
) -> np.ndarray:
    """The matrix (our paths, their paths) that gives our weights of the same couplings.

    Args:
        tensor: their couplings, (2L+1, components, ..., paths); no first axis for L = 0.
        factors: irreps of the features.
        order: of the power.
        irrep: of the result.
        paths: number of their paths.
    """
    dimension = sum(ir.dim for ir in factors)
    shape = (irrep.dim, *(dimension,) * order, paths)
    require(tensor.size == np.prod(shape, dtype=float), f"its U_matrix_{order} is of another size")
    tensor = tensor.reshape(shape)
    places = np.stack(np.nonzero(tensor))
    component, *inside, path = places
    theirs = _polynomials(
        np.stack([*inside, component, path]), tensor[tuple(places)], factors, order, irrep, paths
    )
    return _solved(theirs, factors, order, irrep)


def _polynomials(
    places: np.ndarray,
    coefficients: np.ndarray,
    factors: tuple[Irrep, ...],
    order: int,
    irrep: Irrep,
    paths: int,
) -> np.ndarray:
    """Couplings as polynomials: only the part that is symmetric in equal factors counts.

    Args:
        places: (order + 2, n) components that are multiplied, component of the result, path.
        coefficients: (n,) there.
        factors: irreps of the features.
        order: of the power.
        irrep: of the result.
        paths: number of paths.

    Returns:
        (monomials, 2L+1, paths).
    """
    dimension = sum(ir.dim for ir in factors)
    indices = {index: i for i, index in enumerate(monomial_indices(dimension, order))}
    require(paths <= len(indices) * irrep.dim, f"its basis of order {order} has too many paths")
    rows = [indices[tuple(inside)] for inside in np.sort(places[:order], axis=0).T.tolist()]
    found = np.zeros((len(indices), irrep.dim, paths))
    np.add.at(found, (np.array(rows, int), places[-2], places[-1]), coefficients)
    return found


def _solved(theirs: np.ndarray, factors: tuple[Irrep, ...], order: int, irrep: Irrep) -> np.ndarray:
    """The matrix (our paths, their paths) between equal polynomials."""
    basis, merge = reduced_couplings(factors, order, irrep, symmetric=False)
    ours = np.moveaxis(basis, 1, 2).reshape(-1, basis.shape[1])
    theirs = theirs.reshape(-1, theirs.shape[-1])
    solution = np.linalg.lstsq(ours, theirs, rcond=None)[0]
    error = np.abs(ours @ solution - theirs).max(initial=0.0)
    same = error <= _COUPLINGS * np.abs(theirs).max(initial=1e-300)
    _refusing(not same, f"a product basis of other couplings (of order {order})")
    return np.asarray(np.linalg.pinv(merge) @ solution)
