"""The report as one page of HTML: it needs no network and no script, and reads on a phone, on paper and in the dark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Final

from windlass.conformance.page_tables import capability_section, kernel_section, rate_section
from windlass.conformance.page_tests import FAILURES, expected_section, failure_section, test_section
from windlass.conformance.page_text import counted, escape, fact, mark, section, sentence_of
from windlass.conformance.results import limits

_LEVEL_TONES: Final = {
    "reached": "good",
    "measured": "good",
    "failed": "bad",
    "incomplete": "note",
    "blocked by a lower level": "note",
}


def write_page(report: dict[str, Any], path: Path) -> None:
    """Write the page of a report (schema 1) to `path`. Whatever the report says is escaped."""
    path.write_text(draw_page(report), encoding="utf-8")


def draw_page(report: Mapping[str, Any]) -> str:
    """The page as text."""
    sections: tuple[Callable[[Mapping[str, Any]], str], ...] = (
        _header, _problems, _ladder, failure_section, expected_section, capability_section, kernel_section,
        rate_section, test_section, _reproduce, _versions, _footer,
    )  # fmt: skip
    template = Template(files("windlass.conformance").joinpath("page.html").read_text(encoding="utf-8"))
    title = f"{report['backend']['device']}: windlass conformance"
    return template.substitute(
        title=escape(title), content="\n".join(filter(None, (draw(report) for draw in sections)))
    )


# -- headline ---------------------------------------------------------------------------------------------------------


def _header(report: Mapping[str, Any]) -> str:
    backend = report["backend"]
    day, _, time = str(report["date"]).partition("T")
    tone, verdict, reason = _verdict(report)
    facts = [
        fact("Backend", f"{backend['name']}, from {backend['distribution']}"),
        fact("Runtime", backend.get("runtime")),
        fact("Devices", _devices(backend.get("devices") or [])),
        fact("Most ranks on this machine", report.get("most_ranks")),
        fact("Interface", report["interface"]),
        fact("Date", f"{day}, {time[:5]} UTC" if time.endswith("+00:00") else f"{day} {time}".strip()),
    ]
    return (
        '<header>\n<p class="over">windlass conformance report</p>\n'
        f"<h1>{escape(backend['device'])}</h1>\n"
        f'<p class="verdict {tone}"><strong>{mark(tone)} {escape(verdict)}</strong><span>{escape(reason)}</span></p>\n'
        f'<dl class="facts">{"".join(facts)}</dl>\n</header>'
    )


def _verdict(report: Mapping[str, Any]) -> tuple[str, str, str]:
    """Tone, the level in three words, and why it is that one."""
    level, asked = report["level"], report["asked"]
    titles = {one["level"]: one["title"] for one in report["levels"]}
    headline = "No level reached" if level is None else f"Level {level} reached"
    if report.get("problems"):
        return "bad", headline, "The run itself is not in order; see below."
    if report.get("selection"):
        return "note", "No level claimed", f"Only a part of the suite ran: {report['selection']}."
    open_levels = [one for one in report["levels"] if one["state"] in ("failed", "incomplete")]
    if open_levels:
        first = open_levels[0]
        return "bad", headline, f"Level {first['level']} ({titles[first['level']]}) is not: {_outcome(first)}."
    if level is None:
        return "bad", headline, "Nothing was run."
    reason = f"Every test that applies passed, up to the level that was asked for ({asked})."
    return "good", headline, " ".join(filter(None, (reason, limits(report))))


def _outcome(level: Mapping[str, Any]) -> str:
    counts: Mapping[str, int] = level["counts"]
    missed = {status: counts[status] for status in (*FAILURES, "not run") if counts.get(status)}
    return f"{counted(missed)}, of {sum(counts.values()):,} tests" if missed else "none of its tests passed"


def _devices(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown} and {len(names) - 4} more" if len(names) > 4 else shown


def _problems(report: Mapping[str, Any]) -> str:
    lines = "".join(f"<li>{mark('bad')} {sentence_of(one)}</li>" for one in report.get("problems") or [])
    return section("Problems of the run", f"<ul>{lines}</ul>") if lines else ""


# -- ladder -----------------------------------------------------------------------------------------------------------


def _ladder(report: Mapping[str, Any]) -> str:
    rungs = []
    for one in report["levels"]:
        tone = _LEVEL_TONES.get(one["state"], "soft")
        counts = counted(one["counts"])
        rungs.append(
            f'<li class="{tone}"><span class="rung" aria-hidden="true">L{one["level"]}</span>'
            f'<div class="row"><span class="title">Level {one["level"]}: {escape(one["title"])}</span>'
            f'<span class="{tone}">{mark(tone)} {escape(one["state"])}</span></div>'
            f'<p class="counts">{escape(counts) or "&nbsp;"}</p></li>'
        )
    lead = "A level is reached when all of its tests that apply here pass and every lower level is reached."
    return section("Levels", f'<ol class="ladder">{"".join(rungs)}</ol>', lead)


# -- how to repeat it -------------------------------------------------------------------------------------------------


def _reproduce(report: Mapping[str, Any]) -> str:
    lead = "On the same hardware, with the versions below:"
    command = f'<div class="command"><pre><code>{escape(report["command"])}</code></pre></div>'
    return section("Run it yourself", command, lead)


def _versions(report: Mapping[str, Any]) -> str:
    rows = [
        fact("windlass", report["suite"]),
        fact("Interface", report["interface"]),
        fact("torch", report["torch"]),
        fact("Python", report["python"]),
        fact("Platform", report["platform"]),
        *(
            fact(name.replace("_", " "), _plain(value))
            for name, value in sorted((report.get("hardware") or {}).items())
        ),
    ]
    return section("Versions and hardware", f'<dl class="facts">{"".join(rows)}</dl>')


def _plain(value: Any) -> str:
    """A fact of the accelerator, as one would say it."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _footer(report: Mapping[str, Any]) -> str:
    total = len(report["tests"])
    return f"<footer>{total:,} tests of the windlass conformance suite {escape(report['suite'])}.</footer>"
