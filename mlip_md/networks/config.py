"""Hyperparameters of the networks: every row of the two published model cards.

Field names and defaults of the cards; a value that the networks do not support is refused here,
by name, before anything is built.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from e3nn_jax import Irreps

from mlip_md.errors import ConfigError

ACTIVATIONS = ("silu", "swish", "elu", "relu", "tanh", "sigmoid", "none")
RADIAL_ENVELOPES = ("polynomial_envelope", "soft_envelope")

MAX_MONOMIALS = 10_000
"""Products of feature components that MACE's product basis may have in its highest order."""

LIMITS: Mapping[str, tuple[float, float, str]] = types.MappingProxyType(
    {
        "cutoff": (0.1, 100.0, " Å"),
        "avg_num_neighbors": (1e-3, 1e6, ""),
        "avg_r_min": (0.01, 100.0, " Å"),
        "atomic_energies": (-1e8, 1e8, " eV"),
        "scaling_mean": (-1e8, 1e8, " eV"),
        "scaling_stdev": (-1e8, 1e8, ""),
        "scalar_mlp_std": (1e-6, 1e6, ""),
    }
)
"""Lowest and highest value, and unit, of a potential's numbers.

Far beyond anything physical, yet within them sums stay finite and neighbor lists fit into memory.
"""

HIGHEST_ATOMIC_NUMBER = 118
_NUMBER_OF_KEY = {str(z): z for z in range(1, HIGHEST_ATOMIC_NUMBER + 1)}  # JSON has text for keys

AtomicEnergies = str | Mapping[int, float] | None


def _require(condition: bool, name: str, value: object, allowed: str, field: str = "") -> None:
    if not condition:
        raise ConfigError(f"{name} = {value!r} is not allowed; it must be {allowed}", field or name)


