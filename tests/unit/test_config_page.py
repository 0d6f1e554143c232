"""The page for users lists the same keys, with the same defaults and words, as the code."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from windlass.deepspeed_keys import ALIASES, DONE, IGNORED, NOT_YET, OWN, REFUSED

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def table_rows(header: str, rows: Iterable[tuple[str, ...]]) -> str:
    names = header.split(" | ")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def code_list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def expected_tables() -> dict[str, str]:
    """The tables as the page must have them, made from the code."""
    tables = {
        name: table_rows(
            "key | default | meaning",
            ((f"`{path}`", f"`{json.dumps(entry.default)}`", entry.meaning) for path, entry in table.items()),
        )
        for name, table in (("own", OWN), ("done", DONE))
    }
    sections: dict[str, list[str]] = defaultdict(list)
    for path in sorted(IGNORED):
        section, _, name = path.rpartition(".")
        sections[section].append(name)
    tables["ignored"] = table_rows(
        "section | keys", ((f"`{section}`" if section else "top level", code_list(names)) for section, names in
                           sections.items()))  # fmt: skip
    for title, header, table in (
        ("not yet", "key | given another value than | what happens", NOT_YET),
        ("refused", "key | given another value than | use instead", REFUSED),
    ):
        beside: dict[str, list[str]] = defaultdict(list)
        for path, entry in table.items():
            if entry.switch is not None:
                section = entry.switch if entry.switch in path else entry.switch.rpartition(".")[0]
                beside[entry.switch].append(path.removeprefix(f"{section}."))
        rows = []
        for path, entry in table.items():
            if entry.switch is None:
                names = f"`{path}`" + (f" (with {code_list(beside[path])})" if path in beside else "")
                text = getattr(entry, "alternative", None) or f"{severity(path)}: {NOT_YET[path].instead}"
                rows.append((names, f"`{json.dumps(entry.default)}`", text))
        tables[title] = table_rows(header, rows)
    tables["aliases"] = table_rows("spelling | stands for", ((f"`{a}`", f"`{b}`") for a, b in ALIASES.items()))
    return tables


def severity(path: str) -> str:
    return "error" if NOT_YET[path].changes_meaning else "warning"


@pytest.mark.parametrize("name", ["own", "done", "ignored", "not yet", "refused", "aliases"])
def test_page_lists_the_keys_of_the_code(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    _, _, after = page.partition(f"<!-- table: {name} -->\n")
    table, _, _ = after.partition("\n<!-- end -->")
    assert table == expected_tables()[name], f"put this into {PAGE.name}:\n{expected_tables()[name]}"
