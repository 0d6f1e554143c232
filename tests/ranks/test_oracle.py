"""Training on ranks equals plain PyTorch on the whole batch, at every stage, and the stages equal each other."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from windlass.conformance.rank_pool import run_ranks
from windlass.conformance.training import distance, train_grid, train_oracle

STEPS = 20
STAGES, ACCUMULATIONS = [0, 1, 2, 3], [1, 4]


@functools.cache
def grid(ranks: int) -> list[dict[tuple[int, int], dict[str, Any]]]:
    return run_ranks(train_grid, ranks, "Network", STAGES, ACCUMULATIONS, STEPS)


@functools.cache
def oracle() -> tuple[dict[str, torch.Tensor], list[float]]:
    return train_oracle("Network", STEPS)


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_weights_equal_the_oracle(ranks: int, stage: int, accumulation: int) -> None:
    result = grid(ranks)[0][stage, accumulation]
    state, norms = oracle()
    worst = distance(result["state"], state)
    assert max(worst.values()) < 1e-6, worst
    assert result["norms"] == pytest.approx(norms, rel=2e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_rank_ends_with_the_same_bits(ranks: int) -> None:
    results = grid(ranks)
    for key, first in results[0].items():
        for other in results[1:]:
            assert all(torch.equal(first["state"][name], other[key]["state"][name]) for name in first["state"])
            assert first["norms"] == other[key]["norms"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_stages_agree_to_the_bit(ranks: int) -> None:
    """Without accumulation all four; with it 0 with 1, and 2 with 3."""
    results = grid(ranks)[0]
    same = [((0, 1), (1, 1)), ((0, 1), (2, 1)), ((0, 1), (3, 1)), ((0, 4), (1, 4)), ((2, 4), (3, 4))]
    for one, other in same:
        for name, value in results[one]["state"].items():
            assert torch.equal(value, results[other]["state"][name]), (one, other, name)
        assert results[one]["norms"] == results[other]["norms"]


@pytest.mark.parametrize("accumulation", ACCUMULATIONS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_counters_confirm_the_plan(ranks: int, stage: int, accumulation: int) -> None:
    for result in grid(ranks):
        one = result[stage, accumulation]
        assert one["measured"] == one["predicted"]
        assert one["by_tag"] == one["persistent"]
        assert one["host_reads"] == 1
        assert one["extra_slots"] == 0
