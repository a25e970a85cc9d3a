"""The card of a finished run: what was trained on what, how wrong it is, how to use it.

All of it comes from the model file, which holds its provenance, and from one evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mlip_md.elements import symbol
from mlip_md.files import write_text
from mlip_md.formats.soundness import flatten
from mlip_md.potential import Potential
from mlip_md.trainer.evaluation import Evaluation
from mlip_md.trainer.metrics import Errors
from mlip_md.trainer.resume import with_defaults

COLUMNS = {
    "energy_mae_per_atom": "E MAE", "energy_rmse_per_atom": "E RMSE", "forces_mae": "F MAE",
    "forces_rmse": "F RMSE", "stress_mae": "S MAE", "stress_rmse": "S RMSE",
}  # fmt: skip
"""Errors that a card shows, and their heads."""

UNITS = "Energies in meV/atom, forces in meV/Å and stress in meV/Å³, per component."


def write_card(
    path: Path,
    potential: Potential,
    part: str,
    evaluation: Evaluation,
    environment: Mapping[str, Any],
    plots: Sequence[str] = (),
    problem: str = "",
) -> None:
    """Write the card of a potential as Markdown.

    Args:
        path: of the file, in the folder of the run.
        potential: as its run wrote it, with all provenance.
        part: of the data that was evaluated, "test" or "validation".
        evaluation: of the potential on it.
        environment: versions and devices, see ``runlog.describe_environment``.
        plots: paths of pictures from the card.
        problem: why the potential is of no use; empty if it is.

    Raises:
        OutputError: if the file cannot be written.
    """
    info = potential.info
    lines = [f"# {info['name']}", "", *([info["description"], ""] if info["description"] else [])]
    if problem:
        lines += [f"**Do not use it:** {problem}.", ""]
    sections = {
        "What it is": _describe_network(potential),
        "Trained on": _describe_data(potential),
        "Training": _describe_training(with_defaults(info["recipe"]), info["training"]),
        "Errors": _describe_errors(info, part, evaluation),
        "Plots": [f"![{Path(plot).stem}]({plot})" for plot in plots],
        "Use": _describe_use(path.parent),
        "Made with": _describe_versions(environment),
    }
    for title, content in sections.items():
        if content:
            lines += [f"## {title}", "", *content, ""]
    write_text(path, "\n".join(lines))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in Markdown."""
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in cells] + [""]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()) or "-"


def _rows(values: Mapping[str, Any]) -> list[str]:
    """A list of names and values."""
    return [f"- {name}: {_cell(str(value))}" for name, value in values.items()]


def _describe_network(potential: Potential) -> list[str]:
    recipe, parent = potential.info["recipe"], potential.info.get("parent")
    model = {k: v for k, v in recipe["model"].items() if v is not None and k != "atomic_energies"}
    size = sum(int(np.size(leaf)) for leaf in flatten(potential.params).values())
    lines = _rows({
        "network": f"{model.pop('kind')} with {size:,} weights, cutoff {potential.cutoff:g} Å",
        "elements": " ".join(map(symbol, potential.elements)),
        "hyperparameters": ", ".join(f"{name} {value}" for name, value in model.items()),
        "SHA-256": potential.sha256,
    })  # fmt: skip
    if parent is not None:
        licence = parent.get("licence") or parent.get("license")
        lines += _rows({
            "fine-tuned from": f"{parent.get('name', 'a potential')} (SHA-256 {parent['sha256']})",
            "licence of the parent": licence or "it states none",
        })  # fmt: skip
    return lines


def _describe_data(potential: Potential) -> list[str]:
    data, rows = potential.info["data"], with_defaults(potential.info["recipe"])["data"]
    statistics = data["statistics"]
    files = {name: rows[name] for name in ("path", "validation", "test") if rows[name]}
    split = {"split": ", ".join(f"{name} {value}" for name, value in rows["split"].items())}
    counts = ", ".join(f"{count} {name}" for name, count in data["structures"].items())
    energies = zip(potential.elements, potential.atomic_energies.tolist(), strict=True)
    return [
        *_rows({**files, **split, "structures": counts}),
        *(f"- {_cell(note)}" for note in data.get("notes", ())),
        "",
        f"Energies of atoms (E0), {statistics['atomic_energies_source']}:",
        "",
        *table(("element", "E0 (eV)"), [(symbol(z), f"{energy:.6f}") for z, energy in energies]),
    ]


