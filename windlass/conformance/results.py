"""What came of each test, which levels are reached, and the report that says so (JSON, schema 1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal, get_args

from windlass.conformance.requirements import LEVELS, Resolved

SCHEMA: Final = 1
MEASURED_LEVEL: Final = 5
"""Rates are measured and never claimed."""

Status = Literal[
    "passed",
    "failed",
    "expected failure",
    "unexpected pass",
    "under-declared",
    "not declared",
    "not applicable",
    "no hardware",
    "not run",
]
STATUSES: Final[tuple[Status, ...]] = get_args(Status)
FAILURES: Final[frozenset[Status]] = frozenset({"failed", "unexpected pass"})
LevelState = Literal[
    "reached",
    "measured",  # level 5 alone
    "failed",
    "incomplete",  # only a part of its tests ran
    "no tests yet",
    "not asked for",
    "blocked by a lower level",
]


@dataclass(frozen=True)
class TestResult:
    """One test and its outcome. `message` begins with the line that says what went wrong."""

    __test__ = False  # pytest: not a class of tests

    id: str
    demand: Resolved
    status: Status
    seconds: float = 0.0
    message: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "level": self.demand.level,
            "must": self.demand.must,
            "since": self.demand.since,
            "needs": list(self.demand.needs),
            "without": self.demand.without,
            "status": self.status,
            "seconds": round(self.seconds, 4),
            "message": self.message,
        }


@dataclass(frozen=True)
class LevelResult:
    level: int
    title: str
    state: LevelState
    counts: dict[str, int]  # status -> tests


def level_results(
    results: Iterable[TestResult],
    asked: int,
    *,
    complete: bool,  # every test of the levels asked for was collected and selected
) -> list[LevelResult]:
    """The state of every level.

    A level is reached when every lower level is, none of its tests failed and at least one passed. A level without
    tests neither counts nor blocks.
    """
    counts = {level: Counter[Status]() for level in LEVELS}
    for result in results:
        counts[result.demand.level][result.status] += 1
    found = []
    open_way = True
    for level, title in LEVELS.items():
        state = _own_state(counts[level], complete)
        if level > asked:
            state = "not asked for" if counts[level] else "no tests yet"
        elif level == MEASURED_LEVEL:
            state = "measured" if state == "reached" else state
        elif state == "reached" and not open_way:
            state = "blocked by a lower level"
        elif state in ("failed", "incomplete"):
            open_way = False
        ordered = {str(status): counts[level][status] for status in STATUSES if counts[level][status]}
        found.append(LevelResult(level, title, state, ordered))
    return found


def _own_state(counts: Counter[Status], complete: bool) -> LevelState:
    if not counts.total():
        return "no tests yet" if complete else "incomplete"
    if any(counts[status] for status in FAILURES):
        return "failed"
    if counts["not run"] or not complete:
        return "incomplete"
    return "reached" if counts["passed"] else "failed"


def level_reached(levels: Sequence[LevelResult]) -> int | None:
    """The highest level in an unbroken row of reached ones from 0; None where there is none."""
    return max((one.level for one in levels if one.state == "reached"), default=None)


def under_declared(results: Iterable[TestResult], undeclared: Mapping[str, Sequence[str]]) -> list[str]:
    """Capabilities that work and are not declared: those of which every probe passed.

    `undeclared` maps the id of a test to the capabilities that it needs and the backend does not declare.
    """
    works: dict[str, bool] = {}
    for result in results:
        if result.status in ("under-declared", "not declared"):
            for name in undeclared.get(result.id, ()):
                works[name] = works.get(name, True) and result.status == "under-declared"
    return sorted(name for name, all_passed in works.items() if all_passed)


def succeeded(report: Mapping[str, Any]) -> bool:
    """Whether what was asked for was reached; of a part of the suite, whether it ran and nothing in it failed."""
    if report["problems"]:
        return False
    asked = [one for one in report["levels"] if one["state"] not in ("not asked for", "no tests yet")]
    if report["selection"] is None:
        return bool(asked) and all(one["state"] in ("reached", "measured") for one in asked)
    return all(one["state"] != "failed" for one in asked)


def make_report(
    results: Sequence[TestResult],
    *,
    about: Mapping[str, Any],  # suite, interface, torch, python, platform, date, backend, hardware, capabilities, ...
    asked: int,
    selection: str | None,  # what part of the suite was chosen, in words; None: all of it
    problems: Sequence[str],  # what is wrong with the run itself, as sentences
    undeclared: Mapping[str, Sequence[str]],
    kernels: Sequence[Mapping[str, Any]],
    rates: Sequence[Mapping[str, Any]],
    foreign_warnings: Sequence[str],  # warnings of packages that are neither windlass nor the backend's own
    expected_failures: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The report, JSON-ready. With `problems` or a `selection` no level is claimed."""
    levels = level_results(results, asked, complete=selection is None and not problems)
    return {
        "schema": SCHEMA,
        **about,
        "level": level_reached(levels),
        "asked": asked,
        "selection": selection,
        "problems": list(problems),
        "levels": [asdict(one) for one in levels],
        "tests": [result.to_json() for result in sorted(results, key=lambda one: one.id)],
        "kernels": list(kernels),
        "rates": list(rates),
        "foreign_warnings": list(foreign_warnings),
        "under_declared": under_declared(results, undeclared),
        "expected_failures": list(expected_failures),
    }


def conclusion(report: Mapping[str, Any]) -> str:
    """The report in one sentence."""
    if report["selection"] is not None:
        return f"Only a part of the suite ran ({report['selection']}), so no level is claimed."
    if report["problems"]:
        return "The run itself is not in order, so no level is claimed."
    level = report["level"]
    if level is None:
        return "No level is reached."
    without_claim = ("not asked for", "no tests yet", "measured")
    missed = [one["level"] for one in report["levels"] if one["state"] not in ("reached", *without_claim)]
    sentence = f"Level {level} is reached, level {missed[0]} is not." if missed else f"Level {level} is reached."
    return " ".join(filter(None, (sentence, limits(report))))


def limits(report: Mapping[str, Any]) -> str:
    """What the levels that are reached do not cover on this machine, in one sentence; empty if they cover all."""
    absent = sum(one["counts"].get("no hardware", 0) for one in report["levels"] if one["state"] == "reached")
    if not absent:
        return ""
    ranks = report["most_ranks"]
    tests = "1 test needs" if absent == 1 else f"{absent} tests need"
    return f"That holds for {ranks} rank{'s' * (ranks != 1)}: {tests} more devices than this machine has."


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """The report for a terminal without colour: a line for each level, what needs attention, the conclusion."""
    backend = report["backend"]
    lines = [
        f"windlass conformance {report['suite']} (interface {report['interface']}): "
        f"{backend['device']} of {backend['distribution']}"
    ]
    width = max(len(title) for title in LEVELS.values())
    for one in report["levels"]:
        lines.append(f"  L{one['level']}  {one['title']:<{width}}  {one['state']}{_counted(one['counts'])}")
    lines += [f"{test['id']}: {test['status']}" for test in report["tests"] if test["status"] in FAILURES]
    if report["under_declared"]:
        lines.append(f"Works but is not declared: {', '.join(report['under_declared'])}.")
    number = len(report["foreign_warnings"])
    if number:
        lines.append(f"Packages of others gave {number} warning{'s' * (number > 1)}; the report has the text.")
    return [*lines, *report["problems"], conclusion(report)]


def _counted(counts: Mapping[str, int]) -> str:
    return f" ({', '.join(f'{number} {status}' for status, number in counts.items())})" if counts else ""
