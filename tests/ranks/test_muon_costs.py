"""What Muon costs on ranks: bytes beyond AdamW's, Newton-Schulz per rank, momentum."""

from __future__ import annotations

import functools

import pytest

import muon_cost_workers as workers
from muon_cost_workers import MATRICES, MUON_NUMEL, Books
from windlass.conformance.rank_pool import run_ranks

STAGES = [0, 1, 2, 3]
PADDING = 1.1
RANKS = [2, 4]


@functools.cache
def books(ranks: int) -> list[dict[tuple[int, str], Books]]:
    return run_ranks(workers.count_costs, ranks, STAGES, "bf16")


def of(ranks: int, stage: int, optimizer: str = "Muon") -> list[Books]:
    return [rank[stage, optimizer] for rank in books(ranks)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_counters_confirm_the_plan(ranks: int, stage: int) -> None:
    for one in of(ranks, stage):
        assert one.measured == one.predicted
        assert one.by_tag == one.persistent
        assert one.host_reads == 1
    assert sum(one.matrices for one in of(ranks, stage)) == MATRICES


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ranks", RANKS)
def test_stages_1_and_2_send_no_more_than_adamw_but_padding(ranks: int, stage: int) -> None:
    for muon, adamw in zip(of(ranks, stage), of(ranks, stage, "AdamW"), strict=True):
        assert not any(tag == "muon" for _, tag in muon.measured)
        assert muon.received <= PADDING * adamw.received


@pytest.mark.parametrize("ranks", RANKS)
def test_stage_3_sends_what_must_be_sent(ranks: int) -> None:
    """4 Pm (N - 1) / N^2 bytes per rank in 16 bits, or less: owners hold parts already."""
    extra = []
    for muon, adamw in zip(of(ranks, 3), of(ranks, 3, "AdamW"), strict=True):
        extra.append(muon.measured.get(("all_to_all", "muon"), (0, 0))[1])
        assert muon.received - extra[-1] <= PADDING * adamw.received
    assert sum(extra) / ranks <= 1.02 * 4 * MUON_NUMEL * (ranks - 1) / ranks**2


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", RANKS)
def test_work_is_shared_evenly(ranks: int, stage: int) -> None:
    """The busiest rank has at most 1.10 of the mean: there are six matrices or more for each."""
    operations = [one.operations for one in of(ranks, stage)]
    assert max(operations) <= 1.10 * sum(operations) / ranks


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("ranks", RANKS)
def test_momentum_is_sharded(ranks: int, stage: int) -> None:
    for one in of(ranks, stage):
        momentum = one.by_tag["optimizer"] - one.adamw_state
        assert 4 * MUON_NUMEL / ranks <= momentum <= PADDING * 4 * MUON_NUMEL / ranks
