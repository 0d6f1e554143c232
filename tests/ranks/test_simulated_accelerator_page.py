"""The page on the simulated accelerator: its commands run, and its tables are those of the code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from windlass.backends.sim.machines import machine_names
from windlass.backends.sim.settings import FAULT_KINDS, SimSettings, parse_settings

PAGE = (Path(__file__).parents[2] / "docs" / "simulated-accelerator.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]


def rows(title: str) -> list[list[str]]:
    """The cells of the table whose first column has this title, without backticks."""
    table = re.search(rf"^\| {title} \|.*\n\|[- |]+\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert table is not None
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_command_runs(command: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", f"{command} --out run"],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 5/5" in done.stdout
    assert ("skipped an optimizer step" in done.stdout + done.stderr) == ("fault=inf" in command)


def test_keys_and_defaults() -> None:
    defaults = SimSettings()
    for key, default, _ in rows("key"):
        if key == "fault":
            assert defaults.fault is None
        else:
            assert getattr(parse_settings(f"{key}={default}"), key) == getattr(defaults, key)
    assert {row[0] for row in rows("key")} == set(SimSettings.__dataclass_fields__)


def test_kinds_of_faults_and_machines() -> None:
    assert [row[0] for row in rows("kind")] == list(FAULT_KINDS)
    (machines,) = [row[2] for row in rows("key") if row[0] == "machine"]
    assert set(machines.partition(":")[2].replace(" ", "").split(",")) == set(machine_names())
