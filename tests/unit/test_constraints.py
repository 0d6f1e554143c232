"""The lists of pinned versions say the same, and name what windlass depends on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / name).read_text(), re.MULTILINE))


def depended_on(extra: str | None = None) -> set[str]:
    """Normal names of packages that windlass, or one of its extras, asks for."""
    asked = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    names = {re.match(r"[\w.-]+", one)[0].lower().replace("_", "-") for one in asked}  # type: ignore[index]
    return names - {"windlass"}


def test_both_lists_pin_the_same_versions_but_of_torch() -> None:
    main, xla = pins("constraints.txt"), pins("constraints-xla.txt")
    shared = main.keys() & xla.keys()
    assert len(shared) > 20
    assert {name for name in shared if main[name] != xla[name]} == {"torch"}


def test_what_windlass_depends_on_is_in_both_lists() -> None:
    needed = depended_on() | depended_on("conform") | depended_on("test")
    assert needed | depended_on("cuda") <= pins("constraints.txt").keys()
    # This list is installed without looking at what a package asks for; `make test-xla` runs one process of pytest.
    assert (needed | depended_on("xla")) - {"pytest-xdist"} <= pins("constraints-xla.txt").keys()
