"""The Llama of benchmarks/muon_scaling.py on simulated devices."""

from __future__ import annotations

import muon_scaling_workers
from gpu_benchmark import module
from windlass.conformance.rank_pool import run_ranks

LAYERS, WIDTH, NARROW, HIDDEN = 2, 64, 16, 512
RANKS = 2  # the three large matrices of a layer do not divide by it, those of two layers do


def test_bytes_counted_are_planned_and_within_the_formula() -> None:
    """Stage 3 against the formula; at stage 2 nothing may travel."""
    shape = ("test", LAYERS, WIDTH, 8, 2, HIDDEN, 256)
    results = run_ranks(muon_scaling_workers.train_stages, RANKS, (2, 3), *shape, accelerator="sim")
    joint, sharded = module("scaling_parts.counting").sum_up(results, (2, 3))
    assert joint.as_planned
    assert not any(joint.counted)
    assert sharded.as_planned
    assert all(list(traffic) == ["all_to_all"] for traffic in sharded.counted)
    layer = 2 * WIDTH * WIDTH + 2 * NARROW * WIDTH + 3 * HIDDEN * WIDTH
    assert sharded.formula_bytes == 4 * LAYERS * layer * (RANKS - 1) / RANKS**2
    assert 0 < sharded.mean_bytes <= 1.02 * sharded.formula_bytes
    assert not module("muon_scaling").is_wrong(sharded)
