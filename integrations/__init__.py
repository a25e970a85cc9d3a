"""Where a potential is used: ASE calculator, OpenMM-ML potential, molecular dynamics.

Importing this package loads neither JAX nor OpenMM. ``import openmmml`` loads
``MLIPPotentialImplFactory`` from here for everyone who has this package installed, so the class is
made on first access and drags in nothing but ``openmmml`` itself.
"""

from __future__ import annotations

from typing import Any

__all__ = ["MLIPPotentialImplFactory"]


def __getattr__(name: str) -> Any:
    if name != "MLIPPotentialImplFactory":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # This import re-enters here when it is the first one of openmmml (its entry points are loaded
    # at its end); the inner call then has made the class already.
    from openmmml.mlpotential import MLPotentialImpl, MLPotentialImplFactory

    if name in globals():
        return globals()[name]

    class Factory(MLPotentialImplFactory):
        """OpenMM-ML's factory of ``MLPotential("mlip-md", modelPath=...)``."""

        def createImpl(  # noqa: N802 (OpenMM-ML's name)
            self, name: str, modelPath: str | None = None, **args: Any
        ) -> MLPotentialImpl:
            from mlip_md.integrations.openmm import MLIPPotentialImpl

            return MLIPPotentialImpl(name, modelPath, **args)

    Factory.__name__ = Factory.__qualname__ = name
    globals()[name] = Factory
    return Factory