def _check_integer(name: str, value: object, minimum: int) -> None:
    valid = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    _require(valid, name, value, f"an integer of at least {minimum}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    valid = isinstance(value, str) and value in choices
    _require(valid, name, value, "one of " + ", ".join(choices))


def check_number(name: str, value: object, quantity: str = "", alternative: str = "") -> None:
    """Check that a value is a number within ``LIMITS``.

    Args:
        name: of the value, for the message.
        value: to check.
        quantity: its key in ``LIMITS``; empty if that is its name.
        alternative: what else is allowed, for the message.

    Raises:
        ConfigError: if it is no number (bool, text, NaN) or beyond its limits.
    """
    lowest, highest, unit = LIMITS[quantity or name]
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    allowed = f"a number from {lowest:g} to {highest:g}{unit}{alternative}"
    _require(lowest <= number <= highest, name, value, allowed, quantity)


def _check_node_irreps(value: object) -> None:
    """Irreps that can be read, without empty blocks, and with scalars to read energies from."""
    _require(isinstance(value, str), "node_irreps", value, "a text such as 64x0e + 32x1o + 4x2e")
    irreps = _irreps("node_irreps", value)
    _require(all(mul > 0 for mul, _ in irreps), "node_irreps", value, "without empty blocks")
    # Energies come from half of the last 0e block, as in the published models.
    scalars = [mul for mul, ir in irreps if ir == "0e"]
    allowed = "irreps whose last 0e block has at least 2 channels: energies are read from it"
    _require(bool(scalars) and scalars[-1] >= 2, "node_irreps", value, allowed)


def _irreps(name: str, value: Any) -> Irreps:
    try:
        return Irreps(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"{name} = {value!r} cannot be read; write channels x degree parity, such as "
            "64x0e + 32x1o + 4x2e",
            name,
        ) from error


def _check_readout_irreps(value: Any) -> None:
    """A hidden layer of scalars, whatever their blocks, and one energy."""
    name = "readout_irreps"
    texts = isinstance(value, (list, tuple)) and all(isinstance(part, str) for part in value)
    _require(texts and len(value) == 2, name, value, "of two entries, such as 16x0e and 0e")
    hidden, output = (_irreps(name, part) for part in value)
    scalars = hidden.dim > 0 and {str(ir) for _, ir in hidden} == {"0e"}
    _require(scalars, name, value, "scalars such as 16x0e in the hidden layer")
    _require(output == Irreps("0e"), name, value, "0e in the output layer, one energy")


def _check_number_or_none(name: str, value: object) -> None:
    if value is not None:
        check_number(name, value, alternative=", or null to take it from the training set")


def _checked_energies(value: AtomicEnergies) -> AtomicEnergies:
    """E0 as given; a map as a new one of int to float."""
    name = "atomic_energies"
    if not isinstance(value, Mapping):
        valid = value in (None, "average", "zero")
        _require(valid, name, value, "null, average, zero or a map of Z to eV")
        return value
    for z, energy in value.items():
        valid = type(z) is int and 0 < z <= HIGHEST_ATOMIC_NUMBER  # True and 1.0 are no keys
        allowed = f"an atomic number, 1 to {HIGHEST_ATOMIC_NUMBER}"
        _require(valid, f"a key of {name}", z, allowed, name)
        check_number(f"{name}[{z}]", energy, name)
    return {z: float(energy) for z, energy in value.items()}


@dataclasses.dataclass(frozen=True)
class MACEConfig:
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
        atomic_energies: E0 per element: None or "average" from the data set, "zero", or {Z: eV}.
        avg_num_neighbors: divisor of the summed messages; None takes the data set's mean.
        avg_r_min: Å, where the normalisation of the radial basis starts; None: data set's mean.
        gate_nodes: gated self-interaction (not in the original MACE).
        species_embedding_dim: width of the edge species embedding (not in the original MACE).
    """

    architecture: ClassVar[str] = "mace"

    num_layers: int = 2
    num_channels: int = 128
    l_max: int = 3
    node_symmetry: int | None = 3
    correlation: int = 2
    readout_irreps: tuple[str, ...] = ("16x0e", "0e")
    num_readout_heads: int = 1
    include_pseudotensors: bool = False
    num_bessel: int = 8
    activation: str = "silu"
    radial_envelope: str = "polynomial_envelope"
    symmetric_tensor_product_basis: bool = False
    atomic_energies: AtomicEnergies = "average"
    avg_num_neighbors: float | None = None
    avg_r_min: float | None = None
    gate_nodes: bool = False
    species_embedding_dim: int | None = None

    def __post_init__(self) -> None:
        for name in (
            "num_layers",
            "num_channels",
            "correlation",
            "num_readout_heads",
            "num_bessel",
        ):
            _check_integer(name, getattr(self, name), 1)
        _check_integer("l_max", self.l_max, 0)
        _require(self.correlation <= 4, "correlation", self.correlation, "1, 2, 3 or 4")
        self._check_product_basis()
        if self.node_symmetry is not None:
            _check_integer("node_symmetry", self.node_symmetry, 0)
            _require(
                self.node_symmetry <= self.l_max,
                "node_symmetry",
                self.node_symmetry,
                f"at most l_max = {self.l_max}",
            )
        _check_readout_irreps(self.readout_irreps)
        object.__setattr__(self, "readout_irreps", tuple(self.readout_irreps))
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("radial_envelope", self.radial_envelope, RADIAL_ENVELOPES)
        _check_number_or_none("avg_num_neighbors", self.avg_num_neighbors)
        _check_number_or_none("avg_r_min", self.avg_r_min)
        if self.species_embedding_dim is not None:
            _check_integer("species_embedding_dim", self.species_embedding_dim, 1)
        for name in ("include_pseudotensors", "symmetric_tensor_product_basis", "gate_nodes"):
            value = getattr(self, name)
            _require(isinstance(value, bool), name, value, "true or false")
        object.__setattr__(self, "atomic_energies", _checked_energies(self.atomic_energies))

    def _check_product_basis(self) -> None:
        """Refuse a product basis that would take minutes to build and gigabytes to hold."""
        components = (self.l_max + 1) ** 2
        if self.include_pseudotensors:
            components += components - 1  # all but 0o, which never occurs
        products = math.comb(components + self.correlation - 1, self.correlation)
        if products > MAX_MONOMIALS:
            raise ConfigError(
                f"correlation = {self.correlation} with l_max = {self.l_max} and "
                f"include_pseudotensors = {self.include_pseudotensors} makes {products} products "
                f"of feature components; at most {MAX_MONOMIALS} are supported: lower one of them",
                "correlation",
            )

    @property
    def receptive_layers(self) -> int:
        """Number of message-passing layers: the receptive field in units of the cutoff."""
        return self.num_layers


@dataclasses.dataclass(frozen=True)
class NequIPConfig:
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
        atomic_energies: E0 per element: None or "average" from the data set, "zero", or {Z: eV}.
        avg_num_neighbors: divisor of the summed messages; None takes the data set's mean.
    """

    architecture: ClassVar[str] = "nequip"

    num_layers: int = 5
    node_irreps: str = "64x0e + 64x0o + 32x1e + 32x1o + 4x2e + 4x2o"
    l_max: int = 2
    num_bessel: int = 8
    radial_net_nonlinearity: str = "swish"
    radial_net_n_hidden: int = 64
    radial_net_n_layers: int = 2
    radial_envelope: str = "polynomial_envelope"
    scalar_mlp_std: float = 4.0
    atomic_energies: AtomicEnergies = None
    avg_num_neighbors: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_bessel", "radial_net_n_hidden", "radial_net_n_layers"):
            _check_integer(name, getattr(self, name), 1)
        _check_integer("l_max", self.l_max, 0)
        _check_node_irreps(self.node_irreps)
        _check_choice("radial_net_nonlinearity", self.radial_net_nonlinearity, ACTIVATIONS)
        _check_choice("radial_envelope", self.radial_envelope, RADIAL_ENVELOPES)
        check_number("scalar_mlp_std", self.scalar_mlp_std)
        _check_number_or_none("avg_num_neighbors", self.avg_num_neighbors)
        object.__setattr__(self, "atomic_energies", _checked_energies(self.atomic_energies))

    @property
    def receptive_layers(self) -> int:
        """Number of message-passing layers: the receptive field in units of the cutoff."""
        return self.num_layers


NetworkConfig = MACEConfig | NequIPConfig

CONFIGS: Mapping[str, type[MACEConfig] | type[NequIPConfig]] = types.MappingProxyType(
    {"mace": MACEConfig, "nequip": NequIPConfig}
)


def config_from_dict(architecture: str, fields: Mapping[str, Any]) -> NetworkConfig:
    """Build the configuration of an architecture from plain values (JSON, YAML).

    Args:
        architecture: "mace" or "nequip".
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
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise ConfigError(f"{architecture} has no hyperparameter {name!r}{hint}")
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
