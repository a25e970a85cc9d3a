"""Deliberate errors: classic mistakes, made in a copy of the package; a test must then fail.

Every error is one changed line. The package is copied with it, and the test that guards against it
is run as it is, in a process of its own. What a guard reports must be a failed assertion: a crash
would prove nothing. ``pytest tests/test_mutations.py -m ""`` runs all of them.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import mlip_md

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

PACKAGE, TESTS = Path(mlip_md.__file__).parent, Path(__file__).parent


class Mistake(NamedTuple):
    """A file of the package, its text, the wrong text, and tests that must see the difference."""

    file: str
    right: str
    wrong: str
    guards: tuple[str, ...]


COUPLING = "return np.sqrt(2 * l3 + 1) * np.asarray(e3nn.clebsch_gordan(l1, l2, l3), np.float64)"
ONE_COEFFICIENT = """table = np.sqrt(2 * l3 + 1) * np.array(e3nn.clebsch_gordan(l1, l2, l3), float)
    table[tuple(np.argwhere(table)[0])] *= 1.01 if (l1, l2, l3) == (1, 1, 0) else 1.0
    return table"""
LIVE = "test_network_parity.py::test_live_features"
ENGINE = "test_engine.py::test_energies_forces_and_stress_are_right[float64"
STRUCTURES = "integrations/test_structures_reading.py"
NAMES = "test_structures_names.py"
RUN_OF_ATOMS = "integrations/md/test_md_atoms.py"
PHYSICS = "test_physics.py::test_double_precision"

FAST = {
    "gradient taken for force": Mistake(
        "potential.py", "-d_positions, 0.0", "d_positions, 0.0", (f"{ENGINE}-molecule]",)
    ),
    "stress without 1/V": Mistake(
        "potential.py", "d_strain / jnp.where(volume > 0, volume, 1.0)", "d_strain",
        (f"{ENGINE}-crystal]",),
    ),
    "species off by one": Mistake(
        "potential.py", "return index.astype(np.int32)",
        "return ((index + 1) % len(elements)).astype(np.int32)",
        ("test_engine.py::test_an_isolated_atom_has_its_reference_energy",),
    ),
    "E0 summed in float32": Mistake(
        "potential.py", "np.asarray(self.atomic_energies, np.float64)",
        "np.asarray(self.atomic_energies, np.float32)",
        ("test_engine.py::test_totals_of_ten_thousand_atoms_keep_their_digits",),
    ),
    "bohr for Å in a data set": Mistake(
        "trainer/data/readers.py", '{"bohr": BOHR,', '{"bohr": 1.0,',
        ("test_data_readers.py::test_spice_units_and_sign",),
    ),
    "EMA not debiased": Mistake(
        "trainer/optimizer.py", "lambda e: e / (1.0 - jnp.asarray(decay, e.dtype) ** updates)",
        "lambda e: e",
        ("test_training_optimizer.py::test_average_of_constant_weights_is_the_weights",),
    ),
    "flip one epoch late": Mistake(
        "trainer/loss.py", "max(epoch, schedule[0]", "max(epoch - 1, schedule[0]",
        ("test_training_loss.py::test_the_cards_exchange_their_weights_in_epoch_115",),
    ),
    "Huber delta classes shifted": Mistake(
        "trainer/loss.py", "(100.0, 200.0, 0.7), (200.0, 300.0, 0.4)",
        "(100.0, 200.0, 0.4), (200.0, 300.0, 0.1)",
        ("test_training_loss.py::test_classes_of_the_adaptive_huber_loss",),
    ),
    "names that change in place overlooked": Mistake(
        "integrations/statements.py", "{key: array.copy() for", "{key: array for",
        (f"{NAMES}::test_who_asks_at_every_step_reads_again_only_what_changed",),
    ),
    "rows of a prepared folder under any name": Mistake(
        "trainer/data/prepared.py", 'index.get("sha256", {})', "{}",
        ("test_data_prepared.py::test_every_file_has_the_name_that_it_was_written_with",),
    ),
    "filters on by default": Mistake(
        "trainer/recipe/schema.py", "curate: CurationConfig | None = None",
        "curate: CurationConfig | None = CurationConfig()",
        ("test_data_filters.py::test_nothing_is_filtered_by_default",),
    ),
    "a molecule under two names is two": Mistake(
        "trainer/data/prepared.py", "[merged[store.groups[k]] for k in free.tolist()]",
        "[store.groups[k] for k in free.tolist()]",
        ("test_data_identity.py::test_no_molecule_is_in_two_parts[by SMILES]",),
    ),
    "forces of zero where there are none": Mistake(
        "trainer/loss.py", "jnp.where(jnp.asarray(batch.forces_mask), force_loss, 0.0)",
        "force_loss",
        ("test_data_labels.py::test_structures_without_forces_add_no_force_loss_and_no_error",),
    ),
    "REF_energy with the forces of another method": Mistake(
        "trainer/data/labels.py", "if free or _of_reference(k) == same", "if True",
        ("test_data_labels.py::test_forces_of_another_family_are_no_labels",),
    ),
    "parts of what comes after a bad record": Mistake(
        "trainer/data/prepared.py", "np.delete(np.array(reading.part), sorted(reading.dropped))",
        "np.array(reading.part)[: len(store)]",
        ("test_data_rejected.py::test_marks_belong_to_their_structures_beside_bad_ones",),
    ),
    "old content of a file that has changed": Mistake(
        "trainer/data/prepared.py", "list(_state(path)) != state", "False",
        ("test_data_prepared.py::test_what_is_kept_of_other_data_is_made_anew[content]",),
    ),
    "kcal/mol of npz files taken for eV": Mistake(
        "trainer/data/arrays.py", "KCAL = KJ_PER_KCAL / KJ_PER_MOL_PER_EV", "KCAL = 1.0",
        ("test_data_formats.py::test_npz[rMD17]",),
    ),
    "flipped forces pass": Mistake(
        "trainer/data/judgement.py", "spring > FOREIGN or (math", "False or (math",
        ("test_data_judgement.py::test_a_mistake_is_named[flipped sign-one molecule]",),
    ),
    "isolated atoms go to training": Mistake(
        "trainer/data/sources.py", "self.isolated.part_from(read, config.cutoff)", "read",
        ("test_data_isolated.py::test_they_are_not_fitted",),
    ),
    "a charge in info ignored": Mistake(
        "integrations/ase.py", "if not changes and self._watch.problem_of(atoms):", "if False:",
        ("test_ase_calculator.py::test_charge_in_info_is_not_overlooked",),
    ),
    "momenta counted anew at a restart": Mistake(
        "integrations/md/velocities.py", "if saved is not None and DEGREES in saved:", "if False:",
        (
            "test_md_restart.py::test_temperatures_of_a_chain_that_bends_do_not_jump_at_a_restart"
            "[draw-openmm]",
        ),
    ),
    "a noted Ctrl-C forgotten by the next who notes": Mistake(
        "signals.py", "self._noted = self._noted or outer._noted", "pass",
        ("test_signals.py::test_inside_another_one_nothing_is_lost",),
    ),
    "shear stresses in another order": Mistake(
        "integrations/ase.py", "= full_3x3_to_voigt_6_stress(np.array(result.stress, np.float64))",
        "= np.array(result.stress)[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]",
        ("test_ase_calculator.py::test_stress_is_the_derivative_in_voigt_order",),
    ),
    "results of a batch in another order": Mistake(
        "engine.py", "for result in self._evaluate_listed(group, shared)]",
        "for result in self._evaluate_listed(group, shared)[::-1]]",
        ("test_engine.py::test_a_batch_equals_one_by_one[float32]",),
    ),
    "shifts of atoms before they were wrapped": Mistake(
        "neighbors/host.py",
        "shifts = (shifts + offsets[edges.senders] - offsets[edges.receivers]).astype(np.int32)",
        "pass",
        ("test_neighbors.py::test_shifts_reproduce_vectors_wherever_atoms_are",),
    ),
    "wrapped after the cast to float32": Mistake(
        "neighbors/geometry.py", "wrapped, _ = wrap(positions, cell, pbc)",
        "wrapped, _ = wrap(positions.astype(np.float32).astype(float), cell, pbc)",
        ("test_engine.py::test_it_does_not_matter_where_the_structure_lies[float32-crystal]",),
    ),
    "capacity not checked": Mistake(
        "neighbors/kept.py", "(self.edges <= capacity)", "(self.edges >= 0)",
        ("test_engine.py::test_an_incomplete_search_gives_no_numbers",),
    ),
    "atoms of one name taken for one": Mistake(
        "integrations/md/structures/pdb.py", "records.append(_record(source, line, segment))",
        "records += [_record(source, line, segment)][: line.text[12:16] not in "
        "[r.columns for r in records]]",
        (f"{STRUCTURES}::test_atoms_of_one_name_are_all_read[one]",),
    ),
    "last atom of a GRO file lost": Mistake(
        "integrations/md/structures/gro.py", "rows = frame[2:-1]", "rows = frame[2:-2]",
        (f"{STRUCTURES}::test_gro_elements_follow_from_names",),
    ),
    "isotopes weigh what the element does": Mistake(
        "integrations/md/structures/description.py", "if s in ISOTOPE_MASSES})", "if False})",
        (f"{STRUCTURES}::test_deuterium_in_macromolecular_files[pdb]",),
    ),
    "masses of the file are no part of it": Mistake(
        "integrations/md/structures/labels.py", '"masses", "mass"', '"mass"',
        (f"{STRUCTURES}::test_own_masses[masses]",),
    ),
    "constraints of the file are no part of it": Mistake(
        "integrations/md/structures/labels.py", "atoms.calc = None",
        "atoms.set_constraint(); atoms.calc = None",
        (f"{STRUCTURES}::test_move_mask", f"{STRUCTURES}::test_selective_dynamics[POSCAR-F]"),
    ),
    "formal charges do not count": Mistake(
        "integrations/md/structures/records.py", "total = sum(charge or 0 for charge in charges)",
        "total = 0",
        ("integrations/test_structures_names.py"
         "::test_a_protein_with_charged_residues_is_warned_of",),
    ),
    "OpenMM moves standard masses": Mistake(
        "integrations/md/backends/openmm.py", "self.structure.own_masses",
        "np.zeros(len(masses), bool)",
        (f"{RUN_OF_ATOMS}::test_masses_of_the_file_move_and_are_kept[openmm]",),
    ),
    "OpenMM moves fixed atoms": Mistake(
        "integrations/md/backends/openmm.py", "self.structure.fixed.all(axis=1)", "[]",
        (f"{RUN_OF_ATOMS}::test_fixed_atoms_stay_where_they_are[nvt-openmm]",),
    ),
    "constraints are forgotten": Mistake(
        "integrations/md/held.py", "atoms.set_constraint(held)", "atoms.set_constraint()",
        (f"{RUN_OF_ATOMS}::test_fixed_atoms_stay_where_they_are[nve-ase]",),
    ),
    "fixed atoms count for the temperature": Mistake(
        "integrations/md/velocities.py", "int(fixed_axes(atoms).sum())",
        "0 * int(fixed_axes(atoms).sum())",
        (f"{RUN_OF_ATOMS}::test_velocities_are_drawn_for_what_moves",),
    ),
    "a continued run has standard masses": Mistake(
        "integrations/md/restart.py", 'arrays.get("masses", saved.atoms.arrays.get("masses"))',
        "None",
        (f"{RUN_OF_ATOMS}::test_masses_of_the_file_move_and_are_kept[ase]",),
    ),
}  # fmt: skip
SLOW = {
    "mean of the means of devices": Mistake(
        "trainer/step.py", "share = count / jax.lax.psum(count, axis)",
        "share = jnp.float32(1 / mesh.size)",
        ("test_training_parallel.py::test_two_devices_give_the_losses_of_one",),
    ),
    "GPU: edges outside are walked along": Mistake(
        "networks/gpu_kernels.py", "keys = jnp.where(inside, nodes, number)", "keys = nodes",
        ("test_gpu_convolution.py::test_edges_outside_are_not_read",),
    ),
    "GPU: edges outside are not cleared": Mistake(
        "networks/gpu_kernels.py", "pl.when(here & ~of_node)", "pl.when(here & of_node)",
        ("test_gpu_convolution.py::test_gradients_are_those_of_the_definition[wrt2]",),
    ),
    "GPU: a derivative by the factor that is replaced": Mistake(
        "networks/gpu_programs.py", "for term in self.terms if term != without]",
        "for term in self.terms]",
        ("test_gpu_convolution.py::test_second_order_is_that_of_the_definition[active0-wrt0]",),
    ),
    "GPU: slope by the place in the cell": Mistake(
        "networks/gpu_programs.py", "return value, slope * (cells / self._task.cutoff)",
        "return value, slope",
        ("test_gpu_convolution.py::test_gradients_by_tables_are_those_of_the_definition[wrt1]",),
    ),
    "GPU: the first table for all pairs of species": Mistake(
        "networks/gpu_kernels.py", '({"index"} if task.table[0] > 1 else set())', "set()",
        ("test_gpu_convolution.py::test_sums_by_tables_are_those_of_the_definition[3]",),
    ),
    "GPU: the bound of messages is not handed down": Mistake(
        "networks/layers.py", "_memory.set(memory or _memory.get())", "_memory.set(None)",
        ("test_gpu_export.py::test_a_training_step_takes_no_turns_where_memory_suffices[1073741824-True]",),
    ),
    "sign of the edge vector": Mistake(
        "networks/layers.py", "(irreps, vectors, normalize", "(irreps, -vectors, normalize",
        (f"{LIVE}[mace]", f"{LIVE}[nequip]"),
    ),
    "one path dropped": Mistake(
        "networks/layers.py", COUPLING, f"{COUPLING} * ((l1, l2, l3) != (1, 2, 1))",
        (f"{LIVE}[mace]", f"{LIVE}[nequip]"),
    ),
    "one Clebsch-Gordan coefficient x 1.01": Mistake(
        "networks/layers.py", COUPLING, ONE_COEFFICIENT,
        (f"{PHYSICS}[mace-rotation]", f"{PHYSICS}[nequip-rotation]"),
    ),
    "activation not normalised": Mistake(
        "networks/layers.py", "scale = 1.0 / SECOND_MOMENTS[name]", "scale = 1.0",
        (f"{LIVE}[mace]", f"{LIVE}[nequip]"),
    ),
    "|det| forgotten": Mistake(
        "potential.py", "jnp.abs(jnp.linalg.det(jnp.asarray(graph.cell)))",
        "jnp.linalg.det(jnp.asarray(graph.cell))",
        (f"{PHYSICS}[mace-stress_is_the_derivative]",),
    ),
    "shifts in a kept list as they were": Mistake(
        "neighbors/kept.py", "pairs.shifts[index] + homes[senders] - homes[receivers]",
        "pairs.shifts[index]",
        ("test_neighbors_kept.py::test_kept_lists_are_exact_after_every_move[triclinic-cells]",),
    ),
    "bohr for Å in OpenMM": Mistake(
        "constants.py", "ANGSTROM_PER_NM = 10.0",
        "ANGSTROM_PER_NM = 18.8972612463",
        ("test_openmm_platforms.py::test_pure_system_equals_the_ase_route[Reference-molecule_atoms]",),
    ),
}  # fmt: skip
MISTAKES = FAST | SLOW

FORKER = """
import os, sys
import ase.io, e3nn_jax, flax.linen, h5py, jax, optax, pydantic, pytest  # once: this takes longest
for line in sys.stdin:
    folder, *tests = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        output = os.open("report", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.path.insert(0, folder)
        import mlip_md
        assert mlip_md.__file__.startswith(folder), mlip_md.__file__
        code = pytest.main(["-p", "no:cacheprovider", "-q", "-rfs", "--tb=short", *tests])
        sys.stdout.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def run():
    """Runs tests on the package in a folder, in a fork that has imported the libraries already."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    with subprocess.Popen(
        [sys.executable, "-c", FORKER],
        env=clean | {"COLUMNS": "400", "PYTHONPATH": ""},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as forker:

        def run(folder: Path, *guards: str) -> tuple[int, str]:
            assert forker.stdin is not None
            assert forker.stdout is not None
            tests = (f"{path_of(module)}::{test}" for module, test in map(split, guards))
            print(folder, *tests, sep="\t", file=forker.stdin, flush=True)
            code = int(forker.stdout.readline())
            return code, (folder / "report").read_text(encoding="utf-8")

        yield run


def split(guard: str) -> list[str]:
    """File and test of a guard."""
    return guard.split("::")


def path_of(module: str) -> Path:
    """Where a file of tests is, in whatever room."""
    (path,) = TESTS.rglob(module)
    return path


def copied_package(folder: Path) -> Path:
    return Path(shutil.copytree(PACKAGE, folder / PACKAGE.name))


def guards_of(mistakes: dict[str, Mistake]) -> list:
    return [
        pytest.param(name, guard, id=f"{name}-{guard.split('::')[1]}")
        for name, mistake in mistakes.items()
        for guard in mistake.guards
    ]


def check(run, name: str, guard: str, folder: Path) -> None:
    file, right, wrong, _ = MISTAKES[name]
    path = copied_package(folder) / file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(right, wrong), encoding="utf-8")
    code, report = run(folder, guard)
    assert code == 1, report  # also if the guard was skipped: then nobody is on guard
    # NumPy and Python raise AssertionError; pytest shows a plain one by its expression.
    assert re.search(r"^FAILED .* - (AssertionError|assert )", report, re.MULTILINE), report
    assert " error" not in report.splitlines()[-1], report


@pytest.mark.parametrize("name", MISTAKES)
def test_every_mistake_can_be_made(name):
    file, right, wrong, guards = MISTAKES[name]
    assert (PACKAGE / file).read_text(encoding="utf-8").count(right) == 1, (
        "bring the text up to date"
    )
    assert right != wrong
    for guard in guards:
        module, test = split(guard)
        source = path_of(module).read_text(encoding="utf-8")
        assert f"def {test.split('[')[0]}(" in source


@pytest.mark.parametrize(("name", "guard"), guards_of(FAST))
def test_a_mistake_is_seen(run, name, guard, tmp_path):
    check(run, name, guard, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "guard"), guards_of(SLOW))
def test_a_mistake_is_seen_by_a_longer_test(run, name, guard, tmp_path):
    check(run, name, guard, tmp_path)


@pytest.mark.slow
def test_guards_pass_without_mistakes(run, tmp_path):
    copied_package(tmp_path)
    code, report = run(tmp_path, *{g for mistake in MISTAKES.values() for g in mistake.guards})
    assert code == 0, report
    assert " skipped" not in report, report
