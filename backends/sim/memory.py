"""Memory of the simulated device: three tiers of the machine's sizes, poisoned where it holds nothing, and moved at
every boundary where views are not promised.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from windlass.accelerator.counters import Counters
from windlass.accelerator.errors import OutOfMemory, Unsupported
from windlass.accelerator.interface import Group, Measure, MemoryStats, Place, Work
from windlass.backends.cpu.booked_memory import BookedMemory, check_copy
from windlass.backends.cpu.memory import ALIGNMENT, format_bytes
from windlass.backends.sim.accounts import Tier
from windlass.backends.sim.conductor import COMPUTE, Conductor
from windlass.backends.sim.storages import address_of, poison
from windlass.backends.sim.watcher import unwatched

if TYPE_CHECKING:
    from windlass.backends.sim.machines import Machine
    from windlass.backends.sim.settings import SimSettings

DTYPES: Final = ("float32", "bfloat16", "float16")  # floating ones
_COPY_KINDS: Final = {
    (Place.HOST, Place.DEVICE): "up",
    (Place.DISK, Place.DEVICE): "up",
    (Place.DEVICE, Place.HOST): "down",
    (Place.DEVICE, Place.DISK): "down",
    (Place.DEVICE, Place.DEVICE): "device",
}
_ADVICE: Final = {
    Place.DEVICE: "shard over more ranks, use smaller buckets, or raise the budget",
    Place.HOST: "shard over more ranks, offload less, or raise the budget",
    Place.DISK: "shard over more ranks, offload less, or raise the budget",
}


@dataclass
class _Allocation:
    handle: Tensor  # what `empty` returned: it follows when the memory moves
    place: Place
    tag: str
    nbytes: int
    reserved: int


class SimMemory(BookedMemory[Tier]):
    """Allocations of one rank."""

    def __init__(
        self,
        settings: SimSettings,
        machine: Machine,
        counters: Counters,
        conductor: Conductor,
        name: str = "sim:0",
    ) -> None:
        tiers = {
            Place.DEVICE: Tier(capacity=machine.device_memory_bytes),
            Place.HOST: Tier(capacity=machine.host_memory_bytes),
            Place.DISK: Tier(capacity=machine.disk_bytes),
        }
        super().__init__(name, tiers)
        self._counters = counters
        self._conductor = conductor
        self._allocations: dict[int, _Allocation] = {}  # by the address of the storage
        if not settings.views:
            conductor.at_boundary.append(self._move_all)

    def empty(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        place: Place = Place.DEVICE,
        *,
        tag: str = "",
        shared: Group | None = None,
    ) -> Tensor:
        """As promised by the interface; every byte is 0xFF. `shared` makes no difference here."""
        name = str(dtype).removeprefix("torch.")
        if (dtype.is_floating_point or dtype.is_complex) and name not in DTYPES:
            raise Unsupported(
                f"{self._name} has no {name}, wanted for {tag!r}; use one of {', '.join(DTYPES)}, or compute in {name} "
                "on host tensors of your own"
            )
        nbytes = math.prod(shape) * dtype.itemsize
        account = self._accounts[place]
        if nbytes > account.free:
            raise OutOfMemory(self._describe(place, nbytes, tag))
        try:
            tensor, reserved = _reserve(nbytes, dtype, place)
        except (RuntimeError, OSError, MemoryError) as error:
            raise OutOfMemory(f"{self._describe(place, nbytes, tag)} (really: {error})") from error
        with unwatched(), torch.inference_mode(False):
            tensor = tensor.view(tuple(shape))
        self._allocations[address_of(tensor)] = _Allocation(tensor, place, tag, nbytes, reserved)
        self._conductor.storages.track(tensor, f"allocation {tag!r}")
        if self._conductor.program is not None:
            self._conductor.program.enter(tensor, tag, on_device=place is Place.DEVICE)
        account.add(tag, nbytes, reserved)
        return tensor

    def release(self, tensor: Tensor, *, after: Work | None = None) -> None:
        """As promised by the interface. The account drops at once, the bytes turn into 0xFF after `after`. Raises
        OrderViolation if something that is not waited for may still use them."""
        address = address_of(tensor)
        allocation = self._allocations.get(address)
        if allocation is None:
            tracked = self._conductor.storages.find(address) if address else None
            why = f"{tracked.label} {tracked.gone}" if tracked and tracked.gone else "it was not allocated here"
            raise ValueError(f"{self._name} cannot release a tensor of shape {tuple(tensor.shape)}: {why}")
        self._conductor.retire(allocation.handle, "was released before", after)
        del self._allocations[address]
        self._accounts[allocation.place].add(allocation.tag, -allocation.nbytes, -allocation.reserved)

    def copy(self, destination: Tensor, source: Tensor, *, after: Work | None = None, tag: str = "") -> Work:
        check_copy(destination, source, tag)
        target, origin = destination.detach(), source.detach()  # of this memory, wherever the handles move
        places = self._place_of(source), self._place_of(destination)
        nbytes = source.numel() * source.element_size()
        work = self._conductor.issue(
            self._conductor.current_lane,
            lambda: _copy(target, origin),
            reads=(origin,),
            writes=(target,),
            what=f"copy {tag!r}",
            seconds=self._conductor.clock.copy_seconds(*places, nbytes),
            link_seconds=self._conductor.clock.link_seconds(*places, nbytes),
            in_order=False,
            after=after,
        )
        if self._conductor.program is not None and Place.DEVICE in places:
            given = {"destination": target, "source": origin}
            self._conductor.program.command(f"copy {tag!r}", given, adopted=(target,))
        self._counters.count_copy(_COPY_KINDS.get(places, "host"), tag, nbytes)
        return work

    def stats(self, place: Place = Place.DEVICE) -> MemoryStats:
        account = self._accounts[place]
        return MemoryStats(
            used=Measure("exact", account.used),
            reserved=Measure("exact", account.reserved),
            peak=Measure("exact", account.peak),
            capacity=Measure("exact", account.capacity),
            by_tag=dict(account.by_tag),
        )

    def _move_all(self) -> None:
        """Give every allocation that is at rest other memory: what only its handle's owner knows goes along."""
        storages, ledger = self._conductor.storages, self._conductor.ledger
        for address, allocation in list(self._allocations.items()):
            handle = allocation.handle
            tracked = storages.find(address)
            if tracked is None or not ledger.is_settled(tracked, COMPUTE):
                continue
            with unwatched(), torch.inference_mode(False), torch.no_grad():
                old = handle.detach()
                moved, _ = _reserve(allocation.nbytes, handle.dtype, allocation.place)
                new = moved.view(handle.shape)
                new.copy_(old)
                handle.data = new
                storages.move(old, new, "was moved at the boundary: a slice of it may not be kept over one")
                poison(old)
            if self._conductor.program is not None:
                self._conductor.program.enter(new, allocation.tag, on_device=allocation.place is Place.DEVICE)
            del self._allocations[address]
            self._allocations[address_of(handle)] = allocation

    def _place_of(self, tensor: Tensor) -> Place:
        """Tensors from elsewhere count as the device's: a module's own parameters lie there."""
        allocation = self._allocations.get(address_of(tensor))
        return Place.DEVICE if allocation is None else allocation.place

    def _describe(self, place: Place, nbytes: int, tag: str) -> str:
        account = self._accounts[place]
        where = self._name if place is Place.DEVICE else f"the {place.value} of {self._name}"
        limited = account.budget is not None and account.budget < account.capacity
        limit = f"a budget of {format_bytes(account.limit)}" if limited else format_bytes(account.limit)
        return (
            f"{where} cannot hold {format_bytes(nbytes)} for {tag!r}: {format_bytes(max(account.free, 0))} free of "
            f"{limit}; {_ADVICE[place]}"
        )


def _reserve(nbytes: int, dtype: torch.dtype, place: Place) -> tuple[Tensor, int]:
    """`nbytes` of memory of its own, aligned and filled with 0xFF, as a flat tensor; and the bytes that it takes up."""
    size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
    with unwatched(), torch.inference_mode(False):
        if place is Place.DISK:
            with tempfile.NamedTemporaryFile(prefix="windlass-sim-") as file:  # mapped, it needs no name any more
                buffer = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8, device="cpu")
        else:
            size += ALIGNMENT  # room to move the start
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever default device the user has set
        poison(buffer)
        start = -buffer.data_ptr() % ALIGNMENT
        return buffer[start : start + nbytes].view(dtype), size


def _copy(destination: Tensor, source: Tensor) -> None:
    destination.copy_(source)
