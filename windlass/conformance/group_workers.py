"""What ranks do in the tests of groups, barriers, fetches and counters."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import torch

from windlass.accelerator.interface import Accelerator, Group
from windlass.conformance.collective_values import (
    add_in_rank_order,
    blank,
    check_reduced,
    draw,
    one_program,
    part,
    place,
    to_dtype,
)
from windlass.conformance.collective_workers import equal_split_tables, split_tables
from windlass.conformance.opening import opened

_PATIENCE_SECONDS = 50.0  # how long a rank looks for a file that another one writes


def use_pairs() -> None:
    """Every neighbouring pair of ranks is a group, so each rank is in two of them; all collectives on each."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        pairs = [
            collectives.group((first, (first + 1) % world.size), f"pair {first}")
            for first in range(world.size if world.size > 2 else 1)
        ]
        for number, pair in enumerate(pairs):
            if world.rank in pair.ranks:
                use_group(accelerator, pair, number)
        for number, pair in reversed(list(enumerate(pairs))):
            if world.rank in pair.ranks:
                use_group(accelerator, pair, 10 + number)


def use_parts_of_the_world() -> None:
    """Groups of even and odd ranks under one name, all but the first, everybody backwards, and each rank alone."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        choices = [tuple(range(0, world.size, 2)), tuple(range(1, world.size, 2)), tuple(range(1, world.size))]
        groups = [collectives.group(ranks, "half" if number < 2 else "rest") for number, ranks in enumerate(choices)]
        groups.append(collectives.group(tuple(reversed(world.ranks)), "backwards"))
        groups += [collectives.group((other,), f"alone {other}") for other in world.ranks]
        for number, group in enumerate(groups):
            if world.rank in group.ranks:
                use_group(accelerator, group, number)
        use_group(accelerator, world, len(groups))


def use_equal_parts_of_the_world() -> None:
    """The world is cut into groups of equal size, side by side and interleaved, and every rank uses its own of them."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        number = 0
        for size in (size for size in range(1, world.size + 1) if world.size % size == 0):
            count = world.size // size
            halves = [range(first * size, (first + 1) * size) for first in range(count)]
            for name, cut in (("block", halves), ("comb", [range(first, world.size, count) for first in range(count)])):
                groups = [collectives.group(tuple(ranks), f"{name} of {size}") for ranks in cut]
                (own,) = (group for group in groups if world.rank in group.ranks)
                use_group(accelerator, own, number)
                number += 1


def describe_groups() -> list[tuple[str, tuple[int, ...], int, int, bool]]:
    """Name, ranks, own place and size of the world and of a group, and whether asking again gives an equal group."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        backwards = collectives.group(list(reversed(world.ranks)), "backwards")
        again = collectives.group(list(reversed(world.ranks)), "backwards")
        return [(one.name, one.ranks, one.rank, one.size, one == again) for one in (world, backwards)]


def use_groups_at_once() -> None:
    """Works on the world and on groups inside it are under way together, and each rank waits in another order."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        groups = [world, collectives.group(tuple(reversed(world.ranks)), "backwards")]
        groups.append(collectives.group(world.ranks[1:], "rest"))
        checks: list[Callable[[], None]] = []
        for number in range(12):
            group = groups[number % 3]
            if world.rank in group.ranks:
                checks.append(_start_reduction(accelerator, group, number))
        order = torch.randperm(len(checks), generator=torch.Generator().manual_seed(world.rank), device="cpu").tolist()
        for number in order:
            checks[number]()


def _start_reduction(accelerator: Accelerator, group: Group, seed: int) -> Callable[[], None]:
    inputs = [draw(other, 5001 * group.size, torch.float32, seed) for other in group.ranks]
    given = place(accelerator, inputs[group.rank])
    output = blank(accelerator, 5001, torch.float32, "slice")
    work = accelerator.collectives.reduce_scatter(output.tensor, given.tensor, group, tag=f"number {seed}")

    def check() -> None:
        work.wait()
        terms = [part(one, group.rank, group.size) for one in inputs]
        check_reduced(output.read(), terms, "sum", group.name, seed)

    return check


