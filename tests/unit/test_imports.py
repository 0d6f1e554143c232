"""Importing windlass is quick and touches no framework, so that the command and its errors come at once."""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import windlass

ROOT = Path(__file__).resolve().parents[2]
FRAMEWORKS = {"jax", "jaxlib", "numba", "numpy", "torch", "torch_xla", "triton"}
# reference.py is tensor arithmetic: it imports torch, and a backend imports it when it is opened.
ACCELERATOR_MODULES = sorted({path.stem for path in (ROOT / "accelerator").glob("*.py")} - {"__init__", "reference"})


def run_python(code: str) -> str:
    """What `code` prints in a new interpreter, outside the repository."""
    return subprocess.run([sys.executable, "-c", code], cwd="/", check=True, stdout=subprocess.PIPE, text=True).stdout


def modules_loaded_by(statement: str) -> set[str]:
    """Top-level modules that `statement` adds to a new interpreter."""
    code = f"import sys; before = set(sys.modules); {statement}; print(*sys.modules.keys() - before)"
    return {name.partition(".")[0] for name in run_python(code).split()}


def test_import_windlass_loads_no_framework() -> None:
    loaded = modules_loaded_by("import windlass")
    assert "windlass" in loaded
    assert loaded.isdisjoint(FRAMEWORKS | {"matplotlib", "pydantic", "rich", "typer"})


def test_import_windlass_takes_less_than_50_ms() -> None:
    code = "import time; start = time.perf_counter(); import windlass; print(time.perf_counter() - start)"
    seconds = statistics.median(float(run_python(code)) for _ in range(5))
    assert seconds < 0.050, f"`import windlass` takes {seconds * 1e3:.0f} ms beyond the interpreter's own start."


def test_import_accelerator_loads_no_framework() -> None:
    assert modules_loaded_by("import windlass.accelerator").isdisjoint(FRAMEWORKS)


@pytest.mark.parametrize("module", ACCELERATOR_MODULES)
def test_accelerator_module_loads_no_framework(module: str) -> None:
    assert modules_loaded_by(f"import windlass.accelerator.{module}").isdisjoint(FRAMEWORKS)


@pytest.mark.parametrize("package", ["windlass.backends", "windlass.core"])
def test_import_of_a_package_loads_no_vendor(package: str) -> None:
    assert modules_loaded_by(f"import {package}").isdisjoint(FRAMEWORKS - {"torch", "numpy"})


# What every pytest of the environment imports, what tests are decorated with, and what the command starts with.
@pytest.mark.parametrize("module", ["", ".loading", ".requirements", ".command"])
def test_conformance_loads_neither_a_framework_nor_pytest(module: str) -> None:
    loaded = modules_loaded_by(f"import windlass.conformance{module}")
    assert loaded.isdisjoint(FRAMEWORKS | {"_pytest", "matplotlib", "pydantic", "pytest"})


def test_training_does_not_load_the_compiler_of_torch() -> None:
    """It takes longer to import than all the rest of a rank. Only where weights are gathered is it needed."""
    train = "from windlass.conformance.training import train_grid; train_grid('Network', [0, 2], [2], 1)"
    code = f"import os, sys; os.environ['WINDLASS_ACCELERATOR'] = 'cpu'; {train}; print(*sys.modules)"
    loaded = set(run_python(code).split())
    assert "windlass.core.executor" in loaded
    assert loaded.isdisjoint({"torch._dynamo.symbolic_convert", "sympy"})


@pytest.mark.parametrize("name", [name for name in windlass.__all__ if not name.startswith("__")])
def test_every_public_name_loads_on_first_use(name: str) -> None:
    value = getattr(windlass, name)
    assert value.__name__ == name
    assert value.__module__.startswith("windlass.")
    assert name in dir(windlass)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"has no attribute 'initialise'; the public names are .*initialize"):
        windlass.initialise  # type: ignore[attr-defined]  # noqa: B018


def test_the_bare_folders_are_not_installed() -> None:
    code = "import importlib.util; print(*map(importlib.util.find_spec, ['accelerator', 'backends', 'core']))"
    assert run_python(code).split() == ["None"] * 3
