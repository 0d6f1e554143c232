"""The life of a call on shared pages: entered, completed once all have arrived, and waited for.

See the note in `board` for why this cannot deadlock.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from windlass.accelerator.errors import CollectiveMismatch, PeerLost, WindlassError
from windlass.accelerator.interface import Group, Work
from windlass.backends.cpu.atomics import find_behind
from windlass.backends.cpu.board import Board
from windlass.backends.cpu.control_page import (
    GAVE_UP,
    MISMATCHED,
    REGION,
    RING,
    STAGING,
    ControlPage,
    InputPlace,
    word_addresses,
)
from windlass.backends.cpu.inputs import Inputs
from windlass.backends.cpu.peers import Peer
from windlass.backends.cpu.shared_pages import Door
from windlass.backends.cpu.transport import Call, describe, describe_mismatch
from windlass.backends.cpu.watch import PeerWatch

Move = Callable[[int], None]  # reads the peers' inputs to the call of this number; needs only that all have arrived


@dataclass(frozen=True)
class Operation:
    """A call that this rank has entered and not completed."""

    number: int
    call: Call
    move: Move


class MeetingWork(Work):
    """A call on shared pages; whoever waits for it moves the bytes."""

    def __init__(self, meetings: Meetings, number: int, call: Call, until_read: bool) -> None:
        self.number = number
        self.call = call
        self._meetings = meetings
        self._until_read = until_read  # peers read the input in memory that is written again

    def wait(self) -> None:
        self._meetings.finish(self.number, self.call, self._until_read)

    def done(self) -> bool:
        return self._meetings.is_finished(self.number, self._until_read)


class Meetings:
    """The calls of one group, numbered from 1 on every rank alike."""

    def __init__(
        self, group: Group, peers: Sequence[Peer], control: Sequence[ControlPage], door: Door, board: Board
    ) -> None:
        self.inputs = Inputs(group, peers, control, door, board.regions)
        self._group = group
        self._control = tuple(control)  # by index in the group, as are `peers`
        self._own = control[group.rank]
        self._board = board
        self._watch = PeerWatch(group, peers, control, board)
        self._arrived = word_addresses([one.arrived_address for one in control])
        self._done = word_addresses([one.done_address for one in control])
        self._outstanding: deque[Operation] = deque()
        self._entered = 0
        self._completed = 0
        self._last: Call | None = None
        self._closed = False
        board.waiters.append(self)

    def enter(
        self,
        call: Call,
        input: Tensor | None,  # what peers may read
        move: Move,
        *,
        copied: bool = False,  # the input is written before peers are done, so they get a copy
        splits: tuple[int, ...] = (),
        place: InputPlace | None = None,
    ) -> MeetingWork:
        """Announce a call and return; its bytes move later."""
        self._board.check()
        self.advance()
        unsealed = self.inputs.unsealed
        if unsealed and find_behind(self._done, unsealed, 1) < 0:
            self.inputs.seal()
        number = self._entered + 1
        if number > RING:
            self._wait_until_done(number - RING, call)
        place = place or self.inputs.place(number, input, copied)
        if place.where == STAGING and input is not None:
            self._wait_until_done(self.inputs.staging_used, call)
            place = self.inputs.stage(number, input)
        self._own.write(number, call.words, call.tag, place, splits)
        self._own.arrive(number)
        self._entered = number
        self._outstanding.append(Operation(number, call, move))
        self._last = call
        return MeetingWork(self, number, call, until_read=place.where in (REGION, STAGING))

    def advance(self) -> None:
        """Complete, in order, the calls in which everybody has arrived. Never waits."""
        while self._outstanding and find_behind(self._arrived, self._outstanding[0].number, 1) < 0:
            operation = self._outstanding.popleft()
            try:
                self._compare(operation.number)
                self.inputs.meet(operation.number)
                operation.move(operation.number)
            except BaseException as error:
                self._board.fail(error)
            self._completed = operation.number
            self._own.finish(operation.number)

    def finish(self, number: int, call: Call, until_read: bool) -> None:
        """Wait until call `number` is complete here, and, where `until_read`, on every rank."""
        while self._completed < number:
            self._board.check()
            if self._closed:
                raise PeerLost(f"this rank left group {self._group.name!r} before it waited for {call}")
            head = self._outstanding[0]
            if find_behind(self._arrived, head.number, 1) >= 0:
                watch = self._watch.watch(self._arrived, head.number, head.call, "arrive in")
                self._board.wait(self._arrived, head.number, watch)
            self.advance()
        if until_read and not self._closed:
            self._wait_until_done(number, call)

    def finish_everywhere(self, work: MeetingWork) -> None:
        """Wait until all ranks have completed the call."""
        work.wait()
        self._wait_until_done(work.number, work.call)

    def finish_entered(self, *, until_read: bool = False) -> None:
        """Wait for every call that was entered, and, where `until_read`, for all ranks to have completed it."""
        if self._closed or self._board.failed:
            return
        if self._outstanding:
            last = self._outstanding[-1]
            self.finish(last.number, last.call, False)
        if until_read and self._last is not None:
            self._wait_until_done(self._entered, self._last)

    def is_finished(self, number: int, until_read: bool) -> bool:
        if not self._closed:
            self.advance()
        return self._completed >= number and (not until_read or find_behind(self._done, number, 1) < 0)

    def abort(self, error: BaseException) -> None:
        text = str(error) if isinstance(error, WindlassError) else f"{type(error).__name__}: {error}"
        self._own.abort(MISMATCHED if isinstance(error, CollectiveMismatch) else GAVE_UP, text)

    def close(self) -> None:
        if self._closed:
            return
        try:
            if not self._board.failed:
                with contextlib.suppress(PeerLost):  # it has left before us, which is no error while leaving
                    self.advance()
        finally:
            self._closed = True
            self._own.leave()
            self._board.waiters.remove(self)
            self._outstanding.clear()
            self.inputs.close()

    def _wait_until_done(self, number: int, call: Call) -> None:
        if find_behind(self._done, number, 1) >= 0:
            self._board.wait(self._done, number, self._watch.watch(self._done, number, call, "finish"))

    def _compare(self, number: int) -> None:
        first = self._control[0].call_bytes(number)
        for index, control in enumerate(self._control):
            if control.call_bytes(number) != first:
                calls = [describe(*one.read_call(number)) for one in (self._control[0], control)]
                ranks = self._group.ranks[0], self._group.ranks[index]
                raise CollectiveMismatch(describe_mismatch(ranks[0], calls[0], ranks[1], calls[1]))
