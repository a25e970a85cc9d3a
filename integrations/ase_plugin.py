"""Entry point ``ase.plugins``: announces the calculator to ASE without loading JAX.

ASE calls its plugin classes experimental; where they are missing nothing is announced, since a
plugin that cannot be imported would take all others with it.
"""

from __future__ import annotations

from typing import Any

__ase_plugins__: set[Any] = set()

try:
    from ase._4.plugins.plugin import CalculatorPlugin
except ImportError:
    pass
else:
    __ase_plugins__.add(
        CalculatorPlugin(
            "mlip-md",
            citation="the mlip-md authors, mlip-md: molecular dynamics with machine-learned "
            "potentials in JAX",
            implementation="mlip_md.integrations.ase.MLIPCalculator",
        )
    )
