"""The sections of a recipe: every value of a training run with its default and its limits.

A recipe holds every row of a published model card under the card's own name. Nothing here knows
YAML; ``mlip_md.trainer.recipe.reading`` does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mlip_md.elements import ATOMIC_NUMBERS, MAX_ATOMIC_NUMBER, symbol
from mlip_md.errors import ConfigError
from mlip_md.networks.config import CUTOFF, NetworkConfig, config_from_dict, config_to_dict
from mlip_md.networks.config import ENERGY_WORDS as ENERGY_WORDS  # data sees recipes only
from mlip_md.networks.config import AtomicEnergies as AtomicEnergies

MAX_SEED = 2**63 - 1
"""Largest seed that JAX takes."""


class Section(BaseModel):
    """Base of all parts of a recipe: no unknown keys, no silent conversions, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class WeightStep(Section):
    """A value of a loss weight and the first epoch (counted from 1) in which it holds."""

    from_epoch: int = Field(ge=0)
    value: float = Field(ge=0, allow_inf_nan=False)


class LossTermConfig(Section):
    """One term of the loss: a schedule of weights; a single number holds in all epochs."""

    weight: list[WeightStep]

    @field_validator("weight", mode="before")
    @classmethod
    def _from_number(cls, weight: Any) -> Any:
        if isinstance(weight, (int, float)) and not isinstance(weight, bool):
            return [{"from_epoch": 0, "value": weight}]
        return weight

    @field_validator("weight")
    @classmethod
    def _check_schedule(cls, weight: list[WeightStep]) -> list[WeightStep]:
        epochs = [step.from_epoch for step in weight]
        if not epochs or epochs[0] > 1 or epochs != sorted(set(epochs)):
            raise ValueError("from_epoch must start at 0 or 1 and ascend")
        return weight


def _constant(weight: float) -> LossTermConfig:
    return LossTermConfig(weight=[WeightStep(from_epoch=0, value=weight)])


class LossConfig(Section):
    """The loss; its terms are defined in ``mlip_md.trainer.loss``.

    Attributes:
        kind: "mse", "huber", "l1" or "l1-l2".
        delta: of the Huber loss, eV per atom and eV/Å.
        energy: weight of the squared error per atom, 1/eV²; of the absolute one, 1/eV.
        forces: weight of the squared force error, Å²/eV²; of the absolute one, Å/eV.
        stress: weight of the squared stress error, Å⁶/eV²; of the absolute one, Å³/eV; 0 leaves
            stresses out.
    """

    kind: Literal["mse", "huber", "l1", "l1-l2"] = "mse"
    delta: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    energy: LossTermConfig = _constant(1.0)
    forces: LossTermConfig = _constant(25.0)
    stress: LossTermConfig = _constant(0.0)

    @property
    def trains_stress(self) -> bool:
        """Whether stresses have a weight in any epoch."""
        return any(step.value for step in self.stress.weight)

    @model_validator(mode="after")
    def _check_weights(self) -> LossConfig:
        """Some term has a weight in every epoch."""
        terms = (self.energy.weight, self.forces.weight, self.stress.weight)
        for epoch in sorted({max(step.from_epoch, 1) for weight in terms for step in weight}):
            reached = ([s.value for s in weight if s.from_epoch <= epoch][-1] for weight in terms)
            if not any(reached):
                raise ValueError(
                    f"energy, forces and stress all weigh 0 from epoch {epoch} on, and nothing "
                    "would be trained; give one of them a weight"
                )
        return self


