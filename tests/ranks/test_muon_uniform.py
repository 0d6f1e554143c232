"""Muon where every rank runs one program, on the device that compares the operations of the ranks one by one."""

from __future__ import annotations

import functools

import pytest
import torch

from muon_oracle import Case
from uniform_muon_workers import Result, leave_one_rank_out, train_cases, train_plans
from windlass.conformance.rank_pool import run_ranks

EXCHANGE = ("all_to_all", "muon")
UNIFORM, FREE = "seed=5,delay_ms=0,uniform=true", "seed=5,delay_ms=0"
CASES = {
    1: [Case("Fused", 1)],
    2: [
        *(Case("Fused", stage) for stage in (0, 1, 3)),
        Case("Fused", 2, accumulation=2, clip=1.0),
        Case("Sundry", 0, own=False),
        Case("Sundry", 2),
        Case("Mixed", 1),
        Case("Mixed", 3),
    ],
    4: [Case("Mixed", 0), Case("Mixed", 2), Case("Fused", 3), Case("Sundry", 1)],
}
EACH = [(ranks, case) for ranks, cases in CASES.items() for case in cases]


@functools.cache
def results(ranks: int) -> list[dict[Case, Result]]:
    return run_ranks(train_cases, ranks, CASES[ranks], accelerator="sim")


@pytest.fixture(autouse=True)
def _uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", UNIFORM)


@pytest.mark.parametrize(("ranks", "case"), EACH, ids=str)
def test_every_matrix_is_updated_as_if_alone(ranks: int, case: Case) -> None:
    found = [rank[case] for rank in results(ranks)]
    (verdict,) = (one.verdict for one in found if one.verdict is not None)
    assert verdict.problems == []
    assert verdict.updates > 0
    assert len({one.digest for one in found}) == 1


@pytest.mark.parametrize(("ranks", "case"), EACH, ids=str)
def test_costs_are_those_of_the_plan_and_the_host_reads_nothing(ranks: int, case: Case) -> None:
    for one in (rank[case] for rank in results(ranks)):
        assert one.measured.get(EXCHANGE) == one.predicted.get(EXCHANGE)
        if case.model != "Fused":  # which has a unit that no step uses, and so no weights of it travel
            assert one.measured == one.predicted
        assert one.by_tag == one.persistent
        assert one.host_reads == 0


def test_momenta_of_16_bits_are_those_of_a_free_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a learning rate that changes, and a step that is skipped; neither needs another program."""
    plans = [(0, "fp32"), (1, "bf16"), (3, "fp32")]
    runs = {}
    for settings in (UNIFORM, FREE):
        monkeypatch.setenv("WINDLASS_SIM", settings)
        runs[settings] = run_ranks(train_plans, 2, plans, "bf16", accelerator="sim")
    for uniform, free in zip(runs[UNIFORM], runs[FREE], strict=True):
        for (state, compiled), (wanted, _) in zip(uniform, free, strict=True):
            assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []
            assert compiled[2:] == compiled[1:2] * 4


def test_rank_without_gradients_leaves_nobody_alone() -> None:
    for messages in run_ranks(leave_one_rank_out, 2, [0, 1]):
        assert ["the ranks ran different programs in" in message for message in messages] == [True, True]
