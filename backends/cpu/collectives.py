"""The collectives of the CPU: the transport of each group chosen.

Ranks that share a host meet on shared pages; ranks on several hosts meet through gloo; a rank alone copies.
Results and counts are the same, to the bit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.environment import Environment
from windlass.accelerator.errors import CollectiveMismatch
from windlass.accelerator.interface import Group, Work
from windlass.backends.cpu.arguments import check_overlap, check_tensors
from windlass.backends.cpu.board import Board
from windlass.backends.cpu.checked import CheckedCollectives
from windlass.backends.cpu.control_page import control_bytes
from windlass.backends.cpu.gloo import GlooTransport
from windlass.backends.cpu.peers import Peer, describe_self, read_peer
from windlass.backends.cpu.process_group import Membership, join
from windlass.backends.cpu.regions import Region
from windlass.backends.cpu.shared_pages import Door, Pages, create_pages, open_pages
from windlass.backends.cpu.shared_transport import SharedTransport
from windlass.backends.cpu.transport import AloneTransport, Transport

TransportChoice = Literal["auto", "memory file", "unlinked file", "gloo"]


class CpuCollectives(CheckedCollectives):
    """Collectives among processes. Opening it meets all ranks of the job, so all must open it.

    `transport` forces one for comparisons: "gloo", or shared pages reached in one of two ways.
    """

    def __init__(self, counters: Counters, environment: Environment, transport: TransportChoice = "auto") -> None:
        super().__init__(counters)
        self._timeout_seconds = environment.timeout_seconds
        self._membership: Membership = join(environment)
        self._doors = [door for door in Door if transport in ("auto", door.value)]
        self._board = Board(environment.timeout_seconds)
        self._groups: dict[tuple[str, tuple[int, ...]], Group] = {}
        world = Group("world", tuple(range(self._membership.num_ranks)), self._membership.rank)
        self._world = world
        self._peers: tuple[Peer, ...] = (describe_self(world.rank),)
        self._groups[world.name, world.ranks] = world
        try:
            self._transports[world.name, world.ranks] = self._open_world(world)
        except BaseException:
            self.close()
            raise

    @property
    def world(self) -> Group:
        return self._world

    @property
    def transport_name(self) -> str:
        """How the world meets: "shared pages", "gloo" or "alone"."""
        return self._transport(self._world).name

    @property
    def host_ranks(self) -> int:
        """Ranks that run on this host."""
        return sum(peer.host == self._peers[self._world.rank].host for peer in self._peers)

    def group(self, ranks: Sequence[int], name: str) -> Group:
        """As promised by the interface; on ranks outside, `rank` is -1 and every call on the group a ValueError."""
        members = tuple(ranks)
        if not members or len(set(members)) < len(members) or not set(members) <= set(self._world.ranks):
            raise ValueError(
                f"group {name!r} must have different ranks from 0 to {self._world.size - 1}, got {list(members)}"
            )
        if (name, members) in self._groups:
            return self._groups[name, members]
        world = self._transport(self._world)
        asked = world.exchange(json.dumps([name, members]))
        for rank, other in enumerate(asked):
            if other != asked[0]:
                raise CollectiveMismatch(f"rank 0 asks for the group {asked[0]}, rank {rank} for {other}")
        index = members.index(self._world.rank) if self._world.rank in members else -1
        group = Group(name, members, index)
        transport: Transport | None = AloneTransport(group)
        if len(members) > 1:
            agreed, transport = self._open_pages(group, world)
            if not agreed:
                process_group = self._membership.new_group(members, self._timeout_seconds)
                transport = None if process_group is None else self._open_gloo(group, process_group)
        self._groups[name, members] = group
        if transport is not None and index >= 0:
            self._transports[name, members] = transport
        return group

    # ---- shards that were published

    def fetch(self, output: Tensor, shard: Tensor, group: Group, *, tag: str = "") -> Work:
        """Shards in shared allocations are read at once; see `SharedTransport.fetch` for where they must lie."""
        transport = self._transport(group)
        if isinstance(transport, SharedTransport) and output.numel() == group.size * shard.numel():
            output, shard = check_tensors("all_gather", tag, output, shard)
            check_overlap("all_gather", tag, output, shard, group)
            work = transport.fetch(output, shard) if output.dtype == shard.dtype else None
            if work is not None:
                self._counters.count_collective("all_gather", tag, (group.size - 1) * shard.nbytes)
                return work
        return self.all_gather(output, shard, group, tag=tag)

    def publish(self, group: Group) -> None:
        if isinstance(self._transport(group), SharedTransport):
            self.barrier(group)

    # ---- for the memory facet

    def allocate_shared(
        self, group: Group, nbytes: int, dtype: torch.dtype, tag: str, *, refused: bool = False
    ) -> Region | None:
        """Pages that all ranks of the group map, each giving `nbytes`; None where it does not meet on shared pages.

        A rank that cannot give them says so by `refused`; then no rank gets any, and each meets an OSError.
        """
        transport = self._transport(group)
        return transport.allocate(nbytes, dtype, tag, refused) if isinstance(transport, SharedTransport) else None

    def release_shared(self, region: Region) -> None:
        """Unmap what `allocate_shared` gave; the pages go when no tensor on them is left."""
        transport = self._transports.get((region.group.name, region.group.ranks))
        if isinstance(transport, SharedTransport):
            transport.release(region)

    def finish(self) -> None:
        """Return when every collective that this rank has entered is over, as if each had been waited for."""
        for transport in self._transports.values():
            transport.finish()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for transport in self._transports.values():
            transport.close()
        self._board.regions.clear()
        self._transports.clear()
        self._membership.leave()

    # ---- groups

    def _open_world(self, world: Group) -> Transport:
        if world.size == 1:
            return AloneTransport(world)
        assert self._membership.process_group is not None
        gloo = GlooTransport(world, self._membership.process_group, self._timeout_seconds)
        self._peers = tuple(read_peer(text) for text in gloo.exchange(self._peers[0].to_text()))
        return self._open_pages(world, gloo)[1] or self._open_gloo(world, self._membership.process_group)

    def _open_gloo(self, group: Group, process_group: dist.ProcessGroup) -> GlooTransport:
        here = self._peers[self._world.rank]
        others = [self._peers[rank] for rank in group.ranks if rank != here.rank]
        near = [peer for peer in others if peer.host == here.host]
        return GlooTransport(group, process_group, self._timeout_seconds, near, self._board.finish_entered)

    def _on_one_host(self, ranks: Sequence[int]) -> bool:
        return len({self._peers[rank].host for rank in ranks}) == 1

    def _open_pages(self, group: Group, world: Transport) -> tuple[bool, SharedTransport | None]:
        """Whether all ranks of the group can meet on shared pages, as all of the world agree, and their transport."""
        for door in self._doors if self._on_one_host(group.ranks) else []:
            pages = self._map_control_pages(group, world, door)
            if pages is not None:
                peers = [self._peers[rank] for rank in group.ranks]
                return True, SharedTransport(group, peers, pages, door, self._board) if pages else None
        return False, None

    def _map_control_pages(self, group: Group, world: Transport, door: Door) -> list[Pages] | None:
        """The control pages of all ranks of the group, [] outside it; None, on all ranks, if one rank fails."""
        nbytes = control_bytes(group.size)
        own: Pages | None = None
        mapped: list[Pages] = []
        if group.rank >= 0:
            try:
                own = create_pages(nbytes, door, commit=False)
            except OSError:
                own = None  # told to all by an empty path
        try:
            paths = world.exchange(own.path if own is not None else "")
            if own is not None:
                host = self._peers[self._world.rank].host
                try:
                    for rank in group.ranks:
                        if rank == self._world.rank:
                            mapped.append(own)
                        elif self._peers[rank].is_visible(host):
                            mapped.append(open_pages(paths[rank], nbytes))
                except OSError:
                    mapped.clear()  # too few, which is what everybody is told next
            succeeded = group.rank < 0 or len(mapped) == group.size
            answers = world.exchange("mapped" if succeeded else "refused")
        finally:
            if own is not None:
                own.seal()
        return mapped if set(answers) == {"mapped"} else None
