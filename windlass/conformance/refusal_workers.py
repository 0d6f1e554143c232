"""What ranks do in the tests of collectives that must be refused: each says what it met, and nothing may hang."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from windlass.accelerator.environment import read_environment
from windlass.accelerator.errors import WindlassError
from windlass.accelerator.interface import Accelerator, Group
from windlass.conformance.collective_values import one_program
from windlass.conformance.group_workers import sum_of_ranks, wait_for_file
from windlass.conformance.opening import opened


@dataclass(frozen=True)
class Met:
    """What one rank met: the type of the error, or "nothing", its text, and the seconds until then."""

    error: str
    text: str = ""
    seconds: float = 0.0


def _meet(action: Callable[[], object]) -> Met:
    begun = time.monotonic()
    try:
        action()
    except (WindlassError, ValueError) as error:
        return Met(type(error).__name__, str(error), time.monotonic() - begun)
    return Met("nothing", "", time.monotonic() - begun)


def _zeros(accelerator: Accelerator, count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return accelerator.memory.empty((count,), dtype).zero_()


DIFFERENCES: Final = ("kind", "tag", "size", "dtype", "barrier", "splits")


def make_different_calls(difference: str) -> Met:
    """Rank 1 calls something else than the others, in one respect."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        odd = world.rank == 1
        size = 5 if odd and difference == "size" else 4
        dtype = torch.int32 if odd and difference == "dtype" else torch.float32
        tag = "other" if odd and difference == "tag" else "weights"
        whole, part = _zeros(accelerator, size * world.size, dtype), _zeros(accelerator, size, dtype)
        ones = [1] * world.size
        sent = [2, *ones[1:]] if odd else ones  # rank 0 expects one element of rank 1, as of everybody
        given = _zeros(accelerator, sum(sent))
        received = _zeros(accelerator, world.size)
        sum_of_ranks(accelerator)

        def call() -> None:
            if difference == "splits":
                collectives.all_to_all(received, given, ones, sent, world, tag=tag).wait()
            elif odd and difference == "kind":
                collectives.reduce_scatter(part, whole, world, tag=tag).wait()
            elif odd and difference == "barrier":
                collectives.barrier(world)
            else:
                collectives.all_gather(whole, part, world, tag=tag).wait()
            accelerator.streams.synchronize()

        return _meet(call)


def make_wrong_calls() -> list[tuple[str, int, Met, bool]]:
    """Each rank in turn makes calls that are wrong in themselves, alone, or all do where every rank must run the same
    program; after each round all ranks meet as usual.

    Gives, for every wrong call, its name, the rank, what it met, and whether its output was left alone.
    """
    results = []
    with opened() as accelerator:
        world = accelerator.collectives.world
        for culprit in world.ranks:
            if culprit == world.rank or one_program(accelerator):
                for name, call in wrong_calls(accelerator, world).items():
                    output = _zeros(accelerator, 8)
                    met = _meet(lambda call=call, output=output: call(output))  # type: ignore[misc]
                    results.append((name, world.rank, met, not bool(accelerator.to_host(output).any())))
            sum_of_ranks(accelerator)
        assert {tag for _, tag in accelerator.counters.collectives} <= {"still works", ""}, "a refused call was counted"
    return results


