"""Workers that tests/ranks/test_cpu_collectives.py runs on ranks; each compares with plain tensor arithmetic."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, distributed

from windlass.accelerator.counters import Counters
from windlass.accelerator.environment import read_environment
from windlass.accelerator.errors import OutOfMemory, WindlassError
from windlass.accelerator.interface import Group, Work
from windlass.backends.cpu import collectives as facet
from windlass.backends.cpu.collectives import CpuCollectives, TransportChoice
from windlass.backends.cpu.device import open_cpu
from windlass.backends.cpu.memory import CpuMemory
from windlass.backends.cpu.shared_pages import Door, Pages, open_pages
from windlass.conformance.training import train_grid

SIZES = (0, 1, 7, 4097, 40000)  # elements of a part: nothing, tails, and more than a mailbox holds
COPIED = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
)
REDUCED = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.int64, torch.int64),
)


@dataclass
class Rank:
    """An open backend, as far as these tests need it."""

    collectives: CpuCollectives
    memory: CpuMemory
    counters: Counters

    @property
    def world(self) -> Group:
        return self.collectives.world

    def place(self, values: Tensor, shared: bool) -> Tensor:
        """A copy of the values in memory of the backend, shared or not."""
        tensor = self.memory.empty(values.shape, values.dtype, shared=self.world if shared else None)
        return tensor.copy_(values)


@contextmanager
def opened(transport: TransportChoice) -> Iterator[Rank]:
    counters = Counters()
    collectives = CpuCollectives(counters, read_environment(), transport)
    try:
        yield Rank(collectives, CpuMemory(counters, collectives), counters)
    finally:
        collectives.close()


def draw(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of a rank that every rank can draw."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        scales = torch.exp2(torch.randint(-6, 7, (count,), generator=generator).float())
        return (torch.randn(count, generator=generator) * scales).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 100, (count,), generator=generator).to(dtype)


def reduce_by_loop(terms: Sequence[Tensor], output: torch.dtype, op: str) -> Tensor:
    """Rank after rank; 16-bit results are computed in fp32 and rounded once."""
    dtype = torch.float32 if output in (torch.bfloat16, torch.float16) else output
    total = terms[0].to(dtype)
    for term in terms[1:]:
        total = total + term.to(dtype) if op == "sum" else torch.maximum(total, term.to(dtype))
    return total.to(output)


def same(got: Tensor, wanted: Tensor, *what: object) -> None:
    assert torch.equal(got, wanted), f"{what}: {got} is not {wanted}"


def check_all_gather(transport: TransportChoice) -> str:
    with opened(transport) as rank:
        world = rank.world
        for dtype in COPIED:
            for size in SIZES:
                wanted = torch.cat([draw(other, size, dtype) for other in range(world.size)])
                for shared in (True, False):
                    mine = rank.place(draw(world.rank, size, dtype), shared)
                    output = rank.place(torch.zeros(size * world.size, dtype=dtype), shared)
                    rank.collectives.all_gather(output, mine, world, tag="apart").wait()
                    same(output, wanted, dtype, size, shared)
                    whole = rank.place(torch.zeros(size * world.size, dtype=dtype), shared)
                    part = whole[world.rank * size : (world.rank + 1) * size]
                    part.copy_(mine)
                    rank.collectives.all_gather(whole, part, world, tag="in place").wait()
                    same(whole, wanted, dtype, size, shared, "in place")
        return rank.collectives.transport_name


def check_reduce_scatter(transport: TransportChoice) -> None:
    with opened(transport) as rank:
        world = rank.world
        for source, target in REDUCED:
            for size in SIZES:
                inputs = [draw(other, size * world.size, source) for other in range(world.size)]
                for op in ("sum", "max") if size < 40000 else ("sum",):
                    terms = [one[world.rank * size : (world.rank + 1) * size] for one in inputs]
                    wanted = reduce_by_loop(terms, target, op)
                    for shared in (True, False):
                        mine = rank.place(inputs[world.rank], shared)
                        output = rank.place(torch.zeros(size, dtype=target), shared)
                        rank.collectives.reduce_scatter(output, mine, world, op=op, tag="apart").wait()
                        same(output, wanted, source, target, size, op, shared)
                        same(mine, inputs[world.rank], "input changed")
                        if source == target:
                            part = mine[world.rank * size : (world.rank + 1) * size]
                            rank.collectives.reduce_scatter(part, mine, world, op=op, tag="in place").wait()
                            same(part, wanted, source, target, size, op, shared, "in place")


def check_others(transport: TransportChoice) -> None:
    """all_reduce, broadcast and all_to_all with uneven, and some empty, parts."""
    with opened(transport) as rank:
        world = rank.world
        everyone = range(world.size)
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64):
            for size in SIZES:
                for op in ("sum", "max"):
                    vector = draw(world.rank, size, dtype)
                    rank.collectives.all_reduce(vector, world, op=op).wait()
                    same(vector, reduce_by_loop([draw(other, size, dtype) for other in everyone], dtype, op), dtype, op)
                for source in everyone:
                    for shared in (True, False):
                        tensor = rank.place(draw(world.rank, size, dtype), shared)
                        rank.collectives.broadcast(tensor, source, world).wait()
                        same(tensor, draw(source, size, dtype), "broadcast", source, shared)
        for scale in (0, 1, 9001):
            splits = [[(3 * one + 5 * other) % 4 * scale for other in everyone] for one in everyone]
            inputs = [draw(one, sum(splits[one]), torch.float32) for one in everyone]
            wanted = torch.cat([inputs[one].split(splits[one])[world.rank] for one in everyone])
            arriving = [row[world.rank] for row in splits]
            for shared in (True, False):
                # the sizes differ by rank, so shared memory is cut from an allocation that is equal on all
                mine = rank.place(torch.zeros(60000), shared)[: inputs[world.rank].numel()].copy_(inputs[world.rank])
                output = torch.zeros(sum(arriving))
                rank.collectives.all_to_all(output, mine, arriving, splits[world.rank], world).wait()
                same(output, wanted, "all_to_all", scale, shared)


def check_groups(transport: TransportChoice) -> list[str]:
    """Groups of some ranks, in an order of their own, and of one; equal names for different ranks."""
    with opened(transport) as rank:
        collectives, world = rank.collectives, rank.world
        first = collectives.group((1, 0), "pair")
        rest = collectives.group(range(2, world.size), "pair")
        alone = [collectives.group((other,), "alone") for other in range(world.size)]
        assert collectives.group((1, 0), "pair") == first
        mine = first if world.rank < 2 else rest
        for size in (3, 40000):
            output = torch.zeros(size * mine.size)
            collectives.all_gather(output, draw(world.rank, size, torch.float32), mine).wait()
            same(output, torch.cat([draw(other, size, torch.float32) for other in mine.ranks]))
            shared = rank.memory.empty((2 * size,), torch.float32, shared=world)[
                : size * mine.size
            ]  # of a larger group
            shared.copy_(draw(world.rank, size * mine.size, torch.float32))
            reduced = torch.zeros(size)
            collectives.reduce_scatter(reduced, shared, mine).wait()
            parts = [draw(other, size * mine.size, torch.float32) for other in mine.ranks]
            same(reduced, reduce_by_loop([one.view(mine.size, size)[mine.rank] for one in parts], torch.float32, "sum"))
        collectives.all_reduce(vector := draw(world.rank, 5, torch.float32), alone[world.rank]).wait()
        same(vector, draw(world.rank, 5, torch.float32))
        texts = []
        for use in (lambda: collectives.barrier(alone[world.rank - 1]), lambda: collectives.group((0, 0), "twice")):
            try:
                use()
            except ValueError as error:
                texts.append(str(error))
        return texts


def count_calls(transport: TransportChoice) -> dict[str, dict[str, int]]:
    with opened(transport) as rank:
        collectives, world = rank.collectives, rank.world
        n, size = 11, world.size
        floats = torch.zeros(n)
        for _ in range(2):
            collectives.all_gather(torch.zeros(n * size), floats, world, tag="weights").wait()
            collectives.fetch(torch.zeros(n * size), floats, world, tag="weights").wait()
        collectives.reduce_scatter(floats, torch.zeros(n * size, dtype=torch.bfloat16), world, tag="gradients").wait()
        collectives.all_reduce(floats, world, tag="norm").wait()
        collectives.broadcast(floats, size - 1, world, tag="start").wait()
        splits = [3] * size
        exchanged = torch.zeros(sum(splits))
        collectives.all_to_all(torch.zeros(sum(splits)), exchanged, splits, splits, world, tag="tokens").wait()
        collectives.publish(world)
        collectives.barrier(world)
        return rank.counters.snapshot()


def wait_in_other_orders(transport: TransportChoice, num_calls: int) -> None:
    """All ranks make the same calls on two groups; each waits for them when and in the order it likes."""
    with opened(transport) as rank:
        collectives, world = rank.collectives, rank.world
        groups = (world, collectives.group(tuple(reversed(world.ranks)), "reversed"))
        size = 20000
        regions = [rank.place(draw(world.rank, size * world.size, torch.float32, seed), True) for seed in range(8)]
        choices = random.Random(world.rank)
        works: list[tuple[Work, Callable[[], None]]] = []
        outputs: list[Tensor] = []
        for number in range(num_calls):
            group, seed = groups[number % 2 if number % 5 else 0], number % len(regions)
            output = torch.zeros(size)
            outputs.append(output)
            works.append(
                (
                    collectives.reduce_scatter(output, regions[seed], group, tag=f"{number}"),
                    _checker(output, group, seed),
                )
            )
            small = torch.zeros(world.size)
            works.append((collectives.all_gather(small, torch.tensor([float(world.rank)]), world), lambda: None))
            while works and choices.random() < (0.1, 0.5, 0.9, 0.0)[world.rank % 4]:
                _finish(works.pop(choices.randrange(len(works))))
        choices.shuffle(works)
        for work in works:
            _finish(work)
        collectives.barrier(world)


def wait_on_two_transports(rounds: int) -> str:
    """The world on gloo and a group on shared pages, as on several hosts; each rank waits for the other's read."""
    with opened("gloo") as rank:
        collectives, world = rank.collectives, rank.world
        collectives._doors = [Door.MEMORY_FILE]
        pair = collectives.group(world.ranks, "pair")
        size = 30000
        region = rank.memory.empty((size * 2,), torch.float32, shared=pair).copy_(
            draw(world.rank, size * 2, torch.float32)
        )
        for number in range(rounds):
            output, total = torch.zeros(size), torch.ones(40000)
            work = collectives.reduce_scatter(output, region, pair)
            if (number + world.rank) % 2:
                work.wait()
            other = collectives.all_reduce(total, world)
            second = collectives.reduce_scatter(output, region, pair)
            for one in (second, other) if (number + world.rank) % 3 else (other, second):
                one.wait()
            work.wait()
            first, last = (draw(one, size * 2, torch.float32).view(2, size)[world.rank] for one in range(2))
            same(output, first + last)
            same(total, torch.full((40000,), 2.0))
        return f"{collectives.transport_name}, {collectives._transport(pair).name}"


