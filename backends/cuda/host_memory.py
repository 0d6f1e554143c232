"""Memory of the host for a GPU: exact, page-locked where that is needed, and on the GPU's own node if it is known."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from windlass.accelerator.errors import BackendUnusable
from windlass.backends.cpu.shared_pages import PAGE, map_pages
from windlass.backends.cuda.driver import Driver
from windlass.backends.cuda.facts import find_near_node, is_coherent
from windlass.backends.cuda.layout import read_nodes
from windlass.backends.cuda.numa import lock_near
from windlass.backends.generic.host_memory import HostAllocator, PageLock, find_page_lock


def make_host_allocator(driver: Driver, index: int) -> tuple[HostAllocator, str]:
    """Page-locked memory near the GPU, and where it lies in words."""
    lock, kind = choose_lock(find_page_lock(torch.cuda, torch.device("cuda", index)), is_coherent(driver, index))
    nodes = read_nodes()
    near = find_near_node(driver, index, nodes)
    lock, where = lock_near(lock, near, nodes, frozenset(os.sched_getaffinity(0)))
    return HostAllocator(lock, kind=kind), where


def choose_lock(lock: PageLock | None, coherent: bool) -> tuple[PageLock, str]:
    """How pages are locked, and in words for the facts what that means where it is not the usual.

    A GPU that shares the host's page tables reads ordinary memory too, and its runtime may refuse to lock any. Work of
    a lane is ordered by events in either case, so copies are asynchronous where the runtime lets them be.
    """
    if lock is None:
        raise BackendUnusable("torch.cuda has no cudart, by which host memory is page-locked; reinstall torch")
    if coherent and not _locks(lock):
        return _leave_unlocked, "exact, not page-locked: the device reads it where it lies"
    return lock, ""


def _locks(lock: PageLock) -> bool:
    """Whether a page can be locked here: machines whose GPU reads all of the host's memory need not offer it."""
    try:
        lock(map_pages(PAGE))()
    except RuntimeError:
        return False
    return True


def _leave_unlocked(buffer: torch.Tensor) -> Callable[[], None]:
    """In place of a lock where the device reads ordinary memory by itself."""
    return lambda: None
