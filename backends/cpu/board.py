"""Everything one rank has under way on shared pages, and how it waits without holding up anybody.

Note: why ranks that wait at different moments cannot deadlock
--------------------------------------------------------------
A call announces that the rank has arrived and where its input lies; the bytes are moved later, by their
receiver, once all ranks of the group have arrived. A rank blocks for three reasons only: a peer has not
*arrived* in a call, a peer is not *done* reading an input that is to be rewritten (`wait` on an input that
lies in a shared region, a staging buffer that is needed again), or a peer is not done with the record that
a call RING calls later takes over.

Peers read by themselves, so nobody has to be served, but a peer is done only when it gets round to reading.
The rule is therefore: **whoever blocks, for whatever reason, meanwhile completes every call of every group
in which all ranks have arrived** (`Board.advance`), and so does every new call for its own group.

Suppose all ranks of a job are blocked for ever. They make the same calls in the same order, so order all
calls accordingly and take the first call c that some rank is not done with. If a rank has not arrived in c,
it is blocked in or after an earlier call; but all of those are done everywhere, so nothing blocks it. So
all have arrived in c, and c is the first of its group that is not done; then the rule completes it on
every blocked rank. Contradiction. When a rank waits, and for which of its works, does not enter into this.

Where some groups of a job meet through gloo, a rank cannot complete anything while it waits there, so it first
completes all that it has entered (`Board.finish_entered`); those calls are earlier, so the argument still holds.

A rank that computes for long without calling delays its peers' `wait` as any late rank does; one that dies,
leaves or gives up is seen, and named, by all that wait for it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final, NoReturn, Protocol

import numpy as np

from windlass.accelerator.errors import CollectiveMismatch, WindlassError
from windlass.backends.cpu.atomics import find_behind
from windlass.backends.cpu.regions import RegionTable

_LOOKS: Final = 100  # looks at the peers' words between two offers of the core to another process
_YIELDS: Final = 200  # such offers, a tenth of a millisecond or so, before it sleeps
_SHORTEST_SLEEP: Final = 20e-6
_LONGEST_SLEEP: Final = 500e-6

Words = np.ndarray[tuple[int], np.dtype[np.int64]]


class Waiter(Protocol):
    """A group as the board sees it."""

    def advance(self) -> None:
        """Complete what can be completed without waiting."""

    def finish_entered(self) -> None:
        """Wait for every call that was entered."""

    def abort(self, error: BaseException) -> None:
        """Tell the peers of the group that this rank gave up."""


class Board:
    """The groups of one rank that meet on shared pages."""

    def __init__(self, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        self.regions = RegionTable()
        self.waiters: list[Waiter] = []
        self._failure: BaseException | None = None

    def advance(self) -> None:
        for waiter in self.waiters:
            waiter.advance()

    def finish_entered(self) -> None:
        """Complete all that is under way, before waiting where nothing can be completed meanwhile."""
        for waiter in self.waiters:
            waiter.finish_entered()

    @property
    def failed(self) -> bool:
        return self._failure is not None

    def check(self) -> None:
        """Raise again what broke this rank's collectives."""
        if self._failure is None:
            return
        if isinstance(self._failure, WindlassError):
            raise type(self._failure)(str(self._failure)) from self._failure
        raise CollectiveMismatch(f"an earlier collective of this rank failed: {self._failure!r}") from self._failure

    def fail(self, error: BaseException) -> NoReturn:
        """Tell all peers that this rank gave up, and raise the error."""
        if self._failure is None:
            self._failure = error
            for waiter in self.waiters:
                waiter.abort(error)
        raise error

    def wait(self, words: Words, target: int, check_peers: Callable[[float], None]) -> None:
        """Return once every word, at the addresses in `words`, has reached `target`.

        `check_peers` is called now and then with the seconds waited so far, and raises when waiting on is
        pointless.
        """
        for _ in range(_YIELDS):
            if find_behind(words, target, _LOOKS) < 0:
                return
            os.sched_yield()
        started = time.monotonic()
        pause = _SHORTEST_SLEEP
        while find_behind(words, target, 1) >= 0:
            self.advance()
            check_peers(time.monotonic() - started)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_SLEEP)
