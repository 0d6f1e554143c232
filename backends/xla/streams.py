"""Lanes of a lazy device: names only, since operations are ordered by the data that they need.

Nothing is run by entering a lane, recording a point or waiting for one. Only a boundary runs what is pending, and
`synchronize`, which waits for it too.
"""

from __future__ import annotations

from collections.abc import Callable

from windlass.accelerator.interface import DoneWork, Event, Streams
from windlass.backends.xla.programs import run_pending, wait_until_idle


class LazyLanes(Streams):
    """`finish` ends the collectives that are under way; `before_boundary` is called with the boundary's number, from
    1, before what is pending is run."""

    def __init__(
        self, finish: Callable[[], None] = lambda: None, before_boundary: Callable[[int], None] = lambda number: None
    ) -> None:
        self._finish = finish
        self._before_boundary = before_boundary
        self._boundaries = 0

    def record(self) -> Event:
        return DoneWork()  # what comes later and needs what came before cannot run without it

    def synchronize(self) -> None:
        self._finish()
        wait_until_idle()

    def boundary(self) -> None:
        """Run what is pending, and return while it runs."""
        self._boundaries += 1
        self._before_boundary(self._boundaries)
        run_pending()
