"""Workers that the tests of the simulated accelerator run on ranks; each compares with plain tensor arithmetic."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from windlass.accelerator.errors import Unsupported, WindlassError
from windlass.accelerator.interface import Accelerator, Group, ReduceOp, Work
from windlass.conformance.opening import opened

SIZES = (0, 1, 7, 4097)  # elements of a part
MOVED = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
REDUCED = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.int64, torch.int64),
)
LANES = ("compute", "gather", "reduce")
OPS: tuple[ReduceOp, ...] = ("sum", "max")


def draw(rank: int, count: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values of a rank that every rank can draw."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    if dtype.is_floating_point:
        return (torch.randn(count, generator=generator) * 8).to(dtype)
    return torch.randint(0, 100, (count,), generator=generator).to(dtype)


def reduce_by_loop(terms: Sequence[Tensor], output: torch.dtype, op: str = "sum") -> Tensor:
    """Rank after rank; 16-bit results are computed in fp32 and rounded once."""
    dtype = torch.float32 if output in (torch.bfloat16, torch.float16) else output
    total = terms[0].to(dtype)
    for term in terms[1:]:
        total = total + term.to(dtype) if op == "sum" else torch.maximum(total, term.to(dtype))
    return total.to(output)


def same(got: Tensor, wanted: Tensor, *what: object) -> None:
    assert torch.equal(got, wanted), f"{what}: {got} is not {wanted}"


def issue_on(accelerator: Accelerator, lane: str, call: Callable[[], Work]) -> Work:
    """Make the call on the lane, after all that the compute lane has done."""
    event = accelerator.streams.record()
    with accelerator.streams.lane(lane):
        accelerator.streams.wait(event)
        return call()


def check_values() -> None:
    """Every collective, in turn on the lanes, apart and in place."""
    with opened() as accelerator:
        lanes = itertools.cycle(LANES)
        for size in SIZES:
            for dtype in MOVED:
                check_moved(accelerator, next(lanes), size, dtype)
            for source, target in REDUCED:
                for op in OPS:
                    check_reduced(accelerator, next(lanes), size, source, target, op)
        for scale in (0, 1, 901):
            check_exchanged(accelerator, next(lanes), scale)


def check_moved(accelerator: Accelerator, lane: str, size: int, dtype: torch.dtype) -> None:
    """all_gather and broadcast of `size` elements."""
    collectives, world = accelerator.collectives, accelerator.collectives.world
    mine = draw(world.rank, size, dtype)
    wanted = torch.cat([draw(one, size, dtype) for one in range(world.size)])
    output = torch.zeros(size * world.size, dtype=dtype)
    issue_on(accelerator, lane, lambda: collectives.all_gather(output, mine, world)).wait()
    same(output, wanted, dtype, size)
    whole = torch.zeros(size * world.size, dtype=dtype)
    part = whole[world.rank * size : (world.rank + 1) * size]
    part.copy_(mine)
    issue_on(accelerator, lane, lambda: collectives.all_gather(whole, part, world)).wait()
    same(whole, wanted, dtype, size, "in place")
    last = world.size - 1
    issue_on(accelerator, lane, lambda: collectives.broadcast(mine, last, world)).wait()
    same(mine, draw(last, size, dtype), dtype, size, "broadcast")


def check_reduced(
    accelerator: Accelerator, lane: str, size: int, source: torch.dtype, target: torch.dtype, op: ReduceOp
) -> None:
    """reduce_scatter into `size` elements, apart and in place, and all_reduce."""
    collectives, world = accelerator.collectives, accelerator.collectives.world
    inputs = [draw(one, size * world.size, source) for one in range(world.size)]
    wanted = reduce_by_loop([one[world.rank * size : (world.rank + 1) * size] for one in inputs], target, op)
    mine, output = inputs[world.rank].clone(), torch.zeros(size, dtype=target)
    issue_on(accelerator, lane, lambda: collectives.reduce_scatter(output, mine, world, op=op)).wait()
    same(output, wanted, source, target, size, op)
    same(mine, inputs[world.rank], "the input of", source, target, size, op)
    if source != target:
        return
    part = mine[world.rank * size : (world.rank + 1) * size]
    issue_on(accelerator, lane, lambda: collectives.reduce_scatter(part, mine, world, op=op)).wait()
    same(part, wanted, source, size, op, "in place")
    vector = inputs[world.rank].clone()
    issue_on(accelerator, lane, lambda: collectives.all_reduce(vector, world, op=op)).wait()
    same(vector, reduce_by_loop(inputs, source, op), source, size, op, "all_reduce")


def check_exchanged(accelerator: Accelerator, lane: str, scale: int) -> None:
    """all_to_all with uneven, and some empty, parts."""
    collectives, world = accelerator.collectives, accelerator.collectives.world
    everyone = range(world.size)
    splits = [[(3 * one + 5 * other) % 4 * scale for other in everyone] for one in everyone]
    inputs = [draw(one, sum(splits[one]), torch.float32) for one in everyone]
    wanted = torch.cat([one.split(row)[world.rank] for one, row in zip(inputs, splits, strict=True)])
    arriving, leaving, mine = [row[world.rank] for row in splits], splits[world.rank], inputs[world.rank]
    output = torch.zeros(sum(arriving))
    issue_on(accelerator, lane, lambda: collectives.all_to_all(output, mine, arriving, leaving, world)).wait()
    same(output, wanted, "all_to_all", scale)


def interleave(num_calls: int) -> int:
    """Small collectives on two groups and three lanes; each rank waits for them when and in the order it likes."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        groups = (world, collectives.group(tuple(reversed(world.ranks)), "reversed"))
        choices = random.Random(world.rank)
        open_works: list[tuple[Work, Callable[[], None]]] = []

        def finish(work: Work, check: Callable[[], None]) -> None:
            work.wait()
            check()

        for number in range(num_calls):
            group, lane = groups[number % 5 % 2], LANES[number * 7 % 11 % 3]
            open_works.append(_issue(accelerator, lane, group, number))
            while open_works and choices.random() < (0.1, 0.5, 0.8, 0.3)[world.rank % 4]:
                finish(*open_works.pop(choices.randrange(len(open_works))))
        choices.shuffle(open_works)
        for work, check in open_works:
            finish(work, check)
        collectives.barrier(world)
        return sum(tally.calls for tally in accelerator.counters.collectives.values())


