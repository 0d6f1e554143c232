"""What the simulated accelerator simulates, as the variable WINDLASS_SIM says it.

A list of key=value: "machine=h200,seed=7,views=true,fault=kill:rank=1:at=12". A fault is a kind, then its own
key=value behind colons. Importing this imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from windlass.backends.sim.machines import load_machine

VARIABLE: Final = "WINDLASS_SIM"
FAULT_KINDS: Final = ("inf", "exception", "kill", "slow", "drop")


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong on one rank."""

    kind: str
    """"inf": the first element that the rank gives to a reduce-scatter becomes inf. "exception": a collective raises
    RuntimeError. "kill": the process dies in a collective. "slow": collectives take longer from there on. "drop": the
    rank never enters a collective."""
    rank: int
    at: int = 1
    """The how manieth collective of that rank it befalls, counted from 1; with "inf", the how manieth
    reduce-scatter."""
    seconds: float = 1.0
    """How much longer a collective takes when it is "slow"."""


@dataclass(frozen=True)
class SimSettings:
    """How strict, how slow and how broken the simulated accelerator is."""

    machine: str = "laptop"
    seed: int = 0
    """Of the delays and the order of works; the same seed draws the same ones."""
    views: bool = False
    """Whether a view of an allocation aliases it past a boundary."""
    delay_ms: float = 0.3
    """Mean of the random delay before a work, in real milliseconds."""
    pace: float = 0.0
    """A work really takes this many times its simulated duration."""
    host_reads: int = 1
    """Host reads tagged "step" that are allowed between two boundaries."""
    uniform: bool = False
    """Whether the device is one that compiles: all ranks must run the same program between two boundaries."""
    fault: Fault | None = None


def parse_settings(text: str) -> SimSettings:
    """Read `text`; ValueError names the variable, the key, what was wanted and what was got."""
    entries = _read_pairs((part for part in text.split(",") if part.strip()), _READERS, VARIABLE)
    return SimSettings(**entries)


def _read_pairs(parts: Iterable[str], readers: Mapping[str, Callable[[str, str], Any]], where: str) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for part in parts:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key not in readers:
            close = difflib.get_close_matches(key.lower(), readers, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ValueError(f"{where} has no key {key!r}{hint}, the keys are {', '.join(readers)}")
        if not equals or not value:
            raise ValueError(f"{where} needs a value for {key!r}, as in {key}=VALUE, got {part.strip()!r}")
        if key in entries:
            raise ValueError(f"{where} gives {key!r} twice, got {value!r} after {entries[key]!r}; keep one")
        entries[key] = readers[key](f"{key!r} of {where}", value)
    return entries


def _read_fault(where: str, text: str) -> Fault:
    kind, *parts = (part.strip() for part in text.split(":"))
    if kind not in FAULT_KINDS:
        close = difflib.get_close_matches(kind.lower(), FAULT_KINDS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"{where} has no kind {kind!r}{hint}, it must begin with one of {', '.join(FAULT_KINDS)}")
    entries = _read_pairs(parts, _FAULT_READERS, where)
    if "rank" not in entries:
        raise ValueError(f"{where} must say which rank it befalls, as in {kind}:rank=1:at=3, got {text!r}")
    return Fault(kind, **entries)


def _read_machine(where: str, text: str) -> str:
    try:
        return load_machine(text).name
    except ValueError as error:
        raise ValueError(f"{where} cannot be used: {error}") from error


def _read_flag(where: str, text: str) -> bool:
    flags = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in flags:
        raise ValueError(f"{where} must be true or false, got {text!r}")
    return flags[text.lower()]


def _whole_number(least: int) -> Callable[[str, str], int]:
    def read(where: str, text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < least:
            raise ValueError(f"{where} must be a whole number from {least}, got {text!r}")
        return int(text)

    return read


def _read_amount(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise ValueError(f"{where} must be a number from 0, got {text!r}") from error
    if not 0 <= value < float("inf"):
        raise ValueError(f"{where} must be a number from 0, got {text!r}")
    return value


_READERS: Final[dict[str, Callable[[str, str], Any]]] = {
    "machine": _read_machine,
    "seed": _whole_number(0),
    "views": _read_flag,
    "delay_ms": _read_amount,
    "pace": _read_amount,
    "host_reads": _whole_number(0),
    "uniform": _read_flag,
    "fault": _read_fault,
}
_FAULT_READERS: Final[dict[str, Callable[[str, str], Any]]] = {
    "rank": _whole_number(0),
    "at": _whole_number(1),
    "seconds": _read_amount,
}
