"""The small pieces of the report's page: escaped text, marks that do without colour, numbers with their units."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from typing import Any, Final

_MARKS: Final = {"good": "✓", "bad": "✕", "note": "!", "soft": "○"}
_PREFIXES: Final = {-4: "p", -3: "n", -2: "µ", -1: "m", 0: "", 1: "k", 2: "M", 3: "G", 4: "T", 5: "P", 6: "E"}
_SYMBOLS: Final = re.compile(r"(B|b|s|FLOP|FLOPS|Hz|W|J)(/.*)?")
_PLURALS: Final = {"expected failure": "expected failures", "unexpected pass": "unexpected passes"}

STATUS_TONES: Final = {
    "passed": "good",
    "failed": "bad",
    "unexpected pass": "bad",
    "expected failure": "note",
    "under-declared": "note",
}


def escape(value: Any) -> str:
    """Text for HTML, quotes included, so that it may stand in an attribute."""
    return html.escape(str(value), quote=True)


def sentence_of(text: Any) -> str:
    """Escaped prose whose `names` are set as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def mark(tone: str) -> str:
    """A sign for good, bad and so on; the words beside it say the same."""
    return f'<i class="sign {tone}" aria-hidden="true">{_MARKS[tone]}</i>'


def section(title: str, body: str, lead: str = "") -> str:
    """A part of the page. `title` and `lead` are plain text, `body` is HTML."""
    intro = f'\n<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section>\n<h2>{escape(title)}</h2>{intro}\n{body}\n</section>"


def fact(name: str, value: Any) -> str:
    """One term and its description; nothing where there is none."""
    return f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" if value not in (None, "") else ""


def counted(counts: Mapping[str, int]) -> str:
    """ "40 passed, 2 failed"; empty without counts."""
    return ", ".join(
        f"{number:,} {_PLURALS.get(status, status) if number > 1 else status}"
        for status, number in counts.items()
        if number
    )


def with_prefix(value: float | None, unit: str) -> str:
    """A number with three figures and an SI prefix where the unit takes one: 5.1e9 B/s is "5.10 GB/s"."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if not _SYMBOLS.fullmatch(unit):
        return f"{value:,.4g} {unit}".strip() if abs(value) < 1e4 else f"{value:,.0f} {unit}".strip()
    power = 0 if value == 0 else math.floor(math.log10(abs(float(f"{value:.3g}")))) // 3
    power = max(min(power, max(_PREFIXES)), min(_PREFIXES))
    scaled = value / 1000.0**power
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:.{digits}f} {_PREFIXES[power]}{unit}"