class OptimizerConfig(Section):
    """The optimizer and its learning-rate schedule (steps are batches, from 0).

    Attributes:
        kind: "amsgrad", "adam", "adamw", "muon" or "schedule-free"; see ``trainer.optimizer``.
        schedule: how the learning rate goes from its peak to its final value: "linear", "cosine",
            "exponential", or "plateau", which lowers it when the validation score stands still.
        init_learning_rate: at step 0.
        peak_learning_rate: reached linearly after warmup_steps.
        final_learning_rate: reached after further transition_steps, then kept; a "plateau" lowers
            to it at most.
        weight_decay: L2 decay added to the gradient before clipping; with "adamw" and "muon"
            decoupled from it.
        warmup_steps: length of the warm-up.
        warmup_epochs: the same in epochs; takes the place of warmup_steps.
        transition_steps: length of the way to the final learning rate; "to the end" of train.epochs
            takes the rest.
        transition_epochs: the same in epochs; takes the place of transition_steps.
        plateau_epochs: epochs without a better score after which a "plateau" is lowered.
        plateau_factor: by which it is.
        grad_norm: global norm to which gradients are clipped.
        num_gradient_accumulation_steps: batches whose gradients are averaged before an update.
        factors: on the learning rate of parts of the network, by pattern of their names, such as
            "*/layer_0/*": 0.1; 0 freezes a part. The last pattern that fits counts.
    """

    kind: Literal["amsgrad", "adam", "adamw", "muon", "schedule-free"] = "amsgrad"
    schedule: Literal["linear", "cosine", "exponential", "plateau"] = "linear"
    init_learning_rate: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    peak_learning_rate: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    final_learning_rate: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    warmup_steps: int = Field(default=4000, ge=0)
    warmup_epochs: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    transition_steps: Annotated[int, Field(ge=1)] | Literal["to the end"] = 360000
    transition_epochs: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    plateau_epochs: int = Field(default=10, ge=1)
    plateau_factor: float = Field(default=0.5, gt=0, lt=1)
    grad_norm: float = Field(default=500.0, gt=0)
    num_gradient_accumulation_steps: int = Field(default=1, ge=1)
    factors: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}

    @model_validator(mode="after")
    def _check_schedule(self) -> OptimizerConfig:
        warms_up = self.warmup_steps if self.warmup_epochs is None else self.warmup_epochs
        peak, highest = self.peak_learning_rate, "peak_learning_rate is the highest of the three"
        if warms_up and self.init_learning_rate > peak:
            raise ValueError(
                f"init_learning_rate: {self.init_learning_rate:g} is above peak_learning_rate: "
                f"{peak:g}; {highest}: lower the first, or set warmup_steps: 0"
            )
        if self.final_learning_rate > peak:
            raise ValueError(
                f"final_learning_rate: {self.final_learning_rate:g} is above peak_learning_rate: "
                f"{peak:g}; {highest}: lower the first"
            )
        if self.schedule == "exponential" and self.final_learning_rate == 0:
            raise ValueError("an exponential schedule never reaches final_learning_rate: 0")
        if self.schedule == "plateau" and self.kind == "schedule-free":
            raise ValueError("schedule-free needs no plateau; use schedule: linear")
        return self


class SplitConfig(Section):
    """Which structures serve for what.

    Attributes:
        from_file: take the marks in the file itself; the other values then mean nothing.
        train: fraction to train on; the three fractions sum to 1.
        validation: fraction by which the best model is chosen.
        test: fraction that is kept for the final errors.
        by: "group" keeps all conformers of a molecule in one part; "structure" does not.
        seed: of the random split.
    """

    from_file: bool = False
    train: float = Field(default=0.9, gt=0, le=1)
    validation: float = Field(default=0.1, ge=0, lt=1)
    test: float = Field(default=0.0, ge=0, lt=1)
    by: Literal["group", "structure"] = "group"
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _check_sum(self) -> SplitConfig:
        total = self.train + self.validation + self.test
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"train + validation + test must be 1, not {total:g}")
        return self


class CurationConfig(Section):
    """Filters on the structures; null switches one off. Without this section nothing is filtered.

    Attributes:
        elements: symbols; keep only structures of these elements.
        neutral_only: keep only structures of total charge 0.
        one_bond_per_hydrogen: keep only structures whose hydrogens have exactly one bond.
        max_net_force: eV/Å, largest allowed norm of the sum of all forces.
        max_net_force_per_sqrt_atom: eV/Å, the same divided by √N, as the noise of N forces adds up.
        max_force: eV/Å, largest allowed norm of a force.
    """

    elements: list[str] | None = None
    neutral_only: bool = True
    one_bond_per_hydrogen: bool = True
    max_net_force: float | None = Field(default=0.1, gt=0)
    max_net_force_per_sqrt_atom: float | None = Field(default=None, gt=0)
    max_force: float | None = Field(default=15.0, gt=0)

    @field_validator("elements")
    @classmethod
    def _check_symbols(cls, elements: list[str] | None) -> list[str] | None:
        if elements == []:
            raise ValueError("name at least one element, or null to allow all")
        unknown = [name for name in elements or [] if name not in ATOMIC_NUMBERS]
        if unknown:
            raise ValueError(f"not symbols of elements: {', '.join(unknown)}")
        return elements


SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Name of a validation set, of letters, digits, _ and -, for it becomes part of a column's name."""


class DataConfig(Section):
    """Where the structures come from and how they are batched.

    Attributes:
        path: file of the data set, a list of files, or one folder made by ``mlip-md prepare``. With
            a folder, the rows on reading, filters and splits must be those it was made with.
        validation: file(s) used for validation instead of a split of ``path``; or several sets by
            name, ``{NAME: FILE}``, whose errors are told apart.
        test: file(s) used for the final test instead of a split of ``path``.
        split: into training, validation and test set, where no own files are given.
        curate: filters; null keeps everything readable. A section, even an empty one, switches on
            those of the SPICE curation that it does not set otherwise.
        cutoff: Å, radius of the neighborhoods.
        max_n_node: atoms per structure for which batches are sized, on average; null: measured, so
            that batch_size structures fit as a rule.
        max_n_edge: undirected edges per structure, likewise.
        batch_size: most structures in a batch. Batches are padded to batch_size·max_n_node + 1
            nodes, 2·batch_size·max_n_edge edges and batch_size + 1 structures.
        on_oversize: what to do with a structure that fits into no batch.
        on_bad: what to do with a structure without usable labels: "skip" leaves it out and logs it.
        energy_key: extxyz: name of the energy; null tries REF_energy, energy, Energy.
        forces_key: extxyz: name of the forces, likewise.
        stress_key: extxyz: name of the stress; null tries REF_stress, stress.
        virial_key: extxyz: name of the virial (minus stress times volume), read where there is no
            stress; null tries REF_virial, virial and their plurals.
    """

    path: str | list[str] = ""
    validation: str | list[str] | dict[SetName, str | list[str]] | None = None
    test: str | list[str] | None = None
    split: SplitConfig = SplitConfig()
    curate: CurationConfig | None = None
    cutoff: float = Field(default=5.0, ge=CUTOFF.lowest, le=CUTOFF.highest)
    max_n_node: int | None = Field(default=None, ge=1)
    max_n_edge: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=16, ge=1)
    on_oversize: Literal["error", "drop"] = "error"
    on_bad: Literal["error", "skip"] = "error"
    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    virial_key: str | None = None


class TrainConfig(Section):
    """Length of the training, averaging of weights, choice of the best model.

    Attributes:
        epochs: passes over the training set, counted from 1.
        precision: "float32" or "float64", in which weights and labels are held and steps computed;
            the model file holds float32.
        ema_decay: d of the exponential moving average of the weights.
        select_energy_weight: 1/Å; the best model has the lowest
            forces_rmse + select_energy_weight · energy_rmse_per_atom on the validation set. The
            search starts anew when the loss weights change.
        select_stress_weight: Å²; select_stress_weight · stress_rmse is added to that where
            loss.stress has a weight and the validation set has labels of stress.
        select_by: name of the set in data.validation whose errors alone choose the best model;
            null takes those of all validation structures together.
        patience: epochs without a better model after which the training ends early, counted in the
            last stage of the loss weights; null trains to the end.
    """

    epochs: int = Field(default=220, ge=1)
    precision: Literal["float32", "float64"] = "float32"
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    select_energy_weight: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    select_stress_weight: float = Field(default=10.0, ge=0, allow_inf_nan=False)
    select_by: str | None = None
    patience: int | None = Field(default=None, ge=1)


class CheckpointConfig(Section):
    """When the complete state is written; always at the end of an epoch and on interruption.

    Attributes:
        every_steps: batches after which it is.
        every_minutes: minutes after which it is.
        keep_latest: number of checkpoints that are kept.
    """

    every_steps: int = Field(default=1000, ge=1)
    every_minutes: float = Field(default=15.0, gt=0)
    keep_latest: int = Field(default=2, ge=1)


class FaultConfig(Section):
    """What to do when a step gives NaN or infinity; it is never applied.

    Attributes:
        max_bad_steps_in_row: after so many, the last batch is written to the run's folder, and the
            training goes back to its last checkpoint.
        rollbacks: how often; the next time it ends.
        rate_factor: on the learning rate after each.
    """

    max_bad_steps_in_row: int = Field(default=5, ge=1)
    rollbacks: int = Field(default=2, ge=0)
    rate_factor: float = Field(default=0.5, gt=0, lt=1)