def _describe_training(recipe: Mapping[str, Any], training: Mapping[str, Any]) -> list[str]:
    optimizer, loss = recipe["optimizer"], recipe["loss"]
    weights = {
        term: ", ".join(f"{w['value']:g} from epoch {max(w['from_epoch'], 1)}" for w in steps)
        for term, steps in ((term, loss[term]["weight"]) for term in ("energy", "forces", "stress"))
        if any(w["value"] for w in steps)
    }
    rates = [optimizer[f"{when}_learning_rate"] for when in ("init", "peak", "final")]
    return [
        *_rows({
            "epochs": f"{recipe['train']['epochs']}; this model is of epoch {training['epoch']}",
            "batches": f"at most {recipe['data']['batch_size']} structures",
            "loss": f"{loss['kind']}; {'; '.join(f'{k} {v}' for k, v in weights.items())}",
            "optimizer": f"{optimizer['kind']}, learning rate {optimizer['schedule']}, at first, "
            f"highest and last {', '.join(f'{rate:g}' for rate in rates)}",
            "average of the weights": f"decay {recipe['train']['ema_decay']:g}",
            "seed": recipe["seed"],
        }),
        "",
        "Every row stands in `config.resolved.yaml`, and in the model file.",
    ]  # fmt: skip


def _describe_errors(info: Mapping[str, Any], part: str, evaluation: Evaluation) -> list[str]:
    training, counts = info["training"], info["data"]["structures"]
    rows = {"validation": {"structures": counts["validation"], **training["validation"]}}
    for name, errors in training.get("validation_sets", {}).items():
        count = info["data"]["validation_sets"][name]
        rows[f"validation, {name}"] = {"structures": count, **errors}
    rows[part] = evaluation.overall
    lines = [UNITS, "", *error_rows("part", "structures", rows)]
    for head, first, second, errors in (
        (f"By subset, {part}", "subset", "structures", evaluation.by_subset),
        (f"By element, {part}", "element", "atoms", evaluation.by_element),
    ):
        if len(errors) > 1:
            lines += [f"{head}:", "", *error_rows(first, second, errors)]
    worst = {f"{row['name']}": row for row in evaluation.worst()}
    return [*lines, f"Largest errors, {part}:", "", *error_rows("structure", "", worst)]


def error_rows(first: str, second: str, errors: Mapping[str, Errors]) -> list[str]:
    """A table of errors in Markdown.

    Args:
        first: head of the names.
        second: key and head of the counts; empty for none.
        errors: by name; eV, eV/Å, eV/Å³.
    """
    known = [name for name in COLUMNS if any(name in values for values in errors.values())]
    rows = []
    for name, values in errors.items():
        count = [f"{int(values[second])}"] if second else []
        milli = [1000 * values.get(column, math.nan) for column in known]
        rows.append([name, *count, *("-" if math.isnan(v) else f"{v:.3f}" for v in milli)])
    return table([first, *([second] if second else []), *(COLUMNS[c] for c in known)], rows)


def _describe_use(folder: Path) -> list[str]:
    return [
        "```python",
        "from mlip_md.integrations.ase import MLIPCalculator",
        "",
        f'atoms.calc = MLIPCalculator("{folder.as_posix()}")  # or its model.safetensors',
        "```",
        "",
        "```python",
        "from openmmml import MLPotential",
        "",
        f'system = MLPotential("mlip-md").createSystem(topology, modelPath="{folder.as_posix()}")',
        "```",
        "",
        f"`mlip-md md molecule.xyz --model {folder.as_posix()}` runs dynamics. The errors hold for "
        "structures like those above; others are extrapolation.",
    ]


def _describe_versions(environment: Mapping[str, Any]) -> list[str]:
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return [
        f"{packages}; Python {environment['python']} on {environment['platform']}; "
        f"{', '.join(environment['devices'])}."
    ]
