"""Muon's part of the planner: matrices, forms, owners, waves, and what they cost. Pure, as all of it."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from windlass.accelerator.polar import Form, gram_flops, plan_restarts, standard_flops
from windlass.core.matrices import MatrixRun, find_matrices
from windlass.core.muon import MuonRules
from windlass.core.muon_plan import EVERYONE, Matrices, Matrix, MuonPlan, MuonPrediction, shape_key
from windlass.core.owners import Piece, assign_owners, find_pieces
from windlass.core.plan import Region, Rules
from windlass.core.specs import ParamSpec

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_Run = tuple[Region, str, int, MatrixRun]
_ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FLOPS_PER_BYTE = {"float32": 200.0, "bfloat16": 2000.0, "float16": 2000.0}
"""Of matrix products that take as long as receiving a byte: 20 on a host to 4000 on an accelerator on a network, so it
goes by the dtype of products: who multiplies in fp32 is slow at it. It decides only whether ranks that all have the
whole gradient share the work."""
MOST_IMBALANCE = 0.05
"""How much more the busiest rank may have to do for the sake of matrices that stay where they lie whole."""
WAVE_BYTES = 128 * 2**20
"""Of one wave's update inputs on a rank. Two waves are in memory at a time."""


@dataclass(frozen=True)
class MuonCosts:
    """What the choice among equal results follows from."""

    flops_per_byte: float = FLOPS_PER_BYTE["bfloat16"]
    wave_bytes: int = WAVE_BYTES


def usual_costs(rules: MuonRules) -> MuonCosts:
    """Of machines that multiply in the dtype of these rules."""
    return MuonCosts(flops_per_byte=FLOPS_PER_BYTE[rules.product_dtype])


class FormTable:
    """Which form each shape takes, and the operations that it needs."""

    def __init__(self, rules: MuonRules) -> None:
        self._rules = rules
        self._restarts = plan_restarts(rules.coefficients, _ROUNDING[rules.product_dtype])
        self.forms: dict[str, Form] = {}
        self._flops: dict[tuple[int, int], int] = {}

    def flops(self, rows: int, columns: int) -> int:
        """Floating-point operations of Newton-Schulz for one matrix."""
        shape = (rows, columns)
        if shape not in self._flops:
            standard = standard_flops(rows, columns, len(self._rules.coefficients))
            gram = gram_flops(rows, columns, self._rules.coefficients, self._restarts)
            form = self._choose(shape_key(rows, columns), standard, gram)
            self.forms[shape_key(rows, columns)] = form
            self._flops[shape] = gram if form == "gram" else standard
        return self._flops[shape]

    def _choose(self, shape: str, standard: int, gram: int) -> Form:
        """The Gram form is not safe in bfloat16."""
        if self._rules.form != "auto":
            return self._rules.form
        if self._rules.product_dtype == "bfloat16":
            return "standard"
        return self._rules.measured_forms.get(shape, "gram" if gram < standard else "standard")

    def cost(self, spec: ParamSpec) -> int:
        """Operations for all matrices of a parameter."""
        return sum(run.count * self.flops(run.rows, run.columns) for run in find_matrices(spec))


def plan_muon(
    specs: Sequence[ParamSpec],
    regions: Sequence[Region],
    table: FormTable,
    muon: MuonRules,
    rules: Rules,
    costs: MuonCosts,
) -> MuonPlan:
    """Find every matrix, its owner and its wave."""
    runs = find_runs(specs, regions)
    shards = regions[0].num_shards
    if rules.update == "replicated":
        owners = _share_work(runs, table, shards, muon, costs)
    else:
        owners = _own_locally(runs, table, shards)
    matrices = tuple(
        Matrices(name, region.name, start, run.rows, run.columns, run.stride, tuple(own))
        for (region, name, start, run), own in zip(runs, owners, strict=True)
    )
    itemsize = BYTES[muon.direction_dtype]
    by_region = {region.name: region for region in regions}
    waves: tuple[tuple[int, ...], ...] = ()
    if rules.update == "replicated":
        prediction = _predict_shared(matrices, table, shards, itemsize)
    else:
        travelling = _find_travelling(matrices, by_region)
        waves = _make_waves(travelling, itemsize, costs.wave_bytes)
        prediction = _predict_exchanged(matrices, travelling, waves, by_region, table, shards, itemsize)
    return MuonPlan(muon, dict(sorted(table.forms.items())), matrices, waves, costs.wave_bytes, prediction)


