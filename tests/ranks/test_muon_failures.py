"""A rank that is lost in the middle of Muon's exchange brings the others down with its name."""

from __future__ import annotations

import pytest

import muon_cost_workers as workers
from windlass.conformance.rank_pool import RanksFailed, run_ranks


@pytest.mark.parametrize(
    ("stage", "dies"),
    [(3, True), pytest.param(0, True, marks=pytest.mark.slow), pytest.param(3, False, marks=pytest.mark.slow)],
)
def test_rank_lost_in_mid_exchange_is_named(stage: int, dies: bool) -> None:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(workers.leave_in_mid_exchange, 3, stage, dies, fresh=True, timeout=60)
    assert set(failure.value.failures) == {1}
    assert dies or "only here" in failure.value.failures[1]
    assert failure.value.results == {0: "told", 2: "told"}
