"""The parts of the one command for a GPU: how it survives what they do, and what it says of it."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from gpu_benchmark import ROOT, make_row, module, part

WORKER = """
import json, os, sys, time
events, done = sys.argv[1], sys.argv[2:]
def tell(event, **values):
    with open(events, "a") as file:
        print(json.dumps({"event": event, **values}), file=file)
def row(name):
    return dict(part="p", name=name, case="", by="", ours=False, seconds=1.0, value=None, unit="", share=None,
                peak_bytes=None, facts={}, error="")
tell("facts", accelerator="pretend:0")
for item in ("good", "dies", "hangs", "last"):
    if item in done:
        continue
    tell("begin", item=item)
    if item == "dies":
        os.abort()
    if item == "hangs":
        time.sleep(600)
    tell("row", row=row(item))
    tell("end", item=item)
tell("finished")
"""


def run_pretended(folder: Path, program: str, seconds: float, item_seconds: float) -> Any:
    def command(events: Path, done: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", program, str(events), *done]

    said: list[str] = []
    result = part("processes").run_part("p", command, folder, seconds, item_seconds, said.append)
    assert said
    return result


def test_an_item_that_dies_or_hangs_is_a_row_and_the_others_are_measured(tmp_path: Path) -> None:
    result = run_pretended(tmp_path, WORKER, 60.0, 2.0)
    assert result.error == ""
    assert result.facts["accelerator"] == "pretend:0"
    assert [(row["name"], row["error"]) for row in result.rows] == [
        ("good", ""),
        ("dies", "the process ended with status -6"),
        ("hangs", "no end after 2 s"),
        ("last", ""),
    ]


def test_a_part_ends_in_its_time_and_keeps_what_it_has(tmp_path: Path) -> None:
    result = run_pretended(tmp_path, WORKER.replace('"good", "dies", ', '"good", '), 2.0, 60.0)
    assert result.error == "not finished after 2 s; --minutes gives more"
    assert [(row["name"], row["error"]) for row in result.rows] == [
        ("good", ""),
        ("hangs", "the time of the part is over"),
    ]


def test_results_of_pytest_are_summed_up(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n"
    )
    xml = tmp_path / "results.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "--rootdir", str(tmp_path), f"--junitxml={xml}"]
    subprocess.run([*command, str(tmp_path)], capture_output=True, check=False)
    total, failed = part("correctness").read_junit(xml.read_text(), "tests/three")
    assert (total.case, total.error) == ("1 passed, 1 failed, 1 skipped", "1 failed")
    assert failed.name.endswith("::test_b")
    assert failed.error == "assert 1 == 2"


def test_the_suite_runs_again_without_the_test_that_ended_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from windlass.conformance.command import _describe_end

    correctness, asked = part("correctness"), []

    def run(command: Sequence[str], log: Path, seconds: float) -> tuple[int, float]:
        asked.append(list(command))
        if len(asked) == 1:
            log.write_text(_describe_end(-9, "test_l1_norms.py::test_hangs[float32-1]").replace(" ", "\n"))
            return 1, 4.0
        level = {"level": 1, "state": "incomplete", "counts": {"passed": 3, "not run": 1}}
        (tmp_path / "conformance").mkdir()
        (tmp_path / "conformance" / "report.json").write_text(json.dumps({"levels": [level], "tests": []}))
        return 0, 4.0

    monkeypatch.setattr(correctness, "run_command", run)
    result = correctness.run_conformance("cuda", 3, None, tmp_path, 60.0)
    assert ["-k" in command for command in asked] == [False, True]
    assert asked[1][-1] == "not test_hangs"
    assert (result.error, result.seconds) == ("", 8.0)
    hung, level = result.rows
    assert hung["name"] == "test_hangs"
    assert hung["error"].startswith("hung or crashed")
    assert (level["name"], level["case"]) == ("level 1", "3 passed, 1 not run")


def test_an_engine_that_could_not_be_captured_is_named_so(monkeypatch: pytest.MonkeyPatch) -> None:
    training, facts = part("training"), {"capture_failed": "of an engine before"}
    context = SimpleNamespace(accelerator=SimpleNamespace(facts=facts))

    @contextlib.contextmanager
    def engine(*_: Any, capture: bool = False, **__: Any) -> Iterator[None]:
        if capture:
            facts["capture_failed"] = "no stream"
        yield

    monkeypatch.setattr(training, "windlass_engine", engine)
    monkeypatch.setattr(training, "fit", lambda _, measure: measure(2))
    monkeypatch.setattr(training, "engine_step", lambda *_: None)
    monkeypatch.setattr(training, "time_step", lambda *_: (1.0, 2.0))
    monkeypatch.setattr(
        training, "make_row", lambda _, by, ours, *__: part("rows").Row("training", "step", "", by, ours)
    )
    named = [next(training._measure_windlass(context, "windlass", capture=capture)).by for capture in (True, False)]
    assert named == ["windlass, but not captured: no stream", "windlass"]


def test_names_with_brackets_are_printed_as_they_are() -> None:
    row = make_row("test_a.py::test_b[/x-float32]", "[1]", "windlass [none]", ours=True, error="list[0]")
    report = {
        "parts": [{"name": "kernels", "seconds": 1.0, "error": "see [/log]"}],
        "rows": [row],
        "device": {},
        "scale": "full",
    }
    console = Console(file=io.StringIO(), width=200)
    part("tables").print_report(report, [], console)
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    for words in ("test_b[/x-float32]", "[1]", "windlass [none]", "list[0]", "see [/log]"):
        assert words in printed


def test_the_page_says_in_which_order_parts_run_and_for_how_long() -> None:
    shares: dict[str, float] = module("gpu").SHARES
    page = (ROOT / "benchmarks" / "README.md").read_text()
    told = re.findall(r"^\| `(\w+)` \| (\d+) % \|", page, re.MULTILINE)
    assert told == [(name, f"{100 * share:.0f}") for name, share in shares.items()]
    assert sum(shares.values()) == pytest.approx(1.0)
