"""What `windlass conform` does: run the suite in a process of its own, show how far it is, and say what it came to."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from windlass.accelerator.errors import WindlassError
from windlass.conformance.progress import read_events
from windlass.conformance.requirements import LEVELS
from windlass.conformance.results import FAILURES, conclusion

SUITE: Final = ("--pyargs", "windlass.conformance")
REACHED: Final = 0
NOT_REACHED: Final = 1
_GRACE_SECONDS: Final = 10.0  # for a run that is told to stop to end its ranks
_END_SECONDS: Final = 60.0  # from its last event to its end
_LOG_LINES: Final = 40


class SuiteFailed(WindlassError):
    """The suite did not run to its end: the device cannot be had, or the process that ran it broke."""


@dataclass(frozen=True)
class ConformOptions:
    """What the command line asks for."""

    accelerator: str
    level: int
    report: Path | None = None
    expected_failures: Path | None = None
    select: str | None = None  # pytest's -k


class Display(Protocol):
    """Shows a run while it goes on."""

    def start(self, total: int) -> None: ...

    def test(self, name: str, level: int) -> None: ...

    def done(self, failed: bool) -> None: ...


def check_conform(options: ConformOptions) -> None:
    """Raise ValueError, with one sentence, for options that cannot be followed."""
    missing = [name for name in ("pytest", "pytest_timeout") if importlib.util.find_spec(name) is None]
    if missing:
        names = " and ".join(name.replace("_", "-") for name in missing)
        raise ValueError(f"windlass conform needs {names}: pip install 'windlass[conform]'")
    if options.level not in LEVELS:
        raise ValueError(f"--level must be from {min(LEVELS)} to {max(LEVELS)}, got {options.level}")
    if options.report is not None:
        try:
            options.report.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--report {options.report} cannot be made a folder: {error.strerror}") from error
        try:  # now, and not when the tests have run
            tempfile.TemporaryFile(dir=options.report).close()
        except OSError as error:
            raise ValueError(f"--report {options.report} cannot be written to: {error.strerror}") from error


def run_suite(options: ConformOptions, display: Display | None = None) -> tuple[dict[str, Any], int]:
    """Run the suite; the report and the exit code, 0 if the level asked for is reached and else 1.

    Raises ValueError for what a user can correct (an unknown backend, a malformed file), `SuiteFailed` otherwise.
    """
    with tempfile.TemporaryDirectory(prefix="windlass-conform-") as scratch:
        result = Path(scratch, "report.json")
        settings = Path(scratch, "pytest.ini")
        settings.write_text("[pytest]\n")  # the caller's own settings of pytest must not disturb
        with Path(scratch, "output.txt").open("w+b") as output:
            arguments = _arguments(options, result, settings)
            status, error, running = _run_pytest(arguments, output.fileno(), display)
            if error is not None:
                raise (ValueError if error["kind"] == "usage" else SuiteFailed)(error["message"])
            if status not in (REACHED, NOT_REACHED) or not result.is_file():
                output.seek(0)
                text = output.read().decode(errors="replace")
                print("\n".join(text.splitlines()[-_LOG_LINES:]), file=sys.stderr)
                raise SuiteFailed(_describe_end(status, running))
        report: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return report, status


def _run_pytest(
    arguments: list[str], output: int, display: Display | None
) -> tuple[int, dict[str, Any] | None, str | None]:
    """The exit status, the error event if there was one, and the test that was running when the process ended."""
    ours, theirs = os.pipe()
    error: dict[str, Any] | None = None
    running: str | None = None
    try:
        process = subprocess.Popen(
            [*arguments, f"--progress-descriptor={theirs}"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(),
            pass_fds=[theirs],
            start_new_session=True,  # Ctrl-C reaches it once, through us
        )
        os.close(theirs)
        with _ended_with_us(process):
            for event in read_events(ours, process):
                if event["event"] == "error":
                    error = event
                elif event["event"] == "test":
                    running = event["id"]
                elif event["event"] == "done":
                    running = None
                _show(display, event)
            try:
                return process.wait(_END_SECONDS), error, running
            except subprocess.TimeoutExpired as hang:
                text = "the process that ran the suite does not end: the backend leaves a thread or a process behind"
                raise SuiteFailed(text) from hang
    finally:
        os.close(ours)


def _arguments(options: ConformOptions, result: Path, settings: Path) -> list[str]:
    # -P: nothing in the current folder can stand in for a module of the same name.
    command = [sys.executable, "-P", "-m", "pytest", "-c", str(settings), f"--rootdir={Path(__file__).parent}"]
    command += ["--import-mode=importlib", "--noconftest", "-p", "no:cacheprovider", "-q"]  # nor a caller's conftest.py
    command += ["-p", "pytest_timeout", "-p", "windlass.conformance.plugin"]
    command += [f"--accelerator={options.accelerator}", f"--level={options.level}"]
    command += [f"--report-json={result}"]
    if options.report is not None:
        command.append(f"--report={options.report}")
    if options.expected_failures is not None:
        command.append(f"--expected-failures={options.expected_failures}")
    if options.select is not None:
        command.append(f"-k={options.select}")
    return [*command, *SUITE]


def _environment() -> dict[str, str]:
    """Ours, without what would change how pytest runs: its settings, and plugins that happen to be installed."""
    changing = ("PYTEST_ADDOPTS", "PYTEST_PLUGINS", "PYTEST_TIMEOUT", "PYTHONWARNINGS")
    kept = {name: value for name, value in os.environ.items() if name not in changing}
    return kept | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


@contextlib.contextmanager
def _ended_with_us(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """However the block ends, the process has ended after it; it gets a moment to end its own ranks."""
    try:
        yield
    except BaseException:
        process.send_signal(signal.SIGINT)  # pytest ends its session on it
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(_GRACE_SECONDS)
        raise
    finally:
        process.kill()
        process.wait()


def _show(display: Display | None, event: dict[str, Any]) -> None:
    if display is None:
        return
    if event["event"] == "start":
        display.start(event["total"])
    elif event["event"] == "test":
        display.test(event["id"], event["level"])
    elif event["event"] == "done":
        display.done(event["status"] in FAILURES)


def _describe_end(status: int, running: str | None) -> str:
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"
    where = "" if running is None else f" in {running}"
    advice = "what it printed last is above"
    if running is not None:
        advice += f", and -k {_test_name(running)} runs that test alone"
    return f"the process that ran the suite {how}{where} and left no report; {advice}"


def _test_name(name: str) -> str:
    return name.partition("::")[2].partition("[")[0]


def exit_sentence(report: dict[str, Any], folder: Path | None) -> str:
    """The last line of the output: what is reached, and where to read more."""
    where = "" if folder is None else f" Report: {folder / 'report.html'}"
    return conclusion(report) + where
