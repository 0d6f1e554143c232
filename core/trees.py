"""Find and replace tensors in what modules take and return: nested lists, tuples, dicts, dataclasses, objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def iterate_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in `value`, in a fixed order; also in attributes of plain objects, one level deep."""
    yield from _iterate(value, into_objects=True)


def _iterate(value: Any, into_objects: bool) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _iterate(item, into_objects)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _iterate(item, into_objects)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for one in dataclasses.fields(value):
            yield from _iterate(getattr(value, one.name), into_objects)
    elif into_objects and hasattr(value, "__dict__") and not isinstance(value, type) and not callable(value):
        for item in vars(value).values():
            yield from _iterate(item, into_objects=False)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` applied to the tensors in its lists, tuples and dicts; the rest is passed on as it is."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) is dict:
        return {key: map_tensors(function, item) for key, item in value.items()}
    if type(value) is list:
        return [map_tensors(function, item) for item in value]
    if isinstance(value, tuple):
        items = [map_tensors(function, item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value
