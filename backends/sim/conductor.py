"""The one place where everything that happens on the simulated device is announced: checked by the ledger, timed by
the clock, and, where it is asynchronous, handed to the threads.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from windlass.accelerator.interface import LANES, DoneWork, Work
from windlass.backends.sim.clock import Clock
from windlass.backends.sim.errors import HostReadRefused
from windlass.backends.sim.lanes import LaneThreads
from windlass.backends.sim.ledger import Ledger, Past, Touch
from windlass.backends.sim.program import Program
from windlass.backends.sim.storages import Storages, address_of, extent, overlaps, poison
from windlass.backends.sim.watcher import unwatched
from windlass.backends.sim.works import SimEvent, SimWork

if TYPE_CHECKING:
    from windlass.backends.sim.machines import Machine
    from windlass.backends.sim.settings import SimSettings

__all__ = ["COMPUTE", "Conductor", "SimEvent", "SimWork"]

COMPUTE: Final = "compute"


class Conductor:
    """Lanes, their order and their threads. All methods are for the host's thread."""

    def __init__(self, settings: SimSettings, machine: Machine, *, rank: int = 0) -> None:
        self.current_lane = COMPUTE
        self.clock = Clock(machine)
        self.ledger = Ledger(LANES)
        self.storages = Storages(self.ledger)
        self.program = Program() if settings.uniform else None
        self.at_boundary: list[Callable[[], None]] = []
        self._settings = settings
        self._draws = {lane: random.Random(f"{settings.seed} {rank} {lane}") for lane in LANES}
        self._host_reads = 0
        self._joined: dict[str, set[SimWork]] = {lane: set() for lane in LANES}  # waited for there, perhaps still open
        self._threads = LaneThreads(rank)
        self._closed = False

    # -- issuing -------------------------------------------------------------------------------------------------

    def issue(
        self,
        lane: str,
        action: Callable[[], None],
        *,
        reads: Sequence[Tensor],
        writes: Sequence[Tensor],
        what: str,
        seconds: float,
        in_order: bool,
        after: Work | None = None,
        link_seconds: float = 0.0,
    ) -> SimWork:
        """Let the lane's thread call `action` once everything is over that the lane has waited for, and `after`.

        `what` names it in messages, `seconds` is what it takes on the simulated clock, and `link_seconds` for how long
        of it the link to the host is taken. `in_order` says that it may not overtake others of the lane that say so.
        Outputs that are no inputs as well are poisoned when it begins.
        Raises OrderViolation for a race, and what made the lane fail before.
        """
        if self._closed:
            raise ValueError(f"the device is closed, so {what} cannot be issued any more")
        self._threads.require_working(lane)
        pasts, works, not_before = self._resolve(after)
        actor = self.ledger.work(lane, what, *pasts)
        self.ledger.enter(actor, self._touches(lane, 0, what, reads, (), writes, track=True))
        assert actor.work is not None
        outputs = tuple(tensor for tensor in writes if not any(overlaps(tensor, read) for read in reads))
        draw = self._draws[lane].random()
        work = SimWork(
            self,
            lane,
            what,
            action,
            record=actor.work,
            past=self.ledger.after_work(actor.work),
            depends=self._open_works(lane) | works,
            outputs=outputs,
            inference=any(tensor.is_inference() for tensor in writes),
            in_order=in_order,
            end=self.clock.issue(lane, seconds, not_before, link_seconds),
            sleep=self._settings.pace * seconds,
            delay=self._settings.delay_ms / 1000 * -math.log1p(-draw),  # exponentially distributed
            draw=draw,
            issued_at=time.monotonic(),
        )
        self._threads.enqueue(work)
        return work

    def operation(
        self,
        what: object,
        *,
        reads: Sequence[Tensor] = (),
        updates: Sequence[Tensor] = (),
        writes: Sequence[Tensor] = (),
        seconds: float = 0.0,
    ) -> None:
        """Enter an operation of the current lane, which the host is about to carry out: what it reads, what it reads
        and writes, and what it only writes. Off the compute lane the host first waits for what the lane waits for."""
        lane = self.current_lane
        if lane != COMPUTE:
            self._threads.block(self._open_works(lane))
        number = self.ledger.tick(lane)
        touches = self._touches(lane, number, what, reads, updates, writes, track=lane != COMPUTE)
        if touches:
            self.ledger.enter(self.ledger.actor(lane, number, what), touches)
        if seconds:
            self.clock.advance(lane, seconds)

    def produced(self, what: object, tensors: Sequence[Tensor]) -> None:
        """The operation that was entered last has made new tensors."""
        lane = self.current_lane
        number = self.ledger.reached(lane)
        fresh = [tensor for tensor in tensors if self.storages.find(address_of(tensor)) is None]
        touches = self._touches(lane, number, what, (), (), fresh, track=lane != COMPUTE)
        if touches:
            self.ledger.enter(self.ledger.actor(lane, number, what), touches)

    def consume(self, tensors: Sequence[Tensor], what: str) -> None:
        """An operation that was entered has used the tensors up: they may not be read before they are rewritten."""
        for tensor in tensors:
            start, stop, _ = extent(tensor)
            tracked = self.storages.find_or_track(tensor)
            if tracked is not None and start < stop:
                self.ledger.consume(tracked, start, stop, what)
                with unwatched():
                    poison(tensor)

    def retire(self, tensor: Tensor, gone: str, after: Work | None = None) -> None:
        """Nobody may use the tensor's storage any more; it is poisoned once `after`, and all that the current lane has
        waited for, is over. Raises OrderViolation if somebody else may still be using it."""
        lane = self.current_lane
        pasts, works, _ = self._resolve(after)
        tracked = self.storages.find_or_track(tensor)
        if tracked is None:
            return
        with unwatched():
            whole = torch.empty(0, dtype=torch.uint8, device="cpu").set_(tensor.untyped_storage())
        actor = self.ledger.work(lane, "release", *pasts)
        assert actor.work is not None
        self.ledger.enter(actor, [Touch(tracked, 0, whole.numel(), read=False, write=True)])
        tracked.gone = gone
        tracked.accesses.clear()
        depends = frozenset(work for work in self._open_works(lane) | works if not work.complete)
        if depends and not self._closed:
            past = self.ledger.after_work(actor.work)
            self._threads.enqueue(
                SimWork(self, lane, "release", lambda: poison(whole), record=actor.work, past=past, depends=depends)
            )
        else:
            with unwatched():
                poison(whole)

    def read_host(self, tensor: Tensor, tag: str) -> list[float]:
        """The values of a small vector; HostReadRefused for more reads tagged "step" than a step may make."""
        if tag == "step":
            self._host_reads += 1
            if self._host_reads > self._settings.host_reads:
                raise HostReadRefused(
                    f"read_host is called {self._host_reads} times between two boundaries, where "
                    f"{self._settings.host_reads} may be; join what a step reads in one vector, or give another tag to "
                    "what is no part of the step"
                )
        self.operation("read_host", reads=(tensor,))
        if tag == "step" and self.program is not None:
            self.program.read(tensor)
        with unwatched():
            return [float(value) for value in tensor.detach().reshape(-1).tolist()]

    # -- order ---------------------------------------------------------------------------------------------------

    def record(self) -> SimEvent:
        """A point of the current lane: its operations so far, and what it has waited for."""
        lane = self.current_lane
        return SimEvent(self, self.ledger.past(lane), self._open_works(lane), self.clock.now(lane))

    def join(self, target: SimWork | SimEvent) -> None:
        """Order the current lane after the target. Only the compute lane makes the host wait."""
        lane = self.current_lane
        if lane == COMPUTE:
            self._threads.block(target.works)
        else:
            self._threads.raise_failed(target.works)
            self._joined[lane] |= target.works
        self.ledger.join(lane, target.past)
        self.clock.reach(lane, target.time)

    def block(self, works: frozenset[SimWork]) -> None:
        """Block the host until the works are over; what failed is raised."""
        self._threads.block(works)

    def block_until_failed(self, works: frozenset[SimWork]) -> None:
        """Block the host until the works are over or one has failed, which is raised."""
        self._threads.block_until_failed(works)

    def synchronize(self) -> None:
        """Block the host until everything is over."""
        if self.program is not None:
            self.program.synchronized()
        self._threads.drain()
        self._threads.raise_unreported()
        self.ledger.join_all(self.storages.all())
        self.clock.level()
        for joined in self._joined.values():
            joined.clear()

    def boundary(self) -> None:
        """The end of a step."""
        self._threads.raise_unreported()
        self._host_reads = 0
        if self.program is not None:
            self.program.end()
        for action in self.at_boundary:
            action()
        self.storages.sweep()

    def close(self) -> None:
        """End the threads: what is under way may take half a second more, what is then still open fails."""
        self._closed = True
        self._threads.close()

    # -- inside --------------------------------------------------------------------------------------------------

    def _touches(
        self,
        lane: str,
        number: int,
        what: object,
        reads: Sequence[Tensor],
        updates: Sequence[Tensor],
        writes: Sequence[Tensor],
        *,
        track: bool,
    ) -> list[Touch]:
        return self.storages.touches(reads, updates, writes, lane, number, what, track=track)

    def _resolve(self, after: Work | None) -> tuple[list[Past], frozenset[SimWork], float]:
        """What waiting for `after` means: in the ledger, for threads, and on the clock."""
        if isinstance(after, SimWork | SimEvent):
            self._threads.raise_failed(after.works)
            return [after.past], after.works, after.time
        if after is not None and not isinstance(after, DoneWork):
            after.wait()  # of another device
        return [], frozenset(), 0.0

    def _open_works(self, lane: str) -> frozenset[SimWork]:
        joined = self._joined[lane]
        joined -= {work for work in joined if work.complete and work.error is None}
        return frozenset(joined)