def _issue(accelerator: Accelerator, lane: str, group: Group, number: int) -> tuple[Work, Callable[[], None]]:
    collectives, size = accelerator.collectives, 1 + number % 23
    everyone = group.ranks
    if number % 3 == 0:
        output = torch.zeros(size * group.size)
        mine = draw(everyone[group.rank], size, torch.float32, number)
        work = issue_on(accelerator, lane, lambda: collectives.all_gather(output, mine, group, tag="gathered"))
        wanted = torch.cat([draw(rank, size, torch.float32, number) for rank in everyone])
    elif number % 3 == 1:
        output = torch.zeros(size)
        inputs = [draw(rank, size * group.size, torch.bfloat16, number) for rank in everyone]
        mine = inputs[group.rank].clone()
        work = issue_on(accelerator, lane, lambda: collectives.reduce_scatter(output, mine, group, tag="reduced"))
        wanted = reduce_by_loop([one[group.rank * size : (group.rank + 1) * size] for one in inputs], torch.float32)
    else:
        terms = [draw(rank, size, torch.float32, number) for rank in everyone]
        output, wanted = terms[group.rank].clone(), reduce_by_loop(terms, torch.float32)
        work = issue_on(accelerator, lane, lambda: collectives.all_reduce(output, group, tag="norm"))
    return work, lambda: same(output, wanted, number, group.name)


def use_groups() -> list[str]:
    """Groups of some ranks, in an order of their own, and of one."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        first = collectives.group((1, 0), "pair")
        rest = collectives.group(range(2, world.size), "pair")
        alone = [collectives.group((other,), "alone") for other in range(world.size)]
        assert collectives.group((1, 0), "pair") == first
        mine = first if world.rank < 2 else rest
        output, part = torch.zeros(3 * mine.size), draw(world.rank, 3, torch.float32)
        issue_on(accelerator, "gather", lambda: collectives.all_gather(output, part, mine)).wait()
        same(output, torch.cat([draw(other, 3, torch.float32) for other in mine.ranks]))
        vector = draw(world.rank, 5, torch.float32)
        collectives.all_reduce(vector, alone[world.rank]).wait()
        same(vector, draw(world.rank, 5, torch.float32))
        texts = []
        for use in (lambda: collectives.barrier(alone[world.rank - 1]), lambda: collectives.group((0, 0), "twice")):
            try:
                use()
            except ValueError as error:
                texts.append(str(error))
        return texts


def refuse_arguments() -> tuple[list[str], dict[str, int]]:
    """Wrong arguments raise where the call is made; nothing is counted, and all goes on."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        wrong: list[Callable[[], object]] = [
            lambda: collectives.all_gather(torch.zeros(5), torch.zeros(3), world, tag="weights"),
            lambda: collectives.reduce_scatter(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(6), world),
            lambda: collectives.all_reduce(torch.zeros(2, 2), world, tag="norm"),
            lambda: collectives.broadcast(torch.zeros(2), 2, world),
            lambda: collectives.all_to_all(torch.zeros(2), torch.zeros(2), [1, 1], [2, 1], world),
        ]
        with pytest.raises(Unsupported, match="all_reduce 'norm' cannot carry float64"):
            collectives.all_reduce(torch.zeros(2, dtype=torch.float64), world, tag="norm")
        accelerator.counters.reset()
        texts = []
        for call in wrong:
            try:
                call()
            except ValueError as error:
                texts.append(str(error))
        counted = len(accelerator.counters.collectives)
        vector = torch.ones(3)
        collectives.all_reduce(vector, world).wait()
        same(vector, torch.full((3,), float(world.size)))
        return texts, {"counted": counted}


