"""The threads of the lanes: each carries out what was issued there late, in an order drawn from the seed.

[Note: nothing waits in a circle]
A work depends only on works that were issued before it, and a thread takes up only what depends on nothing that is
still open. So the oldest open work can always begin, save a collective whose lane has an older one, and then that is
open too. A collective that has begun waits for the other ranks, and there the same holds.
"""

from __future__ import annotations

import math
import threading
import time
from typing import Final

import torch

from windlass.accelerator.errors import WindlassError
from windlass.accelerator.interface import LANES
from windlass.backends.sim.storages import poison
from windlass.backends.sim.works import SimWork

_DRAIN_SECONDS: Final = 0.5  # that `close` gives to works which are under way
_JOIN_SECONDS: Final = 0.3


class LaneThreads:
    """A queue and a thread for each lane. The public methods are for the host's thread."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._changed = threading.Condition()
        # What follows is shared with the lanes' threads, under the condition.
        self._queues: dict[str, list[SimWork]] = {lane: [] for lane in LANES}
        self._running: dict[str, SimWork] = {}
        self._threads: dict[str, threading.Thread] = {}
        self._broken: dict[str, SimWork] = {}  # lane -> the work that failed there first
        self._unreported: list[SimWork] = []
        self._stop = threading.Event()

    def enqueue(self, work: SimWork) -> None:
        """Hand a work to its lane, which fails it at once if the lane is broken."""
        with self._changed:
            broken = self._broken.get(work.lane)
            if broken is not None:
                self._complete(work, broken.error, broken)
                return
            self._queues[work.lane].append(work)
            if work.lane not in self._threads:
                name = f"sim rank {self._rank} lane {work.lane}"
                thread = threading.Thread(target=self._run, args=(work.lane,), name=name, daemon=True)
                self._threads[work.lane] = thread
                thread.start()
            self._changed.notify_all()

    def block(self, works: frozenset[SimWork]) -> None:
        """Wait until the works are over; what failed is raised."""
        with self._changed:
            self._changed.wait_for(lambda: all(work.complete for work in works))
        self.raise_failed(works)

    def block_until_failed(self, works: frozenset[SimWork]) -> None:
        """Wait until the works are over, or one of them has failed, and raise that."""
        with self._changed:
            self._changed.wait_for(
                lambda: all(work.complete for work in works) or any(work.error is not None for work in works)
            )
        self.raise_failed(works)

    def drain(self) -> None:
        """Wait until everything is over."""
        with self._changed:
            self._changed.wait_for(self._is_idle)

    def close(self) -> None:
        """End the threads: what is under way may take half a second more, what is then still open fails."""
        if self._stop.is_set():
            return
        with self._changed:
            self._changed.wait_for(lambda: self._is_idle() or bool(self._broken), timeout=_DRAIN_SECONDS)
            self._stop.set()
            for lane in LANES:
                under_way = [self._running[lane]] if lane in self._running else []
                for work in (*self._queues[lane], *under_way):
                    self._complete(work, WindlassError("the device was closed before it was over"))
                self._queues[lane].clear()
            self._unreported.clear()
            self._changed.notify_all()
        deadline = time.monotonic() + _JOIN_SECONDS
        for thread in self._threads.values():
            thread.join(max(deadline - time.monotonic(), 0.0))

    # -- errors: kept where they happen, raised on the host ------------------------------------------------------

    def require_working(self, lane: str) -> None:
        """Raise what made the lane fail."""
        broken = self._broken.get(lane)
        if broken is not None:
            self._report(broken)
            raise broken.failure() from broken.error

    def raise_failed(self, works: frozenset[SimWork]) -> None:
        """Raise what made one of them fail."""
        for work in works:
            if work.complete and work.error is not None:
                self._report(work.blamed or work)
                raise work.failure() from work.error

    def raise_unreported(self) -> None:
        """Raise the first failure that nobody has been told of."""
        with self._changed:
            work = self._unreported[0] if self._unreported else None
            self._unreported.clear()
        if work is not None:
            raise work.failure() from work.error

    def _report(self, work: SimWork) -> None:
        with self._changed:
            if work in self._unreported:
                self._unreported.remove(work)

    # -- inside the threads --------------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        return not self._running and not any(self._queues.values())

    def _run(self, lane: str) -> None:
        """The thread of a lane."""
        while True:
            with self._changed:
                work, patience = self._choose(lane)
                while work is None:
                    if self._stop.is_set():
                        return
                    self._changed.wait(patience)
                    work, patience = self._choose(lane)
                self._queues[lane].remove(work)
                self._running[lane] = work
            error = self._carry_out(work)
            with self._changed:
                del self._running[lane]
                self._complete(work, error)
                self._changed.notify_all()

    def _choose(self, lane: str) -> tuple[SimWork | None, float | None]:
        """The work to begin now, or how many seconds to wait for one that could (None: until something changes)."""
        now = time.monotonic()
        chosen: SimWork | None = None
        patience: float | None = None
        met_ordered = False
        for work in list(self._queues[lane]):
            if work.in_order:
                if met_ordered:
                    continue
                met_ordered = True
            if work.ready_at is None:
                if not all(other.complete for other in work.depends):
                    continue
                failed = next((other for other in work.depends if other.error is not None), None)
                if failed is not None:
                    self._queues[lane].remove(work)
                    self._complete(work, failed.error, failed.blamed or failed)
                    self._changed.notify_all()
                    return self._choose(lane)
                work.ready_at = max([work.finished_at, *(other.finished_at for other in work.depends)]) + work.delay
            if work.ready_at > now:
                patience = min(patience or math.inf, work.ready_at - now)
            elif chosen is None or work.draw < chosen.draw:
                chosen = work
        return chosen, patience

    def _carry_out(self, work: SimWork) -> BaseException | None:
        assert work.action is not None
        try:
            if work.sleep:
                self._stop.wait(work.sleep)
            with torch.inference_mode(work.inference), torch.no_grad():
                for output in work.outputs:
                    poison(output)
                work.action()
        except BaseException as error:  # nobody above could be told: it is raised where the work is waited for
            return error
        return None

    def _complete(self, work: SimWork, error: BaseException | None, blamed: SimWork | None = None) -> None:
        """The work is over. When one fails its lane goes no further: the ranks would not meet as they should."""
        if work.complete:
            return
        work.finished_at = time.monotonic()
        work.error, work.blamed = error, blamed
        work.complete = True
        work.action, work.depends, work.outputs = None, frozenset(), ()
        if error is None:
            return
        if blamed is None and not self._stop.is_set():
            self._unreported.append(work)
        self._broken.setdefault(work.lane, blamed or work)
        followers = self._queues[work.lane][:]
        self._queues[work.lane].clear()
        for follower in followers:
            self._complete(follower, error, blamed or work)
