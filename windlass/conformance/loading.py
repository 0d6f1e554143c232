"""Load the suite's plugin when pytest is asked for `windlass.conformance`, and leave every other run of pytest alone.

pytest reads the command line before it looks into packages named after --pyargs, so a conftest there comes too late to
add options. This module is a plugin of every pytest in the environment and therefore imports next to nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pytest

SUITE = "windlass.conformance"
PLUGIN = f"{SUITE}.plugin"


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Called by pytest when options can still be added."""
    known = early_config.known_args_namespace
    if known.pyargs and any(str(name).partition("::")[0].startswith(SUITE) for name in known.file_or_dir):
        early_config.pluginmanager.import_plugin(PLUGIN)
