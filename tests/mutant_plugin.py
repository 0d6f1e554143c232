"""A pytest plugin for runs on a mutant: applies a mutation to the process, and writes down how each test ended."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mutations import apply_once


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mutants")
    group.addoption("--mutate", metavar="NAME", help="Apply this mutation before anything is collected.")
    group.addoption("--outcomes", type=Path, metavar="FILE", help="File for a JSON line per phase of each test.")


def pytest_configure(config: pytest.Config) -> None:
    name: str | None = config.getoption("mutate")
    if name:
        apply_once(name)
    path: Path | None = config.getoption("outcomes")
    if path is not None:
        config.pluginmanager.register(_Outcomes(path), "mutant-outcomes")


class _Outcomes:
    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """How a phase ended, as the suite judges it where it does."""
        status = getattr(report, "windlass_status", report.outcome)
        message = report.longreprtext if report.failed else ""
        crash = getattr(report.longrepr, "reprcrash", None)
        if crash is not None:
            message = str(crash.message)
        line = {"id": report.nodeid, "when": report.when, "status": status, "message": message}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
