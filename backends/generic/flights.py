"""Collectives that are under way on streams, and when it makes no sense to wait on for one.

A device library says little and late when a peer is lost. Here the host looks itself, whenever it waits for the device:
which collective has begun and does not end, since when, and whether the ranks that it can see still live.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from windlass.accelerator.errors import CollectiveTimeout, PeerLost
from windlass.accelerator.interface import Group, Work
from windlass.backends.cpu.peers import Peer
from windlass.backends.cpu.transport import Call

DEATH_SECONDS: Final = 0.5
"""A connection breaks a little before its process is gone, and a rank that leaves in order has sent all it had to."""


@dataclass
class _Flight:
    call: Call
    begun: Work  # reached when everything before the collective on its lane is over
    ended: Work
    seen: float | None = None  # when it was first seen to have begun
    dead: float | None = None  # when a peer was first seen to be dead while it waited


class Flights:
    """The collectives of one group, oldest first; the library carries them out in this order."""

    def __init__(
        self,
        group: Group,
        near: Sequence[Peer],  # the other ranks on this host, whose death can be seen
        timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._me = group.ranks[group.rank]
        self._near = tuple(near)
        self._timeout_seconds = timeout_seconds
        self._clock = clock
        self._flights: deque[_Flight] = deque()

    def add(self, call: Call, begun: Work, ended: Work) -> None:
        """Note a collective between two points of its lane."""
        self._forget_ended()
        self._flights.append(_Flight(call, begun, ended))

    @property
    def oldest(self) -> Call | None:
        """The collective that would end next, if any is under way."""
        self._forget_ended()
        return self._flights[0].call if self._flights else None

    def look(self) -> None:
        """Raise `PeerLost` or `CollectiveTimeout` if the oldest collective waits for what will not come."""
        self._forget_ended()
        if not self._flights or not self._flights[0].begun.done():
            return
        flight, now = self._flights[0], self._clock()
        flight.seen = now if flight.seen is None else flight.seen
        lost = next((peer for peer in self._near if not peer.is_alive()), None)
        if lost is not None:
            flight.dead = now if flight.dead is None else flight.dead
            if now - flight.dead >= DEATH_SECONDS:
                raise PeerLost(describe_death(lost, self._me, flight.call))
        if now - flight.seen >= self._timeout_seconds:
            raise CollectiveTimeout(describe_timeout(flight.call, self._timeout_seconds, self._me))

    def _forget_ended(self) -> None:
        while self._flights and self._flights[0].ended.done():
            self._flights.popleft()


def describe_death(peer: Peer, me: int, call: Call) -> str:
    return f"rank {peer.rank} (pid {peer.pid}) died while rank {me} waited for it in {call}"


def describe_timeout(call: Call, seconds: float, me: int) -> str:
    return (
        f"a rank did not arrive in {call} within {seconds:g} s while rank {me} waited; see what keeps it, or set "
        "WINDLASS_TIMEOUT to more seconds"
    )
