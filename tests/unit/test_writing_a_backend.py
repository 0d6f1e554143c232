"""docs/writing-a-backend.md shows the package in tests/plugin as it is, and what it prints is what happens."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fake_plugins import Installed
from windlass.accelerator.interface import Accelerator, Collectives, Memory, Streams
from windlass.accelerator.registry import open_accelerator
from windlass.conformance.expected import read_expected_failures
from windlass.conformance.results import STATUSES

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "tests" / "plugin"
PAGE = (ROOT / "docs" / "writing-a-backend.md").read_text()
FILES = dict(re.findall(r"^\*\*`([^`]+)`\*\*\n\n```\w+\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))
PYTHON = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SNIPPETS = [text for text in PYTHON if text not in FILES.values()]


@pytest.fixture
def _quick_installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package importable, with the entry point that its pyproject.toml declares."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    installed = Installed(monkeypatch)
    for name, module in project["entry-points"]["windlass.backends"].items():
        installed.distribution(name, module, package=project["name"], version=project["version"])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "quickhost"]:
        del sys.modules[name]


def test_the_page_shows_the_files_of_the_packages() -> None:
    names = {"pyproject.toml", *(path.relative_to(PLUGIN).as_posix() for path in PLUGIN.glob("quickhost/*.py"))}
    files = {name: (PLUGIN / name).read_text() for name in names}
    module = "generic_host/__init__.py"
    assert {**files, module: (ROOT / "tests" / "generic_host" / module).read_text()} == FILES


def test_the_expected_failures_of_the_page_can_be_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(\[\[expected_failure.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "failures.toml").write_text(text)
    (entry,) = read_expected_failures(tmp_path / "failures.toml").values()
    golden = json.loads((ROOT / "windlass" / "conformance" / "golden.json").read_text())
    assert entry.id in json.dumps(golden)


def test_the_statuses_of_the_page_are_those_of_the_report() -> None:
    rows = re.findall(r"^\| ([a-z][a-z ,-]*) \| ", PAGE.partition("## Prove it")[2], re.MULTILINE)
    listed = {name for row in rows for name in row.split(", ")} - {"status"}
    assert listed == set(STATUSES) - {"not run"}


def test_the_backend_is_small() -> None:
    texts = [path.read_text() for path in PLUGIN.glob("quickhost/*.py")]
    assert sum(len(text.splitlines()) for text in texts) <= 60


@pytest.mark.usefixtures("_quick_installed")
def test_the_backend_opens_and_its_kernel_is_exact() -> None:
    accelerator = open_accelerator("quick")
    try:
        generator = np.random.default_rng(0)
        values = generator.standard_normal(1000).astype(np.float32)
        scale = np.float32(0.3)
        for dtype in (torch.float32, torch.bfloat16):
            source = torch.from_numpy(values.copy())
            result = accelerator.kernels["scale_cast"](torch.empty(1000, dtype=dtype), source, torch.tensor(scale))
            wanted = torch.from_numpy(values * scale).to(dtype)  # numpy multiplies fp32 by fp32 in fp32
            assert torch.equal(result, wanted)
        assert accelerator.counters.kernels["scale_cast", "one-pass"].calls == 2
        state = accelerator.rng_state()
        first = torch.rand(4)
        accelerator.set_rng_state(state)
        assert torch.equal(torch.rand(4), first)
    finally:
        accelerator.close()


@pytest.mark.usefixtures("_quick_installed")
def test_the_snippets_run_as_printed() -> None:
    printed = io.StringIO()
    for snippet in SNIPPETS:
        names: dict[str, object] = {}
        with contextlib.redirect_stdout(printed):
            exec(compile(snippet, "docs/writing-a-backend.md", "exec"), names)
        opened = names.get("accelerator")
        if isinstance(opened, Accelerator):
            opened.close()
    assert len(SNIPPETS) == 2
    assert f"It prints `{printed.getvalue().strip()}`" in PAGE


@pytest.mark.parametrize("facet", [Memory, Streams, Collectives, Accelerator])
def test_the_table_names_all_that_must_be_written(facet: type) -> None:
    starts = (f"| `{facet.__name__}`", f"| the {facet.__name__.lower()}")
    row = next(line for line in PAGE.splitlines() if line.startswith(starts))
    listed = set(re.findall(r"`(\w+)`", row.split("|")[2]))
    assert listed == getattr(facet, "__abstractmethods__", frozenset())
