"""Who orthogonalises which matrix: longest processing time first (Graham 1969), the same on every rank.

Where few and large matrices leave that uneven, they are packed into the least equal capacity that first fit finds
(MULTIFIT: Coffman, Garey & Johnson 1978). Everything here is arithmetic on sizes, with ties broken by order, so that
all ranks come to the same answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

SLACK = 0.02
"""How far above the least load, in parts of a fair share, a rank may be that is preferred for what it holds already."""

EVEN = 1.05
"""The busiest rank's load over the least possible that needs no second try."""
MOST_TRIALS = 100_000
"""Matrices times ranks beyond which packing would take too long. There are then many for each rank, or many idle."""
_HALVINGS = 8  # of the interval in which the least capacity lies

_Loads = tuple[list[int], list[int]]  # owner by matrix, load by rank


@dataclass(frozen=True)
class Piece:
    """Elements of a matrix that lie in one rank's shard."""

    rank: int
    start: int  # in elements of the whole region
    stop: int


def pack_shards(sizes: Sequence[int], shards: int) -> list[list[int]]:
    """Indices of the items in each shard, the fullest shard as empty as was found."""
    owners, _ = assign_owners(sizes, [()] * len(sizes), [0] * shards, most_trials=MOST_TRIALS // 20)
    packed: list[list[int]] = [[] for _ in range(shards)]
    for index, shard in enumerate(owners):
        packed[shard].append(index)
    return packed


def assign_owners(
    costs: Sequence[int], holders: Sequence[Sequence[Piece]], loads: Sequence[int], *, most_trials: int = MOST_TRIALS
) -> _Loads:
    """The owner of each matrix, and the load of each rank afterwards.

    A rank that is nearly as free as the least loaded one and holds more of the matrix is preferred, since what it holds
    need not travel. `loads` are what the ranks have to do already.
    """
    order = sorted(range(len(costs)), key=lambda one: (-costs[one], one))
    found = _deal_longest_first(order, costs, holders, loads)
    least = -(-(sum(costs) + sum(loads)) // max(1, len(loads)))
    least = max(least, *loads, max(costs, default=0) + min(loads, default=0))
    if len(costs) * len(loads) > most_trials or max(found[1]) <= EVEN * least:
        return found
    low, high = least, max(found[1])
    for _ in range(_HALVINGS):
        capacity = (low + high) // 2
        packed = _pack_first_fit(order, costs, holders, loads, capacity)
        if packed is None:
            low = capacity
        else:
            found, high = packed, max(packed[1])
    return found


def _deal_longest_first(
    order: Sequence[int], costs: Sequence[int], holders: Sequence[Sequence[Piece]], loads: Sequence[int]
) -> _Loads:
    """Each to the least loaded rank, or to one that is nearly so and holds more of it."""
    after = list(loads)
    heap = [(load, rank) for rank, load in enumerate(after)]
    heapq.heapify(heap)
    slack = SLACK * (sum(after) + sum(costs)) / max(1, len(after))
    owners = [0] * len(costs)
    for index in order:
        while heap[0][0] != after[heap[0][1]]:
            heapq.heappop(heap)  # out of date
        least, owner = heap[0]
        owner = _largest_holder(holders[index], after, least + slack, owner)
        owners[index] = owner
        after[owner] += costs[index]
        heapq.heappush(heap, (after[owner], owner))
    return owners, after


def _pack_first_fit(
    order: Sequence[int], costs: Sequence[int], holders: Sequence[Sequence[Piece]], loads: Sequence[int], capacity: int
) -> _Loads | None:
    """Each to a rank that holds most of it, or to the first, with room left below `capacity`; None if one has none."""
    after = list(loads)
    owners = [0] * len(costs)
    for index in order:
        most = capacity - costs[index]
        first = next((rank for rank, load in enumerate(after) if load <= most), None)
        if first is None:
            return None
        owner = _largest_holder(holders[index], after, most, first)
        owners[index] = owner
        after[owner] += costs[index]
    return owners, after


def _largest_holder(pieces: Sequence[Piece], loads: Sequence[int], most: float, otherwise: int) -> int:
    """The rank that holds most of a matrix among those with a load up to `most`."""
    held = [(piece.stop - piece.start, -piece.rank) for piece in pieces if loads[piece.rank] <= most]
    return -max(held)[1] if held else otherwise


def find_pieces(start: int, stop: int, shard_numel: int) -> list[Piece]:
    """The parts of elements [start, stop) of a region by the rank that holds them, in order."""
    pieces = []
    while start < stop:
        rank = start // shard_numel
        end = min(stop, (rank + 1) * shard_numel)
        pieces.append(Piece(rank, start, end))
        start = end
    return pieces
