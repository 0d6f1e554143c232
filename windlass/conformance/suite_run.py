"""One run of the suite on one backend, as pytest's hooks drive it: open, choose, run, judge, report."""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import importlib.util
import os
import warnings
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from windlass.accelerator.errors import BackendNotFound, WindlassError
from windlass.conformance.collection import SuiteTest, status_before, suite_tests
from windlass.conformance.device import DeviceUnderTest, close_device, environment_of_one_rank, open_device
from windlass.conformance.expected import ExpectedFailure, check_ids, read_expected_failures
from windlass.conformance.foreign_warnings import ForeignWarnings, describe_warning, foreign_modules
from windlass.conformance.golden import missing_ids, read_golden
from windlass.conformance.measurements import Measurements
from windlass.conformance.outcomes import Judge
from windlass.conformance.progress import ProgressWriter
from windlass.conformance.reporting import describe_run, write_json, write_report
from windlass.conformance.results import TestResult, make_report, succeeded, summary_lines

LIMIT_SECONDS: Final = 60.0
RANKS_LIMIT_SECONDS: Final = 150.0
"""For a test that starts ranks: its workers have limits of their own, and the first one waits for processes."""
_GRACE_SECONDS: Final = 30.0
"""After its limit a test is interrupted by a signal. Native code that does not return to Python never sees it, so
after this long the process ends itself and says where it hung."""


class SuiteRun:
    """Registered as a plugin for the session. `device` and `measurements` are what the fixtures give to tests."""

    device: DeviceUnderTest
    foreign: str

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.measurements = Measurements()
        self._asked: int = config.getoption("level")
        self._progress = ProgressWriter(config.getoption("progress_descriptor"))
        self._stderr = os.dup(2)  # what a test prints is captured, what the watchdog prints must not be
        self._stack = contextlib.ExitStack()
        self._tests: dict[str, SuiteTest] = {}
        self._by_node: dict[str, Judge] = {}
        self._results: dict[str, TestResult] = {}
        self._expected: dict[str, ExpectedFailure] = {}
        self._problems: list[str] = []
        self._report: dict[str, Any] | None = None
        self.warnings = ForeignWarnings()

    # Open.

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if self.config.option.collectonly:
            return
        name: str = self.config.getoption("accelerator")
        if getattr(self.config.option, "numprocesses", None):
            raise pytest.UsageError("the suite tests one backend in one process, leave out -n.")
        try:
            path: Path | None = self.config.getoption("expected_failures")
            if path is not None:
                self._expected = read_expected_failures(path)
            self._golden = read_golden(self.config.getoption("golden"))
            folder: Path | None = self.config.getoption("report")
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            self._stack.enter_context(environment_of_one_rank(name))
            with self._watched(LIMIT_SECONDS):
                self.device = open_device(name)
            self.foreign = foreign_modules(self.device.package.partition(" ")[0])
        except (ValueError, BackendNotFound, OSError) as error:
            self._fail_to_start("usage", error)
        except WindlassError as error:
            self._fail_to_start("unusable", error)

    def _fail_to_start(self, kind: str, error: Exception) -> None:
        message = " ".join(str(error).split())
        self._progress.write("error", kind=kind, message=message)
        if kind == "usage":
            raise pytest.UsageError(message) from error
        pytest.exit(message, returncode=1)

    # Choose.

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> Generator[None, None, None]:
        if config.option.collectonly:
            yield
            return
        try:
            tests = suite_tests(items)
            if self._expected:
                known = {entry["id"] for entry in self._golden} | {test.id for test in tests}
                check_ids(self._expected.values(), known, config.getoption("expected_failures"))
        except (ValueError, pytest.UsageError) as error:
            self._fail_to_start("usage", error)
        self._tests = {test.id: test for test in tests}
        try:
            yield  # -k, -m and --deselect take tests away
        except pytest.UsageError as error:  # of an expression that cannot be read
            self._fail_to_start("usage", error)
        self._selection = _selection(config)
        selected = set(items)
        self._choose(tests, selected, items)

    def _choose(self, tests: list[SuiteTest], selected: set[pytest.Item], items: list[pytest.Item]) -> None:
        """Leave in `items` what is to run here: first what is declared, then the probes of what is not."""
        capabilities, most_ranks = self.device.accelerator.capabilities, self.device.most_ranks
        if self._selection is None:
            missing = missing_ids(self._golden, self._tests, self._asked)
            if missing:
                self._problems.append(f"The suite lacks {len(missing)} of its tests: {', '.join(missing)}.")
        today = datetime.datetime.now(datetime.UTC).date()
        judges: list[Judge] = []
        for test in tests:
            status = status_before(test, capabilities, most_ranks, self._asked)
            if test.item not in selected:
                status = "not run"
            if status is not None:
                self._results[test.id] = TestResult(test.id, test.demand, status)
                continue
            undeclared = test.demand.undeclared(capabilities)
            judges.append(Judge(test, undeclared, self._expected.get(test.id), today))
        if not any(test.item in selected and test.demand.level <= self._asked for test in tests):
            self._problems.append("No test was collected." if self._selection is None else "No test was selected.")
        judges.sort(key=lambda judge: (judge.is_probe, judge.test.demand.level))
        items[:] = [judge.test.item for judge in judges]
        for judge in judges:
            self._by_node[judge.test.item.nodeid] = judge
            _set_limit(judge.test.item, self.device.patience)
            judge.test.item.add_marker(pytest.mark.filterwarnings(f"default:::{self.foreign}"), append=False)
            judge.test.item.add_marker(pytest.mark.filterwarnings("error"), append=False)
        self._progress.write("start", total=len(judges))

    # Run.

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        test = self._by_node[item.nodeid].test
        self._progress.write("test", id=test.id, level=test.demand.level)
        with self._watched(_limit_of(item)):
            return (yield)

    @contextlib.contextmanager
    def _watched(self, seconds: float) -> Iterator[None]:
        """End the process if the block takes much longer than that and nothing could interrupt it."""
        faulthandler.dump_traceback_later(seconds + _GRACE_SECONDS, exit=True, file=self._stderr)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, when: str) -> None:
        if when == "runtest":
            self.warnings.note(describe_warning(warning_message))

    # Judge.

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        judge = self._by_node[item.nodeid]
        judge.judge(report, call.excinfo.value if call.excinfo is not None else None)
        if report.when == "teardown":
            result = judge.result()
            self._results[result.id] = result
            self._progress.write("done", id=result.id, level=result.demand.level, status=result.status)
        return report

    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str] | None:
        status = getattr(report, "windlass_status", None)
        return None if status is None else (status, status[0], status.upper())

    # Report.

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(self, "device"):
            return
        for test in self._tests.values():
            if test.id not in self._results:
                self._results[test.id] = TestResult(test.id, test.demand, "not run")
        kernels = self.measurements.kernels(self.device.accelerator.kernels)
        about = describe_run(self.device, self.config)
        try:
            with self._watched(LIMIT_SECONDS):
                close_device(self.device)
        except WindlassError as error:
            self._problems.append(str(error))
        if not hasattr(self, "_selection"):
            return  # the collection failed and has said so
        self._report = make_report(
            list(self._results.values()),
            about=about,
            asked=self._asked,
            selection=self._selection,
            problems=self._problems,
            undeclared={judge.test.id: judge.undeclared for judge in self._by_node.values()},
            kernels=kernels,
            rates=self.measurements.rates(),
            foreign_warnings=self.warnings.noted,
            expected_failures=[entry.to_json() for entry in self._expected.values()],
        )
        file: Path | None = self.config.getoption("report_json")
        if file is not None:
            write_json(self._report, file)
        folder: Path | None = self.config.getoption("report")
        if folder is not None:
            write_report(self._report, folder)
        interrupted = session.exitstatus in (pytest.ExitCode.INTERRUPTED, pytest.ExitCode.INTERNAL_ERROR)
        if not interrupted:
            session.exitstatus = pytest.ExitCode.OK if succeeded(self._report) else pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._report is None:
            return
        terminalreporter.section("conformance")
        for line in summary_lines(self._report):
            terminalreporter.write_line(line)
        folder: Path | None = self.config.getoption("report")
        if folder is not None:
            terminalreporter.write_line(f"Report: {folder / 'report.html'}")

    def pytest_unconfigure(self) -> None:
        self._stack.close()
        self._progress.close()
        os.close(self._stderr)


