"""Averages of a run."""

import numpy as np
import pytest

from mlip_md.integrations.md import files, report


def test_no_drift_is_told_of_a_short_log():
    time = np.linspace(0, 1, 11)
    log = {name: np.full(11, np.nan) for name in files.COLUMNS}
    log |= {"step": np.arange(11), "time_ps": time, "temperature_K": time + 300}
    log["conserved_eV"] = 0.02 * time
    assert report.compute_averages(log, 4)["drift_meV_per_atom_ps"] == pytest.approx(5.0)
    log["time_ps"] = time * 0.5
    assert report.compute_averages(log, 4)["drift_meV_per_atom_ps"] is None
