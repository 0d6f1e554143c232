"""Workers for tests/ranks/test_muon_costs.py and test_muon_failures.py: bytes, balance, and ranks that go missing."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import windlass
from muon_models import build
from muon_oracle import Case
from muon_workers import config_of, costs, train_step
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import Kernel
from windlass.conformance.opening import opened
from windlass.conformance.training import my_part
from windlass.core.muon_exchange import Directions
from windlass.core.muon_plan import Matrix
from windlass.models import GPT, ModelShape

LAYERS, WIDTH = 4, 64
SHAPE = ModelShape("narrow", width=WIDTH, layers=LAYERS, heads=4, sequence_length=16)
ROWS, ACCUMULATION, STEPS = 24, 2, 2
MATRICES = 6 * LAYERS  # q, k, v, the projection after attention, up and down
MUON_NUMEL = 12 * LAYERS * WIDTH**2
SOON = 20.0  # seconds; the others must know long before any timeout of the surroundings


@dataclass(frozen=True)
class Books:
    """What one rank counted in its last step."""

    measured: dict[tuple[str, str], tuple[int, int]]
    predicted: dict[tuple[str, str], tuple[int, int]]
    by_tag: dict[str, int]
    persistent: dict[str, int]
    host_reads: int
    operations: int  # of Newton-Schulz
    matrices: int
    adamw_state: int  # bytes of AdamW's moments

    @property
    def received(self) -> int:
        return sum(received for _, received in self.measured.values())


def count_costs(stages: Sequence[int], precision: str) -> dict[tuple[int, str], Books]:
    """A GPT by stage and optimizer, "Muon" or "AdamW"."""
    results = {}
    with opened() as accelerator:
        work = _Work(accelerator)
        for stage in stages:
            for optimizer in ("Muon", "AdamW"):
                results[stage, optimizer] = _count(stage, optimizer, precision, accelerator, work)
    return results


class _Work:
    """Operations of Newton-Schulz in its standard form, from the shapes that kernels are given."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.operations = self.matrices = 0
        chosen = accelerator.kernels.chosen()["polar"]
        (self._inner,) = (
            one.function for one in accelerator.kernels.implementations("polar") if one.implementation == chosen
        )
        accelerator.kernels.register(Kernel("polar", "counting", self._count, 10**6))

    def _count(self, stack: Tensor, coefficients: Any, **options: Any) -> Any:
        count, *shape = stack.shape
        small, large = min(shape), max(shape)
        self.matrices += count
        self.operations += count * len(coefficients) * (4 * small**2 * large + 2 * small**3)
        return self._inner(stack, coefficients, **options)


def _count(stage: int, optimizer: str, precision: str, accelerator: Accelerator, work: _Work) -> Books:
    config = {
        "train_batch_size": ROWS,
        "gradient_accumulation_steps": ACCUMULATION,
        "optimizer": {"type": optimizer, "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
        **({} if precision == "fp32" else {precision: {"enabled": True}}),
    }
    if optimizer == "Muon":
        config["muon"] = {"ns_dtype": precision, "ns_method": "standard", "views": {"*query_key_value.weight": 3}}
    torch.manual_seed(0)
    counters = accelerator.counters
    with costs(wave_bytes=64 * 1024), windlass.initialize(GPT(SHAPE), config, accelerator=accelerator) as engine:
        for step in range(STEPS):
            operations, matrices = work.operations, work.matrices
            counters.reset()
            ids = torch.randint(0, 256, (ROWS, 17), generator=torch.Generator().manual_seed(step))
            for micro in range(ACCUMULATION):
                own = my_part(ids, engine.rank, engine.num_ranks, micro, ACCUMULATION)
                engine.backward(engine(own[:, :-1], own[:, 1:]))
                engine.step()
        regions = [region for region in engine.plan.regions if region.trainable and region.algorithm == "adamw"]
        return Books(
            {key: (tally.calls, tally.bytes) for key, tally in counters.collectives.items()},
            engine.plan.prediction.step(ACCUMULATION, engine.rank),
            accelerator.memory.stats().by_tag,
            dict(engine.plan.prediction.persistent),
            counters.host_reads,
            work.operations - operations,
            work.matrices - matrices,
            8 * sum(region.numel if stage == 0 else region.shard_numel for region in regions),
        )


# -- ranks that go missing ----------------------------------------------------------------------------------------


class _Gone:
    """Ends this rank in the middle of an update: its second batch of directions never comes to be."""

    def __init__(self, dies: bool) -> None:
        self.dies, self.calls = dies, 0

    def work_on(self, directions: Directions, flat: Sequence[tuple[Matrix, Tensor]]) -> None:
        self.calls += 1
        if self.calls == 2 and self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.calls == 2:
            raise ArithmeticError("only here")


def _train(engine: windlass.Engine) -> None:
    for step in range(3):
        train_step(engine, step)


def leave_in_mid_exchange(stage: int, dies: bool) -> str:
    """Rank 1 dies, or raises and closes its engine, while update inputs and directions are on their way."""
    case = Case("Fused", stage)
    with costs():
        engine = windlass.initialize(build(case.model), config_of(case))
    if engine.rank == 1:
        gone = _Gone(dies)
        with patch.object(Directions, "work_on", lambda self, flat: gone.work_on(self, flat)), engine:
            _train(engine)
    began = time.monotonic()
    with pytest.raises(windlass.PeerLost, match="rank 1"):
        _train(engine)
    assert time.monotonic() - began < SOON
    return "told"
