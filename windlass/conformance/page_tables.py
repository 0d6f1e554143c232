"""What the backend declares and what was measured, on the report's page: capabilities, kernels, rates."""

from __future__ import annotations

import ast
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

from windlass.accelerator.interface import Capabilities
from windlass.conformance.page_text import escape, mark, section, sentence_of, with_prefix


def capability_section(report: Mapping[str, Any]) -> str:
    """Each capability: what it means, and whether it is declared or works undeclared."""
    meanings = capability_meanings()
    undeclared: list[str] = list(report.get("under_declared") or [])
    rows = []
    for name, value in report["capabilities"].items():
        working = [one for one in undeclared if one.partition(":")[0] == name]
        states = _capability_states(value, [one.partition(":")[2] for one in working])
        rows.append(
            f'<tr><td class="mono name">{escape(name)}</td><td class="small state">{states}</td>'
            f'<td class="small">{sentence_of(meanings.get(name, ""))}</td></tr>'
        )
    lead = "What a backend declares must work. What it does not declare it must refuse, with advice."
    if undeclared:
        lead += " What works here and is not declared is marked; the vendor may want to declare it."
    table = (
        '<table class="stack"><thead><tr><th>Capability</th><th>State</th><th>Meaning</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
    return section("Capabilities", table, lead)


def _capability_states(value: Any, working: Sequence[str]) -> str:
    """HTML for a flag or for a list of values, with the values that work undeclared ("" for a flag)."""
    states = []
    if isinstance(value, (list, tuple)):
        if value:
            states.append(f'<p class="good">{mark("good")} {escape(", ".join(map(str, value)))}</p>')
        else:
            states.append(f'<p class="soft">{mark("soft")} none</p>')
        if working:
            states.append(f'<p class="note">{mark("note")} works, not declared: {escape(", ".join(working))}</p>')
    elif value:
        states.append(f'<p class="good nowrap">{mark("good")} declared</p>')
    elif working:
        states.append(f'<p class="note">{mark("note")} works, not declared</p>')
    else:
        states.append(f'<p class="soft nowrap">{mark("soft")} not declared</p>')
    return "".join(states)


def capability_meanings() -> dict[str, str]:
    """The docstring under each field of Capabilities, on one line."""
    (definition,) = ast.parse(inspect.getsource(Capabilities)).body
    assert isinstance(definition, ast.ClassDef)
    meanings = {}
    for node, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            match following:
                case ast.Expr(value=ast.Constant(value=str() as text)):
                    meanings[node.target.id] = " ".join(text.split())
    return meanings


def kernel_section(report: Mapping[str, Any]) -> str:
    """Each kernel: who computes it, its worst error against what is allowed, and what is allowed."""
    kernels = report.get("kernels") or []
    if not kernels:
        return ""
    table = (
        '<table class="stack"><thead><tr><th>Kernel</th><th>Worst error</th><th>Allowed</th></tr></thead>'
        f"<tbody>{''.join(map(_kernel, kernels))}</tbody></table>"
    )
    lead = "Errors against the reference in higher precision; a full bar is all of the error that the schema allows."
    return section("Kernels", table, lead)


def _kernel(kernel: Mapping[str, Any]) -> str:
    native = kernel["chosen"] != "reference"
    others = [name for name in kernel["implementations"] if name != kernel["chosen"]]
    runs_as = f"native, <code>{escape(kernel['chosen'])}</code>" if native else "reference"
    also = f'<p class="small soft">also: {escape(", ".join(others))}</p>' if others else ""
    bars = "".join(
        _error_bar(name, [case for case in kernel["cases"] if case["implementation"] == name])
        for name in dict.fromkeys(case["implementation"] for case in kernel["cases"])
    )
    return (
        f'<tr><td class="name"><p class="mono">{escape(kernel["name"])}</p><p class="small">{runs_as}</p>{also}</td>'
        f'<td class="small error">{bars or "<p>not measured</p>"}</td>'
        f'<td class="small"><p>{sentence_of(kernel["tolerance"])}</p>'
        f'<p class="soft">Rounding: {sentence_of(kernel["rounding"])}</p></td></tr>'
    )


def _error_bar(implementation: str, cases: Sequence[Mapping[str, Any]]) -> str:
    """The worst case of one implementation, as a bar and in words."""
    worst = max(cases, key=_share)
    share = _share(worst)
    name = f'<p><code>{escape(implementation)}</code> <span class="soft">{escape(worst["case"])}</span></p>'
    if share > 1:
        tone, width = "bad", 100.0
        words = f"{share:.3g} times what is allowed" if math.isfinite(share) else "not finite"
    else:
        tone, width = "good", 100 * share
        words = "exact" if share == 0 else f"{100 * share:.2g} % of what is allowed"
    number = "1 case" if len(cases) == 1 else f"{len(cases)} cases"
    inner = f'<i style="width: {width:.1f}%"></i>' if width else ""
    bar = f'<div class="bar{" full" if tone == "bad" else ""}">{inner}</div>'
    return f'{name}{bar}<p><span class="{tone}">{mark(tone)} {words}</span> <span class="soft">({number})</span></p>'


def _share(case: Mapping[str, Any]) -> float:
    """The error as a part of the bound; infinite where the report has null, as JSON has no infinity."""
    error, bound = case["error"], case["bound"]
    if error == 0:
        return 0.0
    return float(error) / float(bound) if error is not None and bound else math.inf


def rate_section(report: Mapping[str, Any]) -> str:
    """What was measured in bytes or operations per second."""
    rates = report.get("rates") or []
    if not rates:
        return ""
    rows = "".join(
        f"<tr><td>{escape(rate['name'])}</td>"
        f'<td class="number">{escape(with_prefix(rate["value"], rate["unit"]))}</td></tr>'
        for rate in rates
    )
    table = f'<table><thead><tr><th>Rate</th><th class="number">Measured</th></tr></thead><tbody>{rows}</tbody></table>'
    return section(
        "Rates", table, "Measured in this run on this machine. They are facts, and no level depends on them."
    )
