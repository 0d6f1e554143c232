"""Memory of a device that PyTorch knows, through torch.empty, with books of its own that are exact to the byte.

[Note: releasing on streams] torch gives the memory of a dropped tensor to whoever allocates next on the stream that was
current when it was allocated. That is in order by itself if the last use was on that stream too. Otherwise the tensor
is kept here until the event of its last use has happened. record_stream is not used: it leaves the time of reuse
to chance, and with it the peak. What is kept still counts as used, and is waited for before an allocation is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.errors import OutOfMemory, Unsupported
from windlass.accelerator.interface import DoneWork, Group, Measure, MemoryStats, Place, Streams, Work
from windlass.backends.cpu.accounts import Account
from windlass.backends.cpu.booked_memory import COPY_KINDS, BookedMemory, check_copy
from windlass.backends.cpu.memory import format_bytes
from windlass.backends.generic.host_memory import ALIGNMENT, HostAllocator, align
from windlass.backends.generic.streams import DeviceEvent, DeviceLanes


@dataclass
class _Allocation:
    tensor: Tensor  # keeps the storage, so that no other can be mistaken for it before it is released
    place: Place
    tag: str
    nbytes: int
    reserved: int
    stream: Any  # current at the time; None on synchronous lanes and on the host
    page_locked: bool
    give_back: Callable[[], None]


class DeviceMemory(BookedMemory[Account]):
    """Allocations of one device and of the host memory beside it.

    Raises `OutOfMemory` where the budget, the known capacity or torch says no, once all releases are over.
    """

    def __init__(
        self,
        name: str,  # "cuda:0"
        device: torch.device,
        module: Any,
        streams: Streams,
        counters: Counters,
        host: HostAllocator,
        dtypes: Sequence[str],  # the floating ones that are declared, float64 among them
    ) -> None:
        super().__init__(name, {Place.DEVICE: Account(), Place.HOST: Account()})
        self._device = device
        self._module = module
        self._lanes = streams if isinstance(streams, DeviceLanes) else None
        self._counters = counters
        self._host = host
        self._dtypes = tuple(dtypes)
        self._capacities = {Place.DEVICE: read_device_capacity(module, device), Place.HOST: host.capacity}
        self._allocations: dict[int, _Allocation] = {}  # by the identity of the storage
        self._releasing: list[tuple[Work, _Allocation]] = []

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        place: Place = Place.DEVICE,
        *,
        tag: str = "",
        shared: Group | None = None,  # collectives reach every tensor of the device
    ) -> Tensor:
        account = self._account(place)
        self._check_dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        self._finish_releases()
        if not self._fits(place, nbytes):
            self._finish_releases(block=True)
        if not self._fits(place, nbytes):
            raise OutOfMemory(self._describe(place, nbytes, tag))
        try:
            buffer, give_back = self._allocate(place, nbytes)
        except (RuntimeError, MemoryError, OSError):
            self._finish_releases(block=True)
            try:
                buffer, give_back = self._allocate(place, nbytes)
            except (RuntimeError, MemoryError, OSError) as error:  # torch has no one type for this over all devices
                cause = str(error).strip().split("\n")[0]
                raise OutOfMemory(f"{self._describe(place, nbytes, tag)} ({cause})") from error
        tensor = buffer[:nbytes].view(dtype).view(tuple(shape))
        stream = self._lanes.current if self._lanes and place is Place.DEVICE else None
        locked = place is Place.HOST and self._host.page_locked
        kept = _Allocation(tensor.detach(), place, tag, nbytes, buffer.nbytes, stream, locked, give_back)
        self._allocations[_identity(tensor)] = kept
        account.add(tag, nbytes, buffer.nbytes)
        return tensor

    def release(self, tensor: Tensor, *, after: Work | None = None) -> None:
        allocation = self._allocations.pop(_identity(tensor), None)
        if allocation is None:
            raise ValueError(
                f"{self._name} cannot release a tensor of shape {tuple(tensor.shape)}: it was not allocated here, or "
                "was released before"
            )
        if self._lanes is None:
            if after is not None:
                after.wait()
            self._give_back(allocation)
            return
        last = self._lanes.record() if after is None else after  # see the note at the top
        if last.done() or (allocation.stream is not None and _is_on(last, allocation.stream)):
            self._give_back(allocation)
        else:
            self._releasing.append((last, allocation))

    def copy(self, destination: Tensor, source: Tensor, *, after: Work | None = None, tag: str = "") -> Work:
        check_copy(destination, source, tag)
        if after is not None:
            after.wait()
        places = self._place_of(source), self._place_of(destination)
        # From or to memory that is not page-locked a device copies while the host waits, or reads what is gone by then.
        # Strided memory of the host goes through a copy of it, which torch makes without waiting for the device.
        asynchronous = self._lanes is not None and self._is_reachable(destination) and self._is_reachable(source)
        if self._lanes is not None and (places == (Place.HOST, Place.HOST) or not asynchronous):
            # The host copies, or it waits for the device in its runtime. No stream keeps the first in order, and the
            # second cannot be left when what is waited for is a peer.
            self._lanes.record().block()
        destination.detach().copy_(source.detach(), non_blocking=asynchronous)
        self._counters.count_copy(COPY_KINDS.get(places, "device"), tag, source.nbytes)
        return self._lanes.record() if self._lanes is not None else DoneWork()

    def stats(self, place: Place = Place.DEVICE) -> MemoryStats:
        account = self._account(place)
        self._finish_releases()
        reserved = Measure("exact", account.reserved) if place is Place.HOST else self._read_reserved(account)
        capacity = self._capacities[place]
        return MemoryStats(
            used=Measure("exact", account.used),
            reserved=reserved,
            peak=Measure("exact", account.peak),
            capacity=Measure("unknown") if capacity is None else Measure("exact", capacity),
            by_tag=dict(account.by_tag),
        )

    def reset_peak(self, place: Place = Place.DEVICE) -> None:
        self._finish_releases()
        super().reset_peak(place)

    def close(self) -> None:
        """Wait for what is being released, and give it back. Host memory that is still used is only unlocked: the
        runtime must not take for locked what later lies where it lay."""
        self._finish_releases(block=True)
        locked = [one for one in self._allocations.values() if one.page_locked]
        if locked and self._lanes is not None:
            self._lanes.synchronize()
        for allocation in locked:
            allocation.page_locked = False
            allocation.give_back()
            allocation.give_back = _nothing

    def _check_dtype(self, dtype: torch.dtype) -> None:
        name = str(dtype).removeprefix("torch.")
        if (dtype.is_floating_point or dtype.is_complex) and name not in self._dtypes:
            raise Unsupported(f"{self._name} does not declare {name}; use {', '.join(self._dtypes)}, or whole numbers")

    def _allocate(self, place: Place, nbytes: int) -> tuple[Tensor, Callable[[], None]]:
        """An aligned uint8 tensor of at least `nbytes`, and what undoes more than dropping it does."""
        if place is Place.HOST:
            return self._host.allocate(nbytes)
        size = max(nbytes, 1)
        buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        if buffer.data_ptr() % ALIGNMENT:  # most devices align to 256 bytes or more
            buffer = align(torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self._device))
        return buffer, _nothing

    def _give_back(self, allocation: _Allocation) -> None:
        self._accounts[allocation.place].add(allocation.tag, -allocation.nbytes, -allocation.reserved)
        allocation.give_back()

    def _finish_releases(self, *, block: bool = False) -> None:
        waiting, self._releasing = self._releasing, []
        for work, allocation in waiting:
            if block:
                work.block() if isinstance(work, DeviceEvent) else work.wait()
            if block or work.done():
                self._give_back(allocation)
            else:
                self._releasing.append((work, allocation))

    def _read_reserved(self, account: Account) -> Measure:
        """What torch's allocator holds of the device, for everybody in this process; else what was asked of it."""
        read = getattr(self._module, "memory_reserved", None)
        return Measure("estimate", account.reserved) if read is None else Measure("exact", int(read()))

    def _is_reachable(self, tensor: Tensor) -> bool:
        """Whether the device reads and writes this memory by itself, without a copy that the host makes of it."""
        if tensor.device.type == self._device.type:
            return True
        allocation = self._allocations.get(_identity(tensor))
        return allocation is not None and allocation.page_locked and tensor.is_contiguous()

    def _place_of(self, tensor: Tensor) -> Place:
        allocation = self._allocations.get(_identity(tensor))
        if allocation is not None:
            return allocation.place
        return Place.DEVICE if tensor.device.type == self._device.type else Place.HOST

    def _free(self, place: Place) -> tuple[int | None, int | None]:
        """Bytes that are left of the budget, and of the capacity; None where there is no such limit."""
        return self._accounts[place].room(self._capacities[place])

    def _fits(self, place: Place, nbytes: int) -> bool:
        return all(free is None or nbytes <= free for free in self._free(place))

    def _describe(self, place: Place, nbytes: int, tag: str) -> str:
        account, capacity = self._accounts[place], self._capacities[place]
        of_budget, of_capacity = self._free(place)
        where = self._name if place is Place.DEVICE else f"the host memory of {self._name}"
        text = f"{where} cannot hold {format_bytes(nbytes)} for {tag!r}"
        if account.budget is not None and of_budget is not None and nbytes > of_budget:
            text += f": {format_bytes(max(of_budget, 0))} free of a budget of {format_bytes(account.budget)}"
        elif capacity is not None and of_capacity is not None:
            text += f": {format_bytes(account.used)} of {format_bytes(capacity)} are in use by windlass"
        return text + "; shard over more ranks, use smaller buckets, or raise the budget"


def read_device_capacity(module: Any, device: torch.device) -> int | None:
    """Bytes of the device as its module gives them, None where it does not; the device must be the current one."""
    if callable(read := getattr(module, "mem_get_info", None)):
        return int(read()[1])
    if callable(read := getattr(module, "get_device_properties", None)):
        total = getattr(read(device), "total_memory", None)
        return None if total is None else int(total)
    return None


def _identity(tensor: Tensor) -> int:
    """Which storage a tensor lies in, also on devices whose storages have no address."""
    return int(tensor.untyped_storage()._cdata)


def _is_on(work: Work, stream: Any) -> bool:
    return isinstance(work, DeviceEvent) and bool(work.stream == stream)


def _nothing() -> None:
    """Dropping the tensor is enough."""
