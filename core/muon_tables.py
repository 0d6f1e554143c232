"""Where the elements of matrices lie when they are brought together in stacks: arithmetic on sizes, the same on every
rank, and index tables, which are data.

[Note: tables] Where every rank runs one program, no offset in it may depend on the rank. So elements move in blocks of
one length, by tables of block numbers: from what a rank holds to what it sends, from what it received to its stacks of
equal matrices, and back. Parts that ranks exchange and stacks are as long as the longest that any rank needs; what
fills them up is never used.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from windlass.core.muon_plan import Matrix
from windlass.core.owners import find_pieces
from windlass.core.plan import ALIGNMENT, Region


@dataclass(frozen=True)
class Stack:
    """Equal matrices that a rank orthogonalises together; a matrix begins at a block."""

    rows: int
    columns: int
    count: int  # the most matrices of this shape that any rank owns
    first: int  # block of all stacks at which this one begins
    blocks: int  # of each matrix

    @property
    def stop(self) -> int:
        return self.first + self.count * self.blocks


@dataclass(frozen=True)
class StackLayout:
    """How matrices travel between those who hold them and those who own them."""

    replicated: bool  # every rank holds all of each region
    block: int  # elements
    regions: tuple[Region, ...]  # in which they lie, in this order
    stacks: tuple[Stack, ...]
    part: int  # blocks that each rank sends to each other

    @property
    def stacked(self) -> int:
        """Blocks of all stacks of a rank."""
        return self.stacks[-1].stop


@dataclass(frozen=True)
class StackTables:
    """One rank's block numbers, int32 unless that is too narrow."""

    send: Tensor  # [ranks * part] of held blocks
    take: Tensor  # [stacked] of what was received, then of held blocks
    give: Tensor  # [ranks * part] of stacked blocks
    land: Tensor  # [held] of what came back, then of stacked blocks, then of held ones, which stay as they are


def lay_out_stacks(
    matrices: Sequence[Matrix], regions: Mapping[str, Region], ranks: int, *, replicated: bool
) -> StackLayout:
    """Of matrices that have owners."""
    names = dict.fromkeys(one.region for one in matrices)
    block = _find_block(matrices, [regions[name] for name in names])
    owned: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0] * ranks)
    between: dict[tuple[int, int], int] = defaultdict(int)  # blocks, by holder and owner
    for one in matrices:
        owned[one.rows, one.columns][one.owner] += 1
        for holder, _, count in () if replicated else _find_blocks(one, regions[one.region], block):
            if holder != one.owner:
                between[holder, one.owner] += count
    stacks: list[Stack] = []
    first = 0
    for (rows, columns), counts in sorted(owned.items()):
        stacks.append(Stack(rows, columns, max(counts), first, -(-rows * columns // block)))
        first = stacks[-1].stop
    part = max(between.values(), default=0)
    return StackLayout(replicated, block, tuple(regions[name] for name in names), tuple(stacks), part)


def _find_block(matrices: Sequence[Matrix], regions: Sequence[Region]) -> int:
    """The greatest length that divides where everything begins. What it does not divide is the end of a parameter,
    which padding follows up to the next multiple of the alignment."""
    ends: dict[str, int] = defaultdict(int)
    for one in matrices:
        ends[one.name] = max(ends[one.name], -(-one.stop // ALIGNMENT) * ALIGNMENT)
    return math.gcd(*(one.start for one in matrices), *ends.values(), *(region.shard_numel for region in regions))


def _find_blocks(one: Matrix, region: Region, block: int) -> Iterator[tuple[int, int, int]]:
    """(rank, first block in its shard, blocks) of each piece of a matrix."""
    stop = one.start + -(-one.numel // block) * block
    for piece in find_pieces(one.start, stop, region.shard_numel):
        first = piece.start - piece.rank * region.shard_numel
        yield piece.rank, first // block, (piece.stop - piece.start) // block


def make_tables(layout: StackLayout, matrices: Sequence[Matrix], ranks: int, rank: int) -> StackTables:
    """Of one rank, for the matrices of the layout in the same order on every rank."""
    bases: dict[str, int] = {}
    held = 0
    for region in layout.regions:
        bases[region.name] = held
        held += (region.numel if layout.replicated else region.shard_numel) // layout.block
    exchanged = ranks * layout.part
    send, give = (torch.zeros(exchanged, dtype=torch.int64) for _ in range(2))
    take = torch.zeros(layout.stacked, dtype=torch.int64)
    returned = ranks * layout.stacked if layout.replicated else exchanged + layout.stacked
    land = torch.arange(returned, returned + held)
    stacks = {(stack.rows, stack.columns): stack for stack in layout.stacks}
    by_name = {region.name: region for region in layout.regions}
    seen: dict[tuple[int, int, int], int] = defaultdict(int)  # matrices, by shape and owner
    moved: dict[tuple[int, int], int] = defaultdict(int)  # blocks, by holder and owner
    for one in matrices:
        stack, owner, base = stacks[one.rows, one.columns], one.owner, bases[one.region]
        place = stack.first + seen[one.rows, one.columns, owner] * stack.blocks
        seen[one.rows, one.columns, owner] += 1
        if layout.replicated:
            first = base + one.start // layout.block
            land[first : first + stack.blocks] = _count_from(owner * layout.stacked + place, stack.blocks)
            if owner == rank:
                take[place : place + stack.blocks] = _count_from(first, stack.blocks)
            continue
        for holder, first, count in _find_blocks(one, by_name[one.region], layout.block):
            start = moved[holder, owner]
            moved[holder, owner] += 0 if holder == owner else count
            here = slice(base + first, base + first + count)  # of what the holder holds
            there = slice(place, place + count)  # of the owner's stacks
            if holder == rank and owner == rank:
                take[there] = _count_from(exchanged + here.start, count)
                land[here] = _count_from(exchanged + place, count)
            elif holder == rank:
                send[_at(owner, layout.part, start, count)] = _count_from(here.start, count)
                land[here] = _count_from(owner * layout.part + start, count)
            elif owner == rank:
                take[there] = _count_from(holder * layout.part + start, count)
                give[_at(holder, layout.part, start, count)] = _count_from(place, count)
            place += count
    dtype = torch.int32 if returned + held < 2**31 else torch.int64
    return StackTables(*(table.to(dtype) for table in (send, take, give, land)))


def _count_from(first: int, count: int) -> Tensor:
    return torch.arange(first, first + count)


def _at(peer: int, part: int, start: int, count: int) -> slice:
    """Where in what is exchanged with a peer."""
    return slice(peer * part + start, peer * part + start + count)
