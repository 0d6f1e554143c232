"""What users do with engines beyond the plain loop: each like plain PyTorch, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

import uses
from scenarios import USES
from windlass.conformance.rank_pool import RanksFailed, run_ranks


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "use",
    USES,
    ids=lambda use: use.__name__,
)
def test_use(use: object, stage: int) -> None:
    run_ranks(use, 2, stage)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "use",
    [
        uses.multi_step_schedule_resumes,
        uses.unsavable_client_state_is_refused_on_every_rank,
        uses.frozen_parameters_load_across_stages,
    ],
    ids=lambda use: use.__name__,
)
def test_checkpoint_use(use: object, tmp_path: Path) -> None:
    run_ranks(use, 2, str(tmp_path))  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [0, 1])
def test_rank_without_a_backward_adds_zeros_where_reduction_waits(stage: int) -> None:
    run_ranks(uses.rank_without_a_backward, 2, stage)


@pytest.mark.parametrize("stage", [2, 3])
def test_rank_without_a_backward_is_told_where_units_are_reduced(stage: int) -> None:
    with pytest.raises(RanksFailed) as failure:
        run_ranks(uses.rank_without_a_backward, 2, stage, fresh=True)
    assert all("CollectiveMismatch" in text for text in failure.value.failures.values())
