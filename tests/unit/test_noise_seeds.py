"""Moments of 16 bits are rounded by other noise in each region and update, and by the same after a skipped one."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn

import windlass
from windlass.core.captured import Issuer

CONFIG = {"bf16": {"enabled": True, "bf16_optimizer_states": True}, "gradient_clipping": 0}
SKIPPED = 2  # the step whose gradient is not finite


class Stack(nn.Module):
    """A region for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.sum()


def test_no_two_updates_of_a_run_share_a_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[list[list[int]]] = []
    keep = Issuer.keep

    def watch(issuer: Issuer, name: str, value: Tensor) -> Tensor:
        if name == "noise":
            steps.append(value.tolist())
        return keep(issuer, name, value)

    monkeypatch.setattr(Issuer, "keep", watch)
    with (
        contextlib.closing(windlass.open_accelerator("cpu")) as accelerator,
        windlass.initialize(Stack(), CONFIG, accelerator=accelerator) as engine,
    ):
        for step in range(5):
            loss = engine(torch.ones(1, 4))
            engine.backward(loss * float("inf") if step == SKIPPED else loss)
            assert engine.step() == (step != SKIPPED)
        regions = len(engine.plan.regions)
    assert regions == 3
    assert [len(noise) for noise in steps] == [regions] * 5
    assert steps[SKIPPED + 1] == steps[SKIPPED]  # nothing was written by it
    seeds = [seed for step, noise in enumerate(steps) if step != SKIPPED for seed, _ in noise]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert {first for noise in steps for _, first in noise} == {0}  # a region is counted from its beginning
