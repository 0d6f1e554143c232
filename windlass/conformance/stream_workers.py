"""What ranks do in the tests of order between collectives, copies and tensor operations on several lanes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from windlass.accelerator.interface import LANES, Group, Work
from windlass.conformance.allocations import bring_number
from windlass.conformance.collective_values import Placed, blank, check_reduced, draw, one_program, part, place
from windlass.conformance.opening import opened

_SIZE = 30000  # elements of a rank's part
_SMALL = 64


def train_a_little(rounds: int) -> None:
    """Gather weights, compute gradients, reduce them, update: each on its own lane, as training does.

    All values are small whole numbers, so sums are exact: after every round a weight has grown by the sum of what
    the ranks added.
    """
    for size in (_SIZE, _SMALL):
        with opened() as accelerator:
            collectives, streams, world = accelerator.collectives, accelerator.streams, accelerator.collectives.world
            shard = place(accelerator, torch.full((size,), float(world.rank), device="cpu"), "shared whole").tensor
            slots = [blank(accelerator, size * world.size, torch.float32, "shared whole").tensor for _ in range(2)]
            gradients = [blank(accelerator, size * world.size, torch.float32, "shared whole").tensor for _ in range(2)]
            arrived = blank(accelerator, size, torch.float32).tensor
            wrong = torch.zeros((), dtype=torch.int64, device=accelerator.device)
            grown = 0
            for number in range(rounds):
                slot, gradient = slots[number % 2], gradients[number % 2]
                updated = streams.record()
                with streams.lane("gather"):
                    streams.wait(updated)
                    gathered = collectives.fetch(slot, shard, world, tag="weights")
                gathered.wait()
                for index in range(world.size):
                    wrong = wrong + part(slot, index, world.size).ne(float(index + grown)).sum()
                gradient.copy_(slot).mul_(0.0).add_(bring_number(accelerator, world.rank + number))
                slot.fill_(-1.0)
                written = streams.record()
                with streams.lane("reduce"):
                    streams.wait(written)
                    reduced = collectives.reduce_scatter(arrived, gradient, world, tag="gradients")
                reduced.wait()
                gradient.fill_(-1.0)
                shard.add_(arrived)
                arrived.fill_(-1.0)
                grown += sum(rank + number for rank in world.ranks)
                collectives.barrier(world)
            assert int(accelerator.to_host(wrong)) == 0, "weights were gathered too early or too late"
            assert accelerator.to_host(shard).eq(float(world.rank + grown)).all()


def wait_in_any_order(rounds: int) -> None:
    """Collectives on all lanes, waited for in another order on each rank where ranks may run different programs, by the
    compute lane or by way of another."""
    with opened() as accelerator:
        collectives, streams, world = accelerator.collectives, accelerator.streams, accelerator.collectives.world
        choices = torch.Generator().manual_seed(0 if one_program(accelerator) else world.rank)
        for round_ in range(rounds):
            size = _SIZE // 10 if round_ % 2 else _SMALL
            works: list[tuple[Work, Callable[[], None]]] = []
            for number in range(10):
                seed = 10 * round_ + number
                inputs = [draw(other, size * world.size, torch.float32, seed) for other in world.ranks]
                given = place(accelerator, inputs[world.rank], "slice")
                output = blank(accelerator, size, torch.float32, "slice")
                written = streams.record()
                with streams.lane(LANES[number % len(LANES)]):
                    streams.wait(written)
                    work = collectives.reduce_scatter(output.tensor, given.tensor, world, tag=f"number {number}")

                works.append((work, _checker(inputs, given, output, world)))
            for index in torch.randperm(len(works), generator=choices, device="cpu").tolist():
                work, check = works[index]
                if index % 2:
                    with streams.lane("down"):
                        work.wait()
                        joined = streams.record()
                    streams.wait(joined)
                else:
                    work.wait()
                work.wait()  # once more harms nobody
                check()
            collectives.barrier(world)


def _checker(inputs: list[torch.Tensor], given: Placed, output: Placed, group: Group) -> Callable[[], None]:
    def check() -> None:
        check_reduced(output.read(), [part(one, group.rank, group.size) for one in inputs], "sum")
        given.release()
        output.release()

    return check


def rewrite_inputs(rounds: int) -> None:
    """An input may be rewritten as soon as its work was waited for, although peers may be slower."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        for placing in ("shared whole", "whole"):
            given = blank(accelerator, _SIZE, torch.float32, placing)
            output = blank(accelerator, _SIZE * world.size, torch.float32)
            ranks = torch.arange(world.size, device="cpu").repeat_interleave(_SIZE).float()
            for number in range(rounds):
                given.tensor.copy_(bring_number(accelerator, number * world.size + world.rank).expand(_SIZE))
                if (number + world.rank) % 3 == 0:
                    time.sleep(0.001)
                collectives.all_gather(output.tensor, given.tensor, world).wait()
                given.tensor.fill_(-1.0)
                output.expect(ranks + number * world.size, placing, "round", number)


