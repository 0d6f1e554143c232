"""Muon's part of the planner where every rank runs one program: ranks do as much as each other, shape by shape.

[Note: slots] A region in which every shard looks alike has slots: at the same place of each shard lies a matrix of one
shape, or padding. Its matrices are worked on where they lie. All matrices of the other regions are exchanged, by one
all-to-all each way, and so is what a rank holds whole of them: which one that is depends on the rank.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from windlass.core.muon import MuonRules
from windlass.core.muon_plan import EVERYONE, Matrices, Matrix, MuonPlan, MuonPrediction, number_matrices
from windlass.core.muon_planner import BYTES, FormTable, MuonCosts, find_runs
from windlass.core.muon_tables import StackLayout, lay_out_stacks
from windlass.core.owners import find_pieces
from windlass.core.plan import Region, Rules
from windlass.core.specs import ParamSpec

_CANDIDATES = 16
"""Ranks that are compared as owners of a matrix: those that receive least so far."""


@dataclass(frozen=True, order=True)
class Slot:
    """Where a matrix lies in what each rank holds of a region."""

    start: int
    rows: int
    columns: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.columns


@dataclass(frozen=True)
class Work:
    """What is worked on where it lies, and what is brought together in stacks."""

    slots: Mapping[str, tuple[Slot, ...]]  # by region, sorted
    shared: tuple[Matrix, ...]
    layout: StackLayout | None  # of those


def plan_muon_uniformly(
    specs: Sequence[ParamSpec],
    regions: Sequence[Region],
    table: FormTable,
    muon: MuonRules,
    rules: Rules,
    costs: MuonCosts,
) -> MuonPlan:
    """Find every matrix and its owner. The only wave holds every matrix of a region without slots, those that do not
    travel too. Operations in the prediction count what fills stacks up."""
    ranks, replicated = regions[0].num_shards, rules.update == "replicated"
    by_region = {region.name: region for region in regions}
    draft = [
        Matrices(name, region.name, start, run.rows, run.columns, run.stride, (EVERYONE,) * run.count)
        for region, name, start, run in find_runs(specs, regions)
    ]
    each = number_matrices(draft)
    if replicated:
        owners = _share_shapes(each, table, ranks, BYTES[muon.direction_dtype] * costs.flops_per_byte)
    else:
        owners = _own_evenly(each, by_region)
    matrices, given = [], iter(owners)
    for many in draft:
        matrices.append(replace(many, owners=tuple(next(given) for _ in many.owners)))
    each = number_matrices(matrices)
    work = divide_work(each, by_region, replicated=replicated)
    travelling = tuple(one.index for one in work.shared)
    waves = (travelling,) if travelling and not replicated else ()
    prediction = _predict(work, table, ranks, BYTES[muon.direction_dtype])
    return MuonPlan(muon, dict(sorted(table.forms.items())), tuple(matrices), waves, costs.wave_bytes, prediction)


# -- what lies where -----------------------------------------------------------------------------------------------


def divide_work(each: Sequence[Matrix], regions: Mapping[str, Region], *, replicated: bool) -> Work:
    """Of matrices with owners. `replicated`: every rank holds all of each region; what everyone works on has slots."""
    ranks = next(iter(regions.values())).num_shards
    if replicated:
        slots = _find_slots([one for one in each if one.owner == EVERYONE or ranks == 1], regions, replicated=True)
        shared = tuple(one for one in each if one.owner != EVERYONE and ranks > 1)
    else:
        slots = _find_slots(each, regions, replicated=False)
        shared = tuple(one for one in each if one.region not in slots)
    return Work(slots, shared, lay_out_stacks(shared, regions, ranks, replicated=replicated) if shared else None)


def _find_slots(
    each: Sequence[Matrix], regions: Mapping[str, Region], *, replicated: bool
) -> dict[str, tuple[Slot, ...]]:
    """The slots of each region that has some."""
    found: dict[str, set[Slot]] = defaultdict(set)
    unlike: set[str] = set()
    for one in each:
        held = regions[one.region].numel if replicated else regions[one.region].shard_numel
        if one.start // held == (one.stop - 1) // held:
            found[one.region].add(Slot(one.start % held, one.rows, one.columns))
        else:
            unlike.add(one.region)
    slots = {name: tuple(sorted(own)) for name, own in found.items() if name not in unlike}
    return {name: own for name, own in slots.items() if all(one.stop <= two.start for one, two in pairwise(own))}


# -- who owns what -------------------------------------------------------------------------------------------------


def _share_shapes(each: Sequence[Matrix], table: FormTable, ranks: int, flops_per_element: float) -> list[int]:
    """Where every rank has the whole gradient: the matrices of a shape are dealt out if that is faster than working on
    all of them, though every rank then receives as many as any rank owns from each other."""
    if ranks == 1:
        return [0] * len(each)
    owners = [EVERYONE] * len(each)
    for (rows, columns), alike in _by_shape(each).items():
        dealt = len(alike) - (len(alike) % ranks == 1)  # one that is left over is as fast everywhere
        most = -(-dealt // ranks)
        saved = (dealt - most) * table.flops(rows, columns)
        if saved > most * (ranks - 1) * rows * columns * flops_per_element:
            for place, one in enumerate(alike[:dealt]):
                owners[one.index] = place % ranks
    return owners


def _own_evenly(each: Sequence[Matrix], regions: Mapping[str, Region]) -> list[int]:
    """Matrices in slots belong to who holds them. Of the others each rank gets as many of a shape as any other, at most
    one less, so that the most that two ranks exchange becomes small."""
    ranks = next(iter(regions.values())).num_shards
    slots = _find_slots(each, regions, replicated=False)
    owners = [one.start // regions[one.region].shard_numel for one in each]
    between = [[0] * ranks for _ in range(ranks)]  # elements, by owner and holder
    received = [0] * ranks
    loose = _by_shape([one for one in each if one.region not in slots])
    for _, alike in sorted(loose.items(), key=lambda item: (-item[0][0] * item[0][1], item[0])):
        most = -(-len(alike) // ranks)
        counts = [0] * ranks
        for one in alike:
            pieces = [
                (piece.rank, piece.stop - piece.start)
                for piece in find_pieces(one.start, one.stop, regions[one.region].shard_numel)
            ]
            held = dict(pieces)
            free = sorted((rank for rank in range(ranks) if counts[rank] < most), key=lambda rank: received[rank])
            free = free[:_CANDIDATES] + [rank for rank in held if counts[rank] < most]
            owner = min(
                free,
                key=lambda rank: (
                    max((between[rank][holder] + numel for holder, numel in pieces if holder != rank), default=0),
                    received[rank] - held.get(rank, 0),
                    rank,
                ),
            )
            owners[one.index] = owner
            counts[owner] += 1
            for holder, numel in pieces:
                if holder != owner:
                    between[owner][holder] += numel
                    received[owner] += numel
    return owners


def _by_shape(matrices: Sequence[Matrix]) -> dict[tuple[int, int], list[Matrix]]:
    shapes: dict[tuple[int, int], list[Matrix]] = defaultdict(list)
    for one in matrices:
        shapes[one.rows, one.columns].append(one)
    return shapes


# -- what it costs -------------------------------------------------------------------------------------------------


def _predict(work: Work, table: FormTable, ranks: int, itemsize: int) -> MuonPrediction:
    """The same for every rank."""
    layout = work.layout
    flops = sum(table.flops(slot.rows, slot.columns) for own in work.slots.values() for slot in own)
    flops += sum(stack.count * table.flops(stack.rows, stack.columns) for stack in (layout.stacks if layout else ()))
    inward = outward = most = calls = 0
    if layout is not None:
        block = layout.block * itemsize
        inward = (ranks - 1) * layout.part * block
        outward = (ranks - 1) * layout.stacked * block if layout.replicated else inward
        most = max(ranks * layout.part, layout.stacked) * block
        calls = 1 if layout.replicated else 2 * (layout.part > 0)
    return MuonPrediction((flops,) * ranks, (inward,) * ranks, (outward,) * ranks, calls, most)
