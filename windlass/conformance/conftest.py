"""Loads the suite's plugin where pytest is given this folder by its path."""

pytest_plugins = ["windlass.conformance.plugin"]
