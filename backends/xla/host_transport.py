"""Collectives through the host, for devices that cannot meet by themselves: XLA's CPU, one client in each process.

At a call everything pending is run once and the input copied out; the ranks meet in host memory as those of the CPU
do, with the same checks, errors and order of additions; and whoever waits writes the result into the output, which is
again an operation of the pending program. Every rank runs its program at every call, also where it sends nothing, so
that the ranks' programs are cut at the same places.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from windlass.accelerator.interface import DoneWork, Group, ReduceOp, Work
from windlass.backends.cpu.transport import AloneTransport, Call, Transport
from windlass.backends.xla.memory import identify
from windlass.backends.xla.programs import compare_programs, read_value, run_pending


class UnderWay:
    """The collectives of one rank that the device has yet to take the results of, in the order of their calls.

    Results are written in that order, whoever waits for which: two may go into one output.
    """

    def __init__(self) -> None:
        self._works: deque[HostWork] = deque()

    def add(self, work: HostWork) -> HostWork:
        self._works.append(work)
        return work

    def finish(self) -> None:
        """Wait for all of them."""
        while self._works:
            self._deliver_oldest()

    def deliver_until(self, work: HostWork) -> None:
        """Wait for a work and for those before it."""
        while not work.delivered:
            if not self._works:
                raise ValueError("a collective was waited for after the collectives had been closed")
            self._deliver_oldest()

    def deliver_done(self) -> None:
        """Write what has arrived, as far as everything before it has; never blocks."""
        while self._works and self._works[0].arrived:
            self._deliver_oldest()

    def forget(self) -> None:
        """Nobody will wait for them."""
        self._works.clear()

    def _deliver_oldest(self) -> None:
        self._works[0].deliver()
        self._works.popleft()


class HostWork(Work):
    """A collective on the host whose result the device has yet to take."""

    def __init__(self, work: Work, output: Tensor, received: Tensor, under_way: UnderWay) -> None:
        self._work = work
        self._output = output
        self._received: Tensor | None = received
        self._under_way = under_way

    def wait(self) -> None:
        self._under_way.deliver_until(self)

    def done(self) -> bool:
        self._under_way.deliver_done()
        return self.delivered

    def deliver(self) -> None:
        """Wait for the host, and write the result into the output."""
        self._work.wait()
        if self._received is not None:
            received, self._received = self._received, None
            self._output.copy_(received)

    @property
    def arrived(self) -> bool:
        """Whether the host is done with it."""
        return self._work.done()

    @property
    def delivered(self) -> bool:
        """Whether the output holds the result."""
        return self._received is None


class HostTransport(Transport):
    """One group of device tensors over the transport that the same ranks have on the host."""

    name = "through the host"

    def __init__(self, group: Group, host: Transport, under_way: UnderWay, *, compares: bool = False) -> None:
        """`under_way` is shared by all groups of the rank. `compares`: the ranks compare what they are about to run, at
        every call."""
        super().__init__(group)
        self._host = host
        self._under_way = under_way
        self._compares = compares

    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work:
        received = _receive(output)
        return self._start(output, received, self._host.all_gather(received, self._read(input, call), call))

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work:
        received = _receive(output)
        return self._start(output, received, self._host.reduce_scatter(received, self._read(input, call), op, call))

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work:
        received = _receive(output)
        work = self._host.all_to_all(received, self._read(input, call), output_splits, input_splits, call)
        return self._start(output, received, work)

    def all_reduce(self, tensor: Tensor, op: ReduceOp, call: Call) -> Work:
        value = self._read(tensor, call)
        return self._start(tensor, value, self._host.all_reduce(value, op, call))

    def broadcast(self, tensor: Tensor, source: int, call: Call) -> Work:
        self._compare(call)
        if source == self.group.rank:
            value = read_value(tensor)
        else:
            run_pending()
            value = _receive(tensor)
        return self._start(tensor, value, self._host.broadcast(value, source, call))

    def barrier(self, call: Call) -> None:
        self._host.barrier(call)

    def exchange(self, text: str) -> list[str]:
        return self._host.exchange(text)

    def _read(self, input: Tensor, call: Call) -> Tensor:
        """The value of the input, once everything pending has been run."""
        self._compare(call)
        return read_value(input)

    def _compare(self, call: Call) -> None:
        if self._compares:
            compare_programs(self._host, self.group, str(call))

    def _start(self, output: Tensor, received: Tensor, work: Work) -> Work:
        return self._under_way.add(HostWork(work, output, received, self._under_way))


class AloneOnDevice(AloneTransport):
    """A group of one on a lazy device: every collective is an assignment in the pending program."""

    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work:
        return _assign(output, input)

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work:
        return _assign(output, input)

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work:
        return _assign(output, input)


def _receive(output: Tensor) -> Tensor:
    """Host memory for what the output is to hold."""
    return torch.empty(output.shape, dtype=output.dtype, device="cpu")


def _assign(output: Tensor, input: Tensor) -> Work:
    """Nothing needs to be done where both are all of one allocation; otherwise an assignment is right in any case."""
    if identify(output) != identify(input) or output.nbytes < output.untyped_storage().nbytes():
        output.copy_(input)
    return DoneWork()
