"""Host memory for a GPU: touched on the GPU's node before it is locked, and left unlocked only where that is right."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from windlass.accelerator.errors import BackendUnusable
from windlass.backends.cpu.shared_pages import PAGE, map_pages
from windlass.backends.cuda import numa
from windlass.backends.cuda.host_memory import choose_lock
from windlass.backends.cuda.layout import Node
from windlass.backends.cuda.numa import lock_near, touch_on

HERE = frozenset(os.sched_getaffinity(0))
NEAR, FAR = Node(0, HERE, 2**30, (10, 20)), Node(1, frozenset({100_000}), 2**30, (20, 10))


def count_resident(buffer: Tensor) -> int:
    """Pages under a buffer that the system has given memory to."""
    with open("/proc/self/pagemap", "rb") as entries:
        entries.seek(buffer.data_ptr() // PAGE * 8)
        read = entries.read(buffer.numel() // PAGE * 8)
    return sum(entry >> 63 for entry in torch.frombuffer(bytearray(read), dtype=torch.uint64).tolist())


def refuse(buffer: Tensor) -> Callable[[], None]:
    raise RuntimeError("locking fails with status 801")


def test_pages_are_there_before_they_are_locked() -> None:
    resident = []

    def lock(buffer: Tensor) -> Callable[[], None]:
        resident.append(count_resident(buffer))
        return lambda: None

    buffer = map_pages(5 * PAGE)
    near, words = lock_near(lock, NEAR, (NEAR, FAR), HERE)
    near(buffer)()
    assert resident == [5]
    assert words == "node 0, the GPU's own"


def test_large_memory_is_touched_by_several_threads_that_are_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    bound: list[tuple[int, frozenset[int]]] = []
    monkeypatch.setattr(numa, "_LEAST", PAGE)
    monkeypatch.setattr(os, "sched_setaffinity", lambda who, cpus: bound.append((who, cpus)))
    cpus = frozenset(range(3))
    buffer = map_pages(7 * PAGE)
    touch_on(buffer, cpus)
    assert bound == [(0, cpus)] * 3  # parts of 3, 3 and 1 pages
    assert count_resident(buffer) == 7


def test_the_caller_is_not_bound() -> None:
    touch_on(map_pages(PAGE), frozenset({min(HERE)}))
    assert frozenset(os.sched_getaffinity(0)) == HERE


def test_a_thread_that_cannot_be_bound_is_an_error() -> None:
    with pytest.raises(OSError, match="Invalid argument"):
        touch_on(map_pages(PAGE), FAR.cpus)


@pytest.mark.parametrize(
    ("node", "nodes", "words"),
    [
        (NEAR, (NEAR,), "the only node"),
        (None, (), "the only node"),
        (None, (NEAR, FAR), "where the caller runs: the GPU's node is not known"),
        (FAR, (NEAR, FAR), "where the caller runs: this process may not run on the GPU's node 1"),
    ],
)
def test_nothing_is_touched_where_it_would_not_help(node: Node | None, nodes: tuple[Node, ...], words: str) -> None:
    assert lock_near(refuse, node, nodes, HERE) == (refuse, words)


def test_a_lock_that_is_refused() -> None:
    taken: list[int] = []

    def lock(buffer: Tensor) -> Callable[[], None]:
        taken.append(buffer.numel())
        return taken.clear

    assert choose_lock(refuse, coherent=False) == (refuse, "")  # an error when memory is asked for
    assert choose_lock(lock, coherent=True) == (lock, "")
    assert taken == []
    unlocked, words = choose_lock(refuse, coherent=True)
    assert words == "exact, not page-locked: the device reads it where it lies"
    unlocked(map_pages(PAGE))()
    with pytest.raises(BackendUnusable, match=r"^torch\.cuda has no cudart"):
        choose_lock(None, coherent=True)
