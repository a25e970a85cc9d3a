"""The training loop: epochs of steps, validation, choice of the best model, interruption, resume.

What happens in which order is written here and nowhere else; there are no callbacks. A run is a
pure function of its recipe and data (on one CPU device): the order of the structures depends on
(seed, epoch) only, and a checkpoint holds everything else, so an interrupted and resumed run ends
with the same bits as one that was never interrupted.

``config.resolved.yaml``, ``environment.json`` and ``data.json`` are those of the latest
continuation; what each of them changed stands in ``log.txt`` and, with the value before, in the
``resumed`` events of ``events.jsonl``. What may change is said in ``mlip_md.trainer.resume``.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

import mlip_md
from mlip_md.compiler import jit
from mlip_md.devices import (
    Load,
    check_memory,
    find_device,
    naming_out_of_memory,
    plan_memory,
    precision,
)
from mlip_md.errors import CheckpointError, ConfigError, NonFiniteError
from mlip_md.files import write_text
from mlip_md.formats import own
from mlip_md.networks import build_network, draw_weights
from mlip_md.ownership import owning
from mlip_md.potential import Params, Potential
from mlip_md.signals import ENDINGS, Interruptions, Reason
from mlip_md.trainer import metrics
from mlip_md.trainer.checkpoint import CheckpointFolder
from mlip_md.trainer.data import Batch, TrainingData, write_structures
from mlip_md.trainer.evaluation import evaluate_sets
from mlip_md.trainer.finetune import adopt_elements, describe_parent, starting_weights
from mlip_md.trainer.lengths import find_unreached
from mlip_md.trainer.loggers import Logger, open_loggers
from mlip_md.trainer.loss import stage_at, weights_at
from mlip_md.trainer.metrics import Errors
from mlip_md.trainer.optimizer import learning_rate_schedule, lowered_rate, settle_steps
from mlip_md.trainer.parallel import REASONS, Team
from mlip_md.trainer.recipe import Origins, Recipe, StartConfig, dump_resolved, find_differences
from mlip_md.trainer.report import write_report
from mlip_md.trainer.resume import (
    TrainingProgress,
    check_same,
    identify,
    keep_shape,
    with_defaults,
)
from mlip_md.trainer.runlog import (
    Echo,
    RunLog,
    changed_versions,
    describe_environment,
    describe_epoch,
    describe_errors,
)
from mlip_md.trainer.step import (
    StepLog,
    TrainState,
    averaged_params,
    init_state,
    make_eval_step,
    make_train_step,
)

IN_FLIGHT = 2
"""Steps that may wait on the device; unbounded queues can deadlock and hold memory."""

SLOW = 2.0
"""Seconds; what a longer step has done is saved at once, and no step waits behind it. So a signal
is answered soon: a process may end while a step is computed, but not before one is saved."""

TELL_AFTER = 60.0
"""Seconds between lines about an epoch."""

OTHER_METHOD = 0.1
"""eV/atom; a parent that is farther from its new data was made with another method's."""

LOWER_RATES = (
    "lower optimizer.*_learning_rate and go on from the last checkpoint with --resume allow-changes"
)
"""What helps against numbers that are not finite."""

Resume = Literal["auto", "never", "must", "allow-changes"]
Tick = Callable[[int, int, int], None]
Waiting = tuple[int, np.ndarray, StepLog]
"""Number of a step, its structures and what it will tell."""


