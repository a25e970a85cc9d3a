"""What a step of dynamics costs: energy and forces of moving atoms, through ASE, against others.

    python benchmarks/steps.py --with NAME=PYTHON [--with …] [--models mace-card …] [--systems …]

Every program runs in a process and an environment of its own (``peers.sh`` makes those of the
peers); NAME is one of contestant.py's, or "mlip-md" once more under a name of its own, such as
``mlip-md:before=…`` for another version. They take turns, a few steps each, so that a busy machine
slows all of them. Before any time counts, forces are compared. Medians of CPU and wall time a step,
peak memory of the process, first step; ratios to the first program last.

mace-torch and symmetrix-xl do not read our weights: against them race the network ``equal-mace``,
theirs given by ``--file`` (in their environment ``equal_mace.py equal.pt``, then
``symmetrix_extract_mace --model equal.pt --output equal.json`` and
``symmetrix_prepare_jit_host_artifact --model equal.json --precision float32``)::

    python benchmarks/steps.py --models equal-mace --systems water192 --with mace-torch=PYTHON \
        --file mace-torch=equal.pt --with symmetrix-xl=PYTHON --file symmetrix-xl=equal.json
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from memory import potential

from mlip_md.formats import instadeep

MODELS = {
    "mace-card": "mace-spice2",
    "nequip-card": "nequip-spice2",
    "bundled": "organics-gfn2",
    "equal-mace": "equal-mace",
}
TOLERANCE = 2e-5
"""Largest difference of a force, of the largest one: float32, sums in different orders."""


class Program:
    """A contestant's process."""

    def __init__(self, name: str, python: str, model: Path | str, system: str):
        self.name, kind = name, name.partition(":")[0]
        command = [python, str(Path(__file__).with_name("contestant.py")), kind, str(model), system]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=sys.stderr, text=True
        )
        self.cpu: list[float] = []
        self.wall: list[float] = []
        self.said = self._hear()

    def _hear(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended with status {self.process.wait()}")
        return json.loads(line)

    def run(self, steps: Sequence[int]) -> None:
        """Let it make these steps."""
        self.process.stdin.write(json.dumps(list(steps)) + "\n")
        self.process.stdin.flush()
        self.said = self._hear()
        self.cpu += [cpu for cpu, _ in self.said["steps"]]
        self.wall += [wall for _, wall in self.said["steps"]]

    def end(self) -> None:
        """Let it go."""
        self.process.stdin.close()
        self.process.wait()


def write_model(folder: Path, name: str) -> Path:
    """The weights in the format that all programs read, older versions of this one too."""
    path = folder / f"{name}.zip"
    instadeep.save_zip(potential(MODELS[name]), path)
    return path


def race(
    programs: list[Program], rounds: int, each: int, same: Sequence[str] = ("mlip-md", "mlip")
) -> None:
    """Warm up, compare forces (those of ``same`` must be the first one's), then take turns."""
    for program in programs:
        program.run(range(1, 3))
        program.cpu, program.wall = [], []
    forces = [np.array(program.said["forces"]) for program in programs]
    for program, found in zip(programs[1:], forces[1:], strict=True):
        difference = np.abs(found - forces[0]).max() / np.abs(forces[0]).max()
        print(f"  forces of {program.name}: {difference:.1e} of the largest")
        if program.name.partition(":")[0] in same and not difference < TOLERANCE:
            raise SystemExit(f"{program.name} computes something else: no times")
    for turn in range(rounds):
        for program in programs:
            program.run(range(3 + turn * each, 3 + (turn + 1) * each))


def report(programs: list[Program]) -> dict[str, dict[str, float]]:
    """Print medians; ratios of CPU time to the first program's last."""
    rows = {}
    for program in programs:
        cpu, wall = (1000 * statistics.median(times) for times in (program.cpu, program.wall))
        first = program.said["first"]
        rows[program.name] = {
            "cpu_ms": cpu,
            "wall_ms": wall,
            "peak_gb": program.said["peak_gb"],
            "first_cpu_s": first[0],
            "first_wall_s": first[1],
            "ratio": cpu / (1000 * statistics.median(programs[0].cpu)),
        }
        row = rows[program.name]
        print(
            f"  {program.name:20s} {cpu:9.2f} ms CPU {wall:9.2f} ms wall {row['peak_gb']:6.2f} GB"
            f"  first step {first[0]:6.1f} s CPU   {row['ratio']:6.2f} x"
        )
    return rows


def main() -> None:
    """Race on every structure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--with", dest="programs", action="append", default=[])
    parser.add_argument(
        "--file", dest="files", action="append", default=[], help="NAME=model of another network"
    )
    parser.add_argument("--models", nargs="+", default=["mace-card", "nequip-card"], choices=MODELS)
    parser.add_argument("--systems", nargs="+", default=["aspirin", "packing138", "water192"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    named = [("mlip-md", sys.executable)]
    named += [tuple(text.split("=", 1)) for text in options.programs]
    given = dict(text.split("=", 1) for text in options.files)
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for model in options.models:
            file = write_model(Path(folder), model)
            for system in options.systems:
                print(f"{model}, {system}", flush=True)
                programs = []
                try:
                    for name, python in named:
                        own = given.get(name.partition(":")[0], file)
                        programs.append(Program(name, python, own, system))
                    race(programs, options.rounds, options.steps)
                    results[f"{model}, {system}"] = report(programs)
                finally:
                    for program in programs:
                        program.end()
                if options.output:
                    options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