def _checker(output: Tensor, group: Group, seed: int) -> Callable[[], None]:
    size = output.numel()

    def check() -> None:
        inputs = [draw(other, size * group.size, torch.float32, seed) for other in group.ranks]
        terms = [one[group.rank * size : (group.rank + 1) * size] for one in inputs]
        same(output, reduce_by_loop(terms, torch.float32, "sum"))

    return check


def _finish(work: tuple[Work, Callable[[], None]]) -> None:
    work[0].wait()
    assert work[0].done()
    work[1]()


def rewrite_inputs(transport: TransportChoice, rounds: int) -> None:
    """An input may be rewritten as soon as its work was waited for, though peers may be slower."""
    with opened(transport) as rank:
        world, size = rank.world, 30000
        shared = rank.place(torch.zeros(size), True)
        output = torch.zeros(size * world.size)
        for number in range(rounds):
            shared.fill_(number * world.size + world.rank)
            if (number + world.rank) % 3 == 0:
                time.sleep(0.001)
            rank.collectives.all_gather(output, shared, world).wait()
            shared.fill_(-1)
            same(output, torch.arange(world.size).repeat_interleave(size).add(number * world.size).float(), number)


def make_different_calls(transport: TransportChoice, difference: str) -> tuple[str, str, float]:
    """Rank 1 calls something else than the others; what each rank meets, and after how many seconds."""
    with opened(transport) as rank:
        collectives, world = rank.collectives, rank.world
        odd = world.rank == 1
        size = 5 if odd and difference == "bytes" else 4
        dtype = torch.int32 if odd and difference == "dtype" else torch.float32
        tag = "other" if odd and difference == "tag" else "gradients"
        collectives.barrier(world)
        begun = time.monotonic()
        try:
            if odd and difference == "kind":
                collectives.all_gather(torch.zeros(world.size * 4), torch.zeros(4), world, tag=tag).wait()
            elif odd and difference == "barrier":
                collectives.barrier(world)
            elif difference == "splits":
                ones = [1] * world.size
                given = torch.zeros(world.size + (1 if odd else 0))
                splits = [2, *ones[1:]] if odd else ones
                collectives.all_to_all(torch.zeros(world.size), given, ones, splits, world, tag=tag).wait()
            else:
                output, given = torch.zeros(size, dtype=dtype), torch.zeros(size * world.size, dtype=dtype)
                collectives.reduce_scatter(output, given, world, tag=tag).wait()
        except WindlassError as error:
            return type(error).__name__, str(error), time.monotonic() - begun
        return "nothing", "", time.monotonic() - begun


