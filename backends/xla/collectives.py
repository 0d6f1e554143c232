"""The collectives of an XLA device: inside the program where devices meet by themselves, else through the host.

The ranks' processes meet on the host in either case, as those of the CPU do: to agree on groups, to compare programs,
and, on XLA's CPU, to move the bytes. A rank alone needs neither; its collectives are assignments in the program.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.environment import Environment
from windlass.accelerator.interface import Group
from windlass.backends.cpu.arguments import check_tensors
from windlass.backends.cpu.checked import CheckedCollectives
from windlass.backends.cpu.collectives import CpuCollectives
from windlass.backends.cpu.transport import Transport
from windlass.backends.xla.host_transport import AloneOnDevice, HostTransport, UnderWay
from windlass.backends.xla.in_graph import InGraphTransport, Partitions, exchange_ordinals
from windlass.backends.xla.memory import identify
from windlass.backends.xla.programs import DEVICE_TYPE, is_slice

_PURE_INPUTS: Final = ("all_gather", "reduce_scatter", "all_to_all")  # they have an output apart from the input


class HostMeeting(CpuCollectives):
    """The ranks' processes in host memory, below what an XLA device counts and checks."""

    def transport(self, group: Group) -> Transport:
        """What carries host memory between the ranks of a group."""
        return self._transport(group)


class XlaCollectives(CheckedCollectives):
    """Collectives of one rank. Opening them meets all ranks of the job, so all must open them."""

    def __init__(self, name: str, counters: Counters, environment: Environment, *, in_graph: bool) -> None:
        """`in_graph` says that devices meet inside the program. It needs the device to be open."""
        super().__init__(counters)
        self._name = name
        self._compares = environment.debug
        self._host = HostMeeting(Counters(), environment)  # the device's bytes are counted once, here
        self._under_way = UnderWay()
        self._partitions: Partitions | None = None
        try:
            if in_graph and self.world.size > 1:
                self._partitions = Partitions(exchange_ordinals(self._host.transport(self.world)))
            self._open(self.world)
        except BaseException:
            self.close()
            raise

    @property
    def world(self) -> Group:
        return self._host.world

    @property
    def transport_name(self) -> str:
        """How the world meets: "alone", "in graph", "through the host (shared pages)"."""
        name = self._transport(self.world).name
        return f"{name} ({self._host.transport_name})" if name == HostTransport.name else name

    def host_transport(self) -> Transport:
        """What carries host memory between all ranks."""
        return self._host.transport(self.world)

    def group(self, ranks: Sequence[int], name: str) -> Group:
        group = self._host.group(ranks, name)
        if (group.name, group.ranks) not in self._transports:
            self._open(group)
        return group

    def finish(self) -> None:
        """Return when every collective that this rank has entered is over, as if each had been waited for."""
        self._under_way.finish()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._transports.clear()
        self._under_way.forget()
        self._host.close()

    def _open(self, group: Group) -> None:
        """The transport of a new group, where this rank is in it. Partitions are told of every group."""
        partition = self._partitions.join(group.ranks) if self._partitions is not None and group.size > 1 else None
        if group.rank < 0:
            return
        transport: Transport
        if group.size == 1:
            transport = AloneOnDevice(group)
        elif partition is not None:
            transport = InGraphTransport(group, partition, self._host.transport(group))
        else:
            host = self._host.transport(group)
            transport = HostTransport(group, host, self._under_way, compares=self._compares)
        self._transports[group.name, group.ranks] = transport

    def _check(self, kind: str, tag: str, *tensors: Tensor) -> list[Tensor]:
        """As the CPU's, but what is read has the value that it has now, and so overlaps nothing: slices of this device
        do not tell where they lie, and writing one of them changes no value that was read before."""
        checked = check_tensors(kind, tag, *tensors, device_type=DEVICE_TYPE, name=self._name)
        if kind not in _PURE_INPUTS or self.world.size == 1:
            return checked
        output, given = checked
        return [output, given.clone() if is_slice(given) or identify(output) == identify(given) else given]
