"""What docs/plan.md shows is what the program prints, and its code runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from typer.testing import CliRunner

PAGE = (Path(__file__).parents[2] / "docs" / "plan.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_plan_on_the_page_is_printed_by_the_command_on_the_page(tmp_path: Path) -> None:
    from windlass.cli import app

    config = tmp_path / "stage3.json"
    config.write_text(json.dumps(json.loads(_blocks("json")[0])))
    words = _blocks("sh")[0].split()
    assert words[:3] == ["windlass", "plan", "stage3.json"]
    result = CliRunner().invoke(app, ["plan", str(config), *words[3:]])
    assert result.exit_code == 0, result.output
    assert result.output.split("\n\nConfiguration")[0].strip() == _blocks("text")[0].strip()


def test_the_code_on_the_page_runs() -> None:
    for block in _blocks("python"):
        exec(compile(block, "docs/plan.md", "exec"), {})
