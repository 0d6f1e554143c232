"""The collected tests of the suite: their ids, the same for every backend, and what each is to do on this one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import pytest

from windlass.accelerator.interface import Capabilities
from windlass.conformance.requirements import Resolved, is_declared, requirement_of
from windlass.conformance.results import Status

_FILE = re.compile(r"test_l(\d)_\w+\.py")


@dataclass(frozen=True)
class SuiteTest:
    """One test of the suite, one set of parameters."""

    id: str  # "test_l0_memory.py::test_alignment[float32]"
    demand: Resolved
    item: pytest.Function = field(repr=False, compare=False)


def suite_tests(items: Iterable[pytest.Item]) -> list[SuiteTest]:
    """Read what each collected test demands; pytest.UsageError with one sentence for one that is malformed."""
    tests: dict[str, SuiteTest] = {}
    for item in items:
        name = suite_id(item)
        try:
            test = SuiteTest(name, _demand(item), _function(item))
        except ValueError as error:
            raise pytest.UsageError(f"{name}: {error}.") from error
        if name in tests:
            raise pytest.UsageError(f"{name}: two tests of the suite have this id.")
        tests[name] = test
    return list(tests.values())


def suite_id(item: pytest.Item) -> str:
    """The test's id: file, function and parameters, wherever the suite lies."""
    return f"{item.path.name}::{item.nodeid.partition('::')[2]}"


def status_before(test: SuiteTest, capabilities: Capabilities, most_ranks: int, asked: int) -> Status | None:
    """The status of a test that is not run on this backend; None for one that is."""
    demand = test.demand
    if demand.level > asked:
        return "not run"
    if demand.ranks > most_ranks:
        return "no hardware"
    if demand.without is not None and is_declared(demand.without, capabilities):
        return "not applicable"
    return None


def _function(item: pytest.Item) -> pytest.Function:
    if not isinstance(item, pytest.Function):
        raise ValueError("a test of the suite is a function")
    return item


def _demand(item: pytest.Item) -> Resolved:
    function = _function(item)
    requirement = requirement_of(function.function)
    if requirement is None:
        raise ValueError("a test of the suite says what it demands, decorate it with @requires")
    parsed = _FILE.fullmatch(item.path.name)
    if parsed is None or int(parsed[1]) != requirement.level:
        raise ValueError(f"a test of level {requirement.level} lives in a file test_l{requirement.level}_*.py")
    callspec = getattr(function, "callspec", None)
    return requirement.resolve(callspec.params if callspec is not None else {})
