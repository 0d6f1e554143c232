"""One command for one GPU, in less than 8 minutes: is it right, how fast is it, and are the goals met?

    python benchmarks/gpu.py [--out FOLDER] [--save] [--only PARTS] [--minutes 8]
                             [--accelerator cuda] [--scale full|small]

Five parts, one after the other, each in processes of its own and with its own share of the time; none takes the others
down, and what fails is a row. `rates` measures copies, links and matrix products, `kernels` each kernel beside torch's
own and beside those rates, `training` a GPT of a billion parameters; `tests` runs the tests that need a GPU, and
`conformance` the suite to level 3. Everything goes to FOLDER/gpu.json; --save keeps a copy with date and device in
benchmarks/results.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from gpu_parts.correctness import run_conformance, run_tests
from gpu_parts.goals import judge
from gpu_parts.processes import PartResult, python, run_part
from gpu_parts.tables import print_report
from rich.console import Console

ROOT: Final = Path(__file__).resolve().parents[1]
SHARES: Final = {"rates": 0.08, "kernels": 0.19, "training": 0.26, "tests": 0.12, "conformance": 0.35}
"""Of the time; what one part leaves goes to those after it. The suite is last: it compiles the most programs, nobody
knows for how long."""
_ITEM_SECONDS: Final = {"full": 75.0, "small": 60.0}
_TESTS: Final = {"full": ("tests/cuda",), "small": ("tests/unit/test_encoding.py",)}
"""Not tests/triton_kernels: it interprets the kernels on the host. On a GPU, the suite's level 1 runs them."""
_SCHEMA: Final = 1
_LOG_WIDTH: Final = 160  # of tables in a file, which has no width of its own


def main() -> int:
    """Run the parts, print the tables, write the report; 1 if a part did not run to its end or a test failed."""
    options = _parse()
    if options.worker is not None:
        from gpu_parts.worker import run_worker  # with torch: the driver does without

        return run_worker(options.worker, options.accelerator, options.scale, options.events, options.done)
    console = Console(width=None if sys.stdout.isatty() else _LOG_WIDTH)
    options.out.mkdir(parents=True, exist_ok=True)
    _remove_old(options.out)
    results: list[PartResult] = []
    report: dict[str, Any] = {}
    end = time.monotonic() + 60 * options.minutes
    for part in options.only:
        left = end - time.monotonic()
        later = sum(SHARES[name] for name in options.only[options.only.index(part) + 1 :])
        seconds = left * SHARES[part] / (SHARES[part] + later)
        console.print(f"[bold]{part}[/bold], at most {seconds:.0f} s")
        results.append(_run(part, options, seconds, console))
        report = _make_report(options, results)
        (options.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.save:
        path = ROOT / "benchmarks" / "results" / f"{report['date'][:10]}-{_slug(report)}.json"
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_report(report, judge(report["rows"]), console)
    console.print(f"written to {options.out / 'gpu.json'}")
    if options.save:
        console.print(f"saved as {path.relative_to(ROOT)}")
    wrong = [row for row in report["rows"] if row["part"] in ("conformance", "tests") and row["error"]]
    return 1 if wrong or any(result.error for result in results) else 0


def _remove_old(folder: Path) -> None:
    """What an earlier run left, or it would be taken for this run's; what others keep in the folder stays."""
    patterns = [f"{part}{end}" for part in SHARES for end in (".log", "-[0-9]*.jsonl")]
    for pattern in (*patterns, "tests-*.xml", "conformance/report.json", "gpu.json"):
        for old in folder.glob(pattern):
            old.unlink()


def _run(part: str, options: argparse.Namespace, seconds: float, console: Console) -> PartResult:
    full = options.scale == "full"
    if part == "conformance":
        level, select = (3, None) if full else (0, "test_l0_counters")
        return run_conformance(options.accelerator, level, select, options.out, seconds)
    if part == "tests":
        return run_tests(list(_TESTS[options.scale]), options.out, seconds)

    def command(events: Path, done: Sequence[str]) -> list[str]:
        words = ["--worker", part, "--events", str(events), "--accelerator", options.accelerator]
        words += ["--scale", options.scale, *(word for item in done for word in ("--done", item))]
        return python(str(Path(__file__).resolve()), *words)

    return run_part(part, command, options.out, seconds, _ITEM_SECONDS[options.scale], console.print)


def _make_report(options: argparse.Namespace, results: list[PartResult]) -> dict[str, Any]:
    device = next((result.facts for result in results if result.facts), {})
    rows = [row for result in results for row in result.rows]
    parts = [asdict(result) for result in results]
    for part in parts:
        del part["rows"], part["facts"]
    return {
        "schema": _SCHEMA,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv[1:]),
        "scale": options.scale,
        "device": {name: value for name, value in device.items() if name != "event"},
        "parts": parts,
        "goals": [goal.to_json() for goal in judge(rows)],
        "rows": rows,
    }


def _slug(report: dict[str, Any]) -> str:
    """The device's name for a file: nvidia-h200."""
    device = report["device"]
    name = str(device.get("facts", {}).get("model") or device.get("accelerator", "unknown"))
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Tests, rates, kernels and training on one GPU, in 8 minutes.")
    parser.add_argument("--out", type=Path, default=ROOT / ".cache" / "gpu", help="folder for logs and the report")
    parser.add_argument("--save", action="store_true", help="keep the report in benchmarks/results")
    parser.add_argument("--accelerator", default="cuda", help="default: %(default)s")
    parser.add_argument("--scale", choices=("full", "small"), default="full", help="small: does it run at all?")
    parser.add_argument("--only", help=f"some of {','.join(SHARES)}")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: %(default)s)")
    for name in ("--worker", "--events", "--done"):  # what the parts are started with
        parser.add_argument(name, help=argparse.SUPPRESS, action="append" if name == "--done" else "store")
    options = parser.parse_args()
    options.only = list(SHARES) if options.only is None else options.only.split(",")
    if unknown := sorted(set(options.only) - set(SHARES)):
        parser.error(f"--only knows {', '.join(SHARES)}, got {', '.join(unknown)}")
    if options.minutes <= 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes:g}")
    options.out = options.out.resolve()
    options.done = options.done or []
    options.events = None if options.events is None else Path(options.events)
    return options


if __name__ == "__main__":
    sys.exit(main())
