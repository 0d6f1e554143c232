"""What the tolerances of several schemas say."""

from __future__ import annotations

from typing import Final

SUBNORMAL: Final = (
    "where the device's own arithmetic takes numbers below 2^-126 for zero, each of them, given, found on the way or "
    "returned, may be a zero of its sign"
)
