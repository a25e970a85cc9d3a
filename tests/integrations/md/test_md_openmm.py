"""The OpenMM backend: moves of the volume, cells, Ctrl-C, counted evaluations."""

from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import openmm
import openmm.app
import pytest
from ase import Atoms
from md_cases import set_engine, settings
from pair_engine import PairEngine

from mlip_md.devices import POOL_VARIABLES
from mlip_md.errors import CapacityError, NonFiniteError, SimulationError
from mlip_md.integrations import openmm_calls
from mlip_md.integrations.md import run
from mlip_md.integrations.md.backends.openmm import reduce_cell
from mlip_md.integrations.md.run import run_md
from mlip_md.integrations.md.structures import Structure, read_structure
from mlip_md.integrations.md.volume_moves import VolumeMoves


def test_volume_moves_of_an_ideal_gas():
    """<V> = (N + 1) kT / P for N molecules without forces, var V = (N + 1) (kT / P)²."""

    system = openmm.System()
    for _ in range(8):
        system.addParticle(1.0)
    system.setDefaultPeriodicBoxVectors([2, 0, 0], [0.3, 2, 0], [0, 0.4, 2])
    bond = openmm.HarmonicBondForce()
    bond.addBond(0, 1, 0.5, 1e6)  # a molecule that does not change its shape
    bond.setUsesPeriodicBoundaryConditions(True)
    system.addForce(bond)
    platform = openmm.Platform.getPlatformByName("Reference")
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
    positions = np.random.default_rng(2).uniform(0, 2, (8, 3))
    positions[1] = positions[0] + [0.5, 0, 0]
    context.setPositions(positions)
    labels = np.array([3, 3, 9, 1, 5, 7, 8, 8])
    moves = VolumeMoves(context, labels, pressure=30.0, temperature=300.0, seed=1)
    volumes = []
    for _ in range(8000):
        moves.attempt()
        volumes.append(context.getState().getPeriodicBoxVolume()._value)
    unit_volume = 8.314462618e-3 * 300.0 / (30.0 * 0.0602214076)  # kT / P in nm³
    assert moves.scale > 0.2
    assert abs(np.mean(volumes[500:]) / (7 * unit_volume) - 1) < 0.05
    assert abs(np.std(volumes[500:]) / (7**0.5 * unit_volume) - 1) < 0.12
    state = context.getState(positions=True, energy=True)
    assert state.getPotentialEnergy()._value < 1e-10
    end = state.getPositions(asNumpy=True)._value
    np.testing.assert_allclose(end[7] - end[6], positions[7] - positions[6], atol=1e-9)


@pytest.mark.parametrize("text", [openmm_calls.INTERRUPTED, "<NULL>", "<NULL>\n"])
def test_ctrl_c_comes_through_openmm_as_text(cluster, text, monkeypatch):
    backend = run.make_backend(settings(cluster, engine="openmm"), read_structure(cluster))

    def fail(*_):
        raise openmm.OpenMMException(text)

    monkeypatch.setattr(openmm.app.Simulation, "step", fail)
    with pytest.raises(KeyboardInterrupt):
        backend.advance()


def test_a_run_gives_its_own_advice(cluster, monkeypatch):
    """The force's line for whoever steps it is taken out of what OpenMM says."""
    backend = run.make_backend(settings(cluster, engine="openmm"), read_structure(cluster))

    def fail(*_):
        raise NonFiniteError("the reason")

    monkeypatch.setattr(PairEngine, "evaluate", fail)
    with pytest.raises(SimulationError, match="NonFiniteError: the reason") as caught:
        backend.warm_up()
    assert "OpenMMException" in repr(caught.value.__cause__)
    assert openmm_calls.ADVICE in str(caught.value.__cause__)
    told = openmm_calls.read_told(caught.value.__cause__)
    assert not told.interrupted
    assert str(caught.value) == told.text == told.text.strip()
    assert "unstable" not in told.text


def test_memory_that_ends_is_no_unstable_run(cluster, tmp_path, monkeypatch):
    """Of the potential's device in the middle of a run, and of OpenMM's own card."""

    class Growing(PairEngine):
        def evaluate(self, *structure):
            if self.calls == 5:
                raise CapacityError("900 atoms do not fit", needed=2, available=1)
            return super().evaluate(*structure)

    set_engine(monkeypatch, Growing)
    with pytest.raises(CapacityError, match="900 atoms do not fit"):
        run_md(settings(cluster, engine="openmm"), tmp_path / "run")
    full = openmm.OpenMMException("Error creating array: CUDA_ERROR_OUT_OF_MEMORY (2)")
    assert openmm_calls.read_told(full).full
    assert not openmm_calls.read_told(openmm.OpenMMException("NonFiniteError: the reason")).full


@pytest.mark.parametrize(
    ("platform", "index", "variable", "told"),
    [
        ("CUDA", "1", None, True),
        ("CUDA", "0", None, False),
        ("OpenCL", "0", None, True),
        ("CPU", "1", None, False),
        ("CUDA", "1", "XLA_PYTHON_CLIENT_PREALLOCATE", False),
    ],
)
def test_one_card_for_both_is_told(cluster, monkeypatch, platform, index, variable, told):
    for name in POOL_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "false")
    backend = run.make_backend(settings(cluster, engine="openmm"), read_structure(cluster))
    assert backend.notes() == []
    card = SimpleNamespace(platform="gpu", local_hardware_id=1, device_kind="NVIDIA X")
    monkeypatch.setattr(PairEngine, "device", card)
    answers = {"getName.return_value": platform, "getPropertyValue.return_value": index}
    monkeypatch.setattr(backend, "_context", Mock(**{"getPlatform.return_value": Mock(**answers)}))
    noted = []
    observer = SimpleNamespace(stage=lambda _: None, note=noted.append)
    monkeypatch.setattr(backend, "warm_up", lambda: None)
    run._warm_up(backend, observer, Mock())
    assert [("NVIDIA X" in text, "PREALLOCATE=false" in text) for text in noted] == [
        (True, True)
    ] * told


def test_left_handed_cell_is_not_mirrored(tmp_path):
    rng = np.random.default_rng(0)
    cell = np.array([[0.5, 7.0, 1.0], [8.0, 0.3, -1.0], [1.0, 2.0, 9.0]])
    atoms = Atoms("C5", positions=rng.uniform(0, 9, (5, 3)), cell=cell, pbc=True)
    assert np.linalg.det(cell) < 0
    ready = reduce_cell(Structure("x", atoms)).atoms
    ax, by, cz = np.diag(ready.cell.array)
    assert min(ax, by, cz) > 0
    assert np.abs(np.triu(ready.cell.array, 1)).max() < 1e-12
    assert abs(ready.cell[2, 1]) <= by / 2
    np.testing.assert_allclose(ready.get_all_distances(mic=True), atoms.get_all_distances(mic=True))
    vectors = [a.get_distance(0, i, vector=True) for a in (atoms, ready) for i in (1, 2, 3)]
    handedness = np.linalg.det(vectors[:3]), np.linalg.det(vectors[3:])
    np.testing.assert_allclose(*handedness)


def test_openmm_evaluates_no_frame_twice(crystal, tmp_path, monkeypatch):
    calls = []

    class Counting(PairEngine):
        def evaluate(self, *structure):
            calls.append(1)
            return super().evaluate(*structure)

    set_engine(monkeypatch, Counting)
    run_md(settings(crystal, engine="openmm", steps=50), tmp_path / "run")
    assert 50 <= len(calls) <= 52
