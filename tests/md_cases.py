"""Settings of short runs, and how a test's engine comes under them."""

from mlip_md.integrations.md import MDSettings

ENGINES = ["ase", "openmm"]


def settings(structure, **changes):
    """Settings of a run of 40 steps and five frames."""
    common = {"steps": 40, "report_interval": 10, "minimize": False, "platform": "Reference"}
    return MDSettings(structure=structure, **(common | changes))


def set_engine(monkeypatch, engine):
    """Let both integrations compute with a class that has the interface of ``Engine``."""
    for module in ("ase", "openmm_force"):
        monkeypatch.setattr(f"mlip_md.integrations.{module}.Engine", engine)
