"""The rows and the goals for people."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gpu_parts.goals import Goal

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_COLOURS = {"met": "green", "missed": "red", "not measured": "yellow"}


def print_report(report: dict[str, Any], goals: list[Goal], console: Console) -> None:
    """One table per part, then the goals."""
    for part in report["parts"]:
        rows = [row for row in report["rows"] if row["part"] == part["name"]]
        if rows:
            console.print(_make_table(f"{part['name']}, {part['seconds']:.0f} s", rows))
        if part["error"]:
            console.print(f"[red]{part['name']}:[/red] {escape(part['error'])}")
    table = Table(title=f"Goals, on {report['device'].get('accelerator', 'no device')}, scale {report['scale']}")
    for name in ("goal", "wanted", "seen", ""):
        table.add_column(name, overflow="fold")
    for goal in goals:
        colour = _COLOURS[goal.state]
        table.add_row(goal.goal, goal.wanted, escape(goal.seen) or "-", f"[{colour}]{goal.state}[/{colour}]")
    console.print(table)


def _make_table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title)
    for name in ("what", "case", "by"):
        table.add_column(name, overflow="fold")
    for name in ("time", "rate", "of floor", "peak"):
        table.add_column(name, justify="right", no_wrap=True)
    last: tuple[str, str] | None = None
    for row in rows:
        key = (row["name"], row["case"])
        shown = ("", "") if key == last else (escape(row["name"]), escape(row["case"]))
        last = key
        by = f"[bold]{escape(row['by'])}[/bold]" if row["ours"] else escape(row["by"])
        if row["error"]:
            table.add_row(*shown, f"{by} [red]{escape(row['error'])}[/red]", "", "", "", "")
            continue
        share = "" if row["share"] is None else f"{row['share']:.0%}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        table.add_row(*shown, by, format_time(row["seconds"]), format_rate(row["value"], row["unit"]), share, peak)
    return table


def format_time(seconds: float | None) -> str:
    """In milliseconds, or microseconds below one."""
    if seconds is None:
        return ""
    return f"{seconds * 1e3:,.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:,.1f} us"


def format_rate(value: float | None, unit: str) -> str:
    """With a prefix: 3.35 TB/s."""
    if value is None:
        return ""
    if unit == "tokens/s":
        return f"{value:,.0f} {unit}"
    scale, prefix = next(((scale, prefix) for scale, prefix in _PREFIXES if value >= scale), (1.0, ""))
    return f"{value / scale:.3g} {prefix}{unit}"