class BadStepsError(Exception):
    """Too many steps in a row gave NaN or infinity: their number, the last one, its structures.

    It never leaves a training, which goes back to a checkpoint.
    """


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        status: "done", or why it was interrupted: "terminated", "hangup", "keyboard", "time".
        folder: of the run.
        epoch: last epoch that was validated.
        errors: validation errors of the model in ``model.safetensors``.
        problem: why the model of a training that is done is of no use; empty if it is.
        test: errors on the test part of a training that is done; empty without one.
    """

    status: Literal["done", "terminated", "hangup", "keyboard", "time"]
    folder: Path
    epoch: int
    errors: Mapping[str, float]
    problem: str = ""
    test: Mapping[str, float] = dataclasses.field(default_factory=dict)


def _start(recipe: Recipe) -> StartConfig:
    return recipe.start or StartConfig(potential="")


def _labeled(errors: Errors) -> Errors:
    return {name: value for name, value in errors.items() if math.isfinite(value)}


class Trainer:
    """One run of a recipe on prepared data, in one folder."""

    def __init__(
        self,
        recipe: Recipe,
        data: TrainingData,
        folder: Path,
        *,
        parent: Potential | None = None,
        origins: Origins | None = None,
        echo: Echo | None = None,
        tick: Tick | None = None,
        team: Team | None = None,
    ) -> None:
        """Build the network and its first weights; nothing is written yet.

        Args:
            recipe: of the run.
            data: prepared training, validation and test sets.
            folder: of the run; made if needed.
            parent: potential to start from; ``recipe`` has its network, see
                ``finetune.adopt_network``. None draws the weights at random.
            origins: of the recipe's values, for ``config.resolved.yaml``.
            echo: called with every line of the log.
            tick: called after every step with epoch, batches done and batches of the epoch.
            team: devices that train, see ``parallel.gather``; None is JAX's default one.

        Raises:
            ConfigError: if the recipe starts from a potential and none is given.
        """
        if parent is None and recipe.start is not None:
            raise ConfigError(
                f"the recipe starts from {recipe.start.potential}; hand that potential over as "
                "parent, and the recipe as finetune.adopt_network gives it"
            )
        if parent is not None:
            data = adopt_elements(data, parent, _start(recipe).atomic_energies == "keep")
        data = keep_shape(data, recipe, folder)
        self.recipe, self.data, self.folder, self.parent = recipe, data, folder, parent
        self.team = team = team or Team()
        self.origins = origins or Origins()
        statistics = data.statistics
        network = build_network(
            recipe.network,
            num_species=len(statistics.elements),
            elements=statistics.elements,
            cutoff=recipe.data.cutoff,
            avg_num_neighbors=statistics.avg_num_neighbors,
            avg_r_min=statistics.avg_r_min,
            **({} if parent is None else {"radial_scale": parent.radial_scale}),
        )
        steps = len(data.plan(recipe.seed, 1))
        self.unreached = find_unreached(recipe, steps)
        self.optimizer = settle_steps(recipe.optimizer, steps, recipe.train.epochs)
        settled = recipe.model_copy(update={"optimizer": self.optimizer})
        # First, because they look whether this process and its compiler can compute.
        scaling = {}
        if parent is not None:
            scaling = {n: getattr(parent, n) for n in ("scaling_mean", "scaling_stdev")}
        self.train_step = make_train_step(network.apply, settled, mesh=team.mesh, **scaling)
        self._make_eval_step = functools.partial(
            make_eval_step, network.apply, dtype=recipe.train.precision, **scaling
        )
        self.eval_step = self._make_eval_step(mesh=team.mesh)
        example = data.example()
        # jit leaves the forward pass out and compiles the rest once instead of piece by piece
        draw = functools.partial(draw_weights, network, recipe.network)
        key = jax.random.key(recipe.seed)
        with precision("float32", find_device(None).platform):  # a seed's weights are its weights
            if parent is None:
                params = jit(draw)(key, example.graph)
            else:
                nearest = _start(recipe).new_elements == "nearest"
                params = starting_weights(parent, statistics.elements, nearest, key, example.graph)
        with self.computing():
            self.state = team.everywhere(init_state(settled, params))
        self.progress = TrainingProgress()
        self.checkpoints = CheckpointFolder(folder / "checkpoints", recipe.checkpoint.keep_latest)
        self.log = RunLog(folder, echo, writes=team.leads)
        self.interruptions = Interruptions()
        self.loggers: list[Logger] = []
        self._tick = tick
        self._last_save = self._told = time.monotonic()
        self.load, self.device = self._describe_load(), find_device(None)
        self._needed: int | None = None  # bytes of a step, known when it is compiled
        self._done = self._saved = 0  # last good step, and the last one on the disk
        self._long_validation = True  # until it is known: the first one compiles
        self._asked: tuple[int, Reason] | None = None  # step in which a process asked all to stop
        self._fault: BadStepsError | None = None

    def computing(self) -> AbstractContextManager[None]:
        """The precision of the run, around whatever calls its steps or touches its state."""
        return precision(self.recipe.train.precision, find_device(None).platform)

    def batches(
        self, epoch: int, done: int = 0, plan: Sequence[np.ndarray] | None = None
    ) -> Iterator[tuple[np.ndarray, Batch]]:
        """What the steps of an epoch are made with, see ``TrainingData.batches``.

        Args:
            epoch: from 1.
            done: batches to leave out at the start.
            plan: of the epoch, if it is known already.
        """
        recipe = self.recipe
        plan = self.data.plan(recipe.seed, epoch) if plan is None else plan
        parts = self.data.batches(
            plan, recipe.seed, epoch, done, recipe.train.precision, _start(recipe).replay_weight,
            self.team.shares,
        )  # fmt: skip
        for indices, batch in parts:
            yield indices, self.team.spread(batch)

    @property
    def unsaved(self) -> bool:
        """Whether steps are computed that no checkpoint holds; may be asked in any thread."""
        return self._done > self._saved

    @property
    def num_parameters(self) -> int:
        """Number of trainable weights."""
        return sum(int(np.size(leaf)) for leaf in jax.tree_util.tree_leaves(self.state.params))

    def run(self, resume: Resume = "auto", max_seconds: float = math.inf) -> Outcome:
        """Train to the end of the recipe, or until interrupted.

        Args:
            resume: "auto" continues if there is a checkpoint, "must" demands one, "never" demands
                a folder without; "allow-changes" is "auto", also with another recipe if nothing but
                rows of ``CHANGEABLE`` differs.
            max_seconds: after this time the state is saved and the run ends as "time".

        Returns:
            How it ended. After SIGTERM, SIGHUP, SIGINT or the time limit the state is saved.

        Raises:
            CheckpointError: if ``resume`` does not fit the folder.
            OutputError: if a file cannot be written.
            OwnershipError: if another training goes on in the folder.
            NonFiniteError: if too many steps in a row gave NaN or infinity.
        """
        self.team.first(functools.partial(self.folder.mkdir, parents=True, exist_ok=True))
        own = owning(self.folder) if self.team.leads else contextlib.nullcontext()
        with own, self.computing():
            outcome = self._run(resume, max_seconds)
            self.team.wait("the end of a run")
            return outcome

    def _run(self, resume: Resume, max_seconds: float) -> Outcome:
        """``run`` in a folder that is ours."""
        self._begin(resume)
        for line in self.team.lines():
            self.log.line(line)
        with (
            self._open_loggers() as self.loggers,
            Interruptions(*ENDINGS, max_seconds=max_seconds) as self.interruptions,
        ):
            if not self.checkpoints.files():
                self._save()  # before anything that can go wrong or be interrupted
            if self.progress.validated < 0:
                self._look_at_parent(self._validate(0, self.state.params)[0])
            while self.progress.epoch <= self.recipe.train.epochs and not self.progress.stopped:
                try:
                    finished = self._train_epoch()
                except BadStepsError as fault:
                    self._roll_back(fault)
                    continue
                if not finished:
                    return self._interrupted()
                self._finish_epoch()
            return self._finish()

    def _open_loggers(self) -> AbstractContextManager[list[Logger]]:
        if not self.team.leads:
            return contextlib.nullcontext([])
        return open_loggers(self.recipe, self.folder, self.progress.step)

    def _begin(self, resume: Resume) -> None:
        found = self._restore(functools.partial(self._find_checkpoint, resume))
        if found is not None:
            self._continue(*found)
            return
        self.log.truncate(-1, -1)
        self._describe_run()
        self.log.line(
            f"{self.recipe.name}: {self.recipe.model['kind']} with {self.num_parameters:,} "
            f"weights; {self.data.summary()}"
        )
        if self.parent is not None:
            name = self.parent.info.get("name", "a potential")
            self.log.line(
                f"starts from {name} ({self.parent.sha256[:12]}); E0: "
                f"{self.data.statistics.atomic_energies_source}"
            )
        for line in self.unreached:
            self.log.line(f"Warning: {line}")

    def _find_checkpoint(self, resume: Resume) -> tuple[TrainState, dict[str, Any]] | None:
        """What a run begins with; None if at the start."""
        if resume == "never":
            if self.checkpoints.files():
                raise CheckpointError(
                    f"{self.folder} holds checkpoints of an earlier run; choose another folder, or "
                    "continue it with --resume auto"
                )
            return None
        allow, now = resume == "allow-changes", self._identity()
        found = self.checkpoints.restore(
            self.state, lambda saved: check_same(saved["recipe"], now, self.folder, allow)
        )
        if found is None and resume == "must":
            raise CheckpointError(f"{self.folder} holds no checkpoint to resume from")
        return found

    def _restore(
        self, find: Callable[[], tuple[TrainState, dict[str, Any]] | None]
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """A checkpoint that process 0 finds, in all of them."""
        state = self.state

        def progress() -> dict[str, Any] | None:
            nonlocal state
            found = find()
            if found is None:
                return None
            state = found[0]
            return found[1]

        saved = self.team.first(progress)
        return None if saved is None else (self.team.everywhere(state), saved)

    def _continue(self, state: TrainState, saved: dict[str, Any]) -> None:
        """Take up the state and the progress of a checkpoint."""
        self._take_up(state, saved)
        if not self.team.leads:
            return
        changes = find_differences(with_defaults(saved["recipe"]), self._identity())
        step, epoch = self.progress.step, self.progress.epoch
        versions = changed_versions(self.folder / "environment.json")
        self._describe_run()
        self.log.event("resumed", step=step, epoch=epoch, changes=changes)
        words = [f"{name} {before} -> {now}" for name, (before, now) in changes.items()]
        with_changes = f", with {', '.join(words)}" if words else ""
        self.log.line(f"resumed at epoch {epoch}, step {step}{with_changes}")
        if versions:
            self.log.line(f"other versions than before: {', '.join(versions)}")

    def _take_up(self, state: TrainState, saved: Mapping[str, Any]) -> None:
        if self.team.mesh is None:  # else it has memory of its own
            state = jax.tree_util.tree_map(jax.numpy.array, state)
        self.state = state
        values = {name: value for name, value in saved.items() if name != "recipe"}
        self.progress = TrainingProgress(**values)
        self._done = self._saved = self.progress.step
        self.log.truncate(self.progress.step, self.progress.validated)

    def _identity(self) -> dict[str, Any]:
        parent = {} if self.parent is None else {"parent": self.parent.sha256}
        return {**identify(self.recipe, self.data), **parent}

    def _describe_run(self) -> None:
        if not self.team.leads:
            return
        for name, text in {
            "config.resolved.yaml": dump_resolved(self.recipe, self.origins),
            "environment.json": json.dumps(describe_environment(), indent=1),
            "data.json": json.dumps(self.data.description(), indent=1),
        }.items():
            write_text(self.folder / name, text)

    def _train_epoch(self) -> bool:
        """Train the rest of the present epoch; False if interrupted (the state is saved then)."""
        progress, data = self.progress, self.data
        plan = data.plan(self.recipe.seed, progress.epoch)
        count = len(plan)
        weights = weights_at(self.recipe.loss, progress.epoch)
        lowers = self.optimizer.schedule == "plateau" or progress.rate != 1.0
        rate = np.float32(progress.rate) if lowers else None
        waiting: collections.deque[Waiting] = collections.deque()
        clock = begun = time.monotonic()
        slow = True  # until it is known
        for indices, batch in self.batches(progress.epoch, progress.batch, plan):
            log = self.step(batch, weights, *self._besides(rate))
            progress.batch += 1
            progress.step += 1
            waiting.append((progress.step, indices, log))
            self._note_until(waiting, 0 if slow else IN_FLIGHT)
            self._raise_fault(progress.step)
            slow, begun = time.monotonic() - begun > SLOW, time.monotonic()
            if self._tick is not None:
                self._tick(progress.epoch, progress.batch, count)
            elif time.monotonic() - self._told > TELL_AFTER:
                self._tell_progress(count, time.monotonic() - clock)
            stop = self._stopping() is not None
            if stop or (slow and self.unsaved) or self._checkpoint_due():
                self._note_until(waiting, 0)
                progress.add(seconds=time.monotonic() - clock)
                self._save()
                clock = begun = time.monotonic()
            if stop:
                return False
        self._note_until(waiting, 0)
        self._raise_fault()
        progress.add(seconds=time.monotonic() - clock)
        if self._long_validation and self.unsaved:
            self._save()
        return True

    def _note_until(self, waiting: collections.deque[Waiting], left: int) -> None:
        """Record the oldest of the steps that wait, until so many are left."""
        while len(waiting) > left:
            self._note(*waiting.popleft())

    def _note(self, step: int, indices: np.ndarray, log: StepLog) -> None:
        """Wait for a step and record it under its number."""
        with naming_out_of_memory(self.load, self.device, self._needed):
            loss, norm, bad = float(log.loss), float(log.gradient_norm), int(log.bad_in_row)
        self.progress.add(structures=float(log.structures))
        if bad == 0:
            self._done = step
            self.progress.add(loss=loss, gradient_norm=norm, good=1)
        else:
            names = self.data.names(indices)
            self.log.event("bad_step", step=step, structures=names)
            self.log.line(f"a step gave NaN or infinity and was not applied (batch: {names[0]}, …)")
        if bad >= self.recipe.faults.max_bad_steps_in_row:
            self._fault = self._fault or BadStepsError(bad, step, indices)
            if self.team.processes == 1:
                self._raise_fault()
        if log.asked is not None and self._asked is None and (code := int(log.asked)):
            self._asked = step, REASONS[code - 1]
        if step % self.recipe.log.every_steps == 0:
            self.log.event("step", step=step, epoch=self.progress.epoch, loss=loss, norm=norm)

    def _raise_fault(self, step: float = math.inf) -> None:
        """Go back after bad steps; processes hear of a step sooner or later, and go back together.

        Args:
            step: the last that is begun.
        """
        if self._fault is not None and step >= self._fault.args[1] + IN_FLIGHT:
            fault, self._fault = self._fault, None
            raise fault

    def _besides(self, rate: np.float32 | None) -> tuple[Any, ...]:
        """What a step takes besides: a factor on the learning rate, what processes ask."""
        if self.team.processes > 1:
            return rate, self.team.asking(self.interruptions.reason)
        return () if rate is None else (rate,)

    def _stopping(self) -> Reason | None:
        """Why to stop after this step: all processes after the same, when all have heard of it."""
        if self.team.processes == 1:
            return self.interruptions.reason
        if self._asked is None or self.progress.step < self._asked[0] + IN_FLIGHT:
            return None
        return self._asked[1]

    def _tell_progress(self, count: int, seconds: float) -> None:
        """A line about a long epoch, where no bar moves."""
        progress, self._told = self.progress, time.monotonic()
        spent = progress.sums.get("seconds", 0.0) + seconds
        epochs = self.recipe.train.epochs - progress.epoch + 1 - progress.batch / count
        left = datetime.timedelta(seconds=round(spent / progress.batch * count * epochs))
        self.log.line(
            f"epoch {progress.epoch:4d}  batch {progress.batch} of {count}; {left} to the end of "
            f"epoch {self.recipe.train.epochs}"
        )

    def step(self, *arguments: Any) -> StepLog:
        """Change the state by one step; before the first, look whether it fits into the memory.

        Args:
            arguments: of ``train_step``, without the state.

        Raises:
            CapacityError: if it does not fit.
        """
        if self._needed is None:
            with naming_out_of_memory(self.load, self.device):
                self._needed = plan_memory(self.train_step, self.state, *arguments) or 0
            check_memory(self.load, self.device, self._needed)
        with naming_out_of_memory(self.load, self.device, self._needed):
            self.state, log = self.train_step(self.state, *arguments)
        return log

    def _describe_load(self) -> Load:
        """What a step computes, and how to make it smaller."""
        budgets = [b for b in (self.data.budget, self.data.replay_budget) if b is not None]
        graphs, nodes, edges = (
            sum(getattr(b, name) for b in budgets) for name in ("n_graph", "n_node", "n_edge")
        )
        structures = graphs - len(budgets)
        return Load(
            f"steps of {structures} structures in {nodes} atoms and {edges} edges",
            structures,
            "structures",
            "lower data.batch_size (and raise optimizer.num_gradient_accumulation_steps by as "
            "much), data.max_n_node or data.max_n_edge",
            sum(leaf.nbytes for leaf in jax.tree_util.tree_leaves(self.state)),
        )

    def _roll_back(self, fault: BadStepsError) -> None:
        """Write the batch out, go back to the last checkpoint and go on with a lower rate."""
        bad, step, indices = fault.args
        path = self.folder / f"bad-step-{step}.extxyz"
        written = self.team.first(lambda: str(write_structures(self.data.train, indices, path)))
        names, settings = ", ".join(self.data.names(indices)), self.recipe.faults
        if self.progress.rollbacks >= settings.rollbacks:
            raise NonFiniteError(
                f"{bad} steps in a row gave NaN or infinity, up to step {step}. The last batch, "
                f"written to {written}, holds {names}. Check these labels, or {LOWER_RATES}"
            )
        found = self._restore(lambda: self.checkpoints.restore(self.state))
        if found is None:
            raise CheckpointError(f"{self.folder} holds no checkpoint to go back to")
        rate, rollbacks = self.progress.rate * settings.rate_factor, self.progress.rollbacks + 1
        self._take_up(*found)
        self.progress.rate, self.progress.rollbacks = rate, rollbacks
        self._save()
        self.log.event("rolled_back", step=self.progress.step, from_step=step, rate=rate)
        self.log.line(
            f"{bad} steps in a row gave NaN or infinity; the last batch is in {written}. Back to "
            f"step {self.progress.step}, learning rate times {rate:.4g}"
        )

    def _checkpoint_due(self) -> bool:
        minutes = (time.monotonic() - self._last_save) / 60
        settings = self.recipe.checkpoint
        return self.progress.step % settings.every_steps == 0 or minutes >= settings.every_minutes

    def _save(self) -> None:
        if self.team.leads:
            values = dataclasses.asdict(self.progress)
            values["recipe"] = self._identity()
            self.checkpoints.save(self.state, values, self.progress.step)
        self._done = self._saved = self.progress.step
        self._last_save = time.monotonic()

    def _validate(self, epoch: int, params: Params) -> tuple[Errors, dict[str, Errors], float]:
        """Errors of weights, whole and by set, and their score, recorded under an epoch."""
        begun = time.monotonic()
        errors = evaluate_sets(self.eval_step, params, self.data, self.team)
        self._long_validation = time.monotonic() - begun > SLOW
        row = self._row(epoch, *errors)
        self.log.epoch(row)
        for logger in self.loggers:
            logger(row)
        self.log.line(describe_epoch(row))
        for name, values in errors[1].items():
            self.log.line(f"  {name}: {describe_errors(values)}")
        if not math.isfinite(row["score"]):
            raise NonFiniteError(
                f"the validation errors after epoch {epoch} are not finite. Check the validation "
                f"labels, or {LOWER_RATES}"
            )
        self.progress.validated = epoch
        return *errors, row["score"]

    def _row(self, epoch: int, errors: Errors, by_set: Mapping[str, Errors]) -> dict[str, float]:
        """The row of an epoch in ``metrics.csv``."""
        sums, weights = self.progress.sums, weights_at(self.recipe.loss, epoch)
        good = sums.get("good", math.nan)
        rate = learning_rate_schedule(self.optimizer)(self.progress.step) * self.progress.rate
        return {
            "epoch": epoch,
            "step": self.progress.step,
            "stage": stage_at(self.recipe.loss, epoch),
            "loss": sums.get("loss", math.nan) / good,
            "gradient_norm": sums.get("gradient_norm", math.nan) / good,
            "learning_rate": float(rate),
            "energy_weight": float(weights.energy),
            "forces_weight": float(weights.forces),
            "bad_steps": int(self.state.bad_steps),
            "seconds": round(sums.get("seconds", 0.0), 3),
            "structures_per_second": sums.get("structures", 0.0)
            / (sums.get("seconds") or math.nan),
            "score": self._score(by_set.get(self.recipe.train.select_by or "", errors)),
            **{f"validation_{name}": value for name, value in errors.items()},
            **{
                f"validation_{name}_{error}": value
                for name, values in by_set.items()
                for error, value in values.items()
            },
        }

    def _score(self, errors: Errors) -> float:
        """Of the weights with these validation errors; the lowest is the best model's."""
        settings, trained = self.recipe.train, self.recipe.loss.trains_stress
        return metrics.selection_score(
            errors,
            settings.select_energy_weight,
            self.data.validates_forces(settings.select_by),
            settings.select_stress_weight if trained else 0.0,
        )

    def _finish_epoch(self) -> None:
        progress, epoch = self.progress, self.progress.epoch
        params = averaged_params(self.state, self.recipe.train.ema_decay, self.optimizer)
        errors, by_set, score = self._validate(epoch, params)
        errors = _labeled(errors)
        sets = {name: _labeled(values) for name, values in by_set.items()}
        stage = str(stage_at(self.recipe.loss, epoch))
        best = progress.best.get(stage)
        if best is None or score < best["score"]:
            progress.best[stage] = {"epoch": epoch, "score": score, "errors": errors}
            training = {"epoch": epoch, "validation": errors, "validation_sets": sets}
            if self.team.leads:
                potential = self.make_potential(params, training)
                for name in (f"best-stage{stage}.safetensors", "model.safetensors"):
                    own.save(potential, self.folder / name)
            self.log.event("best", step=progress.step, epoch=epoch, stage=stage, score=score)
        self._judge_progress(epoch - progress.best[stage]["epoch"])
        progress.epoch, progress.batch, progress.sums = epoch + 1, 0, {}
        self._save()

    def _look_at_parent(self, errors: Mapping[str, float]) -> None:
        """Say so where the parent's energies are those of another method."""
        wrong = errors["energy_mae_per_atom"]
        if self.parent is not None and wrong > OTHER_METHOD:
            self.log.line(
                f"Warning: the parent's energies are {wrong:.2g} eV/atom away from the data's. The "
                "levels of theory differ, or E0: start.atomic_energies: refit may be meant"
            )

    def _judge_progress(self, stale: int) -> None:
        """Lower the learning rate, or end early, where nothing got better for some epochs."""
        progress, patience = self.progress, self.recipe.train.patience
        rate = lowered_rate(
            self.optimizer, min(stale, progress.epoch - progress.lowered), progress.rate
        )
        if rate != progress.rate:
            progress.rate, progress.lowered = rate, progress.epoch
            self.log.line(f"no better model for {stale} epochs: learning rate times {rate:.4g}")
        last = stage_at(self.recipe.loss, self.recipe.train.epochs)
        ended = stage_at(self.recipe.loss, progress.epoch) == last
        if patience is not None and ended and stale >= patience:
            progress.stopped = True
            self.log.line(f"no better model for {stale} epochs (train.patience): the end")

    def make_potential(self, params: Params, training: Mapping[str, Any]) -> Potential:
        """The potential with some weights, with all provenance.

        Args:
            params: weights.
            training: plain values to record: epoch, errors.
        """
        data, statistics = self.data, self.data.statistics
        return Potential(
            config=self.recipe.network,
            params=jax.tree_util.tree_map(lambda p: np.asarray(p, np.float32), params),
            elements=statistics.elements,
            atomic_energies=statistics.atomic_energies,
            cutoff=self.recipe.data.cutoff,
            avg_num_neighbors=statistics.avg_num_neighbors,
            avg_r_min=statistics.avg_r_min,
            **self._inherited(),
            info={
                **({} if self.parent is None else {"parent": describe_parent(self.parent)}),
                "name": self.recipe.name,
                "description": self.recipe.description,
                "units": {"energy": "eV", "length": "Å", "forces": "eV/Å"},
                "made_with": f"mlip-md {mlip_md.__version__}",
                "recipe": self.recipe.plain(),
                "data": data.description(),
                "training": dict(training),
            },
        )

    def _inherited(self) -> dict[str, Any]:
        """What stays of the parent besides its network."""
        if self.parent is None:
            return {}
        names = ("scaling_mean", "scaling_stdev", "radial_scale")
        return {name: getattr(self.parent, name) for name in names}

    def _interrupted(self) -> Outcome:
        reason = self._stopping() or "terminated"
        self.log.line(
            f"interrupted ({reason}) at epoch {self.progress.epoch}, step {self.progress.step}; "
            "the state is saved, the same command continues"
        )
        errors = self.progress.last_best().get("errors", {})
        return Outcome(reason, self.folder, self.progress.validated, errors)

    def _finish(self) -> Outcome:
        best = self.progress.last_best()
        if not self.team.leads:
            return Outcome("done", self.folder, self.progress.validated, best["errors"])
        self.log.line(
            f"done; the best model of the last stage is of epoch {best['epoch']}, "
            f"in {self.folder / 'model.safetensors'}"
        )
        self._compare_stages(best)
        problem = self._judge_model(best["errors"])
        if problem:
            self.log.line(f"Warning: {problem}")
        part, evaluation = write_report(
            self.folder,
            self.eval_step if self.team.mesh is None else self._make_eval_step(),
            self.data,
            self.recipe.log.plots,
            problem,
            self.recipe.train.precision,
        )
        test = evaluation.overall if part == "test" else {}
        if test:
            errors = " ".join(describe_errors(test).split())
            self.log.line(f"test errors of {int(test['structures'])} structures: {errors}")
        self.log.line(f"errors, data and use of the model are in {self.folder / 'card.md'}")
        return Outcome("done", self.folder, self.progress.validated, best["errors"], problem, test)

    def _compare_stages(self, last: Mapping[str, Any]) -> None:
        """Say so where an earlier stage of the loss weights had a better model than the last."""
        stage, best = min(self.progress.best.items(), key=lambda item: float(item[1]["score"]))
        if best["score"] < last["score"]:
            self.log.line(
                f"stage {stage} had a better one by its score, {best['score']:.4g} eV/Å (epoch "
                f"{best['epoch']}) against {last['score']:.4g}; the last stage counts, because its "
                f"weights of the loss are those meant for the end. The other is in "
                f"{self.folder / f'best-stage{stage}.safetensors'}"
            )

    def _judge_model(self, errors: Mapping[str, float]) -> str:
        """Why a model with these validation errors is of no use; empty if it is."""
        reached = errors.get("forces_rmse", math.nan)  # without labels of forces
        if not reached >= (nothing := self.data.validation.forces_rms()) > 0:
            return ""
        return (
            f"the best model's forces are {1e3 * reached:.0f} meV/Å wrong (rmse, validation); "
            f"forces of zero would be {1e3 * nothing:.0f}. The network learned nothing: look "
            "at the learning rates, the weights of the loss and the labels' units"
        )
