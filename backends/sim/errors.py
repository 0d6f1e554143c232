"""What only a strict device can say: an order that nothing guarantees, a host read that nobody allowed, and programs
that differ between ranks."""

from __future__ import annotations

import re

from windlass.accelerator.errors import WindlassError


class OrderViolation(WindlassError):
    """Two accesses to the same bytes, one of them a write, that no `wait` orders; or bytes that are no more."""


class ProgramMismatch(OrderViolation):
    """The ranks ran different programs between two boundaries, where one program must do for all."""


class HostReadRefused(WindlassError):
    """The host would block on the device where a step may not."""


def name_calls(text: str) -> str:
    """The text of an error of the wire, with "'weights#7'" read as "'weights' (call 7 of its group)"."""

    def name(found: re.Match[str]) -> str:
        tag, number = found.groups()
        counted = f"(call {int(number) + 1} of its group)"
        return f"{tag!r} {counted}" if tag else counted

    return re.sub(r"'([^']*)#(\d+)'", name, text)
