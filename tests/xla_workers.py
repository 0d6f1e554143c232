"""What ranks do in the tests of the XLA backend."""

from __future__ import annotations

from collections.abc import Callable

import torch

from windlass.accelerator.errors import CollectiveMismatch
from windlass.accelerator.interface import Work
from windlass.backends.xla.device import XlaAccelerator
from windlass.backends.xla.programs import find_tensors, hash_program
from windlass.conformance.opening import opened


def hash_programs() -> dict[str, str]:
    """The hash of a program with data of this rank's own, and of one with a number of its own."""
    with opened() as accelerator:
        rank = accelerator.collectives.world.rank
        whole = accelerator.memory.empty((8,), torch.float32)
        whole.copy_(torch.arange(8.0) + rank)
        first = accelerator.memory.empty((1,), torch.int64)
        first.copy_(torch.tensor([4 * rank]))
        steps = torch.arange(4).to(accelerator.device)
        accelerator.streams.boundary()
        taken = whole.index_select(0, steps + first)
        hashes = {"offset as data": hash_program(find_tensors())}
        assert accelerator.to_host(taken).tolist() == [5.0 * rank + number for number in range(4)]
        accelerator.streams.boundary()
        del taken
        cut = whole[4 * rank : 4 * rank + 4] * 2.0
        hashes["offset as a number"] = hash_program(find_tensors())
        assert accelerator.to_host(cut).tolist() == [2.0 * (5.0 * rank + number) for number in range(4)]
        return hashes


def come_to_boundaries(odd: int) -> tuple[str, list[float]]:
    """In debug mode: a boundary with equal programs, then one at which rank `odd` has another; what it says, and the
    values of the first."""
    with opened() as accelerator:
        world = accelerator.collectives.world
        weight = torch.ones(4).to(accelerator.device)  # a tensor that the memory facet knows nothing of
        weight.mul_(3.0)
        accelerator.streams.boundary()
        values = accelerator.to_host(weight).tolist()
        weight.add_(weight[:1] if world.rank == odd else weight[1:2])
        try:
            accelerator.streams.boundary()
        except CollectiveMismatch as error:
            return str(error), values
        return "", values


def count_host_trips() -> dict[str, int]:
    """How many programs each collective of two ranks runs when one operation is pending."""
    with opened() as accelerator:
        assert isinstance(accelerator, XlaAccelerator)
        collectives, world = accelerator.collectives, accelerator.collectives.world
        part, whole = accelerator.memory.empty((6,), torch.float32), accelerator.memory.empty((12,), torch.float32)
        part.copy_(torch.arange(6.0))
        whole.copy_(torch.arange(12.0))
        calls: dict[str, Callable[[], Work]] = {
            "all_gather": lambda: collectives.all_gather(whole, part, world),
            "reduce_scatter": lambda: collectives.reduce_scatter(part, whole, world),
            "reduce_scatter of a slice": lambda: collectives.reduce_scatter(part[:3], whole[:6], world),
            "all_reduce": lambda: collectives.all_reduce(part, world),
            "broadcast": lambda: collectives.broadcast(part, 0, world),
        }
        executed = {}
        for name, call in calls.items():
            accelerator.streams.synchronize()
            before = accelerator.program_counts().executed
            part.add_(1.0)
            whole.mul_(0.5)
            work = call()
            executed[name] = accelerator.program_counts().executed - before
            work.wait()
        return executed


def deliver_in_order() -> list[list[float]]:
    """What outputs hold after two gathers into one output, the first waited for last; after a sum of which nobody keeps
    the work; and after one that was asked whether it is done."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        whole = accelerator.memory.empty((world.size,), torch.float32)
        works = []
        for number in (1.0, 2.0):
            mine = torch.full((1,), 10 * number + world.rank).to(accelerator.device)
            works.append(collectives.all_gather(whole, mine, world, tag=f"{number}"))
        for work in reversed(works):
            work.wait()
        forgotten, asked = (torch.full((2,), 1.0 + world.rank).to(accelerator.device) for _ in range(2))
        collectives.all_reduce(forgotten, world, tag="forgotten")
        accelerator.streams.synchronize()
        work = collectives.all_reduce(asked, world, tag="asked")
        while not work.done():
            pass
        return [accelerator.to_host(tensor).tolist() for tensor in (whole, forgotten, asked)]
