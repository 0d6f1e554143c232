"""Lanes of the CPU: one, and synchronous.

Every tensor operation is complete when it returns. Collectives are not: their bytes move when somebody waits for
their `Work`, which is how the interface orders them anyway, or for all lanes by `synchronize`.
"""

from __future__ import annotations

from collections.abc import Callable

from windlass.accelerator.interface import DoneWork, Event, Streams


class CpuStreams(Streams):
    """One lane. `finish` returns when no collective is under way."""

    def __init__(self, finish: Callable[[], None] = lambda: None) -> None:
        self._finish = finish

    def record(self) -> Event:
        return DoneWork()  # what a lane did is over, and so is every work that it waited for

    def synchronize(self) -> None:
        self._finish()
