"""Hyperparameters of the networks: every row of the two published model cards.

Field names and defaults of the cards. What a value may be stands at its field; a value that the
networks do not support is refused here, by name, before anything is built.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from e3nn_jax import Irreps

from mlip_md.elements import MAX_ATOMIC_NUMBER
from mlip_md.errors import ConfigError
from mlip_md.hints import hint

ACTIVATIONS = ("silu", "swish", "elu", "relu", "tanh", "sigmoid", "none")
RADIAL_ENVELOPES = ("polynomial_envelope", "soft_envelope")
INTERACTIONS = (
    "RealAgnosticInteractionBlock",
    "RealAgnosticResidualInteractionBlock",
    "RealAgnosticDensityInteractionBlock",
    "RealAgnosticDensityResidualInteractionBlock",
)
"""Interaction blocks of mace-torch: with a residual by species beside the messages or species'
weights on them, and with messages divided by a mean number of neighbors or by a learned density."""

MAX_MONOMIALS = 10_000
"""Products of feature components that MACE's product basis may have in its highest order."""

MAX_DEGREE = 11
"""Highest l of any feature: as far as e3nn-jax knows Clebsch-Gordan coefficients."""

MAX_WIDTH = 100_000
"""Components of a feature or of a hidden layer; no sensible network comes near."""

_NUMBER_OF_KEY = {str(z): z for z in range(1, MAX_ATOMIC_NUMBER + 1)}  # JSON has text for keys

AtomicEnergies = str | Mapping[int, float] | None

ENERGY_WORDS = ("average", "isolated", "zero")
"""Sources of E0 that a recipe names by a word."""


def _require(condition: bool, name: str, value: object, allowed: str, field: str = "") -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r} is not allowed; it must be {allowed}", field or name)


@dataclasses.dataclass(frozen=True)
class Number:
    """Numbers from ``lowest`` to ``highest``.

    Attributes:
        lowest: of the numbers allowed.
        highest: of the numbers allowed.
        unit: for messages, with the space before it.
        whole: integers only.
    """

    lowest: float
    highest: float
    unit: str = ""
    whole: bool = False

    def check(self, name: str, value: object, alternative: str = "", field: str = "") -> None:
        """Check that a value is such a number.

        Args:
            name: of the value, for the message.
            value: to check.
            alternative: what else is allowed, for the message.
            field: the hyperparameter that it is part of, if that is not its name.

        Raises:
            ConfigError: if it is no number (bool, text, NaN) or beyond the limits.
        """
        of_kind = isinstance(value, int) or (isinstance(value, float) and not self.whole)
        number: Any = value if of_kind and not isinstance(value, bool) else math.nan
        what = "an integer" if self.whole else "a number"
        allowed = f"{what} from {self.lowest:g} to {self.highest:g}{self.unit}{alternative}"
        _require(self.lowest <= number <= self.highest, name, value, allowed, field)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One of a few texts, or of true and false.

    Attributes:
        choices: the values allowed, all of one type.
    """

    choices: tuple[Any, ...]

    def check(self, name: str, value: object, alternative: str = "") -> None:
        """Check that a value is among the choices; 1 is not true.

        Raises:
            ConfigError: if it is not.
        """
        valid = type(value) is type(self.choices[0]) and value in self.choices
        allowed = "true or false" if self == FLAG else "one of " + ", ".join(self.choices)
        _require(valid, name, value, allowed + alternative)


CUTOFF = Number(0.1, 100.0, " Å")
NEIGHBORS = Number(1e-3, 1e6)
R_MIN = Number(0.01, 100.0, " Å")
ENERGY = Number(-1e8, 1e8, " eV")
SCALING = Number(-1e8, 1e8)
"""Numbers of a potential, some of which recipes and hyperparameters have too.

