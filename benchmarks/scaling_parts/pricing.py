"""What Muon adds to a step, priced: from plans with and without it, and from the figures of a machine."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from scaling_parts.llama import SHAPES, build_on_meta

from windlass.config import load_config
from windlass.core.muon_plan import floor_bytes
from windlass.core.plan import Plan
from windlass.planning import plan_for


@dataclass(frozen=True)
class Machine:
    """Assumptions. The defaults are of an H100 SXM with an adapter of 400 Gbit/s for each."""

    peak_flop_per_s: float = 989e12  # dense bf16, NVIDIA's data sheet
    newton_schulz_share: float = 0.6  # of the peak, in products of thousands of rows
    training_share: float = 0.4  # of the peak, in forward and backward: the MFU
    link_bytes_per_s: float = 50e9  # into a rank
    tokens: float = 4e6  # of a step, over all ranks


@dataclass(frozen=True)
class Price:
    """One model on one number of ranks. Bytes are received by the rank that receives most, in one optimizer step of
    one micro-step; seconds are of the busiest rank."""

    model: str
    stage: int
    ranks: int
    matrices: int
    muon_numel: int
    flops: int  # of Newton-Schulz
    balance: float  # busiest over mean
    padding: float  # elements of Muon's regions that hold nothing, as a part of those that do
    adamw_bytes: int  # of a step with AdamW alone
    extra_bytes: int  # what Muon adds: update inputs and directions, and padding that travels
    exchanged_bytes: float  # of them inputs and directions, on average over ranks
    formula_bytes: float  # 4 Pm (N - 1) / N^2: the least, where all ranks hold equal parts of every matrix
    deepspeed_bytes: float  # what DeepSpeed adds at stage 3: 8 Pm (N - 1) / N
    momentum_bytes: int  # of a rank
    calls: int  # of collectives
    work_s: float
    link_s: float
    step_s: float  # forward and backward, without communication: 6 FLOPs for each parameter and token

    @property
    def alone(self) -> float:
        """Share of the step, if nothing of it happened side by side."""
        return (self.work_s + self.link_s) / self.step_s

    @property
    def overlapped(self) -> float:
        """Share of the step, if waves travel while others are worked on: the longer of the two."""
        return max(self.work_s, self.link_s) / self.step_s


def price(model: str, stage: int, ranks: int, machine: Machine) -> Price:
    """Plan it, and multiply. bf16 weights, products and directions; fp32 momentum."""
    with_muon, adamw = _plan(model, stage, ranks, "Muon"), _plan(model, stage, ranks, "AdamW")
    muon = with_muon.muon
    assert muon is not None
    numel = sum(one.numel for one in muon.each)
    regions = [region for region in with_muon.regions if region.algorithm == "muon"]
    before = max(_received(adamw, rank) for rank in range(ranks))
    extra = max(_received(with_muon, rank) for rank in range(ranks)) - before
    return Price(
        model=model,
        stage=stage,
        ranks=ranks,
        matrices=muon.count,
        muon_numel=numel,
        flops=max(muon.prediction.flops),
        balance=muon.prediction.balance,
        padding=sum(region.numel for region in regions) / numel - 1,
        adamw_bytes=before,
        extra_bytes=extra,
        exchanged_bytes=sum(muon.prediction.inward + muon.prediction.outward) / ranks,
        formula_bytes=floor_bytes(numel, ranks, 2),
        deepspeed_bytes=8 * numel * (ranks - 1) / ranks if stage == 3 else 0.0,
        momentum_bytes=4 * sum(region.shard_numel for region in regions),
        calls=muon.prediction.calls,
        work_s=max(muon.prediction.flops) / (machine.peak_flop_per_s * machine.newton_schulz_share),
        link_s=extra / machine.link_bytes_per_s,
        step_s=6 * _parameters(model) * machine.tokens / (ranks * machine.peak_flop_per_s * machine.training_share),
    )


def _received(plan: Plan, rank: int) -> int:
    return sum(received for _, received in plan.prediction.step(1, rank).values())


@cache
def _plan(model: str, stage: int, ranks: int, optimizer: str) -> Plan:
    given = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": optimizer},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        **({"muon": {"ns_dtype": "bf16"}} if optimizer == "Muon" else {}),
    }
    return plan_for(build_on_meta(SHAPES[model]), load_config(given, num_ranks=ranks))


@cache
def _parameters(model: str) -> int:
    return sum(parameter.numel() for parameter in build_on_meta(SHAPES[model]).parameters())
