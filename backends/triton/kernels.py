"""What this package offers: the kernels of all families, and the programs they are made of."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Final

from windlass.accelerator.kernels import Kernel

FAMILIES: Final = (
    "adamw",
    "adamw_many",
    "vectors",
    "momentum",
    "cross_entropy",
    "norms",
    "normalize",
    "symmetric",
    "polar",
)
"""Modules of this package with `KERNELS`, what is registered, and `VARIANTS`, what is compiled ahead of time."""


def load_families() -> tuple[ModuleType, ...]:
    """The modules that hold kernels; this imports Triton."""
    return tuple(import_module(f"windlass.backends.triton.{family}") for family in FAMILIES)


def triton_kernels() -> tuple[Kernel, ...]:
    """The kernels in Triton, for a device that Triton compiles for."""
    return tuple(kernel for family in load_families() for kernel in family.KERNELS)
