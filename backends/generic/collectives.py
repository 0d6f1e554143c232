"""Collectives on torch.distributed: a process group for each group, behind the checks that all facets share.

The process group's backend is the one that torch.distributed names for the device (nccl, xccl, gloo, ...) unless
another is given. A world of one needs none.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.environment import Environment
from windlass.accelerator.errors import BackendUnusable, CollectiveMismatch
from windlass.accelerator.interface import Group
from windlass.backends.cpu.arguments import check_tensors
from windlass.backends.cpu.checked import CheckedCollectives
from windlass.backends.cpu.gloo import GlooTransport
from windlass.backends.cpu.peers import Peer, describe_self, read_peer
from windlass.backends.cpu.process_group import join
from windlass.backends.generic.process_groups import Agreement, ProcessGroupTransport
from windlass.backends.generic.streams import DeviceLanes, OneLane


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

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._transports.clear()
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
            timeout = timedelta(seconds=self._timeout_seconds)
            try:
                process_group = dist.new_group(list(group.ranks), timeout=timeout, backend=self._backend)
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
        self._transports[group.name, group.ranks] = ProcessGroupTransport(
            group,
            process_group,
            gloo,
            self._streams,
            agreement=self._agreement,
            ordered=self._ordered,
            timeout_seconds=self._timeout_seconds,
            near=near,
        )

    def _check(self, kind: str, tag: str, *tensors: Tensor) -> list[Tensor]:
        return check_tensors(kind, tag, *tensors, device_type=self._device.type, name=self._name)


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
