"""What must make no difference to Muon: micro-batches, the loss scale, the gradient's scale, the width."""

from __future__ import annotations

import pytest
import torch

import muon_invariance_workers as workers
from windlass.conformance.rank_pool import run_ranks
from windlass.conformance.training import distance


def test_micro_batches_make_no_difference() -> None:
    """1 x 8, 2 x 4, 4 x 2 and 8 x 1 rows at every stage, and Newton-Schulz runs once per matrix and step."""
    ranks = run_ranks(workers.split_batches, 2, "Mixed", [0, 1, 2, 3])
    for (stage, accumulation), (state, _, wanted) in ranks[0].items():
        assert sum(rank[stage, accumulation][1] for rank in ranks) == wanted
        worst = distance(state, ranks[0][stage, 1][0])
        assert max(worst.values()) < 1e-6, (stage, accumulation, worst)


@pytest.mark.parametrize("stage", [1, 3])
def test_loss_scale_makes_no_difference(stage: int) -> None:
    by_scale = run_ranks(workers.scale_losses, 2, stage)[0]
    first, *others = by_scale.values()
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("stage", [0, 3])
def test_scale_of_the_gradient_makes_no_difference(stage: int) -> None:
    assert run_ranks(workers.scale_gradients, 2, stage) == [[], []]


def test_update_has_the_same_size_at_every_width() -> None:
    """0.2 of the learning rate, though the clip norm is 1: clipping acts on gradients, and not on directions. Jordan's
    coefficients leave singular values between 0.7 and 1.2; those that converge give the figure itself."""
    sizes = run_ranks(workers.measure_update_sizes, 2, 2, [64, 128, 256, 512, 1024], "jordan")[0]
    assert max(sizes) / min(sizes) < 1.1, sizes
    assert 0.16 < min(sizes) <= max(sizes) < 0.22, sizes
    sizes = run_ranks(workers.measure_update_sizes, 2, 2, [64, 128, 256, 512], "ten")[0]
    assert sizes == pytest.approx([0.2] * 4, rel=0.02)
