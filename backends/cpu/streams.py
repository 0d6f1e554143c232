"""Lanes of the CPU: one, and synchronous.

Every tensor operation is complete when it returns. Collectives are not: their bytes move when somebody
waits for their `Work`, which is how the interface orders them anyway, so no lane has anything to add.
"""

from __future__ import annotations

from windlass.accelerator.interface import Streams


class CpuStreams(Streams):
    """The synchronous lane of the base class."""
