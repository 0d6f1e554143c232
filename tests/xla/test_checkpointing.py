"""Activation checkpointing asks torch's module of the device for its random state."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from windlass.accelerator.interface import Accelerator


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation_draws_the_same_mask(accelerator: Accelerator, use_reentrant: bool) -> None:
    accelerator.seed(3)
    drop = nn.Sequential(nn.Linear(4, 200), nn.Dropout(0.5)).to(accelerator.device)
    counts = []
    for _ in range(4):
        x = torch.ones(2, 4).to(accelerator.device).requires_grad_()
        kept = checkpoint(drop, x, use_reentrant=use_reentrant)
        kept.sum().backward()
        bias = drop.get_parameter("0.bias")
        gradient = bias.grad
        assert gradient is not None
        drop.zero_grad()
        accelerator.streams.boundary()
        mask = accelerator.to_host(kept).ne(0).to(torch.float32)
        assert 0.3 < float(mask.mean()) < 0.7
        assert torch.equal(mask.sum(0) * 2, accelerator.to_host(gradient))
        counts.append(accelerator.program_counts().compiled)
    assert counts[1:] == counts[1:2] * 3
