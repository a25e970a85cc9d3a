"""Make a labeled data set from a seed: sample by GFN2-xTB, label, write SPICE's layout."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path

import numpy as np

import mlip_md
from mlip_md.errors import ConfigError, DataError
from mlip_md.trainer.generate import labels, sampling, spice_file
from mlip_md.trainer.generate.chemistry import Molecule, require_rdkit
from mlip_md.trainer.generate.plan import Task, generator, plan

RECIPE_VERSION = "1"
MAX_FORCE = 30.0  # eV/Å on one atom; harder structures are dropped
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
        resume: continue an interrupted run; False starts afresh and replaces the file.
        progress: show progress.

    Returns:
        The path of the file.

    Raises:
        ConfigError: an option is not allowed.
        DataError: a program is missing, there is nothing to make, or the file or unfinished run
            there is another one.
    """
    labels.require(method)
    require_rdkit()
    if workers is not None and workers < 1:
        raise ConfigError(f"workers must be at least 1, received {workers}")
    tasks = plan(seed, scale, subsets, max_atoms)  # bad options must not touch any file
    output = Path(output)
    settings = _settings(seed, method, scale, subsets, max_atoms)
    if not resume:
        output.unlink(missing_ok=True)
    elif _is_finished(output, settings):
        logger.info("%s is complete already", output)
        return output
    parts = _open_parts(output, settings, resume)
    attributes = {**settings, **labels.describe(method), **_notes()}
    run = _Run(tasks, parts, output, attributes, method, seed, progress)
    run.execute(workers or _usable_cores())
    shutil.rmtree(parts)
    return output


def sample(task: Task, seed: int) -> tuple[Molecule, list[sampling.Frame]]:
    """The geometries of one task."""
    rng = generator(seed, "sample", task.name)
    if task.kind == "molecule":
        return sampling.sample_molecule(task.smiles[0], rng)
    if task.kind == "complex":
        return sampling.sample_complex(task.smiles, rng)
    if task.kind == "water":
        return sampling.sample_water(task.count, task.starts, rng)
    return sampling.sample_solvated(task.smiles[0], task.count, rng)


def label_task(task: Task, seed: int, method: str) -> spice_file.LabeledGroup:
    """Sample and label one task; structures without a usable label are dropped and counted.

    The label belongs to the geometry as it is stored, rounded to float32 bohr.
    """
    dropped: dict[str, int] = {}
    try:
        molecule, frames = sample(task, seed)
    except DataError:
        return _empty_group(task, {"not embedded": 1})
    label = labels.labeler(method)
    kept = []
    for frame in frames:
        positions = (frame.positions / labels.BOHR).astype(np.float32)
        try:
            energy, gradient = label(molecule.atomic_numbers, positions, molecule.charge)
        except labels.LabelError:
            dropped["not converged"] = dropped.get("not converged", 0) + 1
            continue
        reason = _unusable(energy, gradient)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        else:
            kept.append((positions, energy, gradient, sampling.ORIGINS.index(frame.origin)))
    if not kept:
        return _empty_group(task, dropped)
    positions, energies, gradients, origins = (np.array(c) for c in zip(*kept, strict=True))
    return spice_file.LabeledGroup(
        name=task.name,
        subset=task.subset,
        split=task.split,
        smiles=molecule.smiles,
        atomic_numbers=molecule.atomic_numbers,
        charge=molecule.charge,
        conformations=positions,
        energies=energies,
        gradients=gradients,
        origins=origins,
        dropped=dropped,
    )


def _unusable(energy: float, gradient: np.ndarray) -> str | None:
    if not (np.isfinite(energy) and np.all(np.isfinite(gradient))):
        return "not finite"
    if np.linalg.norm(gradient, axis=-1).max() * labels.FORCE_UNIT > MAX_FORCE:
        return "force too large"
    return None


def _empty_group(task: Task, dropped: dict[str, int]) -> spice_file.LabeledGroup:
    nothing = np.zeros(0)
    return spice_file.LabeledGroup(
        task.name,
        task.subset,
        task.split,
        "",
        nothing,
        0,
        nothing,
        nothing,
        nothing,
        nothing,
        dropped,
    )


class _Run:
    """Fills the folder of shards with processes and merges them."""

    def __init__(self, tasks, parts, output, attributes, method, seed, progress):
        self.tasks, self.parts, self.output = tasks, parts, output
        self.attributes, self.method, self.seed = attributes, method, seed
        self.progress = progress

    def execute(self, workers: int) -> None:
        pending = [t for t in self.tasks if not self._shard(t).exists()]
        logger.info("%d groups, %d of them to do", len(self.tasks), len(pending))
        try:
            with _Progress(self.progress, len(self.tasks), len(self.tasks) - len(pending)) as tick:
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
            energies = pool.submit(labels.atomic_energies, self.method).result()
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
            spice_file.merge(shards, self.output, {**self.attributes, "complete": complete})


def _start_worker() -> None:
    """One thread per library, set before any of them is loaded; Ctrl-C is the parent's affair."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_follow_parent, daemon=True).start()
    require_rdkit()


def _follow_parent() -> None:
    """End this child when its parent was killed: the queues of the pool would keep it waiting."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(task: Task, path: Path, seed: int, method: str, energies: dict[int, float]) -> None:
    spice_file.write_shard(path, label_task(task, seed, method), energies)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _settings(seed, method, scale, subsets, max_atoms) -> dict[str, object]:
    """What must agree between an unfinished run and the one that continues it."""
    return {
        "recipe": f"mlip-md make-dataset, recipe {RECIPE_VERSION}",
        "seed": seed,
        "method": method,
        "scale": float(scale),
        "subsets": json.dumps(list(subsets) if subsets else "all"),
        "max_atoms": -1 if max_atoms is None else max_atoms,
        "sampling": (
            f"GFN2-xTB (tblite {metadata.version('tblite')}), RDKit {metadata.version('rdkit')}"
        ),
    }


def _notes() -> dict[str, object]:
    return {
        "script_version": f"mlip-md {mlip_md.__version__}, recipe {RECIPE_VERSION}",
        "atomic_energies_note": (
            "formation_energy = dft_total_energy - sum of atomic_energies_hartree (isolated "
            "neutral ground-state atoms by the same method), for ions too"
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


def _open_parts(output: Path, settings: dict[str, object], resume: bool) -> Path:
    parts = output.with_name(output.name + ".parts")
    manifest = parts / "settings.json"
    if parts.exists() and not resume:
        shutil.rmtree(parts)
    if manifest.exists():
        _compare(json.loads(manifest.read_text(encoding="utf-8")), settings, parts)
        return parts
    parts.mkdir(parents=True, exist_ok=True)
    temporary = parts / "settings.json.tmp"
    temporary.write_text(json.dumps(settings, indent=1))
    os.replace(temporary, manifest)
    return parts


def _compare(found, settings: dict[str, object], path: Path) -> None:
    for key, value in settings.items():
        if found.get(key) != value:
            raise DataError(
                f"{path} was made with {key} = {found.get(key)!r}, this run has {value!r}; "
                "use the same options, another output, or --no-resume to start afresh"
            )


class _Progress:
    """A bar on a terminal, else a line every half minute; calling it counts one group."""

    def __init__(self, show: bool, total: int, done: int):
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

    def __enter__(self) -> "_Progress":
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
