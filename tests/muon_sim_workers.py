"""Workers for tests/ranks/test_muon_sim.py: ways to break the order of Muon's exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import windlass
from muon_models import build
from muon_oracle import Case
from muon_workers import config_of, costs, train_step
from windlass.accelerator.interface import DoneWork
from windlass.core.muon_exchange import ExchangedDirections


def inputs_used_before_they_arrive() -> Any:
    return _without_wait("_assemble")


def directions_used_before_they_arrive() -> Any:
    return _without_wait("_land")


def _without_wait(name: str) -> Any:
    original = getattr(ExchangedDirections, name)

    def forget(self: ExchangedDirections, *args: Any) -> Any:
        return original(self, *args[:-1], replace(args[-1], work=DoneWork()))

    return patch.object(ExchangedDirections, name, forget)


def sent_before_it_is_written() -> Any:
    original = ExchangedDirections._send

    def send(self: ExchangedDirections, *args: Any) -> Any:
        with patch.object(self.state.accelerator.streams, "wait", lambda event: None):
            return original(self, *args)

    return patch.object(ExchangedDirections, "_send", send)


def train_broken(breakage: Callable[[], Any]) -> str:
    """Train with the breakage; how that ended."""
    with breakage(), costs():
        try:
            with windlass.initialize(build("Sundry"), config_of(Case("Sundry", 3))) as engine:
                for step in range(2):
                    train_step(engine, step)
        except windlass.WindlassError as error:
            return f"{type(error).__name__}: {error}"
    return "trained"
