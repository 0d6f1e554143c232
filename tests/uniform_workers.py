"""Workers for the core's rules under `uniform_program`, on the CPU declaring itself a lazy device without views."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import windlass
from windlass.accelerator.interface import Accelerator
from windlass.conformance.models import batch, build, loss_of
from windlass.conformance.opening import opened
from windlass.conformance.training import (
    assert_equals_oracle,
    config_of,
    distance,
    my_part,
    train_engine,
    train_grid,
    windlass_ranks,
)


@contextmanager
def uniform_cpu() -> Iterator[Accelerator]:
    with opened() as accelerator:
        accelerator.capabilities = replace(
            accelerator.capabilities, views=False, lazy=True, uniform_program=True, one_sided=False
        )
        yield accelerator


@contextmanager
def start(stage: int, model: str = "Network", **more: Any) -> Iterator[windlass.Engine]:
    with (
        uniform_cpu() as accelerator,
        windlass.initialize(
            build(model), config_of(stage, 1, windlass_ranks(), **more), accelerator=accelerator
        ) as engine,
    ):
        yield engine


def grid(model: str, stages: list[int], accumulations: list[int], steps: int) -> dict[tuple[int, int], dict[str, Any]]:
    with uniform_cpu() as accelerator:
        return train_grid(model, stages, accumulations, steps, accelerator=accelerator)


def reads(stage: int) -> None:
    """Nothing is read until somebody asks, and then once."""
    with start(stage) as engine:
        counters = engine.accelerator.counters
        engine.backward(loss_of(engine(*_part(engine, 0))))
        updated = engine.step()
        engine.backward(loss_of(engine(*_part(engine, 1))))
        second = engine.step()
        assert counters.host_reads == 0
        assert "not read" in repr(second)
        assert (engine.global_steps, engine.skipped_steps) == (2, 0)
        assert counters.host_reads == 1
        assert engine.grad_norm is not None
        assert engine.grad_norm > 0
        assert engine.loss is not None
        assert not engine.stop_requested
        assert bool(second)
        assert second
        assert counters.host_reads == 1
        assert updated  # the first step is asked for now
        assert counters.host_reads == 2


def skipped_step(stage: int) -> None:
    """An inf on one rank: the device leaves everything as it was, and bias corrections go on from there."""
    with start(stage) as engine:
        train_engine(engine, 2)
        before, moments = engine.full_state_dict(), engine.full_optimizer_state("head.weight")
        reads = engine.accelerator.counters.host_reads
        factor = torch.tensor(float("inf") if engine.rank == engine.num_ranks - 1 else 1.0)
        engine.backward(loss_of(engine(*_part(engine, 2))) * factor)
        updated = engine.step()
        assert engine.accelerator.counters.host_reads == reads
        assert not updated
        assert (engine.global_steps, engine.skipped_steps) == (2, 1)
        after, again = engine.full_state_dict(), engine.full_optimizer_state("head.weight")
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert again["step"] == moments["step"] == 2
        assert all(torch.equal(again[key], moments[key]) for key in ("exp_avg", "exp_avg_sq"))
        train_engine(engine, 1, first=2)
        assert_equals_oracle(engine.full_state_dict(), "Network", 3)


class TwoHeads(nn.Module):
    """Two heads of which each call uses one, or both."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.trunk = nn.Linear(6, 5)
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)])

    def forward(self, x: Tensor, used: tuple[int, ...]) -> Tensor:
        hidden = torch.tanh(self.trunk(x))
        outputs = [head(hidden) for index, head in enumerate(self.heads) if index in used]
        return torch.stack(outputs).pow(2).mean()


USED = ((0,), (0, 1), (1,), (0, 1))


def heads_used_by_turns(stage: int) -> None:
    """Parameters with different counts of updates, in one region with others, as plain AdamW counts them."""
    torch.manual_seed(0)
    rows = torch.randn(len(USED), 12, 6)
    model = TwoHeads()
    oracle = TwoHeads()
    optimizer = torch.optim.AdamW(_groups(oracle), lr=1e-2)
    for index, used in enumerate(USED):
        oracle(rows[index], used).backward()
        torch.nn.utils.clip_grad_norm_(oracle.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    with (
        uniform_cpu() as accelerator,
        windlass.initialize(
            model,
            {"train_batch_size": 12, "zero_optimization": {"stage": stage}, "optimizer": {"type": "AdamW"}},
            model_parameters=_groups(model),
            optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2),
            accelerator=accelerator,
        ) as engine,
    ):
        for index, used in enumerate(USED):
            engine.backward(engine(my_part(rows[index], engine.rank, engine.num_ranks, 0, 1), used))
            assert engine.step()
        assert engine.full_optimizer_state("heads.0.weight")["step"] == 3
        assert engine.full_optimizer_state("heads.1.bias")["step"] == 3
        assert engine.full_optimizer_state("trunk.weight")["step"] == 4
        worst = distance(engine.full_state_dict(), dict(oracle.state_dict()))
        assert max(worst.values()) < 1e-6, worst