def use_group(accelerator: Accelerator, group: Group, seed: int) -> None:
    """Every collective on one group of which this rank is a member; places are those in the group."""
    collectives = accelerator.collectives
    size = 517
    parts = [draw(other, size, torch.float32, seed) for other in group.ranks]
    shard, output = place(accelerator, parts[group.rank]), blank(accelerator, size * group.size, torch.float32, "slice")
    collectives.all_gather(output.tensor, shard.tensor, group).wait()
    output.expect(torch.cat(parts), group, "all_gather")
    wholes = [draw(other, size * group.size, torch.float32, seed) for other in group.ranks]
    given, reduced = place(accelerator, wholes[group.rank], "slice"), blank(accelerator, size, torch.float32)
    collectives.reduce_scatter(reduced.tensor, given.tensor, group).wait()
    terms = [part(one, group.rank, group.size) for one in wholes]
    check_reduced(reduced.read(), terms, "sum", group, "reduce_scatter")
    vector = place(accelerator, parts[group.rank])
    collectives.all_reduce(vector.tensor, group, op="max").wait()
    check_reduced(vector.read(), parts, "max", group, "all_reduce")
    for source in range(group.size):
        tensor = place(accelerator, parts[group.rank])
        collectives.broadcast(tensor.tensor, source, group).wait()
        tensor.expect(parts[source], group, "broadcast from", source)
    if one_program(accelerator):
        splits = equal_split_tables(group.size)["many elements each"]
    else:
        splits = split_tables(group.size)["a ring"]
    sent = [draw(other, sum(splits[index]), torch.int32, seed) for index, other in enumerate(group.ranks)]
    arriving = [row[group.rank] for row in splits]
    exchanged, received = place(accelerator, sent[group.rank]), blank(accelerator, sum(arriving), torch.int32)
    collectives.all_to_all(received.tensor, exchanged.tensor, arriving, splits[group.rank], group).wait()
    wanted = [one.split(row)[group.rank] for one, row in zip(sent, splits, strict=True)]
    received.expect(torch.cat(wanted), group, "all_to_all")
    collectives.barrier(group)


def meet_at_barriers(folder: str) -> None:
    """Each rank in turn is late; what it wrote before the barrier is there for all that have passed it."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        for round_ in range(2):
            for late in world.ranks:
                sign = Path(folder, f"{round_}-{late}")
                if late == world.rank:
                    time.sleep(0.05)
                    sign.touch()
                collectives.barrier(world)
                assert sign.exists(), f"rank {world.rank} passed a barrier before rank {late} had come to it"


def fetch(dtype_name: str) -> None:
    """Published shards are fetched by all ranks, apart and in place, round after round with new values."""
    dtype = to_dtype(dtype_name)
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        for size in (0, 1, 33, 20001):
            apart = blank(accelerator, size, dtype, "shared slice")
            whole = blank(accelerator, size * world.size, dtype, "shared whole")
            private = blank(accelerator, size, dtype)
            for round_ in range(3):
                shards = [draw(other, size, dtype, round_) for other in world.ranks]
                for tensor in (apart.tensor, private.tensor):
                    tensor.copy_(shards[world.rank])
                if not one_program(accelerator):
                    part(whole.tensor, world.rank, world.size).copy_(shards[world.rank])
                collectives.publish(world)
                for shard in (apart, private, apart):
                    output = blank(accelerator, size * world.size, dtype, "slice")
                    collectives.fetch(output.tensor, shard.tensor, world, tag="weights").wait()
                    output.expect(torch.cat(shards), size, round_)
                own = apart.tensor if one_program(accelerator) else part(whole.tensor, world.rank, world.size)
                collectives.fetch(whole.tensor, own, world).wait()
                whole.expect(torch.cat(shards), size, round_, "in place")
                collectives.barrier(world)
        tally = accelerator.counters.collectives["all_gather", "weights"]
        assert tally.calls == 4 * 3 * 3, tally
        assert tally.bytes == 9 * (1 + 33 + 20001) * (world.size - 1) * dtype.itemsize, tally


def fetch_alone(folder: str) -> tuple[bool, bool]:
    """Rank 0 fetches while the others only look for a file; whether one_sided is declared in this job, and whether
    the fetch was over before they took part."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        declared = accelerator.capabilities.one_sided
        shards = [draw(other, 1001, torch.float32) for other in world.ranks]
        mine = blank(accelerator, 1001, torch.float32, "shared whole")
        mine.tensor.copy_(shards[world.rank])
        accelerator.streams.synchronize()
        collectives.publish(world)
        output = blank(accelerator, 1001 * world.size, torch.float32)
        sign, alone = Path(folder, "fetched"), False
        if world.rank == 0:
            release = Timer(10 if declared else 0.4, sign.touch)  # a fetch that is a meeting may wait when it is issued
            release.start()
            work = collectives.fetch(output.tensor, mine.tensor, world, tag="weights")
            while not work.done() and not sign.exists():
                time.sleep(0.002)
            alone = not sign.exists()
            release.cancel()
            sign.touch()
        else:
            wait_for_file(sign)
            work = collectives.fetch(output.tensor, mine.tensor, world, tag="weights")
        work.wait()
        output.expect(torch.cat(shards))
        assert accelerator.counters.collectives["all_gather", "weights"].calls == 1
        collectives.barrier(world)
        return declared, alone


