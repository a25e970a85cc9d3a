"""What a finished run leaves: errors in every way, learning curves, parity plots, its card."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mlip_md.files import replacing
from mlip_md.formats import own
from mlip_md.trainer.card import write_card
from mlip_md.trainer.data import BatchBudget, GraphStore
from mlip_md.trainer.evaluation import Evaluation, evaluate_in_detail, write_errors
from mlip_md.trainer.runlog import RunLog, describe_environment
from mlip_md.trainer.step import EvalStep, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mlip_md.trainer.data.training import TrainingData

MAX_POINTS = 50_000
"""Points of a parity plot; of more, evenly spaced ones are drawn."""
FEW_POINTS = 10_000
"""With fewer, points are larger than a pixel."""


def write_report(
    folder: Path,
    step: EvalStep,
    data: TrainingData,
    plots: bool = True,
    problem: str = "",
    dtype: str = "float32",
) -> tuple[str, Evaluation]:
    """Evaluate the model of a finished run, and write ``card.md`` and ``report/`` to its folder.

    ``report/`` holds errors-PART.json, the same of named validation sets and, with plots,
    parity.png and curves.png.

    Args:
        folder: of the run, with ``metrics.csv`` and ``model.safetensors``.
        step: the compiled evaluation of the run's network.
        data: of the run; its test part is evaluated, without one the validation part.
        plots: whether to draw.
        problem: why the model is of no use, for the card; empty if it is.
        dtype: precision of the run, for which ``step`` is compiled.

    Returns:
        Name of the part, and its evaluation.

    Raises:
        OutputError: if a file cannot be written.
    """
    part = "test" if data.test is not None else "validation"
    store = data.parts()[part]
    potential = own.load(folder / "model.safetensors")
    params = cast(potential.params, dtype)
    evaluation = evaluate_in_detail(
        step, params, store, _room_for(store, data), on_oversize=data.on_oversize
    )
    report = folder / "report"
    report.mkdir(exist_ok=True)
    write_errors(evaluation, report / f"errors-{part}.json")
    for name, rows in data.validation_sets.items():
        own_set = data.validation.subset(rows)
        judged = evaluate_in_detail(
            step, params, own_set, _room_for(own_set, data), on_oversize=data.on_oversize
        )
        write_errors(judged, report / f"errors-validation-{name}.json")
    if plots:
        draw_parity(evaluation, report / "parity.png", part)
        draw_curves(RunLog(folder).rows(), report / "curves.png")
    shown = ("report/curves.png", "report/parity.png") if plots else ()
    environment = describe_environment()
    write_card(folder / "card.md", potential, part, evaluation, environment, shown, problem)
    return part, evaluation


def _room_for(store: GraphStore, data: TrainingData) -> BatchBudget:
    """Batches that hold every structure; at the end of a training none must be too large."""
    if data.on_oversize == "drop" or data.budget.fits(store).all():
        return data.budget
    return BatchBudget.from_card(data.budget.n_graph - 1, store=store)


def draw_curves(rows: list[dict[str, float]], path: Path) -> None:
    """Draw training loss and validation errors by epoch; dashed lines are changes of weights.

    Args:
        rows: of the log, one an epoch.
        path: PNG to write.

    Raises:
        OutputError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    epochs = [row["epoch"] for row in rows]
    curves = [
        ("loss", 1.0, "training loss"),
        ("validation_energy_rmse_per_atom", 1e3, "energy RMSE (meV/atom), validation"),
        ("validation_forces_rmse", 1e3, "force RMSE (meV/Å), validation"),
    ]
    if rows and "validation_stress_rmse" in rows[0]:
        curves.append(("validation_stress_rmse", 1e3, "stress RMSE (meV/Å³), validation"))
    figure = Figure(figsize=(3.3 * len(curves), 3.2), layout="constrained")
    panels = figure.subplots(1, len(curves))
    changes = [b["epoch"] for a, b in itertools.pairwise(rows) if a["stage"] != b["stage"]]
    for panel, (name, factor, label) in zip(panels, curves, strict=True):
        panel.semilogy(epochs, [factor * row[name] for row in rows], ".-", label="all")
        for one, values in _curves_of_sets(rows, name).items():
            panel.semilogy(epochs, [factor * value for value in values], label=one)
            panel.legend(fontsize="x-small")
        for epoch in changes:
            panel.axvline(epoch - 0.5, color="gray", linestyle="--")
        panel.set(xlabel="epoch")
        panel.set_title(label, fontsize="small")
        panel.grid(alpha=0.3)
    _save(figure, path)


def _curves_of_sets(rows: list[dict[str, float]], name: str) -> dict[str, list[float]]:
    """What stands beside a column for each validation set that has a name."""
    before, after = "validation_", name.removeprefix("validation")
    columns = [c for c in (rows or [{}])[0] if c.startswith(before) and c.endswith(after)]
    found = {c[len(before) : -len(after)]: [row[c] for row in rows] for c in columns if c != name}
    return found if name.startswith(before) else {}


def draw_parity(evaluation: Evaluation, path: Path, part: str) -> None:
    """Draw predicted against reference energies, forces and, where there are labels, stresses.

    Args:
        evaluation: predictions and labels.
        path: PNG to write.
        part: of the data set, for the title.

    Raises:
        OutputError: if the file cannot be written.
    """
    from matplotlib.figure import Figure

    errors = evaluation.overall
    shown = [
        (evaluation.energies, "interaction energy", "eV/atom", "energy_rmse_per_atom"),
        (evaluation.forces, "force component", "eV/Å", "forces_rmse"),
        (evaluation.stresses, "stress component", "eV/Å³", "stress_rmse"),
    ]
    shown = [panel for panel in shown if len(panel[0])]
    figure = Figure(figsize=(4 * len(shown), 4), layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for panel, (pairs, what, unit, name) in zip(panels, shown, strict=True):
        _parity(panel, pairs, f"{what} ({unit})")
        panel.set_title(f"{part}: RMSE {1e3 * errors[name]:.3g} m{unit}")
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")


def _parity(panel: Axes, pairs: np.ndarray, what: str) -> None:
    pairs = pairs[:: 1 + len(pairs) // MAX_POINTS]
    limits = (float(pairs.min()), float(pairs.max()))
    panel.plot(limits, limits, color="gray", linewidth=1)
    few = len(pairs) < FEW_POINTS
    panel.plot(pairs[:, 0], pairs[:, 1], "." if few else ",", alpha=0.5, rasterized=True)
    panel.set(xlabel=f"reference {what}", ylabel=f"predicted {what}", aspect="equal")
    panel.grid(alpha=0.3)
