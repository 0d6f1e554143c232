"""The core on the strict simulated accelerator: late, shuffled, poisoned, without views, and right all the same.

Every case has a seed of its own, so that one run of the suite sees hundreds of schedules.
"""

from __future__ import annotations

from typing import Any
from zlib import crc32

import pytest
import torch

import core_mutants
import uses
from scenarios import CASES, EVENTS, PER_RANK, USES
from windlass.conformance import precision_workers
from windlass.conformance.rank_pool import run_ranks
from windlass.conformance.training import assert_equals_oracle, distance, train_grid, train_oracle

STAGES, ACCUMULATIONS = [0, 1, 2, 3], [1, 4]
LONG = (uses.many_backwards_in_bf16,)  # the host's own device runs it at every stage


def run_on_sim(monkeypatch: pytest.MonkeyPatch, settings: str, worker: Any, num_ranks: int, *args: Any) -> list[Any]:
    monkeypatch.setenv("WINDLASS_SIM", settings)
    return run_ranks(worker, num_ranks, *args, accelerator="sim")


def seed_of(*case: object) -> int:
    """A seed that belongs to the case and differs from its neighbours'."""
    return crc32(repr(case).encode()) % 100_000


@pytest.mark.parametrize(
    "seed", [seed if seed < 8 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(50)]
)
def test_every_stage_trains_like_the_oracle_whatever_the_schedule(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages x accumulation, on 1 to 4 ranks in turn; every other seed with views, where slots are kept."""
    settings = f"seed={seed},views={str(seed // 4 % 2 == 1).lower()}"
    results = run_on_sim(monkeypatch, settings, train_grid, 1 + seed % 4, "Network", STAGES, ACCUMULATIONS, 3)
    state, norms = train_oracle("Network", 3)
    for rank in results:
        for key, result in rank.items():
            worst = distance(result["state"], state)
            assert max(worst.values()) < 1e-6, (key, worst)
            assert result["norms"] == pytest.approx(norms, rel=2e-6)
            assert result["measured"] == result["predicted"], key
            assert result["by_tag"] == result["persistent"], key
            assert result["host_reads"] == 1
    first = results[0]
    for one, other in [((0, 1), (1, 1)), ((0, 1), (2, 1)), ((0, 1), (3, 1)), ((0, 4), (1, 4)), ((2, 4), (3, 4))]:
        assert all(torch.equal(first[one]["state"][name], first[other]["state"][name]) for name in state)


@pytest.mark.parametrize("case", CASES)
def test_corner_case_trains_like_the_oracle(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = [0, 1, 2] if case in PER_RANK else STAGES  # where a fetch is a meeting, ranks use the same units
    results = run_on_sim(monkeypatch, f"seed={seed_of(case)}", train_grid, 2, case, stages, [1, 2], 3)
    for (_, accumulation), result in results[0].items():
        split = {"ranks": 2, "accumulation": accumulation} if case in PER_RANK else {}
        assert_equals_oracle(result["state"], case, 3, **split)


@pytest.mark.parametrize(
    ("scenario", "stage"),
    [
        pytest.param(one, stage, id=f"{one.__name__}-{stage}", marks=[pytest.mark.slow] * (one in LONG and stage > 0))
        for one in [*EVENTS, *USES]
        for stage in STAGES
    ],
)
def test_scenario(scenario: Any, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run_on_sim(monkeypatch, f"seed={seed_of(scenario.__name__, stage)}", scenario, 2, stage)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", STAGES)
def test_low_precision_follows_the_oracle(stage: int, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = seed_of(stage, precision)
    run_on_sim(monkeypatch, f"seed={seed}", precision_workers.low_precision_against_oracle, 2, stage, precision)


@pytest.mark.parametrize(
    ("breakage", "stage", "views"),
    [
        (core_mutants.weights_used_before_they_arrive, 3, False),
        (core_mutants.weights_used_before_they_arrive, 3, True),
        (core_mutants.reduced_gradients_used_before_they_arrive, 1, False),
        (core_mutants.reduced_gradients_used_before_they_arrive, 2, True),
        (core_mutants.lanes_start_before_what_they_read_is_written, 2, False),
        (core_mutants.lanes_start_before_what_they_read_is_written, 3, True),
        (core_mutants.shards_rewritten_while_they_are_fetched, 3, False),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_core_that_forgets_an_order_is_told(
    breakage: Any, stage: int, views: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = f"seed=1,views={str(views).lower()}"
    for outcome in run_on_sim(monkeypatch, settings, core_mutants.train_broken, 1, stage, breakage):
        assert outcome.startswith("OrderViolation: "), outcome


def test_parameters_that_stay_views_of_their_region_go_stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `rebind_copies` the model keeps computing with the first weights: seen as a wrong result."""
    worker = core_mutants.states_after_forgotten_copies
    for broken, right in run_on_sim(monkeypatch, "seed=1", worker, 1):
        assert distance(broken, right)["head.weight"] > 1e-4
