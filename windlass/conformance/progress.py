"""Events of a run as JSON lines, from the process that runs the suite to the command that shows them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
from collections.abc import Iterator
from typing import Any, Final

_POLL_SECONDS: Final = 0.2


class ProgressWriter:
    """Writes to a descriptor that the command has opened; writes nowhere if there is none."""

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        if descriptor is not None:
            os.set_inheritable(descriptor, False)  # a process that outlives us must not keep the pipe open

    def write(self, event: str, **values: Any) -> None:
        if self._descriptor is not None:
            os.write(self._descriptor, json.dumps({"event": event, **values}).encode() + b"\n")

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def read_events(descriptor: int, process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    """The events that `process` writes, until it closes the pipe or ends, whichever comes first."""
    os.set_blocking(descriptor, False)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while True:
            ended = process.poll() is not None  # asked first, so that what it wrote before its end is read
            data = None
            if selector.select(0 if ended else _POLL_SECONDS):
                with contextlib.suppress(BlockingIOError):
                    data = os.read(descriptor, 65536)
            if data == b"" or (ended and data is None):
                return
            *lines, rest = (rest + (data or b"")).split(b"\n")
            for line in lines:
                yield json.loads(line)
