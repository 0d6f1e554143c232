"""Workers for tests/ranks/test_muon_memory.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import windlass
from memory_workers import Wide
from muon_workers import costs
from windlass.accelerator.interface import Accelerator
from windlass.conformance.models import batch
from windlass.conformance.opening import opened
from windlass.conformance.training import config_of, my_part, windlass_ranks

MUON = {"type": "Muon", "params": {"lr": 1e-2, "weight_decay": 0.05}}
WAVE = 256 * 1024  # bytes: several waves


def measure_stages(stages: Sequence[int]) -> list[dict[str, Any]]:
    """What each stage has in memory between steps and in the middle of one."""
    with opened() as accelerator:
        return [measure(accelerator, stage) for stage in stages]


def measure(accelerator: Accelerator, stage: int) -> dict[str, Any]:
    """One step of a model in bf16. "muon" is the most that had that tag at any time."""
    torch.manual_seed(0)
    memory, allocate = accelerator.memory, accelerator.memory.empty
    seen = [0]

    def watch(*args: Any, **options: Any) -> Tensor:
        made = allocate(*args, **options)
        seen.append(memory.stats().by_tag.get("muon", 0))
        return made

    config = config_of(stage, 1, windlass_ranks(), bf16={"enabled": True}, optimizer=MUON, muon={"ns_dtype": "fp32"})
    with costs(True, WAVE), windlass.initialize(Wide(), config, accelerator=accelerator) as engine:
        memory.reset_peak()
        with patch.object(memory, "empty", watch):
            x, y = (my_part(t, engine.rank, engine.num_ranks, 0, 1) for t in batch(0))
            engine.backward(engine(x, y))
            assert engine.step()
        stats, prediction, muon = memory.stats(), engine.plan.prediction, engine.plan.muon
        assert muon is not None
        return {
            "by_tag": stats.by_tag,
            "persistent": dict(prediction.persistent),
            "working": dict(prediction.working),
            "peak": stats.peak.value,
            "muon": max(seen),
            "waves": len(muon.waves),
            "elements": sum(one.numel for one in muon.each),
            "others": engine.plan.facts["parameters"] - sum(one.numel for one in muon.each),
        }
