"""The suite in a terminal: a progress bar while it runs, then a table of levels and what needs attention."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from windlass.conformance.requirements import LEVELS
from windlass.conformance.results import FAILURES

_MOST_FAILURES: Final = 20  # listed; the report has them all
_STYLES: Final = {"reached": "green", "measured": "green", "failed": "red", "blocked by a lower level": "yellow"}


class ProgressDisplay:
    """A bar of tests done of all, with the level that is running. Use it in a `with` block."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._progress.add_task("opening the device", total=None)
        self._failed = 0

    def __enter__(self) -> ProgressDisplay:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, total: int) -> None:
        self._progress.update(self._task, total=total)

    def test(self, name: str, level: int) -> None:
        failed = f", {self._failed} failed" if self._failed else ""
        self._progress.update(self._task, description=f"L{level} {LEVELS[level]}{failed}")

    def done(self, failed: bool) -> None:
        self._failed += failed
        self._progress.advance(self._task)


def show_report(report: dict[str, Any], console: Console) -> None:
    """Print the levels, the tests that failed, and what works without being declared."""
    backend = report["backend"]
    console.print(
        Text(f"{backend['device']} of {backend['distribution']}", style="bold"),
        Text(f"on {backend['runtime']}, interface {report['interface']}"),
    )
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("Level", "", "State", "Tests"):
        table.add_column(column, overflow="fold")
    for one in report["levels"]:
        counts = ", ".join(f"{number} {status}" for status, number in one["counts"].items())
        state = Text(one["state"], style=_STYLES.get(one["state"], ""))
        table.add_row(f"L{one['level']}", Text(one["title"]), state, Text(counts))
    console.print(table)
    failed = [test for test in report["tests"] if test["status"] in FAILURES]
    for test in failed[:_MOST_FAILURES]:
        console.print(Text(f"{test['status']}: {test['id']}", style="red"))
        console.print(Text(f"  must: {test['must']}"))
        console.print(Text(f"  {test['message'].partition(chr(10))[0]}"))
    if len(failed) > _MOST_FAILURES:
        console.print(f"... and {len(failed) - _MOST_FAILURES} more")
    if report["under_declared"]:
        console.print(Text(f"Works but is not declared: {', '.join(report['under_declared'])}."))
    for problem in report["problems"]:
        console.print(Text(problem, style="red"))
