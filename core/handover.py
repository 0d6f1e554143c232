"""Carry training state from one plan to another in memory: when parameters are unfrozen in mid-run."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

from torch import Tensor

from windlass.core.state import MOMENTS, WEIGHT, ModelState


@dataclass(frozen=True)
class Handover:
    """Everything that a plan knows, in logical shapes on the host: weights and moments by name, update counts."""

    values: dict[str, dict[str, Tensor]]  # key ("weight" or a moment) -> parameter -> fp32 tensor
    steps: dict[str, int]


def take_over(state: ModelState) -> Handover:
    """Read all of it. A collective."""
    values = {key: dict(state.named_values(key)) for key in (WEIGHT, *chain(*MOMENTS.values()))}
    return Handover(values, dict(state.steps))


def put_back(handover: Handover, state: ModelState) -> None:
    """Give every parameter its ordinary tensor again, whole, after the old plan has let go of it."""
    for name, value in handover.values[WEIGHT].items():
        parameter = state.parameters[name]
        parameter.data = value.to(state.accelerator.device, parameter.dtype)


def hand_over(handover: Handover, state: ModelState) -> None:
    """Write it into a new plan's state; what is new there keeps its initial values."""
    for key, values in handover.values.items():
        for name, value in values.items():
            if name in state.plan.placement_by_name:
                state.write(name, key, value.to(state.accelerator.device))
    state.steps.update({name: count for name, count in handover.steps.items() if name in state.steps})