def find_runs(specs: Sequence[ParamSpec], regions: Sequence[Region]) -> list[_Run]:
    """Every run of matrices: region, parameter, first element in the region."""
    by_name = {spec.name: spec for spec in specs}
    return [
        (region, placement.name, placement.start + run.start, run)
        for region in regions
        if region.algorithm == "muon"
        for placement in region.placements
        for run in find_matrices(by_name[placement.name])
    ]


def _share_work(
    runs: Sequence[_Run], table: FormTable, shards: int, muon: MuonRules, costs: MuonCosts
) -> list[list[int]]:
    """Where every rank has the whole gradient: each matrix has an owner if that is faster than working it out on
    every rank, though the direction must then be sent to all."""
    numbers = [table.flops(run.rows, run.columns) for *_, run in runs for _ in range(run.count)]
    sizes = [run.numel for *_, run in runs for _ in range(run.count)]
    itemsize = BYTES[muon.direction_dtype]
    shared = [
        index
        for index, flops in enumerate(numbers)
        if shards > 1 and flops * (shards - 1) / shards > sizes[index] * itemsize * costs.flops_per_byte
    ]
    owners, _ = assign_owners([numbers[index] for index in shared], [()] * len(shared), [0] * shards)
    flat = [EVERYONE if shards > 1 else 0] * len(numbers)
    for index, owner in zip(shared, owners, strict=True):
        flat[index] = owner
    return _cut(flat, runs)


def _own_locally(runs: Sequence[_Run], table: FormTable, shards: int) -> list[list[int]]:
    """A matrix that lies whole in one shard belongs to its rank; the others are dealt by cost. Where that leaves some
    rank with too much, whole ones are dealt too, but for those of regions that were laid out so."""
    loads, fixed = [0] * shards, [0] * shards  # with all whole matrices where they lie, and with those laid out so
    flat: list[int] = []
    cut: list[tuple[int, int, Sequence[Piece]]] = []  # index, cost, pieces
    whole: list[tuple[int, int, int]] = []  # index, cost, rank: in regions with a matrix in several shards
    for _, group in itertools.groupby(runs, key=lambda one: one[0].name):
        own_whole, own_cut, own_loads = [], len(cut), [0] * shards
        for region, _, start, run in group:
            flops, shard = table.flops(run.rows, run.columns), region.shard_numel
            for first in range(start, start + run.count * run.stride, run.stride):
                rank, stop = first // shard, first + run.numel
                if stop <= (rank + 1) * shard:
                    own_loads[rank] += flops
                    own_whole.append((len(flat), flops, rank))
                else:
                    cut.append((len(flat), flops, find_pieces(first, stop, shard)))
                flat.append(rank)
        for rank, load in enumerate(own_loads):
            loads[rank] += load
        if len(cut) > own_cut:
            whole += own_whole
        else:
            fixed = list(map(sum, zip(fixed, own_loads, strict=True)))
    most = (1 + MOST_IMBALANCE) * (sum(loads) + sum(flops for _, flops, _ in cut)) / shards
    loose = list(cut)
    for index, flops, rank in whole:
        if loads[rank] > most:
            loads[rank] -= flops
            loose.append((index, flops, (Piece(rank, 0, 1),)))
    loose.sort(key=lambda one: one[0])
    owners, after = _assign(loose, loads)
    if max(after) > most and whole:
        everything = [*cut, *((index, flops, (Piece(rank, 0, 1),)) for index, flops, rank in whole)]
        everything.sort(key=lambda one: one[0])
        others, even = _assign(everything, fixed)
        if max(after) > (1 + MOST_IMBALANCE) * max(even):
            loose, owners = everything, others
    for (index, *_), owner in zip(loose, owners, strict=True):
        flat[index] = owner
    return _cut(flat, runs)


