"""What an engine's steps have come to: counted at once where the host knows, else when somebody asks."""

from __future__ import annotations

import logging

from windlass.core.precision import LossScaler
from windlass.core.statistics import Outcome, StepReport

logger = logging.getLogger("windlass")


class StepBooks:
    """Counts of steps, and what the last one reported. `settle` reads it from the device, once per step at most."""

    def __init__(self, scaler: LossScaler, *, speaks: bool) -> None:
        """`speaks`: this rank tells the user about skipped steps."""
        self.global_steps = 0
        self.skipped_steps = 0
        self.grad_norm: float | None = None
        self.loss: float | None = None
        self.stop_requested = False
        self._scaler = scaler
        self._speaks = speaks
        self._unsettled: Outcome | None = None  # the last step, if it has not been read
        self._has_loss = False
        self._taken = 0  # steps since the last one that was read
        self._skipped_before = 0  # of this executor's, as of the last one that was read

    def enter(self, outcome: Outcome, *, has_loss: bool) -> None:
        """A step was taken, and nothing has been read yet."""
        self._unsettled = outcome
        self._has_loss = has_loss
        self._taken += outcome.touched

    def settle(self) -> None:
        """Read what is not known yet. Raises RuntimeError if the ranks' programs were found to differ."""
        if (outcome := self._unsettled) is None:
            return
        problem = self._take().problem
        if problem and not outcome.told:
            outcome.told = True
            raise RuntimeError(problem)

    def discard(self) -> None:
        """Forget what has not been read, problems too: other counts will take the place of these."""
        if self._unsettled is not None:
            self._take()

    def forget(self) -> None:
        """Never read what has not been read."""
        self._unsettled = None

    def restart(self) -> None:
        """The executor that counted the skipped steps is replaced by a new one."""
        try:
            self.settle()
        finally:
            self._skipped_before = 0

    def _take(self) -> StepReport:
        """Enter the last step, and those before it that nobody asked about."""
        assert self._unsettled is not None
        outcome, self._unsettled = self._unsettled, None
        report = outcome.read()
        self.grad_norm = report.norm
        self.loss = report.loss if self._has_loss else None
        self.stop_requested = report.stop
        skipped, self._skipped_before = report.skipped - self._skipped_before, report.skipped
        taken, self._taken = self._taken, 0
        self.global_steps += max(0, taken - skipped - report.differed)
        self.skipped_steps += skipped
        before = self._scaler.scale
        if outcome.touched:  # without gradients nothing happens, as in torch
            self._scaler.update(overflow=not report.finite)
        if skipped and self._speaks:
            what = "an optimizer step" if skipped == 1 else f"{skipped} optimizer steps"
            logger.warning(
                f"skipped {what} ({self.skipped_steps} so far): a gradient, or the norm of all of them, "
                f"was not finite; loss scale {before:g} -> {self._scaler.scale:g}"
            )
        return report


class Updated:
    """Whether a step changed the weights, read from the device when its truth is asked for; as a number it is 0 or 1.

    Asking raises RuntimeError if the ranks' programs were found to differ.
    """

    def __init__(self, outcome: Outcome) -> None:
        self._outcome = outcome

    def __bool__(self) -> bool:
        report = self._outcome.read()
        if report.problem:
            self._outcome.told = True
            raise RuntimeError(report.problem)
        return report.updated

    def __index__(self) -> int:
        return int(bool(self))

    def __add__(self, other: int) -> int:
        return int(self) + int(other)

    __radd__ = __add__

    def __eq__(self, other: object) -> bool:
        return bool(self) == other if isinstance(other, (int, Updated)) else NotImplemented

    def __hash__(self) -> int:
        return hash(bool(self))

    def __repr__(self) -> str:
        return f"Updated({bool(self)})" if self._outcome.known else "Updated(not read yet)"
