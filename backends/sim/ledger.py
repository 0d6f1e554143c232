"""Who touched which bytes, and what was ordered before what: pure logic, without tensors, threads or time.

[Note: order]
Every lane numbers its operations. `Past` says what is ordered before a point: of each lane the operations up to a
number. A lane's operations are ordered by their numbers. A work is not: it begins after the past of its issue, and is
in the past of a lane from the number on at which the lane joined it. An event is the past of the lane that recorded
it; a lane that waits for the event takes it over. So a past never grows, whatever the number of works.

[Note: what may be forgotten]
An access is forgotten when a later one over the same bytes is ordered after it and conflicts with no less: whatever
comes after the later one comes after both, and whatever races with the earlier one races with the later one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from windlass.backends.sim.errors import OrderViolation

_MANY_ACCESSES: Final = 512  # of one storage; beyond, those that every lane is ordered after are forgotten
_MOST_RECENT: Final = 50_000


@dataclass(frozen=True, slots=True)
class Past:
    """All that is ordered before a point."""

    reached: tuple[int, ...]  # by lane: its operations up to this number
    works: frozenset[WorkRecord] = frozenset()  # and works that were waited for without a lane (`after=`)


@dataclass(eq=False, slots=True)
class WorkRecord:
    """A work in the ledger."""

    past: Past
    joined: dict[int, int] = field(default_factory=dict)  # lane -> the number at which it joined


@dataclass(frozen=True, slots=True)
class Actor:
    """Who accesses: an operation of a lane, or a work issued there."""

    what: object  # its str() names it in messages
    lane: int
    number: int
    past: Past
    work: WorkRecord | None = None


@dataclass(frozen=True, slots=True)
class Access:
    """Bytes [start, stop) of one storage, read or written by an actor."""

    what: object
    lane: int
    number: int
    work: WorkRecord | None
    start: int
    stop: int
    write: bool


@dataclass(eq=False, slots=True)
class Tracked:
    """A storage whose accesses are entered."""

    label: str  # how messages call it
    origin: int = 0  # where it begins, for messages
    accesses: list[Access] = field(default_factory=list)
    consumed: list[tuple[int, int, str]] = field(default_factory=list)  # [start, stop), by what
    gone: str = ""  # why nobody may touch it any more
    thin_at: int = _MANY_ACCESSES  # with so many accesses it is worth looking for some to forget

    def shift(self, distance: int) -> None:
        """Its contents now lie so many bytes further on in their storage."""
        self.origin += distance
        self.accesses = [
            replace(access, start=access.start + distance, stop=access.stop + distance) for access in self.accesses
        ]
        self.consumed = [(start + distance, stop + distance, what) for start, stop, what in self.consumed]


@dataclass(frozen=True, slots=True)
class Touch:
    """What an actor is about to do with bytes [start, stop) of a storage."""

    tracked: Tracked
    start: int
    stop: int
    read: bool
    write: bool
    dense: bool = True  # every byte of the range is meant, not only some


class Ledger:
    """Accesses and their order on the lanes of one device."""

    def __init__(self, lanes: Sequence[str]) -> None:
        self._lanes = tuple(lanes)
        self._index = {lane: index for index, lane in enumerate(self._lanes)}
        self._reached = [[0] * len(self._lanes) for _ in self._lanes]  # [lane][of lane]
        # Of memory that is not tracked: address -> the last (lane, number, what), of reads and of writes.
        self._recent: tuple[dict[int, tuple[int, int, object]], ...] = ({}, {})

    # -- order ---------------------------------------------------------------------------------------------------

    def tick(self, lane: str) -> int:
        """The number of the next operation on the lane, which begins now."""
        index = self._index[lane]
        self._reached[index][index] += 1
        return self._reached[index][index]

    def reached(self, lane: str) -> int:
        """The number of the last operation on the lane."""
        return self._reached[self._index[lane]][self._index[lane]]

    def past(self, lane: str, *after: Past) -> Past:
        """What is ordered before whatever comes next on the lane and, beyond that, waits for `after`."""
        reached = tuple(self._reached[self._index[lane]])
        if not after:
            return Past(reached)
        works: set[WorkRecord] = set()
        for past in after:
            reached = tuple(map(max, reached, past.reached))
            works |= past.works
        return Past(reached, frozenset(work for work in works if not _has_joined(work, reached)))

    def actor(self, lane: str, number: int, what: object) -> Actor:
        """The operation of the lane that `tick` has just numbered."""
        return Actor(what, self._index[lane], number, self.past(lane))

    def work(self, lane: str, what: object, *after: Past) -> Actor:
        """A work issued on the lane, which also waits for `after`."""
        past = self.past(lane, *after)
        return Actor(what, self._index[lane], 0, past, WorkRecord(past))

    def after_work(self, record: WorkRecord) -> Past:
        """The past of whatever waits for the work."""
        return Past(record.past.reached, record.past.works | {record})

    def join(self, lane: str, past: Past) -> None:
        """The lane has waited for an event, or (`after_work`) for a work."""
        index, number = self._index[lane], self.tick(lane)
        self._reached[index] = list(map(max, self._reached[index], past.reached))
        for work in past.works:
            work.joined.setdefault(index, number)

    def join_all(self, storages: Sequence[Tracked]) -> None:
        """Everything is over: whatever comes next, on any lane, comes after it."""
        self._reached = [list(map(max, *self._reached)) for _ in self._lanes]
        for recent in self._recent:
            recent.clear()
        for tracked in storages:
            tracked.accesses.clear()

    # -- accesses ------------------------------------------------------------------------------------------------

    def enter(self, actor: Actor, touches: Sequence[Touch]) -> None:
        """Enter all touches of one actor, or raise OrderViolation and enter none."""
        for touch in touches:
            self._check(actor, touch)
        for touch in touches:
            self._record(actor, touch)

    def consume(self, tracked: Tracked, start: int, stop: int, what: str) -> None:
        """The bytes hold nothing any more, and may be read when they have been rewritten."""
        tracked.consumed.append((start, stop, what))

    def is_settled(self, tracked: Tracked, lane: str) -> bool:
        """Whether everything that happened to the storage is ordered before what comes next on the lane."""
        past = self.past(lane)
        return all(_is_ordered(access, past) for access in tracked.accesses)

    def note(self, address: int, lane: str, number: int, what: object, write: bool) -> None:
        """An operation on memory that is not tracked: the last read and write of it are known if it ever is."""
        recent = self._recent[write]
        recent[address] = (self._index[lane], number, what)
        if len(recent) > _MOST_RECENT:
            for old in list(recent)[: _MOST_RECENT // 2]:
                del recent[old]

    def recall(self, address: int, nbytes: int) -> list[Access]:
        """What `note` knows about memory that is going to be tracked."""
        found = []
        for write in (False, True):
            known = self._recent[write].pop(address, None)
            if known is not None:
                lane, number, what = known
                found.append(Access(what, lane, number, None, 0, nbytes, write))
        return found

    def _check(self, actor: Actor, touch: Touch) -> None:
        tracked, start, stop = touch.tracked, touch.start, touch.stop
        if tracked.gone:
            raise OrderViolation(f"{self._name(actor)} uses {tracked.label}, which {tracked.gone}")
        if touch.read:
            for begin, end, what in tracked.consumed:
                if begin < stop and start < end:
                    raise OrderViolation(
                        f"{self._name(actor)} reads {_bytes_of(tracked, max(begin, start), min(end, stop))}, "
                        f"which {what} has consumed; use what it returned, or rewrite them first"
                    )
        for access in tracked.accesses:
            overlap = access.start < stop and start < access.stop
            if overlap and (access.write or touch.write) and not _is_ordered(access, actor.past):
                raise OrderViolation(self._describe(actor, touch, access))

    def _record(self, actor: Actor, touch: Touch) -> None:
        start, stop = touch.start, touch.stop
        kept: list[Access] = []
        for access in touch.tracked.accesses:
            apart = access.stop <= start or stop <= access.start
            if apart or (access.write and not touch.write) or not _is_ordered(access, actor.past):
                kept.append(access)
            else:
                kept += _cut(access, start, stop)
        kept.append(Access(actor.what, actor.lane, actor.number, actor.work, start, stop, touch.write))
        if len(kept) > touch.tracked.thin_at:
            kept = self._thin(kept)
            touch.tracked.thin_at = max(_MANY_ACCESSES, 2 * len(kept))
        touch.tracked.accesses = kept
        if touch.write and touch.dense and touch.tracked.consumed:
            touch.tracked.consumed = [
                piece for one in touch.tracked.consumed for piece in _without(one, start, stop)
            ]  # fmt: skip

    def _thin(self, accesses: list[Access]) -> list[Access]:
        pasts = [self.past(lane) for lane in self._lanes]  # a lane that nobody has used yet may be, and races then
        return [access for access in accesses if not all(_is_ordered(access, past) for past in pasts)]

    # -- messages ------------------------------------------------------------------------------------------------

    def _name(self, who: Actor | Access) -> str:
        return f"{who.what} on lane {self._lanes[who.lane]}"

    def _describe(self, actor: Actor, touch: Touch, access: Access) -> str:
        here = self._lanes[actor.lane]
        if access.work is None:
            missing = f"record an event on lane {self._lanes[access.lane]} after it and wait for that on lane {here}"
        elif access.work.joined:
            lanes = " and ".join(self._lanes[lane] for lane in access.work.joined)
            missing = (
                f"that work was waited for on lane {lanes} only: wait for it, or for an event recorded there "
                f"afterwards, on lane {here}"
            )
        else:
            missing = f"call wait() of that work on lane {here}"
        both = _bytes_of(touch.tracked, max(touch.start, access.start), min(touch.stop, access.stop))
        return (
            f"{self._name(actor)} {'writes' if touch.write else 'reads'} {both}, which {self._name(access)} "
            f"{'writes' if access.write else 'reads'}, and nothing orders the two; {missing} first"
        )


def _bytes_of(tracked: Tracked, start: int, stop: int) -> str:
    return f"bytes {start - tracked.origin} to {stop - tracked.origin} of {tracked.label}"


def _has_joined(work: WorkRecord, reached: tuple[int, ...]) -> bool:
    return any(reached[lane] >= number for lane, number in work.joined.items())


def _is_ordered(access: Access, past: Past) -> bool:
    if access.work is None:
        return past.reached[access.lane] >= access.number
    return access.work in past.works or _has_joined(access.work, past.reached)


def _cut(access: Access, start: int, stop: int) -> list[Access]:
    """What is left of an access without bytes [start, stop)."""
    return [
        Access(access.what, access.lane, access.number, access.work, first, last, access.write)
        for first, last in ((access.start, min(access.stop, start)), (max(access.start, stop), access.stop))
        if first < last
    ]


def _without(consumed: tuple[int, int, str], start: int, stop: int) -> list[tuple[int, int, str]]:
    begin, end, what = consumed
    return [(first, last, what) for first, last in ((begin, min(end, start)), (max(begin, stop), end)) if first < last]
