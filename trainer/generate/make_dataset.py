"""Make a labeled data set from a seed: sample by GFN2-xTB, label, write SPICE's layout."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from mlip_md.constants import BOHR
from mlip_md.errors import ConfigError, DataError
from mlip_md.files import check_new_folder, write_text
from mlip_md.trainer.generate import dissociation, labels, sampling, spice_file
from mlip_md.trainer.generate.chemistry import ELEMENTS, Molecule, Sample
from mlip_md.trainer.generate.plan import (
    DISSOCIATION,
    SUBSETS,
    Task,
    make_generator,
    plan_tasks,
)

RECIPE_VERSION = "2"
MAX_FORCE = 30.0
"""eV/Å on one atom; harder structures are dropped."""
MAX_FORCE_WRONG = 60.0
"""The same in the subsets that are there for what should not happen."""
SNAPSHOT_SECONDS = 300.0

logger = logging.getLogger(__name__)


def make_dataset(
    output: str | Path,
    *,
    seed: int = 0,
    method: str = "gfn2",
    workers: int | None = None,
    scale: float = 1.0,
    subsets: Sequence[str] | None = None,
    max_atoms: int | None = None,
    shares: Mapping[str, float] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> Path:
    """Make a data set in the layout of SPICE 2 from the molecules of this package.

    Finished groups are kept in the folder `<output>.parts` until the file is complete, so a
    killed run continues where it stopped and gives the same file. Every five minutes, and when
    interrupted, the file holds what is finished, with the root attribute `complete` false.
    The same seed gives the same file on the same machine and versions, whatever `workers` is.

    Args:
        output: HDF5 file to write.
        seed: decides molecules, geometries and splits.
        method: "gfn2" (tblite) or "wb97m-d3bj" (pyscf, slow; geometries still by GFN2-xTB).
        workers: number of processes of one thread each; the number of usable cores when None.
        scale: factor on the size of the data set.
        subsets: which parts to make, names of `plan.SUBSETS`; all when None.
        max_atoms: leave out larger structures.
        shares: a further factor for single subsets, by name; 0 leaves one out.
        resume: continue an interrupted run; False starts afresh and replaces the file.
        progress: show progress.

    Returns:
        The path of the file.

    Raises:
        ConfigError: an option is not allowed.
        DataError: a program is missing, there is nothing to make, or the file or unfinished run
            there is another one.
        OutputError: the file system refuses.
    """
    level = labels.find_method(method)
    from rdkit.rdBase import BlockLogs  # there now

    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, received {workers}")
    subsets = _subsets_of(level, subsets)
    with BlockLogs():  # random decorations that make no molecule are no news
        tasks = plan_tasks(seed, scale, subsets, max_atoms, shares)
    output = Path(output)  # bad options touch no file
    settings = _settings(seed, method, scale, subsets, max_atoms, shares)
    if output.is_dir():
        raise ConfigError(f"make-dataset {output} is a folder; name a file")
    if resume and _is_finished(output, settings):
        logger.info("%s is complete already", output)
        return output
    parts = output.with_name(output.name + ".parts")
    check_new_folder(parts, "make-dataset")
    if not resume:
        output.unlink(missing_ok=True)
    _open_parts(parts, settings, resume)
    attributes = {**settings, **labels.describe_method(level), **_notes()}
    run = _Run(tasks, parts, output, attributes, method, seed, progress)
    run.execute(workers or _usable_cores())
    shutil.rmtree(parts)
    return output


def sample_task(task: Task, seed: int) -> Sample:
    """The conformations of one task.

    Raises:
        DataError: a molecule could not be embedded.
    """
    rng = make_generator(seed, "sample", task.name)
    if task.kind == "molecule":
        return sampling.sample_molecule(task.smiles[0], rng)
    if task.kind == "complex":
        return sampling.sample_complex(task.smiles, rng)
    if task.kind == "water":
        return sampling.sample_water(task.num_waters, task.num_starts, rng)
    if task.kind == "solvated":
        return sampling.sample_solvated(task.smiles[0], task.num_waters, rng)
    if task.kind == "pressed":
        return sampling.sample_pressed(task.smiles, task.num_waters, rng)
    if task.kind == "atoms":
        return dissociation.sample_atoms(task.smiles, rng)
    if task.kind == "dissociation":
        return dissociation.sample_dissociation(task.smiles[0], rng)
    return dissociation.sample_separation(task.smiles, rng)


def label_task(task: Task, seed: int, label: labels.Label) -> spice_file.LabeledGroup:
    """Sample and label one task; structures without a usable label are dropped and counted.

    The label belongs to the geometry as it is stored, rounded to float32 bohr.
    """
    kept: list[spice_file.LabeledConformation] = []
    dropped: Counter[str] = Counter()
    group = (task.name, task.subset, task.split)
    try:
        molecule, conformations = sample_task(task, seed)
    except DataError:
        return spice_file.LabeledGroup(*group, None, kept, {"not embedded": 1})
    for one in conformations:
        positions = (one.positions / BOHR).astype(np.float32)
        try:
            energy, gradient = _label_usably(task, label, molecule, positions)
        except labels.LabelError as error:
            dropped[error.reason] += 1
        else:
            kept.append(spice_file.LabeledConformation(positions, energy, gradient, one.origin))
    return spice_file.LabeledGroup(*group, molecule, kept, dropped)


def _label_usably(
    task: Task, label: labels.Label, molecule: Molecule, positions: np.ndarray
) -> tuple[float, np.ndarray]:
    apart = task.subset in DISSOCIATION
    if apart:
        found = dissociation.label_fragments(
            label, molecule.atomic_numbers, positions, molecule.charge
        )
    else:
        found = label(molecule.atomic_numbers, positions, molecule.charge, 0)
    if not (np.isfinite(found.energy) and np.all(np.isfinite(found.gradient))):
        raise labels.LabelError("a label is not finite", "not finite")
    largest = np.linalg.norm(found.gradient, axis=-1).max() * labels.FORCE_UNIT
    if largest > (MAX_FORCE_WRONG if apart or task.kind == "pressed" else MAX_FORCE):
        raise labels.LabelError("a force is too large", "force too large")
    return found.energy, found.gradient


@dataclass
class _Run:
    """Fills the folder of shards with processes and merges them."""

    tasks: list[Task]
    parts: Path
    output: Path
    attributes: dict[str, object]
    method: str
    seed: int
    progress: bool

    def execute(self, workers: int) -> None:
        pending = [t for t in self.tasks if not self._shard(t).exists()]
        logger.info("%d groups, %d of them to do", len(self.tasks), len(pending))
        done = len(self.tasks) - len(pending)
        try:
            with _GroupCounter(self.progress, len(self.tasks), done) as tick:
                self._label_all(pending, workers, tick)
        except BaseException:
            self._merge(complete=False)
            raise
        self._merge(complete=True)

    def _label_all(self, pending: list[Task], workers: int, tick: Callable[[], None]) -> None:
        # spawn: a child must load tblite only after its thread count is set
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker)
        try:
            energies = pool.submit(_work_atoms, self.method).result()
            self.attributes["atomic_energies_hartree"] = json.dumps(energies)
            queue, running, last = list(reversed(pending)), set[Future[None]](), time.monotonic()
            while queue or running:
                while queue and len(running) < 2 * workers:
                    job = (queue[-1], self._shard(queue.pop()), self.seed, self.method, energies)
                    running.add(pool.submit(_work, *job))
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    tick()
                if time.monotonic() - last > SNAPSHOT_SECONDS:
                    self._merge(complete=False)
                    last = time.monotonic()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process ended unexpectedly (killed, or out of memory); "
                "what is finished is kept: run the same command again, perhaps with fewer workers"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _shard(self, task: Task) -> Path:
        return spice_file.shard_path(self.parts, task.name)

    def _merge(self, *, complete: bool) -> None:
        shards = [path for path in map(self._shard, self.tasks) if path.exists()]
        if shards:
            attributes = {**self.attributes, "complete": complete}
            spice_file.merge_shards(shards, self.output, attributes)


def _start_worker() -> None:
    """One thread per library, set before any of them is loaded; Ctrl-C is the parent's affair."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    """End this child when its parent was killed: the queues of the pool would keep it waiting."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work_atoms(method: str) -> dict[int, float]:
    return labels.compute_atomic_energies(labels.METHODS[method].label)