def ranks_that_differ() -> str:
    """What a step says whose ranks used different modules; nothing has changed, and the next step is good."""
    torch.manual_seed(0)
    rows = torch.randn(12, 6)
    with (
        uniform_cpu() as accelerator,
        windlass.initialize(
            TwoHeads(), {"train_batch_size": 12, "zero_optimization": {"stage": 1}}, accelerator=accelerator
        ) as engine,
    ):
        before = engine.full_state_dict()
        engine.backward(engine(my_part(rows, engine.rank, engine.num_ranks, 0, 1), (engine.rank,)))
        updated = engine.step()
        with pytest.raises(RuntimeError) as caught:
            bool(updated)
        after = engine.full_state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        engine.backward(engine(my_part(rows, engine.rank, engine.num_ranks, 0, 1), (0, 1)))
        assert engine.step()
        return str(caught.value)


def differ_without_asking(stage: int) -> str:
    """Ranks whose steps differ and who do not look: the engine tells when it is closed."""
    rows = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    with uniform_cpu() as accelerator:
        engine = windlass.initialize(TwoHeads(), {"train_batch_size": 12}, accelerator=accelerator)
        for used in ((engine.rank,), (0, 1)):
            engine.backward(engine(my_part(rows, engine.rank, engine.num_ranks, 0, 1), used))
            engine.step()
        with pytest.raises(RuntimeError) as caught:
            engine.close()
        assert (engine.global_steps, engine.skipped_steps) == (1, 0)
        return str(caught.value)


def drop_on_one_rank(stage: int) -> str:
    """One rank forgets its first micro-batch: no rank changes anything, and all are told."""
    with start(stage) as engine:
        before = engine.full_state_dict()
        engine.backward(loss_of(engine(*_part(engine, 0))))
        if engine.rank == 1:
            engine.zero_grad()
        engine.backward(loss_of(engine(*_part(engine, 1))))
        with pytest.raises(RuntimeError) as caught:
            bool(engine.step())
        engine.zero_grad()
        after = engine.full_state_dict()
        assert all(torch.equal(before[name], after[name]) for name in before)
        return str(caught.value)


def nothing_on_one_rank(stage: int) -> str:
    """One rank has no gradients at all: it is told, the others are not left alone, and the next step is good."""
    with start(stage) as engine:
        if engine.rank == 0:
            engine.backward(loss_of(engine(*_part(engine, 0))))
        with pytest.raises(RuntimeError) as caught:
            bool(engine.step())
        train_engine(engine, 2)
        assert_equals_oracle(engine.full_state_dict(), "Network", 2)
        return str(caught.value)


def scheduler_asks(stage: int) -> None:
    """A scheduler must know whether the weights changed: one read per step, and the truth at once."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 4}}
    with start(stage, scheduler=scheduler) as engine:
        for step in range(3):
            engine.backward(loss_of(engine(*_part(engine, step))))
            assert engine.step() is True
        assert engine.accelerator.counters.host_reads == 3
        lr = engine.lr
        engine.backward(loss_of(engine(*_part(engine, 3))) * float("nan"))
        assert engine.step() is False
        assert engine.lr == lr


def save_and_continue(stage: int, directory: str) -> None:
    """A checkpoint of two steps, taken up by another engine, goes on as if nothing had been."""
    with start(stage) as engine:
        train_engine(engine, 2)
        engine.save_checkpoint(directory)
    with start(stage) as engine:
        engine.load_checkpoint(directory)
        assert engine.global_steps == 2
        assert engine.full_optimizer_state("head.weight")["step"] == 2
        train_engine(engine, 2, first=2)
        assert_equals_oracle(engine.full_state_dict(), "Network", 4)


def _groups(model: TwoHeads) -> list[dict[str, Any]]:
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    return [
        {"params": decayed, "weight_decay": 0.1},
        {"params": [parameter for parameter in model.parameters() if parameter.ndim == 1], "weight_decay": 0.0},
    ]


def _part(engine: windlass.Engine, step: int) -> tuple[Tensor, Tensor]:
    ids, targets = batch(step, 48)
    return (
        my_part(ids, engine.rank, engine.num_ranks, 0, 1),
        my_part(targets, engine.rank, engine.num_ranks, 0, 1),
    )
