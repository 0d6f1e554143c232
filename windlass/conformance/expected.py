"""A vendor's file of tests that are known to fail: each with a reason, a link and the day on which it expires."""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

TABLE: Final = "expected_failure"
_FIELDS: Final = {"id": str, "reason": str, "link": str, "expires": datetime.date}


@dataclass(frozen=True)
class ExpectedFailure:
    """One test that is known to fail. On the day `expires` it still may; later it fails like any other."""

    id: str
    reason: str
    link: str
    expires: datetime.date

    def has_expired(self, today: datetime.date) -> bool:
        return today > self.expires

    def to_json(self) -> dict[str, str]:
        return {"id": self.id, "reason": self.reason, "link": self.link, "expires": self.expires.isoformat()}


def read_expected_failures(path: Path) -> dict[str, ExpectedFailure]:
    """The tables [[expected_failure]] of a TOML file by test id; ValueError with one sentence for anything else."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        text = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"{path} cannot be read as expected failures: {text}") from error
    unknown = sorted(set(content) - {TABLE})
    tables = content.get(TABLE, [])
    if unknown or not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        got = ", ".join(unknown) or repr(tables)
        raise ValueError(f"{path} must hold tables [[{TABLE}]] and nothing else, got {got}")
    entries: dict[str, ExpectedFailure] = {}
    for number, table in enumerate(tables, 1):
        entry = _read_entry(table, f"{path}, entry {number}")
        if entry.id in entries:
            raise ValueError(f"{path}, entry {number}: {entry.id} is there twice, keep one")
        entries[entry.id] = entry
    return entries


def check_ids(entries: Iterable[ExpectedFailure], known: Iterable[str], path: Path) -> None:
    """Raise ValueError for an entry that names no test of the suite."""
    ids = set(known)
    for entry in entries:
        if entry.id not in ids:
            raise ValueError(f"{path}: the suite has no test {entry.id!r}, correct the id or remove the entry")


def _read_entry(table: dict[str, Any], place: str) -> ExpectedFailure:
    unknown = sorted(set(table) - set(_FIELDS))
    if unknown:
        raise ValueError(f"{place}: there is no field {unknown[0]!r}, the fields are {', '.join(_FIELDS)}")
    for name, kind in _FIELDS.items():
        value = table.get(name)
        if value is None:
            raise ValueError(f"{place}: {name!r} is missing, every entry has {', '.join(_FIELDS)}")
        if kind is datetime.date and type(value) is not datetime.date:  # a datetime is a date too
            raise ValueError(f"{place}: {name!r} must be a day such as 2030-01-31 without quotes, got {value!r}")
        if kind is str and not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{place}: {name!r} must be a text, got {value!r}")
    return ExpectedFailure(**table)
