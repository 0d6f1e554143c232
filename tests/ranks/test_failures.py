"""A rank that dies, hangs, fails or never comes brings the others down with its name, within seconds."""

from __future__ import annotations

import pytest

import failing
from windlass.conformance.rank_pool import RanksFailed, run_ranks


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_rank_killed_in_mid_step_is_named(stage: int) -> None:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(failing.die_in_mid_step, 3, stage, fresh=True, timeout=60)
    assert set(failure.value.failures) == {1}
    assert failure.value.results == {0: "named", 2: "named"}


@pytest.mark.parametrize("stage", [1, 3])
def test_hung_rank_is_named_within_the_timeout(stage: int) -> None:
    assert run_ranks(failing.hang_in_mid_step, 2, stage, fresh=True, timeout=60)[0] == "named"


def test_rank_that_never_arrives_is_reported_within_the_timeout() -> None:
    assert run_ranks(failing.never_arrive, 2, fresh=True, timeout=60)[0] == "told"


@pytest.mark.parametrize("stage", [0, 3])
def test_rank_that_raises_ends_the_others(stage: int) -> None:
    """An exception that only one rank meets: the others hear of it when that rank leaves."""
    with pytest.raises(RanksFailed) as failure:
        run_ranks(failing.raise_on_one_rank, 2, stage, fresh=True, timeout=60)
    assert "only here" in failure.value.failures[1]
    assert failure.value.results == {0: "named"}