def lose_rank(transport: TransportChoice, how: str) -> tuple[str, str, float, int]:
    """Rank 1 dies, leaves, fails or is late; what each rank meets in an all-gather, and after how many seconds."""
    with opened(transport) as rank:
        collectives, world = rank.collectives, rank.world
        shared = rank.place(torch.zeros(50000), True)
        collectives.barrier(world)
        begun = time.monotonic()
        try:
            if world.rank == 1:
                if how == "dies":
                    os.kill(os.getpid(), signal.SIGKILL)
                if how == "leaves":
                    return "left", "", 0.0, os.getpid()
                if how == "late":
                    time.sleep(3)
            collectives.all_gather(torch.zeros(50000 * world.size), shared, world, tag="weights").wait()
        except WindlassError as error:
            return type(error).__name__, str(error), time.monotonic() - begun, os.getpid()
        return "nothing", "", time.monotonic() - begun, os.getpid()


def come_alone(missing: int) -> tuple[str, str, float]:
    """One rank never opens the backend."""
    begun = time.monotonic()
    if read_environment().rank == missing:
        return "absent", "", 0.0
    try:
        with opened("auto"):
            return "nothing", "", 0.0
    except WindlassError as error:
        return type(error).__name__, str(error), time.monotonic() - begun


def fetch_unequally(transport: TransportChoice) -> int:
    """Between two meetings each rank fetches as often as it likes; where fetches are meetings, all as often."""
    with opened(transport) as rank:
        collectives, world = rank.collectives, rank.world
        one_sided = collectives.transport_name == "shared pages"
        size, fetched = 30000, 0
        whole = rank.place(torch.zeros(size * world.size), True)
        shard = whole[world.rank * size : (world.rank + 1) * size]
        apart = rank.place(torch.zeros(2 * size), True)[size:]
        for round_ in range(4):
            for tensor in (shard, apart):
                tensor.copy_(draw(world.rank, size, torch.float32, round_))
            collectives.publish(world)
            wanted = torch.cat([draw(other, size, torch.float32, round_) for other in range(world.size)])
            for source in [shard, apart] * (world.rank + 1 if one_sided else 1):
                output = whole if source is shard else torch.zeros(size * world.size)
                collectives.fetch(output, source, world, tag="weights").wait()
                same(output, wanted, round_)
                fetched += 1
            collectives.barrier(world)
        assert rank.counters.collectives["all_gather", "weights"].calls == fetched
        return fetched


