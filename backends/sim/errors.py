"""What only a strict device can say: an order that nothing guarantees, and a host read that nobody allowed."""

from __future__ import annotations

from windlass.accelerator.errors import WindlassError


class OrderViolation(WindlassError):
    """Two accesses to the same bytes, one of them a write, that no `wait` orders; or bytes that are no more."""


class HostReadRefused(WindlassError):
    """The host would block on the device where a step may not."""
