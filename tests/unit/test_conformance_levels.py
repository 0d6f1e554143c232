"""Which level of the conformance suite a run reaches, and which runs claim none."""

from __future__ import annotations

from pathlib import Path

import pytest

from toy_suite import ToySuite, golden_entry


@pytest.fixture
def suite(tmp_path: Path) -> ToySuite:
    return ToySuite(tmp_path)


LEVELS = """
@requires(level={level}, must="Level {level} holds.")
def test_level():
    assert {level} not in {failing}
"""


@pytest.mark.parametrize(
    ("asked", "failing", "status", "level", "states"),
    [
        (3, (), 0, 3, ["reached", "reached", "reached", "reached", "no tests yet", "not asked for"]),
        (5, (), 0, 3, ["reached", "reached", "reached", "reached", "no tests yet", "measured"]),
        (4, (), 0, 3, ["reached", "reached", "reached", "reached", "no tests yet", "not asked for"]),
        (1, (), 0, 1, ["reached", "reached", "not asked for", "not asked for", "no tests yet", "not asked for"]),
        (3, (2,), 1, 1, ["reached", "reached", "failed", "blocked by a lower level", "no tests yet", "not asked for"]),
        (1, (2,), 0, 1, ["reached", "reached", "not asked for", "not asked for", "no tests yet", "not asked for"]),
        (2, (0, 2), 1, None, ["failed", "blocked by a lower level", "failed", "not asked for", "no tests yet",
                              "not asked for"]),
        (5, (5,), 1, 3, ["reached", "reached", "reached", "reached", "no tests yet", "failed"]),
    ],
)  # fmt: skip
def test_a_level_is_reached_when_it_and_all_lower_ones_are(
    suite: ToySuite, asked: int, failing: tuple[int, ...], status: int, level: int | None, states: list[str]
) -> None:
    for number in (0, 1, 2, 3, 5):
        suite.write(f"test_l{number}_levels.py", LEVELS.format(level=number, failing=failing))
    outcome = suite.run(f"--level={asked}")
    assert [one["state"] for one in outcome.report["levels"]] == states
    assert (outcome.status, outcome.report["level"], outcome.report["asked"]) == (status, level, asked)
    assert all(outcome.statuses[f"test_l{number}_levels.py::test_level"] == "not run" for number in range(asked + 1, 4))


def test_a_level_of_which_nothing_passes_is_not_reached(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", '@requires(level=0, must="It holds.", needs="ranks:4")\ndef test_one(): pass\n')
    outcome = suite.run()
    assert (outcome.status, outcome.report["level"], outcome.states) == (1, None, {0: "failed"})


def test_a_lost_test_fails_the_run_by_name(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", '@requires(level=0, must="It holds.")\ndef test_one(): pass\n')
    suite.golden = [golden_entry("test_l0_one.py::test_one"), golden_entry("test_l0_one.py::test_lost")]
    suite.golden.append(golden_entry("test_l2_two.py::test_two", level=2))
    outcome = suite.run("--level=1")
    sentence = "The suite lacks 1 of its tests: test_l0_one.py::test_lost."
    assert outcome.status == 1
    assert outcome.report["problems"] == [sentence]
    assert outcome.report["level"] is None
    assert sentence in outcome.output
    assert "test_l2_two.py::test_two" in suite.run("--level=2").report["problems"][0]


def test_no_test_at_all_fails_the_run(suite: ToySuite) -> None:
    outcome = suite.run()
    assert outcome.status == 1
    assert outcome.report["problems"] == ["No test was collected."]


BOTH = """
@requires(level=0, must="One holds.")
def test_one(): pass

@requires(level=0, must="Two holds.")
def test_two(): pass
"""


@pytest.mark.parametrize(
    ("options", "files", "selection"),
    [
        (["-k", "one"], [""], "-k one"),
        (["--deselect", "test_l0_both.py::test_two"], [""], "--deselect"),
        ([], ["test_l0_both.py"], "test_l0_both.py"),
        ([], ["test_l0_both.py::test_one"], "test_l0_both.py::test_one"),
    ],
    ids=["expression", "deselected", "file", "test"],
)
def test_a_part_of_the_suite_claims_no_level(
    suite: ToySuite, options: list[str], files: list[str], selection: str
) -> None:
    suite.write("test_l0_both.py", BOTH)
    suite.golden = [golden_entry("test_l1_other.py::test_other", level=1)]
    outcome = suite.run(*options, arguments=[str(suite.suite / file) for file in files])
    assert outcome.status == 0, outcome.output
    assert outcome.report["selection"].endswith(selection)
    assert outcome.report["level"] is None
    assert outcome.states == {0: "incomplete"}
    assert outcome.statuses["test_l0_both.py::test_one"] == "passed"
    assert "no level is claimed" in outcome.output


def test_a_part_that_selects_nothing_fails(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", '@requires(level=0, must="It holds.")\ndef test_one(): pass\n')
    outcome = suite.run("-k", "nothing_like_it")
    assert (outcome.status, outcome.report["problems"]) == (1, ["No test was selected."])


def test_a_run_that_stops_early_reaches_nothing(suite: ToySuite) -> None:
    suite.write("test_l0_one.py", '@requires(level=0, must="It holds.")\ndef test_one(): pass\n')
    suite.write("test_l1_two.py", '@requires(level=1, must="It stops.")\ndef test_two(): pytest.exit("enough")\n')
    suite.write("test_l1_zero.py", '@requires(level=1, must="It holds too.")\ndef test_zero(): pass\n')
    outcome = suite.run()
    assert outcome.status == pytest.ExitCode.INTERRUPTED
    assert outcome.states == {0: "reached", 1: "incomplete"}
    assert outcome.statuses["test_l1_zero.py::test_zero"] == "not run"
