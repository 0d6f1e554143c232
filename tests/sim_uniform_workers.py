"""Workers for devices on which all ranks must run one program: small programs, alike or with a rank that differs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from windlass.accelerator.errors import WindlassError
from windlass.accelerator.interface import Accelerator
from windlass.backends.sim.device import SimAccelerator
from windlass.conformance.opening import opened

Step = Callable[[Accelerator, Tensor, int], object]


def offset(_: Accelerator, weights: Tensor, rank: int) -> object:
    return weights[128 * rank : 128 * rank + 128].neg()


def shape(_: Accelerator, weights: Tensor, rank: int) -> object:
    return torch.ones(rank + 1, 1) * weights


def scalar(_: Accelerator, weights: Tensor, rank: int) -> object:
    return weights.mul(1.0 + rank)


def operation_more(_: Accelerator, weights: Tensor, rank: int) -> object:
    return weights.neg() if rank else None


def branch(_: Accelerator, weights: Tensor, rank: int) -> object:
    return weights.exp() if rank == 1 else weights.cos()


def read_of_a_value(_: Accelerator, weights: Tensor, rank: int) -> object:
    return weights.sum().item() if rank else None


def constant_from_a_read(_: Accelerator, weights: Tensor, rank: int) -> object:
    mine = weights.sum() + torch.tensor(float(rank))
    return weights.mul(mine.item())


def part_of_a_collective(accelerator: Accelerator, weights: Tensor, rank: int) -> object:
    collectives, size = accelerator.collectives, weights.numel() // accelerator.collectives.world.size
    collectives.all_gather(weights, weights[rank * size : (rank + 1) * size], collectives.world, tag="weights").wait()
    return None


def collective_more(accelerator: Accelerator, weights: Tensor, rank: int) -> object:
    if not rank:
        return None
    with accelerator.streams.lane("gather"):
        accelerator.collectives.all_reduce(torch.zeros(3), accelerator.collectives.world, tag="norm")
    return None


def collective_more_that_is_waited_for(accelerator: Accelerator, weights: Tensor, rank: int) -> object:
    if rank:
        with accelerator.streams.lane("gather"):
            work = accelerator.collectives.all_reduce(torch.zeros(3), accelerator.collectives.world, tag="norm")
        work.wait()
    return None


def run_step(step: Step) -> tuple[str, str, float]:
    """What a rank gets at the boundary of a step in which ranks differ, and how many seconds that takes."""
    with opened() as accelerator:
        rank = accelerator.collectives.world.rank
        weights = accelerator.memory.empty((512,), torch.float32, tag="weights").fill_(1.0)
        accelerator.streams.boundary()
        weights.mul_(2.0)
        begun = time.monotonic()
        try:
            step(accelerator, weights, rank)
            accelerator.streams.boundary()
        except WindlassError as error:
            return type(error).__name__, str(error), time.monotonic() - begun
        return "nothing", "", time.monotonic() - begun


def train(steps: int, rate_as_tensor: bool) -> tuple[list[float], dict[str, Any]]:
    """A rank trains on data of its own, and takes its part of a vector by an offset that is a tensor."""
    with opened() as accelerator:
        collectives, memory = accelerator.collectives, accelerator.memory
        world = collectives.world
        assert isinstance(accelerator, SimAccelerator)
        weights = memory.empty((4 * world.size,), torch.float32, tag="weights").fill_(1.0)
        mine, index = torch.tensor(4 * world.rank), torch.arange(4)
        losses = []
        for step in range(steps):
            data = torch.full((4 * world.size,), float(world.rank + step))  # what the host prepares is its own affair
            if world.rank:
                data = data.flip(0).abs()
            leaf = weights.detach().requires_grad_()
            loss = (leaf * data).sum()
            loss.backward()
            gradient, part = leaf.grad, torch.empty(4)
            assert gradient is not None
            collectives.reduce_scatter(part, gradient, world, tag="gradients").wait()
            rate = torch.tensor(0.5**step) if rate_as_tensor else 0.5**step
            part = weights.index_select(0, index + mine) - part * rate
            collectives.all_gather(weights, part, world, tag="weights").wait()
            losses += accelerator.read_host(loss)
            accelerator.streams.boundary()
        counts = accelerator.program_counts()
        return accelerator.to_host(weights).tolist(), {"compiled": counts.compiled, "executed": counts.executed}
