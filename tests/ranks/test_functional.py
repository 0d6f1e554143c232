"""Models that call the accelerator's kernels train as plain PyTorch does, at stage 0 and with weights sharded."""

from __future__ import annotations

from typing import Any

import pytest

import functional_workers as workers
from windlass.conformance.rank_pool import run_ranks
from windlass.conformance.training import distance

STAGES = [0, 3]
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def check(results: list[dict[int, dict[str, Any]]], tied: bool) -> None:
    losses, state = workers.train_plain(tied)
    for result in results:
        for stage, one in result.items():
            assert one["losses"] == pytest.approx(losses, rel=1e-6), stage
            worst = distance(one["state"], state)
            # Adam divides a gradient by its own size, so where that is next to nothing its rounding is a step.
            assert max(worst.values()) < 3e-5, (stage, worst)
            assert one["named"] == workers.norm_names(tied)
            wanted = {"layer_norm", "layer_norm_backward", "linear_cross_entropy"}
            assert wanted <= one["kernels"], stage


@TIED
@pytest.mark.parametrize("inside", [True, False], ids=["in the head", "beside it"])
def test_losses_and_weights_are_those_of_torch(tied: bool, inside: bool) -> None:
    results = run_ranks(workers.train_fused, 2, STAGES, tied, inside, "before" if inside else "after")
    check(results, tied)
    if inside:  # a weight that is read by its own module needs no more memory than planned
        assert all(result[3]["extra_slots"] == 0 for result in results)


@TIED
def test_on_a_strict_device(tied: bool) -> None:
    check(run_ranks(workers.train_fused, 2, STAGES, tied, True, "before", accelerator="sim"), tied)


@pytest.mark.parametrize(
    "more",
    [{"bf16": {"enabled": True}}, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}],
    ids=["bf16", "autocast"],
)
def test_in_bf16_it_trains_too(more: dict[str, Any]) -> None:
    losses, _ = workers.train_plain(False)
    for result in run_ranks(workers.train_fused, 2, STAGES, False, True, "after", more):
        for one in result.values():
            assert one["losses"] == pytest.approx(losses, rel=2e-2)