Far beyond anything physical, yet within them sums stay finite and neighbor lists fit into memory.
"""

FLAG = Choice((True, False))
_LAYERS = Number(1, 64, whole=True)
_BASIS = Number(1, 1024, whole=True)
_WIDTH = Number(1, MAX_WIDTH, whole=True)
_DEGREE = Number(0, MAX_DEGREE, whole=True)
_FROM_DATA = "take it from the training set"


def check_fields(values: Any) -> None:
    """Check the fields of a dataclass whose metadata say what is ``allowed`` there.

    That is a ``Number``, a ``Choice`` or a function of name and value. Where the metadata have an
    entry ``none``, None is allowed too; its text says in messages what that is for.

    Args:
        values: the dataclass's instance.

    Raises:
        ConfigError: naming the first value that is not allowed.
    """
    for field in dataclasses.fields(values):
        value, allowed = getattr(values, field.name), field.metadata.get("allowed")
        none = field.metadata.get("none")
        if allowed is None or (value is None and none is not None):
            continue
        if isinstance(allowed, Number | Choice):
            allowed.check(field.name, value, f", or null to {none}" if none else "")
        else:
            allowed(field.name, value)


def _field(
    default: Any, allowed: Number | Choice | Callable[[str, Any], None], none: str | None = None
) -> Any:
    """A field with its default and what it may be, see ``check_fields``."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "none": none})


def _check_node_irreps(name: str, value: object) -> None:
    """Irreps that can be read, without empty blocks, and with scalars to read energies from."""
    _require(isinstance(value, str), name, value, "a text such as 64x0e + 32x1o + 4x2e")
    irreps = _irreps(name, value)
    _require(all(mul > 0 for mul, _ in irreps), name, value, "without empty blocks")
    # Energies come from half of the last 0e block, as in the published models.
    scalars = [mul for mul, ir in irreps if ir == "0e"]
    allowed = "irreps whose last 0e block has at least 2 channels: energies are read from it"
    _require(bool(scalars) and scalars[-1] >= 2, name, value, allowed)
    large = irreps.dim > MAX_WIDTH or any(ir.l > MAX_DEGREE for _, ir in irreps)
    allowed = f"no larger than any that are read: {MAX_WIDTH} components, l up to {MAX_DEGREE}"
    _require(not large, name, f"{value:.60}", allowed)


def _irreps(name: str, value: Any) -> Irreps:
    try:
        return Irreps(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{name} = {value!r} cannot be read; write channels x degree parity, such as "
            "64x0e + 32x1o + 4x2e",
            name,
        ) from error


def _check_readout_irreps(name: str, value: Any) -> None:
    """A hidden layer of scalars, whatever their blocks, and one energy."""
    texts = isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value)
    _require(texts and len(value) == 2, name, value, "of two entries, such as 16x0e and 0e")
    hidden, output = (_irreps(name, part) for part in value)
    scalars = hidden.dim > 0 and {str(ir) for _, ir in hidden} == {"0e"}
    _require(scalars, name, value, "scalars such as 16x0e in the hidden layer")
    _require(output == Irreps("0e"), name, value, "0e in the output layer, one energy")


def _check_energies(name: str, value: Any) -> None:
    """A word, null or the name of a file (with a dot in it), or a map of E0 (eV) by number."""
    if not isinstance(value, Mapping):
        words = isinstance(value, str) and (value in ENERGY_WORDS or "." in value)
        allowed = f"null, {', '.join(ENERGY_WORDS)}, a file or a map of Z to eV"
        _require(value is None or words, name, value, allowed)
        return
    for z, energy in value.items():
        valid = type(z) is int and 0 < z <= MAX_ATOMIC_NUMBER  # True and 1.0 are no keys
        allowed = f"an atomic number, 1 to {MAX_ATOMIC_NUMBER}"
        _require(valid, f"a key of {name}", z, allowed, name)
        ENERGY.check(f"{name}[{z}]", energy, field=name)


