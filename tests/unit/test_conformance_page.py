"""The page of a conformance report: what it says, that it is whole, that nothing in it is executed or fetched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from windlass.accelerator.interface import Capabilities
from windlass.conformance.page import write_page
from windlass.conformance.page_tables import capability_meanings
from windlass.conformance.page_text import counted, with_prefix

HOSTILE = "<script>alert('x')</script>\"><img src=https://evil.example/x.png onerror=alert(1)>&amp;$title"
VOID = {"meta", "img", "br", "hr", "input", "link"}


class Page(HTMLParser):
    """Reads a page as a browser would: its elements, the text in each, whether every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def make_test(name: str, level: int, status: str = "passed", **more: Any) -> dict[str, Any]:
    return {
        "id": name, "level": level, "must": f"Sentence of `{name}`.", "since": "1.0", "needs": [], "without": None,
        "status": status, "seconds": 0.25, "message": "", **more,
    }  # fmt: skip


@pytest.fixture
def passing() -> dict[str, Any]:
    """A report of a backend that reaches level 1, where 1 was asked for."""
    capabilities = {name: getattr(Capabilities(), name) for name in Capabilities.__dataclass_fields__}
    states = ["reached", "reached", "not asked for", "not asked for", "no tests yet", "not asked for"]
    counts = [{"passed": 2, "under-declared": 1}, {"passed": 1}, {}, {}, {}, {}]
    return {
        "schema": 1, "suite": "0.1.0", "interface": "1.0", "torch": "2.13.0", "python": "3.11.9", "platform": "Linux-6",
        "date": "2026-11-21T12:00:00+00:00", "most_ranks": 4, "level": 1, "asked": 1, "selection": None, "problems": [],
        "backend": {"name": "acme", "device": "acme:3", "distribution": "windlass-acme 2.1", "devices": ["Acme T1"],
                    "runtime": "acme-rt 9"},
        "hardware": {"cores": 16384, "linked": True},
        "capabilities": {**capabilities, "dtypes": ["float32"], "matmul_dtypes": [], "views": True},
        "command": "windlass conform --accelerator acme:3 --level 1",
        "levels": [{"level": level, "title": f"Title {level}", "state": states[level], "counts": counts[level]}
                   for level in range(6)],
        "tests": [
            make_test("test_l0_memory.py::test_alignment[float32]", 0, needs=["dtypes:float32"]),
            make_test("test_l0_memory.py::test_alignment[uint8]", 0),
            make_test("test_l0_memory.py::test_float64", 0, "under-declared", needs=["float64"]),
            make_test("test_l1_adamw.py::test_error", 1),
        ],
        "kernels": [
            {"name": "adamw", "chosen": "numba", "implementations": ["numba", "reference"], "tolerance": "one ulp",
             "rounding": "once", "cases": [
                 {"implementation": "numba", "case": "bfloat16", "error": 0.31, "bound": 1.0, "unit": "of the bound"},
                 {"implementation": "numba", "case": "float32", "error": 0.02, "bound": 1.0, "unit": "of the bound"}]},
        ],
        "rates": [{"name": "device copy", "value": 5.1e9, "unit": "B/s"}],
        "under_declared": ["dtypes:float16", "float64"], "expected_failures": [],
    }  # fmt: skip


@pytest.fixture
def failing(passing: dict[str, Any]) -> dict[str, Any]:
    """The same, with a failure at level 1 and a known one at level 0."""
    report = copy.deepcopy(passing)
    report["level"] = 0
    report["levels"][1].update(state="failed", counts={"failed": 1})
    report["tests"][3].update(status="failed", message="AssertionError: 4.5 is more than 1\nand the traceback")
    report["tests"][1].update(status="expected failure", message="OSError: known\nand its traceback")
    report["kernels"][0]["cases"][0]["error"] = 4.5
    known = {"reason": "A known bug.", "link": "https://bugs.example/7", "expires": "2027-03-01"}
    report["expected_failures"] = [{"id": report["tests"][1]["id"], **known}]
    return report


def draw(report: dict[str, Any], folder: Path) -> Page:
    path = folder / "report.html"
    write_page(report, path)
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


def strings_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path to every string in a report."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from strings_in(inner, (*path, key))


def test_a_passing_report_says_what_was_reached(passing: dict[str, Any], tmp_path: Path) -> None:
    page = draw(passing, tmp_path)
    for words in (
        "acme:3", "Level 1 reached", "acme, from windlass-acme 2.1", "acme-rt 9", "2026-11-21, 12:00 UTC",
        "Level 0: Title 0 ✓ reached 2 passed, 1 under-declared", "Level 4: Title 4 ○ no tests yet",
        "matmul_dtypes ○ none", "views ✓ declared", "lazy ○ not declared", "float64 ! works, not declared",
        "works, not declared: float16", "Operations are deferred and compiled",
        "native, numba", "also: reference", "31 % of what is allowed", "(2 cases)", "one ulp", "device copy 5.10 GB/s",
        "windlass conform --accelerator acme:3 --level 1", "torch 2.13.0", "cores 16,384", "linked yes", "4 tests",
    ):  # fmt: skip
        assert words in page.text
    assert "Failures" not in page.text
    assert "Expected failures" not in page.text


