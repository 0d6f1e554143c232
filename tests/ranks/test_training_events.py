"""What happens around a step: evaluation, exceptions, unfreezing, overflow, several engines, closing."""

from __future__ import annotations

import pytest

import events
import precision_events
from windlass.conformance.rank_pool import run_ranks

STAGES = [0, 1, 2, 3]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "event",
    [
        events.evaluate_unevenly,
        events.raise_in_forward_then_train,
        events.several_backwards_per_step,
        events.state_dict_in_mid_training,
        events.unfreeze_in_mid_run,
        events.parameter_groups_and_torch_scheduler,
        events.own_torch_optimizer,
        events.build_on_meta,
        events.train_compiled,
        events.gradients_and_state_in_full,
        events.close_gives_back,
        events.dropped_gradients_leave_no_trace,
        events.two_engines_in_one_process,
        events.loss_and_wish_to_stop_travel_with_the_step,
        events.one_sequence_of_dropout_per_rank,
        precision_events.mixed_dtypes_in_one_module,
    ],
    ids=lambda event: event.__name__,
)
def test_event(event: object, stage: int) -> None:
    run_ranks(event, 2, stage)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_overflow_on_one_rank_skips_everywhere(ranks: int, stage: int) -> None:
    run_ranks(precision_events.overflow_on_one_rank, ranks, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_nonfinite_gradient_skips_in_fp32(stage: int) -> None:
    run_ranks(precision_events.nonfinite_in_fp32, 2, stage)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_low_precision_follows_the_master_weight_oracle(stage: int, precision: str) -> None:
    run_ranks(precision_events.low_precision_against_oracle, 2, stage, precision)


def test_sparse_gradient_is_refused() -> None:
    run_ranks(events.refuse_sparse_gradient, 1)


def test_different_plans_are_refused_on_every_rank() -> None:
    run_ranks(events.refuse_different_plans, 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_different_numbers_of_backwards_raise_on_every_rank(stage: int) -> None:
    run_ranks(events.different_backward_counts, 2, stage, fresh=True)


@pytest.mark.parametrize("stage", [0, 1])
def test_different_numbers_of_backwards_work_where_reduction_waits(stage: int) -> None:
    run_ranks(events.different_backward_counts_work, 2, stage)
