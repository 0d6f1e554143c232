"""What the ranks of tests/ranks/test_generic_collectives.py run, on the generic base over the host's processor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pretend_device
import windlass
from fake_plugins import raises_sentence
from recorded_device import RecordedModule
from windlass.accelerator.errors import CollectiveTimeout, WindlassError
from windlass.accelerator.interface import Group
from windlass.backends.generic.device import GenericAccelerator, open_device
from windlass.backends.generic.process_groups import Agreement, ProcessGroupTransport
from windlass.backends.generic.streams import DeviceEvent

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8)


@contextmanager
def opened(agreement: Agreement = "always", ordered: bool = False) -> Iterator[GenericAccelerator]:
    accelerator = open_device("cpu", name="generic", agreement=agreement, ordered_reduction=ordered)
    try:
        yield accelerator
    finally:
        accelerator.close()


def values_of(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """What a rank brings: small whole numbers, so that sums are exact in every order."""
    return torch.randint(0, 8, (count,), generator=torch.Generator().manual_seed(rank + 1)).to(dtype)


def carry_everything(agreement: Agreement, ordered: bool) -> dict[str, int]:
    """Every collective in every dtype on the world and on a group out of order; twice, so that calls repeat."""
    with opened(agreement, ordered) as accelerator:
        collectives = accelerator.collectives
        backwards = collectives.group((2, 0), "backwards")
        for group in [collectives.world, *[backwards] * (backwards.rank >= 0)] * 2:
            for dtype in DTYPES:
                carry(accelerator, group, dtype)
        collectives.barrier(collectives.world)
        assert accelerator.facts["transport"] == "gloo"
        tallies = accelerator.counters.collectives
        return {kind: tallies[kind, "float32"].bytes for kind in ("all_gather", "reduce_scatter", "all_to_all")}


def carry(accelerator: GenericAccelerator, group: Group, dtype: torch.dtype) -> None:
    collectives, size, me = accelerator.collectives, group.size, group.rank
    tag, count = str(dtype).removeprefix("torch."), 5
    brought = [values_of(rank, size * count, dtype) for rank in group.ranks]

    whole = torch.zeros(size * count, dtype=dtype)
    part = whole[me * count : (me + 1) * count].copy_(brought[me][:count])  # where it will lie in the output
    collectives.all_gather(whole, part, group, tag=tag).wait()
    assert torch.equal(whole, torch.cat([one[:count] for one in brought]))

    for op in ("sum", "max"):
        total = sum(brought[1:], brought[0]) if op == "sum" else torch.stack(brought).amax(0)
        wanted = total[me * count : (me + 1) * count]
        source = brought[me].clone()
        inside = source[me * count : (me + 1) * count]
        collectives.reduce_scatter(inside, source, group, op=op, tag=tag).wait()
        assert torch.equal(inside, wanted), (op, dtype)
        vector = brought[me].clone()
        collectives.all_reduce(vector, group, op=op, tag=tag).wait()
        assert torch.equal(vector, total), (op, dtype)
    if dtype is torch.bfloat16:
        wide = torch.empty(count)
        collectives.reduce_scatter(wide, brought[me].clone(), group, tag="wide").wait()
        assert torch.equal(wide, torch.stack(brought).float().sum(0)[me * count : (me + 1) * count])

    # rank i sends i + j elements to rank j: a row of its own for each, from the start of what it brought
    starts = [[sum(rank + other for other in range(to)) for to in range(size)] for rank in range(size)]
    given = brought[me][: sum(me + to for to in range(size))]
    received = torch.empty(sum(me + other for other in range(size)), dtype=dtype)
    splits = [me + other for other in range(size)]
    collectives.all_to_all(received, given.clone(), splits, splits, group, tag=tag).wait()
    pieces = [brought[rank][starts[rank][me] : starts[rank][me] + rank + me] for rank in range(size)]
    assert torch.equal(received, torch.cat(pieces))

    everybody = brought[me].clone()
    collectives.broadcast(everybody, size - 1, group, tag=tag).wait()
    assert torch.equal(everybody, brought[size - 1])


def differ(agreement: Agreement, what: str) -> tuple[str, str]:
    """Make calls that do not match, and say what came of it."""
    with opened(agreement) as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        collectives.barrier(world)
        odd = world.rank == 1
        try:
            if what == "size":
                collectives.all_reduce(torch.zeros(5 if odd else 4), world, tag="norm").wait()
            elif what == "kind":
                run = collectives.all_reduce if odd else lambda t, g, tag: collectives.broadcast(t, 0, g, tag=tag)
                run(torch.zeros(4), world, tag="norm").wait()
            else:
                splits = [1, 2, 3] if odd else [2, 2, 2]
                splits[world.rank] = 2
                count = sum(splits)
                collectives.all_to_all(torch.zeros(6), torch.zeros(count), [2, 2, 2], splits, world, tag="x").wait()
        except WindlassError as error:
            return type(error).__name__, str(error)
        return "nothing", ""


def lose_a_peer(agreement: Agreement) -> tuple[str, str]:
    """Rank 1 dies after a call that was agreed on; what the others meet in the next."""
    with opened(agreement) as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        collectives.all_reduce(torch.zeros(4), world, tag="norm").wait()
        if world.rank == 1:
            os._exit(3)
        try:
            collectives.all_reduce(torch.zeros(4), world, tag="norm").wait()
        except WindlassError as error:
            return type(error).__name__, str(error)
        return "nothing", ""


def gather_on_a_lane() -> None:
    """On streams a collective and all that follows it is issued on the current lane, and its work is a point of it."""
    module = RecordedModule()
    accelerator = open_device("cpu", name="generic", module=module)
    try:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        assert accelerator.capabilities.asynchronous_lanes
        module.forget()
        vector = torch.full((3,), float(world.rank))
        with accelerator.streams.lane("reduce"):
            work = collectives.all_reduce(vector, world, tag="norm")
            stream = module.current_stream()
        assert isinstance(work, DeviceEvent)
        assert not work.done()
        work.wait()
        assert module.log == [f"e0 on {stream.name}", f"e1 on {stream.name}", "s0 waits for e1"]  # before and after
        assert vector.tolist() == [float(sum(range(world.size)))] * 3
    finally:
        accelerator.close()


def carry_host_tensors() -> dict[str, int]:
    """Every collective on tensors of the host beside a device, in groups of several ranks and of one; no mixed call."""
    pretend_device.register()
    accelerator = open_device(pretend_device.NAME, name="vendor", process_group="gloo")
    try:
        collectives = accelerator.collectives
        backwards, alone = collectives.group((2, 0), "backwards"), collectives.group((1,), "alone")
        for group in [collectives.world, *[one for one in (backwards, alone) if one.rank >= 0]]:
            for dtype in DTYPES:
                carry(accelerator, group, dtype)
        mixed = torch.zeros(3), accelerator.memory.empty((1,), torch.float32)
        sentence = (
            "all_gather 'mixed' on vendor:0 needs all its tensors on the device or all on the host, got some on each; "
            "copy one first"
        )
        with raises_sentence(ValueError, sentence):
            collectives.all_gather(*mixed, collectives.world, tag="mixed")
        collectives.barrier(collectives.world)
        work = collectives.all_reduce(torch.ones(4), collectives.world, tag="unawaited")
        accelerator.streams.synchronize()
        assert work.done()
        tallies = accelerator.counters.collectives
        return {"all_gather": tallies["all_gather", "float32"].bytes}
    finally:
        accelerator.close()


def wait_for_a_late_rank() -> None:
    """On streams: a collective begins and never ends, and the host waits for what comes after it."""
    module = RecordedModule()
    accelerator = open_device("cpu", name="generic", module=module)
    try:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        vector = torch.ones(4)
        collectives.all_reduce(vector, world, tag="norm")
        before, _ = module.events[-2:]
        before.happened = True
        transport = collectives._transport(world)
        assert isinstance(transport, ProcessGroupTransport)
        transport._flights._timeout_seconds = 0.3
        with pytest.raises(
            CollectiveTimeout, match=rf"in all_reduce 'norm' within 0.3 s while rank {world.rank} waited"
        ):
            accelerator.read_host(vector)
        with pytest.raises(CollectiveTimeout, match=r"^generic:0 makes no more collectives since one failed \(a rank "):
            collectives.all_reduce(vector, world, tag="norm")
    finally:
        module.synchronize()
        accelerator.close()


def train_and_count_threads(stage: int) -> tuple[int, int]:
    """Threads of gloo after some steps, and after closing while engine, model and accelerator are still there."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    config = {"train_batch_size": 4, "zero_optimization": {"stage": stage}}
    with opened() as accelerator:
        with windlass.initialize(model, config, accelerator=accelerator) as engine:
            for _ in range(2):
                engine.backward(engine(torch.ones(2, 4)).square().mean())
                engine.step()
        before = count_gloo_threads()
    return before, count_gloo_threads()


def count_gloo_threads() -> int:
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)
