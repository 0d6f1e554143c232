"""The vendor's file of expected failures: strict both ways, and every entry expires."""

from __future__ import annotations

import datetime
from pathlib import Path

import pytest

from fake_plugins import raises_sentence
from toy_suite import SuiteOutcome, ToySuite, golden_entry
from windlass.conformance.expected import ExpectedFailure, check_ids, read_expected_failures

ENTRY = """
[[expected_failure]]
id = "test_l0_one.py::test_{which}"
reason = "The driver rounds wrongly."
link = "https://example.org/17"
expires = {expires}
"""
SUITE = """
@requires(level=0, must="It holds.")
def test_good(): pass

@requires(level=0, must="It holds as well.")
def test_bad():
    raise RuntimeError("wrong")

@requires(level=0, must="It is there.", needs="views")
def test_probe():
    raise RuntimeError("not there")
"""
GOOD, BAD, PROBE = (f"test_l0_one.py::test_{name}" for name in ("good", "bad", "probe"))


def run_with(tmp_path: Path, *entries: tuple[str, str]) -> SuiteOutcome:
    """Run SUITE with an entry for each of `entries`, (which, expires)."""
    suite = ToySuite(tmp_path)
    suite.write("test_l0_one.py", SUITE)
    suite.golden = [golden_entry("test_l1_other.py::test_other", level=1)]
    file = tmp_path / "expected.toml"
    file.write_text("".join(ENTRY.format(which=which, expires=expires) for which, expires in entries))
    return suite.run("--level=0", f"--expected-failures={file}")


def test_a_failure_that_is_expected_does_not_block(tmp_path: Path) -> None:
    outcome = run_with(tmp_path, ("bad", "9999-12-31"))
    assert outcome.status == 0, outcome.output
    assert outcome.statuses == {GOOD: "passed", BAD: "expected failure", PROBE: "not declared"}
    assert outcome.message(BAD).startswith("The driver rounds wrongly. (https://example.org/17)\n\nRuntimeError: wrong")
    assert outcome.report["level"] == 0
    assert outcome.report["expected_failures"] == [
        {"id": BAD, "reason": "The driver rounds wrongly.", "link": "https://example.org/17", "expires": "9999-12-31"}
    ]


def test_a_pass_that_is_not_expected_fails(tmp_path: Path) -> None:
    outcome = run_with(tmp_path, ("bad", "9999-12-31"), ("good", "9999-12-31"))
    assert outcome.status == 1
    assert outcome.statuses[GOOD] == "unexpected pass"
    assert "Remove it from the file of expected failures." in outcome.message(GOOD)
    assert outcome.report["level"] is None


def test_an_expectation_that_has_expired_fails_with_its_reason(tmp_path: Path) -> None:
    outcome = run_with(tmp_path, ("bad", "2026-01-31"))
    assert (outcome.status, outcome.statuses[BAD]) == (1, "failed")
    assert outcome.message(BAD).startswith(
        "The failure was expected until 2026-01-31: The driver rounds wrongly. (https://example.org/17)"
    )


def test_what_is_not_declared_is_not_expected_to_fail_either(tmp_path: Path) -> None:
    outcome = run_with(tmp_path, ("bad", "9999-12-31"), ("probe", "9999-12-31"))
    assert (outcome.status, outcome.statuses[PROBE]) == (0, "not declared")


def test_an_unknown_id_is_a_usage_error(tmp_path: Path) -> None:
    outcome = run_with(tmp_path, ("worse", "9999-12-31"))
    assert outcome.status == pytest.ExitCode.USAGE_ERROR
    assert "the suite has no test 'test_l0_one.py::test_worse', correct the id or remove the entry" in outcome.output


def test_the_last_day_still_counts() -> None:
    day = datetime.date(2026, 5, 31)
    entry = ExpectedFailure("a", "b", "c", day)
    assert not entry.has_expired(day)
    assert entry.has_expired(day + datetime.timedelta(days=1))


def test_tests_that_were_not_collected_are_known_by_the_golden_list() -> None:
    entry = ExpectedFailure("test_l1_other.py::test_other", "b", "c", datetime.date(2026, 5, 31))
    check_ids([entry], ["test_l1_other.py::test_other"], Path("f.toml"))
    with raises_sentence(
        ValueError,
        "f.toml: the suite has no test 'test_l1_other.py::test_other', correct the id or remove the entry",
    ):
        check_ids([entry], [], Path("f.toml"))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ('id = "a"', "must hold tables [[expected_failure]] and nothing else, got id"),
        ("[expected_failure]", "must hold tables [[expected_failure]] and nothing else, got {}"),
        (
            '[[expected_failure]]\nid = "a"\nreason = "b"\nlink = "c"',
            "entry 1: 'expires' is missing, every entry has id, reason, link, expires",
        ),
        (
            '[[expected_failure]]\nid = "a"\nreason = " "\nlink = "c"\nexpires = 2026-01-31',
            "entry 1: 'reason' must be a text, got ' '",
        ),
        (
            '[[expected_failure]]\nid = "a"\nreason = "b"\nlink = "c"\nexpires = "2026-01-31"',
            "entry 1: 'expires' must be a day such as 2030-01-31 without quotes, got '2026-01-31'",
        ),
        (
            '[[expected_failure]]\nid = "a"\nbecause = "b"',
            "entry 1: there is no field 'because', the fields are id, reason, link, expires",
        ),
        (ENTRY.format(which="a", expires="2026-01-31") * 2, "entry 2: test_l0_one.py::test_a is there twice, keep one"),
        ("[[expected", "cannot be read as expected failures: "),
    ],
)
def test_a_malformed_file_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    file = tmp_path / "expected.toml"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"expected\.toml") as caught:
        read_expected_failures(file)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "none.toml"
    with raises_sentence(ValueError, f"{file} cannot be read as expected failures: No such file or directory"):
        read_expected_failures(file)


def test_the_project_reads_its_own_example(tmp_path: Path) -> None:
    file = tmp_path / "expected.toml"
    file.write_text(ENTRY.format(which="a", expires="2026-01-31"))
    assert read_expected_failures(file) == {
        "test_l0_one.py::test_a": ExpectedFailure(
            "test_l0_one.py::test_a",
            "The driver rounds wrongly.",
            "https://example.org/17",
            datetime.date(2026, 1, 31),
        )
    }
