"""Which memory a tensor is, as the ledger knows it: its storage's address, and a range of bytes in there.

Storages are held weakly. An address means the same storage for as long as somebody holds it, and nobody can touch it
afterwards; so whatever is found here is what it was, and nothing is kept alive for being watched.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from windlass.backends.sim.ledger import Ledger, Touch, Tracked

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size, to write bits


def address_of(tensor: Tensor) -> int:
    """Where the tensor's storage begins; 0 for a tensor without memory of its own (meta, sparse, symbolic)."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def extent(tensor: Tensor) -> tuple[int, int, bool]:
    """The bytes [start, stop) of its storage between which the tensor lies, and whether it has all of them."""
    size, numel = tensor.element_size(), tensor.numel()
    start = int(tensor.storage_offset()) * size
    if numel == 0:
        return start, start, True
    if tensor.is_contiguous():
        return start, start + numel * size, True
    last = sum((length - 1) * int(stride) for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    expected, dense = 1, True
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        dense = dense and (length == 1 or stride == expected)
        expected *= length
    return start, start + (last + 1) * size, dense


def overlaps(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors may share bytes."""
    if address_of(one) != address_of(other):
        return False
    (start, stop, _), (begin, end, _) = extent(one), extent(other)
    return start < end and begin < stop


def poison(tensor: Tensor) -> None:
    """Fill with 0xFF: NaN in every floating dtype, -1 or the largest number in the others."""
    with torch.inference_mode():  # also tensors that were made in it
        bits = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        bits.detach().view(_INTEGERS[bits.element_size()]).fill_(-1)


@dataclass(frozen=True)
class _Known:
    tracked: Tracked
    reference: StorageWeakRef


class Storages:
    """The storages that the ledger tracks, by address."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._known: dict[int, _Known] = {}
        self._sweep_at = 1024

    def track(self, tensor: Tensor, label: str) -> Tracked:
        """Track the tensor's storage from now on, as something new."""
        tracked = Tracked(label, origin=extent(tensor)[0])
        self._enter(tensor, tracked)
        return tracked

    def find(self, address: int) -> Tracked | None:
        known = self._known.get(address)
        if known is None:
            return None
        if known.reference.expired():
            del self._known[address]
            return None
        return known.tracked

    def find_or_track(self, tensor: Tensor) -> Tracked | None:
        """A tensor that is no allocation is tracked from when something asynchronous has to do with it."""
        address = address_of(tensor)
        if not address:
            return None
        tracked = self.find(address)
        if tracked is None:
            tracked = self.track(tensor, f"a tensor of shape {tuple(tensor.shape)} that is no allocation")
            tracked.origin = 0  # it may be a part of what is meant
            tracked.accesses = self._ledger.recall(address, tensor.untyped_storage().nbytes())
        return tracked

    def move(self, old: Tensor, new: Tensor, gone: str) -> None:
        """What was known of the memory of `old` is now that of `new`; the old one may not be touched any more."""
        address = address_of(old)
        known = self._known[address]
        self._known[address] = _Known(Tracked(known.tracked.label, gone=gone), known.reference)
        known.tracked.shift(extent(new)[0] - known.tracked.origin)
        self._enter(new, known.tracked)

    def all(self) -> list[Tracked]:
        return [known.tracked for known in self._known.values()]

    def sweep(self) -> None:
        """Forget the storages that are no more."""
        for address in [address for address, known in self._known.items() if known.reference.expired()]:
            del self._known[address]

    def touches(
        self,
        reads: Iterable[Tensor],
        updates: Iterable[Tensor],  # read and written
        writes: Iterable[Tensor],
        lane: str,
        number: int,
        what: object,
        *,
        track: bool,  # whatever is not tracked yet; else it is only noted
    ) -> list[Touch]:
        """What an operation or a work is about to do with tracked memory."""
        found: list[Touch] = []
        for tensors, read, write in ((reads, True, False), (updates, True, True), (writes, False, True)):
            for tensor in tensors:
                address = address_of(tensor)
                if not address:
                    continue
                tracked = self.find(address)
                if tracked is None and track:
                    tracked = self.find_or_track(tensor)
                if tracked is None:
                    self._ledger.note(address, lane, number, what, write)
                    continue
                start, stop, dense = extent(tensor)
                if start < stop:
                    found.append(Touch(tracked, start, stop, read, write, dense))
        return found

    def _enter(self, tensor: Tensor, tracked: Tracked) -> None:
        if len(self._known) >= self._sweep_at:
            self.sweep()
            self._sweep_at = 2 * len(self._known) + 1024
        storage = tensor.untyped_storage()
        self._known[storage.data_ptr()] = _Known(tracked, StorageWeakRef(storage))
