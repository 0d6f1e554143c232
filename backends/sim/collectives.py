"""The collectives of the simulated accelerator: each runs late, on the thread of the lane that issued it.

The bytes travel over the CPU's gloo transport. A thread meets its peers on a group of its own, so that no two threads
share one; a lane's collectives keep their order, those of different lanes overtake each other. The ranks must issue
all calls of a group in the same order nonetheless, and each on the same lane: a call carries its number in the group,
so that ranks which disagree get a `CollectiveMismatch` even where no call of one lane differs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.environment import Environment
from windlass.accelerator.errors import Unsupported, WindlassError
from windlass.accelerator.interface import LANES, Group, ReduceOp, Work
from windlass.backends.cpu.checked import CheckedCollectives
from windlass.backends.cpu.collectives import CpuCollectives
from windlass.backends.cpu.transport import Call, Transport, describe
from windlass.backends.sim.agreement import Agreement
from windlass.backends.sim.conductor import Conductor, SimWork
from windlass.backends.sim.errors import name_calls
from windlass.backends.sim.faults import Faults, spoil
from windlass.backends.sim.watcher import unwatched


@dataclass(frozen=True)
class Meeting:
    """How one call meets its peers on the wire."""

    group: Group
    tag: str
    spoiled: bool  # the input begins with inf, as a fault wants it


class LaneTransport(Transport):
    """One group: hands every call to the lane that is current when it is issued."""

    name = "lanes"

    def __init__(self, group: Group, wire: CpuCollectives, conductor: Conductor, faults: Faults) -> None:
        super().__init__(group)
        self._wire = wire
        self.lanes: Mapping[str, Group] = {lane: wire.group(group.ranks, f"{group.name}@{lane}") for lane in LANES}
        self._conductor = conductor
        self._faults = faults
        self._issued = 0

    def all_gather(self, output: Tensor, input: Tensor, call: Call) -> Work:
        def meet(at: Meeting) -> None:
            self._wire.all_gather(output, input, at.group, tag=at.tag).wait()

        return self._issue(call, meet, [input], [output], output.nbytes - input.nbytes)

    def reduce_scatter(self, output: Tensor, input: Tensor, op: ReduceOp, call: Call) -> Work:
        def meet(at: Meeting) -> None:
            source = spoil(input) if at.spoiled else input
            self._wire.reduce_scatter(output, source, at.group, op=op, tag=at.tag).wait()

        received = input.nbytes - output.numel() * input.element_size()
        return self._issue(call, meet, [input], [output], received)

    def all_to_all(
        self, output: Tensor, input: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], call: Call
    ) -> Work:
        def meet(at: Meeting) -> None:
            self._wire.all_to_all(output, input, output_splits, input_splits, at.group, tag=at.tag).wait()

        received = output.nbytes - output_splits[self.group.rank] * output.element_size()
        splits = {"output_splits": list(output_splits), "input_splits": list(input_splits)}
        return self._issue(call, meet, [input], [output], received, splits)

    def all_reduce(self, tensor: Tensor, op: ReduceOp, call: Call) -> Work:
        def meet(at: Meeting) -> None:
            self._wire.all_reduce(tensor, at.group, op=op, tag=at.tag).wait()

        return self._issue(call, meet, [tensor], [tensor], (self.group.size - 1) * tensor.nbytes)

    def broadcast(self, tensor: Tensor, source: int, call: Call) -> Work:
        def meet(at: Meeting) -> None:
            self._wire.broadcast(tensor, source, at.group, tag=at.tag).wait()

        sends = source == self.group.rank
        return self._issue(call, meet, [tensor] if sends else [], [tensor], 0 if sends else tensor.nbytes)

    def barrier(self, call: Call) -> None:
        self._issue(call, lambda at: self._wire.barrier(at.group), [], [], 0).finish()

    def _issue(
        self,
        call: Call,
        meet: Callable[[Meeting], None],
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        received: int,  # bytes that come from other ranks
        constants: Mapping[str, Any] | None = None,  # what a program knows of the call besides
    ) -> SimWork:
        if torch.float64 in (call.dtype, call.output_dtype):
            raise Unsupported(f"{call} cannot carry float64, which the simulated device lacks; use float32")
        lane = self._conductor.current_lane
        fault = self._faults.draw(call)
        spoiled = fault is not None and fault.kind == "inf"
        meeting = Meeting(self.lanes[lane], f"{call.tag}#{self._issued}", spoiled)
        self._issued += 1

        def act() -> None:
            if fault is not None:
                self._faults.strike(fault, call)
            try:
                meet(meeting)
            except WindlassError as error:
                raise type(error)(name_calls(str(error))) from error

        work = self._conductor.issue(
            lane,
            act,
            reads=reads,
            writes=writes,
            what=str(call),
            seconds=self._price(received, reads, writes) + (fault.seconds if fault and fault.kind == "slow" else 0.0),
            in_order=True,
        )
        if self._conductor.program is not None:
            # Not which ranks are in the group: one program has the same collective in all groups that lie side by side.
            inputs = [one for one in reads if not any(one is other for other in writes)]
            given = {"outputs": list(writes), "inputs": inputs, **(constants or {})}
            what = f"{describe(call.words, call.tag)} in group {self.group.name!r} of {self.group.size}"
            self._conductor.program.command(what, given, adopted=(*reads, *writes), meets=True)
        return work

    def _price(self, received: int, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> float:
        """Simulated seconds: over the network, or within the device for a rank alone."""
        clock = self._conductor.clock
        if self.group.size > 1:
            return clock.network_seconds(received)
        return clock.operation_seconds(sum(tensor.nbytes for tensor in (*reads, *writes)))


class SimCollectives(CheckedCollectives):
    """Opening it meets all ranks of the job, so all must open it."""

    def __init__(self, counters: Counters, environment: Environment, conductor: Conductor, faults: Faults) -> None:
        super().__init__(counters)
        self._conductor = conductor
        self._faults = faults
        self._wire = CpuCollectives(Counters(), environment, transport="gloo")  # its counters count each call again
        try:
            self._open_lanes(self._wire.world)
        except BaseException:
            self._wire.close()
            raise

    @property
    def world(self) -> Group:
        return self._wire.world

    def group(self, ranks: Sequence[int], name: str) -> Group:
        """As promised by the interface; on ranks outside, `rank` is -1 and every call on the group a ValueError."""
        with unwatched():
            group = self._wire.group(ranks, name)
            if group.rank >= 0 and (group.name, group.ranks) in self._transports:
                return group
            self._open_lanes(group)  # a second time, on ranks outside, it meets nobody
        return group

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._transports.clear()
        self._wire.close()

    def _open_lanes(self, group: Group) -> None:
        transport = LaneTransport(group, self._wire, self._conductor, self._faults)
        program = self._conductor.program
        if program is not None and group == self.world and group.size > 1:
            agreement = Agreement(self._wire, transport.lanes, self._conductor, program)
            self._conductor.at_boundary.append(agreement.require)
        if group.rank >= 0:
            self._transports[group.name, group.ranks] = transport
