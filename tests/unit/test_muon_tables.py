"""Index tables bring matrices to their owners and directions back: checked by moving numbers on the host."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from windlass.core.mesh import data_parallel_mesh
from windlass.core.muon import MuonRules
from windlass.core.muon_plan import Matrix, MuonPlan, floor_bytes
from windlass.core.muon_planner import MuonCosts
from windlass.core.muon_tables import StackLayout, StackTables, make_tables
from windlass.core.muon_uniform_planner import divide_work
from windlass.core.plan import Plan
from windlass.core.planner import PlanSettings, make_plan
from windlass.core.specs import ParamSpec, Role, UnitSpec

ODD = [
    ("a", (5, 7), ()),
    ("b", (96, 32), (32, 32, 32)),
    ("c", (3, 50), ()),
    ("d", (40, 9), (11, 29)),
    ("e", (2, 2), ()),
]
BLOCK = [("qkv", (192, 64), (64, 64, 64)), ("out", (64, 64), ()), ("up", (256, 64), ()), ("down", (64, 256), ())]


def make(shapes: Sequence[tuple[str, tuple[int, int], tuple[int, ...]]], units: int, ranks: int, stage: int) -> Plan:
    specs, places = [], []
    for unit in range(units):
        places.append(UnitSpec(f"u{unit}", (f"u{unit}",), False))
        for name, shape, views in shapes:
            specs.append(
                ParamSpec(f"u{unit}.{name}", shape, "float32", Role.MATRIX, f"u{unit}", algorithm="muon", views=views)
            )
    settings = PlanSettings(
        stage=stage, uniform_program=True, views=False, muon=MuonRules(form="standard"), muon_costs=MuonCosts(0.0)
    )
    return make_plan(specs, places, data_parallel_mesh(ranks), settings)


def move_numbers(plan: Plan, ranks: int, replicated: bool) -> None:
    """Every element has a number of its own, padding -1; each matrix must come to its owner with its own numbers. Then
    numbers come back, negative, to where they came from; what did not travel stays."""
    assert plan.muon is not None
    work = divide_work(plan.muon.each, plan.region_by_name, replicated=replicated)
    layout = work.layout
    assert layout is not None
    values, count = {}, 0
    for region in layout.regions:
        values[region.name] = torch.full((region.numel,), -1.0, dtype=torch.float64)
        for one in region.placements:
            values[region.name][one.start : one.stop] = torch.arange(count, count + one.numel) + 1.0
            count += one.numel
    held = [
        torch.cat([whole if replicated else whole.chunk(ranks)[rank] for whole in values.values()])
        for rank in range(ranks)
    ]
    blocks = [one.view(-1, layout.block) for one in held]
    tables = [make_tables(layout, work.shared, ranks, rank) for rank in range(ranks)]
    received = [torch.cat([*exchange(blocks, tables, layout, rank, "send"), blocks[rank]]) for rank in range(ranks)]
    stacks = [received[rank][tables[rank].take] for rank in range(ranks)]
    check_stacks(layout, work.shared, values, stacks)
    worked = [-one for one in stacks]
    for rank in range(ranks):
        if replicated:
            back = torch.cat([*worked, blocks[rank]])
        else:
            back = torch.cat([*exchange(worked, tables, layout, rank, "give"), worked[rank], blocks[rank]])
        landed = back[tables[rank].land].view(-1)
        travelled = torch.isin(held[rank], torch.cat([values[one.region][one.start : one.stop] for one in work.shared]))
        assert torch.equal(landed[travelled], -held[rank][travelled])
        rest = held[rank] > 0
        rest &= ~travelled
        assert torch.equal(landed[rest], held[rank][rest])


def exchange(
    blocks: Sequence[Tensor], tables: Sequence[StackTables], layout: StackLayout, rank: int, name: str
) -> list[Tensor]:
    """What an all-to-all in equal parts brings to a rank."""
    if layout.replicated:
        return []
    sent = [one[getattr(own, name)] for one, own in zip(blocks, tables, strict=True)]
    return [one[rank * layout.part : (rank + 1) * layout.part] for one in sent]


def check_stacks(
    layout: StackLayout, shared: Sequence[Matrix], values: dict[str, Tensor], stacks: Sequence[Tensor]
) -> None:
    for stack in layout.stacks:
        for owner, own in enumerate(stacks):
            rows = own[stack.first : stack.stop].reshape(stack.count, -1)[:, : stack.rows * stack.columns]
            mine = [one for one in shared if (one.rows, one.columns, one.owner) == (stack.rows, stack.columns, owner)]
            assert len(mine) <= stack.count
            for got, one in zip(rows, mine, strict=False):
                assert torch.equal(got, values[one.region][one.start : one.stop])


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_matrices_come_whole_and_directions_come_back(stage: int, ranks: int) -> None:
    move_numbers(make(ODD, 5, ranks, stage), ranks, replicated=stage == 0)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_exchange_is_near_the_floor_and_work_is_even(ranks: int) -> None:
    """32 blocks of a GPT at stage 3."""
    plan = make(BLOCK, 32, ranks, 3)
    assert plan.muon is not None
    numel = sum(one.numel for one in plan.muon.each)
    cost = plan.muon.prediction
    assert cost.inward[0] + cost.outward[0] < 1.2 * floor_bytes(numel, ranks, 4)
    assert len(set(cost.flops)) == 1
    alone = make(BLOCK, 32, 1, 3).muon
    assert isinstance(alone, MuonPlan)
    assert cost.flops[0] * ranks < 1.02 * alone.prediction.flops[0]


def test_a_block_is_as_long_as_where_things_begin_allows() -> None:
    for shapes, least in ((BLOCK, 64), (ODD, 1)):
        plan = make(shapes, 2, 4, 3)
        assert plan.muon is not None
        layout = divide_work(plan.muon.each, plan.region_by_name, replicated=False).layout
        assert layout is not None
        assert layout.block >= least
        assert all(one.start % layout.block == 0 for one in plan.muon.each)
