"""What the conductor hands out to be waited for: works, and recorded points of a lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from windlass.accelerator.errors import WindlassError
from windlass.accelerator.interface import Work
from windlass.backends.sim.ledger import Past, WorkRecord

if TYPE_CHECKING:
    from windlass.backends.sim.conductor import Conductor


class SimWork(Work):
    """A copy or a collective, carried out late on the thread of its lane."""

    def __init__(
        self,
        conductor: Conductor,
        lane: str,
        what: str,
        action: Callable[[], None],
        *,
        record: WorkRecord,
        past: Past,  # of whoever waits for it
        depends: frozenset[SimWork],
        outputs: tuple[Tensor, ...] = (),
        inference: bool = False,  # it writes tensors that were made in inference mode
        in_order: bool = False,
        end: float = 0.0,  # on the simulated clock
        sleep: float = 0.0,  # real seconds that it takes besides
        delay: float = 0.0,  # real seconds before it begins
        draw: float = 0.0,  # the smallest of those that are ready goes first
        issued_at: float = 0.0,
    ) -> None:
        self._conductor = conductor
        self.lane = lane
        self.what = what
        self.action: Callable[[], None] | None = action
        self.record = record
        self.past = past
        self.depends = depends
        self.outputs = outputs
        self.inference = inference
        self.in_order = in_order
        self.time = end
        self.sleep = sleep
        self.delay = delay
        self.draw = draw
        self.ready_at: float | None = None
        self.finished_at = issued_at  # later: when it was
        self.complete = False
        self.error: BaseException | None = None
        self.blamed: SimWork | None = None  # the work whose failure kept this one from beginning

    @property
    def works(self) -> frozenset[SimWork]:
        return frozenset((self,))

    def wait(self) -> None:
        self._conductor.join(self)

    def finish(self) -> None:
        """Block the host until it is over, and order nothing after it."""
        self._conductor.block(self.works)

    def done(self) -> bool:
        return self.complete

    def __str__(self) -> str:
        return f"{self.what} on lane {self.lane}"

    def failure(self) -> WindlassError:
        """What to raise where the work is waited for."""
        assert self.error is not None
        told = isinstance(self.error, WindlassError)
        kind = type(self.error) if isinstance(self.error, WindlassError) else WindlassError
        cause = str(self.error) if told else f"{type(self.error).__name__}: {self.error}"
        if self.blamed is None:
            return kind(f"{self} failed: {cause}")
        return kind(f"{self} was not carried out, because {self.blamed} failed before: {cause}")


class SimEvent(Work):
    """A point of a lane: its operations up to there, and what it had waited for."""

    def __init__(self, conductor: Conductor, past: Past, works: frozenset[SimWork], time: float) -> None:
        self._conductor = conductor
        self.past = past
        self.works = works  # those that were not over when it was recorded
        self.time = time

    def wait(self) -> None:
        self._conductor.join(self)

    def done(self) -> bool:
        return all(work.complete for work in self.works)
