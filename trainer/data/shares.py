"""Batches divided among devices: who computes which structures, in shapes that all of them share.

The plan of an epoch says which structures a step is made of, however many devices there are; here
each of its batches is dealt out. Which structures a device gets, and the shape of its part, are
pure functions of the plan and the number of parts, so every process finds them by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from mlip_md.trainer.data.batching import Batch, BatchBudget, iterate_batches
from mlip_md.trainer.data.store import GraphStore

SIZES = 16
"""Shapes grow in such fractions of an even share: few ones occur, and each compiles anew."""


@dataclasses.dataclass(frozen=True)
class Shares:
    """Which parts of every batch this process computes.

    Attributes:
        parts: of a batch, one for each device of all processes.
        mine: those of this process.
    """

    parts: int = 1
    mine: range = range(1)


def divide(store: GraphStore, indices: np.ndarray, parts: int) -> list[np.ndarray]:
    """Deal the structures of a batch out, the largest first, to and fro.

    So counts differ by one at most, and edges by about those of one structure.

    Args:
        store: the graphs; only their sizes matter.
        indices: (k,) structures of a batch.
        parts: number of parts.

    Returns:
        Indices of structures of each part, in the order of the batch; some empty if k < parts.
    """
    largest = np.argsort(-store.num_edges[indices], kind="stable")
    place = np.arange(len(indices))
    turn, seat = np.divmod(place, parts)
    owner = np.empty(len(indices), np.int64)
    owner[largest] = np.where(turn % 2, parts - 1 - seat, seat)
    return [indices[owner == part] for part in range(parts)]


def share_budget(
    store: GraphStore, divided: Sequence[Sequence[np.ndarray]], budget: BatchBudget
) -> BatchBudget:
    """Shape of the parts of all batches of an epoch: an even share, or what the largest one needs.

    Args:
        store: the graphs; only their sizes matter.
        divided: the parts of every batch, see ``divide``.
        budget: shape of the whole batches.
    """
    parts = len(divided[0])
    flat = [part for batch in divided for part in batch]
    needed = (
        max(int(store.num_atoms[part].sum()) for part in flat) + 1,
        max(int(store.num_edges[part].sum()) for part in flat),
        max(map(len, flat)) + 1,
    )
    whole = (budget.n_node, budget.n_edge, budget.n_graph)
    return BatchBudget(*(_grown(n, w, parts) for n, w in zip(needed, whole, strict=True)))


def _grown(needed: int, whole: int, parts: int) -> int:
    even = max(2, -(-whole // parts))
    step = max(1, even // SIZES)
    return even + max(0, -(-(needed - even) // step) * step)


def iterate_parts(
    store: GraphStore,
    plan: Sequence[np.ndarray],
    budget: BatchBudget,
    shares: Shares | None = None,
    done: int = 0,
    dtype: str = "float32",
) -> Iterator[tuple[np.ndarray, list[Batch]]]:
    """The batches of a plan as ``iterate_batches`` gives them, but only this process's parts.

    Args:
        store: graphs with energy labels; only the structures of these parts are read.
        plan: of the whole epoch, as ``plan_epoch`` gives it.
        budget: shape of the whole batches.
        shares: the parts; None leaves every batch whole.
        done: batches to leave out at the start; the shape of parts is that of all.
        dtype: as ``make_batch`` takes it.

    Returns:
        With the indices of all structures of a batch, the parts.
    """
    if shares is None:
        for indices, batch in iterate_batches(store, plan[done:], budget, dtype=dtype):
            yield indices, [batch]
        return
    divided = [divide(store, indices, shares.parts) for indices in plan]
    room = share_budget(store, divided, budget)
    mine = [parts[k] for parts in divided[done:] for k in shares.mine]
    count = len(shares.mine)
    made = iterate_batches(store, mine, room, ahead=2 * count, dtype=dtype)
    for indices in plan[done:]:
        yield indices, [next(made)[1] for _ in range(count)]
