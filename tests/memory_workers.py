"""Workers for tests/ranks/test_memory.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import windlass
from windlass.conformance.models import VOCABULARY, Block, Network, batch
from windlass.conformance.training import config_of, my_part, windlass_ranks

LAYERS, WIDE = 16, 128


class Wide(Network):
    """Large enough for padding not to count."""

    def __init__(self) -> None:
        super().__init__(layers=0)
        self.embedding = nn.Embedding(VOCABULARY, WIDE)
        self.blocks = nn.ModuleList(Block(WIDE) for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDE)
        self.head = nn.Linear(WIDE, VOCABULARY, bias=False)


def _start(stage: int, **more: Any) -> windlass.Engine:
    torch.manual_seed(0)
    return windlass.initialize(Wide(), config_of(stage, 1, windlass_ranks(), bf16={"enabled": True}, **more))


def measure(stage: int) -> dict[str, Any]:
    with _start(stage) as engine:
        memory = engine.accelerator.memory
        memory.reset_peak()
        for step in range(2):
            x, y = (my_part(t, engine.rank, engine.num_ranks, 0, 1) for t in batch(step))
            engine.backward(engine(x, y))
            assert engine.step()
        stats = memory.stats()
        units: dict[str, int] = {}
        for region in engine.plan.regions:
            units[region.unit] = units.get(region.unit, 0) + region.numel
        return {
            "used": stats.used.value,
            "peak": stats.peak.value,
            "by_tag": stats.by_tag,
            "persistent": dict(engine.plan.prediction.persistent),
            "working": dict(engine.plan.prediction.working),
            "parameters": engine.plan.facts["parameters"],
            "padding": engine.plan.facts["padding"],
            "largest_unit": max(units.values()),
        }


def refuse_budget() -> None:
    with pytest.raises(ValueError, match=r"the plan needs [\d,]+ bytes of device memory per rank"):
        _start(0, plan={"device_memory_budget": 100_000})
    with _start(3, plan={"device_memory_budget": 11_000_000}) as engine:
        used = engine.accelerator.memory.stats().used.value
        assert used is not None
        assert used <= 11_000_000


def look_at_released_weights() -> None:
    with _start(3) as engine:
        x, y = (my_part(t, engine.rank, engine.num_ranks, 0, 1) for t in batch(0))
        engine.backward(engine(x, y))
        engine.step()
        for name, parameter in engine.module.named_parameters():
            assert parameter.untyped_storage().nbytes() == parameter.element_size(), name
            assert parameter.grad is None
            assert bool(torch.isnan(parameter).all()), name