def test_tests_without_hardware_limit_the_verdict(passing: dict[str, Any], tmp_path: Path) -> None:
    passing["most_ranks"] = 1
    passing["levels"][1]["counts"]["no hardware"] = 7
    page = draw(passing, tmp_path)
    assert "That holds for 1 rank: 7 tests need more devices than this machine has." in page.text


def test_a_failing_report_shows_failures_open_before_all_tests(failing: dict[str, Any], tmp_path: Path) -> None:
    page = draw(failing, tmp_path)
    for words in (
        "Level 0 reached", "Level 1 (Title 1) is not: 1 failed, of 1 tests", "One test must pass and did not.",
        "AssertionError: 4.5 is more than 1", "A known bug.", "until 2027-03-01", "4.5 times what is allowed",
    ):  # fmt: skip
        assert words in page.text
    assert page.text.index("AssertionError") < page.text.index("Capabilities") < page.text.index("All tests")
    opened = [attributes for attributes in page.all("details") if "open" in attributes]
    assert [attributes["class"] for attributes in opened] == ["failure"]
    assert page.all("a") == [{"href": "https://bugs.example/7", "rel": "noreferrer"}]


def test_every_test_and_sentence_is_there(failing: dict[str, Any], tmp_path: Path) -> None:
    text = draw(failing, tmp_path).text
    listed = text[text.index("All tests") :]
    for test in failing["tests"]:
        name, _, parameters = test["id"].partition("[")
        assert name in listed
        assert parameters in listed
        assert test["must"].replace("`", "").replace(" ", "") in listed.replace(" ", "")
    assert "OSError: known" in listed


def test_a_page_needs_nothing_from_elsewhere(failing: dict[str, Any], tmp_path: Path) -> None:
    page = draw(failing, tmp_path)
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    assert not any({"src", "srcset", "action"} & set(attributes) for _, attributes in page.elements)
    source = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "@import" not in source
    assert "url(" not in source


def test_hostile_text_stays_text(failing: dict[str, Any], tmp_path: Path) -> None:
    """In every string of the report, one after the other: the same elements come out, and no handler."""
    unseen = {("kernels", 0, "cases", case, "unit") for case in (0, 1)}  # all kernels' errors are parts of their bounds
    unseen.add(("kernels", 0, "cases", 1, "case"))  # the worst one is named
    failing["hardware"][HOSTILE] = failing["capabilities"][HOSTILE] = "a name as bad as a value"
    for path in list(strings_in(failing)):
        report = copy.deepcopy(failing)
        place: Any = report
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = HOSTILE
        page = draw(report, tmp_path)
        assert not {"script", "img"} & {tag for tag, _ in page.elements}, path
        assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes), path
        if path[0] != "under_declared" and path not in unseen:
            assert "alert('x')" in page.text, path


def test_a_link_that_is_no_address_is_not_a_link(failing: dict[str, Any], tmp_path: Path) -> None:
    failing["expected_failures"][0]["link"] = "javascript:alert(1)"
    assert draw(failing, tmp_path).all("a") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"selection": "-k adamw", "level": None}, "No level claimed Only a part of the suite ran: -k adamw."),
        ({"problems": ["The suite lacks 1 of its tests."], "level": None}, "The suite lacks 1 of its tests."),
        ({"kernels": [], "rates": [], "tests": [], "level": None}, "No level reached Nothing was run."),
        ({"rates": [{"name": "copy", "value": None, "unit": "B/s"}]}, "copy not finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusual_runs_are_told(passing: dict[str, Any], tmp_path: Path, change: dict[str, Any], words: str) -> None:
    text = draw(passing | change, tmp_path).text
    assert words.replace(" ", "") in text.replace("✕", "").replace("!", "").replace(" ", "")


def test_an_error_that_is_not_finite_is_no_pass(passing: dict[str, Any], tmp_path: Path) -> None:
    passing["kernels"][0]["cases"][1]["error"] = None
    text = draw(passing, tmp_path).text
    assert "numba float32 ✕ not finite (2 cases)" in text


def test_every_capability_has_a_meaning() -> None:
    assert set(capability_meanings()) == set(Capabilities.__dataclass_fields__)
    assert all(capability_meanings().values())


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (5.1e9, "B/s", "5.10 GB/s"), (999.6, "B/s", "1.00 kB/s"), (3.4e-6, "s", "3.40 µs"), (0.0, "s", "0.00 s"),
        (1.234e11, "FLOP/s", "123 GFLOP/s"), (12.34, "B/s", "12.3 B/s"), (2.5e22, "B/s", "25000 EB/s"),
        (4.1e8, "elements/s", "410,000,000 elements/s"), (0.25, "of the link", "0.25 of the link"), (7.0, "", "7"),
        (None, "B/s", "not finite"), (float("inf"), "s", "not finite"),
    ],
)  # fmt: skip
def test_numbers_have_their_prefix(value: float | None, unit: str, text: str) -> None:
    assert with_prefix(value, unit) == text


def test_counts_are_words() -> None:
    assert counted({"passed": 1200, "unexpected pass": 2, "failed": 0}) == "1,200 passed, 2 unexpected passes"