_SHARED_PAGES = ("memfd:windlass", "/dev/shm/windlass-")  # not the name alone: the checkout may lie in such a folder


def _mapped() -> list[str]:
    """Mappings of this process that come from shared pages."""
    return [
        line for line in Path("/proc/self/maps").read_text().splitlines() if any(name in line for name in _SHARED_PAGES)
    ]


def _open_files() -> list[str]:
    paths = []
    for number in os.listdir("/proc/self/fd"):
        try:
            paths.append(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:  # the one that listed the folder
            continue
    return [path for path in paths if any(name in path for name in _SHARED_PAGES)]


def look_for_remains(transport: TransportChoice) -> dict[str, int]:
    """Mappings before, while, and after a shared tensor lives, and what is left in the end."""
    counts = {}
    with opened(transport) as rank:
        world = rank.world
        counts["before"] = len(_mapped())
        tensor = rank.memory.empty((1 << 20,), torch.float32, shared=world, tag="region")
        tensor.fill_(1)
        view = tensor[5:]
        counts["allocated"] = len(_mapped())
        counts["used"] = rank.memory.stats().by_tag["region"]
        rank.collectives.all_gather(torch.zeros(world.size << 20), tensor, world).wait()
        rank.collectives.all_reduce(torch.zeros(100000), world).wait()  # by staging pages
        rank.collectives.barrier(world)
        rank.memory.release(tensor)
        del tensor
        counts["viewed"] = len(_mapped())
        del view
        gc.collect()
        counts["released"] = len(_mapped())
        counts["used after"] = rank.memory.stats().used.value or 0
    del rank
    gc.collect()
    counts["left"] = len(_mapped()) + len(_open_files())
    counts["initialized"] = int(distributed.is_initialized())
    return counts


def run_out_of_memory(transport: TransportChoice) -> tuple[str, int | None]:
    """Rank 1 has a budget that its part of a shared tensor does not fit in; all can go on afterwards."""
    with opened(transport) as rank:
        if rank.world.rank == 1:
            rank.memory.set_budget(1000)
        try:
            rank.memory.empty((1000,), torch.float32, shared=rank.world, tag="weights")
            text = "nothing"
        except OutOfMemory as error:
            text = str(error)
        rank.memory.empty((100,), torch.float32, shared=rank.world)
        rank.collectives.barrier(rank.world)
        return text, rank.memory.stats().used.value


def open_repeatedly(times: int) -> list[float]:
    results = []
    for number in range(times):
        with opened("auto") as rank:
            value = torch.tensor([float(rank.world.rank + number)])
            rank.collectives.all_reduce(value, rank.world).wait()
            results.append(value.item())
            rank.collectives.close()  # twice is safe
    return results


def use_the_process_group_of_the_user(transport: TransportChoice) -> tuple[float, bool]:
    distributed.init_process_group("gloo")
    with opened(transport) as rank:
        value = torch.ones(1)
        rank.collectives.all_reduce(value, rank.world).wait()
    kept = distributed.is_initialized()
    distributed.all_reduce(value)  # still works
    return value.item(), kept


def refuse_doors(refused: Sequence[str], refusing: int) -> tuple[str, float]:
    """One rank may not map what others open to it in some way; all must then take the same other way."""

    def open_unless_refused(path: str, nbytes: int) -> Pages:
        if refusing == read_environment().rank and path.startswith(tuple(refused)):
            raise PermissionError(f"{path} is refused")
        return open_pages(path, nbytes)

    with patch.object(facet, "open_pages", open_unless_refused), opened("auto") as rank:
        value = torch.ones(50000)
        rank.collectives.all_reduce(value, rank.world).wait()
        return rank.collectives.transport_name, value[-1].item()


def train_over(
    transport: TransportChoice, model: str, stages: list[int], accumulations: list[int], steps: int
) -> dict[tuple[int, int], dict[str, Any]]:
    """`train_grid` on the processor, meeting the other ranks by this transport."""
    return train_grid(model, stages, accumulations, steps, accelerator=open_cpu(transport=transport))
