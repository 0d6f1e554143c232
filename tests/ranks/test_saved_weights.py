"""Stage 3 without views: gathered weights are free between forward and backward, and nothing else is different."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import saved_weights_workers as workers
from windlass.conformance.rank_pool import run_ranks

AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}


@pytest.fixture(autouse=True)
def without_views(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINDLASS_SIM", "seed=7,views=false")


def run(worker: Any, ranks: int, *args: Any) -> list[Any]:
    return run_ranks(worker, ranks, *args, accelerator="sim")


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("more", [{}, AUTOCAST], ids=["fp32", "autocast"])
def test_only_units_in_slots_are_in_memory_after_forward(ranks: int, more: dict[str, Any]) -> None:
    for rank in run(workers.alive_after_forward, ranks, True, "Deep", more):
        assert set(rank["alive"]) <= set(rank["in_slots"])
        assert rank["alive"]
        assert len(rank["in_slots"]) < len(rank["units"]) / 2
        print(
            f"with the hooks: {len(rank['alive'])} of {len(rank['units'])} units, {sum(rank['alive'].values())} bytes"
        )


def test_without_the_hooks_every_unit_is() -> None:
    """What the test above would see if nothing stood in: all but what no node needs, which is the embedding."""
    (rank,) = run(workers.alive_after_forward, 1, False)
    assert set(rank["alive"]) >= set(rank["units"]) - {"embedding"}
    print(f"without: {len(rank['alive'])} of {len(rank['units'])} units, {sum(rank['alive'].values())} bytes")


@pytest.mark.parametrize(
    "more", [pytest.param({}, id="fp32"), pytest.param(AUTOCAST, id="autocast", marks=pytest.mark.slow)]
)
def test_weights_norms_and_traffic_are_those_without_the_hooks(more: dict[str, Any]) -> None:
    models = [model for model in workers.MODELS_TO_COMPARE if model != "Branching"]  # ranks fetch together
    for rank in run(workers.states_with_and_without, 2, models, more):
        assert set(rank) == set(models)
        for model, ((state, norms, calls), (other_state, other_norms, other_calls)) in rank.items():
            assert all(torch.equal(state[name], other_state[name]) for name in other_state), model
            assert norms == other_norms, model
            assert calls == other_calls, model


def test_gradients_that_go_round_a_frozen_blocks_output() -> None:
    run(workers.gradient_round_a_frozen_blocks_output, 2)
