"""Warnings of packages that belong to neither windlass nor the backend: they are noted, and no test fails for them.

A framework that a backend stands on may warn when it is imported or first used, and its vendor has to mend that. What
is raised in the name of windlass, of torch, of the suite or of the backend's own package stays an error.
"""

from __future__ import annotations

import importlib.metadata
import re
import warnings
from pathlib import Path
from typing import Final

_OURS: Final = frozenset({"windlass", "torch", "pytest", "pytest-timeout"})  # distributions


class ForeignWarnings:
    """What was noted, each text once, in the order in which it came."""

    def __init__(self) -> None:
        self.noted: list[str] = []

    def note(self, text: str) -> None:
        if text not in self.noted:
            self.noted.append(text)


def foreign_modules(backend: str) -> str:
    """A pattern for the names of modules of all installed distributions but ours and `backend`, the backend's own.

    It has no colon, so that it fits into a filter that is written as a text.
    """
    ours = {_normal(name) for name in (*_OURS, backend)}
    names = {
        package
        for package, distributions in importlib.metadata.packages_distributions().items()
        if package.isidentifier() and not ours & {_normal(name) for name in distributions}
    }
    return rf"({'|'.join(sorted(names))})(\.|$)"


def describe_warning(message: warnings.WarningMessage) -> str:
    """A warning in one line: kind, text, and the file it is attributed to, without where that is installed."""
    text = " ".join(str(message.message).split())
    return f"{message.category.__name__}: {text} ({'/'.join(Path(message.filename).parts[-2:])})"


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
