"""What is wrong with a configuration, in the words of the file and not of the code that reads it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_LONGEST_VALUE = 60


class ConfigError(ValueError):
    """A configuration that cannot be used: one line that names the keys, the values and what to change."""


def quote(value: object) -> str:
    """Show a value as the JSON file has it, on one line and cut where it is long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 3]}..."


def suggest(got: str, known: Iterable[str], *, quoting: str = "'", prefix: str = "") -> str:
    """Complete a sentence with the nearest known name, shown with what stands before it, or with nothing."""
    by_lower = {name.lower(): name for name in sorted(known)}
    near = difflib.get_close_matches(got.lower(), by_lower, n=1, cutoff=0.7)
    return f" (did you mean {quoting}{prefix}{by_lower[near[0]]}{quoting}?)" if near else ""


def explain(error: ErrorDetails) -> str:
    """Turn one pydantic finding into "PATH must be WANTED, got VALUE"."""
    path = dotted(error["loc"])
    wanted = _wanted(error)
    if error["type"] == "value_error":  # raised by our own validators, in words that complete the sentence
        wanted = str(error["ctx"]["error"])
    if wanted is None:
        return f"{path} is not usable, {error['msg'][0].lower()}{error['msg'][1:]}, got {quote(error['input'])}"
    return f"{path} must be {wanted}, got {quote(error['input'])}"


def dotted(location: Sequence[int | str]) -> str:
    """Write a place in the file as `section.key` or `section.list[0]`."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.removeprefix(".")


_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "dict_type": "an object",
    "model_type": "an object",
    "finite_number": "a finite number",
}

_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _wanted(error: ErrorDetails) -> str | None:
    kind = error["type"]
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{words} {error['ctx'][key]:g}"
    if kind == "literal_error":
        return "one of " + str(error["ctx"]["expected"]).replace("'", '"')
    return _KINDS.get(kind)