def gather_on(accelerator: Accelerator, lane: str, part: int, tag: str = "weights") -> Work:
    """An all-gather of `part` bytes of zeros from each rank, on a lane."""
    collectives, world = accelerator.collectives, accelerator.collectives.world
    mine, output = torch.zeros(part, dtype=torch.uint8), torch.zeros(part * world.size, dtype=torch.uint8)
    return issue_on(accelerator, lane, lambda: collectives.all_gather(output, mine, world, tag=tag))


def look_at_lateness(seconds: float) -> dict[str, Any]:
    """A work is under way for a while after it was issued, and the host is not held up; a barrier does hold it up."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        collectives.barrier(world)
        begun = time.monotonic()
        works = [gather_on(accelerator, lane, 8) for lane in LANES]
        issued = time.monotonic() - begun
        early = [work.done() for work in works]
        for work in works:
            work.wait()
        waited = time.monotonic() - begun
        time.sleep(seconds * world.rank)
        begun = time.monotonic()
        collectives.barrier(world)
        return {
            "issued": issued,
            "early": early,
            "waited": waited,
            "done": [work.done() for work in works],
            "barrier": time.monotonic() - begun,
        }


def read_clock(part: int) -> tuple[float, float]:
    """Simulated seconds of two all-gathers of `part` bytes from each rank: one after the other, and at once."""
    with opened() as accelerator:
        begun = accelerator.clock()
        gather_on(accelerator, "gather", part).wait()
        gather_on(accelerator, "gather", part).wait()
        middle = accelerator.clock()
        works = [gather_on(accelerator, lane, part) for lane in ("gather", "reduce")]
        for work in works:
            work.wait()
        return middle - begun, accelerator.clock() - middle


def make_different_calls(difference: str) -> tuple[str, str, float]:
    """The last rank does something else; what every rank gets where it waits, and how long that takes."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        odd = world.rank == world.size - 1
        collectives.barrier(world)
        begun = time.monotonic()
        try:
            for work in _call(accelerator, difference, odd):
                work.wait()
        except WindlassError as error:
            return type(error).__name__, str(error), time.monotonic() - begun
        return "nothing", "", time.monotonic() - begun


def _call(accelerator: Accelerator, difference: str, odd: bool) -> list[Work]:
    """One call that all ranks make alike but for the odd one; two in another order, on lanes of their own."""
    collectives, world = accelerator.collectives, accelerator.collectives.world
    if difference == "order":
        lanes = ("reduce", "gather") if odd else ("gather", "reduce")
        return [gather_on(accelerator, lane, 16, tag=lane) for lane in lanes]
    if difference == "kind" and not odd:
        return [gather_on(accelerator, "compute", 16, tag="norm")]
    if difference == "barrier" and odd:
        collectives.barrier(world)
    vector = torch.zeros(
        5 if odd and difference == "bytes" else 4,
        dtype=torch.int32 if odd and difference == "dtype" else torch.float32,
    )
    tag = "other" if odd and difference == "tag" else "norm"
    return [collectives.all_reduce(vector, world, tag=tag)]


def leave_in_the_middle() -> float:
    """Rank 1 closes with a call open that nobody else makes; how long that takes."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        collectives.barrier(world)
        if world.rank == 1:
            collectives.all_reduce(torch.ones(1), world)
        begun = time.monotonic()
    return time.monotonic() - begun
