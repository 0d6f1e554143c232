"""The corner cases of the semantics: each trains like plain PyTorch, at every stage, on several ranks."""

from __future__ import annotations

import pytest

from scenarios import CASES, PER_RANK
from windlass.conformance.rank_pool import run_ranks
from windlass.conformance.training import assert_equals_oracle, train_grid

STEPS = 6


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_case_trains_like_the_oracle(case: str, ranks: int) -> None:
    results = run_ranks(train_grid, ranks, case, [0, 1, 2, 3], [1, 2], STEPS)
    for (_, accumulation), result in results[0].items():
        split = {"ranks": ranks, "accumulation": accumulation} if case in PER_RANK else {}
        norms = assert_equals_oracle(result["state"], case, STEPS, **split)
        assert result["norms"] == pytest.approx(norms, rel=2e-6)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_plain_backward_means_what_it_means_in_torch(stage: int) -> None:
    """loss.backward() on an engine's output divides nothing; the caller divides."""
    results = run_ranks(train_grid, 2, "Network", [stage], [1, 4], STEPS, True)
    for result in results[0].values():
        norms = assert_equals_oracle(result["state"], "Network", STEPS)
        assert result["norms"] == pytest.approx(norms, rel=2e-6)
