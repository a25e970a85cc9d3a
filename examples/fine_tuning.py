"""Fine-tuning against training from scratch: the same few structures, network, steps, validation.

From one data file, every seed draws structures to train on and others to validate with; the rest
of the file is the test. Both ways train at several learning rates; each is judged at the best of
its own, chosen by the mean validation error over the seeds.

    python examples/fine_tuning.py train_300K.xyz [--parent organics-gfn2] [--count 50]

A summary is printed; all curves are in fine_tuning.json and fine_tuning.png. What is there already
is not trained again, so that an interrupted comparison goes on where it was.
"""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np
from ase import Atoms
from ase.io import read, write

import mlip_md
from mlip_md.elements import symbol
from mlip_md.potential import Potential
from mlip_md.trainer import Recipe, Trainer, adopt_network, evaluate, load_data, read_graphs

WAYS = {"fine-tuned": (0.0005, 0.002, 0.005), "from scratch": (0.002, 0.005, 0.01)}
"""Learning rates that each way may choose from."""
ERROR = "validation_forces_rmse"


def part(frames: Sequence[Atoms], seed: int, count: int, held: int, folder: Path) -> dict[str, str]:
    """Files of a random part to train on, of one to validate with and of all the rest."""
    order = np.random.default_rng(seed).permutation(len(frames))
    parts = np.split(order, [count, count + held])
    files = {}
    for name, indices in zip(("path", "validation", "test"), parts, strict=True):
        files[name] = str(folder / f"{name}-{seed}.xyz")
        write(files[name], [frames[k] for k in indices], format="extxyz")
    return files


def matching_energies(parent: Potential, file: str) -> dict[str, float]:
    """E0 (eV) with which the parent's energies are nearest to those of a file.

    The parent's E0 belong to its own method; a molecule's energy says only their sum, so that what
    is missing is shared out by least squares.
    """
    graphs, _ = read_graphs(file, parent)
    missing = graphs.energy - evaluate(parent, graphs).predictions.energy
    change = np.linalg.lstsq(graphs.compositions.astype(float), missing, rcond=None)[0]
    energies = zip(parent.elements, parent.atomic_energies + change, strict=True)
    return {symbol(z): float(e) for z, e in energies}


def make_recipe(files: dict[str, str], seed: int, rate: float, epochs: int) -> Recipe:
    """What both ways have in common."""
    return Recipe.model_validate(
        {
            "name": "fine-tuning",
            "seed": seed,
            "data": {**files, "batch_size": 5},
            "loss": {"energy": {"weight": 40.0}, "forces": {"weight": 1000.0}},
            "optimizer": {
                "schedule": "cosine",
                "warmup_steps": 0,
                "peak_learning_rate": rate,
                "final_learning_rate": 0.01 * rate,
                "transition_steps": "to the end",
            },
            "train": {"epochs": epochs, "ema_decay": 0.99},
            "log": {"plots": False},
        }
    )


def train(recipe: Recipe, parent: Potential, way: str, folder: Path) -> dict[str, list[float]]:
    """The validation error by epoch (eV/Å), and the test error of the best model."""
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    tuned = way == "fine-tuned"
    values = adopt_network(recipe, parent)[0].model_dump()  # also from scratch: the same network
    if tuned:
        values["start"] = {"potential": "the parent", "atomic_energies": "refit"}
        values["model"]["atomic_energies"] = matching_energies(parent, str(recipe.data.path))
    recipe = Recipe.model_validate(values)
    trainer = Trainer(recipe, load_data(recipe), folder, parent=parent if tuned else None)
    outcome = trainer.run()
    with (folder / "metrics.csv").open(encoding="utf-8") as file:
        curve = [float(row[ERROR]) for row in csv.DictReader(file)]
    found = {"validation": curve, "test": [outcome.test["forces_rmse"]]}
    result.write_text(json.dumps(found))
    return found


def best_rate(runs: dict[float, list[dict[str, list[float]]]]) -> float:
    """The rate with the lowest mean over seeds of the best validation error."""
    return min(runs, key=lambda rate: np.mean([min(run["validation"]) for run in runs[rate]]))


def draw(results: dict[str, dict[float, list[dict[str, list[float]]]]], path: Path) -> None:
    """Validation errors by epoch, a line for every seed, at the best rate of each way."""
    figure = matplotlib.figure.Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for color, (way, runs) in enumerate(results.items()):
        rate = best_rate(runs)
        for k, run in enumerate(runs[rate]):
            values = 1000 * np.array(run["validation"])
            label = f"{way}, rate {rate:g}" if k == 0 else None
            axes.semilogy(values, color=f"C{color}", label=label, lw=1)
    axes.set(xlabel="epoch", ylabel="force RMSE, validation (meV/Å)")
    axes.legend()
    figure.savefig(path, dpi=150)


def main(arguments: argparse.Namespace) -> None:
    mlip_md.enable_cache()
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    parent = mlip_md.load(arguments.parent)
    frames = read(arguments.data, ":")
    results = {way: {r: [] for r in rates[: arguments.rates]} for way, rates in WAYS.items()}
    for seed in range(arguments.seeds):
        files = part(frames, seed, arguments.count, arguments.held, folder)
        for way, runs in results.items():
            for rate, found in runs.items():
                recipe = make_recipe(files, seed, rate, arguments.epochs)
                place = folder / f"{way.replace(' ', '-')}-{rate:g}-{seed}"
                found.append(train(recipe, parent, way, place))
                error = 1000 * min(found[-1]["validation"])
                print(f"seed {seed}, {way} at {rate:g}: {error:.1f} meV/Å (validation)", flush=True)
    (folder / "fine_tuning.json").write_text(json.dumps(results))
    draw(results, folder / "fine_tuning.png")
    means = {}
    for way, runs in results.items():
        rate = best_rate(runs)
        tests = 1000 * np.array([run["test"][0] for run in runs[rate]])
        means[way] = tests.mean()
        print(f"{way} at {rate:g}: {means[way]:.1f} ± {tests.std():.1f} meV/Å (test)")
    print(f"ratio: {means['from scratch'] / means['fine-tuned']:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data", help="extended XYZ with energies and forces, of one method")
    parser.add_argument("--parent", default="organics-gfn2")
    parser.add_argument("--count", type=int, default=50, help="structures to train on")
    parser.add_argument("--held", type=int, default=50, help="structures to validate with")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--rates", type=int, default=3, help="learning rates to try, 1 to 3")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("fine-tuning"))
    main(parser.parse_args())
