"""The parts that measure nothing: the conformance suite and the tests, as commands, summed up in rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from xml.etree import ElementTree

from gpu_parts.processes import PartResult, python, read_json, run_command
from gpu_parts.rows import Row

_SHOWN: Final = 10  # failing tests that get a row of their own
_LONG_SECONDS: Final = 30  # of one test, after which the log is told where it is


def run_conformance(accelerator: str, level: int, select: str | None, folder: Path, seconds: float) -> PartResult:
    """`windlass conform`, with its report in `folder`."""
    report_folder = folder / "conformance"
    result = PartResult("conformance", output=str(folder / "conformance.log"))
    command = python("-m", "windlass.cli", "conform", "--accelerator", accelerator, "--level", str(level))
    command += ["--report", str(report_folder)]
    ended: list[str] = []  # tests that took the process of the suite with them
    while True:
        chosen = [] if select is None else ["-k", select]
        status, taken = run_command([*command, *chosen], Path(result.output), seconds - result.seconds)
        result.seconds += taken
        report = read_json(report_folder / "report.json")
        found = None if status is None or report else find_last_test(Path(result.output).read_text(encoding="utf-8"))
        if found is None or found in ended or result.seconds > seconds / 2:
            break
        ended.append(found)
        select = " and ".join([*([] if select is None else [f"({select})"]), f"not {found}"])
        why = f"hung or crashed, and the suite ran again without it; see {result.output}"
        result.rows.append(Row("conformance", found, "", "windlass", error=why).to_json())
    if status is None:
        result.error = f"not finished after {seconds:.0f} s; --minutes gives more"
    elif not report:
        result.error = f"no report, exit status {status}, see {result.output}"
    for one in report.get("levels", []):
        if one["state"] in ("not asked for", "no tests yet"):
            continue
        counts = ", ".join(f"{number} {status}" for status, number in one["counts"].items() if number)
        good = one["state"] in ("reached", "measured") or (select is not None and one["state"] == "incomplete")
        facts = {"state": one["state"], "counts": one["counts"]}
        row = Row(
            "conformance", f"level {one['level']}", counts, "windlass", facts=facts, error="" if good else one["state"]
        )
        result.rows.append(row.to_json())
    failed = [one for one in report.get("tests", []) if one["status"] in ("failed", "unexpected pass")]
    for one in failed[:_SHOWN]:
        message = one["message"].splitlines()[0] if one["message"] else one["status"]
        result.rows.append(Row("conformance", one["id"], "", "windlass", error=message[:300]).to_json())
    return result


def find_last_test(log: str) -> str | None:
    """The test that was running when the process of the suite ended, by the advice at the end of what it printed."""
    found = re.findall(r"-k (\w+) runs that test alone", " ".join(log.split()))
    return found[-1] if found else None


def run_tests(paths: list[str], folder: Path, seconds: float) -> PartResult:
    """pytest on some paths, each in a process of its own: what one sets up before it starts, another must not have."""
    result = PartResult("tests", output=str(folder / "tests.log"))
    for path in paths:
        xml = folder / f"{path.replace('/', '-')}.xml"
        command = python("-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={xml}", path)
        command += ["-o", f"faulthandler_timeout={_LONG_SECONDS}"]
        left = seconds - result.seconds
        status, taken = run_command(command, Path(result.output), left)
        result.seconds += taken
        if status is None:
            result.error = f"{path} not finished after {left:.0f} s; --minutes gives more"
        elif not xml.is_file():
            result.error = f"pytest on {path} ended with status {status} and left no results, see {result.output}"
        if xml.is_file():
            result.rows += [row.to_json() for row in read_junit(xml.read_text(encoding="utf-8"), path)]
    return result


def read_junit(text: str, path: str) -> list[Row]:
    """A row with the counts, and one for each of the first tests that failed."""
    suites = list(ElementTree.fromstring(text).iter("testsuite"))
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    }
    failed = counts["failures"] + counts["errors"]
    words = f"{counts['tests'] - failed - counts['skipped']} passed, {failed} failed, {counts['skipped']} skipped"
    rows = [Row("tests", path, words, "windlass", facts=counts, error=f"{failed} failed" if failed else "")]
    for test in (one for suite in suites for one in suite.iter("testcase")):
        problem = test.find("failure")
        problem = test.find("error") if problem is None else problem
        if problem is not None and len(rows) <= _SHOWN:
            name = f"{test.get('classname', '')}::{test.get('name', '')}"
            lines = (problem.get("message") or "failed").splitlines()
            rows.append(Row("tests", name, "", "windlass", error=lines[0][:300]))
    return rows
