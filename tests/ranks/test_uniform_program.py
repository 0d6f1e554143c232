"""The core where every rank must run the same program and the host learns nothing before the update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import uniform_workers
from scenarios import CASES, EVENTS, PER_RANK, USES
from windlass.conformance import precision_workers
from windlass.conformance.rank_pool import run_ranks
from windlass.conformance.training import assert_equals_oracle, distance, train_grid, train_oracle

STAGES = [0, 1, 2, 3]
OFTEN = {"Tied", "Checkpointed", "UnusedEverywhere", "CalledOften", "Attention", "OneBlockInFourPlaces"}


def run_on_sim(monkeypatch: pytest.MonkeyPatch, worker: Any, num_ranks: int, *args: Any) -> list[Any]:
    """On the device that compares the operations of the ranks one by one."""
    monkeypatch.setenv("WINDLASS_SIM", "seed=5,uniform=true")
    return run_ranks(worker, num_ranks, *args, accelerator="sim")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_stage_is_one_program_on_all_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    state, norms = train_oracle("Network", 3)
    for rank in run_on_sim(monkeypatch, train_grid, ranks, "Network", STAGES, [1, 4], 3):
        for key, result in rank.items():
            assert max(distance(result["state"], state).values()) < 1e-6, key
            assert result["norms"] == pytest.approx(norms, rel=2e-6)
            assert result["measured"] == result["predicted"], key
            assert result["by_tag"] == result["persistent"], key
            assert result["host_reads"] == 1


@pytest.mark.parametrize(
    "case",
    [case if case in OFTEN else pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in PER_RANK],
)
def test_corner_case_is_one_program_on_all_ranks(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for result in run_on_sim(monkeypatch, train_grid, 2, case, STAGES, [1, 2], 3)[0].values():
        assert_equals_oracle(result["state"], case, 3)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("scenario", [*EVENTS, *USES], ids=lambda one: one.__name__)
def test_scenario_is_one_program_on_all_ranks(scenario: Any, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_sim(monkeypatch, scenario, 2, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_is_one_program_on_all_ranks(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_sim(monkeypatch, precision_workers.low_precision_against_oracle, 2, stage, "bf16")


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_stage_trains_like_the_oracle_as_planned(ranks: int) -> None:
    results = run_ranks(uniform_workers.grid, ranks, "Network", STAGES, [1, 4], 4)
    state, norms = train_oracle("Network", 4)
    for rank in results:
        for key, result in rank.items():
            worst = distance(result["state"], state)
            assert max(worst.values()) < 1e-6, (key, worst)
            assert result["norms"] == pytest.approx(norms, rel=2e-6)
            assert result["measured"] == result["predicted"], key
            assert result["by_tag"] == result["persistent"], key
    first = results[0]
    for one, other in [((0, 1), (1, 1)), ((0, 1), (2, 1)), ((0, 1), (3, 1)), ((0, 4), (1, 4)), ((2, 4), (3, 4))]:
        assert all(torch.equal(first[one]["state"][name], first[other]["state"][name]) for name in state)


@pytest.mark.parametrize("stage", STAGES)
def test_the_host_reads_only_when_somebody_asks(stage: int) -> None:
    run_ranks(uniform_workers.reads, 2, stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_is_not_finite_leaves_everything_as_it_was(stage: int) -> None:
    run_ranks(uniform_workers.skipped_step, 2, stage)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ranks", [1, 3])
def test_parameters_keep_counts_of_their_own(ranks: int, stage: int) -> None:
    run_ranks(uniform_workers.heads_used_by_turns, ranks, stage)


def test_ranks_that_touch_different_parameters_are_told_and_lose_nothing() -> None:
    for message in run_ranks(uniform_workers.ranks_that_differ, 2):
        assert "ran different programs in optimizer step 1" in message
        assert "no weight was changed" in message


@pytest.mark.parametrize(
    ("worker", "stage"),
    [
        (uniform_workers.differ_without_asking, 0),
        (uniform_workers.drop_on_one_rank, 1),
        (uniform_workers.drop_on_one_rank, 2),
        (uniform_workers.nothing_on_one_rank, 0),
        (uniform_workers.nothing_on_one_rank, 1),
    ],
)
def test_steps_that_differ_change_nothing_and_are_told(worker: Any, stage: int) -> None:
    for message in run_ranks(worker, 2, stage):
        assert "the ranks ran different programs in" in message


@pytest.mark.parametrize("stage", [0, 3])
def test_a_scheduler_asks_at_every_step(stage: int) -> None:
    run_ranks(uniform_workers.scheduler_asks, 2, stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_checkpoint_goes_on(stage: int, tmp_path: Path) -> None:
    run_ranks(uniform_workers.save_and_continue, 2, stage, str(tmp_path))
