"""What happens around a step: evaluation, exceptions, unfreezing, overflow, several engines, closing."""

from __future__ import annotations

import pytest

import events
from scenarios import EVENTS
from windlass.conformance import precision_workers, training_workers
from windlass.conformance.rank_pool import run_ranks

STAGES = [0, 1, 2, 3]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "event",
    EVENTS,
    ids=lambda event: event.__name__,
)
def test_event(event: object, stage: int) -> None:
    run_ranks(event, 2, stage)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", STAGES)
def test_ranks_may_evaluate_different_numbers_of_batches(stage: int) -> None:
    run_ranks(training_workers.evaluate_between_steps, 2, stage, True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_overflow_on_one_rank_skips_everywhere(ranks: int, stage: int) -> None:
    run_ranks(precision_workers.overflow_on_one_rank, ranks, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_nonfinite_gradient_skips_in_fp32(stage: int) -> None:
    run_ranks(precision_workers.nonfinite_in_fp32, 2, stage)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_low_precision_follows_the_master_weight_oracle(stage: int, precision: str) -> None:
    run_ranks(precision_workers.low_precision_against_oracle, 2, stage, precision)


def test_sparse_gradient_is_refused() -> None:
    run_ranks(events.refuse_sparse_gradient, 1)


def test_different_plans_are_refused_on_every_rank() -> None:
    run_ranks(training_workers.refuse_different_plans, 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_different_numbers_of_backwards_raise_on_every_rank(stage: int) -> None:
    run_ranks(events.different_backward_counts, 2, stage, fresh=True)


@pytest.mark.parametrize("stage", [0, 1])
def test_different_numbers_of_backwards_work_where_reduction_waits(stage: int) -> None:
    run_ranks(events.different_backward_counts_work, 2, stage)
