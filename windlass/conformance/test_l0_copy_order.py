"""Level 0: a copy happens after the work that it is told to wait for, and says when it is over."""

from __future__ import annotations

import threading

import torch

from windlass.accelerator.interface import Accelerator, DoneWork, Place, Work
from windlass.conformance.allocations import allocated, assert_holds
from windlass.conformance.requirements import requires

COUNT = 20_000
LATE_SECONDS = 0.05


class LateWork(Work):
    """Work of somebody else: a while after it began, a thread writes a value to a tensor, and it is done."""

    def __init__(self, tensor: torch.Tensor | None = None, value: float = 0.0) -> None:
        self._done = threading.Event()
        self._tensor, self._value = tensor, value
        self._thread = threading.Timer(LATE_SECONDS, self._finish)
        self._thread.start()

    def wait(self) -> None:
        self._thread.join()

    def done(self) -> bool:
        return self._done.is_set()

    def _finish(self) -> None:
        if self._tensor is not None:
            self._tensor.fill_(self._value)
        self._done.set()


@requires(level=0, must="Copies in a chain, each after the one before, carry the values of the first to the last.")
def test_chain_of_copies(accelerator: Accelerator) -> None:
    memory, zeros = accelerator.memory, torch.zeros(COUNT)
    with (
        allocated(accelerator, zeros) as first,
        allocated(accelerator, zeros) as second,
        allocated(accelerator, zeros) as third,
        allocated(accelerator, zeros) as last,
    ):
        for number in range(1, 11):
            first.fill_(number)
            one = memory.copy(second, first)
            two = memory.copy(third, second, after=one)
            memory.copy(last, third, after=two).wait()
            assert_holds(accelerator, last, torch.full_like(zeros, number), f"the end of chain {number}")
            accelerator.streams.synchronize()


@requires(level=0, must="A copy on another lane starts after the work that it is told to wait for.")
def test_chain_over_lanes(accelerator: Accelerator) -> None:
    memory, streams, zeros = accelerator.memory, accelerator.streams, torch.zeros(COUNT)
    with (
        allocated(accelerator, zeros) as first,
        allocated(accelerator, zeros) as second,
        allocated(accelerator, zeros) as last,
    ):
        for number in range(1, 11):
            first.fill_(number)
            filled = streams.record()
            with streams.lane("down"):
                one = memory.copy(second, first, after=filled)
            with streams.lane("up"):
                two = memory.copy(last, second, after=one)
            two.wait()
            assert_holds(accelerator, last, torch.full_like(zeros, number), f"the end of chain {number}")
            streams.synchronize()


@requires(level=0, must="A copy waits for any work that it is told to wait for, not only for the backend's own.")
def test_copy_after_foreign_work(accelerator: Accelerator) -> None:
    with allocated(accelerator, torch.ones(3)) as source, allocated(accelerator, torch.zeros(3)) as destination:
        late = LateWork()
        assert not late.done()
        accelerator.memory.copy(destination, source, after=late).wait()
        accelerator.streams.synchronize()
        assert late.done(), "the copy is over and what it had to wait for is not"
        assert_holds(accelerator, destination, torch.ones(3))
        accelerator.memory.copy(destination, source, after=DoneWork()).wait()


@requires(
    level=0,
    must="A copy from the host carries what the work that it waits for has written there.",
    needs="host_place",
)
def test_copy_carries_what_it_waited_for(accelerator: Accelerator) -> None:
    old = torch.ones(COUNT)
    with (
        allocated(accelerator, old, Place.HOST) as source,
        allocated(accelerator, torch.zeros(COUNT)) as destination,
    ):
        accelerator.streams.synchronize()  # from here on the host may write its own memory
        late = LateWork(source.detach(), 2.0)
        accelerator.memory.copy(destination, source, after=late).wait()
        assert_holds(accelerator, destination, torch.full((COUNT,), 2.0))
        late.wait()


@requires(level=0, must="The work of a copy is done once it has been waited for and every lane is idle.")
def test_work_is_done(accelerator: Accelerator) -> None:
    with allocated(accelerator, torch.ones(COUNT)) as source, allocated(accelerator, torch.zeros(COUNT)) as destination:
        work = accelerator.memory.copy(destination, source)
        assert isinstance(work.done(), bool)
        work.wait()
        work.wait()  # waiting twice orders nothing new
        accelerator.streams.synchronize()
        assert work.done()
        assert work.done()