class Hyperparameters:
    """What every configuration has: a frozen dataclass derives from this and gives all of it.

    Attributes:
        architecture: its name in files and recipes, where ``CONFIGS`` has the class.
        published_block: module below which published files and those of version 0.1.0 have the
            weights. Initial weights and the identity of a potential depend on it: a network that
            nobody has published takes a name of its own and keeps it.
        decaying: modules whose weights decay under weight decay; none means that all do.
        num_layers: message-passing layers, the receptive field in units of the cutoff.
        atomic_energies: E0 per element: None or "average", fitted to the data set; "isolated", of
            the isolated atoms in it; "zero"; a file that has them; or {Z: eV}.
        avg_num_neighbors: divisor of the summed messages; None takes the data set's mean.
    """

    architecture: ClassVar[str]
    published_block: ClassVar[str]
    decaying: ClassVar[tuple[str, ...]] = ()
    num_layers: int
    atomic_energies: AtomicEnergies
    avg_num_neighbors: float | None

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.atomic_energies, Mapping):
            energies = {z: float(energy) for z, energy in self.atomic_energies.items()}
            object.__setattr__(self, "atomic_energies", energies)

    def decays(self, path: str) -> bool:
        """Whether weight decay acts on a weight, given by its path in the parameter tree."""
        return not self.decaying or any(name in path for name in self.decaying)


@dataclasses.dataclass(frozen=True)
class MACEConfig(Hyperparameters):
    """Hyperparameters of MACE; defaults are the values of the published card.

    Attributes:
        num_layers: interaction layers, at least 1.
        num_channels: channels of every feature.
        l_max: highest degree of the spherical harmonics and of the messages.
        node_symmetry: highest degree kept after the product basis, at most l_max; None is l_max.
        correlation: highest correlation order (body order - 1) of the product basis.
        readout_irreps: hidden and output irreps of the last readout (two entries).
        num_readout_heads: readout heads, summed.
        include_pseudotensors: keep features of both parities instead of (-1)^l only.
        num_bessel: radial basis functions.
        activation: nonlinearity of the radial network and of the last readout; with sigmoid, which
            is not 0 at 0, messages end abruptly at the cutoff.
        radial_envelope: smooth cutoff function.
        symmetric_tensor_product_basis: product basis of permutation-symmetric couplings only.
        atomic_energies: E0 per element: None or "average", fitted to the data set; "isolated", of
            the isolated atoms in it; "zero"; a file that has them; or {Z: eV}.
        avg_num_neighbors: divisor of the summed messages; None takes the data set's mean.
        avg_r_min: Å, where the normalisation of the radial basis starts; None: data set's mean.
        gate_nodes: gated self-interaction (not in the original MACE).
        species_embedding_dim: width of the edge species embedding (not in the original MACE).
    """

    architecture: ClassVar[str] = "mace"
    published_block: ClassVar[str] = "MaceBlock_0"
    decaying: ClassVar[tuple[str, ...]] = ("linear_down", "SymmetricContraction")

    num_layers: int = _field(2, _LAYERS)
    num_channels: int = _field(128, _WIDTH)
    l_max: int = _field(3, _DEGREE)
    node_symmetry: int | None = _field(3, _DEGREE, none="")
    correlation: int = _field(2, Number(1, 4, whole=True))
    readout_irreps: tuple[str, ...] = _field(("16x0e", "0e"), _check_readout_irreps)
    num_readout_heads: int = _field(1, _LAYERS)
    include_pseudotensors: bool = _field(False, FLAG)
    num_bessel: int = _field(8, _BASIS)
    activation: str = _field("silu", Choice(ACTIVATIONS))
    radial_envelope: str = _field("polynomial_envelope", Choice(RADIAL_ENVELOPES))
    symmetric_tensor_product_basis: bool = _field(False, FLAG)
    atomic_energies: AtomicEnergies = _field("average", _check_energies)  # noqa: RUF009
    avg_num_neighbors: float | None = _field(None, NEIGHBORS, none=_FROM_DATA)
    avg_r_min: float | None = _field(None, R_MIN, none=_FROM_DATA)
    gate_nodes: bool = _field(False, FLAG)
    species_embedding_dim: int | None = _field(None, _WIDTH, none="")

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "readout_irreps", tuple(self.readout_irreps))
        self._check_product_basis()
        if self.node_symmetry is not None:
            low = self.node_symmetry <= self.l_max
            allowed = f"at most l_max = {self.l_max}"
            _require(low, "node_symmetry", self.node_symmetry, allowed)

    def _check_product_basis(self) -> None:
        """Refuse a product basis that would take minutes to build and gigabytes to hold."""
        components = (self.l_max + 1) ** 2
        if self.include_pseudotensors:
            components += components - 1  # all but 0o, which never occurs
        pseudotensors = f"include_pseudotensors = {self.include_pseudotensors}"
        others = f"l_max = {self.l_max} and {pseudotensors}"
        _check_products(components, self.correlation, others)