def _work(task: Task, path: Path, seed: int, method: str, energies: dict[int, float]) -> None:
    from rdkit.rdBase import BlockLogs

    with BlockLogs():
        group = label_task(task, seed, labels.METHODS[method].label)
    spice_file.write_shard(path, group, energies)


def _subsets_of(level: labels.Method, subsets: Sequence[str] | None) -> Sequence[str]:
    """The subsets asked for, or those that the method can label.

    Raises:
        ConfigError: one is asked for that it cannot label.
    """
    if level.dissociates:
        return subsets or SUBSETS
    if wrong := [name for name in subsets or () if name in DISSOCIATION]:
        raise ConfigError(
            f"{level.level_of_theory} closed-shell labels are wrong where bonds break: "
            f"leave out {', '.join(wrong)}, or use the method gfn2"
        )
    return subsets or [name for name in SUBSETS if name not in DISSOCIATION]


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _settings(
    seed: int,
    method: str,
    scale: float,
    subsets: Sequence[str],
    max_atoms: int | None,
    shares: Mapping[str, float] | None,
) -> dict[str, object]:
    """What must agree between an unfinished run and the one that continues it."""
    return {
        "recipe": f"mlip-md make-dataset, recipe {RECIPE_VERSION}",
        "seed": seed,
        "method": method,
        "scale": float(scale),
        "subsets": json.dumps("all" if set(subsets) == set(SUBSETS) else list(subsets)),
        "max_atoms": -1 if max_atoms is None else max_atoms,
        "shares": json.dumps(dict(shares or {}), sort_keys=True),
        "sampling": (
            f"GFN2-xTB (tblite {metadata.version('tblite')}), RDKit {metadata.version('rdkit')}"
        ),
    }


