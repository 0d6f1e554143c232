"""How fast things go between the ranks of a job; what is measured in one process is in `windlass.rates`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Final

import torch

from windlass.conformance.collective_values import blank, place
from windlass.conformance.opening import opened

_REPEATS: Final = 5


def collective_rates(elements: int) -> dict[str, float]:
    """Bytes that this rank receives per second, by collective, with `elements` of fp32 per rank."""
    with opened() as accelerator:
        collectives, world = accelerator.collectives, accelerator.collectives.world
        part = place(accelerator, torch.zeros(elements, device="cpu"), "shared whole").tensor
        whole = blank(accelerator, elements * world.size, torch.float32, "shared whole").tensor
        actions: dict[str, Callable[[], object]] = {
            "all_gather": lambda: collectives.all_gather(whole, part, world).wait(),
            "reduce_scatter": lambda: collectives.reduce_scatter(part, whole, world).wait(),
        }
        received = (world.size - 1) * elements * 4
        rates = {}
        for name, action in actions.items():
            times = []
            for _ in range(_REPEATS + 1):  # as often on every rank
                collectives.barrier(world)
                begun = accelerator.clock()
                action()
                times.append(accelerator.clock() - begun)
            rates[name] = received / statistics.median(times[1:])
        return rates
