"""How bytes travel changes nothing: gloo, where every fetch is a meeting, and shared pages give the same bits."""

from __future__ import annotations

import pytest
import torch

from cpu_collective_workers import train_over
from windlass.conformance.rank_pool import RanksFailed, run_ranks
from windlass.conformance.training import assert_equals_oracle

STEPS = 4


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("case", ["Network", "Tied", "Checkpointed", "CalledOften"])
def test_gloo_equals_shared_pages_to_the_bit(case: str, ranks: int) -> None:
    stages, accumulations = [0, 1, 2, 3], [1, 2]
    shared, gloo = (
        run_ranks(train_over, ranks, transport, case, stages, accumulations, STEPS)[0] for transport in ("auto", "gloo")
    )
    for key, result in shared.items():
        for name, value in result["state"].items():
            assert torch.equal(value, gloo[key]["state"][name]), (key, name)
        if case == "Network":
            assert gloo[key]["measured"] == gloo[key]["predicted"] == result["measured"]


def test_ranks_that_use_different_units_work_on_gloo_while_weights_are_resident() -> None:
    result = run_ranks(train_over, 2, "gloo", "Branching", [2], [1], STEPS)[0][2, 1]
    assert_equals_oracle(result["state"], "Branching", STEPS, ranks=2)


def test_ranks_that_use_different_units_are_told_where_a_fetch_is_a_meeting() -> None:
    """Gathered weights over gloo: both ranks raise, at once, instead of waiting for each other."""
    with pytest.raises(RanksFailed) as failure:
        run_ranks(train_over, 2, "gloo", "Branching", [3], [1], STEPS, fresh=True)
    assert all("CollectiveMismatch" in text for text in failure.value.failures.values())