def wrong_calls(accelerator: Accelerator, world: Group) -> dict[str, Callable[[Tensor], object]]:
    """Calls that no rank may make, by name; each takes an output of 8 zeros."""
    collectives, size = accelerator.collectives, world.size

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return accelerator.memory.empty(shape, dtype).fill_(1)

    def gather(output: Tensor, given: Tensor) -> Any:
        return collectives.all_gather(output, given, world, tag="wrong")

    def scatter(output: Tensor, given: Tensor, **more: Any) -> Any:
        return collectives.reduce_scatter(output, given, world, tag="wrong", **more)

    def exchange(output: Tensor, given: Tensor, arriving: Sequence[int], sent: Sequence[int]) -> Any:
        return collectives.all_to_all(output, given, arriving, sent, world, tag="wrong")

    rest = [0] * (size - 1)
    strided: dict[str, Callable[[Tensor], object]] = {
        "all_gather of every other element": lambda output: gather(output[: 2 * size], zeros(4)[::2]),
        "all_gather into every other element": lambda output: gather(output[: 2 * size : 2], zeros(1)),
        "reduce_scatter of every other element": lambda output: scatter(output, zeros(16 * size)[::2]),
        "all_reduce of every other element": lambda output: collectives.all_reduce(output[::2], world, tag="wrong"),
    }
    if zeros(4)[::2].is_contiguous():  # a device whose tensors have values and no strides sees nothing wrong in them
        strided = {}
    return {
        **strided,
        "all_gather of too much": lambda output: gather(output, zeros(9)),
        "all_gather of too little": lambda output: gather(output, zeros(1)),
        "all_gather into another dtype": lambda output: gather(output[:size], zeros(1, dtype=torch.int32)),
        "all_gather of a matrix": lambda output: gather(output[: 4 * size], zeros(2, 2)),
        "all_gather into a matrix": lambda output: gather(output.view(4, 2)[:size], zeros(2)),
        "reduce_scatter of too little": lambda output: scatter(output, zeros(8 * size - 1)),
        "reduce_scatter of too much": lambda output: scatter(output, zeros(8 * size + size)),
        "reduce_scatter of a matrix": lambda output: scatter(output, zeros(size, 8)),
        "reduce_scatter by mean": lambda output: scatter(output, zeros(8 * size), op="mean"),
        "all_reduce of a matrix": lambda output: collectives.all_reduce(output.view(4, 2), world, tag="wrong"),
        "all_reduce by product": lambda output: collectives.all_reduce(
            output,
            world,
            op="product",  # type: ignore[arg-type]
            tag="wrong",
        ),
        "broadcast of a matrix": lambda output: collectives.broadcast(output.view(4, 2), 0, world, tag="wrong"),
        "broadcast from outside": lambda output: collectives.broadcast(output, size, world, tag="wrong"),
        "broadcast from below": lambda output: collectives.broadcast(output, -1, world, tag="wrong"),
        "all_to_all with a split too many": lambda output: exchange(output, zeros(8), [8, *rest, 0], [8, *rest]),
        "all_to_all with splits that do not add up": lambda output: exchange(output, zeros(8), [8, *rest], [7, *rest]),
        "all_to_all with a negative split": lambda output: exchange(output, zeros(8), [9, *rest[1:], -1], [8, *rest]),
        "all_to_all into another dtype": lambda output: exchange(
            output, zeros(8, dtype=torch.int32), [8, *rest], [8, *rest]
        ),
        "all_to_all of a matrix": lambda output: exchange(output, zeros(4, 2), [8, *rest], [8, *rest]),
    }


def narrow_a_reduction(source_name: str, target_name: str) -> Met:
    """A reduction into a dtype that cannot hold its terms, called by rank 0 alone if it may; then all meet."""
    source, target = getattr(torch, source_name), getattr(torch, target_name)
    with opened() as accelerator:
        world, met = accelerator.collectives.world, Met("nothing")
        if world.rank == 0 or one_program(accelerator):
            output, given = _zeros(accelerator, 4, target), _zeros(accelerator, 4 * world.size, source)
            met = _meet(lambda: accelerator.collectives.reduce_scatter(output, given, world))
        sum_of_ranks(accelerator)
        return met


def ask_for_wrong_groups() -> list[Met]:
    """Groups that cannot be: empty, with a rank twice, with ranks outside the world; and one used by an outsider."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        wrong = ((), (0, 0), (0, world.size), (-1, 0))
        met = [_meet(lambda ranks=ranks: collectives.group(ranks, "wrong")) for ranks in wrong]  # type: ignore[misc]
        first = collectives.group((0,), "first")
        vector = _zeros(accelerator, 4)
        if world.rank != 0:
            met.append(_meet(lambda: collectives.all_reduce(vector, first).wait()))
            met.append(_meet(lambda: collectives.barrier(first)))
        sum_of_ranks(accelerator)
        return met


def lose_rank(seconds: float) -> Met:
    """Rank 1 is killed some seconds after the others have entered a collective that needs it."""
    with opened() as accelerator:
        world = accelerator.collectives.world
        whole, part = _zeros(accelerator, 5000 * world.size), _zeros(accelerator, 5000)
        sum_of_ranks(accelerator)
        if world.rank == 1:
            time.sleep(seconds)
            os.kill(os.getpid(), signal.SIGKILL)

        def call() -> None:
            accelerator.collectives.all_gather(whole, part, world, tag="weights").wait()
            accelerator.streams.synchronize()

        return _meet(call)


def come_late(folder: str) -> Met:
    """Rank 1 does not enter the collective, though it lives, until the others have given up."""
    with opened() as accelerator:
        world = accelerator.collectives.world
        whole, part = _zeros(accelerator, 5000 * world.size), _zeros(accelerator, 5000)
        sum_of_ranks(accelerator)
        signs = [Path(folder, f"rank {rank}") for rank in world.ranks if rank != 1]
        if world.rank == 1:
            for sign in signs:
                wait_for_file(sign)
            return Met("nothing")

        def call() -> None:
            accelerator.collectives.all_gather(whole, part, world, tag="weights").wait()
            accelerator.streams.synchronize()

        met = _meet(call)
        Path(folder, f"rank {world.rank}").touch()
        return met


def stay_away() -> Met:
    """Rank 1 never opens the device, so the others cannot."""
    if read_environment().rank == 1:
        return Met("nothing")

    def open_and_close() -> None:
        with opened() as accelerator:
            accelerator.collectives.barrier(accelerator.collectives.world)  # where opening is no meeting

    return _meet(open_and_close)
