"""What a report says about the run besides its tests, and where it is written."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import windlass
from windlass.accelerator.interface import INTERFACE_VERSION
from windlass.conformance.device import DeviceUnderTest


def describe_run(device: DeviceUnderTest, config: pytest.Config) -> dict[str, Any]:
    """Versions, hardware, capabilities and the command that repeats the run, JSON-ready."""
    facts: dict[str, Any] = {
        "suite": windlass.__version__,
        "interface": ".".join(map(str, INTERFACE_VERSION)),
        "torch": importlib.metadata.version("torch"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "backend": device.describe(),
        "hardware": device.accelerator.facts,
        "capabilities": asdict(device.accelerator.capabilities),
        "most_ranks": device.most_ranks,
        "command": _command(config),
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def write_report(report: dict[str, Any], folder: Path) -> None:
    """Write report.json and report.html into a folder that exists."""
    from windlass.conformance.page import write_page  # draws, and so imports more than the suite needs

    write_json(report, folder / "report.json")
    write_page(report, folder / "report.html")


def write_json(report: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _command(config: pytest.Config) -> str:
    words = ["windlass", "conform", "--accelerator", config.getoption("accelerator")]
    words += ["--level", str(config.getoption("level"))]
    if config.getoption("expected_failures") is not None:
        words += ["--expected-failures", str(config.getoption("expected_failures"))]
    if config.getoption("keyword"):
        words += ["-k", config.getoption("keyword")]
    return shlex.join(words)
