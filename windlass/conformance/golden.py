"""The golden list: every test of the suite with its MUST sentence, so that none is lost or reworded unnoticed.

`python -m windlass.conformance.golden --write` makes golden.json anew, `--check` says how it differs from the tests.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import pytest

    from windlass.conformance.collection import SuiteTest

SUITE: Final = Path(__file__).parent
GOLDEN: Final = SUITE / "golden.json"
_KEYS: Final = ("id", "level", "must", "needs", "without", "since")

Entry = dict[str, Any]


def read_golden(path: Path = GOLDEN) -> list[Entry]:
    """The entries of a golden list; ValueError with one sentence if it is none."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as the list of the suite's tests: {error}") from error
    if not isinstance(entries, list) or any(not isinstance(one, dict) or set(one) != set(_KEYS) for one in entries):
        raise ValueError(f"{path} must be a list of objects with {', '.join(_KEYS)}, install windlass again")
    return entries


def make_entries(tests: Iterable[SuiteTest]) -> list[Entry]:
    """What the golden list says of collected tests, by id."""
    entries = []
    for test in tests:
        demand = test.demand
        values = (test.id, demand.level, demand.must, list(demand.needs), demand.without, demand.since)
        entries.append(dict(zip(_KEYS, values, strict=True)))
    return sorted(entries, key=lambda entry: str(entry["id"]))


def write_golden(entries: Sequence[Mapping[str, Any]], path: Path = GOLDEN) -> None:
    """Write the list with one line per test, so that a change of one test changes one line."""
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    path.write_text(f"[\n{lines}\n]\n" if entries else "[]\n", encoding="utf-8")


def missing_ids(golden: Iterable[Mapping[str, Any]], collected: Iterable[str], asked: int) -> list[str]:
    """Golden tests of the levels up to `asked` that were not collected."""
    present = set(collected)
    return sorted(entry["id"] for entry in golden if entry["level"] <= asked and entry["id"] not in present)


def differences(golden: Sequence[Entry], entries: Sequence[Entry]) -> list[str]:
    """How the tests differ from the golden list, a line for each difference."""
    before, now = ({entry["id"]: entry for entry in one} for one in (golden, entries))
    lines = []
    for name in sorted(before.keys() | now.keys()):
        if name not in now:
            lines.append(f"missing: {name}")
        elif name not in before:
            lines.append(f"new: {name}")
        else:
            for key in _KEYS:
                if before[name][key] != now[name][key]:
                    lines.append(f"changed: {name}: {key} was {before[name][key]!r}, is {now[name][key]!r}")
    return lines


def collect_entries(suite: Path = SUITE) -> list[Entry]:
    """Collect the suite without opening any device; RuntimeError with pytest's output if that fails."""
    import pytest

    from windlass.conformance.collection import suite_tests

    class Collector:
        entries: list[Entry] | None = None

        def pytest_collection_finish(self, session: pytest.Session) -> None:
            self.entries = make_entries(suite_tests(session.items))

    collector = Collector()
    options = ["--collect-only", "-q", "-c", "/dev/null", f"--rootdir={suite}", "--import-mode=importlib"]
    options += ["--assert=plain", "-p", "no:cacheprovider", "-p", "windlass.conformance.plugin"]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = pytest.main([*options, str(suite)], plugins=[collector])
    if collector.entries is None or status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"the suite cannot be collected:\n{output.getvalue()}")
    return collector.entries


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 the list is written or up to date, 1 it differs."""
    parser = argparse.ArgumentParser(prog="python -m windlass.conformance.golden", description=__doc__)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", action="store_true", help="make golden.json anew")
    action.add_argument("--check", action="store_true", help="say how golden.json differs from the tests")
    chosen = parser.parse_args(arguments)
    entries = collect_entries()
    if chosen.write:
        write_golden(entries)
        print(f"{GOLDEN}: {len(entries)} tests")
        return 0
    lines = differences(read_golden(), entries)
    for line in lines:
        print(line)
    print(f"{len(entries)} tests, {len(lines)} differences from {GOLDEN.name}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