class LogConfig(Section):
    """How often a step is logged, and whether plots are drawn.

    Attributes:
        every_steps: batches of which one is logged.
        plots: draw learning curves and parity plots at the end.
        tensorboard: also write the rows of epochs to RUN/tensorboard (extra "tensorboard").
        wandb: also send them to this project of Weights & Biases (extra "wandb").
    """

    every_steps: int = Field(default=50, ge=1)
    plots: bool = True
    tensorboard: bool = False
    wandb: str | None = Field(default=None, min_length=1)


class StartConfig(Section):
    """The potential that a training starts from.

    Attributes:
        potential: a file, run folder or bundled name; the network and the cutoff are its.
        head: which head of a mace-torch model that has several.
        atomic_energies: "keep" its E0 and fit those of new elements to what they leave, or "refit":
            those of the data (model.atomic_energies), and its of elements that these lack.
        new_elements: weights of elements it does not know: copies of the "nearest" relative's, or
            "fresh" random ones.
        replay: file(s) of a second data set, of the parent's level of theory, or a folder of
            prepared data: every step is made with a batch of it beside the other one, so that what
            the parent knew is kept.
        replay_weight: of the loss of that batch; 0 leaves it out.
    """

    potential: str
    head: str | None = None
    atomic_energies: Literal["keep", "refit"] = "keep"
    new_elements: Literal["nearest", "fresh"] = "nearest"
    replay: str | list[str] | None = None
    replay_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check_replay(self) -> StartConfig:
        if self.replay is None and self.replay_weight != 1.0:
            raise ValueError(
                f"replay_weight: {self.replay_weight:g} weighs nothing without replay; name the "
                "second data set, or leave the weight out"
            )
        return self


class Recipe(Section):
    """A whole training run.

    Attributes:
        name: of the potential; goes into the model file.
        description: free text; goes into the model file.
        seed: of the initial weights and of the order of the structures.
        start: potential that the weights are taken from; null draws them at random.
        model: ``kind`` (mace, nequip or mace-torch) and the hyperparameters of the network. E0 are
            fitted to the data (``atomic_energies: average``), those of its isolated atoms
            (``isolated``), 0 (``zero``), of a file, or given by symbol or atomic number,
            ``{H: -13.6, 6: -1030.5}`` (eV).
        data: data set, cutoff, batches.
        loss: terms and weights.
        optimizer: learning rates, clipping, accumulation.
        train: epochs, averaging, choice of the best model.
        checkpoint: when the state is saved.
        faults: guard against NaN.
        log: how much is written.
    """

    name: str = "potential"
    description: str = ""
    seed: int = Field(default=42, ge=0, le=MAX_SEED)
    start: StartConfig | None = None
    model: dict[str, Any] = Field(default_factory=lambda: {"kind": "mace"})
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    faults: FaultConfig = FaultConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _check_averages(self) -> Recipe:
        if self.optimizer.kind == "schedule-free" and self.train.ema_decay:
            raise ValueError("schedule-free averages the weights itself; set train.ema_decay to 0")
        return self

    @property
    def network(self) -> NetworkConfig:
        """The validated hyperparameters of the network."""
        fields = {name: value for name, value in self.model.items() if name != "kind"}
        energies = fields.get("atomic_energies")
        if isinstance(energies, Mapping):
            fields["atomic_energies"] = {to_atomic_number(z): e for z, e in energies.items()}
        return config_from_dict(self.model["kind"], fields)

    def plain(self) -> dict[str, Any]:
        """All values, defaults included, as plain JSON values."""
        values = self.model_dump(mode="json")
        model = {"kind": self.model["kind"], **config_to_dict(self.network)}
        if isinstance(model["atomic_energies"], Mapping):
            model["atomic_energies"] = {
                symbol(int(z)): e for z, e in model["atomic_energies"].items()
            }
        return {**values, "model": model}


def to_atomic_number(key: object) -> int:
    """Atomic number of a symbol, a number or the text of a number, as keys of JSON are.

    Raises:
        ConfigError: if it is none of these.
    """
    number = key if type(key) is int else 0
    if isinstance(key, str):
        number = ATOMIC_NUMBERS.get(key, int(key) if key.isdecimal() else 0)
    if not 0 < number <= MAX_ATOMIC_NUMBER:
        raise ConfigError(f"{key} is neither the symbol of an element nor an atomic number")
    return number
