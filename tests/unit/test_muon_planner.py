"""Muon's plan against formulas and a count over single elements: owners, waves, bytes, operations, memory."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from published_models import (
    GPT2,
    GPT_30M,
    LLAMA_8B,
    LLAMA_70B,
    QWEN3_600M,
    Model,
    make_gpt,
    make_llama,
    make_mixture,
)
from windlass.accelerator.polar import COEFFICIENTS
from windlass.core.matrices import find_matrices
from windlass.core.mesh import data_parallel_mesh
from windlass.core.muon import MuonRules
from windlass.core.muon_plan import EVERYONE, MuonPlan, floor_bytes
from windlass.core.muon_planner import MuonCosts
from windlass.core.plan import Plan
from windlass.core.planner import PlanSettings, make_plan
from windlass.core.specs import ParamSpec, Role, UnitSpec

HALF = MuonRules(product_dtype="bfloat16", direction_dtype="bfloat16")
SINGLE = MuonRules()


def plan_of(model: Model, stage: int, ranks: int, rules: MuonRules = HALF, **more: Any) -> Plan:
    settings = PlanSettings(stage=stage, precision="bf16", muon=rules, **more)
    return make_plan(*model, data_parallel_mesh(ranks), settings)


def muon_of(plan: Plan) -> MuonPlan:
    assert plan.muon is not None
    return plan.muon


def small_model() -> Model:
    """Shapes that do not divide: grouped queries in one matrix, a stack of experts, a convolution, odd rows."""
    units = [UnitSpec(name, (name,), False) for name in ("a", "b")]
    shapes: list[tuple[str, tuple[int, ...], Role, tuple[int, ...]]] = [
        ("qkv", (48, 20), Role.MATRIX, (32, 8, 8)),
        ("experts", (5, 12, 16), Role.EXPERTS, ()),
        ("fused", (3, 24, 8), Role.EXPERTS, (12, 12)),
        ("filter", (10, 3, 3, 3), Role.CONV, ()),
        ("odd", (37, 11), Role.MATRIX, ()),
    ]
    specs = [
        ParamSpec(f"{unit.name}.{name}", shape, "float32", role, unit.name, algorithm="muon", views=views)
        for unit in units
        for name, shape, role, views in shapes
    ]
    return [*specs, ParamSpec("b.bias", (37,), "float32", Role.BIAS, "b")], units


WRITTEN_OUT = {  # of small_model's parameters: first element, rows and columns of every matrix
    "qkv": [(0, 32, 20), (640, 8, 20), (800, 8, 20)],
    "experts": [(192 * expert, 12, 16) for expert in range(5)],
    "fused": [(192 * expert + 96 * half, 12, 8) for expert in range(3) for half in range(2)],
    "filter": [(0, 10, 27)],
    "odd": [(0, 37, 11)],
}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_every_matrix_is_found_where_it_lies(stage: int, ranks: int) -> None:
    plan = plan_of(small_model(), stage, ranks)
    found = sorted((one.name, one.start, one.rows, one.columns) for one in muon_of(plan).each)
    wanted = [
        (f"{unit}.{name}", plan.placement_by_name[f"{unit}.{name}"][1].start + start, rows, columns)
        for unit in ("a", "b")
        for name, matrices in WRITTEN_OUT.items()
        for start, rows, columns in matrices
    ]
    assert found == sorted(wanted)
    assert [one.index for one in muon_of(plan).each] == list(range(muon_of(plan).count))


def count_elements(plan: Plan) -> tuple[list[int], list[int], set[int]]:
    """Element by element: bytes of inputs and of directions that each rank receives, and which matrices travel."""
    ranks, size = plan.mesh.size("shard"), 2 if muon_of(plan).rules.direction_dtype == "bfloat16" else 4
    inward, outward, travelling = [0] * ranks, [0] * ranks, set()
    for one in muon_of(plan).each:
        region = plan.region_by_name[one.region]
        for element in range(one.start, one.start + one.rows * one.columns):
            holder = element // region.shard_numel
            if holder != one.owner:
                inward[one.owner] += size
                outward[holder] += size
                travelling.add(one.index)
    return inward, outward, travelling


@pytest.mark.parametrize("rules", [HALF, SINGLE], ids=["half", "single"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_predicted_bytes_are_those_of_the_elements(stage: int, ranks: int, rules: MuonRules) -> None:
    plan = plan_of(small_model(), stage, ranks, rules)
    muon = muon_of(plan)
    inward, outward, travelling = count_elements(plan)
    assert (list(muon.prediction.inward), list(muon.prediction.outward)) == (inward, outward)
    waves = Counter(index for wave in muon.waves for index in wave)
    assert waves == Counter(travelling)  # each once, and no local one
    assert sorted({*muon.local, *travelling}) == list(range(muon.count))
    for rank in range(ranks):
        traffic = plan.prediction.step(1, rank).get(("all_to_all", "muon"), (0, 0))
        assert traffic == (2 * len(muon.waves), inward[rank] + outward[rank])


@pytest.mark.parametrize("cap", [1, 1000, 2000, 1 << 20])
def test_waves_stay_below_their_cap(cap: int) -> None:
    """But for a matrix that is larger than that: it has a wave to itself."""
    plan = plan_of(small_model(), 3, 4, muon_costs=MuonCosts(wave_bytes=cap))
    muon = muon_of(plan)
    largest = 0
    for wave, rank in itertools.product(muon.waves, range(4)):
        sizes = [2 * muon.each[index].numel for index in wave if muon.each[index].owner == rank]
        assert sum(sizes) <= cap or len(sizes) == 1
        largest = max(largest, sum(sizes))
    assert muon.prediction.wave_bytes == largest
    busiest = max(Counter(muon.each[index].owner for wave in muon.waves for index in wave).values())
    assert len(muon.waves) <= busiest  # owners fill their waves side by side
    assert (len(muon.waves) == busiest) == (cap == 1)
    assert (len(muon.waves) == 1) == (cap == 1 << 20)


@pytest.mark.parametrize("coefficients", ["jordan", "ten"])
@pytest.mark.parametrize("stage", [1, 3])
def test_operations_are_those_of_the_products(stage: int, coefficients: str) -> None:
    """Of an n x m matrix, n <= m: X X^T, its square, and their sum times X, of 2 operations a term, in each step."""
    rules = MuonRules(coefficients=COEFFICIENTS[coefficients], product_dtype="bfloat16", form="standard")
    muon = muon_of(plan_of(make_llama(*LLAMA_8B), stage, 8, rules))
    steps = {"jordan": 5, "ten": 10}[coefficients]
    wanted = 0
    for rows, columns in ((4096, 4096), (4096, 4096), (1024, 4096), (1024, 4096), *[(4096, 14336)] * 3):
        n, m = min(rows, columns), max(rows, columns)
        wanted += 32 * steps * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)
    assert sum(muon.prediction.flops) == wanted
    owned = [0] * 8
    for one in muon.each:
        n, m = sorted((one.rows, one.columns))
        owned[one.owner] += steps * (4 * n * n * m + 2 * n**3)
    assert list(muon.prediction.flops) == owned


TABLE = [  # (model, ranks, busiest rank over the mean); what longest-first comes to is in brackets where it is more
    (make_llama(*LLAMA_8B), 8, 1.00),
    (make_llama(*LLAMA_8B), 32, 1.00),
    (make_llama(*LLAMA_8B), 64, 1.06),
    (make_llama(*LLAMA_70B), 32, 1.01),
    (make_llama(*LLAMA_70B), 128, 1.01),
    (make_llama(*QWEN3_600M), 16, 1.03),
    (make_llama(*QWEN3_600M), 64, 1.06),  # (1.11)
    (make_gpt(*GPT2), 8, 1.02),
    (make_gpt(*GPT2), 16, 1.10),
    (make_gpt(*GPT_30M), 8, 1.00),
    (make_gpt(*GPT_30M, split=True), 16, 1.00),
]


@pytest.mark.parametrize(("model", "ranks", "best"), TABLE)
def test_work_is_balanced(model: Model, ranks: int, best: float) -> None:
    """Where there are three matrices for each rank, none does a tenth more than the mean; where all matrices may go
    anywhere, as where every rank has the whole gradient, it is near to what is possible."""
    rules = MuonRules(product_dtype="bfloat16", form="standard")
    for stage in (0, 1, 2, 3):
        muon = muon_of(plan_of(model, stage, ranks, rules, muon_costs=MuonCosts(flops_per_byte=0)))
        assert muon.count >= 3 * ranks
        assert muon.prediction.balance < 1.105
        if stage == 0:
            assert muon.prediction.balance <= best + 0.005


@pytest.mark.parametrize("ranks", [8, 32, 64])
def test_bytes_are_those_of_the_formulas(ranks: int) -> None:
    """Nothing where matrices are dealt; else no rank receives more than the floor of balanced shards, 2 % apart."""
    for model in (make_llama(*LLAMA_8B), make_llama(*LLAMA_70B)):
        numel = sum(spec.numel for spec in model[0] if spec.algorithm == "muon")
        floor = 4 * numel * (ranks - 1) / ranks**2
        assert floor_bytes(numel, ranks, 2) == pytest.approx(floor)
        costs = muon_of(plan_of(model, 3, ranks)).prediction
        assert max(map(sum, zip(costs.inward, costs.outward, strict=True))) <= 1.02 * floor
        if ranks <= 32:
            assert sum(muon_of(plan_of(model, 1, ranks)).prediction.inward) == 0


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_experts_and_heads_that_lie_whole_do_not_travel(ranks: int) -> None:
    muon = muon_of(plan_of(make_mixture(2, 64, 16, 32), 3, ranks))
    travelling = {muon.each[index].name.rpartition(".")[2] for wave in muon.waves for index in wave}
    assert travelling <= {"q", "o"}
    experts = [many for many in muon.matrices if many.name.endswith(("gate", "down"))]
    assert all(many.owners == tuple(place * ranks // 16 for place in range(16)) for many in experts)


def test_ranks_share_work_on_whole_gradients_where_that_pays() -> None:
    """Newton-Schulz takes 30 * 768 operations for an element of GPT-2's squares, and 480 for one of width 16."""
    model = make_gpt(*GPT2)
    for flops_per_byte, everyone in ((0.0, 0), (1e9, 48)):
        muon = muon_of(plan_of(model, 0, 4, muon_costs=MuonCosts(flops_per_byte=flops_per_byte)))
        assert sum(many.owners.count(EVERYONE) for many in muon.matrices) == everyone
        parts = [sum(one.numel for one in muon.each if one.owner == rank) for rank in range(4)]
        assert set(muon.prediction.outward) == {3 * 2 * max(parts)}
        assert muon.prediction.buffer_bytes == 4 * 2 * max(parts)
        assert muon.prediction.calls == (0 if everyone else 1)
    assert muon_of(plan_of(model, 0, 1)).prediction.outward == (0,)
    usual = [sum(m.owners.count(EVERYONE) for m in muon_of(plan_of(model, 0, 4, r)).matrices) for r in (HALF, SINGLE)]
    assert usual == [0, 0]
    tiny = make_gpt(2, 16, 64)
    usual = [sum(m.owners.count(EVERYONE) for m in muon_of(plan_of(tiny, 0, 4, r)).matrices) for r in (HALF, SINGLE)]
    assert usual == [8, 8]


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_planning_takes_no_more_than_in_proportion(stage: int) -> None:
    """Calls of functions, which chance does not move; packing a second time is left to plans of few matrices."""
    calls = []
    for layers in (40, 80, 160):
        model = make_llama(layers, *LLAMA_70B[1:])
        calls.append(count_calls(functools.partial(plan_of, model, stage, 64)))
    assert calls[1] <= 2.3 * calls[0]
    assert calls[2] <= 2.3 * calls[1]