def _assign(matrices: Sequence[tuple[int, int, Sequence[Piece]]], loads: Sequence[int]) -> tuple[list[int], list[int]]:
    return assign_owners([cost for _, cost, _ in matrices], [pieces for *_, pieces in matrices], loads)


def _cut(flat: Sequence[int], runs: Sequence[_Run]) -> list[list[int]]:
    """Owners by run."""
    supply = iter(flat)
    return [list(itertools.islice(supply, run.count)) for *_, run in runs]


def _find_travelling(matrices: Sequence[Matrices], regions: Mapping[str, Region]) -> dict[int, Matrix]:
    """By index: what its owner does not hold whole."""
    found, index = {}, 0
    for many in matrices:
        shard, numel, start = regions[many.region].shard_numel, many.numel, many.start
        for owner in many.owners:
            if not owner * shard <= start <= start + numel <= (owner + 1) * shard:
                found[index] = Matrix(index, many.name, many.region, start, many.rows, many.columns, owner)
            index += 1
            start += many.stride
    return found


def _make_waves(travelling: Mapping[int, Matrix], itemsize: int, most: int) -> tuple[tuple[int, ...], ...]:
    """Wave k holds the k-th share of every owner: matrices of one shape together, up to `most` bytes."""
    shares: dict[int, list[list[int]]] = defaultdict(list)
    filled: dict[int, int] = {}
    for one in sorted(travelling.values(), key=lambda one: (-one.numel, one.rows, one.index)):
        size = one.numel * itemsize
        if one.owner not in filled or filled[one.owner] + size > most:
            shares[one.owner].append([])
            filled[one.owner] = 0
        shares[one.owner][-1].append(one.index)
        filled[one.owner] += size
    count = max((len(own) for own in shares.values()), default=0)
    return tuple(
        tuple(sorted(index for own in shares.values() if number < len(own) for index in own[number]))
        for number in range(count)
    )


def _sum_flops(matrices: Sequence[Matrices], table: FormTable, shards: int) -> tuple[int, ...]:
    """Of Newton-Schulz, by rank."""
    flops = [0] * shards
    for many in matrices:
        each = table.flops(many.rows, many.columns)
        for owner in many.owners:
            for rank in range(shards) if owner == EVERYONE else (owner,):
                flops[rank] += each
    return tuple(flops)


def _predict_shared(matrices: Sequence[Matrices], table: FormTable, shards: int, itemsize: int) -> MuonPrediction:
    """Where ranks send their directions to all, each with room for the largest part."""
    parts = [0] * shards
    for many in matrices:
        for owner in many.owners:
            if owner != EVERYONE and shards > 1:
                parts[owner] += many.numel
    size = max(parts) * itemsize
    flops, nothing = _sum_flops(matrices, table, shards), (0,) * shards
    return MuonPrediction(flops, nothing, (size * (shards - 1),) * shards, int(size > 0), size, size * shards)


def _predict_exchanged(
    matrices: Sequence[Matrices],
    travelling: Mapping[int, Matrix],
    waves: Sequence[Sequence[int]],
    regions: Mapping[str, Region],
    table: FormTable,
    shards: int,
    itemsize: int,
) -> MuonPrediction:
    inward, outward = [0] * shards, [0] * shards
    flights, most_owned = [], []  # of each wave: what its two all-to-alls have in memory, what its matrices do
    for wave in waves:
        owned, held = [0] * shards, [0] * shards
        for one in map(travelling.__getitem__, wave):
            owned[one.owner] += one.numel * itemsize
            for piece in find_pieces(one.start, one.stop, regions[one.region].shard_numel):
                size = (piece.stop - piece.start) * itemsize
                held[piece.rank] += size
                if piece.rank != one.owner:
                    inward[one.owner] += size
                    outward[piece.rank] += size
        flights.append(max(owned) + max(held))
        most_owned.append(max(owned))
    # While a wave is worked on, the next one is on its way in and the one before on its way back.
    buffers = [sum(flights[max(0, wave - 1) : wave + 2]) + own for wave, own in enumerate(most_owned)]
    return MuonPrediction(
        _sum_flops(matrices, table, shards),
        tuple(inward),
        tuple(outward),
        2 * len(waves),
        max(most_owned, default=0),
        max(buffers, default=0),
    )
