"""The generic base carries a device that torch learned about a moment ago: one that a vendor adds, in pure Python."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]


def test_a_vendors_device_trains_as_plain_torch_does() -> None:
    command = [sys.executable, "-W", "error", str(TESTS / "pretend_training.py"), "0", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert list(report["losses"]) == ["0", "3"]
    for losses in report["losses"].values():
        assert losses == pytest.approx(report["wanted"], rel=1e-5)  # its layer norm is another
    assert (
        report["calls"]["aten::addmm"] >= 20
    )  # two linear layers, five steps, two stages: it was computed on the device
    assert report["draws"] is True
    assert (report["used"], report["by_tag"], report["left"]) == (60, {"kept": 60}, 0)
    assert report["name"] == "vendor:0"
    assert report["facts"] == {
        "model": "pretend processor",
        "streams": "none",
        "host_memory": "pageable",
        "transport": "alone",
        "agreement": "always",
    }
