"""Level 0: the accounts of memory, to the byte."""

from __future__ import annotations

import torch

from windlass.accelerator.interface import Accelerator, Measure, MemoryStats, Place
from windlass.conformance.allocations import peak, used
from windlass.conformance.requirements import requires

MIB = 2**20


def tagged(accelerator: Accelerator, tag: str) -> int:
    """Bytes in use under a tag; a tag that holds nothing may be absent."""
    return accelerator.memory.stats().by_tag.get(tag, 0)


@requires(level=0, must="`used` is the bytes asked for and not yet released, exactly, without rounding.")
def test_used(accelerator: Accelerator) -> None:
    memory, before = accelerator.memory, used(accelerator)
    shapes = [((), torch.float32, 4), ((0,), torch.float32, 0), ((1,), torch.uint8, 1), ((3, 5), torch.int64, 120)]
    shapes += [((MIB + 1,), torch.uint8, MIB + 1), ((1001, 7), torch.float32, 28028)]
    tensors = []
    expected = before
    for shape, dtype, nbytes in shapes:
        tensors.append(memory.empty(shape, dtype))
        expected += nbytes
        assert used(accelerator) == expected, f"after {shape} of {dtype}"
    for tensor, (shape, dtype, nbytes) in zip(tensors, shapes, strict=True):
        memory.release(tensor)
        expected -= nbytes
        assert used(accelerator) == expected, f"after the release of {shape} of {dtype}"


@requires(level=0, must="`by_tag` divides `used` by the tag given at allocation.")
def test_used_by_tag(accelerator: Accelerator) -> None:
    memory = accelerator.memory
    before = memory.stats().by_tag.get("", 0)
    one = memory.empty((1000,), torch.float32, tag="conformance weights")
    two = memory.empty((3,), torch.uint8, tag="conformance weights")
    three = memory.empty((MIB,), torch.uint8, tag="conformance states")
    four = memory.empty((5,), torch.int32)
    assert tagged(accelerator, "conformance weights") == 4003
    assert tagged(accelerator, "conformance states") == MIB
    assert tagged(accelerator, "") == before + 20
    assert sum(memory.stats().by_tag.values()) == used(accelerator)
    memory.release(one)
    memory.release(three)
    assert tagged(accelerator, "conformance weights") == 3
    assert tagged(accelerator, "conformance states") == 0
    assert sum(memory.stats().by_tag.values()) == used(accelerator)
    memory.release(two)
    memory.release(four)
    assert tagged(accelerator, "conformance weights") == 0
    assert tagged(accelerator, "") == before


@requires(level=0, must="`peak` is the most bytes in use at once, exactly.")
def test_peak(accelerator: Accelerator) -> None:
    memory = accelerator.memory
    memory.reset_peak()
    before = used(accelerator)
    assert peak(accelerator) == before
    one = memory.empty((1001,), torch.uint8)
    two = memory.empty((501,), torch.uint8)
    memory.release(one)
    assert peak(accelerator) == before + 1502
    three = memory.empty((203,), torch.uint8)  # 704 in use: no new peak
    assert peak(accelerator) == before + 1502
    four = memory.empty((900,), torch.uint8)
    assert peak(accelerator) == before + 1604
    for tensor in (two, three, four):
        memory.release(tensor)
    assert peak(accelerator) == before + 1604


@requires(level=0, must="`reset_peak` lets the peak start again from what is in use then.")
def test_reset_peak(accelerator: Accelerator) -> None:
    memory, before = accelerator.memory, used(accelerator)
    kept = memory.empty((77,), torch.uint8)
    memory.release(memory.empty((5000,), torch.uint8))
    assert peak(accelerator) >= before + 5077
    memory.reset_peak()
    assert peak(accelerator) == before + 77
    memory.release(kept)
    assert peak(accelerator) == before + 77
    memory.reset_peak()
    assert peak(accelerator) == before
    memory.release(memory.empty((9,), torch.uint8))
    assert peak(accelerator) == before + 9


@requires(level=0, must="`reserved` holds at least what is in use, or is unknown: never a 0 that means so.")
def test_reserved(accelerator: Accelerator) -> None:
    tensor = accelerator.memory.empty((3 * MIB,), torch.uint8)
    stats = accelerator.memory.stats()
    assert isinstance(stats, MemoryStats)
    assert isinstance(stats.reserved, Measure)
    if stats.reserved.value is not None:
        assert stats.reserved.value >= used(accelerator) >= 3 * MIB
    accelerator.memory.release(tensor)


@requires(level=0, must="`capacity` holds more than what is in use, or is unknown: never a 0 that means so.")
def test_capacity(accelerator: Accelerator) -> None:
    tensor = accelerator.memory.empty((3 * MIB,), torch.uint8)
    capacity = accelerator.memory.stats().capacity
    assert isinstance(capacity, Measure)
    if capacity.value is not None:
        assert capacity.value >= used(accelerator) >= 3 * MIB
    accelerator.memory.release(tensor)


@requires(level=0, must="Statistics are those of the moment at which they were asked for.")
def test_statistics_are_a_snapshot(accelerator: Accelerator) -> None:
    memory = accelerator.memory
    tensor = memory.empty((10,), torch.uint8, tag="conformance snapshot")
    before = memory.stats()
    figures = (before.used, before.peak, dict(before.by_tag))
    other = memory.empty((10,), torch.uint8, tag="conformance snapshot")
    assert (before.used, before.peak, before.by_tag) == figures
    before.by_tag["conformance snapshot"] = 12345
    assert memory.stats().by_tag["conformance snapshot"] == 20
    memory.release(tensor)
    memory.release(other)


@requires(level=0, must="Without a place, statistics are the device's.")
def test_statistics_of_the_device(accelerator: Accelerator) -> None:
    tensor = accelerator.memory.empty((10,), torch.uint8)
    assert accelerator.memory.stats() == accelerator.memory.stats(Place.DEVICE)
    accelerator.memory.release(tensor)
