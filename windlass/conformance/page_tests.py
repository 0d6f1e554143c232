"""The tests on the report's page: what failed, what was known to fail, and all of them by level."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from windlass.conformance.page_text import STATUS_TONES, counted, escape, mark, section, sentence_of

FAILURES = ("failed", "unexpected pass")


def failure_section(report: Mapping[str, Any]) -> str:
    """Every failed test, open, with its sentence and its message."""
    failed = [test for test in report["tests"] if test["status"] in FAILURES]
    if not failed:
        return ""
    number = "One test" if len(failed) == 1 else f"{len(failed):,} tests"
    return section("Failures", "\n".join(map(_failure, failed)), f"{number} must pass and did not.")


def _failure(test: Mapping[str, Any]) -> str:
    message = test["message"].strip() or "No message was given."
    if test["status"] == "unexpected pass":
        message = "The test is listed as an expected failure and passed: take it off the list."
    return (
        f'<details class="failure" open><summary>{mark("bad")} <span class="mono">{escape(test["id"])}</span></summary>'
        f'<p>{sentence_of(test["must"])}</p><p class="small soft">Level {test["level"]}, {escape(test["status"])}. '
        f"{_demand(test)}</p><pre>{escape(message)}</pre></details>"
    )


def expected_section(report: Mapping[str, Any]) -> str:
    """The vendor's own list of known failures: why, where to read on, and until when."""
    entries = report.get("expected_failures") or []
    if not entries:
        return ""
    states = {test["id"]: test["status"] for test in report["tests"]}
    rows = []
    for entry in entries:
        state = states.get(entry["id"], "not run")
        tone = STATUS_TONES.get(state, "soft")
        rows.append(
            f'<tr><td><p class="mono">{escape(entry["id"])}</p><p>{escape(entry["reason"])}</p>'
            f'<p class="small">{_link(entry["link"])}</p></td><td class="small nowrap {tone}">{mark(tone)} '
            f'{escape(state)}</td><td class="small nowrap">until {escape(entry["expires"])}</td></tr>'
        )
    table = (
        '<table class="stack"><thead><tr><th>Test and reason</th><th>This run</th><th>Expires</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return section(
        "Expected failures",
        table,
        "The vendor knows of these. A test on this list that passes, or fails after its day, is a failure.",
    )


def test_section(report: Mapping[str, Any]) -> str:
    """All tests, folded by level and by function."""
    levels = []
    for level in report["levels"]:
        tests = [test for test in report["tests"] if test["level"] == level["level"]]
        if tests:
            groups = groupby(sorted(tests, key=_function), key=_function)
            inner = "\n".join(_group(name, list(members)) for name, members in groups)
            levels.append(
                f'<details class="level"><summary>Level {level["level"]}: {escape(level["title"])} '
                f'<span class="counts">{escape(counted(level["counts"]))}</span></summary><div>{inner}</div></details>'
            )
    lead = "Unfold a level for its tests, and a test for the sentence that it checks and for each of its cases."
    return section("All tests", "\n".join(levels), lead) if levels else ""


def _function(test: Mapping[str, Any]) -> str:
    """The id without its parameters."""
    return str(test["id"]).partition("[")[0]


def _group(name: str, tests: list[Mapping[str, Any]]) -> str:
    """The cases of one test function; those with the same sentence share it."""
    tone = _worst(test["status"] for test in tests)
    body = []
    for must, members in groupby(tests, key=lambda test: test["must"]):
        cases = list(members)
        items = "".join(
            f'<li><span class="name mono">{escape(test["id"].removeprefix(name)) or "one case"}</span>'
            f'<span class="{STATUS_TONES.get(test["status"], "soft")}">'
            f"{mark(STATUS_TONES.get(test['status'], 'soft'))} {escape(test['status'])}</span>"
            f'<span class="seconds">{test["seconds"]:.2f} s</span>{_remark(test)}</li>'
            for test in cases
        )
        demands = " ".join(dict.fromkeys(filter(None, map(_demand, cases))))
        body.append(f'<p>{sentence_of(must)}</p><p class="small soft">{demands}</p><ul class="cases">{items}</ul>')
    statuses = counted(Counter(test["status"] for test in tests))
    return (
        f'<details><summary>{mark(tone)} <span class="mono">{escape(name)}</span> '
        f'<span class="counts">{escape(statuses)}</span></summary><div>{"".join(body)}</div></details>'
    )


def _remark(test: Mapping[str, Any]) -> str:
    """The first line of the message of a test that is no failure: those have theirs further up."""
    lines = test["message"].strip().splitlines()
    return f'<p class="soft">{escape(lines[0])}</p>' if lines and test["status"] not in FAILURES else ""


def _worst(statuses: Iterable[str]) -> str:
    """The tone of a group: bad if one is, then a note, then good; soft if none of them ran."""
    tones = {STATUS_TONES.get(status, "soft") for status in statuses}
    return next(tone for tone in ("bad", "note", "good", "soft") if tone in tones)


def _demand(test: Mapping[str, Any]) -> str:
    """What the test needs, as HTML."""
    parts = []
    if test["needs"]:
        parts.append("needs " + ", ".join(f"<code>{escape(name)}</code>" for name in test["needs"]))
    if test["without"]:
        parts.append(f"applies where <code>{escape(test['without'])}</code> is not declared")
    text = "; ".join(parts) or "mandatory core"
    return f"{text[0].upper()}{text[1:]}; since interface {escape(test['since'])}."


def _link(address: str) -> str:
    """A link, if it is one that leads somewhere and does nothing else."""
    if address.startswith(("https://", "http://")):
        return f'<a href="{escape(address)}" rel="noreferrer">{escape(address)}</a>'
    return escape(address)
