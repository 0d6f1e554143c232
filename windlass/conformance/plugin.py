"""The pytest plugin of the suite: its options, its fixtures, and one `SuiteRun` for the session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol

import pytest

from windlass.accelerator.interface import Accelerator
from windlass.conformance.golden import GOLDEN
from windlass.conformance.measurements import Measurements
from windlass.conformance.rank_pool import run_ranks, stop_pool
from windlass.conformance.requirements import LEVELS
from windlass.conformance.suite_run import SuiteRun

DEFAULT_LEVEL: Final = 3
NEEDS_PYTEST: Final = "the conformance suite needs pytest and pytest-timeout, pip install 'windlass[conform]'"
_RUN = pytest.StashKey[SuiteRun]()


class Run(Protocol):
    """The type of the fixture `run`."""

    def __call__(
        self,
        worker: Callable[..., Any],
        num_ranks: int,
        *args: Any,
        timeout: float = 60.0,  # seconds; a lazy device has more
        fresh: bool = False,
    ) -> list[Any]: ...


class Measure(Protocol):
    """The type of the fixture `measure`."""

    def __call__(self, kind: str, **values: Any) -> None: ...


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("windlass", "windlass conformance suite")
    group.addoption("--accelerator", metavar="A", help="Backend or device under test, such as cpu or cuda:1.")
    group.addoption(
        "--level",
        type=int,
        choices=list(LEVELS),
        default=DEFAULT_LEVEL,
        metavar="L",
        help=f"Run the levels from 0 to L (at most {max(LEVELS)}, default {DEFAULT_LEVEL}).",
    )
    group.addoption("--expected-failures", type=Path, metavar="FILE", help="TOML file of tests that are known to fail.")
    group.addoption("--report", type=Path, metavar="DIR", help="Folder for report.json and report.html.")
    # For the command and for tests of the suite itself.
    group.addoption("--golden", type=Path, default=GOLDEN, metavar="FILE", help="List of the tests that must be there.")
    group.addoption("--report-json", type=Path, metavar="FILE", help="File for the report as JSON, alone.")
    group.addoption("--progress-descriptor", type=int, metavar="N", help="Where to write a JSON line for every event.")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("accelerator", None) is None:
        return  # --help and --collect-only name none; a run without one is refused when the session starts
    run = SuiteRun(config)
    config.stash[_RUN] = run
    config.pluginmanager.register(run, "windlass-suite-run")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    config = session.config
    if not any(config.pluginmanager.hasplugin(name) for name in ("timeout", "pytest_timeout")):  # by metadata, by -p
        raise pytest.UsageError(f"{NEEDS_PYTEST}.")
    if _RUN not in config.stash and not config.option.collectonly:
        raise pytest.UsageError("name the backend under test by --accelerator, as in --accelerator cpu.")


@pytest.fixture
def accelerator(request: pytest.FixtureRequest) -> Accelerator:
    """The device under test, open as the only rank of this process. Where it cannot be shared it is closed by `run`."""
    return request.config.stash[_RUN].device.accelerator


@pytest.fixture(scope="session")
def run(request: pytest.FixtureRequest) -> Any:
    """Call a worker on several ranks of the backend under test and return the results by rank.

    The worker is a function at the top of a module `*_workers.py`. A rank that fails raises `RanksFailed`.
    """
    suite_run = request.config.stash[_RUN]
    device = suite_run.device

    def call(
        worker: Callable[..., Any], num_ranks: int, *args: Any, timeout: float = 60.0, fresh: bool = False
    ) -> list[Any]:
        with device.lent_to_ranks():
            return run_ranks(
                worker,
                num_ranks,
                *args,
                timeout=timeout * device.patience,
                accelerator=device.name_for(num_ranks),
                fresh=fresh,
                foreign=suite_run.foreign,
                note_warning=suite_run.warnings.note,
            )

    yield call
    stop_pool()


@pytest.fixture(scope="session")
def measure(request: pytest.FixtureRequest) -> Measure:
    """Note a measured value for the report: `measure("rate", name="copy up", value=55e9, unit="B/s")`."""
    measurements: Measurements = request.config.stash[_RUN].measurements
    return measurements.note
