"""Tiny suites in temporary folders, run by pytest in a process of its own on the toy backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER = """\
import pytest
from windlass.conformance.requirements import requires

"""


@dataclass(frozen=True)
class SuiteOutcome:
    """How a run ended; `report` is empty where it wrote none."""

    status: int
    output: str
    report: dict[str, Any]

    @property
    def statuses(self) -> dict[str, str]:
        """Test id -> status."""
        return {test["id"]: test["status"] for test in self.report["tests"]}

    @property
    def states(self) -> dict[int, str]:
        """Level -> state, of those that have tests."""
        return {one["level"]: one["state"] for one in self.report["levels"] if one["counts"]}

    def message(self, name: str) -> str:
        (text,) = (test["message"] for test in self.report["tests"] if test["id"] == name)
        assert isinstance(text, str)
        return text


class ToySuite:
    """A suite under a folder that has the toy backend installed beside it."""

    def __init__(self, folder: Path, accelerator: str = "toy") -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.site = folder / "site"
        metadata = self.site / "toy-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text("[windlass.backends]\ntoy = toy_backend\n")
        self.suite = folder / "suite"
        self.suite.mkdir()
        self.golden: list[dict[str, Any]] = []

    def write(self, name: str, body: str) -> None:
        """Add a file to the suite; `pytest` and `requires` are imported in it."""
        (self.suite / name).write_text(HEADER + textwrap.dedent(body))

    def environment(self, variables: Mapping[str, str]) -> dict[str, str]:
        path = os.pathsep.join([str(self.site), str(Path(__file__).parent)])
        return {**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **variables}

    def run(
        self,
        *options: str,
        capabilities: Mapping[str, Any] | None = None,
        variables: Mapping[str, str] | None = None,
        arguments: Sequence[str] | None = None,  # None: the whole suite
        plugins: Sequence[str] = ("pytest_timeout", "windlass.conformance.plugin"),
    ) -> SuiteOutcome:
        golden, report = self.folder / "golden.json", self.folder / "report.json"
        golden.write_text(json.dumps(self.golden))
        report.unlink(missing_ok=True)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            os.devnull,
            f"--rootdir={self.suite}",
            "-p",
            "no:cacheprovider",
        ]
        command += [word for plugin in plugins for word in ("-p", plugin)]
        command += [f"--accelerator={self.accelerator}"] if self.accelerator else []
        command += [f"--golden={golden}", f"--report-json={report}", *options]
        command += [str(self.suite)] if arguments is None else arguments
        declared = {"TOY_CAPABILITIES": json.dumps(dict(capabilities or {}))}
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment({**declared, **(variables or {})}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=120,
        )
        content = json.loads(report.read_text()) if report.is_file() else {}
        return SuiteOutcome(done.returncode, done.stdout, content)


def golden_entry(name: str, level: int = 0) -> dict[str, Any]:
    return {"id": name, "level": level, "must": "It holds.", "needs": [], "without": None, "since": "1.0"}
