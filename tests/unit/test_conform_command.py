"""`windlass conform`: exit codes, what it prints, and that nobody's settings of pytest disturb it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from toy_suite import ToySuite
from windlass.conformance import command
from windlass.conformance.command import ConformOptions, SuiteFailed, check_conform, exit_sentence, run_suite

ONE = '@requires(level=0, must="It holds.")\ndef test_one(): {body}\n'


class Shown:
    """Keeps what a display is told."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def start(self, total: int) -> None:
        self.events.append(total)

    def test(self, name: str, level: int) -> None:
        self.events.append((name, level))

    def done(self, failed: bool) -> None:
        self.events.append(failed)


@pytest.fixture
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ToySuite:
    """A toy suite that the command runs in place of the real one."""
    toy = ToySuite(tmp_path)
    golden = tmp_path / "golden.json"
    golden.write_text("[]")
    monkeypatch.setattr(command, "SUITE", (f"--golden={golden}", str(toy.suite)))
    monkeypatch.setenv("PYTHONPATH", toy.environment({})["PYTHONPATH"])
    return toy


def windlass(*arguments: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    program = "from windlass.cli import main; main()"
    environment = {**os.environ, **variables}
    line = [sys.executable, "-c", program, "conform", *arguments]
    return subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_a_level_that_is_reached_is_exit_code_0(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", ONE.format(body="pass"))
    shown = Shown()
    report, status = run_suite(ConformOptions("toy", 0), shown)
    assert (status, report["level"], report["asked"]) == (0, 0, 0)
    assert shown.events == [1, ("test_l0_one.py::test_one", 0), False]
    assert exit_sentence(report, Path("out")) == "Level 0 is reached. Report: out/report.html"


def test_a_level_that_is_not_reached_is_exit_code_1(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", ONE.format(body="assert 1 == 2"))
    shown = Shown()
    report, status = run_suite(ConformOptions("toy", 3), shown)
    assert (status, report["level"]) == (1, None)
    assert shown.events[-1] is True


def test_a_selection_claims_nothing(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", ONE.format(body="pass") + ONE.format(body="assert 0").replace("_one", "_two"))
    report, status = run_suite(ConformOptions("toy", 0, select="test_one"))
    assert (status, report["level"], report["selection"]) == (0, None, "-k test_one")


def test_an_unknown_backend_is_the_users_error(suite: ToySuite) -> None:
    with pytest.raises(ValueError, match=r"^no backend named 'toys' is installed .* Did you mean 'toy'\?$"):
        run_suite(ConformOptions("toys", 0))


def test_a_backend_that_cannot_be_used_is_not(suite: ToySuite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_DEVICES", "0")
    with pytest.raises(SuiteFailed, match=r"^backend 'toy' cannot be used here: no toy is plugged in\."):
        run_suite(ConformOptions("toy", 0))


def test_a_process_that_dies_is_named_with_its_test(suite: ToySuite, capfd: pytest.CaptureFixture[str]) -> None:
    suite.write("test_l0_one.py", ONE.format(body="import os; os.kill(os.getpid(), 11)"))
    with pytest.raises(SuiteFailed) as caught:
        run_suite(ConformOptions("toy", 0))
    assert str(caught.value) == (
        "the process that ran the suite was killed by SIGSEGV in test_l0_one.py::test_one and left no report; "
        "what it printed last is above, and -k test_one runs that test alone"
    )
    assert "Fatal Python error: Segmentation fault" in capfd.readouterr().err


def test_expected_failures_are_handed_on(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", ONE.format(body="assert 1 == 2"))
    file = suite.folder / "expected.toml"
    file.write_text(
        '[[expected_failure]]\nid = "test_l0_one.py::test_one"\nreason = "b"\nlink = "c"\nexpires = 9999-01-01\n'
    )
    report, _ = run_suite(ConformOptions("toy", 0, expected_failures=file))
    assert [test["status"] for test in report["tests"]] == ["expected failure"]
    file.write_text("[[")
    with pytest.raises(ValueError, match="cannot be read as expected failures"):
        run_suite(ConformOptions("toy", 0, expected_failures=file))


def test_the_callers_settings_of_pytest_do_not_disturb(suite: ToySuite, monkeypatch: pytest.MonkeyPatch) -> None:
    suite.write("test_l0_one.py", ONE.format(body="pass"))
    (suite.folder / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\npython_files = none_*.py\n")
    (suite.folder / "pytest.py").write_text("raise RuntimeError('not this one')\n")
    (suite.folder / "conftest.py").write_text("raise RuntimeError('nor this one')\n")
    monkeypatch.chdir(suite.folder)
    monkeypatch.setenv("PYTEST_ADDOPTS", "--no-such-option")
    monkeypatch.setenv("PYTEST_PLUGINS", "no_such_plugin")
    assert run_suite(ConformOptions("toy", 0))[1] == 0


def test_the_report_is_written_as_json_and_as_a_page(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", ONE.format(body="pass"))
    folder = suite.folder / "a" / "report"
    options = ConformOptions("toy", 0, report=folder)
    check_conform(options)
    report, _ = run_suite(options)
    assert json.loads((folder / "report.json").read_text()) == report
    assert (folder / "report.html").read_text().startswith("<!")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--accelerator", "cpu", "--level", "7"], "--level must be from 0 to 5, got 7"),
        (["--level", "1"], "Missing option '--accelerator'."),
        (["--accelerator", "no_such"], "no backend named 'no_such' is installed"),
        (["--accelerator", "cpu", "--report", "file/report"], "--report file/report cannot be made a folder"),
        (["--accelerator", "cpu", "-k", "a b"], "Wrong expression passed to '-k': a b:"),
        (["--accelerator", "cpu", "--expected-failures", "none.toml"], "none.toml cannot be read as expected failures"),
    ],
)
def test_bad_usage_is_one_line_and_exit_code_2(tmp_path: Path, options: list[str], sentence: str) -> None:
    (tmp_path / "file").touch()
    done = windlass(*options, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"windlass: {sentence}")
    assert done.stderr.count("\n") == 1


def test_a_report_that_cannot_be_written_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # whoever runs this may write anywhere
    with pytest.raises(ValueError, match=r"^--report .* cannot be written to: Permission denied$"):
        check_conform(ConformOptions("cpu", 0, report=tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_nothing_behind(suite: ToySuite, number: signal.Signals) -> None:
    started = suite.folder / "started"
    body = f"import os, time; open('{started}', 'w').write(str(os.getpid())); time.sleep(600)"
    suite.write("test_l0_one.py", ONE.format(body=body))
    program = (
        "from windlass.cli import main; from windlass.conformance import command; "
        f"command.SUITE = {command.SUITE!r}; main()"
    )
    line = [sys.executable, "-c", program, "conform", "--accelerator", "toy"]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 300
        while not (started.is_file() and started.read_text()):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        output, errors = process.communicate(timeout=300)
    assert (process.returncode, output, errors) == (1, "", "windlass: stopped\n")
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


@pytest.mark.parametrize("name", ["pytest", "pytest_timeout"])
def test_without_pytest_it_says_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one: None if one == name else find(one))
    package = name.replace("_", "-")
    with pytest.raises(ValueError, match=rf"^windlass conform needs {package}: pip install 'windlass\[conform\]'$"):
        check_conform(ConformOptions("cpu", 0))


def test_json_is_the_only_thing_printed(tmp_path: Path) -> None:
    suite = ToySuite(tmp_path)
    variables = suite.environment({}) | {"TOY_DEVICES": "1"}
    done = windlass("--accelerator", "toy", "--json", "-k", "no_such_test", cwd=tmp_path, **variables)
    report = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (1, "")
    assert report["problems"] == ["No test was selected."]
    assert report["backend"]["device"] == "toy:0"


def test_pytest_finds_the_suite_by_its_package_from_anywhere(tmp_path: Path) -> None:
    suite = ToySuite(tmp_path)
    line = [sys.executable, "-m", "pytest", "--pyargs", "windlass.conformance", "--accelerator", "toy"]
    environment = suite.environment({})
    del environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"]
    done = subprocess.run(
        [*line, "-k", "no_such_test", "--level=1"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert "Only a part of the suite ran (-k no_such_test), so no level is claimed." in done.stdout, done.stderr
    assert done.returncode == 1


def test_other_runs_of_pytest_do_not_get_the_suites_options(tmp_path: Path) -> None:
    (tmp_path / "test_mine.py").write_text(
        "import sys\ndef test_mine(): assert 'windlass.accelerator' not in sys.modules"
    )
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path / "test_mine.py")]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout
    done = subprocess.run([*line, "--level=1"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert "unrecognized arguments: --level=1" in done.stderr
