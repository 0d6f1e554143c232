"""Memory of the CPU: aligned, accounted for to the byte, and really given back.

The device is the host, so Place.HOST is the same memory under an account of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.errors import OutOfMemory, Unsupported
from windlass.accelerator.interface import DoneWork, Group, Measure, MemoryStats, Place, Work
from windlass.backends.cpu.accounts import Account
from windlass.backends.cpu.booked_memory import COPY_KINDS, BookedMemory, check_copy
from windlass.backends.cpu.regions import Region
from windlass.backends.cpu.shared_pages import map_pages, round_to_pages

ALIGNMENT: Final = 128  # bytes
_WHOLE_PAGES: Final = 2**20  # from this size on an allocation has pages of its own, which huge pages can back

FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)  # as declared; float64 has a capability of its own
_DTYPES: Final = (*FLOATS, torch.float64, torch.uint8, torch.int32, torch.int64)


class SharedAllocator(Protocol):
    """Where shared allocations come from; the collectives facet."""

    def allocate_shared(
        self, group: Group, nbytes: int, dtype: torch.dtype, tag: str, *, refused: bool = False
    ) -> Region | None: ...

    def release_shared(self, region: Region) -> None: ...


@dataclass
class _Allocation:
    tensor: Tensor  # keeps the storage, so that no other can get its address before it is released
    place: Place
    tag: str
    nbytes: int
    reserved: int
    give_back: Callable[[], None]


class CpuMemory(BookedMemory[Account]):
    """Allocations of one rank. Other ranks on the host draw on the same capacity, which nobody divides."""

    def __init__(self, counters: Counters, shared: SharedAllocator, name: str = "cpu:0") -> None:
        super().__init__(name, {Place.DEVICE: Account(), Place.HOST: Account()})
        self._counters = counters
        self._shared = shared
        self._allocations: dict[int, _Allocation] = {}  # by the address of the storage
        self._capacity = read_capacity()

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        place: Place = Place.DEVICE,
        *,
        tag: str = "",
        shared: Group | None = None,
    ) -> Tensor:
        account = self._account(place)
        if dtype not in _DTYPES:
            known = ", ".join(_name(one) for one in _DTYPES)
            raise Unsupported(f"memory of {self._name} does not hold {_name(dtype)}; use one of {known} instead")
        nbytes = math.prod(shape) * dtype.itemsize
        fits = self._fits(account, nbytes)
        region: Region | None = None
        try:
            if shared is not None:
                region = self._shared.allocate_shared(shared, max(nbytes, ALIGNMENT), dtype, tag, refused=not fits)
            if not fits:
                raise MemoryError(f"{nbytes} bytes are more than the budget or the machine leaves")
            memory, reserved = (region.own.memory, round_to_pages(region.own.nbytes)) if region else _reserve(nbytes)
        except (MemoryError, OSError) as error:
            text = self._describe(account, place, nbytes, tag)
            raise OutOfMemory(f"{text} ({error})" if fits else text) from error
        tensor = memory[:nbytes].view(dtype).view(tuple(shape))
        release_shared = self._shared.release_shared
        give_back = (lambda: None) if region is None else (lambda: release_shared(region))
        address = tensor.untyped_storage().data_ptr()
        self._allocations[address] = _Allocation(tensor.detach(), place, tag, nbytes, reserved, give_back)
        account.add(tag, nbytes, reserved)
        return tensor

    def release(self, tensor: Tensor, *, after: Work | None = None) -> None:
        address = tensor.untyped_storage().data_ptr()
        if address not in self._allocations:
            raise ValueError(
                f"{self._name} cannot release a tensor of shape {tuple(tensor.shape)}: it was not allocated here, or "
                "was released before"
            )
        if after is not None:
            after.wait()
        allocation = self._allocations.pop(address)
        self._account(allocation.place).add(allocation.tag, -allocation.nbytes, -allocation.reserved)
        allocation.give_back()

    def copy(self, destination: Tensor, source: Tensor, *, after: Work | None = None, tag: str = "") -> Work:
        check_copy(destination, source, tag)
        if after is not None:
            after.wait()
        destination.detach().copy_(source.detach())
        kind = COPY_KINDS.get((self._place_of(source), self._place_of(destination)), "device")
        self._counters.count_copy(kind, tag, source.nbytes)
        return DoneWork()

    def stats(self, place: Place = Place.DEVICE) -> MemoryStats:
        account = self._account(place)
        return MemoryStats(
            used=Measure("exact", account.used),
            reserved=Measure("exact", account.reserved),
            peak=Measure("exact", account.peak),
            capacity=Measure("unknown") if self._capacity is None else Measure("exact", self._capacity),
            by_tag=dict(account.by_tag),
        )

    def _place_of(self, tensor: Tensor) -> Place:
        """Tensors from elsewhere count as the device's: a module's own parameters lie there."""
        allocation = self._allocations.get(tensor.untyped_storage().data_ptr())
        return Place.DEVICE if allocation is None else allocation.place

    def _fits(self, account: Account, nbytes: int) -> bool:
        """Whether budget and machine leave room. The places are one memory with two accounts."""
        if account.budget is not None and account.used + nbytes > account.budget:
            return False
        used = sum(one.used for one in self._accounts.values())
        return self._capacity is None or used + nbytes <= self._capacity

    def _describe(self, account: Account, place: Place, nbytes: int, tag: str) -> str:
        where = self._name if place is Place.DEVICE else f"the host memory of {self._name}"
        text = f"{where} cannot hold {format_bytes(nbytes)} for {tag!r}"
        if account.budget is not None and account.used + nbytes > account.budget:
            free = max(account.budget - account.used, 0)
            text += f": {format_bytes(free)} free of a budget of {format_bytes(account.budget)}"
        elif self._capacity is not None:
            used = sum(one.used for one in self._accounts.values())
            text += f": {format_bytes(max(self._capacity - used, 0))} free of {format_bytes(self._capacity)}"
        return text + "; shard over more ranks, use smaller buckets, or raise the budget"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reserve(nbytes: int) -> tuple[Tensor, int]:
    """At least `nbytes` of private memory as an aligned uint8 tensor, and the bytes that it takes up."""
    if nbytes >= _WHOLE_PAGES:
        return map_pages(nbytes), round_to_pages(nbytes)
    size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT + ALIGNMENT  # room to move the start
    buffer = torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever default device the user has set
    return buffer[-buffer.data_ptr() % ALIGNMENT :], size


def read_capacity() -> int | None:
    """Memory that this process may use in bytes: the machine's, or less where its control group says so."""
    try:
        first = Path("/proc/meminfo").read_text().split("\n", 1)[0]
    except OSError:
        return None
    total = int(first.split()[1]) * 1024  # "MemTotal:  24000000 kB"
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(limit).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            total = min(total, int(text))
    return total


def format_bytes(nbytes: int) -> str:
    """4294967296 as "4.0 GiB"."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if nbytes >= 1024**power:
            return f"{nbytes / 1024**power:.1f} {unit}"
    return f"{nbytes} B"
