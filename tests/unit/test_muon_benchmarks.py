"""benchmarks/peers.py --muon and benchmarks/muon_scaling.py: phases, judgements and prices, against numbers by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from gpu_benchmark import module

STEPS = 8


def make_run(candidate: Any, losses: list[float], *, update_s: float = 0.4, number: int = 0) -> Any:
    """Two ranks, the second 0.1 s behind; compute takes 1 s, from a clock that began long ago."""
    step_s = 1.0 + update_s
    ranks = []
    for late in (0.0, 0.1):
        begins = [1000.0 + late + step * step_s for step in range(STEPS)]
        ranks.append([(one, one + 0.4, one + 1.0, one + step_s) for one in begins])
    run = module("peer_ranks.launching").Run
    return run(candidate, number, 0.0, losses=tuple(losses), marks=tuple(ranks), update_processor_ms=(390.0, 410.0))


def test_a_phase_ends_when_its_last_rank_has_ended_it() -> None:
    find_phases = module("peer_ranks.muon_rows").find_phases
    first = [(0.0, 1.0, 2.0, 3.0), (3.0, 4.0, 5.0, 7.0)]  # ends its backward pass first and waits in the update
    second = [(0.0, 1.0, 2.5, 3.5), (3.5, 4.5, 6.0, 7.5)]
    (phases,) = find_phases([first, second], 1)
    assert phases.compute_ms == pytest.approx(2500.0)  # from 3.5 to 6
    assert phases.update_ms == pytest.approx(1500.0)  # from 6 to 7.5
    assert phases.step_ms == pytest.approx(4000.0)


@pytest.fixture
def compared() -> dict[str, Any]:
    """Rows of a comparison in which one system trains what plain PyTorch does, and one something else."""
    candidates, rows = module("peer_ranks.candidates"), module("peer_ranks.muon_rows")
    chosen = candidates.list_muon_candidates(("ddp", "windlass"), (2,))
    plain = [9.0 - 0.5 * step for step in range(STEPS)]
    alone = [loss * 1.01 for loss in plain]
    runs = [make_run(candidates.FLOOR, plain, update_s=0.1)]
    for one in chosen:
        near = one.system in ("plain", "windlass")
        runs.append(make_run(one, [loss * 1.001 for loss in plain] if near else alone))
    floors = {0: rows.find_floors(runs, 2)[0][0]}
    made = rows.make_muon_rows([candidates.FLOOR, *chosen], runs, floors, 2)
    return {row.name: row for row in made}


def test_muons_rows_hold_times_over_the_floor_and_judge_losses(compared: dict[str, Any]) -> None:
    row = compared["windlass-muon-bf16-2"]
    assert row.update_ms == pytest.approx(400.0)
    assert row.compute_ms == pytest.approx(1000.0)
    assert row.over_floor == pytest.approx(1.4 / 1.1)
    assert row.update_processor_ms == pytest.approx(400.0)
    assert row.loss == pytest.approx(6.5 * 1.001)  # after five updates, which the sixth loss is the first to see
    assert row.losses_agree is True
    assert compared["ddp-muon"].losses_agree is False
    assert compared["windlass-bf16-2"].losses_agree is None  # AdamW is another training
    assert compared["floor-muon"].losses_agree is None


def test_goals_are_judged_for_windlass_with_muon_alone(compared: dict[str, Any]) -> None:
    lines = module("peer_ranks.muon_rows").judge_goals(list(compared.values()))
    assert [line.partition(":")[0] for line in lines] == ["windlass-muon-bf16-2"]
    assert all("update 400 ms of 420, reached; step 1.27 of 1.5 floors, reached" in line for line in lines)
    slow = dataclasses.replace(compared["windlass-muon-bf16-2"], update_ms=421.0, over_floor=1.5)
    (line,) = module("peer_ranks.muon_rows").judge_goals([slow])
    assert line.count("missed") == 2


def test_the_floor_is_run_first_in_the_middle_and_last() -> None:
    candidates = module("peer_ranks.candidates")
    chosen = candidates.list_muon_candidates(candidates.SYSTEMS, (0, 1, 2, 3))
    order = candidates.order_round(chosen, 0)
    assert [index for index, one in enumerate(order) if one == candidates.FLOOR] == [0, len(order) // 2, len(order) - 1]
    assert sorted(one.name for one in order if one != candidates.FLOOR) == sorted(one.name for one in chosen)
    assert len({one.name for one in chosen}) == len(chosen)
    assert {one.name for one in chosen if one.system == "deepspeed"} == {
        "deepspeed-muon-0", "deepspeed-muon-2", "deepspeed-muon-unclipped-2",
    }  # fmt: skip


@pytest.mark.parametrize(("stage", "ranks"), [(2, 8), (3, 8), (3, 64)])
def test_prices_of_llama_are_the_published_formulas(stage: int, ranks: int) -> None:
    """Shapes by hand: width 4096, 1024 for keys and values, 14336 in the MLP, 32 layers."""
    pricing = module("scaling_parts.pricing")
    priced = pricing.price("8B", stage, ranks, pricing.Machine())
    shapes = [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(4096, 14336)] * 3
    numel = 32 * sum(n * m for n, m in shapes)
    flops = 32 * sum(20 * n * n * m + 10 * n**3 for n, m in shapes)  # five steps of the standard form
    assert priced.matrices == 224
    assert priced.muon_numel == numel
    assert priced.flops * ranks == pytest.approx(flops * priced.balance, rel=1e-6)
    assert 1.0 <= priced.balance <= 1.1  # there are more than three matrices for each rank
    assert priced.work_s == pytest.approx(priced.flops / 593.4e12)
    assert priced.formula_bytes == pytest.approx(4 * numel * (ranks - 1) / ranks**2)
    assert priced.deepspeed_bytes == (pytest.approx(8 * numel * (ranks - 1) / ranks) if stage == 3 else 0)
    tokens = 4e6 * 6 * (numel + 2 * 128256 * 4096 + 65 * 4096)
    assert priced.step_s == pytest.approx(tokens / (ranks * 989e12 * 0.4))
    if stage == 2:
        assert priced.exchanged_bytes == 0
        assert priced.calls == 0
        # Padding travels with gradients in fp32 and weights in bf16, or gradients in bf16.
        assert priced.padding < 0.1
        assert priced.extra_bytes <= priced.padding * numel * 6
    else:
        assert priced.exchanged_bytes <= 1.02 * priced.formula_bytes
        assert priced.extra_bytes * ranks >= priced.exchanged_bytes
    assert math.isclose(priced.overlapped, max(priced.work_s, priced.link_s) / priced.step_s)


def test_counters_that_contradict_the_plan_are_told() -> None:
    counting, scaling = module("scaling_parts.counting"), module("muon_scaling")
    right = counting.Count(3, ({"all_to_all": (2, 100)},) * 2, ({"all_to_all": (2, 100)},) * 2, 100.0)
    assert not scaling.is_wrong(right)
    assert scaling.is_wrong(dataclasses.replace(right, planned=({"all_to_all": (2, 96)},) * 2))
    assert scaling.is_wrong(dataclasses.replace(right, formula_bytes=97.0))
