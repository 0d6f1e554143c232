"""Running parts in processes of their own: none takes another down, and each ends in its time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from gpu_parts.rows import EventReader, Row

_ROOT: Final = Path(__file__).resolve().parents[2]
_GRACE_SECONDS: Final = 15.0  # for a process that is told to stop, to end its own children
_POLL_SECONDS: Final = 0.05


@dataclass
class PartResult:
    """What came of one part."""

    name: str
    seconds: float = 0.0
    error: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)  # of the device, where the part opened it
    output: str = ""  # where to read what the processes said


def run_command(command: Sequence[str], log: Path, seconds: float) -> tuple[int | None, float]:
    """The exit status, None if the command did not end in its time, and how long it took."""
    begun = time.monotonic()
    with _started(command, log) as process:
        try:
            return process.wait(max(seconds, 0.0)), time.monotonic() - begun
        except subprocess.TimeoutExpired:
            return None, time.monotonic() - begun


def run_part(
    name: str,
    command: Callable[[Path, Sequence[str]], Sequence[str]],  # of the file for events, and the items that are done
    folder: Path,
    seconds: float,
    item_seconds: float,
    say: Callable[[str], None],
) -> PartResult:
    """Run the worker of a part; where an item ends or hangs its process, start it again without that item."""
    begun = time.monotonic()
    result = PartResult(name, output=str(folder / f"{name}.log"))
    done: list[str] = []
    for attempt in range(100):  # each takes at least one item with it
        events = folder / f"{name}-{attempt}.jsonl"
        events.write_text("")
        left = seconds - (time.monotonic() - begun)
        ending = _follow(result, command(events, done), events, done, left, item_seconds, say)
        if ending == "again" and seconds - (time.monotonic() - begun) > 5:
            continue
        if ending not in ("finished", "again"):
            result.error = ending
        break
    result.seconds = time.monotonic() - begun
    return result


def _follow(
    result: PartResult,
    command: Sequence[str],
    events: Path,
    done: list[str],
    seconds: float,
    item_seconds: float,
    say: Callable[[str], None],
) -> str:
    """Read what one worker tells until it ends: "finished", "again", or why the part is over."""
    reader = EventReader(events)
    end = time.monotonic() + seconds
    item, item_begun = "", time.monotonic()
    ending, lost = "", ""
    with _started(command, Path(result.output)) as process, contextlib.closing(reader):
        while not ending:
            over = process.poll() is not None  # before reading: what it wrote last is then read
            for event in reader.read():
                kind = event["event"]
                if kind == "facts":
                    result.facts = event
                elif kind == "begin":
                    item, item_begun = event["item"], time.monotonic()
                    say(f"{result.name}: {item}")
                elif kind == "row":
                    result.rows.append(event["row"])
                elif kind == "end":
                    done.append(item)
                    item = ""
                elif kind == "lost":
                    lost = event["message"]
                elif kind == "finished":
                    ending = "finished"
                elif kind == "failed":
                    ending = event["message"]
            now = time.monotonic()
            if ending:
                break
            if over:
                if not item:
                    return f"the process ended with status {process.returncode} between two items, see {result.output}"
                return _give_up(result, done, item, lost or f"the process ended with status {process.returncode}")
            if now > end:
                if item:
                    _give_up(result, done, item, "the time of the part is over")
                return f"not finished after {seconds:.0f} s; --minutes gives more"
            if item and now - item_begun > item_seconds:
                return _give_up(result, done, item, f"no end after {item_seconds:.0f} s")
            time.sleep(_POLL_SECONDS)
        if ending == "finished":
            with contextlib.suppress(subprocess.TimeoutExpired):  # closing may hang, what is measured is measured
                process.wait(_GRACE_SECONDS)
    return ending


def _give_up(result: PartResult, done: list[str], item: str, why: str) -> str:
    result.rows.append(Row(result.name, item, "", "", error=why).to_json())
    done.append(item)
    return "again"


@contextlib.contextmanager
def _started(command: Sequence[str], log: Path) -> Any:
    """A process with its own group, its output added to a log; ended with the block, its children first."""
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        process = subprocess.Popen(
            command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # windlass conform and pytest end their ranks on it
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_GRACE_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def read_json(path: Path) -> dict[str, Any]:
    """What a part left behind as JSON, or nothing."""
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value


def python(*words: str) -> list[str]:
    """A command of this interpreter."""
    return [sys.executable, *words]
