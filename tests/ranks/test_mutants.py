"""Every broken variant of a backend is caught by a test: tests that cannot fail prove nothing.

`make mutants` prints which test catches which; here it is printed at the end (`-s`).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from rich.console import Console

from mutant_runs import MutantRuns, Verdict, judge
from mutants_table import WIDTH, print_table
from mutations import mutations

pytestmark = pytest.mark.slow


class Verdicts:
    """The runs of the mutants that were selected, and what came of them."""

    def __init__(self, names: list[str]) -> None:
        self._runs = MutantRuns()
        self._runs.start(mutations()[name] for name in names)
        self.rows: list[Verdict] = []

    def of(self, name: str) -> Verdict:
        mutation = mutations()[name]
        self.rows.append(judge(mutation, self._runs.control(mutation), self._runs.mutant(mutation)))
        return self.rows[-1]

    def close(self) -> None:
        self._runs.close()


@pytest.fixture(scope="module")
def verdicts(request: pytest.FixtureRequest) -> Iterator[Verdicts]:
    """All selected runs are begun with the first test, two at a time."""
    selected = [item for item in request.session.items if isinstance(item, pytest.Function)]
    names = [str(item.callspec.params["name"]) for item in selected if item.function is test_mutant_is_caught]
    opened = Verdicts(names)
    try:
        yield opened
    finally:
        opened.close()
        print()
        print_table(opened.rows, Console(width=WIDTH))


@pytest.mark.parametrize("name", list(mutations()))
def test_mutant_is_caught(verdicts: Verdicts, name: str) -> None:
    verdict = verdicts.of(name)
    assert not verdict.problem, f"{verdict.mutation.breaks}, and {verdict.problem}"


def test_there_are_mutants_of_every_kind() -> None:
    known = list(mutations().values())
    assert len(known) >= 36
    assert sum(one.base == "sim" for one in known) >= 10
    assert all(one.where for one in known)
