"""Level 2: lanes keep the order that works and events declare, on one rank."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
import torch

from windlass.accelerator.errors import Unsupported
from windlass.accelerator.interface import LANES, Accelerator, Work
from windlass.conformance.lane_chains import chain, find_size, produce
from windlass.conformance.requirements import requires

_SMALL = 1000  # elements: for many rounds, where chance decides what a lane does first


_sizes: dict[str, int] = {}


@pytest.fixture
def size(accelerator: Accelerator) -> int:
    """Elements that keep the device busy for a while, measured once."""
    if accelerator.name not in _sizes:
        _sizes[accelerator.name] = find_size(accelerator)
    return _sizes[accelerator.name]


def _rounds(size: int, count: int = 8) -> list[int]:
    """The size of each round: few with much work, many with little."""
    return [size] * count + [_SMALL] * (4 * count)


def _poll(work: Work, seconds: float = 10.0) -> bool:
    """Whether a work is done within some time, asked again and again and never waited for."""
    deadline = time.monotonic() + seconds
    while not work.done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.0001)
    return True


@requires(level=2, must="Work can be issued on each of the five lanes, inside one another too.")
def test_lanes(accelerator: Accelerator) -> None:
    with chain(accelerator, _SMALL) as links:
        source, targets = links.empty(), [links.empty() for _ in LANES]
        source.fill_(3)
        written = accelerator.streams.record()
        works = []
        with accelerator.streams.lane("compute"):
            for lane, target in zip(LANES, targets, strict=True):
                with accelerator.streams.lane(lane):
                    accelerator.streams.wait(written)
                    works.append(accelerator.memory.copy(target, source))
        for work, target in zip(works, targets, strict=True):
            work.wait()
            links.expect(target, 3)


@requires(level=2, must="A lane that does not exist raises ValueError, which names those that do.")
def test_unknown_lane(accelerator: Accelerator) -> None:
    text = r"sideways.*compute.*gather.*reduce.*up.*down"
    with pytest.raises(ValueError, match=text), accelerator.streams.lane("sideways"):
        pass


@requires(level=2, must="What a lane does after waiting for an event comes after all operations before the record.")
def test_event_orders_another_lane(accelerator: Accelerator, size: int) -> None:
    streams = accelerator.streams
    for number, elements in enumerate(_rounds(size)):
        with chain(accelerator, elements) as links:
            source, target = links.empty(), links.empty()
            produce(source, number)
            event = streams.record()
            with streams.lane("down"):
                streams.wait(event)
                work = accelerator.memory.copy(target, source)
            work.wait()
            links.expect(target, number)


@requires(level=2, must="An event of another lane orders the compute lane after the operations of that lane.")
def test_event_orders_the_compute_lane(accelerator: Accelerator, size: int) -> None:
    streams = accelerator.streams
    for number, elements in enumerate(_rounds(size)):
        with chain(accelerator, elements) as links:
            source = links.empty()
            zeroed = streams.record()
            with streams.lane("reduce"):
                streams.wait(zeroed)
                produce(source, number)
                event = streams.record()
            streams.wait(event)
            links.expect(source, number)
            source.fill_(-1.0)  # the lane must not write any more


@requires(level=2, must="An event carries the works that its lane waited for before the record.")
def test_event_carries_works(accelerator: Accelerator, size: int) -> None:
    streams = accelerator.streams
    for number, elements in enumerate(_rounds(size)):
        with chain(accelerator, elements) as links:
            source, target = links.empty(), links.empty()
            produce(source, number)
            written = streams.record()
            with streams.lane("gather"):
                streams.wait(written)
                accelerator.memory.copy(target, source).wait()
                copied = streams.record()
            streams.wait(copied)
            links.expect(target, number)
            source.fill_(-1.0)


@requires(
    level=2, must="After a work's wait() its outputs may be read and its inputs rewritten, on the lane that waited."
)
def test_wait_orders_reading_and_rewriting(accelerator: Accelerator, size: int) -> None:
    streams = accelerator.streams
    for elements in (size, _SMALL):
        with chain(accelerator, elements) as links:
            source, target = links.empty(), links.empty()
            for number in range(12):
                produce(source, number)
                written = streams.record()
                with streams.lane("up"):
                    streams.wait(written)
                    work = accelerator.memory.copy(target, source)
                work.wait()
                source.fill_(-1.0)
                links.expect(target, number)


@requires(
    level=2, must="A chain over all lanes, each waiting for the work of the one before, ends with the first values."
)
def test_chain_over_all_lanes(accelerator: Accelerator, size: int) -> None:
    streams, lanes = accelerator.streams, ("gather", "reduce", "up", "down", "gather")
    for elements in (size, _SMALL):
        with chain(accelerator, elements) as links:
            tensors = [links.empty() for _ in range(6)]
            for number in range(12):
                produce(tensors[0], number)
                before: Work = streams.record()
                for lane, (source, target) in zip(lanes, pairwise(tensors), strict=True):
                    with streams.lane(lane):
                        before.wait()
                        before = accelerator.memory.copy(target, source)
                before.wait()
                links.expect(tensors[-1], number)


@requires(level=2, must="Works may be waited for in any order, by other lanes than their own, and more than once.")
def test_waiting_in_any_order(accelerator: Accelerator, size: int) -> None:
    streams = accelerator.streams
    order = torch.Generator().manual_seed(0)
    for elements in (size // 4, *[_SMALL] * 6):
        with chain(accelerator, elements) as links:
            pairs = [(links.empty(), links.empty()) for _ in range(8)]
            works: list[Work] = []
            for number, (source, target) in enumerate(pairs):
                produce(source, number)
                written = streams.record()
                with streams.lane(LANES[number % len(LANES)]):
                    streams.wait(written)
                    works.append(accelerator.memory.copy(target, source))
            for index in torch.randperm(len(works), generator=order, device="cpu").tolist():
                with streams.lane("reduce"):
                    works[index].wait()
                    joined = streams.record()
                if index % 2:
                    streams.wait(joined)
                else:
                    works[index].wait()
                    works[index].wait()
                links.expect(pairs[index][1], index)
                pairs[index][0].fill_(-1.0)


@requires(level=2, must="done() becomes True without anybody waiting, and stays True when the work was waited for.")
def test_done(accelerator: Accelerator, size: int) -> None:
    streams = accelerator.streams
    with chain(accelerator, size) as links:
        source, target = links.empty(), links.empty()
        produce(source, 5)
        written = streams.record()
        with streams.lane("down"):
            streams.wait(written)
            work = accelerator.memory.copy(target, source)
        if accelerator.capabilities.lazy:
            streams.boundary()  # nothing begins before it
        assert _poll(written)
        assert _poll(work)
        work.wait()
        assert work.done()
        links.expect(target, 5)


@requires(level=2, must="When synchronize() returns, every lane is idle: all works and events are done.")
def test_synchronize(accelerator: Accelerator, size: int) -> None:
    streams = accelerator.streams
    for elements in (size, *[_SMALL] * 10):
        with chain(accelerator, elements) as links:
            source, targets = links.empty(), [links.empty() for _ in LANES]
            produce(source, 1)
            waited: list[Work] = [streams.record()]
            for lane, target in zip(LANES, targets, strict=True):
                with streams.lane(lane):
                    streams.wait(waited[0])
                    waited.append(accelerator.memory.copy(target, source))
            streams.synchronize()
            assert all(work.done() for work in waited)
            for work, target in zip(waited[1:], targets, strict=True):
                work.wait()
                links.expect(target, 1)


@requires(level=2, must="Values and works under way survive a boundary(), and lanes go on after it.")
def test_boundary(accelerator: Accelerator, size: int) -> None:
    streams = accelerator.streams
    for elements in (size, *[_SMALL] * 10):
        with chain(accelerator, elements) as links:
            kept, source, target = links.empty(), links.empty(), links.empty()
            for number in range(3):
                kept.fill_(float(number + 50))
                produce(source, number)
                written = streams.record()
                with streams.lane("gather"):
                    streams.wait(written)
                    work = accelerator.memory.copy(target, source)
                streams.boundary()
                work.wait()
                links.expect(target, number)
                links.expect(kept, number + 50)


@requires(
    level=2,
    must="Where asynchronous_lanes is declared, a short work on one lane is over while a long one on another is not.",
    needs="asynchronous_lanes",
)
def test_overlap(accelerator: Accelerator, size: int) -> None:
    assert any(_overlaps(accelerator, size, length) for length in (32, 128, 512, 512, 512))


def _overlaps(accelerator: Accelerator, size: int, length: int) -> bool:
    """Whether a copy on lane up is done before a row of `length` copies on lane down, issued earlier."""
    streams = accelerator.streams
    with chain(accelerator, size) as links:
        source, target, short = links.empty(), links.empty(), links.empty()
        source.fill_(1.0)
        written = streams.record()
        with streams.lane("down"):
            streams.wait(written)
            row = accelerator.memory.copy(target, source)
            for number in range(length):
                pair = (target, source) if number % 2 else (source, target)
                row = accelerator.memory.copy(*pair, after=row)
        with streams.lane("up"):
            streams.wait(written)
            quick = accelerator.memory.copy(short[:8], short[8:16])
        overlapped = _poll(quick) and not row.done()
        row.wait()
        quick.wait()
        links.expect(target, 1)
    return overlapped


@requires(
    level=2,
    must="Where asynchronous_lanes is not declared, requiring it raises Unsupported with the caller's advice.",
    without="asynchronous_lanes",
)
def test_undeclared_asynchronous_lanes(accelerator: Accelerator) -> None:
    with pytest.raises(Unsupported, match=r"asynchronous_lanes.*one after the other"):
        accelerator.capabilities.require("asynchronous_lanes", "do one after the other")
