"""Level 0: the counters that a plan's predictions are compared with."""

from __future__ import annotations

import torch

from windlass.accelerator.interface import Accelerator
from windlass.conformance.allocations import allocated, bring
from windlass.conformance.requirements import requires


@requires(level=0, must="A snapshot of the counters holds every kind of event as plain numbers, and stays as it was.")
def test_snapshot(accelerator: Accelerator) -> None:
    counters = accelerator.counters
    before = counters.snapshot()
    assert "reads" in before["host"]
    with allocated(accelerator, torch.ones(10)) as one, allocated(accelerator, torch.ones(10)) as other:
        accelerator.memory.copy(one, other, tag="conformance snapshot").wait()
        accelerator.read_host(one, tag="conformance")
        accelerator.kernels["square_sum"](one, bring(accelerator, torch.tensor(1.0)))
        accelerator.collectives.all_reduce(one, accelerator.collectives.world, tag="conformance snapshot").wait()
    after = counters.snapshot()
    kernel = f"kernel/square_sum/{accelerator.kernels.chosen()['square_sum']}"
    for key, nbytes in (
        ("copy/device/conformance snapshot", 40),
        (kernel, 0),
        ("collective/all_reduce/conformance snapshot", 0),  # of one rank: nothing is received
    ):
        previous = before.get(key, {"calls": 0, "bytes": 0})
        assert after[key] == {"calls": previous["calls"] + 1, "bytes": previous["bytes"] + nbytes}, key
    assert after["host"] == {"reads": before["host"]["reads"] + 1}
    accelerator.read_host(bring(accelerator, torch.ones(1)), tag="conformance")
    assert after["host"] == {"reads": before["host"]["reads"] + 1}


@requires(level=0, must="After a reset the counters start from nothing, and all facets go on counting in them.")
def test_reset(accelerator: Accelerator) -> None:
    counters = accelerator.counters
    accelerator.to_host(bring(accelerator, torch.ones(10)))
    counters.reset()
    assert counters.snapshot() == {"host": {"reads": 0}}
    accelerator.to_host(bring(accelerator, torch.ones(10)))
    assert counters.snapshot() == {"host": {"reads": 0}, "copy/down/to_host": {"calls": 1, "bytes": 40}}
    test_snapshot(accelerator)
