"""The `windlass` command as a user's processes: start it, watch its run, find the ranks it started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

WINDLASS = (sys.executable, "-m", "windlass.cli")


class Ended(NamedTuple):
    """A command that has ended; `errors` are the lines of stderr."""

    status: int
    output: str
    errors: list[str]


@contextmanager
def running(
    *arguments: str | int | Path, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """The command in a folder; it and all it started have ended when the block is left."""
    process = subprocess.Popen(
        [*WINDLASS, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        for started in [*ranks_of(process.pid).values(), process.pid]:
            if is_alive(started):
                os.kill(started, 9)
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def finish(process: subprocess.Popen[str], timeout: float = 60) -> Ended:
    """Wait for the end."""
    output, errors = process.communicate(timeout=timeout)
    return Ended(process.returncode, output, errors.splitlines())


def windlass(
    *arguments: str | int | Path, folder: Path, environment: Mapping[str, str] | None = None, timeout: float = 60
) -> Ended:
    """Run the command to its end."""
    with running(*arguments, folder=folder, environment=environment) as process:
        return finish(process, timeout)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics that are complete."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str], timeout: float = 60) -> None:
    """Wait for a condition while the process lives."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"the command ended early, exit code {process.returncode}: {finish(process)}")
        if time.monotonic() > deadline:
            raise AssertionError(f"nothing happened within {timeout:g} s")
        time.sleep(0.02)


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process id, of the ranks that a launcher has started."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:  # the thread has ended
            continue
        for child in children:
            try:
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            for variable in variables:
                if variable.startswith(b"RANK="):
                    found[int(variable.removeprefix(b"RANK="))] = int(child)
    return found


def is_alive(process: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
