"""Ways to break the core's ordering; each must be noticed by the strict simulated accelerator."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

from torch import Tensor

import windlass
from windlass.accelerator.interface import DoneWork, Streams
from windlass.conformance.models import build
from windlass.conformance.opening import opened
from windlass.conformance.training import config_of, train_engine, windlass_ranks
from windlass.core.executor import Executor
from windlass.core.gather_slots import GatherSlots
from windlass.core.gradients import Gradients
from windlass.core.state import ModelState


def weights_used_before_they_arrive() -> Any:
    return patch.object(GatherSlots, "_settle", lambda self, slot: self._arriving.pop(slot, None))


def reduced_gradients_used_before_they_arrive() -> Any:
    original = Gradients._settle_oldest

    def settle(self: Gradients) -> None:
        self._flying[0].work = DoneWork()
        original(self)

    return patch.object(Gradients, "_settle_oldest", settle)


def lanes_start_before_what_they_read_is_written() -> Any:
    original = Executor.__init__

    def start(self: Executor, *args: Any, **more: Any) -> None:
        original(self, *args, **more)
        streams: Streams = self.accelerator.streams
        streams.wait = lambda event: None  # type: ignore[method-assign]

    return patch.object(Executor, "__init__", start)


def shards_rewritten_while_they_are_fetched() -> Any:
    """The update begins although a fetch ahead of the next unit is still reading the shards."""
    original = Executor.step

    def step(self: Executor, *args: Any, **more: Any) -> Any:
        assert self.residency is not None
        slots = self.residency._slots
        unit = self.plan.units[-1]
        assert unit.slot is not None
        self.residency.settle()
        slots.table.invalidate()
        slots.start_fetch(unit.name, unit.slot)
        with patch.object(GatherSlots, "settle", lambda self: None):
            return original(self, *args, **more)

    return patch.object(Executor, "step", step)


def parameters_left_in_their_region() -> Any:
    """What the core does where views alias: the parameters are not written again after an update."""
    return patch.object(ModelState, "rebind_copies", lambda self: None)


def train_broken(stage: int, breakage: Callable[[], Any]) -> str:
    """Train a few steps with the core broken; what came of it in words, or "nothing"."""
    with opened() as accelerator, breakage():
        engine = windlass.initialize(build("Network"), config_of(stage, 1, windlass_ranks()), accelerator=accelerator)
        try:
            train_engine(engine, 3)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"


def states_after_forgotten_copies() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights after some steps where parameters are not written again, and where they are."""
    states = []
    for breakage in (parameters_left_in_their_region, nullcontext):
        with opened() as accelerator, breakage():
            model = build("Network")
            with windlass.initialize(model, config_of(1, 1, windlass_ranks()), accelerator=accelerator) as engine:
                train_engine(engine, 3)
                states.append(engine.full_state_dict())
    return states[0], states[1]
