"""What users do with engines beyond the plain loop: each like plain PyTorch, or refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

import uses
from windlass.conformance.rank_pool import RanksFailed, run_ranks


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(
    "use",
    [
        uses.backward_twice_through_one_graph,
        uses.two_losses_per_micro_batch,
        uses.one_step_after_all_micro_batches,
        uses.evaluate_in_inference_mode,
        uses.plain_backward_in_fp16,
        uses.frozen_weights_in_bf16_come_from_rank_0,
        uses.many_backwards_in_bf16,
        uses.stale_and_changed_models_are_refused,
        uses.ways_round_a_units_outputs_are_refused,
        uses.parts_of_the_model_can_be_saved,
        uses.schedulers_that_cannot_work_are_refused,
        uses.closed_shards_are_not_trained_on,
    ],
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
