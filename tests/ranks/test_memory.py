"""Bytes per parameter between steps, as the memory facet measures them, and the peak against the plan."""

from __future__ import annotations

import pytest

import memory_workers
from windlass.conformance.rank_pool import run_ranks


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_persistent_bytes_of_mixed_precision(stage: int, ranks: int) -> None:
    """Weights and gradients in two bytes, master and moments in twelve: what each stage divides by the ranks."""
    for measured in run_ranks(memory_workers.measure, ranks, stage):
        parameters, unit = measured["parameters"], measured["largest_unit"]
        bound = {
            0: 2 + 2 + 12 + 4,  # and the summed gradient in fp32, which every rank updates from
            1: 2 + 2 + 12 / ranks,
            2: 2 + 12 / ranks + 4 * 2 * unit / parameters,  # two buffers of a unit's gradients
            3: 16 / ranks,
        }[stage] * parameters
        if stage == 3:
            bound += 4 * unit  # the weights and gradients of the largest unit
        print(f"stage {stage}, {ranks} ranks: {measured['used'] / parameters:.3f} B/parameter, {measured['by_tag']}")
        assert measured["padding"] < 0.005 * parameters
        assert measured["used"] <= bound + 20 * measured["padding"], (measured["used"] / parameters, bound / parameters)
        assert measured["by_tag"] == measured["persistent"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_peak_is_what_the_plan_says(stage: int) -> None:
    for measured in run_ranks(memory_workers.measure, 2, stage):
        planned = sum(measured["persistent"].values()) + sum(measured["working"].values())
        assert measured["used"] <= measured["peak"] <= planned


def test_budget_is_refused_by_the_plan_before_anything_is_allocated() -> None:
    run_ranks(memory_workers.refuse_budget, 2)


def test_units_not_in_use_hold_no_weights() -> None:
    run_ranks(memory_workers.look_at_released_weights, 2)
