"""The backend "mutant": another one, broken as the variable WINDLASS_MUTANT says in this process and its ranks.

The variable holds the name of a mutation, or the name of a backend, which is then left whole.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from mutations import apply_once, mutations
from windlass.accelerator.hookspecs import Probe, hookimpl
from windlass.accelerator.interface import Accelerator

NAME = "mutant"
VARIABLE = "WINDLASS_MUTANT"


def _base() -> ModuleType:
    asked = os.environ[VARIABLE]
    found = mutations().get(asked)
    if found is not None:
        apply_once(asked)
    return importlib.import_module(f"windlass.backends.{asked if found is None else found.base}")


@hookimpl
def windlass_probe() -> Probe:
    probe: Probe = _base().windlass_probe()
    return probe


@hookimpl
def windlass_open(name: str, index: int) -> Accelerator | None:
    base = _base()
    accelerator: Accelerator | None = base.windlass_open(base.NAME, index)
    if accelerator is not None:
        accelerator.name = f"{name}:{index}"
    return accelerator
