"""What a step costs with a model of mace-torch: its file opened here, beside mace-torch itself.

    bash benchmarks/peers.sh PEERS mace-torch
    python benchmarks/mace_torch_models.py --mace-torch PEERS/mace-torch/bin/python [--systems …]

Both compute one file of random weights, which ``equal_mace.py`` makes in mace-torch's environment
(two layers, hidden 128x0e + 128x1o, l_max 3, correlation 3), in float32, through their ASE
calculators, with moving atoms, each in a process of its own. As in ``steps.py`` they take turns,
and forces are compared before any time counts. Medians; the ratio of CPU times last.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from steps import Program, race, report

AIM = 20.0
"""Times our CPU time that mace-torch's is to be, for water of 192 atoms."""


def main() -> None:
    """Race on every structure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mace-torch", required=True, help="its Python")
    parser.add_argument("--file", type=Path, help="a model of mace-torch instead of that one")
    parser.add_argument("--systems", nargs="+", default=["aspirin", "packing138", "water192"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4, help="of a turn")
    options = parser.parse_args()
    # without it torch opens no whole model, and e3nn not its own constants
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    pythons = {"mlip-md": sys.executable, "mace-torch": options.mace_torch}
    ratios = {}
    with tempfile.TemporaryDirectory() as folder:
        if (file := options.file) is None:
            file, make = Path(folder) / "equal.model", Path(__file__).with_name("equal_mace.py")
            subprocess.run([options.mace_torch, str(make), str(file)], check=True)
        for system in options.systems:
            print(system, flush=True)
            programs: list[Program] = []
            try:
                for name, python in pythons.items():
                    programs.append(Program(name, python, file, system))
                race(programs, options.rounds, options.steps, same=tuple(pythons))
                ratios[system] = report(programs)["mace-torch"]["ratio"]
            finally:
                for program in programs:
                    program.end()
    for system, ratio in ratios.items():
        aim = f" (aim {AIM:g})" if system == "water192" else ""
        print(f"{system}: mace-torch takes {ratio:.1f} times our CPU time{aim}")


if __name__ == "__main__":
    main()
