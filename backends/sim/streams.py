"""Lanes of the simulated device: order is what was declared, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from windlass.accelerator.interface import LANES, Event, Streams
from windlass.backends.sim.conductor import Conductor


class SimStreams(Streams):
    """The conductor's lanes, as the interface shows them."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    @contextmanager
    def lane(self, name: str) -> Iterator[None]:
        if name not in LANES:
            raise ValueError(f"there is no lane named {name!r}; the lanes are {', '.join(LANES)}")
        before, self._conductor.current_lane = self._conductor.current_lane, name
        try:
            yield
        finally:
            self._conductor.current_lane = before

    def record(self) -> Event:
        """A point after the operations of the current lane and everything that it has waited for. Works that were
        issued on the lane and not waited for there are not included."""
        return self._conductor.record()

    def synchronize(self) -> None:
        self._conductor.synchronize()

    def boundary(self) -> None:
        self._conductor.boundary()
