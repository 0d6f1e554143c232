"""The pages through which a rank tells its peers what it calls, how far it has come, and that it gave up.

Each rank writes its own control pages and reads those of its peers. Layout, in bytes:

    0      arrived   number of the last call that this rank has entered
    64     done      number of the last call whose bytes this rank has read from its peers
    128    state     OPEN, LEFT, or why the rank gave up; the text of the reason at 1024
    4096   slots     RING records: what was called and where its input lies, then the splits of an all_to_all
    ...    mail      RING boxes of MAIL bytes, for inputs that are small

A record is used again RING calls later, when every peer is done with it.
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass
from typing import Final

import numpy as np

from windlass.backends.cpu.atomics import publish
from windlass.backends.cpu.shared_pages import PAGE, PATH_BYTES, Pages, round_to_pages

RING: Final = 64
MAIL: Final = 65536

OPEN, LEFT, MISMATCHED, GAVE_UP = range(4)

_ARRIVED, _DONE, _STATE, _REASON, _SLOTS = 0, 64, 128, 1024, 4096
_REASON_BYTES = _SLOTS - _REASON
_CALL = struct.Struct("=6q")
_PLACE = struct.Struct(f"=4q{PATH_BYTES}s64s")  # where, serial, offset, size of the pages; path of the pages; tag
_SPLITS = _CALL.size + _PLACE.size

NOWHERE, MAILBOX, REGION, STAGING = range(4)


@dataclass(frozen=True)
class InputPlace:
    """Where the input of a call lies, for the peers that read it."""

    where: int = NOWHERE
    serial: int = 0  # of the region, or of the staging pages
    offset: int = 0  # in bytes
    nbytes: int = 0  # of the pages, for peers that have to map them
    path: str = ""


def control_bytes(num_ranks: int) -> int:
    """Size of one rank's control pages in a group of `num_ranks`."""
    return _mail_begin(num_ranks) + RING * MAIL


def _slot_bytes(num_ranks: int) -> int:
    return -(-(_SPLITS + 16 * num_ranks) // 64) * 64


def _mail_begin(num_ranks: int) -> int:
    return round_to_pages(_SLOTS + RING * _slot_bytes(num_ranks))


class ControlPage:
    """One rank's control pages, as their owner or as a peer."""

    def __init__(self, pages: Pages, num_ranks: int) -> None:
        assert pages.address % PAGE == 0
        self.pages = pages
        self._bytes = memoryview(pages.memory.numpy().data)
        self._num_ranks = num_ranks
        self._slot_bytes = _slot_bytes(num_ranks)
        self._mail = _mail_begin(num_ranks)
        self.arrived_address = pages.address + _ARRIVED
        self.done_address = pages.address + _DONE
        self.state_address = pages.address + _STATE

    def _word(self, offset: int) -> int:
        return int.from_bytes(self._bytes[offset : offset + 8], sys.byteorder, signed=True)

    @property
    def arrived(self) -> int:
        return self._word(_ARRIVED)

    @property
    def done(self) -> int:
        return self._word(_DONE)

    @property
    def state(self) -> int:
        return self._word(_STATE)

    @property
    def reason(self) -> str:
        """Why the rank gave up."""
        text = bytes(self._bytes[_REASON : _REASON + _REASON_BYTES])
        return text.partition(b"\0")[0].decode(errors="replace")

    def _slot(self, number: int) -> int:
        return _SLOTS + (number % RING) * self._slot_bytes

    def mail_offset(self, number: int) -> int:
        return self._mail + (number % RING) * MAIL

    def write(self, number: int, words: tuple[int, ...], tag: str, place: InputPlace, splits: tuple[int, ...]) -> None:
        """Fill the record of call `number`, to be followed by `arrive`. `splits`: see `transport.check_splits`."""
        slot = self._slot(number)
        _CALL.pack_into(self._bytes, slot, *words)
        label = tag.encode()[:63]
        path = place.path.encode()
        values = (place.where, place.serial, place.offset, place.nbytes)
        _PLACE.pack_into(self._bytes, slot + _CALL.size, *values, path, label)
        if splits:
            struct.pack_into(f"={len(splits)}q", self._bytes, slot + _SPLITS, *splits)

    def arrive(self, number: int) -> None:
        publish(self.arrived_address, number)

    def finish(self, number: int) -> None:
        publish(self.done_address, number)

    def leave(self) -> None:
        if self.state == OPEN:
            publish(self.state_address, LEFT)

    def abort(self, state: int, reason: str) -> None:
        """Tell the peers not to wait any longer, and why."""
        if self.state == OPEN:
            text = reason.encode()[: _REASON_BYTES - 1]
            self._bytes[_REASON : _REASON + len(text)] = text
            publish(self.state_address, state)

    def call_bytes(self, number: int) -> bytes:
        slot = self._slot(number)
        return bytes(self._bytes[slot : slot + _CALL.size])

    def read_call(self, number: int) -> tuple[tuple[int, ...], str]:
        """The words and the (possibly cut) tag of a call."""
        slot = self._slot(number)
        tag = _PLACE.unpack_from(self._bytes, slot + _CALL.size)[5]
        return _CALL.unpack_from(self._bytes, slot), tag.rstrip(b"\0").decode(errors="replace")

    def read_place(self, number: int) -> InputPlace:
        slot = self._slot(number) + _CALL.size
        where, serial, offset, nbytes, path, _ = _PLACE.unpack_from(self._bytes, slot)
        return InputPlace(where, serial, offset, nbytes, path.rstrip(b"\0").decode())

    def read_splits(self, number: int) -> tuple[int, ...]:
        return struct.unpack_from(f"={2 * self._num_ranks}q", self._bytes, self._slot(number) + _SPLITS)


def word_addresses(addresses: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Addresses in the form that `atomics.find_behind` takes."""
    return np.array(addresses, dtype=np.int64)
