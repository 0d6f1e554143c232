"""What Muon has in memory, as the memory facet measures it: between steps, and at the most."""

from __future__ import annotations

import pytest

import muon_memory_workers
from windlass.conformance.rank_pool import run_ranks

STAGES = [0, 1, 2, 3]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_memory_is_what_the_plan_says(ranks: int) -> None:
    for of_rank in run_ranks(muon_memory_workers.measure_stages, ranks, STAGES):
        for stage, found in zip(STAGES, of_rank, strict=True):
            assert found["by_tag"] == found["persistent"]
            share = 1 if stage == 0 else ranks
            momentum = (4 * found["elements"] + 8 * found["others"]) / share  # and AdamW's two moments of the rest
            assert momentum <= found["by_tag"]["optimizer"] <= 1.1 * momentum
            planned = found["working"]["muon"]
            print(f"stage {stage}, {ranks} ranks, {found['waves']} waves: {found['muon']:,} of {planned:,} bytes")
            assert 0.6 * planned <= found["muon"] <= planned
            assert found["peak"] <= sum(found["persistent"].values()) + sum(found["working"].values())
            assert (found["waves"] > 2) == (stage == 3 and ranks == 4)  # two ranks hold each matrix of a block whole