def _selection(config: pytest.Config) -> str | None:
    """Which part of the suite the command line asks for, in words; None for all of it."""
    option = config.option
    if option.keyword:
        return f"-k {option.keyword}"
    if option.markexpr:
        return f"-m {option.markexpr}"
    for name in ("deselect", "ignore", "ignore_glob", "lf", "stepwise"):
        if getattr(option, name, None):
            return f"--{name}"
    return next((argument for argument in config.args if _is_part(argument, option.pyargs)), None)


def _is_part(argument: str, is_module: bool) -> bool:
    """Whether a positional argument names a file or a test and not a whole folder."""
    name, colons, _ = argument.partition("::")
    if colons or Path(name).is_file():
        return True
    spec = importlib.util.find_spec(name) if is_module and not Path(name).exists() else None
    return spec is not None and spec.submodule_search_locations is None


def _set_limit(item: pytest.Function, patience: float) -> None:
    """A limit for every test that sets none; an interrupt where possible, so that the run goes on."""
    if item.get_closest_marker("timeout") is None:
        seconds = RANKS_LIMIT_SECONDS if "run" in item.fixturenames else LIMIT_SECONDS
        item.add_marker(pytest.mark.timeout(seconds * patience, method="signal"))


def _limit_of(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    assert marker is not None
    return float(marker.args[0] if marker.args else marker.kwargs["timeout"])