def _notes() -> dict[str, object]:
    return {
        "script_version": f"mlip-md {metadata.version('mlip-md')}, recipe {RECIPE_VERSION}",
        "atomic_energies_note": (
            "formation_energy = dft_total_energy - sum of atomic_energies_hartree (isolated "
            "neutral ground-state atoms by the same method), for ions too"
        ),
        "atomic_unpaired_electrons": json.dumps(
            {z: element.unpaired_electrons for z, element in ELEMENTS.items()}
        ),
        "dissociation_note": (
            f"subsets {', '.join(DISSOCIATION)}: neutral groups of atoms farther apart than "
            f"{dissociation.SEPARATE} A are labeled one by one and summed; structures are left out "
            f"where a group farther than {dissociation.APART} A from the others has a charge above "
            f"{dissociation.MAX_TRANSFER} e"
        ),
        "gradient_note": "dft_total_gradient is the gradient; force = -gradient",
        "split_note": (
            "attribute split of each group: by a hash of (seed, canonical SMILES without "
            "stereochemistry); complexes are held out if one molecule is; molecules of at most "
            "two heavy atoms are always train; water clusters by their number of molecules"
        ),
    }


def _is_finished(output: Path, settings: dict[str, object]) -> bool:
    if not output.exists():
        return False
    found = spice_file.read_attributes(output)
    _compare(found, settings, output)
    return bool(found.get("complete"))


def _open_parts(parts: Path, settings: dict[str, object], resume: bool) -> None:
    manifest = parts / "settings.json"
    if parts.exists() and not resume:
        shutil.rmtree(parts)
    if manifest.exists():
        _compare(json.loads(manifest.read_text(encoding="utf-8")), settings, parts)
    else:
        parts.mkdir(parents=True, exist_ok=True)
        write_text(manifest, json.dumps(settings, indent=1))


def _compare(found: Mapping[str, object], settings: Mapping[str, object], path: Path) -> None:
    for key, value in settings.items():
        if found.get(key) != value:
            raise DataError(
                f"{path} was made with {key} = {found.get(key)!r}, this run has {value!r}; "
                "use the same options, another output, or --no-resume to start afresh"
            )


class _GroupCounter:
    """A bar on a terminal, else a line every half minute; calling it counts one group."""

    def __init__(self, show: bool, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        console = Console(stderr=True)
        self._bar: Progress | None = None
        if show and console.is_terminal:
            columns = ("groups", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=console)
            self._row = self._bar.add_task("groups", total=total, completed=done)
        self._show, self._total, self._done = show, total, done
        self._start = self._last = time.monotonic()

    def __enter__(self) -> _GroupCounter:
        if self._bar is not None:
            self._bar.start()
        return self

    def __call__(self) -> None:
        self._done += 1
        now = time.monotonic()
        if self._bar is not None:
            self._bar.advance(self._row)
        elif self._show and (now - self._last > 30 or self._done == self._total):
            self._last = now
            logger.info("%d of %d groups after %.0f s", self._done, self._total, now - self._start)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()
