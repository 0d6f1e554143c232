"""Collectives on torch.distributed: a process group for each group, behind the checks that all facets share.

The process group's backend is the one that torch.distributed names for the device (nccl, xccl, gloo, ...) unless
another is given. A world of one needs none. Where the device is not the host, tensors of the host go through gloo.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.environment import Environment
from windlass.accelerator.errors import BackendUnusable, CollectiveMismatch, WindlassError
from windlass.accelerator.interface import Group
from windlass.backends.cpu.checked import CheckedCollectives
from windlass.backends.cpu.gloo import GlooTransport
from windlass.backends.cpu.peers import Peer, describe_self, read_peer
from windlass.backends.cpu.process_group import join
from windlass.backends.cpu.transport import AloneTransport, Transport
from windlass.backends.generic.process_groups import Agreement, ProcessGroupTransport
from windlass.backends.generic.split_transport import SplitTransport, check_split
from windlass.backends.generic.streams import DeviceLanes, OneLane

MakeOptions = Callable[[timedelta], Any]
"""From a process group's timeout to the options of its library; the timeout must be set in them too."""

_LIBRARY_PATIENCE: Final = 2.0
"""On streams a library counts its timeout from when a call was issued. Ours, which names the call, comes first."""


class ProcessGroupCollectives(CheckedCollectives):
    """Collectives of one rank. Opening them meets all ranks of the job, so all must open them."""

    def __init__(
        self,
        name: str,  # "cuda:0", for messages
        device: torch.device,
        streams: DeviceLanes | OneLane,
        counters: Counters,
        environment: Environment,
        *,
        backend: str | None = None,
        make_options: MakeOptions | None = None,
        agreement: Agreement = "always",
        ordered: bool = False,
    ) -> None:
        super().__init__(counters)
        self._name = name
        self._device = device
        self._streams = streams
        self._timeout_seconds = environment.timeout_seconds
        self._agreement: Agreement = agreement
        self._ordered = ordered
        self._make_options = make_options
        self._device_transports: list[ProcessGroupTransport] = []
        self._failure: WindlassError | None = None
        self._groups: dict[tuple[str, tuple[int, ...]], Group] = {}
        self._made: list[dist.ProcessGroup] = []
        self._backend = find_process_group_backend(name, device.type, backend) if environment.num_ranks > 1 else ""
        self._membership = join(environment)
        self._world = Group("world", tuple(range(self._membership.num_ranks)), self._membership.rank)
        self._peers: tuple[Peer, ...] = (describe_self(self._world.rank),)
        try:
            if not self._backend and self._world.size > 1:  # the user's process group, without a launcher
                self._backend = find_process_group_backend(name, device.type, backend)
            self._open_world()
        except BaseException:
            self.close()
            raise
        if self._world.size > 1 and isinstance(streams, DeviceLanes):
            streams.host_wait.look_after(self.look)

    @property
    def world(self) -> Group:
        return self._world

    @property
    def transport_name(self) -> str:
        """What the world meets through: "alone", "nccl", "gloo", ..."""
        return self._transport(self._world).name

    def group(self, ranks: Sequence[int], name: str) -> Group:
        """As promised by the interface; on ranks outside, `rank` is -1 and every call on the group a ValueError."""
        members = tuple(ranks)
        if not members or len(set(members)) < len(members) or not set(members) <= set(self._world.ranks):
            raise ValueError(
                f"group {name!r} must have different ranks from 0 to {self._world.size - 1}, got {list(members)}"
            )
        if (name, members) in self._groups:
            return self._groups[name, members]
        asked = self._transport(self._world).exchange(json.dumps([name, members]))
        for rank, other in enumerate(asked):
            if other != asked[0]:
                raise CollectiveMismatch(f"rank 0 asks for the group {asked[0]}, rank {rank} for {other}")
        group = Group(name, members, members.index(self._world.rank) if self._world.rank in members else -1)
        self._groups[name, members] = group
        host = self._membership.new_group(members, self._timeout_seconds) if len(members) > 1 else None
        if host is not None:
            self._made.append(host)
        self._open(group, host)
        return group

    def exchange(self, text: str) -> list[str]:
        """A short text of every rank of the world, by rank; all call it."""
        return self._transport(self._world).exchange(text)

    def look(self) -> None:
        """While the host waits for the device: raise if a collective waits for a peer that is lost or does not come.

        All collectives under way are then ended where the library can, and none can be made any more.
        """
        for transport in self._device_transports:
            try:
                transport.look()
            except WindlassError as error:
                self._failure = error
                for other in self._device_transports:
                    other.abort()
                self._device_transports.clear()
                raise

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        # Whatever reaches a process group must go, or its threads live on and take the interpreter down at its end.
        self._streams.pending.forget()
        self._transports.clear()
        self._device_transports.clear()
        if not self._membership.created_world and dist.is_initialized():
            for process_group in self._made:  # leaving a world that we made takes these along
                dist.destroy_process_group(process_group)
        self._made.clear()
        self._membership.leave()

    # ---- groups

    def _open_world(self) -> None:
        host = self._membership.process_group
        if host is not None:
            gloo = GlooTransport(self._world, host, self._timeout_seconds)
            self._peers = tuple(read_peer(text) for text in gloo.exchange(self._peers[0].to_text()))
        self._groups[self._world.name, self._world.ranks] = self._world
        self._open(self._world, host)

    def _open(self, group: Group, host: dist.ProcessGroup | None) -> None:
        """Make the device's process group, which all ranks of the world do, and on members the transport."""
        process_group: dist.ProcessGroup | None = None
        if group.size > 1:
            patience = _LIBRARY_PATIENCE if isinstance(self._streams, DeviceLanes) else 1.0
            timeout = timedelta(seconds=patience * self._timeout_seconds)
            try:
                options = None if self._make_options is None else self._make_options(timeout)
                process_group = dist.new_group(
                    list(group.ranks), timeout=timeout, backend=self._backend, pg_options=options
                )
            except (RuntimeError, ValueError) as error:
                raise BackendUnusable(
                    f"{self._name} cannot open a process group of {self._backend}: {str(error).splitlines()[0]}; give "
                    "another backend of torch.distributed that takes tensors of this device"
                ) from error
        if group.rank < 0:
            return
        if process_group is not None:
            self._made.append(process_group)
        here = self._peers[self._world.rank]
        others = [self._peers[rank] for rank in group.ranks if rank != here.rank]
        near = [peer for peer in others if peer.host == here.host]
        gloo = None if host is None else GlooTransport(group, host, self._timeout_seconds, near)
        transport = ProcessGroupTransport(
            group,
            process_group,
            gloo,
            self._streams,
            agreement=self._agreement,
            ordered=self._ordered,
            timeout_seconds=self._timeout_seconds,
            near=near,
        )
        self._device_transports.append(transport)
        self._transports[group.name, group.ranks] = self._add_host(transport, gloo)

    def _add_host(self, transport: ProcessGroupTransport, gloo: GlooTransport | None) -> Transport:
        """The transport of a group whose tensors may lie on the host too, unless that is where all of them lie."""
        if self._device.type == "cpu":
            return transport
        return SplitTransport(transport, gloo or AloneTransport(transport.group), self._streams)

    def _transport(self, group: Group) -> Transport:
        if self._failure is not None and not self._closed:
            raise type(self._failure)(
                f"{self._name} makes no more collectives since one failed ({self._failure}); start the job again"
            ) from self._failure
        return super()._transport(group)

    def _check(self, kind: str, tag: str, *tensors: Tensor) -> list[Tensor]:
        return check_split(kind, tag, *tensors, device_type=self._device.type, name=self._name)


def find_process_group_backend(name: str, device_type: str, given: str | None) -> str:
    """What torch.distributed uses for a type of device, or what was given; `BackendUnusable` if there is neither."""
    backend = given or dist.Backend.default_device_backend_map.get(device_type)
    if backend is None:
        known = ", ".join(sorted(dist.Backend.default_device_backend_map))
        raise BackendUnusable(
            f"{name} cannot meet other ranks: torch.distributed knows no backend for devices of type {device_type!r}, "
            f"only for {known}; register one with torch.distributed.Backend.register_backend, or name one"
        )
    return backend
