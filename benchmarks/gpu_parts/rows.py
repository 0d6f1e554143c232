"""One measured line, and the file of events through which a worker tells the driver how far it is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """What one candidate took in one case, or why there is no figure."""

    part: str  # "kernels"
    name: str  # what is compared: "adamw"; rows of the same name and case stand side by side
    case: str  # shapes and dtypes
    by: str  # who did it: "windlass triton", "torch fused AdamW"
    ours: bool = False  # it is what windlass uses by itself
    seconds: float | None = None  # of one call, or of one step
    value: float | None = None
    unit: str = ""  # of the value: "B/s", "FLOP/s", "tokens/s"
    share: float | None = None  # of the floor that was measured in the same run
    peak_bytes: int | None = None  # of the device, beyond what was there before
    facts: dict[str, Any] = field(default_factory=dict)
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data without infinities, which JSON has not."""
        return {name: _finite(one) for name, one in asdict(self).items()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def describe_error(error: BaseException) -> str:
    """One line: the type and the first line of its text."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'without a message'}"[:300]


class EventWriter:
    """Appends events to a file, each flushed, so that a process that dies has told all that it did."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, event: str, **values: Any) -> None:
        self._file.write(json.dumps({"event": event, **values}, default=str) + "\n")
        self._file.flush()


class EventReader:
    """Reads the whole lines that were added since it last looked."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("r", encoding="utf-8")
        self._rest = ""

    def read(self) -> Iterator[dict[str, Any]]:
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            yield json.loads(line)

    def close(self) -> None:
        self._file.close()
