"""Neighbour lists: exact ones on the host, and lists of fixed capacity that JAX can work with."""

from __future__ import annotations

from mlip_md.neighbors.host import neighbor_list as neighbor_list
from mlip_md.neighbors.lists import NeighborList as NeighborList
from mlip_md.neighbors.lists import NeighborSpec as NeighborSpec
from mlip_md.neighbors.lists import NeighborStatus as NeighborStatus
from mlip_md.neighbors.lists import allocate as allocate
from mlip_md.neighbors.lists import grow as grow
from mlip_md.neighbors.lists import ladder as ladder
from mlip_md.neighbors.lists import update as update
