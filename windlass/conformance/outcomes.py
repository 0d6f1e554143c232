"""Judge one test: what pytest saw, against what the backend declares and what its vendor expects."""

from __future__ import annotations

import datetime
from typing import Final

import pytest

from windlass.conformance.collection import SuiteTest
from windlass.conformance.expected import ExpectedFailure
from windlass.conformance.rank_pool import RanksFailed
from windlass.conformance.results import Status, TestResult

_MOST_CHARACTERS: Final = 6000  # of a traceback; its end says most


class Judge:
    """Takes the reports of one test's phases, corrects what they count as, and says the outcome.

    A test that needs what is not declared is a probe: it cannot fail. A skip is a failure. A test that is expected to
    fail must.
    """

    def __init__(
        self,
        test: SuiteTest,
        undeclared: tuple[str, ...],
        expected: ExpectedFailure | None,
        today: datetime.date,
    ) -> None:
        self.test = test
        self.undeclared = undeclared
        self._expected = None if self.is_probe else expected
        self._expired = self._expected is not None and self._expected.has_expired(today)
        self._status: Status | None = None
        self._message = ""
        self._seconds = 0.0

    @property
    def is_probe(self) -> bool:
        return bool(self.undeclared)

    def judge(self, report: pytest.TestReport, error: BaseException | None) -> None:
        """Judge one phase: setup, call or teardown. `error` is what it raised."""
        self._seconds += report.duration
        problem = _problem(report, error)
        if problem is not None:
            self._judge_problem(report, problem)
        elif report.when == "call" and self._status is None:
            self._judge_pass(report)

    def result(self) -> TestResult:
        """The outcome, once the teardown has been judged."""
        return TestResult(
            self.test.id, self.test.demand, self._status or "failed", round(self._seconds, 4), self._message
        )

    def _judge_problem(self, report: pytest.TestReport, problem: str) -> None:
        if self.is_probe:
            _set(report, "passed", "not declared")
            self._note("not declared", problem.partition("\n")[0])
        elif self._expected is not None and not self._expired:
            _set(report, "passed", "expected failure")
            self._note("expected failure", f"{self._expected.reason} ({self._expected.link})\n\n{problem}")
        else:
            if self._expected is not None:
                problem = (
                    f"The failure was expected until {self._expected.expires}: {self._expected.reason} "
                    f"({self._expected.link})\n\n{problem}"
                )
            if report.outcome != "failed" or self._expected is not None:
                _set(report, "failed", None, problem)
            self._note("failed", problem)

    def _judge_pass(self, report: pytest.TestReport) -> None:
        if self.is_probe:
            _set(report, "passed", "under-declared")
            self._note("under-declared", f"works without being declared: {', '.join(self.undeclared)}")
        elif self._expected is not None:
            message = (
                f"The test passes and was expected to fail: {self._expected.reason} ({self._expected.link}). "
                "Remove it from the file of expected failures."
            )
            _set(report, "failed", None, message)
            self._note("unexpected pass", message)
        else:
            self._note("passed", "")

    def _note(self, status: Status, message: str) -> None:
        """A later problem replaces a pass, and the first problem stays."""
        if self._status in (None, "passed", "under-declared"):
            self._status, self._message = status, message


def _problem(report: pytest.TestReport, error: BaseException | None) -> str | None:
    """What is wrong with a phase: a line, and a traceback where there is one."""
    if report.skipped or hasattr(report, "wasxfail"):
        if isinstance(report.longrepr, tuple):
            reason = report.longrepr[2].removeprefix("Skipped: ")
        else:
            reason = str(getattr(report, "wasxfail", "")) or "no reason given"
        return f"Skips are forbidden inside a claimed level: {reason}"
    if not report.failed:
        return None
    text = report.longreprtext
    first = text.strip().partition("\n")[0] if error is None else _first_line(error)
    phase = "" if report.when == "call" else f"In {report.when}: "
    return f"{phase}{first}\n\n{text[-_MOST_CHARACTERS:]}"


def _first_line(error: BaseException) -> str:
    """What was raised, in a line; of ranks that failed, what the first one met."""
    if isinstance(error, RanksFailed) and error.failures:
        rank, trace = next(iter(error.failures.items()))
        return f"Rank {rank}: {trace.rstrip().rpartition(chr(10))[2].strip()}"
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _set(report: pytest.TestReport, outcome: str, status: Status | None, text: str | None = None) -> None:
    """Let pytest count the phase as `outcome` and show it as `status`."""
    report.outcome = outcome  # type: ignore[assignment]
    report.longrepr = text
    if hasattr(report, "wasxfail"):
        del report.wasxfail
    if status is not None:
        report.windlass_status = status  # type: ignore[attr-defined]
