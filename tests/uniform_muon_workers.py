"""Workers for Muon where every rank runs one program: what tests/muon_workers.py trains, on devices that want that."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import windlass
from muon_models import batch_of, build, muon_names
from muon_oracle import Case, Trace, Verdict, replay
from muon_workers import config_of, costs, digest_of, train_step
from uniform_workers import uniform_cpu
from windlass.accelerator.interface import Accelerator
from windlass.accelerator.kernels import Kernel
from windlass.accelerator.reference import polar
from windlass.conformance.opening import opened
from windlass.conformance.training import my_part

STEPS = 2  # rows of even length, then of odd length, for which one of the models uses one more block


@dataclass(frozen=True)
class Result:
    """What one rank has to tell of one training."""

    digest: str  # of all weights, norms and momenta
    measured: dict[tuple[str, str], tuple[int, int]]
    predicted: dict[tuple[str, str], tuple[int, int]]
    by_tag: dict[str, int]
    persistent: dict[str, int]
    host_reads: int  # of a step that nobody asks about
    verdict: Verdict | None  # of the rank that replayed it


@contextmanager
def exact() -> Iterator[Accelerator]:
    """The device, whose matrices have the same bits alone and in a stack: with torch's own products some do not."""

    def work_one_by_one(stack: Tensor, *args: Any, **options: Any) -> Tensor:
        return torch.cat([polar(one.unsqueeze(0), *args, **options) for one in stack])

    with opened() as accelerator:
        accelerator.kernels.register(Kernel("polar", "one by one", work_one_by_one, 10**6))
        yield accelerator


def train_cases(cases: Sequence[Case]) -> dict[Case, Result]:
    """Train every case; each is then replayed, matrix by matrix, by one of the ranks."""
    results = {}
    with exact() as accelerator:
        world = accelerator.collectives.world
        for index, case in enumerate(cases):
            results[case] = _train_case(case, accelerator, replays=index % world.size == world.rank)
    return results


def _train_case(case: Case, accelerator: Accelerator, *, replays: bool) -> Result:
    counters = accelerator.counters
    with costs(case.own), windlass.initialize(build(case.model), config_of(case), accelerator=accelerator) as engine:
        assert engine.plan.muon is not None
        names = muon_names(engine.module)
        assert {one.name for one in engine.plan.muon.matrices} == set(names)
        states, norms = [], []
        for step in range(STEPS):
            counters.reset()
            train_step(engine, step, case.accumulation)
            measured = {key: (tally.calls, tally.bytes) for key, tally in counters.collectives.items()}
            reads = counters.host_reads
            norms.append(engine.grad_norm or 0.0)
            states.append(engine.full_state_dict())
        momenta = {name: engine.full_optimizer_state(name)["momentum"] for name in names}
        by_tag = accelerator.memory.stats().by_tag
        predicted = engine.plan.prediction.step(case.accumulation, engine.rank)
        persistent = dict(engine.plan.prediction.persistent)
        ranks, plan, trace = engine.num_ranks, engine.plan.muon, Trace(states, norms, momenta)
    accelerator.streams.synchronize()
    verdict = replay(case, trace, ranks, plan, accelerator) if replays else None
    accelerator.streams.synchronize()  # what one rank did alone is no part of the next program
    return Result(digest_of(trace), measured, predicted, by_tag, persistent, reads, verdict)


Events = tuple[dict[str, Tensor], list[int]]


def train_plans(plans: Sequence[tuple[int, str]], momentum_dtype: str) -> list[Events]:
    """`train_with_events` at each stage, in each precision."""
    with exact() as accelerator:
        return [train_with_events(accelerator, stage, momentum_dtype, precision) for stage, precision in plans]


def train_with_events(accelerator: Accelerator, stage: int, momentum_dtype: str, precision: str = "fp32") -> Events:
    """Three steps, one with another learning rate, one that is not finite, one more. All weights and momenta, and how
    many programs there were after each step, where they are counted. AdamW stands still: its bias corrections are
    rounded otherwise where the host does not know the number of updates."""
    config = config_of(Case("Fused", stage, precision=precision))
    config["muon"]["momentum_dtype"] = momentum_dtype
    config["optimizer"]["params"] |= {"adam_lr": 0.0, "ns_method": "standard"}
    compiled = []
    with (
        exact() as accelerator,
        costs(),
        windlass.initialize(build("Fused"), config, accelerator=accelerator) as engine,
    ):
        for step in range(6):
            for group in engine.optimizer.param_groups:
                group["lr"] *= 0.5 if step == 3 else 1.0
            x, y = (my_part(tensor, engine.rank, engine.num_ranks, 0, 1) for tensor in batch_of(0))
            loss = engine(x, y)
            spoiled = step == 4 and engine.rank == engine.num_ranks - 1
            engine.backward(loss * torch.tensor([float("inf") if spoiled else 1.0]).to(loss.device).reshape(()))
            updated = engine.step()
            accelerator.streams.synchronize()
            if accelerator.capabilities.uniform_program:
                compiled.append(accelerator.program_counts().compiled)
            assert bool(updated) == (step != 4)
        assert engine.skipped_steps == 1
        found = dict(engine.full_state_dict())
        for name in muon_names(engine.module):
            found[f"momentum of {name}"] = engine.full_optimizer_state(name)["momentum"]
    return found, compiled


def train_twice(stage: int) -> list[float]:
    """Losses of two steps on the same rows."""
    losses = []
    with opened() as accelerator, costs():
        config = config_of(Case("Sundry", stage))
        with windlass.initialize(build("Sundry"), config, accelerator=accelerator) as engine:
            for _ in range(2):
                engine.backward(engine(*(my_part(one, engine.rank, engine.num_ranks, 0, 1) for one in batch_of(0))))
                engine.step()
                losses.append(engine.loss or 0.0)
    return losses


def leave_one_rank_out(stages: Sequence[int]) -> list[str]:
    """One rank has no gradients at all: it joins in what travels, no weight changes, it is told, and the next step is
    good."""
    messages = []
    with uniform_cpu() as accelerator, costs():
        for stage in stages:
            config = config_of(Case("Sundry", stage))
            with windlass.initialize(build("Sundry"), config, accelerator=accelerator) as engine:
                before = engine.full_state_dict()
                x, y = (my_part(tensor, engine.rank, engine.num_ranks, 0, 1) for tensor in batch_of(0))
                if engine.rank == 0:
                    engine.backward(engine(x, y))
                with pytest.raises(RuntimeError) as caught:
                    bool(engine.step())
                messages.append(str(caught.value))
                after = engine.full_state_dict()
                assert all(torch.equal(before[name], after[name]) for name in before)
                engine.backward(engine(x, y))
                assert engine.step()
    return messages
