"""Open the device that the environment names, for as long as a block lasts: what every rank of a test does first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import windlass
from windlass.accelerator.interface import Accelerator


@contextmanager
def opened() -> Iterator[Accelerator]:
    """The accelerator of this rank, closed at the end of the block however it ends."""
    accelerator = windlass.open_accelerator()
    try:
        yield accelerator
    finally:
        accelerator.close()
