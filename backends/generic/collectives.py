"""Collectives on torch.distributed: arguments checked, bytes counted, a process group for each group.

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
from windlass.accelerator.interface import Collectives, Group, ReduceOp, Work
from windlass.backends.cpu.arguments import check_op
from windlass.backends.cpu.gloo import GlooTransport
from windlass.backends.cpu.peers import Peer, describe_self, read_peer
from windlass.backends.cpu.process_group import join
from windlass.backends.cpu.transport import Call, check_dtype
from windlass.backends.generic.overlaps import check_overlap, overlap
from windlass.backends.generic.process_groups import Agreement, ProcessGroupTransport
from windlass.backends.generic.streams import DeviceLanes, OneLane


class ProcessGroupCollectives(Collectives):
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
        self._name = name
        self._device = device
        self._streams = streams
        self._counters = counters
        self._timeout_seconds = environment.timeout_seconds
        self._agreement: Agreement = agreement
        self._ordered = ordered
        self._transports: dict[tuple[str, tuple[int, ...]], ProcessGroupTransport] = {}
        self._groups: dict[tuple[str, tuple[int, ...]], Group] = {}
        self._made: list[dist.ProcessGroup] = []
        self._closed = False
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

    def all_gather(self, output: Tensor, input: Tensor, group: Group, *, tag: str = "") -> Work:
        transport = self._transport(group)
        output, input = self._check("all_gather", tag, output, input)
        if output.numel() != group.size * input.numel() or output.dtype != input.dtype:
            raise ValueError(
                f"all_gather {tag!r} needs an output of {group.size} x {input.numel()} elements of {input.dtype}, got "
                f"{output.numel()} of {output.dtype}"
            )
        check_overlap("all_gather", tag, output, input, group)
        self._counters.count_collective("all_gather", tag, (group.size - 1) * input.nbytes)
        return transport.all_gather(output, input, Call("all_gather", tag, input.nbytes, input.dtype))

    def reduce_scatter(
        self, output: Tensor, input: Tensor, group: Group, *, op: ReduceOp = "sum", tag: str = ""
    ) -> Work:
        transport = self._transport(group)
        output, input = self._check("reduce_scatter", tag, output, input)
        check_op("reduce_scatter", tag, op)
        if input.numel() != group.size * output.numel():
            raise ValueError(
                f"reduce_scatter {tag!r} needs an input of {group.size} x {output.numel()} elements, got "
                f"{input.numel()}"
            )
        if torch.promote_types(input.dtype, output.dtype) != output.dtype:
            raise ValueError(
                f"reduce_scatter {tag!r} reduces in the dtype of its output, which must hold {input.dtype}, got "
                f"{output.dtype}"
            )
        check_overlap("reduce_scatter", tag, input, output, group)
        received = (group.size - 1) * output.numel() * input.element_size()
        self._counters.count_collective("reduce_scatter", tag, received)
        call = Call("reduce_scatter", tag, input.nbytes, input.dtype, output.dtype, op)
        return transport.reduce_scatter(output, input, op, call)

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int],
        input_splits: Sequence[int],
        group: Group,
        *,
        tag: str = "",
    ) -> Work:
        transport = self._transport(group)
        output, input = self._check("all_to_all", tag, output, input)
        for what, splits, tensor in (("output", output_splits, output), ("input", input_splits, input)):
            if len(splits) != group.size or min(splits) < 0 or sum(splits) != tensor.numel():
                raise ValueError(
                    f"all_to_all {tag!r} needs {group.size} {what} splits that add up to {tensor.numel()}, got "
                    f"{list(splits)}"
                )
        if output.dtype != input.dtype or output_splits[group.rank] != input_splits[group.rank]:
            raise ValueError(
                f"all_to_all {tag!r} needs equal dtypes and the same split to this rank itself, got {input.dtype} and "
                f"{input_splits[group.rank]} in, {output.dtype} and {output_splits[group.rank]} out"
            )
        if output.numel() and input.numel() and overlap(output, input) and group.size > 1:
            raise ValueError(f"the output of all_to_all {tag!r} must not overlap its input")
        received = (output.numel() - output_splits[group.rank]) * output.element_size()
        self._counters.count_collective("all_to_all", tag, received)
        call = Call("all_to_all", tag, -1, input.dtype)  # the bytes of each rank may differ
        return transport.all_to_all(output, input, output_splits, input_splits, call)

    def all_reduce(self, tensor: Tensor, group: Group, *, op: ReduceOp = "sum", tag: str = "") -> Work:
        transport = self._transport(group)
        (tensor,) = self._check("all_reduce", tag, tensor)
        check_op("all_reduce", tag, op)
        self._counters.count_collective("all_reduce", tag, (group.size - 1) * tensor.nbytes)
        return transport.all_reduce(tensor, op, Call("all_reduce", tag, tensor.nbytes, tensor.dtype, op=op))

    def broadcast(self, tensor: Tensor, source: int, group: Group, *, tag: str = "") -> Work:
        transport = self._transport(group)
        (tensor,) = self._check("broadcast", tag, tensor)
        if not 0 <= source < group.size:
            raise ValueError(f"broadcast {tag!r} needs a source from 0 to {group.size - 1}, got {source}")
        self._counters.count_collective("broadcast", tag, 0 if source == group.rank else tensor.nbytes)
        return transport.broadcast(tensor, source, Call("broadcast", tag, tensor.nbytes, tensor.dtype, source=source))

    def barrier(self, group: Group) -> None:
        self._transport(group).barrier(Call("barrier", "", 0, torch.uint8))

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
        """The tensors as plain memory; ValueError unless they are flat and lie on the device."""
        for tensor in tensors:
            if tensor.device.type != self._device.type:
                raise ValueError(
                    f"{kind} {tag!r} on {self._name} needs tensors in its memory, got one on {tensor.device}"
                )
            if tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(
                    f"{kind} {tag!r} needs contiguous one-dimensional tensors, got shape {tuple(tensor.shape)} with "
                    f"strides {tensor.stride()}"
                )
            check_dtype(tensor.dtype)
        return [tensor.detach() for tensor in tensors]

    def _transport(self, group: Group) -> ProcessGroupTransport:
        transport = self._transports.get((group.name, group.ranks))
        if transport is not None:
            return transport
        if self._closed:
            raise ValueError(f"the collectives are closed, so group {group.name!r} cannot be used any more")
        if group.rank < 0:
            raise ValueError(f"rank {self._world.rank} is not in group {group.name!r} of ranks {list(group.ranks)}")
        raise ValueError(f"group {group.name!r} of ranks {list(group.ranks)} was not made by this accelerator")


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
