"""The backends of the tutorial as a stranger would use them: installed with pip, run from a folder outside the tree."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cli_runs import Ended, metrics, windlass

PACKAGES = [Path(__file__).parents[1] / name for name in ("plugin", "generic_host")]


class Outside:
    """A folder outside the tree and what is installed for whoever works there."""

    def __init__(self, packages: Path, folder: Path) -> None:
        self._environment = {"PYTHONPATH": str(packages), "WINDLASS_ACCELERATOR": "", "WINDLASS_BACKENDS": ""}
        self.folder = folder

    def windlass(self, *arguments: str, timeout: float = 60) -> Ended:
        return windlass(*arguments, folder=self.folder, environment=self._environment, timeout=timeout)


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    """The packages installed beside this environment, which they see. From copies: pip builds where the files are."""
    place = tmp_path_factory.mktemp("outside")
    left_overs = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    sources = [str(shutil.copytree(package, place / package.name, ignore=left_overs)) for package in PACKAGES]
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--target", str(place / "packages"))
    done = subprocess.run([*pip, "install", *options, *sources], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for source in sources:  # what is used from here on is what was installed
        shutil.rmtree(source)
    (place / "elsewhere").mkdir()
    return Outside(place / "packages", place / "elsewhere")


def test_doctor_lists_them(outside: Outside) -> None:
    ended = outside.windlass("doctor", "--json")
    assert (ended.status, ended.errors) == (0, [])
    report = json.loads(ended.output)
    (row,) = (row for row in report["backends"] if row["name"] == "quick")
    assert (row["usable"], row["reason"], row["devices"]) == (True, "", ["the host's processor"])
    assert (row["distribution"], row["version"], row["runtime"]) == ("windlass-quickhost", "0.1.0", "quickhost 0.1.0")
    assert row["kernels"]["scale_cast"] == "one-pass"
    (row,) = (row for row in report["backends"] if row["name"] == "generic")
    assert (row["usable"], row["distribution"], row["devices"]) == (True, "windlass-generic-host", ["cpu 0"])
    assert report["choice"]["accelerator"] not in ("quick:0", "generic:0")  # no real devices, so never a guess


@pytest.mark.parametrize("name", ["quick", "generic"])
def test_two_ranks_train(outside: Outside, name: str) -> None:
    arguments = ("train", "--accelerator", name, "--ranks", "2", "--model", "nano", "--steps", "3")
    ended = outside.windlass(*arguments, "--out", name)
    assert (ended.status, ended.errors) == (0, [])
    assert f"on 2 ranks of {name}" in ended.output
    summary = json.loads((outside.folder / name / "summary.json").read_text())
    assert (summary["accelerator"], summary["num_ranks"]) == (f"{name}:0", 2)
    first, _, last = (row["loss"] for row in metrics(outside.folder / name))
    assert first == pytest.approx(math.log(256), abs=0.1)  # untrained, every byte is as likely as any other
    assert last < first


@pytest.mark.slow
def test_it_conforms(outside: Outside) -> None:
    """Devices, memory, random numbers, errors and kernels; .ci/run asks for every level."""
    ended = outside.windlass("conform", "--accelerator", "quick", "--level", "1", "--report", "report", timeout=240)
    assert ended.status == 0, "\n".join([ended.output, *ended.errors])
    (path,) = (outside.folder / "report").glob("*.json")
    report = json.loads(path.read_text())
    assert (report["backend"]["name"], report["asked"], report["level"]) == ("quick", 1, 1)
    (kernel,) = (kernel for kernel in report["kernels"] if kernel["name"] == "scale_cast")
    assert kernel["chosen"] == "one-pass"
    assert "one-pass" in {case["implementation"] for case in kernel["cases"]}
