"""Triton's interpreter, which runs kernels on the host: it must be asked for before Triton is imported."""

from __future__ import annotations

import os

import pytest

os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter computes with numpy, which tells what IEEE 754 has results for."""
    told = "ignore:(overflow|invalid value|divide by zero) encountered"
    config.addinivalue_line("filterwarnings", rf"{told}:RuntimeWarning:triton\.runtime\.interpreter")
    config.addinivalue_line("filterwarnings", rf"{told} in reduce:RuntimeWarning:numpy\._core\.fromnumeric")
