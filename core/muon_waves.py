"""One rank's part in a wave: which elements it sends to whom, and where what it receives belongs. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from windlass.core.muon_plan import Matrix
from windlass.core.owners import find_pieces
from windlass.core.plan import Plan


@dataclass(frozen=True)
class HeldPiece:
    """Elements [start, stop) of a region that this rank holds, and where they lie in a buffer sorted by owner."""

    region: str
    start: int
    stop: int
    place: int


@dataclass(frozen=True)
class OwnedPiece:
    """Elements of this rank's matrices, laid one after the other, and where they lie in a buffer sorted by holder."""

    start: int
    stop: int
    place: int


@dataclass(frozen=True)
class Wave:
    """Of one wave, what concerns this rank, in elements. Directions go the way back that update inputs came."""

    matrices: tuple[Matrix, ...]  # that it owns
    held: tuple[HeldPiece, ...]
    owned: tuple[OwnedPiece, ...]
    held_splits: tuple[int, ...]  # by owner
    owned_splits: tuple[int, ...]  # by holder
    most_held: int  # by any rank: what all ranks allocate alike
    most_owned: int


def cut_wave(plan: Plan, matrices: Iterable[Matrix], rank: int) -> Wave:
    """The part that `rank` has in the exchange of these matrices."""
    ranks = plan.mesh.size("shard")
    pieces = [
        (one, piece)
        for one in matrices
        for piece in find_pieces(one.start, one.stop, plan.region_by_name[one.region].shard_numel)
    ]
    between = [[0] * ranks for _ in range(ranks)]  # elements that a rank holds, by owner
    for one, piece in pieces:
        between[piece.rank][one.owner] += piece.stop - piece.start
    owned_by = [list(column) for column in zip(*between, strict=True)]
    to, of = _starts(between[rank]), _starts(owned_by[rank])
    mine: list[Matrix] = []
    held: list[HeldPiece] = []
    owned: list[OwnedPiece] = []
    position = 0
    for one, piece in pieces:
        numel = piece.stop - piece.start
        if piece.rank == rank:
            held.append(HeldPiece(one.region, piece.start, piece.stop, to[one.owner]))
            to[one.owner] += numel
        if one.owner == rank:
            if not mine or mine[-1] is not one:
                mine.append(one)
            owned.append(OwnedPiece(position, position + numel, of[piece.rank]))
            of[piece.rank] += numel
            position += numel
    return Wave(
        tuple(mine),
        tuple(held),
        tuple(owned),
        tuple(between[rank]),
        tuple(owned_by[rank]),
        max(map(sum, between)),
        max(map(sum, owned_by)),
    )


def _starts(splits: Sequence[int]) -> list[int]:
    """Where each rank's elements begin."""
    starts, position = [], 0
    for split in splits:
        starts.append(position)
        position += split
    return starts
