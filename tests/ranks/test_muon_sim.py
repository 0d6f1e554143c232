"""Muon's exchange on the strict simulated accelerator: late, shuffled, poisoned, and the same bits all the same."""

from __future__ import annotations

from typing import Any

import pytest

import muon_sim_workers
from muon_oracle import Case
from muon_workers import train_cases
from windlass.conformance.rank_pool import run_ranks

CASES = [*(Case("Sundry", stage) for stage in range(4)), Case("Mixed", 3), Case("Fused", 3, accumulation=2, clip=1.0)]


@pytest.mark.parametrize(
    ("ranks", "seed", "views"),
    [
        (2, 1, False),
        *(pytest.param(2 + seed % 3, seed, bool(seed % 2), marks=pytest.mark.slow) for seed in range(2, 15)),
    ],
)
def test_bits_do_not_depend_on_the_schedule(
    ranks: int, seed: int, views: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WINDLASS_SIM", f"seed={seed},views={str(views).lower()}")
    results = run_ranks(train_cases, ranks, CASES, True, accelerator="sim")
    for case in CASES:
        found = [rank[case] for rank in results]
        assert [one.verdict.problems for one in found if one.verdict is not None] == [[]], case
        assert len({one.digest for one in found}) == 1
        assert all(one.measured == one.predicted for one in found), case
        assert all(one.by_tag == one.persistent for one in found)


@pytest.mark.parametrize(
    "breakage",
    [
        muon_sim_workers.inputs_used_before_they_arrive,
        muon_sim_workers.directions_used_before_they_arrive,
        muon_sim_workers.sent_before_it_is_written,
    ],
)
def test_an_exchange_that_forgets_an_order_is_told(breakage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "seed=1")
    outcomes = run_ranks(muon_sim_workers.train_broken, 2, breakage, accelerator="sim")
    assert any(outcome.startswith("OrderViolation: ") for outcome in outcomes), outcomes