def _check_products(components: int, correlation: int, others: str) -> None:
    """Refuse a product basis of too many monomials, which hyperparameters besides it make."""
    products = math.comb(components + correlation - 1, correlation)
    if products > MAX_MONOMIALS:
        raise ConfigError(
            f"correlation = {correlation} with {others} makes {products} products of feature "
            f"components; at most {MAX_MONOMIALS} are supported: lower one of them",
            "correlation",
        )


@dataclasses.dataclass(frozen=True)
class NequIPConfig(Hyperparameters):
    """Hyperparameters of NequIP; defaults are the values of the published card.

    Attributes:
        num_layers: interaction layers, at least 1.
        node_irreps: irreps of the node features, in any order and repeated at will.
        l_max: highest degree of the spherical harmonics.
        num_bessel: radial basis functions.
        radial_net_nonlinearity: nonlinearity of the radial network (not normalised); with sigmoid
            messages end abruptly at the cutoff.
        radial_net_n_hidden: width of its hidden layers.
        radial_net_n_layers: number of its hidden layers.
        radial_envelope: smooth cutoff function.
        scalar_mlp_std: variance scale at which its hidden layers are drawn.
        atomic_energies: E0 per element: None or "average", fitted to the data set; "isolated", of
            the isolated atoms in it; "zero"; a file that has them; or {Z: eV}.
        avg_num_neighbors: divisor of the summed messages; None takes the data set's mean.
    """

    architecture: ClassVar[str] = "nequip"
    published_block: ClassVar[str] = "NequipBlock_0"

    num_layers: int = _field(5, _LAYERS)
    node_irreps: str = _field("64x0e + 64x0o + 32x1e + 32x1o + 4x2e + 4x2o", _check_node_irreps)
    l_max: int = _field(2, _DEGREE)
    num_bessel: int = _field(8, _BASIS)
    radial_net_nonlinearity: str = _field("swish", Choice(ACTIVATIONS))
    radial_net_n_hidden: int = _field(64, _WIDTH)
    radial_net_n_layers: int = _field(2, _LAYERS)
    radial_envelope: str = _field("polynomial_envelope", Choice(RADIAL_ENVELOPES))
    scalar_mlp_std: float = _field(4.0, Number(1e-6, 1e6))
    atomic_energies: AtomicEnergies = _field(None, _check_energies)  # noqa: RUF009
    avg_num_neighbors: float | None = _field(None, NEIGHBORS, none=_FROM_DATA)


def _check_widths(name: str, value: object) -> None:
    """Widths of the hidden layers of a perceptron."""
    several = isinstance(value, (list, tuple)) and 0 < len(value) <= 64
    _require(several, name, value, "of 1 to 64 widths, such as 64, 64, 64")
    for width in typing.cast(tuple[Any, ...], value):
        _WIDTH.check(f"a width in {name}", width, field=name)


