"""State as JSON and back without loss: JSON knows neither tuples nor keys that are not strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PAIRS, _TUPLE = "__pairs__", "__tuple__"


def encode(value: Any) -> Any:
    """The value in JSON types. Raises TypeError, naming the type, for what no state should hold."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: encode(item) for key, item in value.items()}
        return {_PAIRS: [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [encode(item) for item in value]}
    if isinstance(value, list):
        return [encode(item) for item in value]
    raise TypeError(f"a {type(value).__name__} cannot be saved in a manifest; use numbers, text, lists and dicts")


def decode(value: Any) -> Any:
    """What `encode` was given."""
    if isinstance(value, dict):
        if set(value) == {_PAIRS}:
            return {decode(key): decode(item) for key, item in value[_PAIRS]}
        if set(value) == {_TUPLE}:
            return tuple(decode(item) for item in value[_TUPLE])
        return {key: decode(item) for key, item in value.items()}
    return [decode(item) for item in value] if isinstance(value, list) else value
