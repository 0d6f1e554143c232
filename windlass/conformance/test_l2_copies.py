"""Level 2: copies between places on lanes, on one rank: values, order, release after work, and counts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from windlass.accelerator.interface import Accelerator, Place, Work
from windlass.conformance.collective_values import MOVED, blank, draw, dtype_needs, place, to_dtypes
from windlass.conformance.lane_chains import chain, find_size, produce
from windlass.conformance.requirements import requires

_SIZES = (0, 1, 7, 1025, 70001)
_SMALL = 1000


def _place_needs(*places: str) -> tuple[str, ...]:
    return tuple(f"{place}_place" for place in sorted(set(places) - {"device"}))


@requires(
    level=2,
    must="A copy on the device brings every element and touches nothing around its destination.",
    needs=lambda dtype: dtype_needs(dtype),
)
@pytest.mark.parametrize("dtype", MOVED)
def test_copy_on_the_device(accelerator: Accelerator, dtype: str) -> None:
    for one in to_dtypes(dtype):
        for size in _SIZES:
            for placing in ("whole", "slice"):
                values = draw(0, size, one)
                source, target = place(accelerator, values, placing), blank(accelerator, size, one, placing)
                accelerator.memory.copy(target.tensor, source.tensor).wait()
                target.expect(values, one, size, placing)
                source.expect(values, "the source of", one, size, placing)
                source.release()
                target.release()


@requires(
    level=2,
    must="A matrix is copied as it lies, and two halves of one tensor are two tensors.",
)
def test_copy_of_a_matrix(accelerator: Accelerator) -> None:
    values = draw(0, 12 * 34, torch.float32).view(12, 34)
    tensor = accelerator.memory.empty((12, 34), torch.float32).copy_(values)
    accelerator.memory.copy(tensor[6:], tensor[:6]).wait()
    got = accelerator.to_host(tensor)
    accelerator.memory.release(tensor)
    assert torch.equal(got, torch.cat([values[:6], values[:6]]))


_ROUTES = [("host", "host"), ("host", "disk"), ("host", "disk", "host")]


@requires(
    level=2,
    must="Values return unchanged from every route of copies over the places that are offered.",
    needs=lambda route, dtype: dtype_needs(dtype, *_place_needs(*route)),
)
@pytest.mark.parametrize("dtype", MOVED)
@pytest.mark.parametrize("route", [("host",), *_ROUTES], ids="-".join)
def test_copy_between_places(accelerator: Accelerator, route: tuple[str, ...], dtype: str) -> None:
    stops = ["device", *route, *(["host"] if route[-1] == "disk" else []), "device"]
    for one in to_dtypes(dtype):
        for size in _SIZES[1:]:
            values = draw(0, size, one)
            tensors = [accelerator.memory.empty((size,), one, Place(stop), tag="route") for stop in stops]
            tensors[0].copy_(values)
            before: Work = accelerator.streams.record()
            for (start, source), (stop, target) in pairwise(zip(stops, tensors, strict=True)):
                with accelerator.streams.lane("up" if stop == "device" else "down"):
                    before = accelerator.memory.copy(target, source, after=before, tag=f"{start} to {stop}")
            before.wait()
            got = accelerator.to_host(tensors[-1])
            for tensor in tensors:
                accelerator.memory.release(tensor, after=before)
            assert torch.equal(got, values), (one, size)


@requires(
    level=2,
    must="The host reads what was copied down, and what it writes is copied up, once a synchronize() has come between.",
    needs="host_place",
)
def test_host_memory_is_the_hosts(accelerator: Accelerator) -> None:
    device = accelerator.memory.empty((_SIZES[-1],), torch.float32)
    host = accelerator.memory.empty((_SIZES[-1],), torch.float32, Place.HOST)
    for number in range(6):
        host.copy_(draw(number, host.numel(), torch.float32))
        filled = accelerator.streams.record()
        with accelerator.streams.lane("up"):
            up = accelerator.memory.copy(device, host, after=filled)
        up.wait()
        device.mul_(2.0)
        doubled = accelerator.streams.record()
        with accelerator.streams.lane("down"):
            down = accelerator.memory.copy(host, device, after=doubled)
        down.wait()
        accelerator.streams.synchronize()
        assert host.device.type == "cpu"
        assert torch.equal(accelerator.to_host(host), 2.0 * draw(number, host.numel(), torch.float32))
    accelerator.memory.release(host)
    accelerator.memory.release(device)


@requires(level=2, must="A copy begins when the work or event that it is to come after is over, whatever its lane.")
def test_copy_after(accelerator: Accelerator) -> None:
    size = find_size(accelerator)
    for elements in (size, *[_SMALL] * 4):
        with chain(accelerator, elements) as links:
            tensors = [links.empty() for _ in range(5)]
            for number in range(8):
                produce(tensors[0], number)
                before: Work = accelerator.streams.record()
                for lane, (source, target) in zip(("down", "up", "gather", "down"), pairwise(tensors), strict=True):
                    with accelerator.streams.lane(lane):
                        before = accelerator.memory.copy(target, source, after=before)
                before.wait()
                tensors[0].fill_(-1.0)
                links.expect(tensors[-1], number)


@requires(level=2, must="Memory that is released after a copy is given to nobody before that copy is over.")
@pytest.mark.parametrize("role", ["source", "destination"])
def test_release_after_a_copy(accelerator: Accelerator, role: str) -> None:
    size = find_size(accelerator)
    for elements in (size, *[_SMALL] * 4):
        with chain(accelerator, elements) as links:
            kept = links.empty()
            for number in range(10):
                passing = accelerator.memory.empty((elements,), torch.float32, tag="passing")
                source, target = (passing, kept) if role == "source" else (kept, passing)
                produce(source, number)
                if role == "destination":
                    target.fill_(-2.0)
                written = accelerator.streams.record()
                with accelerator.streams.lane("down"):
                    work = accelerator.memory.copy(target, source, after=written)
                accelerator.memory.release(passing, after=work)
                again = [accelerator.memory.empty((elements,), torch.float32, tag="again") for _ in range(2)]
                for tensor in again:
                    tensor.fill_(-1.0)
                work.wait()
                links.expect(kept, number)
                for tensor in again:
                    links.expect(tensor, -1)
                    accelerator.memory.release(tensor, after=accelerator.streams.record())


@requires(level=2, must="Memory that is released after a recorded event is given to nobody before that event.")
def test_release_after_an_event(accelerator: Accelerator) -> None:
    size = find_size(accelerator)
    with chain(accelerator, size) as links:
        total = links.empty()
        for number in range(10):
            term = accelerator.memory.empty((size,), torch.float32, tag="term")
            allocated = accelerator.streams.record()
            with accelerator.streams.lane("reduce"):
                accelerator.streams.wait(allocated)
                produce(term, 1)
                total.add_(term)
                added = accelerator.streams.record()
            accelerator.memory.release(term, after=added)
            again = accelerator.memory.empty((size,), torch.float32, tag="again").fill_(-1.0)
            accelerator.streams.wait(added)
            links.expect(total, number + 1)
            accelerator.memory.release(again, after=accelerator.streams.record())


@requires(
    level=2,
    must="The counters hold the bytes of every copy by its kind, up, down, device or host, and its tag.",
    needs="host_place",
)
def test_copies_are_counted(accelerator: Accelerator) -> None:
    made: dict[Place, list[Tensor]] = {
        place: [accelerator.memory.empty((50,), torch.float32, place).zero_() for _ in range(2)]
        for place in (Place.DEVICE, Place.HOST)
    }
    accelerator.counters.reset()
    for times, (source, target) in enumerate(
        [
            (Place.HOST, Place.DEVICE),
            (Place.DEVICE, Place.HOST),
            (Place.DEVICE, Place.DEVICE),
            (Place.HOST, Place.HOST),
        ],
        start=1,
    ):
        for _ in range(times):
            accelerator.memory.copy(made[target][1][:30], made[source][0][:30], tag="counted").wait()
    accelerator.streams.synchronize()
    tallies = {
        kind: (one.calls, one.bytes) for (kind, tag), one in accelerator.counters.copies.items() if tag == "counted"
    }
    for tensor in (*made[Place.DEVICE], *made[Place.HOST]):
        accelerator.memory.release(tensor)
    assert tallies == {"up": (1, 120), "down": (2, 240), "device": (3, 360), "host": (4, 480)}


_WRONG: dict[str, Any] = {
    "a longer source": ((11,), torch.float32),
    "another shape": ((2, 5), torch.float32),
    "another dtype": ((10,), torch.int32),
}


@requires(level=2, must="A copy between unequal shapes or dtypes raises ValueError and copies nothing.")
@pytest.mark.parametrize("wrong", _WRONG)
def test_unequal_copies(accelerator: Accelerator, wrong: str) -> None:
    shape, dtype = _WRONG[wrong]
    target = accelerator.memory.empty((10,), torch.float32).zero_()
    source = accelerator.memory.empty(shape, dtype).fill_(1)
    with pytest.raises(ValueError, match=r"\w"):
        accelerator.memory.copy(target, source, tag="wrong")
    got = accelerator.to_host(target)
    accelerator.memory.release(target)
    accelerator.memory.release(source)
    assert not got.any()
    assert not any(tag == "wrong" for _, tag in accelerator.counters.copies)
