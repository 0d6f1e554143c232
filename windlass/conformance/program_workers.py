"""Workers for level 3 on lazy devices and on those where ranks run one program: how many programs a training compiles
and runs, what it reads, and what ranks are told that ran different ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import windlass
from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import bring_number
from windlass.conformance.models import Network
from windlass.conformance.opening import opened
from windlass.conformance.training import LR, config_of, windlass_ranks
from windlass.conformance.training_workers import ROWS, part_of, start

SCHEDULE = {"type": "WarmupLR", "params": {"warmup_max_lr": LR, "warmup_num_steps": 6, "warmup_type": "linear"}}
VOID_STEP = 4  # of the steps counted from 0, the one whose gradient is not finite


def programs_compiled(stage: int, steps: int, scheduled: bool) -> list[int]:
    """How many programs have been compiled after each step. The learning rate changes in every step, by a scheduler or
    by hand, and one step is void."""
    more: dict[str, Any] = {"scheduler": SCHEDULE} if scheduled else {}
    with opened() as accelerator, start(stage, accelerator=accelerator, **more) as engine:
        counts = []
        for step in range(steps):
            if not scheduled:
                engine.optimizer.param_groups[0]["lr"] = LR / (step + 3)
            updated = _step(engine, step, torch.inf if step == VOID_STEP else 1.0)
            if scheduled:  # which has read it already
                assert bool(updated) == (step != VOID_STEP)
            counts.append(_counts(accelerator)[0])
        assert engine.skipped_steps == 1
        assert engine.global_steps == steps - 1
        return counts


def programs_run(stage: int, accumulation: int, steps: int) -> list[int]:
    """How many programs each step has run, when nobody reads what came of it."""
    with opened() as accelerator, start(stage, accumulation=accumulation, accelerator=accelerator) as engine:
        executed = []
        for step in range(steps):
            before = _counts(accelerator)[1]
            for _ in range(accumulation):
                _step(engine, step, 1.0)
            executed.append(_counts(accelerator)[1] - before)
        assert engine.global_steps == steps
        return executed


def host_reads(stage: int, steps: int, reading: bool) -> list[int]:
    """How many host reads each step has taken; `reading`: all that a step reports is asked for, again and again."""
    with opened() as accelerator, start(stage, accelerator=accelerator) as engine:
        reads = []
        for step in range(steps):
            accelerator.counters.reset()
            updated = _step(engine, step, 1.0)
            if reading:
                for _ in range(2):
                    assert bool(updated)
                    assert engine.grad_norm is not None
                    assert engine.loss is not None
                    assert engine.global_steps == step + 1
                    assert engine.skipped_steps == 0
            reads.append(accelerator.counters.host_reads)
        return reads


def _step(engine: windlass.Engine, step: int, factor: float) -> Any:
    """One micro-step on the batch of `step`; the loss is multiplied by a factor that is data, no constant."""
    engine.backward(engine(*part_of(engine, step)) * bring_number(engine.accelerator, factor))
    return engine.step()


def _counts(accelerator: Accelerator) -> tuple[int, int]:
    """Programs compiled and run, once all that was begun is over."""
    accelerator.streams.synchronize()
    counts = accelerator.program_counts()
    return counts.compiled, counts.executed


class Shortened(Network):
    """Leaves its last block out when it is told to."""

    shorten = False

    def body(self, x: Tensor, ids: Tensor) -> Tensor:
        for block in self.blocks[:-1] if self.shorten else self.blocks:
            x = block(x)
        return x


def run_different_programs(stage: int) -> None:
    """One rank leaves a part of the model out in the third step: every rank is told, with RuntimeError, by the time
    that it reads what came of that step."""
    with pytest.raises(RuntimeError) as caught:
        _shorten_on_one_rank(stage)
    told: list[str] = []
    error: BaseException | None = caught.value
    while error is not None:  # closing an engine in the middle of a step may raise once more
        told.append(str(error))
        error = error.__context__
    assert any("rank" in text for text in told), f"the error does not speak of ranks: {told}"


def _shorten_on_one_rank(stage: int) -> None:
    torch.manual_seed(0)
    with windlass.initialize(Shortened(), config_of(stage, 1, windlass_ranks(), ROWS)) as engine:
        assert isinstance(engine.module, Shortened)
        for step in range(2):
            assert _step(engine, step, 1.0)
        engine.module.shorten = engine.rank == 1
        _step(engine, 2, 1.0)
        assert engine.grad_norm is not None
