"""How fast things go: on one device in this process, and between the ranks of a job."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

from windlass.accelerator.interface import Accelerator
from windlass.conformance.collective_values import blank, place
from windlass.conformance.opening import opened

_REPEATS: Final = 5
_SHORTEST_SECONDS: Final = 2e-3
_MOST_CALLS: Final = 64
_MOST_WAITING_SECONDS: Final = 0.1


def measure_seconds(accelerator: Accelerator, action: Callable[[], object]) -> float:
    """Seconds of one call of `action` on the device's clock: the median of repeated measurements, once it is warm.

    A call that is too quick for the clock is repeated within a measurement.
    """
    calls = 1
    seconds = _measure(accelerator, action, 2)
    begun = time.perf_counter()  # a simulated device may be quick on its own clock and slow on ours
    while (seconds := _measure(accelerator, action, calls)) < _SHORTEST_SECONDS and calls < _MOST_CALLS:
        if time.perf_counter() - begun > _MOST_WAITING_SECONDS:
            break
        calls *= 4
    times = [seconds, *(_measure(accelerator, action, calls) for _ in range(_REPEATS - 1))]
    median = statistics.median(times) / calls
    assert len(times) == _REPEATS
    assert math.isfinite(median), times
    assert median > 0, f"the clock stood still: {times}"
    return median


def _measure(accelerator: Accelerator, action: Callable[[], object], calls: int) -> float:
    begun = accelerator.clock()
    for _ in range(calls):
        action()
    return accelerator.clock() - begun


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
