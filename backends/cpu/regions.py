"""Shared allocations: the same one on every rank of a group, each rank's pages mapped by all."""

from __future__ import annotations

import hashlib
from bisect import bisect_right, insort
from dataclasses import dataclass

from torch import Tensor

from windlass.accelerator.interface import Group
from windlass.backends.cpu.shared_pages import Pages


def name_region(group: Group, number: int) -> int:
    """A number that all ranks give to the allocation that was call `number` of the group."""
    digest = hashlib.blake2b(f"{group.name} {group.ranks} {number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@dataclass(frozen=True)
class Region:
    """One shared allocation, as this rank sees it."""

    serial: int  # the same on all ranks
    group: Group
    pages: tuple[Pages, ...]  # by index in the group, this rank's own among them

    @property
    def own(self) -> Pages:
        return self.pages[self.group.rank]

    def pages_of(self, rank: int) -> Pages:
        """The pages of a global rank."""
        return self.pages[self.group.ranks.index(rank)]

    def serves(self, group: Group) -> bool:
        """Whether every rank of `group` has mapped it."""
        return group.ranks == self.group.ranks or set(group.ranks) <= set(self.group.ranks)


class RegionTable:
    """All shared allocations of this process, found by name or by an address inside them."""

    def __init__(self) -> None:
        self._by_serial: dict[int, Region] = {}
        self._by_address: dict[int, Region] = {}
        self._addresses: list[int] = []  # sorted

    def add(self, region: Region) -> None:
        self._by_serial[region.serial] = region
        self._by_address[region.own.address] = region
        insort(self._addresses, region.own.address)

    def remove(self, region: Region) -> None:
        """Forget a region; its pages are unmapped once no tensor on them is left."""
        if region.serial not in self._by_serial:  # all were forgotten when the groups were left
            return
        del self._by_serial[region.serial]
        del self._by_address[region.own.address]
        self._addresses.remove(region.own.address)

    def find(self, serial: int) -> Region | None:
        return self._by_serial.get(serial)

    def locate(self, tensor: Tensor) -> tuple[Region, int] | None:
        """The region that holds the whole tensor, and the tensor's offset there in bytes."""
        address = tensor.data_ptr()
        index = bisect_right(self._addresses, address) - 1
        if index < 0:
            return None
        region = self._by_address[self._addresses[index]]
        offset = address - region.own.address
        return (region, offset) if offset + tensor.nbytes <= region.own.nbytes else None

    def clear(self) -> None:
        self._by_serial.clear()
        self._by_address.clear()
        self._addresses.clear()