def count_calls(function: Callable[[], object]) -> int:
    """Of functions written in Python."""
    calls = 0

    def note(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(before)
    return calls


def test_a_plan_does_not_depend_on_the_process() -> None:
    script = (
        "import test_muon_planner as t;"
        "print(*(t.plan_of(t.make_llama(*t.QWEN3_600M), stage, 16).hash for stage in (0, 1, 2, 3)))"
    )
    here = os.path.dirname(__file__)
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": f"{here}{os.pathsep}{here}/.."}
    run = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout.split() == [plan_of(make_llama(*QWEN3_600M), stage, 16).hash for stage in (0, 1, 2, 3)]


def test_momentum_is_all_that_is_kept() -> None:
    model = make_gpt(*GPT2)
    numel = sum(spec.numel for spec in model[0] if spec.algorithm == "muon")
    rest = sum(spec.numel for spec in model[0] if spec.algorithm != "muon")
    for stage, ranks in itertools.product((0, 1, 2, 3), (1, 2, 4, 8)):
        share = 1 if stage == 0 else ranks
        plan = plan_of(model, stage, ranks)
        wanted = (4 * numel + 8 * rest) / share
        assert wanted <= plan.prediction.persistent["optimizer"] <= 1.1 * wanted
        narrow = plan_of(model, stage, ranks, MuonRules(momentum_dtype="bfloat16"))
        assert narrow.prediction.persistent["optimizer"] <= 1.1 * (2 * numel + 8 * rest) / share


def test_a_page_says_what_a_person_asks() -> None:
    model = make_llama(*QWEN3_600M)
    page = str(plan_of(model, 3, 8))
    muon = muon_of(plan_of(model, 3, 8))
    travelling = sum(map(len, muon.waves))
    assert f"matrices    196 matrices with {sum(one.numel for one in muon.each):,} elements" in page
    assert f"{196 - travelling:,} lie whole with the rank that works on them; {travelling:,} travel to it" in page
    assert "84 of 3072 x 1024" not in page  # down is the other way round
    assert "56 of 3072 x 1024, standard form" in page
    assert f"the busiest {muon.prediction.balance:.2f} of that" in page
    assert "all_to_all muon: 2 calls" in page
    assert "nothing travels" in str(plan_of(model, 1, 4))
    assert "on the only rank" in str(plan_of(model, 2, 1))
    assert "who sends its directions to all in one all_gather" in str(plan_of(model, 0, 4))
    alone = plan_of(make_gpt(2, 16, 64), 0, 4)
    assert "every rank works on all of them" in str(alone)


def test_the_matrices_of_a_parameter_are_equal_runs() -> None:
    """What stands in a plan is small: a thousand experts are one line."""
    spec = ParamSpec("e", (1000, 64, 32), "float32", Role.EXPERTS, "e", views=(32, 32))
    assert [(run.start, run.count, run.stride) for run in find_matrices(spec)] == [(0, 1000, 2048), (1024, 1000, 2048)]
