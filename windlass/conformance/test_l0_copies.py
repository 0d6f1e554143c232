"""Level 0: what a copy moves, and where to."""

from __future__ import annotations

import math

import pytest
import torch

from windlass.accelerator.counters import Tally
from windlass.accelerator.interface import Accelerator, Work
from windlass.conformance.allocations import allocated, assert_holds, random_bits
from windlass.conformance.requirements import requires

SHAPES = pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (127,), (2, 0), (1001, 33)], ids=str)


def integers(count: int, start: int = 0) -> torch.Tensor:
    """`count` different numbers on the host."""
    return torch.arange(start, start + count, dtype=torch.int32)


@requires(level=0, must="A copy moves every element of a tensor of any shape and leaves its source as it was.")
@SHAPES
def test_copy(accelerator: Accelerator, shape: tuple[int, ...]) -> None:
    values = random_bits(math.prod(shape), torch.int32, seed=1).view(shape)
    nothing = torch.full(shape, -1, dtype=torch.int32)
    with allocated(accelerator, values) as source, allocated(accelerator, nothing) as destination:
        work = accelerator.memory.copy(destination, source)
        assert isinstance(work, Work)
        work.wait()
        assert_holds(accelerator, destination, values, "the destination")
        assert_holds(accelerator, source, values, "the source")


@requires(level=0, must="A copy between slices starts where each of them starts and writes nothing around them.")
@pytest.mark.parametrize("length", [0, 1, 3, 32, 64, 100])
@pytest.mark.parametrize(("to", "begin"), [(0, 0), (0, 5), (5, 0), (7, 11), (32, 64), (33, 31), (190, 190)])
def test_copy_between_slices(accelerator: Accelerator, to: int, begin: int, length: int) -> None:
    values, wanted = integers(300), integers(300, start=1000)
    with allocated(accelerator, values) as source, allocated(accelerator, wanted) as destination:
        accelerator.memory.copy(destination[to : to + length], source[begin : begin + length]).wait()
        wanted = wanted.clone()
        wanted[to : to + length] = values[begin : begin + length]
        assert_holds(accelerator, destination, wanted, "the destination")
        assert_holds(accelerator, source, values, "the source")


@requires(level=0, must="A copy between blocks of rows moves those rows.")
def test_copy_of_rows(accelerator: Accelerator) -> None:
    values, wanted = integers(70).view(10, 7), integers(70, start=1000).view(10, 7)
    with allocated(accelerator, values) as source, allocated(accelerator, wanted) as destination:
        accelerator.memory.copy(destination[1:4], source[6:9]).wait()
        accelerator.memory.copy(destination[9], source[0]).wait()
        wanted = wanted.clone()
        wanted[1:4], wanted[9] = values[6:9], values[0]
        assert_holds(accelerator, destination, wanted, "the destination")


@requires(level=0, must="After a copy, source and destination have nothing to do with each other.")
@pytest.mark.parametrize("count", [1, 1000, 300_000])
def test_copy_is_no_alias(accelerator: Accelerator, count: int) -> None:
    values = integers(count)
    with allocated(accelerator, values) as source, allocated(accelerator, -values - 1) as destination:
        accelerator.memory.copy(destination, source).wait()
        source.fill_(-5)
        assert_holds(accelerator, destination, values, "the destination")
        destination.fill_(-6)
        assert_holds(accelerator, source, torch.full_like(values, -5), "the source")


@requires(level=0, must="A copy sees what was written to its source before it was issued.")
def test_copy_after_writes(accelerator: Accelerator) -> None:
    zeros = torch.zeros(1000, dtype=torch.int32)
    with allocated(accelerator, zeros) as source, allocated(accelerator, zeros) as destination:
        for number in range(1, 6):
            source.fill_(number)
            accelerator.memory.copy(destination, source).wait()
            assert_holds(accelerator, destination, torch.full_like(zeros, number), f"copy {number}")


@requires(level=0, must="A copy between different dtypes raises ValueError, casts nothing and is not counted.")
@pytest.mark.parametrize(("to", "source"), [("float32", "int32"), ("int32", "float32"), ("int64", "int32")])
def test_copy_does_not_cast(accelerator: Accelerator, to: str, source: str) -> None:
    check_refused(
        accelerator, torch.ones(6, dtype=getattr(torch, to)), torch.full((6,), 3, dtype=getattr(torch, source))
    )


@requires(level=0, must="A copy between different shapes raises ValueError, broadcasts nothing and is not counted.")
@pytest.mark.parametrize(
    ("to", "source"),
    [
        ((6,), (5,)),
        ((5,), (6,)),
        ((6,), (1,)),
        ((6,), ()),
        ((), (1,)),
        ((2, 3), (3, 2)),
        ((6,), (2, 3)),
        ((2, 3), (3,)),
    ],
    ids=str,
)
def test_copy_does_not_reshape(accelerator: Accelerator, to: tuple[int, ...], source: tuple[int, ...]) -> None:
    check_refused(accelerator, torch.ones(to), torch.full(source, 3.0))


def check_refused(accelerator: Accelerator, left: torch.Tensor, right: torch.Tensor) -> None:
    memory, copies = accelerator.memory, accelerator.counters.copies
    with allocated(accelerator, left) as destination, allocated(accelerator, right) as source:
        with pytest.raises(ValueError, match=r"\w"):
            memory.copy(destination, source, tag="conformance refused")
        assert copies.get(("device", "conformance refused"), Tally()).calls == 0
        assert_holds(accelerator, destination, left, "the destination")
        with allocated(accelerator, left + 1) as control:
            memory.copy(destination, control).wait()
        assert_holds(accelerator, destination, left + 1, "the destination of the control")


@requires(level=0, must="A copy within the device counts its own bytes once, as 'device' and under its tag.")
def test_copy_is_counted(accelerator: Accelerator) -> None:
    memory, copies = accelerator.memory, accelerator.counters.copies
    before = copied(accelerator)
    with allocated(accelerator, torch.zeros(100)) as source, allocated(accelerator, torch.zeros(100)) as destination:
        memory.copy(destination, source, tag="conformance whole").wait()
        memory.copy(destination[3:10], source[50:57], tag="conformance slice").wait()
        memory.copy(destination[3:4], source[50:51], tag="conformance slice").wait()
        untagged = Tally(*vars(copies["device", ""]).values())
        memory.copy(destination, source).wait()
    assert copies["device", ""] == Tally(untagged.calls + 1, untagged.bytes + 400)
    after = copied(accelerator)
    for tag, calls, nbytes in (("conformance whole", 1, 400), ("conformance slice", 2, 32)):
        found = {kind: tally for (kind, other), tally in after.items() if other == tag}
        previous = before.get(("device", tag), (0, 0))
        assert set(found) == {"device"}, f"copies tagged {tag!r} are counted as {sorted(found)}"
        assert found["device"] == (previous[0] + calls, previous[1] + nbytes)


def copied(accelerator: Accelerator) -> dict[tuple[str, str], tuple[int, int]]:
    """Calls and bytes so far, by kind and tag."""
    return {key: (tally.calls, tally.bytes) for key, tally in accelerator.counters.copies.items() if tally.calls}
