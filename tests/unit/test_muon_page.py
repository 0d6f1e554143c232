"""What docs/muon.md shows runs, and what it lists is what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from windlass.accelerator.polar import COEFFICIENTS, Coefficients, gram_flops, standard_flops
from windlass.config import load_config
from windlass.config_models import GivenMuonParams, MuonConfig
from windlass.models import SHAPES
from windlass.muon_rules import muon_rules
from windlass.recipe import OPTIMIZERS, default_config

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "muon.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def _rows(heading: str) -> list[list[str]]:
    """The cells of the first table behind a heading."""
    table = PAGE.split(heading, 1)[1].partition("\n| ")[2].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines()[2:]]


@pytest.mark.parametrize("block", _blocks("json"))
def test_configurations_load(block: str) -> None:
    config = load_config(json.loads(block), 2)
    assert config.optimizer.type == "muon"
    assert not any(line.startswith("warning") for line in config.messages)
    assert muon_rules(config, ("float32",)).scale == config.muon.scale


def test_programs_run(capsys: pytest.CaptureFixture[str]) -> None:
    for block in _blocks("python"):
        exec(compile(block, "docs/muon.md", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out == "torch.Size([64, 32]) 1\n"


def test_commands_are_those_of_the_program() -> None:
    from windlass.cli import app

    train, plan = ([word for word in block.split() if word != "windlass"] for block in _blocks("sh"))
    result = CliRunner().invoke(app, plan)
    assert result.exit_code == 0, result.output
    shown = next(block for block in _blocks("text") if block.startswith("Muon"))
    assert shown.strip() in result.output
    known = CliRunner().invoke(app, [train[0], "--help"], terminal_width=200).output
    assert [word for word in train if word.startswith("--") and word not in known] == []


def test_keys_and_defaults_are_those_of_the_code() -> None:
    listed = {row[0].strip("`"): row[1].strip("`") for row in _rows("\n`muon`:\n")}
    assert listed == {name: json.dumps(field.default) for name, field in MuonConfig.model_fields.items()}
    names = [name for row in _rows("`optimizer.params`:\n") for name in re.findall(r"`(\w+)`", row[0])]
    assert set(names) == set(GivenMuonParams.model_fields)


def test_spectra_of_the_coefficient_sets() -> None:
    """The table's bounds, by iterating the polynomials on singular values from 0.01 to 1."""
    rows = {row[0].strip("`"): row[1:3] for row in _rows("## Which coefficients")}
    assert set(rows) == set(COEFFICIENTS)
    for name, (steps, bounds) in rows.items():
        coefficients = COEFFICIENTS[name]
        ends = [_iterate(10 ** (-2 + place / 2000), coefficients) for place in range(4001)]
        low, high = (float(word) for word in bounds.split(" and "))
        places = len(bounds.split()[0].partition(".")[2])
        assert (int(steps), low, high) == (len(coefficients), round(min(ends), places), round(max(ends), places))
    assert min(_iterate(10 ** (-3 + place / 2000), COEFFICIENTS["polar_express"]) for place in range(6001)) > 0.84


def _iterate(value: float, coefficients: Coefficients) -> float:
    for a, b, c in coefficients:
        value = a * value + b * value**3 + c * value**5
    return value


@pytest.mark.parametrize(("n", "m"), [(128, 128), (128, 512), (384, 1536)])
def test_operations_are_counted_as_the_page_says(n: int, m: int) -> None:
    assert standard_flops(n, m, 5) == 5 * (4 * n * n * m + 2 * n**3)
    once = 4 * n * n * m + 34 * n**3
    assert gram_flops(n, m, COEFFICIENTS["jordan"], ()) == once
    assert gram_flops(n, m, COEFFICIENTS["jordan"], (3,)) == once + 4 * n * n * m - 6 * n**3


def test_rates_of_the_recipe_are_those_of_the_page() -> None:
    shown = {row[0]: row[1:] for row in _rows("### Rates")}
    assert set(shown) == set(SHAPES)
    for model, cells in shown.items():
        for optimizer, cell in zip(OPTIMIZERS, cells, strict=True):
            params = default_config(model, 300, 1, optimizer=optimizer)["optimizer"]["params"]
            rates = [params[key] for key in (["muon_lr", "adam_lr"] if optimizer == "muon" else ["lr"])]
            assert [float(word) for word in cell.removesuffix(", not tried").split(" / ")] == rates


def test_pictures_are_there() -> None:
    for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", PAGE):
        assert (ROOT / "docs" / name).stat().st_size > 10_000
