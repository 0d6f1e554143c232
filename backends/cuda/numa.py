"""Host memory on the GPU's own node: a page lies where the thread ran that touched it first.

So pages are touched by threads that are bound to the node's CPUs, before they are page-locked: locking would touch them
from wherever the caller happens to run. Over the wrong node copies are slower, and take the link between the nodes
from others.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Final

from torch import Tensor

from windlass.backends.cpu.shared_pages import PAGE
from windlass.backends.cuda.layout import Node
from windlass.backends.generic.host_memory import PageLock

_THREADS: Final = 8  # a page fault takes about a microsecond; 100 GiB are 26 million small ones
_LEAST: Final = 2**28  # bytes per thread


def touch_on(buffer: Tensor, cpus: frozenset[int]) -> None:
    """Make the whole pages under a uint8 tensor lie on the node of `cpus`; they must not have been used yet."""
    count = max(1, min(_THREADS, len(cpus), buffer.numel() // _LEAST))
    part = -(-buffer.numel() // count // PAGE) * PAGE
    failures: list[OSError] = []

    def touch(begin: int) -> None:
        try:
            os.sched_setaffinity(0, cpus)  # 0: this thread, which ends here and takes its binding along
        except OSError as error:
            failures.append(error)
            return
        buffer.numpy()[begin : begin + part : PAGE] = 0  # numpy writes it in this thread; torch may use others

    threads = [threading.Thread(target=touch, args=(begin,)) for begin in range(0, buffer.numel(), part)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def lock_near(
    lock: PageLock, node: Node | None, nodes: Sequence[Node], allowed: frozenset[int]
) -> tuple[PageLock, str]:
    """A page lock whose pages lie on `node`, and in words for the facts where they lie.

    `allowed` are the CPUs on which this process may run. Where none of them is the node's, or nobody knows the node,
    pages lie where the caller happens to run.
    """
    if sum(bool(one.cpus) for one in nodes) <= 1:
        return lock, "the only node"
    if node is None:
        return lock, "where the caller runs: the GPU's node is not known"
    cpus = node.cpus & allowed
    if not cpus:
        return lock, f"where the caller runs: this process may not run on the GPU's node {node.number}"

    def lock_there(buffer: Tensor) -> Callable[[], None]:
        touch_on(buffer, cpus)
        return lock(buffer)

    return lock_there, f"node {node.number}, the GPU's own"
