"""The machines that can be simulated: memory, rates and latencies as their vendors publish them.

Each lies in a file of `machines/`, where every figure has a note with its source. Importing this imports no torch.
"""

from __future__ import annotations

import difflib
import functools
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

_FOLDER: Final = "machines"
_ENDING: Final = ".json"


@dataclass(frozen=True)
class Machine:
    """One device with its host, disk and links. Bytes are powers of ten; a rate counts one direction."""

    name: str
    description: str
    device_memory_bytes: int
    host_memory_bytes: int
    disk_bytes: int
    device_bandwidth_bytes_per_s: float
    """Reads and writes of device memory, together."""
    host_bandwidth_bytes_per_s: float
    """Reads and writes of host memory, together."""
    link_up_bytes_per_s: float
    """Host to device, with nothing the other way."""
    link_down_bytes_per_s: float
    """Device to host, with nothing the other way."""
    link_both_bytes_per_s: float
    """Both ways at once, added up."""
    disk_read_bytes_per_s: float
    disk_write_bytes_per_s: float
    network_bytes_per_s: float
    """What one rank can receive from the others, while it sends as much."""
    network_latency_s: float
    """What a collective takes that moves nothing."""
    launch_latency_s: float
    """What an operation takes that computes nothing."""
    matmul_flop_per_s: Mapping[str, float]
    """Operations per second by dtype: dense matrix products, a multiplication and an addition counted as two."""
    matmul_dtypes: tuple[str, ...]
    """Dtypes whose products run at native speed."""
    notes: Mapping[str, str]
    """By name of the figure: where it comes from."""


def machine_names() -> tuple[str, ...]:
    """The machines that `load_machine` knows, sorted."""
    names = (entry.name for entry in importlib.resources.files(__package__).joinpath(_FOLDER).iterdir())
    return tuple(sorted(name.removesuffix(_ENDING) for name in names if name.endswith(_ENDING)))


@functools.cache
def load_machine(name: str) -> Machine:
    """The machine of this name; ValueError with the names there are, or with what its file lacks."""
    known = machine_names()
    if name not in known:
        close = difflib.get_close_matches(name.lower(), known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"no machine is named {name!r}{hint}, the machines are {', '.join(known)}")
    text = importlib.resources.files(__package__).joinpath(_FOLDER, name + _ENDING).read_text(encoding="utf-8")
    return read_machine(name, json.loads(text))


def read_machine(name: str, content: Mapping[str, Any]) -> Machine:
    """A machine from the content of its file: `description`, `matmul_dtypes`, and each figure as a `value` and a
    `note`. ValueError if a figure is missing, unknown, not positive, or has no note."""
    figures = {key: entry for key, entry in content.items() if key not in ("description", "matmul_dtypes")}
    wanted = {one.name for one in fields(Machine)} - {"name", "description", "matmul_dtypes", "notes"}
    if set(figures) != wanted:
        raise ValueError(
            f"machine {name!r} must have the figures {', '.join(sorted(wanted))}; missing: "
            f"{', '.join(sorted(wanted - set(figures))) or 'none'}, unknown: "
            f"{', '.join(sorted(set(figures) - wanted)) or 'none'}"
        )
    values: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for key, entry in figures.items():
        value, notes[key] = entry["value"], entry["note"]
        numbers = value.values() if isinstance(value, dict) else [value]
        if not notes[key] or not all(number > 0 for number in numbers):
            raise ValueError(f"machine {name!r} must give {key} a positive value and a note, got {entry}")
        values[key] = int(value) if key.endswith("_bytes") else value
    native = tuple(content["matmul_dtypes"])
    if not set(native) <= set(values["matmul_flop_per_s"]):
        raise ValueError(f"machine {name!r} must give matmul_flop_per_s for each of its matmul_dtypes, got {native}")
    return Machine(name=name, description=content["description"], matmul_dtypes=native, notes=notes, **values)