def copy_after_collectives(rounds: int) -> None:
    """A copy `after` a collective brings what the collective wrote; neither is waited for in between."""
    with opened() as accelerator:
        collectives, streams, world = accelerator.collectives, accelerator.streams, accelerator.collectives.world
        for number in range(rounds):
            size = _SIZE if number % 2 else _SMALL
            shards = [draw(other, size, torch.float32, number) for other in world.ranks]
            shard = place(accelerator, shards[world.rank])
            whole, copied = (blank(accelerator, size * world.size, torch.float32) for _ in range(2))
            written = streams.record()
            with streams.lane("gather"):
                streams.wait(written)
                work = collectives.all_gather(whole.tensor, shard.tensor, world)
            with streams.lane("down"):
                streams.wait(written)
                copy = accelerator.memory.copy(copied.tensor, whole.tensor, after=work)
            copy.wait()
            copied.expect(torch.cat(shards), "round", number)
            work.wait()
            for one in (shard, whole, copied):
                one.release()


def release_after_collectives(rounds: int) -> None:
    """The input of a reduction is released after it, not waited for, and its memory may be used again at once."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        for number in range(rounds):
            placing = "shared whole" if number % 2 else "whole"
            inputs = [draw(other, _SIZE * world.size, torch.float32, number) for other in world.ranks]
            given, output = place(accelerator, inputs[world.rank], placing), blank(accelerator, _SIZE, torch.float32)
            work = collectives.reduce_scatter(output.tensor, given.tensor, world)
            accelerator.memory.release(given.allocation, after=work)
            again = blank(accelerator, _SIZE * world.size, torch.float32, placing)
            work.wait()
            check_reduced(output.read(), [part(one, world.rank, world.size) for one in inputs], "sum", number)
            again.release()
            output.release()


def ask_whether_done(folder: str) -> tuple[bool, bool]:
    """Rank 0 asks done() of a collective that rank 1 has not entered; whether it said so too early, or blocked."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        shards = [draw(other, _SIZE, torch.float32) for other in world.ranks]
        shard, whole = place(accelerator, shards[world.rank]), blank(accelerator, _SIZE * world.size, torch.float32)
        asked, entered = Path(folder, "asked"), Path(folder, "entered")
        early = blocked = False
        collectives.barrier(world)
        if world.rank == 1:
            deadline = time.monotonic() + 3  # a backend may also block in the call
            while not asked.exists() and time.monotonic() < deadline:
                time.sleep(0.002)
            entered.touch()
        work = collectives.all_gather(whole.tensor, shard.tensor, world)
        if world.rank == 0 and not entered.exists():
            for _ in range(20):
                done = work.done()
                blocked = blocked or entered.exists()
                early = early or (done and not entered.exists())
                time.sleep(0.002)
            asked.touch()
        if accelerator.capabilities.lazy:
            accelerator.streams.boundary()  # nothing begins before it
        poll(work)
        work.wait()
        assert work.done()
        whole.expect(torch.cat(shards))
        return early, blocked


def poll(work: Work, seconds: float = 10.0) -> None:
    """Return when the work is done, asked again and again and never waited for; TimeoutError if that lasts."""
    deadline = time.monotonic() + seconds
    while not work.done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"done() is still False after {seconds:g} s, though all ranks have come")
        time.sleep(0.0005)


def synchronize_collectives(rounds: int) -> None:
    """When synchronize() returns, collectives that were issued and not waited for are over, held by somebody or not."""
    with opened() as accelerator:
        collectives, streams, world = accelerator.collectives, accelerator.streams, accelerator.collectives.world
        for number in range(rounds):
            shards = [draw(other, _SIZE, torch.float32, number) for other in world.ranks]
            shard, whole = place(accelerator, shards[world.rank]), blank(accelerator, _SIZE * world.size, torch.float32)
            written = streams.record()
            with streams.lane("gather"):
                streams.wait(written)
                work = collectives.all_gather(whole.tensor, shard.tensor, world)
            held = work if number % 2 else None
            del work
            streams.synchronize()
            assert held is None or held.done(), "synchronize() returned while a collective was under way"
            whole.expect(torch.cat(shards))
            collectives.barrier(world)
