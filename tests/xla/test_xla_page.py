"""The page on XLA: its commands run, its program prints what it says, and what it says of packages is true."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "xla.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def run(words: list[str], folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        words, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("command", [one for one in COMMANDS if " train " in one])
def test_training_runs(command: str, tmp_path: Path) -> None:
    output = run(["bash", "-c", f"{command} --out run"], tmp_path)
    assert "step 5/5" in output
    assert f"on {2 if '--ranks 2' in command else 1} rank" in output


def test_doctor_names_the_runtime_and_why_not_the_other(tmp_path: Path) -> None:
    assert "windlass doctor" in COMMANDS
    words = " ".join(run(["windlass", "doctor"], tmp_path).split())
    assert re.search(r"torch_xla is used; torch_tpu.* is not, because", words.replace("\u2502", ""))


def test_the_program_reads_every_tenth_step(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    output = run([sys.executable, "program.py"], tmp_path)
    losses = [float(loss) for loss in re.findall(r"step \d+: loss ([\d.]+), gradient norm [\d.]+", output)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    counts = re.search(r"(\d+) programs compiled, (\d+) run", output)
    assert counts is not None
    compiled, executed = map(int, counts.groups())
    assert compiled <= 4, "the layout, the first two steps, and nothing that comes with a later one"
    assert 30 <= executed <= 40


def test_versions_on_the_page_are_those_that_are_installed() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (ROOT / "constraints-xla.txt").read_text(), re.MULTILINE))
    extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["xla"]
    assert f"torchax=={pins['torchax']}" in PAGE
    assert f"torchax=={pins['torchax']}" in extra
    assert f"| `torch_xla` | XLA's CPU | torch {'.'.join(pins['torch'].split('.')[:2])} |" in PAGE
