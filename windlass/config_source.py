"""Reading a configuration: a dict, a JSON file or nothing, always as one dict of plain values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from windlass.config_errors import ConfigError, dotted


def read_source(source: str | Path | Mapping[str, object] | None) -> tuple[str, dict[str, object]]:
    """Return the name that errors start with and the content, of which the caller's own parts are only to be read.

    Raises ConfigError for a file that is not there or cannot be read, and for text that is not one JSON object with
    each key once.
    """
    if source is None:
        return "config", {}
    if isinstance(source, Mapping):
        _require_string_keys(source, ())
        return "config", dict(source)
    if not isinstance(source, str | Path):
        raise ConfigError(f"config: must be a dict or the path of a JSON file, got {type(source).__name__}")
    return str(source), _read_file(Path(source))


def _read_file(path: Path) -> dict[str, object]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file, give the path of a JSON file") from error
    except OSError as error:
        raise ConfigError(f"{path}: the file cannot be read, {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: the file is not UTF-8 text, byte {error.start} is the first wrong one") from error
    try:
        content = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON at line {error.lineno} column {error.colno}, {error.msg}") from error
    if not isinstance(content, _Pairs):
        raise ConfigError(f"{path}: must be one JSON object in braces, got a {type(content).__name__}")
    duplicates: list[str] = []
    plain = _without_duplicates(content, (), duplicates)
    if duplicates:
        raise ConfigError(f"{path}: " + "; ".join(f"{name} is given twice, keep one" for name in duplicates))
    assert isinstance(plain, dict)
    return plain


class _Pairs(list[tuple[str, object]]):
    """A JSON object as it was written, duplicates included."""


def _without_duplicates(value: object, location: tuple[int | str, ...], duplicates: list[str]) -> object:
    if isinstance(value, _Pairs):
        plain: dict[str, object] = {}
        for name, child in value:
            if name in plain and dotted((*location, name)) not in duplicates:
                duplicates.append(dotted((*location, name)))
            plain[name] = _without_duplicates(child, (*location, name), duplicates)
        return plain
    if isinstance(value, list):
        return [_without_duplicates(child, (*location, index), duplicates) for index, child in enumerate(value)]
    return value


def _require_string_keys(value: Mapping[object, object] | Mapping[str, object], location: tuple[str, ...]) -> None:
    for name, child in value.items():
        if not isinstance(name, str):
            where = f"{dotted(location)} " if location else ""
            raise ConfigError(f"config: {where}keys must be strings, got {name!r}")
        if isinstance(child, Mapping):
            _require_string_keys(child, (*location, name))