def wait_for_file(path: Path) -> None:
    """Return once another rank has written the file; TimeoutError if it does not."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no rank wrote {path.name!r} within {_PATIENCE_SECONDS:g} s")
        time.sleep(0.002)


def count(dtype_name: str) -> dict[str, tuple[int, int]]:
    """Calls and bytes by kind and tag after a known number of collectives on the world and on a pair: the first two
    ranks, or all where every rank must call the same."""
    dtype = to_dtype(dtype_name)
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        uniform = one_program(accelerator)
        pair = collectives.group((1, 0), "pair") if world.size > 1 and not uniform else world
        accelerator.counters.reset()
        narrow = blank(accelerator, 11, dtype)
        whole, floats = blank(accelerator, 11 * world.size, dtype), blank(accelerator, 11, torch.float32)
        for _ in range(2):
            collectives.all_gather(whole.tensor, narrow.tensor, world, tag="weights").wait()
            collectives.fetch(whole.tensor, narrow.tensor, world, tag="weights").wait()
        collectives.all_gather(whole.tensor, narrow.tensor, world).wait()
        collectives.reduce_scatter(floats.tensor, whole.tensor, world, tag="gradients").wait()
        collectives.all_reduce(narrow.tensor, world, tag="norm").wait()
        collectives.broadcast(narrow.tensor, world.size - 1, world, tag="start").wait()
        splits = equal_split_tables(world.size)["many elements each"] if uniform else split_tables(world.size)["uneven"]
        arriving = [row[world.rank] for row in splits]
        given, output = blank(accelerator, sum(splits[world.rank]), dtype), blank(accelerator, sum(arriving), dtype)
        collectives.all_to_all(output.tensor, given.tensor, arriving, splits[world.rank], world, tag="tokens").wait()
        if world.rank in pair.ranks:
            collectives.all_reduce(narrow.tensor, pair, tag="in the pair").wait()
        collectives.publish(world)
        collectives.barrier(world)
        tallies = accelerator.counters.collectives.items()
        return {f"{kind} {tag!r}": (one.calls, one.bytes) for (kind, tag), one in tallies if kind != "barrier"}


def sum_of_ranks(accelerator: Accelerator) -> None:
    """A small collective of the world, to see that collectives still work."""
    world = accelerator.collectives.world
    values = [draw(other, 9, torch.float32) for other in world.ranks]
    vector = place(accelerator, values[world.rank])
    accelerator.collectives.all_reduce(vector.tensor, world, tag="still works").wait()
    check_reduced(vector.read(), values, "sum")
    if accelerator.capabilities.ordered_reduction:
        vector.expect(add_in_rank_order(values))
