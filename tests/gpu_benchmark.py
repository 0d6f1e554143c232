"""What the tests of benchmarks/gpu.py share: its modules, which are no package of ours, and rows."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).resolve().parents[1]

Rows = list[dict[str, Any]]


def part(name: str) -> Any:
    """A module of the benchmark's parts."""
    return module(f"gpu_parts.{name}")


def module(name: str) -> Any:
    """A module in the folder of benchmarks."""
    folder = str(ROOT / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def make_row(name: str, case: str, by: str, **values: Any) -> dict[str, Any]:
    """A row as the report holds it."""
    made: dict[str, Any] = part("rows").Row("kernels", name, case, by, **values).to_json()
    return made
