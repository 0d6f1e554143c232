"""Level 2 on lazy devices: what runs a program, and what only orders what comes later."""

from __future__ import annotations

import torch

from windlass.accelerator.interface import LANES, Accelerator, Work
from windlass.conformance.allocations import allocated, assert_holds
from windlass.conformance.requirements import requires

COUNT = 1000


def executed(accelerator: Accelerator) -> int:
    """Programs run so far, once all that was begun is over."""
    accelerator.capabilities.require("lazy", "operations run as they come, and there are no programs to count")
    accelerator.streams.synchronize()
    return accelerator.program_counts().executed


@requires(level=2, must="On a lazy device boundary() runs what is pending, as one program.", needs="lazy")
def test_boundary_runs_what_is_pending(accelerator: Accelerator) -> None:
    before = executed(accelerator)
    with allocated(accelerator, torch.zeros(COUNT)) as total, allocated(accelerator, torch.ones(COUNT)) as one:
        for step in range(1, 4):
            accelerator.streams.boundary()
            before = executed(accelerator)
            for _ in range(5):
                total.add_(one)
                accelerator.memory.copy(one, one * 2).wait()
                accelerator.memory.copy(one, one / 2).wait()
            accelerator.streams.boundary()
            assert executed(accelerator) == before + 1
            assert_holds(accelerator, total, torch.full((COUNT,), 5.0 * step))


@requires(
    level=2,
    must="On a lazy device lanes, records, events and waiting run nothing and block nobody: they order one program.",
    needs="lazy",
)
def test_order_runs_nothing(accelerator: Accelerator) -> None:
    streams, wanted = accelerator.streams, 0.0
    with allocated(accelerator, torch.zeros(COUNT)) as source, allocated(accelerator, torch.zeros(COUNT)) as target:
        for _ in range(3):
            streams.boundary()
            before = executed(accelerator)
            source.add_(1.0)
            event: Work = streams.record()
            for lane in LANES:
                with streams.lane(lane):
                    streams.wait(event)
                    accelerator.memory.copy(target, source).wait()
                    source.add_(target)
                    event = streams.record()
            streams.wait(event)
            streams.boundary()
            assert executed(accelerator) == before + 1
            wanted = 2.0 ** len(LANES) * (wanted + 1.0)
            assert_holds(accelerator, source, torch.full((COUNT,), wanted))
