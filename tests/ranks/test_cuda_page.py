"""The page on NVIDIA GPUs: what needs no GPU runs, and its tables are those of the code."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from windlass.accelerator.reference import SCHEMAS
from windlass.config import load_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cuda.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def run(words: list[str], folder: Path) -> str:
    """What a command prints on this machine's processor, whatever else it has."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "WINDLASS_ACCELERATOR": "cpu"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def table(title: str) -> list[list[str]]:
    """The cells of the table whose first column has this title."""
    found = re.search(rf"^\| {title} \|.*\n\|[- |]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert found is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines()]


def test_the_commands_run(tmp_path: Path) -> None:
    doctor, small = COMMANDS
    assert "cuda" in run(doctor.split(), tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    assert "Goals, on cpu:0" in run(small.split(), tmp_path)
    assert (tmp_path / "run" / "gpu.json").is_file()


@pytest.mark.parametrize(
    ("program", "wanted"),
    [(PROGRAMS[0], r"^model .+"), (PROGRAMS[1], r"^copies on the device: [\d.]+ GB/s"), (PROGRAMS[2], r"^loss [\d.]+")],
    ids=["facts", "rates", "model"],
)
def test_the_programs_run(program: str, wanted: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(program)
    output = run([sys.executable, "program.py"], tmp_path)
    assert re.search(wanted, output, re.MULTILINE), output


def test_every_kernel_is_on_the_page() -> None:
    named = [name for row in table("kernel") for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(schema.name for schema in SCHEMAS)


def test_the_configuration_on_the_page_is_one() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    config = load_config(json.loads(text), 1)
    assert config.capture_update
    assert config.bf16.enabled


def test_the_goals_on_the_page_are_those_that_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    goals = importlib.import_module("gpu_parts.goals").judge([])
    judged = [float(re.sub(r"[^\d.]", "", goal.wanted)) for goal in goals if "%" in goal.wanted]
    wanted = [cells[1].replace("one eighth", "12.5 %") for cells in table("goal, on one H100 or H200")]
    assert [float(re.sub(r"[^\d.]", "", cell)) for cell in wanted] == judged
    signs = [goal.wanted[:2] for goal in goals if "%" in goal.wanted]
    assert [">=" if cell.startswith("at least") else "<=" for cell in wanted] == signs


def test_links_to_headings_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for anchor in re.findall(r"\]\(#([\w-]+)\)", PAGE):
        assert anchor in headings
    benchmarks = (ROOT / "benchmarks" / "README.md").read_text()
    assert "## One GPU, one command" in benchmarks
