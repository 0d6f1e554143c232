"""What an engine's steps came to, entered when somebody asks: counts, warnings, problems, and a truth that is lazy."""

from __future__ import annotations

import math

import pytest

from windlass.core.precision import LossScaler
from windlass.core.statistics import Outcome, StepReport
from windlass.step_books import StepBooks, Updated


class Steps:
    """Outcomes of made-up steps, and how many of them were read."""

    def __init__(self) -> None:
        self.reads = 0
        self.skipped = 0

    def take(self, finite: bool = True, touched: bool = True, differed: int = 0) -> Outcome:
        self.skipped += not finite and touched
        norm = 1.0 if finite else math.nan
        problem = "the ranks ran different programs" if differed else ""
        updated = finite and touched and not differed
        report = StepReport(updated, finite, norm, 2.0, False, self.skipped, problem, differed)

        def find() -> StepReport:
            self.reads += 1
            return report

        return Outcome(find, touched=touched)


@pytest.fixture
def books() -> StepBooks:
    return StepBooks(LossScaler(), speaks=True)


def test_unread_steps_are_counted_by_the_last_one(books: StepBooks, caplog: pytest.LogCaptureFixture) -> None:
    steps = Steps()
    for finite in (True, False, True, False, True):
        books.enter(steps.take(finite), has_loss=True)
    books.settle()
    books.settle()
    assert (books.global_steps, books.skipped_steps, steps.reads) == (3, 2, 1)
    assert (books.grad_norm, books.loss) == (1.0, 2.0)
    assert "skipped 2 optimizer steps (2 so far)" in caplog.text
    books.enter(steps.take(), has_loss=False)
    books.settle()
    assert (books.global_steps, books.skipped_steps, books.loss) == (4, 2, None)


def test_a_skipped_step_is_told_though_the_next_had_no_gradients(
    books: StepBooks, caplog: pytest.LogCaptureFixture
) -> None:
    steps = Steps()
    books.enter(steps.take(finite=False), has_loss=True)
    books.enter(steps.take(touched=False), has_loss=False)
    books.settle()
    assert (books.global_steps, books.skipped_steps) == (0, 1)
    assert "skipped an optimizer step" in caplog.text


def test_a_problem_is_told_once_and_the_counts_go_on(books: StepBooks) -> None:
    steps = Steps()
    books.enter(steps.take(), has_loss=True)
    books.enter(steps.take(differed=1), has_loss=True)
    with pytest.raises(RuntimeError, match="different programs"):
        books.settle()
    assert (books.global_steps, books.skipped_steps) == (1, 0)
    books.enter(steps.take(), has_loss=True)
    books.settle()
    assert books.global_steps == 2


def test_what_is_discarded_raises_nothing_and_counts_for_nobody_else(books: StepBooks) -> None:
    steps = Steps()
    books.enter(steps.take(finite=False), has_loss=True)
    books.enter(steps.take(differed=1), has_loss=True)
    books.discard()
    books.global_steps, books.skipped_steps = 10, 0
    books.enter(steps.take(), has_loss=True)
    books.settle()
    assert (books.global_steps, books.skipped_steps) == (11, 0)


def test_truth_is_read_when_it_is_asked_for() -> None:
    steps = Steps()
    good, void = Updated(steps.take()), Updated(steps.take(finite=False))
    assert "not read" in repr(good)
    assert steps.reads == 0
    assert good
    assert not void
    assert good == True  # noqa: E712
    assert void == 0
    assert sum([good, void, good]) == 2
    assert steps.reads == 2
    with pytest.raises(RuntimeError, match="different programs"):
        bool(Updated(steps.take(differed=1)))
