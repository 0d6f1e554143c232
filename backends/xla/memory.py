"""Memory of a lazy device, with books of its own that are exact to the byte.

What the device really holds is the compiler's affair: an allocation is a tensor, its value is whatever was assigned
to it last, and its memory appears when the program that computes it is run. The books count what was asked for.
An allocation is known by its storage object, which its slices share and which survives writing in place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.errors import OutOfMemory, Unsupported
from windlass.accelerator.interface import DoneWork, Group, Measure, MemoryStats, Place, Work
from windlass.backends.cpu.accounts import Account
from windlass.backends.cpu.booked_memory import COPY_KINDS, BookedMemory, check_copy
from windlass.backends.cpu.memory import format_bytes
from windlass.backends.generic.host_memory import HostAllocator
from windlass.backends.xla.programs import DEVICE_TYPE, read_value

_INTEGERS: Final = (torch.uint8, torch.int32, torch.int64)


@dataclass
class _Allocation:
    tensor: Tensor  # keeps the storage, so that no other can be mistaken for it before it is released
    place: Place
    tag: str
    nbytes: int
    reserved: int


class XlaMemory(BookedMemory[Account]):
    """Allocations of one XLA device and of ordinary host memory beside it."""

    def __init__(
        self,
        name: str,  # "xla:0"
        device: torch.device,
        counters: Counters,
        dtypes: Sequence[torch.dtype],  # the floating ones that are declared
        capacity: int | None,  # bytes of the device, if they are known
    ) -> None:
        super().__init__(name, {Place.DEVICE: Account(), Place.HOST: Account()})
        self._device = device
        self._counters = counters
        self._dtypes = (*dtypes, *_INTEGERS)
        self._host = HostAllocator()
        self._capacities = {Place.DEVICE: capacity, Place.HOST: self._host.capacity}
        self._allocations: dict[int, _Allocation] = {}  # by the identity of the storage

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        place: Place = Place.DEVICE,
        *,
        tag: str = "",
        shared: Group | None = None,  # collectives take tensors wherever they are
    ) -> Tensor:
        account = self._account(place)
        if dtype not in self._dtypes:
            known = ", ".join(_name(one) for one in self._dtypes)
            raise Unsupported(f"memory of {self._name} does not hold {_name(dtype)}; use one of {known} instead")
        shape = tuple(shape)
        nbytes = math.prod(shape) * dtype.itemsize
        if any(free is not None and nbytes > free for free in self._free(place)):
            raise OutOfMemory(self._describe(place, nbytes, tag))
        if place is Place.DEVICE:
            tensor, reserved = torch.empty(shape, dtype=dtype, device=self._device), nbytes
        else:
            try:
                buffer, _ = self._host.allocate(nbytes)
            except (RuntimeError, MemoryError) as error:  # torch raises the first where the system has no more
                raise OutOfMemory(self._describe(place, nbytes, tag)) from error
            tensor, reserved = buffer[:nbytes].view(dtype).view(shape), buffer.untyped_storage().nbytes()
        self._allocations[identify(tensor)] = _Allocation(tensor.detach(), place, tag, nbytes, reserved)
        account.add(tag, nbytes, reserved)
        return tensor

    def release(self, tensor: Tensor, *, after: Work | None = None) -> None:
        allocation = self._allocations.get(identify(tensor))
        if allocation is None:
            raise ValueError(
                f"{self._name} cannot release a tensor of shape {tuple(tensor.shape)}: it was not allocated here, or "
                "was released before"
            )
        if after is not None:
            after.wait()
        del self._allocations[identify(tensor)]
        self._accounts[allocation.place].add(allocation.tag, -allocation.nbytes, -allocation.reserved)

    def copy(self, destination: Tensor, source: Tensor, *, after: Work | None = None, tag: str = "") -> Work:
        """Down to the host everything pending is run first, and the copy is over on return. Up and on the device it is
        an assignment in the pending program; what lies on the host is taken at once."""
        check_copy(destination, source, tag)
        if after is not None:
            after.wait()
        places = self._place_of(source), self._place_of(destination)
        value = read_value(source) if places == (Place.DEVICE, Place.HOST) else source.detach()
        if places == (Place.HOST, Place.DEVICE) and not value.dim():
            # torch_xla writes a 0-d host tensor of 0, 1 or -1 into the program, which another number then changes
            value = value.reshape(1).to(self._device).reshape(())
        destination.detach().copy_(value)
        self._counters.count_copy(COPY_KINDS.get(places, "device"), tag, source.nbytes)
        return DoneWork()

    def stats(self, place: Place = Place.DEVICE) -> MemoryStats:
        account, capacity = self._account(place), self._capacities[place]
        # what the compiler sets aside for a program's own values is no part of any allocation
        kind: Final = "estimate" if place is Place.DEVICE else "exact"
        return MemoryStats(
            used=Measure("exact", account.used),
            reserved=Measure(kind, account.reserved),
            peak=Measure("exact", account.peak),
            capacity=Measure("unknown") if capacity is None else Measure("exact", capacity),
            by_tag=dict(account.by_tag),
        )

    def _place_of(self, tensor: Tensor) -> Place:
        return Place.DEVICE if tensor.device.type == DEVICE_TYPE else Place.HOST

    def _free(self, place: Place) -> tuple[int | None, int | None]:
        """Bytes that are left of the budget, and of the capacity; None where there is no such limit."""
        return self._accounts[place].room(self._capacities[place])

    def _describe(self, place: Place, nbytes: int, tag: str) -> str:
        where = self._name if place is Place.DEVICE else f"the host memory of {self._name}"
        left = ""
        limits = ("a budget of ", self._accounts[place].budget), ("", self._capacities[place])
        for (what, limit), free in zip(limits, self._free(place), strict=True):
            if limit is not None and free is not None and nbytes > free and not left:
                left = f": {format_bytes(max(free, 0))} free of {what}{format_bytes(limit)}"
        advice = "shard over more ranks, use smaller buckets, or raise the budget"
        return f"{where} cannot hold {format_bytes(nbytes)} for {tag!r}{left}; {advice}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def identify(tensor: Tensor) -> int:
    """Which storage a tensor lies in. Addresses would not do: here they are offsets, and of slices only."""
    return int(tensor.untyped_storage()._cdata)
