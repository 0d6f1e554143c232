"""A small Llama really trained on simulated devices: what its ranks exchanged for Muon, beside what the plan said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scaling_parts.llama import SHAPES, Llama, LlamaShape

import windlass
from windlass.conformance.rank_pool import run_ranks
from windlass.core.muon_plan import floor_bytes

TAG = "muon"
Traffic = dict[str, tuple[int, int]]  # kind -> calls and received bytes of one step


@dataclass(frozen=True)
class Count:
    """One run, by rank."""

    stage: int
    counted: tuple[Traffic, ...]
    planned: tuple[Traffic, ...]
    formula_bytes: float  # 4 Pm (N - 1) / N^2

    @property
    def mean_bytes(self) -> float:
        """Over ranks, of what was counted."""
        return sum(received for traffic in self.counted for _, received in traffic.values()) / len(self.counted)

    @property
    def as_planned(self) -> bool:
        """Whether every rank made the calls and received the bytes of the plan."""
        return self.counted == self.planned


def train_stages(stages: tuple[int, ...], shape: LlamaShape = SHAPES["small"]) -> list[tuple[Traffic, Traffic, int]]:
    """A rank's part, stage by stage."""
    return [_train(stage, shape) for stage in stages]


def _train(stage: int, shape: LlamaShape) -> tuple[Traffic, Traffic, int]:
    """Counted and planned traffic of the second step, and the elements that Muon updates."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "Muon", "params": {"lr": 0.02}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "muon": {"ns_dtype": "bf16"},
    }
    with windlass.initialize(Llama(shape), config) as engine:
        random = torch.Generator().manual_seed(engine.rank)
        before = engine.accelerator.counters.copy()
        for _ in range(2):
            ids = torch.randint(shape.vocabulary, (1, 17), generator=random)
            before = engine.accelerator.counters.copy()
            engine.backward(engine(ids[:, :-1], ids[:, 1:]))
            engine.step()
        tallies = engine.accelerator.counters.since(before).collectives
        counted = {kind: (tally.calls, tally.bytes) for (kind, tag), tally in tallies.items() if tag == TAG}
        expected = engine.plan.prediction.step(1, engine.rank)
        planned = {kind: traffic for (kind, tag), traffic in expected.items() if tag == TAG}
        assert engine.plan.muon is not None
        numel = sum(one.numel for one in engine.plan.muon.each)
    return counted, planned, numel


def count_on_sim(stages: Sequence[int], ranks: int) -> list[Count]:
    """Train at each stage on that many simulated devices, whose processes find this module as their parent does."""
    results = run_ranks(train_stages, ranks, tuple(stages), accelerator="sim", timeout=300.0, fresh=True)
    return sum_up(results, stages)


def sum_up(results: Sequence[Sequence[tuple[Traffic, Traffic, int]]], stages: Sequence[int]) -> list[Count]:
    """What `train_stages` gave on each rank, stage by stage."""
    counts = []
    for stage, by_rank in zip(stages, zip(*results, strict=True), strict=True):
        counted, planned, numels = zip(*by_rank, strict=True)
        counts.append(Count(stage, counted, planned, floor_bytes(numels[0], len(results), 2)))
    return counts
