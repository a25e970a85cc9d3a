"""Neighbor lists: exact ones on the host, and lists of fixed capacity that JAX can work with.

The room's only door. ``neighbor_list`` is what a user and the trainer call. ``structure``
checks and places atoms. The engine finds edges in its own compiled step
(``find_edges``), which a ``DeviceList`` runs.
"""

from __future__ import annotations

from mlip_md.neighbors.device import Capacities as Capacities
from mlip_md.neighbors.device import DeviceList as DeviceList
from mlip_md.neighbors.device import NeighborSpec as NeighborSpec
from mlip_md.neighbors.device import Shape as Shape
from mlip_md.neighbors.geometry import check_cell as check_cell
from mlip_md.neighbors.geometry import check_cutoff as check_cutoff
from mlip_md.neighbors.geometry import check_positions as check_positions
from mlip_md.neighbors.geometry import has_volume as has_volume
from mlip_md.neighbors.geometry import morton_order as morton_order
from mlip_md.neighbors.geometry import place as place
from mlip_md.neighbors.host import SMALL as SMALL
from mlip_md.neighbors.host import HostEdges as HostEdges
from mlip_md.neighbors.host import edges_of_many as edges_of_many
from mlip_md.neighbors.host import host_edges as host_edges
from mlip_md.neighbors.host import neighbor_list as neighbor_list
from mlip_md.neighbors.kept import Kept as Kept
from mlip_md.neighbors.kept import Needs as Needs
from mlip_md.neighbors.kept import find_edges as find_edges
