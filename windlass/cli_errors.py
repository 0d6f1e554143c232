"""How the command speaks of what is wrong: one line on stderr, an exit code, and nothing left half done."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


@contextlib.contextmanager
def one_line_errors(failed: int = 2) -> Iterator[None]:
    """Turn an error that we raised on purpose into its one line and an exit code."""
    from windlass.accelerator.errors import WindlassError

    try:
        yield
    except (ValueError, WindlassError) as error:
        if os.environ.get("WINDLASS_DEBUG") == "1":
            traceback.print_exc()
        fail(" ".join(str(error).split()), failed)


@contextlib.contextmanager
def unsaid_messages() -> Iterator[None]:
    """Keep what windlass logs to ourselves."""
    logger, handler = logging.getLogger("windlass"), logging.NullHandler()
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def end_on_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind this process as Ctrl-C does, so that it ends what it has started."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(line: str) -> None:
    """Print a line that is no result."""
    print(f"windlass: {line}", file=sys.stderr, flush=True)


def fail(line: str, code: int) -> NoReturn:
    """End with a line and an exit code."""
    say(line)
    sys.exit(code)