@dataclasses.dataclass(frozen=True)
class TorchMACEConfig(Hyperparameters):
    """Hyperparameters of MACE as mace-torch 0.3 has it; its own names where they differ are given.

    Attributes:
        num_layers: interaction layers, at least 1.
        num_channels: channels of every feature.
        l_max: highest degree of the spherical harmonics and of the messages (max_ell).
        node_symmetry: highest degree kept after the product basis (of hidden_irreps).
        correlation: highest correlation order of the product basis.
        first_interaction: block of the first layer (interaction_cls_first).
        interaction: block of the later ones (interaction_cls).
        readout_width: scalars in the hidden layer of the last readout (MLP_irreps).
        activation: nonlinearity of that layer (gate); the radial network always has silu.
        last_readout_only: energies come from the last layer alone (use_last_readout_only).
        radial_basis: functions of the distance (radial_type).
        num_basis: number of these (num_bessel).
        radial_widths: hidden layers of the radial network (radial_MLP).
        cutoff_exponent: p of the polynomial cutoff (num_polynomial_cutoff).
        cutoff_on_weights: the cutoff multiplies the radial weights instead of the radial basis
            (apply_cutoff = False).
        distance_transform: of the distances that the radial basis is of, by covalent radii.
        pair_repulsion: with the potential of Ziegler, Biersack and Littmark.
        atomic_energies: E0 per element: None or "average", fitted to the data set; "isolated", of
            the isolated atoms in it; "zero"; a file that has them; or {Z: eV}.
        avg_num_neighbors: divisor of the summed messages; None takes the data set's mean.
    """

    architecture: ClassVar[str] = "mace-torch"
    published_block: ClassVar[str] = "TorchMACE_0"
    decaying: ClassVar[tuple[str, ...]] = ("linear_down", "SymmetricContraction")

    num_layers: int = _field(2, _LAYERS)
    num_channels: int = _field(128, _WIDTH)
    l_max: int = _field(3, _DEGREE)
    node_symmetry: int = _field(1, _DEGREE)
    correlation: int = _field(3, Number(1, 4, whole=True))
    first_interaction: str = _field("RealAgnosticResidualInteractionBlock", Choice(INTERACTIONS))
    interaction: str = _field("RealAgnosticResidualInteractionBlock", Choice(INTERACTIONS))
    readout_width: int = _field(16, _WIDTH)
    activation: str = _field("silu", Choice(ACTIVATIONS))
    last_readout_only: bool = _field(False, FLAG)
    radial_basis: str = _field("bessel", Choice(("bessel", "gaussian")))
    num_basis: int = _field(8, _BASIS)
    radial_widths: tuple[int, ...] = _field((64, 64, 64), _check_widths)
    cutoff_exponent: int = _field(5, Number(2, 64, whole=True))
    cutoff_on_weights: bool = _field(False, FLAG)
    distance_transform: str = _field("none", Choice(("none", "agnesi", "soft")))
    pair_repulsion: bool = _field(False, FLAG)
    atomic_energies: AtomicEnergies = _field("average", _check_energies)  # noqa: RUF009
    avg_num_neighbors: float | None = _field(None, NEIGHBORS, none=_FROM_DATA)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "radial_widths", tuple(self.radial_widths))
        _check_products((self.l_max + 1) ** 2, self.correlation, f"l_max = {self.l_max}")
        low = self.node_symmetry <= self.l_max
        _require(low, "node_symmetry", self.node_symmetry, f"at most l_max = {self.l_max}")
        several = self.num_basis > 1 or self.radial_basis != "gaussian"
        _require(several, "num_basis", self.num_basis, "at least 2 with gaussian functions")


NetworkConfig = MACEConfig | NequIPConfig | TorchMACEConfig

CONFIGS: Mapping[str, type[MACEConfig] | type[NequIPConfig] | type[TorchMACEConfig]] = (
    types.MappingProxyType(
        {"mace": MACEConfig, "nequip": NequIPConfig, "mace-torch": TorchMACEConfig}
    )
)


def config_from_dict(architecture: str, fields: Mapping[str, Any]) -> NetworkConfig:
    """Build the configuration of an architecture from plain values (JSON, YAML).

    Args:
        architecture: one of ``CONFIGS``.
        fields: values by field name; missing ones take their defaults.

    Returns:
        The validated configuration.

    Raises:
        ConfigError: on an unknown architecture or field (naming the nearest one) or a bad value.
    """
    if architecture not in CONFIGS:
        raise ConfigError(f"unknown architecture {architecture!r}; known are {', '.join(CONFIGS)}")
    config_class = CONFIGS[architecture]
    known = [f.name for f in dataclasses.fields(config_class)]
    for name in fields:
        if name not in known:
            near = hint(name, known)
            raise ConfigError(f"{architecture} has no hyperparameter {name!r}; {near}", name)
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    energies = values.get("atomic_energies")
    if isinstance(energies, Mapping):
        by_number = {_NUMBER_OF_KEY.get(z, z): energy for z, energy in energies.items()}
        _require(len(by_number) == len(energies), "atomic_energies", energies, "one per element")
        values["atomic_energies"] = by_number
    return typing.cast(NetworkConfig, typing.cast(Any, config_class)(**values))


def config_to_dict(config: NetworkConfig) -> dict[str, Any]:
    """Plain values of a configuration, as they go into JSON (without the architecture's name)."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
