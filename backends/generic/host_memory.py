"""Host memory beside a device: of exact size, and page-locked where that can be had without rounding.

torch's own pinned memory is rounded up to a power of two on most devices, so that 5 GiB take 8. Instead, pages are
mapped here and the vendor's runtime is asked to lock them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

from windlass.backends.cpu.memory import read_capacity
from windlass.backends.cpu.shared_pages import map_pages, round_to_pages

ALIGNMENT: Final = 128  # bytes

PageLock = Callable[[Tensor], Callable[[], None]]
"""Locks the whole pages under a uint8 tensor and returns what unlocks them; RuntimeError if it cannot."""


class HostAllocator:
    """Gives host memory: pages locked by `page_lock`, torch's own pinned memory, or ordinary memory.

    `kind` says in words for the facts what `page_lock` does, where that is not what its name says.
    """

    def __init__(self, page_lock: PageLock | None = None, *, torch_pins: bool = False, kind: str = "") -> None:
        self._kind = kind
        self._page_lock = page_lock
        self._torch_pins = torch_pins
        self.capacity = read_capacity()  # bytes
        self.page_locked = page_lock is not None or torch_pins

    @property
    def kind(self) -> str:
        """For the facts: how this memory is allocated."""
        if self._page_lock is not None:
            return self._kind or "page-locked, exact"
        return "page-locked by torch" if self._torch_pins else "pageable"

    def allocate(self, nbytes: int) -> tuple[Tensor, Callable[[], None]]:
        """At least `nbytes` as an aligned uint8 tensor, and what undoes more than dropping it does."""
        if self._page_lock is not None:
            buffer = map_pages(round_to_pages(max(nbytes, 1)))
            return buffer, self._page_lock(buffer)
        room = torch.empty(max(nbytes, 1) + ALIGNMENT, dtype=torch.uint8, device="cpu", pin_memory=self._torch_pins)
        return align(room), _nothing


def find_page_lock(module: Any, device: torch.device) -> PageLock | None:
    """How the runtime beneath a device module locks pages, if it has the call that CUDA and ROCm share."""
    if not hasattr(module, "cudart"):
        return None
    runtime = module.cudart()

    def lock(buffer: Tensor) -> Callable[[], None]:
        address = buffer.data_ptr()
        status = int(runtime.cudaHostRegister(address, buffer.nbytes, 0))
        if status != 0:
            _forget_error(device)
            raise RuntimeError(f"locking {buffer.nbytes} bytes of host memory fails with status {status}")
        return lambda: _unlock(runtime, buffer)

    return lock


def align(room: Tensor) -> Tensor:
    """The part of a uint8 tensor from its first aligned byte on."""
    return room[-room.data_ptr() % ALIGNMENT :]


def _forget_error(device: torch.device) -> None:
    """The runtime keeps the error of a failed call, and torch would take it for that of the next kernel: this one."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device)


def _unlock(runtime: Any, buffer: Tensor) -> None:
    """Before the pages are unmapped, which happens when the last tensor on them is gone: this one at the earliest."""
    status = int(runtime.cudaHostUnregister(buffer.data_ptr()))
    if status != 0:
        raise RuntimeError(f"unlocking {buffer.nbytes} bytes of host memory fails with status {status}")


def _nothing() -> None:
    """Dropping the tensor is enough."""
